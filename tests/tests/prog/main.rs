//! The prog rung: packets through the programs by `BPF_PROG_TEST_RUN`. Tests compare the action, the packet, the mark, the flow table, and
//! *every* counter: a change of a counter that is not named fails the test.

#![allow(clippy::unwrap_used, reason = "a suite panics where it fails, for the stack trace")]

mod debug_log;
mod flows;
mod headers;

use terway_abi::{Action, Drop, HOOK_INGRESS, HOOK_TO_POD, MARK_CHECKED, PathCounter, Program, flow_flags};
use terway_daemon::bpf::{BpfError, Config, Counters, Datapath, Endpoint, FlowRow, Ran, RunContext};
use terway_tests::packet::{Frame, flags, header_checksum_is_right, macs, ttl};
use terway_tests::prog_bench::{GATEWAY_MAC, HOST_MAC, Stage};
use terway_tests::prog_harness::{NEXT, REDIRECT, SHOT, run_in as run};
use terway_tests::sandbox_or_skip;

/// The addresses of the stage in one family.
struct Family {
    a: &'static str,
    b: &'static str,
    remote: &'static str,
    host: &'static str,
    echo: (u8, u8),
    unreachable: u8,
}

const V4: Family =
    Family { a: "10.0.0.1", b: "10.0.0.2", remote: "10.9.0.9", host: "10.0.0.100", echo: (8, 0), unreachable: 3 };
const V6: Family =
    Family { a: "fd00::1", b: "fd00::2", remote: "fd09::9", host: "fd00::100", echo: (128, 129), unreachable: 1 };
const BOTH: [Family; 2] = [V4, V6];

#[track_caller]
fn from_pod(stage: &Stage, pod: &Endpoint, frame: &Frame, expected: &[(&str, u64)]) -> Ran {
    run(stage, Program::FromPod, RunContext::on(pod.host_ifindex), &frame.build(), expected)
}

#[track_caller]
fn from_vpc(stage: &Stage, frame: &Frame, expected: &[(&str, u64)]) -> Ran {
    run(stage, Program::FromVpc, RunContext::on(stage.eni), &frame.build(), expected)
}

#[track_caller]
fn to_pod(stage: &Stage, pod: &Endpoint, frame: &Frame, expected: &[(&str, u64)]) -> Ran {
    run(stage, Program::ToPod, RunContext::on(pod.host_ifindex), &frame.build(), expected)
}

/// The packet was delivered to a pod: redirected, with the pod's addresses and one hop less.
#[track_caller]
fn delivered(ran: &Ran, pod: &Endpoint, sent: &Frame) {
    let sent = sent.build();
    assert_eq!(ran.action, REDIRECT);
    assert_eq!(macs(&ran.packet), (pod.pod_mac.0, pod.host_mac.0));
    hopped(&ran.packet, &sent);
}

/// One hop less, and nothing else changed behind the Ethernet addresses.
#[track_caller]
fn hopped(packet: &[u8], sent: &[u8]) {
    assert_eq!(ttl(packet), ttl(sent) - 1);
    assert!(header_checksum_is_right(packet));
    let same = |i: usize| if sent[12] == 0x08 { i == 22 || i == 24 || i == 25 } else { i == 21 };
    assert_eq!(packet.len(), sent.len());
    let differing: Vec<usize> = (12..sent.len()).filter(|i| packet[*i] != sent[*i] && !same(*i)).collect();
    assert_eq!(differing, Vec::<usize>::new(), "bytes changed");
}

#[track_caller]
fn untouched(ran: &Ran, sent: &Frame) {
    assert_eq!((ran.action, ran.mark), (NEXT, 0));
    assert_eq!(ran.packet, sent.build());
}

#[track_caller]
fn dropped(ran: &Ran) {
    assert_eq!(ran.action, SHOT);
}

fn rows(stage: &Stage) -> Vec<FlowRow> {
    let mut rows = stage.datapath.flows().list(100).unwrap();
    rows.sort_by_key(|row| (row.ifindex, row.hook, row.source.address));
    rows
}

