//! The prog rung: a packet goes into a program by `BPF_PROG_TEST_RUN`, and what comes out is compared: the answer, the packet, the
//! mark, the flow table, and *every* counter: one that changed and was not named fails the test.

#![allow(clippy::unwrap_used, reason = "a suite panics where it fails, for the stack trace")]

use std::collections::BTreeMap;

use terway_abi::{Action, Drop, HOOK_IN, HOOK_TO_POD, Kind, MARK_CHECKED, Program, flow_flags};
use terway_core::conntrack::Timeouts;
use terway_core::ident::{Addresses, Mac};
use terway_daemon::bpf::{
    BpfError, Config, Counters, Datapath, Endpoint, FamilyFound, FlowRow, PassOptions, Ran, RunContext,
};
use terway_tests::packet::{Frame, flags, header_checksum_is_right, macs, quoted, ttl};
use terway_tests::prog_bench::{GATEWAY_MAC, HOST_MAC, Stage};
use terway_tests::sandbox_or_skip;

/// `TC_ACT_UNSPEC`, `TC_ACT_SHOT` and `TC_ACT_REDIRECT` (include/uapi/linux/pkt_cls.h).
const NEXT: i32 = -1;
const SHOT: i32 = 2;
const REDIRECT: i32 = 7;

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

fn nonzero(counters: &Counters) -> BTreeMap<&'static str, u64> {
    counters.iter().map(|(name, counter)| (name, counter.packets)).filter(|(_, packets)| *packets > 0).collect()
}

/// Runs a program once and compares every counter.
#[track_caller]
fn run(stage: &Stage, program: Program, context: RunContext, packet: &[u8], expected: &[(&str, u64)]) -> Ran {
    let before = stage.datapath.counters().unwrap();
    let ran = stage.datapath.run(program, packet, context).unwrap();
    let after = stage.datapath.counters().unwrap();
    let (before, mut change) = (nonzero(&before), nonzero(&after));
    change.iter_mut().for_each(|(name, packets)| *packets -= before.get(name).unwrap_or(&0));
    change.retain(|_, packets| *packets > 0);
    assert_eq!(change, expected.iter().copied().collect(), "counters");
    ran
}

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
    let mut rows = stage.datapath.flows(100).unwrap();
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
        assert_eq!((row.hook, row.action, row.protocol, row.valid), (HOOK_IN, Action::Local as u32, 6, true));
        assert_eq!((row.source.port, row.destination.port), if forward { (40000, 80) } else { (80, 40000) });
        assert_eq!(row.oif, if forward { stage.b.host_ifindex } else { stage.a.host_ifindex });
        assert_eq!(row.packets, if forward { 2 } else { 1 });
        let (seen, reverse) = (row.flags & flow_flags::SEEN != 0, row.flags & flow_flags::REVERSE != 0);
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
            // On its way out it is known by its mark, which ends there; it was counted.
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
fn what_came_through_the_host_stack_is_answered_through_it() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    for family in BOTH {
        // A Service of the host stack: the client is remote and its address is kept.
        let there = Frame::new(stage.a.pod_mac.0, HOST_MAC).ip(family.remote, family.a).tcp(50000, 80, flags::SYN);
        untouched(&to_pod(&stage, &stage.a, &there, &[("host_to_pod", 1), ("flow_new", 1)]), &there);
        let back = stage.sent_by(&stage.a).ip(family.a, family.remote).tcp(80, 50000, flags::SYN | flags::ACK);
        untouched(&from_pod(&stage, &stage.a, &back, &[("pod_to_host", 1)]), &back);
        // Another port of the same peer still goes by the ENI.
        let other = stage.sent_by(&stage.a).ip(family.a, family.remote).tcp(80, 50001, flags::SYN);
        assert_eq!(from_pod(&stage, &stage.a, &other, &[("pod_to_vpc", 1), ("flow_new", 1)]).action, REDIRECT);
    }
    assert_eq!(rows(&stage).iter().filter(|row| row.hook == HOOK_TO_POD).count(), 2);
}

