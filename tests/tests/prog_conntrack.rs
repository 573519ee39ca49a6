//! The prog rung of connection tracking: garbage collection, full and resized flow tables, active connection counts.

#![allow(clippy::unwrap_used, reason = "a suite panics where it fails, for the stack trace")]

use std::net::Ipv4Addr;
use std::thread::sleep;
use std::time::Duration;

use aya::maps::{Array, Map, MapData};
use terway_abi::{Backend, BackendRange, BackendRef, Frontend, PathCounter, Program, frontend_flags, names};
use terway_core::conntrack::Timeouts;
use terway_daemon::bpf::{Config, Datapath, Endpoint, GcOptions, GcReport, Ran, RunContext};
use terway_tests::packet::{Frame, flags};
use terway_tests::prog_bench::Stage;
use terway_tests::prog_harness::{REDIRECT, SHOT, frontend_key};
use terway_tests::sandbox_or_skip;

const TCP: u8 = 6;
const UDP: u8 = 17;
const VIP: &str = "10.96.0.1";

fn options(timeouts: Timeouts) -> GcOptions {
    GcOptions { timeouts, delete: true, recount_connections: false, previous_began: None }
}

/// A Service at [`VIP`]:80 with these backends, numbers 1 and up.
fn serve(stage: &Stage, protocol: u8, backends: &[(Ipv4Addr, u16)], template: Frontend) {
    let members: Vec<BackendRef> =
        (1..).zip(backends).map(|(backend, _)| BackendRef { backend, generation: 1 }).collect();
    for (number, (address, port)) in (1..).zip(backends) {
        let address = [u32::from_ne_bytes(address.octets()), 0, 0, 0];
        let backend = Backend { address, port: port.to_be(), protocol, generation: 1, ..Backend::default() };
        stage.datapath.services().set_backend(number, &backend).unwrap();
    }
    stage.datapath.services().set_members(10, &members).unwrap();
    let run = BackendRange { first: 10, count: members.len() as u32 };
    let at = frontend_key(VIP.parse().unwrap(), 80, protocol);
    let frontend = Frontend { service: 7, internal: run, external: run, ..template };
    stage.datapath.services().set_frontend(&at, &frontend).unwrap();
}

const B: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

fn send(stage: &Stage, pod: &Endpoint, frame: &Frame) -> Ran {
    stage.datapath.programs().run(Program::FromPod, &frame.build(), RunContext::on(pod.host_ifindex)).unwrap()
}

/// Source port and address of an IPv4 packet, and destination.
fn ends(packet: &[u8]) -> ([u8; 4], u16, [u8; 4], u16) {
    let port = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
    (packet[26..30].try_into().unwrap(), port(34), packet[30..34].try_into().unwrap(), port(36))
}