#[test]
fn pod_to_pod() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    for family in BOTH {
        let there = stage.sent_by(&stage.a).ip(family.a, family.b).tcp(40000, 80, flags::SYN);
        let ran = from_pod(&stage, &stage.a, &there, &[("pod_to_pod", 1), ("flow_new", 1)]);
        delivered(&ran, &stage.b, &there);
        assert_eq!(ran.mark, 0);

        let back = stage.sent_by(&stage.b).ip(family.b, family.a).tcp(80, 40000, flags::SYN | flags::ACK);
        let ran = from_pod(&stage, &stage.b, &back, &[("pod_to_pod", 1)]);
        delivered(&ran, &stage.a, &back);

        let more = stage.sent_by(&stage.a).ip(family.a, family.b).tcp(40000, 80, flags::ACK).payload(b"hello");
        delivered(&from_pod(&stage, &stage.a, &more, &[("pod_to_pod", 1)]), &stage.b, &more);
    }
    let rows = rows(&stage);
    assert_eq!(rows.len(), 4);
    for row in rows {
        let forward = row.ifindex == stage.a.host_ifindex;
        assert_eq!((row.hook, row.action, row.protocol, row.valid), (HOOK_INGRESS, Action::Local as u32, 6, true));
        assert_eq!((row.source.port, row.destination.port), if forward { (40000, 80) } else { (80, 40000) });
        assert_eq!(row.oif, if forward { stage.b.host_ifindex } else { stage.a.host_ifindex });
        assert_eq!(row.packets, if forward { 2 } else { 1 });
        let (seen, reverse) = (row.flags & flow_flags::SEEN != 0, row.flags & flow_flags::REPLY != 0);
        assert_eq!((seen, reverse, row.flags & flow_flags::SYN), (forward, !forward, flow_flags::SYN));
        assert!(row.idle < std::time::Duration::from_secs(2), "{:?}: the daemon's jiffies are off", row.idle);
    }
}

#[test]
fn pod_to_vpc_and_back() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    for family in BOTH {
        let there = stage.sent_by(&stage.a).ip(family.a, family.remote).udp(40000, 53).payload(b"question");
        for counters in [&[("pod_to_vpc", 1), ("flow_new", 1)][..], &[("pod_to_vpc", 1)]] {
            let ran = from_pod(&stage, &stage.a, &there, counters);
            assert_eq!((ran.action, ran.mark), (REDIRECT, MARK_CHECKED));
            hopped(&ran.packet, &there.build());
            // `to_vpc` recognises the packet by its mark and clears it; `from_pod` has counted the packet.
            let marked = RunContext { mark: ran.mark, ..RunContext::on(stage.eni) };
            let out = run(&stage, Program::ToVpc, marked, &ran.packet, &[]);
            assert_eq!((out.action, out.mark, &out.packet), (NEXT, 0, &ran.packet));
        }
        let back = stage.by_gateway().ip(family.remote, family.a).udp(53, 40000).payload(b"answer");
        delivered(&from_vpc(&stage, &back, &[("vpc_to_pod", 1)]), &stage.a, &back);
    }
}

#[test]
fn vpc_to_pod_and_back() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    for family in BOTH {
        let there = stage.by_gateway().ip(family.remote, family.b).tcp(50000, 443, flags::SYN);
        delivered(&from_vpc(&stage, &there, &[("vpc_to_pod", 1), ("flow_new", 1)]), &stage.b, &there);
        delivered(&from_vpc(&stage, &there, &[("vpc_to_pod", 1)]), &stage.b, &there);
        let back = stage.sent_by(&stage.b).ip(family.b, family.remote).tcp(443, 50000, flags::SYN | flags::ACK);
        let ran = from_pod(&stage, &stage.b, &back, &[("pod_to_vpc", 1)]);
        assert_eq!((ran.action, ran.mark), (REDIRECT, MARK_CHECKED));
        hopped(&ran.packet, &back.build());
    }
}

#[test]
fn pod_to_host_and_back() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    for family in BOTH {
        let there = stage.sent_by(&stage.a).ip(family.a, family.host).tcp(40000, 10250, flags::SYN);
        untouched(&from_pod(&stage, &stage.a, &there, &[("pod_to_host", 1), ("flow_new", 1)]), &there);
        let back = Frame::new(stage.a.pod_mac.0, HOST_MAC).ip(family.host, family.a).tcp(10250, 40000, flags::ACK);
        untouched(&to_pod(&stage, &stage.a, &back, &[("host_to_pod", 1)]), &back);
    }
    // A host-stack prefix that is not the node's own address.
    let dns = stage.sent_by(&stage.a).ip(V4.a, "169.254.20.10").udp(40000, 53);
    untouched(&from_pod(&stage, &stage.a, &dns, &[("pod_to_host", 1), ("flow_new", 1)]), &dns);
}