#[test]
fn a_pod_sends_only_as_itself() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    let other_mac = [2, 9, 9, 9, 9, 9];
    for family in BOTH {
        let sent = |source: &str| stage.sent_by(&stage.a).ip(source, family.remote).tcp(1, 2, flags::SYN);
        dropped(&from_pod(&stage, &stage.a, &sent(family.b), &[("spoofed_source", 1)]));
        dropped(&from_pod(&stage, &stage.a, &sent(family.host), &[("spoofed_source", 1)]));
        let mac = Frame::new(HOST_MAC, other_mac).ip(family.a, family.remote).tcp(1, 2, flags::SYN);
        dropped(&from_pod(&stage, &stage.a, &mac, &[("spoofed_mac", 1)]));
        // The flow exists: the check is not only made for first packets.
        from_pod(&stage, &stage.a, &sent(family.a), &[("pod_to_vpc", 1), ("flow_new", 1)]);
        dropped(&from_pod(&stage, &stage.a, &mac, &[("spoofed_mac", 1)]));
        // The other pod cannot use it either.
        let stolen = stage.sent_by(&stage.b).ip(family.a, family.remote).tcp(1, 2, flags::SYN);
        dropped(&from_pod(&stage, &stage.b, &stolen, &[("spoofed_source", 1)]));
        let astray = Frame::new(other_mac, stage.a.pod_mac.0).ip(family.a, family.remote).tcp(1, 2, flags::SYN);
        dropped(&from_pod(&stage, &stage.a, &astray, &[("not_for_gateway", 1)]));
    }
    // An interface that no endpoint stands for.
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
fn what_comes_from_the_vpc_is_checked() {
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
    // What is for the host is left to the host, whatever it is.
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
fn only_the_right_addresses_leave_by_an_eni() {
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
fn the_last_hop_ends_in_the_host_stack() {
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
        // A spoofed one makes no error for anybody.
        let frame = stage.sent_by(&stage.a).ip(family.b, family.remote).ttl(1).udp(1, 2);
        dropped(&from_pod(&stage, &stage.a, &frame, &[("spoofed_source", 1)]));
    }
}

#[test]
fn fragments_follow_their_first() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    for family in BOTH {
        let of = |id: u32| stage.sent_by(&stage.a).ip(family.a, family.b).fragment(id, 0, true);
        let first = of(7).udp(40000, 53).payload(&[1; 8]);
        let middle = of(7).protocol(17).fragment(7, 16, true).payload(&[2; 16]);
        let last = of(7).protocol(17).fragment(7, 32, false).payload(&[3; 5]);
        dropped(&from_pod(&stage, &stage.a, &middle, &[("unknown_fragment", 1)]));
        delivered(&from_pod(&stage, &stage.a, &first, &[("pod_to_pod", 1), ("flow_new", 1)]), &stage.b, &first);
        delivered(&from_pod(&stage, &stage.a, &middle, &[("pod_to_pod", 1)]), &stage.b, &middle);
        delivered(&from_pod(&stage, &stage.a, &last, &[("pod_to_pod", 1)]), &stage.b, &last);
        // They belong to the flow of the whole packets.
        let whole = stage.sent_by(&stage.a).ip(family.a, family.b).udp(40000, 53);
        delivered(&from_pod(&stage, &stage.a, &whole, &[("pod_to_pod", 1)]), &stage.b, &whole);
        let stranger = of(8).protocol(17).fragment(8, 16, false).payload(&[2; 16]);
        dropped(&from_pod(&stage, &stage.a, &stranger, &[("unknown_fragment", 1)]));
        let came = stage.by_gateway().ip(family.remote, family.a).fragment(7, 0, true).udp(53, 4).payload(&[1; 8]);
        delivered(&from_vpc(&stage, &came, &[("vpc_to_pod", 1), ("flow_new", 1)]), &stage.a, &came);
        let rest = stage.by_gateway().ip(family.remote, family.a).protocol(17).fragment(7, 16, false).payload(&[1; 8]);
        delivered(&from_vpc(&stage, &rest, &[("vpc_to_pod", 1)]), &stage.a, &rest);
    }
}