#[test]
fn gc_expires_idle_flows_by_state() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    let (to_b, to_a) =
        (|| stage.sent_by(&stage.a).ip("10.0.0.1", "10.0.0.2"), || stage.sent_by(&stage.b).ip("10.0.0.2", "10.0.0.1"));
    // UDP without and with a reply; TCP SYN only, with a reply, closed by one end, closed by both.
    send(&stage, &stage.a, &to_b().udp(1000, 53));
    send(&stage, &stage.a, &to_b().udp(1001, 53));
    send(&stage, &stage.b, &to_a().udp(53, 1001));
    for port in 2000..2004 {
        send(&stage, &stage.a, &to_b().tcp(port, 80, flags::SYN));
        if port > 2000 {
            send(&stage, &stage.b, &to_a().tcp(80, port, flags::SYN | flags::ACK));
        }
        if port > 2001 {
            send(&stage, &stage.a, &to_b().tcp(port, 80, flags::FIN | flags::ACK));
        }
        if port > 2002 {
            send(&stage, &stage.b, &to_a().tcp(80, port, flags::FIN | flags::ACK));
        }
    }
    let left = || {
        let mut ports: Vec<u16> = stage
            .datapath
            .flows()
            .list(100)
            .unwrap()
            .iter()
            .map(|row| row.source.port.max(row.destination.port))
            .collect();
        ports.sort_unstable();
        ports.dedup();
        ports
    };
    // One timeout after the other becomes zero; the others are long, however slow the machine is.
    let (none, far) = (Duration::ZERO, Timeouts::default());
    let pass = |timeouts| stage.datapath.flows().collect_garbage(&options(timeouts)).unwrap().families[0];
    sleep(Duration::from_millis(50));
    assert_eq!(pass(far).deleted(), 0);
    assert_eq!(pass(Timeouts { tcp_fin: none, ..far }).deleted_expired, 1);
    assert_eq!(left(), [1000, 1001, 2000, 2001, 2002], "closed by both ends");
    pass(Timeouts { udp_single: none, ..far });
    assert_eq!(left(), [1001, 2000, 2001, 2002], "UDP without an answer");
    pass(Timeouts { tcp_syn: none, ..far });
    assert_eq!(left(), [1001, 2001, 2002], "TCP without an answer");
    // Used entries stay. The age of entries is tested, and only waiting advances the kernel's clock, here and below.
    sleep(Duration::from_secs(3));
    send(&stage, &stage.a, &to_b().udp(1001, 53));
    let within = Timeouts { udp: Duration::from_secs(3), tcp: Duration::from_secs(3), ..far };
    assert_eq!(pass(within).deleted_expired, 2);
    assert_eq!(left(), [1001], "half closed is open, and silent");
    // A run that only counts deletes nothing.
    sleep(Duration::from_millis(50));
    let dead = Timeouts { udp: none, ..far };
    let counted =
        stage.datapath.flows().collect_garbage(&GcOptions { delete: false, ..options(dead) }).unwrap().families[0];
    assert_eq!((counted.used, counted.expired, counted.deleted()), (1, 1, 0));
}

/// The two entries of a connection with NAT expire together, whichever of them is used.
#[test]
fn gc_keeps_nat_pair_together() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    serve(&stage, UDP, &[(B, 53)], Frontend::default());
    let there = stage.sent_by(&stage.a).ip("10.0.0.1", VIP).udp(1000, 80);
    let back = stage.sent_by(&stage.b).ip("10.0.0.2", "10.0.0.1").udp(53, 1000);
    let pass = |udp| {
        let timeouts = Timeouts { udp, udp_single: udp, ..Timeouts::default() };
        stage.datapath.flows().collect_garbage(&options(timeouts)).unwrap().families[0]
    };
    for frame in [&there, &back] {
        send(&stage, &stage.a, &there);
        assert_eq!(stage.datapath.flows().count().unwrap().0, 2);
        // One direction only, for longer than the timeout.
        for _ in 0..4 {
            sleep(Duration::from_secs(1));
            let pod = if std::ptr::eq(frame, &raw const there) { &stage.a } else { &stage.b };
            assert_eq!(send(&stage, pod, frame).action, REDIRECT);
            let found = pass(Duration::from_secs(3));
            assert_eq!(found.deleted(), 0, "{found:?}");
        }
        sleep(Duration::from_millis(50));
        let found = pass(Duration::ZERO);
        assert_eq!((found.deleted_expired, stage.datapath.flows().count().unwrap().0), (2, 0), "{found:?}");
    }
    // Invalid by the backend's generation: the original direction at once, the reply direction after the reply grace period.
    send(&stage, &stage.a, &there);
    stage.datapath.services().set_backend(1, &Backend { generation: 2, ..Backend::default() }).unwrap();
    let found = pass(Duration::from_secs(60));
    assert_eq!((found.invalid, found.deleted_invalid, found.deleted_expired), (2, 1, 0));
    let (source, port, ..) = ends(&send(&stage, &stage.b, &back).packet);
    assert_eq!((source, port), ([10, 96, 0, 1], 80));
    sleep(Duration::from_millis(5_100));
    let found = pass(Duration::from_secs(60));
    assert_eq!((found.invalid, found.deleted_invalid, found.deleted_expired), (1, 1, 0));
}