#[test]
fn host_stack_flows_are_answered_through_host_stack() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    for family in BOTH {
        // A Service of the host stack: the client is remote and its address is kept.
        let there = Frame::new(stage.a.pod_mac.0, HOST_MAC).ip(family.remote, family.a).tcp(50000, 80, flags::SYN);
        untouched(&to_pod(&stage, &stage.a, &there, &[("host_to_pod", 1), ("flow_new", 1)]), &there);
        let back = stage.sent_by(&stage.a).ip(family.a, family.remote).tcp(80, 50000, flags::SYN | flags::ACK);
        untouched(&from_pod(&stage, &stage.a, &back, &[("pod_to_host", 1)]), &back);
        // Another port of the same peer still goes through the ENI.
        let other = stage.sent_by(&stage.a).ip(family.a, family.remote).tcp(80, 50001, flags::SYN);
        assert_eq!(from_pod(&stage, &stage.a, &other, &[("pod_to_vpc", 1), ("flow_new", 1)]).action, REDIRECT);
    }
    assert_eq!(rows(&stage).iter().filter(|row| row.hook == HOOK_TO_POD).count(), 2);
}

#[test]
fn source_spoofing_from_pod() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    let other_mac = [2, 9, 9, 9, 9, 9];
    for family in BOTH {
        let sent = |source: &str| stage.sent_by(&stage.a).ip(source, family.remote).tcp(1, 2, flags::SYN);
        dropped(&from_pod(&stage, &stage.a, &sent(family.b), &[("spoofed_source", 1)]));
        dropped(&from_pod(&stage, &stage.a, &sent(family.host), &[("spoofed_source", 1)]));
        let mac = Frame::new(HOST_MAC, other_mac).ip(family.a, family.remote).tcp(1, 2, flags::SYN);
        dropped(&from_pod(&stage, &stage.a, &mac, &[("spoofed_mac", 1)]));
        // The flow exists: the source check applies to established packets too.
        from_pod(&stage, &stage.a, &sent(family.a), &[("pod_to_vpc", 1), ("flow_new", 1)]);
        dropped(&from_pod(&stage, &stage.a, &mac, &[("spoofed_mac", 1)]));
        // The other pod cannot use it either.
        let stolen = stage.sent_by(&stage.b).ip(family.a, family.remote).tcp(1, 2, flags::SYN);
        dropped(&from_pod(&stage, &stage.b, &stolen, &[("spoofed_source", 1)]));
        let astray = Frame::new(other_mac, stage.a.pod_mac.0).ip(family.a, family.remote).tcp(1, 2, flags::SYN);
        dropped(&from_pod(&stage, &stage.a, &astray, &[("not_for_gateway", 1)]));
    }
    // An interface without an endpoint.
    let unknown = stage.sent_by(&stage.a).ip(V4.a, V4.b).tcp(1, 2, flags::SYN);
    dropped(&run(
        &stage,
        Program::FromPod,
        RunContext::on(stage.other_eni),
        &unknown.build(),
        &[("unknown_endpoint", 1)],
    ));
}