#[test]
fn ipv4_options() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    let with = |options: &[u8]| stage.sent_by(&stage.a).ip(V4.a, V4.b).options(options).udp(1, 2);
    let record_route: Vec<u8> = [1, 7, 39, 4].into_iter().chain([0; 36]).collect();
    delivered(
        &from_pod(&stage, &stage.a, &with(&record_route), &[("pod_to_pod", 1), ("flow_new", 1)]),
        &stage.b,
        &with(&record_route),
    );
    delivered(
        &from_pod(&stage, &stage.a, &with(&[148, 4, 0, 0]), &[("pod_to_pod", 1)]),
        &stage.b,
        &with(&[148, 4, 0, 0]),
    );
    for kind in [131, 137] {
        let routed = with(&[1, 1, 1, kind, 7, 4, 10, 0, 0, 9, 0]);
        dropped(&from_pod(&stage, &stage.a, &routed, &[("source_route", 1)]));
    }
    dropped(&from_pod(&stage, &stage.a, &with(&[7, 1, 0, 0]), &[("bad_header", 1)]));
    dropped(&from_pod(&stage, &stage.a, &with(&[1; 12]), &[("header_chain", 1)]));
    // What stands behind the end of the options is no option.
    delivered(
        &from_pod(&stage, &stage.a, &with(&[0, 131, 7, 4]), &[("pod_to_pod", 1)]),
        &stage.b,
        &with(&[0, 131, 7, 4]),
    );
}

