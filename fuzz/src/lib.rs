//! Fuzz targets: each takes any bytes and panics if a promise is broken. docs/testing.md, "Fuzzing", says how to run them.
//!
//! `tests/corpus.rs` runs each target on the inputs of its folder in `corpus/`, so what a fuzzer has found stays found.

use terway_core::cni::NetConf;
use terway_core::ipam::Record;
use terway_core::objects::{Change, Kind, Object, Objects};
use terway_core::policy::{Compiler, Event, Maps};
use terway_core::service::{MapContents, NodeFacts, Planner, Settings};
use terway_ebpf::family::{Family, V4, V6};
use terway_ebpf::parse::{Fragment, Packet, Payload};

/// A fuzz target.
pub type Target = fn(&[u8]);

/// All targets by name; the name is that of the binary and of the folder in `corpus/`.
pub const TARGETS: &[(&str, Target)] = &[
    ("packet", packet),
    ("cni_stdin", cni_stdin),
    ("eni_conf", eni_conf),
    ("kubernetes_object", kubernetes_object),
    ("store_record", store_record),
    #[cfg(feature = "daemon")]
    ("manifest", manifest),
    #[cfg(feature = "daemon")]
    ("openapi_reply", openapi_reply),
    #[cfg(feature = "daemon")]
    ("store_file", store_file),
];

/// The packet parser of both families: the fast path and the slow path see the same flow in a frame.
pub fn packet(data: &[u8]) {
    let mut bytes = data.to_vec();
    let _refused = F::<V6>::parsed(&bytes);
    F::<V6>::agree(&bytes);
    // The fast path does not look at the length field of IPv4, whose faults change no flow; the slow path does.
    if let Some(length) = bytes.get_mut(16..18) {
        length.copy_from_slice(&[0, 100]);
    }
    F::<V4>::agree(&bytes);
    let _refused = F::<V4>::parsed(&data.to_vec());
}

struct F<T>(std::marker::PhantomData<T>);

impl<T: Family> F<T>
where
    T::Addr: PartialEq + std::fmt::Debug,
{
    fn parsed(bytes: &Vec<u8>) -> Option<Packet<T>> {
        let mut packet = Packet::new();
        T::parse(bytes, &mut packet).ok().map(|()| packet)
    }

    fn agree(bytes: &Vec<u8>) {
        let Some(fast) = T::fast_headers(bytes) else { return };
        let Some(packet) = Self::parsed(bytes) else { panic!("the fast path takes what the slow path refuses") };
        assert_eq!((fast.src, fast.dst, fast.ports), (packet.src, packet.dst, packet.ports));
        assert_eq!((fast.protocol, fast.tcp_flags), (packet.protocol, packet.tcp_flags));
        assert_eq!((packet.fragment, packet.payload), (Fragment::Whole, Payload::Plain));
    }
}

/// The plugin's standard input: what is accepted has a name that can be part of a key.
pub fn cni_stdin(data: &[u8]) {
    let _version = (NetConf::version_of(data), NetConf::version_asked(data).is_ok());
    let Ok(conf) = NetConf::decode(data) else { return };
    // CNI specification 1.1, "Configuration format": `name`.
    let sound = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    assert!(conf.network.starts_with(|c: char| c.is_ascii_alphanumeric()), "network name `{}`", conf.network);
    assert!(conf.network.chars().all(sound), "network name `{}`", conf.network);
    let _rest = (conf.options().is_ok(), conf.valid_attachments().is_ok());
}

/// The daemon's configuration: a text has one meaning.
pub fn eni_conf(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let once = format!("{:?}", terway_core::config::parse(text));
    assert_eq!(once, format!("{:?}", terway_core::config::parse(text)));
}

/// A Kubernetes object, its kind by the first byte: what can be read can be planned and compiled, and is gone without trace when it is deleted.
pub fn kubernetes_object(data: &[u8]) {
    let Some((kind, text)) = data.split_first() else { return };
    let kind = Kind::ALL[usize::from(*kind) % Kind::ALL.len()];
    let Ok(object) = Object::read(kind, &mut serde_json::Deserializer::from_slice(text)) else { return };
    let (mut objects, key) = (Objects::default(), object.key());
    let mut planner = Planner::new(NodeFacts { name: "node".into(), zone: None }, Settings::default());
    let (mut compiler, ops) = Compiler::new();
    let (mut services, mut policies) = (MapContents::default(), Maps::default());
    ops.iter().for_each(|op| policies.apply(op));
    let _nothing = planner.sync(&objects);
    for change in [Change::Upsert(Box::new(object)), Change::Delete(key)] {
        let Some(applied) = objects.apply(change) else { return };
        let plan = planner.update(&objects, std::slice::from_ref(&applied));
        plan.ops.iter().chain(&plan.retire).for_each(|op| services.apply(op));
        let ops = Event::from_applied(applied).map_or_else(Vec::new, |event| compiler.step(event));
        ops.iter().for_each(|op| policies.apply(op));
    }
    assert!(
        services.frontends.is_empty() && services.backends.is_empty() && services.tables.is_empty(),
        "{services:?}"
    );
    for _ in 0..2 {
        compiler.run_deferred().iter().for_each(|op| policies.apply(op));
    }
    assert_eq!(policies, compiler.maps());
}

/// A record of the store: what can be read is written the same.
pub fn store_record(data: &[u8]) {
    let Ok(record) = Record::decode(data) else { return };
    let Ok(bytes) = record.encode() else { panic!("a record that was read cannot be written") };
    assert_eq!(Record::decode(&bytes).ok().as_ref(), Some(&record));
}

/// A file of manifests, YAML or JSON by the first byte.
#[cfg(feature = "daemon")]
pub fn manifest(data: &[u8]) {
    let Some((format, text)) = data.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    let name = if format & 1 == 0 { "manifest.yaml" } else { "manifest.json" };
    terway_daemon::fuzz::manifest(std::path::Path::new(name), text);
}

/// A reply of the cloud's OpenAPI.
#[cfg(feature = "daemon")]
pub fn openapi_reply(data: &[u8]) {
    terway_daemon::fuzz::openapi_reply(data);
}

/// The store's file: damage is an error, and what can be opened can be read.
#[cfg(feature = "daemon")]
pub fn store_file(data: &[u8]) {
    let Ok(folder) = tempfile::tempdir() else { return };
    let path = folder.path().join("state.redb");
    if std::fs::write(&path, data).is_err() {
        return;
    }
    if let Ok(store) = terway_daemon::store::Store::open(&path) {
        assert!(store.load().is_ok(), "a store that was opened cannot be read");
    }
}