#[test]
fn source_and_eni_checks_from_vpc() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    for family in BOTH {
        let lie = stage.by_gateway().ip(family.b, family.a).tcp(1, 2, flags::SYN);
        dropped(&from_vpc(&stage, &lie, &[("spoofed_source", 1)]));
        // To the other ENI's own address, else the frame would not be for this host.
        let frame = Frame::new([2, 0, 0, 0, 0, 0xe2], GATEWAY_MAC).ip(family.remote, family.a).tcp(1, 2, flags::SYN);
        let other = RunContext::on(stage.other_eni);
        dropped(&run(&stage, Program::FromVpc, other, &frame.build(), &[("wrong_eni", 1)]));
        let nobody = stage.by_gateway().ip(family.remote, family.host).tcp(1, 2, flags::SYN);
        untouched(&from_vpc(&stage, &nobody, &[("vpc_to_host", 1)]), &nobody);
        let foreign = Frame::new([2, 7, 7, 7, 7, 7], GATEWAY_MAC).ip(family.remote, family.a).tcp(1, 2, flags::SYN);
        untouched(&from_vpc(&stage, &foreign, &[("vpc_to_host", 1)]), &foreign);
    }
    // Packets for the host pass to the host stack, whatever they are.
    for odd in [
        stage.by_gateway().ip(V4.remote, V4.host).protocol(17).fragment(9, 16, false).payload(&[0; 8]),
        stage.by_gateway().ip(V4.remote, V4.host).options(&[137, 7, 4, 10, 0, 0, 9]).udp(1, 2),
        stage.by_gateway().ip(V6.remote, V6.host).neighbour(135, V6.host, None),
    ] {
        untouched(&from_vpc(&stage, &odd, &[("vpc_to_host", 1)]), &odd);
    }
    let odd = stage.by_gateway().ip(V4.remote, V4.a).options(&[137, 7, 4, 10, 0, 0, 9]).udp(1, 2);
    dropped(&from_vpc(&stage, &odd, &[("source_route", 1)]));
    let arp = stage.by_gateway().arp(1, (GATEWAY_MAC, "10.0.0.253"), ([0; 6], "10.0.0.100"));
    untouched(&from_vpc(&stage, &arp, &[("vpc_to_host", 1)]), &arp);
    assert_eq!(rows(&stage), []);
}

#[test]
fn source_check_to_vpc() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    for family in BOTH {
        let of = |source: &str| Frame::new(GATEWAY_MAC, stage.eni_mac).ip(source, family.remote).udp(1, 2);
        let (right, wrong) = (RunContext::on(stage.eni), RunContext::on(stage.other_eni));
        let passed = &[("host_to_vpc", 1)][..];
        untouched(&run(&stage, Program::ToVpc, right, &of(family.a).build(), passed), &of(family.a));
        dropped(&run(&stage, Program::ToVpc, wrong, &of(family.a).build(), &[("wrong_eni", 1)]));
        untouched(&run(&stage, Program::ToVpc, wrong, &of(family.host).build(), passed), &of(family.host));
    }
}

#[test]
fn ttl_expiry_passes_to_host_stack() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    for family in BOTH {
        for (to, ttl) in [(family.b, 1), (family.remote, 1), (family.b, 0)] {
            let frame = stage.sent_by(&stage.a).ip(family.a, to).ttl(ttl).udp(ttl.into(), 2);
            untouched(&from_pod(&stage, &stage.a, &frame, &[("ttl_expired", 1), ("flow_new", 1)]), &frame);
            untouched(&from_pod(&stage, &stage.a, &frame, &[("ttl_expired", 1)]), &frame);
        }
        let frame = stage.by_gateway().ip(family.remote, family.a).ttl(1).udp(7, 8);
        untouched(&from_vpc(&stage, &frame, &[("ttl_expired", 1), ("flow_new", 1)]), &frame);
        // A spoofed packet causes no ICMP error.
        let frame = stage.sent_by(&stage.a).ip(family.b, family.remote).ttl(1).udp(1, 2);
        dropped(&from_pod(&stage, &stage.a, &frame, &[("spoofed_source", 1)]));
    }
}

