//! The network configuration on stdin.
//!
//! Read in two steps. [`NetConf::decode`] takes what every verb needs; [`NetConf::options`] and
//! [`NetConf::valid_attachments`] take the rest when a verb needs it. A DEL thereby succeeds under a configuration whose
//! other keys are wrong: runtimes hand the *present* conflist to the DEL of a pod that was added under an older one.
//! Unknown keys are ignored.

use std::time::Duration;

use ipnetwork::IpNetwork;
use serde_json::{Map, Value};

use super::env::is_identifier;
use super::json::Object;
use super::result::{CniResult, Dns, dns};
use super::runtime::RuntimeConfig;
use super::version::Version;
use super::{DEFAULT_QUEUE_DIR, DEFAULT_SOCKET};
use crate::cidr;
use crate::errors::{CNI_DECODE, CNI_VERSION, Error, GC_NO_LIST};

/// A network configuration of a version that is spoken here, with a valid name.
#[derive(Clone, Debug, PartialEq)]
pub struct NetConf {
    /// Version of the specification that the answer has to follow.
    pub version: Version,
    /// `name`: the network's, first part of every attachment's key.
    pub network: String,
    /// `daemon_socket`: path of the daemon's unix socket.
    pub daemon_socket: String,
    /// `queue_dir`: folder of the DELs that the daemon could not take.
    pub queue_dir: String,
    /// `timeout_ms`: the whole of an operation, where the verb's own time is not wanted; 100 to 600 000.
    pub timeout: Option<Duration>,
    document: Map<String, Value>,
}

/// What ADD and CHECK take from the configuration.
///
/// The keys are those of the reference project's configuration (terway), so that its conflists work unchanged. Only `mtu`,
/// `runtimeConfig`, `dns` and `prevResult` change what the plugin does; the others are checked, so that a typing error
/// shows, and decided by the daemon's own configuration (eni-config), which knows the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// `mtu` of the pod's interface in bytes; `None` leaves it to the daemon.
    pub mtu: Option<u32>,
    /// `veth_prefix`: first letters of the name of the node's end.
    pub veth_prefix: Option<String>,
    /// `eniip_virtual_type`.
    pub virtual_type: VirtualType,
    /// `host_stack_cidrs`: destinations that pods reach through the node's own stack.
    pub host_stack_cidrs: Vec<IpNetwork>,
    /// `disable_host_peer`: no link between the node and a pod with its own NIC.
    pub disable_host_peer: bool,
    /// `vlan_strip_type`: whether the datapath (`false`, "filter") or a VLAN device (`true`, "vlan") strips the tag.
    pub vlan_device: bool,
    /// `bandwidth_mode`: `true` for "edt", `false` for "tc".
    pub bandwidth_edt: bool,
    /// `enable_network_priority`.
    pub network_priority: bool,
    /// `debug`. The plugin writes no log file; the daemon logs the call.
    pub debug: bool,
    /// `symmetric_routing_config`.
    pub symmetric_routing: Option<SymmetricRouting>,
    /// `runtimeConfig`.
    pub runtime: RuntimeConfig,
    /// `runtimeConfig.dns`, else the well-known `dns`.
    pub dns: Option<Dns>,
    /// `prevResult`.
    pub previous: Option<CniResult>,
}

/// How a pod's interface is made on a shared ENI.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VirtualType {
    /// A veth pair with eBPF forwarding.
    #[default]
    DatapathV2,
    /// A veth pair and policy routing.
    Veth,
    /// An IPvlan slave of the ENI.
    IpVlan,
}

/// Answers to outside callers leave by the interface they came in (`symmetric_routing_config`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SymmetricRouting {
    /// The node's own interface.
    pub interface: String,
    /// Mark of connections that came in by it.
    pub mark: u32,
    /// Bits of the mark that are used.
    pub mask: u32,
    /// Routing table.
    pub table_id: u32,
    /// Priority of the rule.
    pub rule_priority: u32,
    /// Comment on the netfilter rules.
    pub comment: String,
    /// `true` for nftables, `false` for iptables; `None` picks what the node uses.
    pub nftables: Option<bool>,
}

/// One entry of the list that GC keeps: a container and the name of its interface.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ValidAttachment {
    /// `containerID`.
    pub container_id: String,
    /// `ifname`.
    pub ifname: String,
}