/// The two entries of a connection with a remapped source port expire together, too.
#[test]
fn gc_keeps_remapped_pair_together() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    serve(&stage, UDP, &[(B, 53)], Frontend::default());
    let direct = stage.sent_by(&stage.a).ip("10.0.0.1", "10.0.0.2").udp(1000, 53);
    let pass = |udp| {
        let timeouts = Timeouts { udp, udp_single: udp, ..Timeouts::default() };
        stage.datapath.flows().collect_garbage(&options(timeouts)).unwrap().families[0]
    };
    for asks in [true, false] {
        send(&stage, &stage.a, &stage.sent_by(&stage.a).ip("10.0.0.1", VIP).udp(1000, 80));
        let (_, port, _, _) = ends(&send(&stage, &stage.a, &direct).packet);
        assert_ne!(port, 1000);
        let back = stage.sent_by(&stage.b).ip("10.0.0.2", "10.0.0.1").udp(53, port);
        assert_eq!(stage.datapath.flows().count().unwrap().0, 4);
        // One direction only, for longer than the timeout.
        let mut deleted = 0;
        for _ in 0..4 {
            sleep(Duration::from_secs(1));
            let ran = if asks { send(&stage, &stage.a, &direct) } else { send(&stage, &stage.b, &back) };
            assert_eq!((ran.action, ends(&ran.packet).1), (REDIRECT, if asks { port } else { 53 }));
            deleted += pass(Duration::from_secs(3)).deleted();
        }
        assert_eq!(
            (deleted, stage.datapath.flows().count().unwrap().0),
            (2, 2),
            "only the Service's connection is silent"
        );
        sleep(Duration::from_millis(50));
        assert_eq!((pass(Duration::ZERO).deleted_expired, stage.datapath.flows().count().unwrap().0), (2, 0));
    }
}

/// More connections than the table holds: all work, established ones included, and the estimate of evictions is right.
#[test]
fn lru_eviction_with_full_table() {
    let sandbox = sandbox_or_skip!();
    let config = Config { flows_v4: 1024, ..Config::new(sandbox.pin_root()) };
    let stage = Stage::with(&config).unwrap();
    serve(&stage, TCP, &[(B, 8080)], Frontend::default());
    let to = |address: &str| stage.sent_by(&stage.a).ip("10.0.0.1", address);
    // Two established connections, one of them to the Service.
    let established = || {
        let direct = send(&stage, &stage.a, &to("10.0.0.2").tcp(1000, 80, flags::ACK));
        assert_eq!((direct.action, ends(&direct.packet).3), (REDIRECT, 80));
        let served = send(&stage, &stage.a, &to(VIP).tcp(1001, 80, flags::ACK));
        let (source, port, destination, number) = ends(&served.packet);
        assert_eq!((served.action, source, destination, number), (REDIRECT, [10, 0, 0, 1], [10, 0, 0, 2], 8080));
        // Replies of that connection come from the Service, or, after eviction of the reply entry, go to the client untranslated.
        let back = stage.sent_by(&stage.b).ip("10.0.0.2", "10.0.0.1").tcp(8080, port, flags::ACK);
        let back = send(&stage, &stage.b, &back);
        assert_eq!((back.action, ends(&back.packet).2), (REDIRECT, [10, 0, 0, 1]));
        ends(&back.packet)
    };
    send(&stage, &stage.a, &to("10.0.0.2").tcp(1000, 80, flags::SYN));
    send(&stage, &stage.a, &to(VIP).tcp(1001, 80, flags::SYN));
    assert_eq!(established().0, [10, 96, 0, 1]);
    let first = stage.datapath.flows().collect_garbage(&options(Timeouts::default())).unwrap();
    assert_eq!(first.families[0].used, 3);
    let before = stage.datapath.counters().read().unwrap();
    for n in 0..4000_u16 {
        let (address, port) = if n % 4 == 0 { (VIP, 80) } else { ("10.9.0.9", 443) };
        let frame = to(address).tcp(20_000 + n, port, flags::SYN);
        assert_eq!(send(&stage, &stage.a, &frame).action, REDIRECT, "connection {n}");
        if n % 50 == 0 {
            established();
        }
    }
    let after = stage.datapath.counters().read().unwrap();
    let of = |kind| after.kind(kind).packets - before.kind(kind).packets;
    assert_eq!(of(PathCounter::FlowInsertFailed), 0, "an LRU table takes everything");
    assert!(of(PathCounter::FlowNew) >= 4000);
    let drops = |counters: &terway_daemon::bpf::Counters| {
        terway_abi::Drop::ALL.iter().map(|drop| counters.drop(*drop).packets).sum::<u64>()
    };
    assert_eq!(drops(&after), drops(&before), "nothing is dropped");
    let options = GcOptions { previous_began: Some(first.began), ..options(Timeouts::default()) };
    let found = stage.datapath.flows().collect_garbage(&options).unwrap().families[0];
    assert!(found.used <= 1024 && found.used > 512, "{found:?}");
    let lost = terway_core::conntrack::estimate_evictions(
        &[terway_core::conntrack::GcPass { left: 3, capacity: 1024 }],
        &terway_core::conntrack::EvictionInputs {
            made: of(PathCounter::FlowNew),
            replaced: of(PathCounter::FlowStale),
            flushed: 0,
            old: found.old,
            young: found.new,
        },
        2,
    );
    // Of at least 4000 entries at most 1024 are left.
    assert!((2900..=6000).contains(&lost), "{lost} of {found:?}");
}