#[test]
fn drop_events_are_rate_limited() {
    let sandbox = sandbox_or_skip!();
    let config = Config { events_per_second: 3, ..Config::new(sandbox.pin_root()) };
    let stage = Stage::with(&config).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut events = stage.datapath.programs().take_events().unwrap();
        assert!(matches!(stage.datapath.programs().take_events(), Err(BpfError::EventsTaken)));
        let spoofed = stage.sent_by(&stage.a).ip(V4.b, V4.remote).tcp(40000, 443, flags::SYN);
        from_pod(&stage, &stage.a, &spoofed, &[("spoofed_source", 1)]);
        let event = events.next().await.unwrap();
        assert_eq!(event.reason, Drop::SpoofedSource as u16);
        assert_eq!((event.program, event.family, event.protocol), (Program::FromPod as u8, 4, 6));
        assert_eq!((event.ifindex, event.length, event.lost), (stage.a.host_ifindex, 54, 0));
        assert_eq!(event.ports.to_ne_bytes(), [0x9c, 0x40, 0x01, 0xbb]);
        assert_eq!(event.src[0].to_ne_bytes(), [10, 0, 0, 2]);
        assert_eq!(event.dst[0].to_ne_bytes(), [10, 9, 0, 9]);
        assert_eq!((event.mac.destination(), event.mac.source()), (HOST_MAC, stage.a.pod_mac.0));
        let spoofed = stage.by_gateway().ip(V6.b, V6.a).udp(53, 40000);
        from_vpc(&stage, &spoofed, &[("spoofed_source", 1)]);
        let event = events.next().await.unwrap();
        assert_eq!((event.program, event.family, event.protocol), (Program::FromVpc as u8, 6, 17));
        let address = event.src.map(u32::to_ne_bytes).concat();
        assert_eq!(std::net::Ipv6Addr::from(<[u8; 16]>::try_from(address).unwrap()).to_string(), V6.b);

        // One more is within the budget of this second, if it is still the same; then they are only counted.
        let before = stage.datapath.counters().read().unwrap();
        for _ in 0..20 {
            stage.datapath.programs().run(Program::FromVpc, &spoofed.build(), RunContext::on(stage.eni)).unwrap();
        }
        let after = stage.datapath.counters().read().unwrap();
        let of = |counters: &Counters, kind| counters.kind(kind).packets;
        let lost = of(&after, PathCounter::EventLost) - of(&before, PathCounter::EventLost);
        let reported = std::iter::from_fn(|| events.try_next()).count() as u64;
        assert_eq!(after.drop(Drop::SpoofedSource).packets - before.drop(Drop::SpoofedSource).packets, 20);
        assert_eq!(reported + lost, 20);
        assert!(reported < 20, "the budget bounds nothing");
        // The next reported event has the number of lost ones.
        tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
        from_vpc(&stage, &spoofed, &[("spoofed_source", 1)]);
        assert!(u64::from(events.next().await.unwrap().lost) <= lost);
    });
}

#[test]
fn pinned_map_layout_is_checked() {
    let sandbox = sandbox_or_skip!();
    let config = Config::new(sandbox.pin_root());
    let stage = Stage::with(&config).unwrap();
    let sent = stage.sent_by(&stage.a).ip(V4.a, V4.b).udp(1, 2);
    from_pod(&stage, &stage.a, &sent, &[("pod_to_pod", 1), ("flow_new", 1)]);
    let pins = stage.datapath.pins().to_owned();
    drop(stage.datapath);

    // The same again finds everything.
    let again = Datapath::open(&config).unwrap();
    assert_eq!((again.endpoints().list().len(), again.flows().count().unwrap()), (2, (1, 0)));
    drop(again);
    // The folders of other ABI versions are removed on request; this one stays.
    std::fs::create_dir(config.pin_root.join("v0")).unwrap();
    let other = aya::maps::HashMap::<_, u32, u64>::create(8, 0).unwrap();
    other.pin(config.pin_root.join("v0/OLD")).unwrap();
    let again = Datapath::open(&config).unwrap();
    again.remove_other_versions().unwrap();
    assert!(!config.pin_root.join("v0").exists() && pins.exists());
    drop(again);
    // Another size creates a new flow table, and keeps endpoints and flows.
    let resized = Datapath::open(&Config { flows_v4: 1024, ..config.clone() }).unwrap();
    assert_eq!((resized.endpoints().list().len(), resized.flows().count().unwrap()), (2, (1, 0)));
    drop(resized);
    // A foreign map under a pinned name is refused; the error names it.
    std::fs::remove_file(pins.join(terway_abi::names::ENDPOINTS_V4)).unwrap();
    let alien = aya::maps::HashMap::<_, u32, u64>::create(8, 0).unwrap();
    alien.pin(pins.join(terway_abi::names::ENDPOINTS_V4)).unwrap();
    let refused = Datapath::open(&config).unwrap_err();
    assert!(matches!(refused, BpfError::Layout { .. }), "{refused}");
    assert!(refused.to_string().contains("ENDPOINTS_V4"), "{refused}");
}