impl NetConf {
    /// Reads what stands on stdin.
    ///
    /// # Errors
    /// `TW0003` (CNI code 6) for what is no JSON object or has a `cniVersion` that is no string, `TW0001` (1) for a version not
    /// spoken here, `TW0004` (7) for a missing or malformed name or another key that every verb needs.
    pub fn decode(stdin: &[u8]) -> Result<Self, Error> {
        let document = object(stdin)?;
        // A configuration without cniVersion is one of 0.1.0 (specification 0.1.0 had no such key).
        let version = match document.get("cniVersion") {
            None => Err(Error::new(CNI_VERSION, "cniVersion is absent, which stands for 0.1.0.")),
            Some(Value::String(text)) => Version::parse(text),
            Some(other) => Err(Error::new(CNI_DECODE, format!("cniVersion should be a string, and is {other}."))),
        }?;
        let root = Object::root(&document);
        let network = match document.get("name").and_then(Value::as_str) {
            Some(name) if is_identifier(name) => name.to_owned(),
            _ => return Err(root.wrong("name", "a network name of the form [A-Za-z0-9][A-Za-z0-9_.-]*")),
        };
        let daemon_socket = path(&root, "daemon_socket", DEFAULT_SOCKET)?;
        let queue_dir = path(&root, "queue_dir", DEFAULT_QUEUE_DIR)?;
        let timeout = match root.unsigned("timeout_ms")? {
            Some(milliseconds @ 100..=600_000) => Some(Duration::from_millis(milliseconds)),
            Some(_) => return Err(root.wrong("timeout_ms", "from 100 to 600000")),
            None => None,
        };
        Ok(Self { version, network, daemon_socket, queue_dir, timeout, document })
    }

    /// The `cniVersion` of a VERSION call, as it stands there; `None` where stdin is empty or does not say.
    ///
    /// # Errors
    /// `TW0003` (CNI code 6) for what is no JSON object or has a `cniVersion` that is no string.
    pub fn version_asked(stdin: &[u8]) -> Result<Option<String>, Error> {
        if stdin.trim_ascii().is_empty() {
            return Ok(None);
        }
        match object(stdin)?.get("cniVersion") {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(other) => Err(Error::new(CNI_DECODE, format!("cniVersion should be a string, and is {other}."))),
        }
    }

    /// The version of a configuration that is wrong otherwise, for the error about it.
    #[must_use]
    pub fn version_of(stdin: &[u8]) -> Option<Version> {
        Version::parse(&Self::version_asked(stdin).ok()??).ok()
    }

    /// What ADD and CHECK need besides.
    ///
    /// # Errors
    /// `TW0004` (CNI code 7) naming the key that is malformed.
    pub fn options(&self) -> Result<Options, Error> {
        let root = Object::root(&self.document);
        let mtu = match root.unsigned32("mtu")? {
            // 68 is the least of IPv4 (RFC 791), 65535 the most of a virtual interface (ETH_MAX_MTU).
            Some(mtu @ 68..=65_535) => Some(mtu),
            None | Some(0) => None,
            Some(_) => return Err(root.wrong("mtu", "from 68 to 65535")),
        };
        let prefix = root.string("veth_prefix")?.filter(|prefix| !prefix.is_empty());
        if prefix.is_some_and(|prefix| prefix.len() > 4 || !is_identifier(prefix)) {
            return Err(root.wrong("veth_prefix", "at most 4 letters, digits, `_`, `.` or `-`"));
        }
        let virtual_type = match lower(&root, "eniip_virtual_type")?.as_str() {
            "" | "datapathv2" => VirtualType::DatapathV2,
            "veth" => VirtualType::Veth,
            "ipvlan" => VirtualType::IpVlan,
            _ => return Err(root.wrong("eniip_virtual_type", "datapathv2, veth or ipvlan")),
        };
        let vlan_device = match lower(&root, "vlan_strip_type")?.as_str() {
            "" | "filter" => false,
            "vlan" => true,
            _ => return Err(root.wrong("vlan_strip_type", "filter or vlan")),
        };
        let bandwidth_edt = match lower(&root, "bandwidth_mode")?.as_str() {
            "" | "edt" => true,
            "tc" => false,
            _ => return Err(root.wrong("bandwidth_mode", "edt or tc")),
        };
        let cidr = |text: String| {
            cidr::parse(&text).map_err(|_no_cidr| root.wrong("host_stack_cidrs", "a list of CIDR blocks"))
        };
        let host_stack_cidrs = root.strings("host_stack_cidrs")?.into_iter().map(cidr).collect::<Result<_, _>>()?;
        let runtime = RuntimeConfig::read(&root)?;
        let dns = match runtime.dns.clone() {
            Some(dns) => Some(dns),
            None => dns(&root)?,
        };
        Ok(Options {
            mtu,
            veth_prefix: prefix.map(str::to_owned),
            virtual_type,
            host_stack_cidrs,
            disable_host_peer: root.boolean("disable_host_peer")?.unwrap_or(false),
            vlan_device,
            bandwidth_edt,
            network_priority: root.boolean("enable_network_priority")?.unwrap_or(false),
            debug: root.boolean("debug")?.unwrap_or(false),
            symmetric_routing: root.object("symmetric_routing_config")?.as_ref().map(symmetric_routing).transpose()?,
            runtime,
            dns,
            previous: match root.value("prevResult") {
                None => None,
                Some(Value::Object(result)) => Some(CniResult::read(result)?),
                Some(_) => return Err(root.wrong("prevResult", "an object")),
            },
        })
    }