/// One entry of a NAT pair is evicted: replies go to the client only, and after the next garbage collection the connection works again.
#[test]
fn gc_deletes_unpaired_nat_entry() {
    let sandbox = sandbox_or_skip!();
    let config = Config { flows_v4: 1024, ..Config::new(sandbox.pin_root()) };
    let stage = Stage::with(&config).unwrap();
    serve(&stage, UDP, &[(B, 53)], Frontend::default());
    let there = stage.sent_by(&stage.a).ip("10.0.0.1", VIP).udp(1000, 80);
    let back = |port: u16| stage.sent_by(&stage.b).ip("10.0.0.2", "10.0.0.1").udp(53, port);
    send(&stage, &stage.a, &there);
    assert_eq!(ends(&send(&stage, &stage.b, &back(1000)).packet).0, [10, 96, 0, 1]);
    // Eviction of the reply entry only.
    let pinned = MapData::from_pin(stage.datapath.pins().join(names::FLOWS_V4)).unwrap();
    let mut flows: aya::maps::HashMap<_, terway_abi::FlowKeyV4, terway_abi::FlowV4> =
        Map::LruHashMap(pinned).try_into().unwrap();
    let b = u32::from_ne_bytes(B.octets());
    let answers = flows.keys().map(Result::unwrap).find(|key| key.low == b || key.high == b).unwrap();
    flows.remove(&answers).unwrap();
    assert_eq!(ends(&send(&stage, &stage.b, &back(1000)).packet).2, [10, 0, 0, 1]);
    // The table is nearly full: garbage collection looks for unpaired entries.
    for n in 0..800_u16 {
        send(&stage, &stage.a, &stage.sent_by(&stage.a).ip("10.0.0.1", "10.9.0.9").udp(20_000 + n, 53));
    }
    sleep(Duration::from_millis(20));
    let found = stage.datapath.flows().collect_garbage(&options(Timeouts::default())).unwrap().families[0];
    assert_eq!(found.deleted_invalid, 1, "{found:?}");
    let sent = send(&stage, &stage.a, &there);
    let (_, port, destination, _) = ends(&sent.packet);
    assert_eq!((sent.action, destination), (REDIRECT, [10, 0, 0, 2]));
    assert_eq!(ends(&send(&stage, &stage.b, &back(port)).packet), ([10, 96, 0, 1], 80, [10, 0, 0, 1], 1000));
}