#[test]
fn ipv6_extension_headers() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    let with = |headers: &[(u8, &[u8])]| {
        let bare = stage.sent_by(&stage.a).ip(V6.a, V6.b).udp(1, 2);
        headers.iter().fold(bare, |frame, (kind, bytes)| frame.extension(*kind, bytes))
    };
    let padding: &[u8] = &[0, 0, 1, 4, 0, 0, 0, 0];
    let longer: &[u8] = &[0, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let authentication: &[u8] = &[0, 4, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let atomic: &[u8] = &[0, 0, 0, 0, 0, 0, 0, 9];
    let passed = with(&[(0, padding), (60, longer), (51, authentication), (44, atomic)]);
    delivered(&from_pod(&stage, &stage.a, &passed, &[("pod_to_pod", 1), ("flow_new", 1)]), &stage.b, &passed);
    let bare = with(&[]);
    delivered(&from_pod(&stage, &stage.a, &bare, &[("pod_to_pod", 1)]), &stage.b, &bare);
    let done: &[u8] = &[0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    delivered(&from_pod(&stage, &stage.a, &with(&[(43, done)]), &[("pod_to_pod", 1)]), &stage.b, &with(&[(43, done)]));
    let todo: &[u8] = &[0, 2, 4, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    dropped(&from_pod(&stage, &stage.a, &with(&[(43, todo)]), &[("source_route", 1)]));
    dropped(&from_pod(&stage, &stage.a, &with(&[(60, padding); 7]), &[("header_chain", 1)]));
}

#[test]
fn echoes_and_errors() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    for family in BOTH {
        let (ask, answer) = family.echo;
        let there = stage.sent_by(&stage.a).ip(family.a, family.remote).icmp(ask, 0, [0x12, 0x34, 0, 1]);
        assert_eq!(from_pod(&stage, &stage.a, &there, &[("pod_to_vpc", 1), ("flow_new", 1)]).action, REDIRECT);
        let back = stage.by_gateway().ip(family.remote, family.a).icmp(answer, 0, [0x12, 0x34, 0, 1]);
        delivered(&from_vpc(&stage, &back, &[("vpc_to_pod", 1)]), &stage.a, &back);

        // A router on the way complains about a packet of a known flow: that flow's entry delivers it.
        let sent = stage.sent_by(&stage.a).ip(family.a, family.remote).udp(40000, 9);
        from_pod(&stage, &stage.a, &sent, &[("pod_to_vpc", 1), ("flow_new", 1)]);
        let router = if family.a == V4.a { "10.8.0.1" } else { "fd08::1" };
        let bytes = sent.build();
        let error = stage.by_gateway().ip(router, family.a).icmp(family.unreachable, 3, [0; 4]).payload(quoted(&bytes));
        delivered(&from_vpc(&stage, &error, &[("vpc_to_pod", 1)]), &stage.a, &error);
        let echo =
            stage.by_gateway().ip(router, family.a).icmp(family.unreachable, 3, [0; 4]).payload(quoted(&there.build()));
        delivered(&from_vpc(&stage, &echo, &[("vpc_to_pod", 1)]), &stage.a, &echo);
        let reverse = rows(&stage).into_iter().find(|row| {
            row.ifindex == stage.eni
                && row.protocol == 17
                && row.source.port == 9
                && row.valid
                && row.source.address.is_ipv4() == (family.a == V4.a)
        });
        assert_eq!(reverse.unwrap().packets, 1);

        // One about a flow that nobody knows is a packet like any other, and nothing is remembered of it.
        let unknown = stage.sent_by(&stage.a).ip(family.a, family.remote).udp(40001, 9).build();
        let error =
            stage.by_gateway().ip(router, family.a).icmp(family.unreachable, 3, [0; 4]).payload(quoted(&unknown));
        delivered(&from_vpc(&stage, &error, &[("vpc_to_pod", 1)]), &stage.a, &error);
        // A pod of this node is no router in the VPC.
        let error =
            stage.by_gateway().ip(family.b, family.a).icmp(family.unreachable, 3, [0; 4]).payload(quoted(&bytes));
        dropped(&from_vpc(&stage, &error, &[("spoofed_source", 1)]));
        // A pod answers with an error, as itself only.
        let came = stage.by_gateway().ip(family.remote, family.b).udp(5, 6);
        from_vpc(&stage, &came, &[("vpc_to_pod", 1), ("flow_new", 1)]);
        let refuse = |source: &str| {
            let frame = stage.sent_by(&stage.b).ip(source, family.remote);
            frame.icmp(family.unreachable, 3, [0; 4]).payload(quoted(&came.build()))
        };
        assert_eq!(from_pod(&stage, &stage.b, &refuse(family.b), &[("pod_to_vpc", 1)]).action, REDIRECT);
        dropped(&from_pod(&stage, &stage.b, &refuse(family.a), &[("spoofed_source", 1)]));
    }
}

#[test]
fn neighbours() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    let (own, other) = (stage.a.pod_mac.0, stage.b.pod_mac.0);
    let broadcast = [0xff; 6];
    let arp = |sender: ([u8; 6], &str)| Frame::new(broadcast, own).arp(1, sender, ([0; 6], "169.254.1.1"));
    let pass = &[("neighbour", 1)][..];
    untouched(&from_pod(&stage, &stage.a, &arp((own, V4.a)), pass), &arp((own, V4.a)));
    for sender in [(own, V4.b), (other, V4.a), (own, "0.0.0.0")] {
        dropped(&from_pod(&stage, &stage.a, &arp(sender), &[("spoofed_arp", 1)]));
    }
    let to = Frame::new(own, HOST_MAC).arp(2, (HOST_MAC, "169.254.1.1"), (own, V4.a));
    untouched(&to_pod(&stage, &stage.a, &to, pass), &to);

    let multicast = [0x33, 0x33, 0xff, 0, 0, 1];
    let from = |source: &str, destination: &str| Frame::new(multicast, own).ip(source, destination);
    for good in [
        from("::", "ff02::1:ff00:1").neighbour(135, V6.a, None),
        from("::", "ff02::1:ff00:9").neighbour(135, "fe80::9", None),
        from(V6.a, "ff02::1:ff00:1").neighbour(135, "fe80::1", Some((1, own))),
        from("fe80::9", "ff02::2").ttl(255).icmp(133, 0, [0; 4]).payload(&[1, 1]).payload(&own),
        from(V6.a, "fe80::1").neighbour(136, V6.a, Some((2, own))),
        from("fe80::9", "fe80::1").neighbour(136, "fe80::9", Some((2, own))),
        // A nonce, then the address.
        from(V6.a, "fe80::1").neighbour(135, "fe80::1", None).payload(&[14, 1, 1, 2, 3, 4, 5, 6, 1, 1]).payload(&own),
    ] {
        untouched(&from_pod(&stage, &stage.a, &good, pass), &good);
    }
    for bad in [
        from(V6.b, "ff02::1:ff00:1").neighbour(135, "fe80::1", Some((1, own))),
        from(V6.a, "ff02::1:ff00:1").neighbour(135, "fe80::1", Some((1, other))),
        from(V6.a, "fe80::1").neighbour(136, V6.b, Some((2, own))),
        from(V6.a, "fe80::1").neighbour(136, V6.a, Some((2, other))),
        from(V6.a, "fe80::1").neighbour(135, "fe80::1", None).payload(&[14, 1, 1, 2, 3, 4, 5, 6, 1, 1]).payload(&other),
        from("fe80::9", "ff02::1").ttl(255).icmp(134, 0, [64, 0, 0, 0]).payload(&[0; 8]),
        from("fe80::9", "ff02::1").ttl(255).icmp(137, 0, [0; 4]).payload(&[0; 32]),
        from(V6.a, "fe80::1").neighbour(135, "fe80::1", None).payload(&[1, 0, 0, 0, 0, 0, 0, 0]),
    ] {
        dropped(&from_pod(&stage, &stage.a, &bad, &[("spoofed_neighbour", 1)]));
    }
    let asked = Frame::new(own, HOST_MAC).ip("fe80::1", "ff02::1:ff00:1").neighbour(135, V6.a, Some((1, HOST_MAC)));
    untouched(&to_pod(&stage, &stage.a, &asked, pass), &asked);
    assert_eq!(rows(&stage), []);
}

#[test]
fn what_never_leaves_a_pod() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    let sent = |source: &str, to: &str| stage.sent_by(&stage.a).ip(source, to).udp(1, 2);
    for (source, to, reason) in [
        (V4.a, "224.0.0.251", "multicast"),
        (V4.a, "255.255.255.255", "multicast"),
        (V4.a, "127.0.0.1", "bad_destination"),
        (V4.a, "0.0.0.0", "bad_destination"),
        (V6.a, "ff02::fb", "multicast"),
        ("fe80::9", "ff02::16", "multicast"),
        ("fe80::9", V6.b, "link_local"),
        (V6.a, "fe80::1", "link_local"),
        (V6.a, "::1", "bad_destination"),
        ("::", V6.b, "spoofed_source"),
    ] {
        dropped(&from_pod(&stage, &stage.a, &sent(source, to), &[(reason, 1)]));
    }
    let own = stage.sent_by(&stage.a);
    for (frame, reason) in [
        (own.clone().raw(0x88cc, &[0; 46]), "unknown_ethertype"),
        (own.clone().ip(V4.a, V4.b).protocol(6), "truncated"),
        (own.clone().ip(V6.a, V6.b).protocol(17).payload(&[0; 3]), "truncated"),
        (own.clone().ip(V6.a, V6.b).protocol(60).payload(&[6]), "truncated"),
        (own.clone().raw(0x0800, &[0x55; 40]), "bad_header"),
        (own.clone().raw(0x0800, &[0x44; 40]), "bad_header"),
        (own.clone().raw(0x86dd, &[0x50; 60]), "bad_header"),
        (own.raw(0x0806, &[0, 1, 8, 0]), "truncated"),
    ] {
        dropped(&from_pod(&stage, &stage.a, &frame, &[(reason, 1)]));
    }
    let mut short = sent(V4.a, V4.b).build();
    short.truncate(36);
    let context = RunContext::on(stage.a.host_ifindex);
    dropped(&run(&stage, Program::FromPod, context, &short, &[("truncated", 1)]));
    assert_eq!(rows(&stage), []);
}