    /// The list that GC keeps, sorted. libcni sends it under two names (its issue 1101); both count, and an attachment that
    /// stands under either is kept.
    ///
    /// # Errors
    /// `TW0107` (CNI code 7) without a list: taking its absence for an empty one would take away every pod's network. `TW0004` (7)
    /// for a malformed entry, for the same reason.
    pub fn valid_attachments(&self) -> Result<Vec<ValidAttachment>, Error> {
        let root = Object::root(&self.document);
        let lists = ["cni.dev/valid-attachments", "cni.dev/attachments"];
        if lists.iter().all(|key| root.value(key).is_none()) {
            return Err(Error::new(GC_NO_LIST, "The configuration has no cni.dev/valid-attachments."));
        }
        let mut valid = Vec::new();
        for key in lists {
            for object in root.objects(key)? {
                let part = |key| match object.string(key)? {
                    Some(text) if !text.is_empty() => Ok(text.to_owned()),
                    _ => Err(object.wrong(key, "a string that is not empty")),
                };
                valid.push(ValidAttachment { container_id: part("containerID")?, ifname: part("ifname")? });
            }
        }
        valid.sort();
        valid.dedup();
        Ok(valid)
    }
}

fn object(stdin: &[u8]) -> Result<Map<String, Value>, Error> {
    serde_json::from_slice(stdin).map_err(|error| Error::new(CNI_DECODE, format!("stdin: {error}.")))
}

fn path(root: &Object<'_>, key: &str, default: &str) -> Result<String, Error> {
    match root.string(key)? {
        None | Some("") => Ok(default.to_owned()),
        Some(path) if path.starts_with('/') && !path.contains('\0') => Ok(path.to_owned()),
        Some(_) => Err(root.wrong(key, "an absolute path")),
    }
}

fn lower(root: &Object<'_>, key: &str) -> Result<String, Error> {
    Ok(root.string(key)?.unwrap_or_default().to_ascii_lowercase())
}