/// A resized flow table keeps valid entries: those from before, and those that the old programs write meanwhile.
#[test]
fn flow_table_resize_keeps_flows() {
    let sandbox = sandbox_or_skip!();
    let config = Config { flows_v4: 2048, ..Config::new(sandbox.pin_root()) };
    let mut stage = Stage::with(&config).unwrap();
    serve(&stage, UDP, &[(B, 53)], Frontend::default());
    let sent = |stage: &Stage, port: u16| stage.sent_by(&stage.a).ip("10.0.0.1", VIP).udp(port, 80);
    let back = |stage: &Stage, port: u16| stage.sent_by(&stage.b).ip("10.0.0.2", "10.0.0.1").udp(53, port);
    send(&stage, &stage.a, &sent(&stage, 1000));
    send(&stage, &stage.a, &stage.sent_by(&stage.a).ip("10.0.0.1", "10.0.0.2").udp(1, 2));
    let larger = Datapath::open(&Config { flows_v4: 4096, ..config.clone() }).unwrap();
    assert_eq!(larger.flows().count().unwrap().0, 3);
    // The old programs are still attached, and create another flow.
    send(&stage, &stage.a, &sent(&stage, 1001));
    assert_eq!(larger.flows().count().unwrap().0, 3);
    larger.remove_other_versions().unwrap();
    assert_eq!(larger.flows().count().unwrap().0, 5);
    assert!(!larger.pins().join("FLOWS_V4_before").exists());
    stage.datapath = larger;
    let made = stage.datapath.counters().read().unwrap().kind(PathCounter::FlowNew);
    for port in [1000, 1001] {
        assert_eq!(ends(&send(&stage, &stage.b, &back(&stage, port)).packet).0, [10, 96, 0, 1]);
    }
    assert_eq!(stage.datapath.counters().read().unwrap().kind(PathCounter::FlowNew), made, "known flows, all of them");

    // A smaller table gets the most recently used entries. After a kill in between the next daemon continues.
    for n in 0..3000_u16 {
        send(&stage, &stage.a, &stage.sent_by(&stage.a).ip("10.0.0.1", "10.9.0.9").udp(20_000 + n, 53));
    }
    sleep(Duration::from_millis(50));
    send(&stage, &stage.a, &sent(&stage, 1000));
    for _ in 0..2 {
        let smaller = Datapath::open(&Config { flows_v4: 1024, ..config.clone() }).unwrap();
        assert!(smaller.pins().join("FLOWS_V4_before").exists());
        assert!((600..=1024).contains(&smaller.flows().count().unwrap().0));
        stage.datapath = smaller;
        assert_eq!(ends(&send(&stage, &stage.b, &back(&stage, 1000)).packet).0, [10, 96, 0, 1]);
    }
    stage.datapath.remove_other_versions().unwrap();
}