#[test]
fn protocols_without_ports_have_flows() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    for family in BOTH {
        for (protocol, new) in [(47, 1), (132, 1)] {
            let there = stage.sent_by(&stage.a).ip(family.a, family.remote).protocol(protocol).payload(&[0x11; 16]);
            from_pod(&stage, &stage.a, &there, &[("pod_to_vpc", 1), ("flow_new", new)]);
            from_pod(&stage, &stage.a, &there, &[("pod_to_vpc", 1)]);
            let back = stage.by_gateway().ip(family.remote, family.a).protocol(protocol).payload(&[0x11; 16]);
            delivered(&from_vpc(&stage, &back, &[("vpc_to_pod", 1)]), &stage.a, &back);
        }
    }
    let ports: Vec<u16> = rows(&stage).iter().filter(|row| row.protocol == 132).map(|row| row.source.port).collect();
    assert_eq!(ports, [0x1111; 4]);
    assert!(rows(&stage).iter().filter(|row| row.protocol == 47).all(|row| row.source.port == 0));
}

#[test]
fn a_syn_on_a_closed_connection_begins_anew() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    for family in BOTH {
        let with = |flags: u8| stage.sent_by(&stage.a).ip(family.a, family.b).tcp(40000, 80, flags);
        from_pod(&stage, &stage.a, &with(flags::SYN), &[("pod_to_pod", 1), ("flow_new", 1)]);
        from_pod(&stage, &stage.a, &with(flags::SYN), &[("pod_to_pod", 1)]);
        from_pod(&stage, &stage.a, &with(flags::FIN | flags::ACK), &[("pod_to_pod", 1)]);
        from_pod(&stage, &stage.a, &with(flags::ACK), &[("pod_to_pod", 1)]);
        from_pod(&stage, &stage.a, &with(flags::SYN), &[("pod_to_pod", 1), ("flow_new", 1)]);
        from_pod(&stage, &stage.a, &with(flags::RST), &[("pod_to_pod", 1)]);
        from_pod(&stage, &stage.a, &with(flags::SYN), &[("pod_to_pod", 1), ("flow_new", 1)]);
        let back = stage.sent_by(&stage.b).ip(family.b, family.a).tcp(80, 40000, flags::SYN | flags::ACK);
        from_pod(&stage, &stage.b, &back, &[("pod_to_pod", 1)]);
    }
    let began: Vec<bool> = rows(&stage).iter().map(|row| row.flags & flow_flags::REVERSE == 0).collect();
    assert_eq!(began, [true, true, false, false]);
}

