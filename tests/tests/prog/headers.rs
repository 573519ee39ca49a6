//! Packet headers: fragments, options, extension headers, ICMP, neighbour discovery, and unroutable destinations.

use terway_abi::Program;
use terway_daemon::bpf::RunContext;
use terway_tests::packet::{Frame, quoted};
use terway_tests::prog_bench::{HOST_MAC, Stage};
use terway_tests::sandbox_or_skip;

use super::{BOTH, REDIRECT, V4, V6, delivered, dropped, from_pod, from_vpc, rows, run, to_pod, untouched};

#[test]
fn later_fragments_use_stored_ports() {
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
    // Bytes behind the end-of-options option are no options.
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
fn icmp_echo_and_errors() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    for family in BOTH {
        let (ask, answer) = family.echo;
        let there = stage.sent_by(&stage.a).ip(family.a, family.remote).icmp(ask, 0, [0x12, 0x34, 0, 1]);
        assert_eq!(from_pod(&stage, &stage.a, &there, &[("pod_to_vpc", 1), ("flow_new", 1)]).action, REDIRECT);
        let back = stage.by_gateway().ip(family.remote, family.a).icmp(answer, 0, [0x12, 0x34, 0, 1]);
        delivered(&from_vpc(&stage, &back, &[("vpc_to_pod", 1)]), &stage.a, &back);

        // A router's error about a packet of a known flow is forwarded by that flow's entry.
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

        // An error about an unknown flow is forwarded like any packet, without a flow entry.
        let unknown = stage.sent_by(&stage.a).ip(family.a, family.remote).udp(40001, 9).build();
        let error =
            stage.by_gateway().ip(router, family.a).icmp(family.unreachable, 3, [0; 4]).payload(quoted(&unknown));
        delivered(&from_vpc(&stage, &error, &[("vpc_to_pod", 1)]), &stage.a, &error);
        // A pod of this node is no router in the VPC.
        let error =
            stage.by_gateway().ip(family.b, family.a).icmp(family.unreachable, 3, [0; 4]).payload(quoted(&bytes));
        dropped(&from_vpc(&stage, &error, &[("spoofed_source", 1)]));
        // A pod sends ICMP errors with its own source only.
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
fn arp_and_neighbour_discovery() {
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
fn unroutable_destinations_are_dropped() {
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