/// Least-connections selection: ended connections are subtracted from the active connection counts.
#[test]
fn active_connection_counts_are_corrected() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    let template = Frontend { flags: frontend_flags::LEAST_CONNECTIONS, ..Frontend::default() };
    serve(&stage, TCP, &[(B, 8001), (B, 8002)], template);
    let loads = || -> [u64; 2] {
        let pinned = MapData::from_pin(stage.datapath.pins().join(names::ACTIVE_CONNS)).unwrap();
        let map: Array<_, u64> = Map::Array(pinned).try_into().unwrap();
        [1, 2].map(|number| map.get(&number, 0).unwrap())
    };
    let open = |port: u16| -> u16 {
        let sent = send(&stage, &stage.a, &stage.sent_by(&stage.a).ip("10.0.0.1", VIP).tcp(port, 80, flags::SYN));
        let backend = ends(&sent.packet).3;
        send(
            &stage,
            &stage.b,
            &stage.sent_by(&stage.b).ip("10.0.0.2", "10.0.0.1").tcp(backend, port, flags::SYN | flags::ACK),
        );
        backend
    };
    let pass = || -> GcReport {
        stage
            .datapath
            .flows()
            .collect_garbage(&GcOptions { recount_connections: true, ..options(Timeouts::default()) })
            .unwrap()
    };
    let opened: Vec<(u16, u16)> = (0..200).map(|n| (1000 + n, open(1000 + n))).collect();
    let [first, second] = loads();
    assert!(first + second == 200 && first.abs_diff(second) < 20, "{first} {second}");
    sleep(Duration::from_millis(20));
    assert_eq!(pass().counts_corrected, 0, "what programs counted is right");
    // All connections of the first backend end.
    for (port, backend) in opened.iter().filter(|(_, backend)| *backend == 8001) {
        send(&stage, &stage.a, &stage.sent_by(&stage.a).ip("10.0.0.1", VIP).tcp(*port, 80, flags::RST));
        assert_eq!(*backend, 8001);
    }
    assert_eq!(loads(), [first, second], "nobody has counted yet");
    pass();
    assert_eq!(loads(), [0, second]);
    // New connections go to the other backend until both are even.
    let next: Vec<u16> = (0..3 * second as u16).map(|n| open(5000 + n)).collect();
    // Power of two choices: three of four connections go to the less loaded backend.
    let idler = next.iter().take(100).filter(|backend| **backend == 8001).count();
    assert!(idler > 55, "{next:?}");
    let [first, second] = loads();
    assert!(first.abs_diff(second) < 20, "{first} {second}");
    // A connection translated at the socket looks direct here; it counts too.
    for n in 0..10 {
        send(&stage, &stage.a, &stage.sent_by(&stage.a).ip("10.0.0.1", "10.0.0.2").tcp(7000 + n, 8001, flags::SYN));
    }
    sleep(Duration::from_millis(20));
    pass();
    assert_eq!(loads(), [first + 10, second]);
    assert_ne!(
        send(&stage, &stage.a, &stage.sent_by(&stage.a).ip("10.0.0.1", VIP).tcp(1, 80, flags::SYN)).action,
        SHOT
    );
}

/// A client with session affinity leaves a terminating backend: established connections stay, new ones go to another backend.
#[test]
fn affinity_leaves_terminating_backend() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    let template = Frontend { affinity: 600, ..Frontend::default() };
    serve(&stage, TCP, &[(B, 8001), (B, 8002)], template);
    let open = |port: u16, tcp| {
        ends(&send(&stage, &stage.a, &stage.sent_by(&stage.a).ip("10.0.0.1", VIP).tcp(port, 80, tcp)).packet).3
    };
    let held = open(1000, flags::SYN);
    assert!((0..50).all(|n| open(1001 + n, flags::SYN) == held));
    // The backend is terminating: flagged, and not in the backend range any more.
    let number = u32::from(held - 8000);
    let address = [u32::from_ne_bytes(B.octets()), 0, 0, 0];
    let ending = terway_abi::backend_flags::TERMINATING;
    let backend =
        Backend { address, port: held.to_be(), protocol: TCP, flags: ending, generation: 1, ..Backend::default() };
    let other = BackendRef { backend: 3 - number, generation: 1 };
    stage.datapath.services().set_members(20, &[other]).unwrap();
    let run = BackendRange { first: 20, count: 1 };
    let at = frontend_key(VIP.parse().unwrap(), 80, TCP);
    stage
        .datapath
        .services()
        .set_frontend(&at, &Frontend { service: 7, internal: run, external: run, ..template })
        .unwrap();
    stage.datapath.services().set_backend(number, &backend).unwrap();
    assert_eq!(open(1000, flags::ACK), held, "what was begun goes on");
    let next = open(2000, flags::SYN);
    assert_ne!(next, held);
    assert!((0..50).all(|n| open(2001 + n, flags::SYN) == next), "and the client stays there");
}