#[test]
fn who_began_outlives_what_voids_a_flow() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    let of_a = |stage: &Stage| rows(stage).into_iter().find(|row| row.ifindex == stage.a.host_ifindex).unwrap();
    for (number, family) in BOTH.iter().enumerate() {
        let there = stage.by_gateway().ip(family.remote, family.a).tcp(50000, 80, flags::SYN);
        from_vpc(&stage, &there, &[("vpc_to_pod", 1), ("flow_new", 1)]);
        // The pod changes: the flow is decided anew, and the pod's next packet is still an answer.
        let changed = Endpoint { gateway_v4: Some("10.0.0.252".parse().unwrap()), ..stage.a };
        stage.datapath.upsert_endpoint(if number % 2 == 0 { &changed } else { &stage.a }).unwrap();
        let back = stage.sent_by(&stage.a).ip(family.a, family.remote).tcp(80, 50000, flags::ACK);
        from_pod(&stage, &stage.a, &back, &[("pod_to_vpc", 1), ("flow_new", 1), ("flow_stale", 1)]);
        assert_eq!(of_a(&stage).flags & flow_flags::REVERSE, flow_flags::REVERSE);
        evict(&stage);
        // Nothing is known any more: what the packet says of itself does not count, who speaks first began.
        let back = stage.sent_by(&stage.a).ip(family.a, family.remote).tcp(80, 50000, flags::SYN | flags::ACK);
        from_pod(&stage, &stage.a, &back, &[("pod_to_vpc", 1), ("flow_new", 1)]);
        assert_eq!(of_a(&stage).flags & flow_flags::REVERSE, 0);
        // A new connection from the other side is its own.
        from_pod(
            &stage,
            &stage.a,
            &stage.sent_by(&stage.a).ip(family.a, family.remote).tcp(80, 50000, flags::RST),
            &[("pod_to_vpc", 1)],
        );
        let begin = stage.sent_by(&stage.a).ip(family.a, family.remote).tcp(80, 50000, flags::SYN);
        from_pod(&stage, &stage.a, &begin, &[("pod_to_vpc", 1), ("flow_new", 1)]);
        assert_eq!(of_a(&stage).flags & flow_flags::REVERSE, 0);
        evict(&stage);
    }
}

/// Deletes all flows, as the kernel does when the table is full.
fn evict(stage: &Stage) {
    use aya::maps::{HashMap, Map, MapData};
    let pinned = |name| Map::LruHashMap(MapData::from_pin(stage.datapath.pins().join(name)).unwrap());
    let mut v4: HashMap<_, terway_abi::FlowKeyV4, terway_abi::FlowV4> =
        pinned(terway_abi::names::FLOWS_V4).try_into().unwrap();
    let mut v6: HashMap<_, terway_abi::FlowKeyV6, terway_abi::FlowV6> =
        pinned(terway_abi::names::FLOWS_V6).try_into().unwrap();
    let keys: Vec<_> = v4.keys().map(Result::unwrap).collect();
    keys.iter().for_each(|key| v4.remove(key).unwrap());
    let keys: Vec<_> = v6.keys().map(Result::unwrap).collect();
    keys.iter().for_each(|key| v6.remove(key).unwrap());
}