/// The defaults are the reference project's.
fn symmetric_routing(object: &Object<'_>) -> Result<SymmetricRouting, Error> {
    let text = |key, default: &str| {
        Ok::<_, Error>(object.string(key)?.filter(|text| !text.is_empty()).unwrap_or(default).to_owned())
    };
    Ok(SymmetricRouting {
        interface: text("interface", "eth0")?,
        mark: object.unsigned32("mark")?.unwrap_or(0x10),
        mask: object.unsigned32("mask")?.unwrap_or(0x10),
        table_id: object.unsigned32("table_id")?.unwrap_or(100),
        rule_priority: object.unsigned32("rule_priority")?.unwrap_or(600),
        comment: text("comment", "terway-symmetric")?,
        nftables: match lower(object, "backend")?.as_str() {
            "" => None,
            "nftables" => Some(true),
            "iptables" => Some(false),
            _ => return Err(object.wrong("backend", "iptables or nftables")),
        },
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn decode(document: &Value) -> Result<NetConf, Error> {
        NetConf::decode(document.to_string().as_bytes())
    }

    fn with(key: &str, value: Value) -> NetConf {
        let mut document = json!({"cniVersion": "1.1.0", "name": "terway", "type": "terway"});
        document[key] = value;
        decode(&document).unwrap()
    }

    #[test]
    fn minimal_network_config() {
        let conf = decode(&json!({"cniVersion": "0.3.1", "name": "n", "type": "terway"})).unwrap();
        assert_eq!((conf.version, conf.network.as_str()), (Version::V0_3_1, "n"));
        assert_eq!((conf.daemon_socket.as_str(), conf.queue_dir.as_str()), (DEFAULT_SOCKET, DEFAULT_QUEUE_DIR));
        let options = conf.options().unwrap();
        assert_eq!((options.mtu, options.virtual_type), (None, VirtualType::DatapathV2));
        assert!(options.bandwidth_edt && options.previous.is_none() && options.symmetric_routing.is_none());
    }

    #[test]
    fn conflist_of_reference_terway() {
        let conf = decode(&json!({
            "cniVersion": "0.4.0", "name": "terway", "type": "terway", "capabilities": {"bandwidth": true},
            "veth_prefix": "cali", "eniip_virtual_type": "IPVlan", "host_stack_cidrs": ["169.254.20.10/32"],
            "disable_host_peer": true, "vlan_strip_type": "vlan", "mtu": 1500, "bandwidth_mode": "tc",
            "enable_network_priority": true, "debug": false, "symmetric_routing": true,
            "symmetric_routing_config": {"interface": "eth1", "mark": 32, "backend": "nftables"},
            "network_policy_provider": "ebpf", "cilium_args": "--x", "cilium_enable_hubble": "true", "auto_mtu": true,
            "key of the future": {"a": [1, 2]},
        }));
        let options = conf.unwrap().options().unwrap();
        assert_eq!((options.mtu, options.virtual_type), (Some(1500), VirtualType::IpVlan));
        assert_eq!(options.veth_prefix.as_deref(), Some("cali"));
        assert_eq!(options.host_stack_cidrs, ["169.254.20.10/32".parse::<IpNetwork>().unwrap()]);
        assert!(options.disable_host_peer && options.vlan_device && options.network_priority && !options.bandwidth_edt);
        let routing = options.symmetric_routing.unwrap();
        assert_eq!((routing.interface.as_str(), routing.mark, routing.mask, routing.table_id), ("eth1", 32, 16, 100));
        assert_eq!((routing.rule_priority, routing.nftables), (600, Some(true)));
    }

    #[test]
    fn unreadable_network_config_error_code() {
        let code = |text: &str| NetConf::decode(text.as_bytes()).unwrap_err().code.cni;
        for broken in ["", "{", "[]", "null", "\u{0}", r#"{"cniVersion": 1.0, "name": "n"}"#] {
            assert_eq!(code(broken), 6, "{broken}");
        }
        for version in
            [r#"{"name": "n"}"#, r#"{"cniVersion": "0.2.0", "name": "n"}"#, r#"{"cniVersion": "", "name": "n"}"#]
        {
            assert_eq!(code(version), 1, "{version}");
        }
        for invalid in [
            r#"{"cniVersion": "1.0.0"}"#,
            r#"{"cniVersion": "1.0.0", "name": ""}"#,
            r#"{"cniVersion": "1.0.0", "name": "a/b"}"#,
        ] {
            assert_eq!(code(invalid), 7, "{invalid}");
        }
    }

    #[test]
    fn invalid_values_do_not_stop_del() {
        let cases = [
            ("mtu", json!("1500")),
            ("mtu", json!(67)),
            ("veth_prefix", json!("longer")),
            ("eniip_virtual_type", json!("bridge")),
            ("host_stack_cidrs", json!(["10.0.0.0"])),
            ("host_stack_cidrs", json!("10.0.0.0/8")),
            ("disable_host_peer", json!("yes")),
            ("vlan_strip_type", json!("strip")),
            ("bandwidth_mode", json!("htb")),
            ("prevResult", json!([])),
            ("dns", json!({"nameservers": "10.0.0.1"})),
            ("runtimeConfig", json!({"portMappings": 1})),
            ("symmetric_routing_config", json!({"backend": "ipfw"})),
        ];
        for (key, value) in cases {
            let error = with(key, value.clone()).options().unwrap_err();
            let last = value.as_object().and_then(|map| map.keys().next().map(String::as_str)).unwrap_or(key);
            assert!(error.code.cni == 7 && error.detail.contains(last), "{key}={value}: {}", error.detail);
        }
    }

    #[test]
    fn daemon_socket_option_for_every_verb() {
        let wrong = |key: &str, value: Value| {
            let document = json!({"cniVersion": "1.0.0", "name": "n", key: value});
            decode(&document).unwrap_err().code.cni
        };
        assert_eq!(wrong("daemon_socket", json!("relative.socket")), 7);
        assert_eq!(wrong("queue_dir", json!(1)), 7);
        assert_eq!(wrong("timeout_ms", json!(99)), 7);
        let conf = with("timeout_ms", json!(2500));
        assert_eq!(conf.timeout, Some(Duration::from_millis(2500)));
        assert_eq!(with("daemon_socket", json!("/run/x")).daemon_socket, "/run/x");
    }

    #[test]
    fn version_without_environment() {
        assert_eq!(NetConf::version_asked(b" \n"), Ok(None));
        assert_eq!(NetConf::version_asked(b"{}"), Ok(None));
        assert_eq!(NetConf::version_asked(br#"{"cniVersion":"7.0"}"#), Ok(Some("7.0".into())));
        assert_eq!(NetConf::version_asked(b"{").unwrap_err().code.cni, 6);
        assert_eq!(NetConf::version_of(br#"{"cniVersion":"0.4.0","name":7}"#), Some(Version::V0_4_0));
        assert_eq!(NetConf::version_of(b"{"), None);
    }

    #[test]
    fn gc_valid_attachments() {
        let entry = |id: &str| json!({"containerID": id, "ifname": "eth0"});
        let ids = |conf: NetConf| {
            conf.valid_attachments().map(|list| list.into_iter().map(|entry| entry.container_id).collect::<Vec<_>>())
        };
        assert_eq!(with("x", json!(0)).valid_attachments().unwrap_err().code, GC_NO_LIST);
        assert_eq!(with("cni.dev/valid-attachments", Value::Null).valid_attachments().unwrap_err().code, GC_NO_LIST);
        assert_eq!(ids(with("cni.dev/valid-attachments", json!([]))), Ok(vec![]));
        assert_eq!(ids(with("cni.dev/attachments", json!([entry("a")]))), Ok(vec!["a".to_owned()]));
        let both = json!({
            "cniVersion": "1.1.0", "name": "n",
            "cni.dev/valid-attachments": [entry("b"), entry("a")], "cni.dev/attachments": [entry("a"), entry("c")],
        });
        assert_eq!(ids(decode(&both).unwrap()).unwrap(), ["a", "b", "c"]);
        for bad in [json!([{"containerID": "a"}]), json!([{"containerID": "", "ifname": "e"}]), json!(["a"]), json!({})]
        {
            assert_eq!(with("cni.dev/valid-attachments", bad).valid_attachments().unwrap_err().code.cni, 7);
        }
    }

    #[test]
    fn dns_of_pod_before_network() {
        let document = json!({
            "cniVersion": "1.0.0", "name": "n", "dns": {"nameservers": ["10.0.0.1"]},
            "runtimeConfig": {"dns": {"Servers": ["10.0.0.2"]}},
        });
        assert_eq!(decode(&document).unwrap().options().unwrap().dns.unwrap().nameservers, ["10.0.0.2"]);
        assert_eq!(with("dns", json!({"domain": "d"})).options().unwrap().dns.unwrap().domain, "d");
        assert_eq!(with("dns", json!({})).options().unwrap().dns, None);
    }

    /// JSON out of the keys that are read, so that the search does not spend its time on unknown ones.
    fn document() -> impl Strategy<Value = Value> {
        let keys = prop::sample::select(vec![
            "cniVersion",
            "name",
            "mtu",
            "prevResult",
            "ips",
            "ip4",
            "ip",
            "address",
            "interface",
            "interfaces",
            "runtimeConfig",
            "portMappings",
            "HostPort",
            "containerPort",
            "bandwidth",
            "dns",
            "Servers",
            "cni.dev/attachments",
            "containerID",
            "ifname",
            "routes",
            "dst",
            "veth_prefix",
            "host_stack_cidrs",
            "daemon_socket",
            "timeout_ms",
        ]);
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(|number| json!(number)),
            prop::sample::select(vec!["1.1.0", "0.3.0", "n", "10.0.0.1/24", "::/0", "/p", "ä\u{0}"])
                .prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 48, 6, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(keys.clone().prop_map(str::to_owned), inner, 0..8)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    fn use_all(stdin: &[u8]) {
        let _any = NetConf::version_asked(stdin);
        if let Ok(conf) = NetConf::decode(stdin) {
            let _any = conf.valid_attachments();
            if let Ok(options) = conf.options() {
                let result = options.previous.unwrap_or_default();
                for version in Version::ALL {
                    let document = result.document(version);
                    let again = CniResult::read(document.as_object().unwrap()).unwrap();
                    assert_eq!(again.ips, result.ips);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn any_stdin_does_not_panic(stdin in prop::collection::vec(any::<u8>(), 0..200)) {
            use_all(&stdin);
        }

        #[test]
        fn any_network_config_does_not_panic(mut document in document(), complete in any::<bool>()) {
            if let (true, Value::Object(map)) = (complete, &mut document) {
                map.insert("cniVersion".into(), "1.1.0".into());
                map.insert("name".into(), "n".into());
            }
            use_all(document.to_string().as_bytes());
        }
    }
}