#[test]
fn a_pod_that_goes_takes_its_flows_along() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    for family in BOTH {
        stage.datapath.upsert_endpoint(&stage.b).unwrap();
        let to_b = stage.sent_by(&stage.a).ip(family.a, family.b).udp(1, 2);
        let of_b = stage.sent_by(&stage.b).ip(family.b, family.remote).udp(1, 2);
        from_pod(&stage, &stage.a, &to_b, &[("pod_to_pod", 1), ("flow_new", 1)]);
        from_pod(&stage, &stage.b, &of_b, &[("pod_to_vpc", 1), ("flow_new", 1)]);
        assert!(stage.datapath.remove_endpoint(stage.b.host_ifindex).unwrap());
        assert!(!stage.datapath.remove_endpoint(stage.b.host_ifindex).unwrap());
        dropped(&from_pod(&stage, &stage.b, &of_b, &[("unknown_endpoint", 1), ("flow_stale", 1)]));
        // Its address is nobody's here: the VPC knows where it is.
        let counters = [("pod_to_vpc", 1), ("flow_new", 1), ("flow_stale", 1)];
        assert_eq!(from_pod(&stage, &stage.a, &to_b, &counters).action, REDIRECT);
        from_pod(&stage, &stage.a, &to_b, &[("pod_to_vpc", 1)]);
        // Another pod gets the address: flows that went to the VPC come to it.
        let heir = Endpoint { pod_mac: Mac([2, 0, 0, 0, 0, 0x77]), ..stage.b };
        stage.datapath.upsert_endpoint(&heir).unwrap();
        let counters = [("pod_to_pod", 1), ("flow_new", 1), ("flow_stale", 1)];
        delivered(&from_pod(&stage, &stage.a, &to_b, &counters), &heir, &to_b);
    }
    assert_eq!(stage.datapath.endpoints().len(), 2);
    assert!(stage.datapath.remove_endpoint(stage.b.host_ifindex).unwrap());
    let options = PassOptions { timeouts: Timeouts::default(), delete: true, loads: false, before: None };
    let swept = stage.datapath.pass_flows(&options).unwrap();
    let sum = |of: fn(&FamilyFound) -> u64| swept.families.iter().map(of).sum::<u64>();
    assert!(sum(|f| f.deleted_void) > 0 && sum(|f| f.deleted_expired) == 0, "{swept:?}");
    assert!(rows(&stage).iter().all(|row| row.valid));
    assert_eq!(rows(&stage).len() as u64, 2 * sum(|f| f.used - f.deleted()));
    let again = stage.datapath.pass_flows(&options).unwrap();
    assert!(again.families.iter().all(|f| f.deleted() == 0 && f.void == 0), "{again:?}");
}

#[test]
fn changes_are_seen_by_known_flows() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    let sent = stage.sent_by(&stage.a).ip(V4.a, "10.7.0.7").udp(1, 2);
    from_pod(&stage, &stage.a, &sent, &[("pod_to_vpc", 1), ("flow_new", 1)]);
    stage.datapath.set_host_addresses(&["10.7.0.0/16".parse().unwrap()]).unwrap();
    untouched(&from_pod(&stage, &stage.a, &sent, &[("pod_to_host", 1), ("flow_new", 1), ("flow_stale", 1)]), &sent);
    stage.datapath.set_host_addresses(&["10.7.0.0/16".parse().unwrap()]).unwrap();
    untouched(&from_pod(&stage, &stage.a, &sent, &[("pod_to_host", 1)]), &sent);
    stage.datapath.set_host_addresses(&[]).unwrap();
    from_pod(&stage, &stage.a, &sent, &[("pod_to_vpc", 1), ("flow_new", 1), ("flow_stale", 1)]);
    // The same endpoint again changes nothing; another gateway does.
    stage.datapath.upsert_endpoint(&stage.a).unwrap();
    from_pod(&stage, &stage.a, &sent, &[("pod_to_vpc", 1)]);
    let moved = Endpoint { gateway_v4: None, ..stage.a };
    stage.datapath.upsert_endpoint(&moved).unwrap();
    dropped(&from_pod(&stage, &stage.a, &sent, &[("no_gateway", 1), ("flow_stale", 1)]));
    // An address that goes over to another endpoint leaves the first one without any.
    let rival = Endpoint { addresses: Addresses { v4: stage.a.addresses.v4, v6: None }, ..stage.b };
    stage.datapath.upsert_endpoint(&rival).unwrap();
    assert_eq!(stage.datapath.endpoints(), [rival]);
    dropped(&from_pod(&stage, &stage.a, &sent, &[("unknown_endpoint", 1), ("flow_stale", 1)]));
}

#[test]
fn drops_are_reported_within_bounds() {
    let sandbox = sandbox_or_skip!();
    let config = Config { events_per_second: 3, ..Config::new(sandbox.pin_root()) };
    let stage = Stage::with(&config).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut events = stage.datapath.take_events().unwrap();
        assert!(matches!(stage.datapath.take_events(), Err(BpfError::EventsTaken)));
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
        let before = stage.datapath.counters().unwrap();
        for _ in 0..20 {
            stage.datapath.run(Program::FromVpc, &spoofed.build(), RunContext::on(stage.eni)).unwrap();
        }
        let after = stage.datapath.counters().unwrap();
        let of = |counters: &Counters, kind| counters.kind(kind).packets;
        let lost = of(&after, Kind::EventLost) - of(&before, Kind::EventLost);
        let reported = std::iter::from_fn(|| events.try_next()).count() as u64;
        assert_eq!(after.drop(Drop::SpoofedSource).packets - before.drop(Drop::SpoofedSource).packets, 20);
        assert_eq!(reported + lost, 20);
        assert!(reported < 20, "the budget bounds nothing");
        // The next one that is reported says how many were not.
        tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
        from_vpc(&stage, &spoofed, &[("spoofed_source", 1)]);
        assert!(u64::from(events.next().await.unwrap().lost) <= lost);
    });
}

#[test]
fn pinned_maps_are_checked_before_they_are_used() {
    let sandbox = sandbox_or_skip!();
    let config = Config::new(sandbox.pin_root());
    let stage = Stage::with(&config).unwrap();
    let sent = stage.sent_by(&stage.a).ip(V4.a, V4.b).udp(1, 2);
    from_pod(&stage, &stage.a, &sent, &[("pod_to_pod", 1), ("flow_new", 1)]);
    let pins = stage.datapath.pins().to_owned();
    drop(stage.datapath);

    // The same again finds everything.
    let again = Datapath::open(&config).unwrap();
    assert_eq!((again.endpoints().len(), again.flow_count().unwrap()), (2, (1, 0)));
    drop(again);
    // The folders of other versions go when told to; this one stays.
    std::fs::create_dir(config.pin_root.join("v0")).unwrap();
    let other = aya::maps::HashMap::<_, u32, u64>::create(8, 0).unwrap();
    other.pin(config.pin_root.join("v0/OLD")).unwrap();
    let again = Datapath::open(&config).unwrap();
    again.remove_other_versions().unwrap();
    assert!(!config.pin_root.join("v0").exists() && pins.exists());
    drop(again);
    // Another size of the flow table makes a new one, and keeps the pods and the flows.
    let resized = Datapath::open(&Config { flows_v4: 1024, ..config.clone() }).unwrap();
    assert_eq!((resized.endpoints().len(), resized.flow_count().unwrap()), (2, (1, 0)));
    drop(resized);
    // Something else under the name of a map is refused, by name.
    std::fs::remove_file(pins.join(terway_abi::names::OWNERS_V4)).unwrap();
    let alien = aya::maps::HashMap::<_, u32, u64>::create(8, 0).unwrap();
    alien.pin(pins.join(terway_abi::names::OWNERS_V4)).unwrap();
    let refused = Datapath::open(&config).unwrap_err();
    assert!(matches!(refused, BpfError::Layout { .. }), "{refused}");
    assert!(refused.to_string().contains("OWNERS_V4"), "{refused}");
}
