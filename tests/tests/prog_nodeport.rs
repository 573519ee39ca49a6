//! The prog rung of Services for external clients: NodePort and LoadBalancer traffic, replies, ICMP errors, and colliding tuples.
//!
//! Clients arrive through the stage's second ENI; its pods belong to the first one.

#![allow(clippy::unwrap_used, reason = "a suite panics where it fails, for the stack trace")]

use std::collections::BTreeSet;

use terway_abi::{Backend, Frontend, MARK_CHECKED, Program, frontend_flags};
use terway_core::ident::Addresses;
use terway_daemon::bpf::{Endpoint, Ran, RunContext, Uplink};
use terway_tests::packet::{Frame, checksums_are_right, flags, macs, quoted};
use terway_tests::prog_bench::{GATEWAY_MAC, Stage};
use terway_tests::prog_harness::{NEXT, REDIRECT, SHOT, at, backend, came_out, ip, node_port_key, run, serve};
use terway_tests::sandbox::Sandbox;
use terway_tests::sandbox_or_skip;

const TCP: u8 = 6;
const UDP: u8 = 17;
const UPLINK_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xe2];
/// The SNAT port range.
const PORTS: std::ops::RangeInclusive<u16> = 61_000..=61_099;

struct Family {
    v6: bool,
    a: &'static str,
    b: &'static str,
    client: &'static str,
    remote: &'static str,
    node: &'static str,
    vip: &'static str,
    router: &'static str,
    /// Offset of the transport header.
    transport: usize,
    /// ICMP type and code "packet too big".
    error: (u8, u8),
}

const V4: Family = Family {
    v6: false,
    a: "10.0.0.1",
    b: "10.0.0.2",
    client: "192.0.2.9",
    remote: "10.9.0.9",
    node: "10.0.0.100",
    vip: "203.0.113.7",
    router: "10.77.0.1",
    transport: 34,
    error: (3, 4),
};
const V6: Family = Family {
    v6: true,
    a: "fd00::1",
    b: "fd00::2",
    client: "2001:db8::9",
    remote: "fd09::9",
    node: "fd00::100",
    vip: "2001:db8:7::7",
    router: "fd77::1",
    transport: 54,
    error: (2, 0),
};
const BOTH: [Family; 2] = [V4, V6];

fn stage(sandbox: &Sandbox) -> Stage {
    let stage = Stage::set(sandbox).unwrap();
    let node = Addresses { v4: Some("10.0.0.100".parse().unwrap()), v6: Some("fd00::100".parse().unwrap()) };
    let uplink = Uplink {
        ifindex: stage.other_eni,
        node,
        gateway_v4: Some("10.1.0.253".parse().unwrap()),
        gateway_v6: Some("fd01::fd".parse().unwrap()),
        ports: PORTS,
    };
    stage.datapath.uplinks().set(&uplink).unwrap();
    assert_eq!(stage.datapath.uplinks().list().unwrap(), [uplink]);
    stage.datapath.services().set_node_addresses(&[ip(V4.node), ip(V6.node)]).unwrap();
    stage
}

/// A NodePort of both protocols with one backend address.
fn node_port(stage: &Stage, family: &Family, backends: &[&str], port: u16, template: Frontend) {
    for (offset, protocol) in [(0, TCP), (1, UDP)] {
        let backends: Vec<Backend> = backends.iter().map(|address| backend(address, port, protocol)).collect();
        let place = node_port_key(family.v6, 30_080, protocol);
        serve(stage, 10 + 20 * offset + u32::from(family.v6) * 100, &place, &backends, template);
    }
}

/// A frame that arrives through the uplink.
fn outside() -> Frame {
    Frame::new(UPLINK_MAC, GATEWAY_MAC)
}

fn to_pod(pod: &Endpoint) -> Frame {
    Frame::new(pod.pod_mac.0, pod.host_mac.0).ttl(63)
}

fn with(protocol: u8, frame: Frame, source: u16, destination: u16) -> Frame {
    match protocol {
        TCP => frame.tcp(source, destination, flags::ACK).payload(b"some data"),
        _ => frame.udp(source, destination).payload(b"some data"),
    }
}

#[track_caller]
fn from_vpc(stage: &Stage, frame: &Frame, expected: &[(&str, u64)]) -> Ran {
    run(stage, Program::FromVpc, stage.other_eni, &frame.build(), expected)
}

#[track_caller]
fn from_pod(stage: &Stage, pod: &Endpoint, frame: &Frame, expected: &[(&str, u64)]) -> Ran {
    run(stage, Program::FromPod, pod.host_ifindex, &frame.build(), expected)
}

#[track_caller]
fn to_vpc(stage: &Stage, frame: &Frame, expected: &[(&str, u64)]) -> Ran {
    run(stage, Program::ToVpc, stage.other_eni, &frame.build(), expected)
}

/// The output interface of packets with this tuple, from the flow table.
fn way_out(stage: &Stage, source: (&str, u16), destination: (&str, u16)) -> u32 {
    let rows = stage.datapath.flows().list(1000).unwrap();
    let row = rows.iter().find(|row| {
        (row.source.address, row.source.port) == (ip(source.0), source.1)
            && (row.destination.address, row.destination.port) == (ip(destination.0), destination.1)
            && row.ifindex != 0
    });
    row.unwrap().oif
}

fn source_port(family: &Family, packet: &[u8]) -> u16 {
    u16::from_be_bytes([packet[family.transport], packet[family.transport + 1]])
}

const TO_POD: [(&str, u64); 2] = [("vpc_to_pod", 1), ("flow_new", 1)];
const THROUGH: [(&str, u64); 2] = [("vpc_to_vpc", 1), ("flow_new", 1)];

#[test]
fn nodeport_to_local_pod_keeps_client_address_and_uplink() {
    let sandbox = sandbox_or_skip!();
    let stage = stage(&sandbox);
    for family in BOTH {
        node_port(&stage, &family, &[family.a], 8080, Frontend::default());
        for (n, protocol) in [(0, TCP), (1, UDP)] {
            let place = at(family.vip, 443, protocol);
            let local = Frontend { flags: frontend_flags::EXTERNAL_LOCAL, ..Frontend::default() };
            serve(&stage, 50 + n + u32::from(family.v6) * 2, &place, &[backend(family.b, 8443, protocol)], local);
            for (address, port, pod, pod_address, target) in
                [(family.node, 30_080, &stage.a, family.a, 8080), (family.vip, 443, &stage.b, family.b, 8443)]
            {
                let there = with(protocol, outside().ip(family.client, address), 50_000, port);
                let arrives = with(protocol, to_pod(pod).ip(family.client, pod_address), 50_000, target);
                for expected in [&TO_POD[..], &TO_POD[..1]] {
                    came_out(&from_vpc(&stage, &there, expected), REDIRECT, &arrives);
                }
                let back = with(protocol, stage.sent_by(pod).ip(pod_address, family.client), target, 50_000);
                let ran = from_pod(&stage, pod, &back, &[("pod_to_vpc", 1)]);
                let sent = stage.sent_by(pod).ip(address, family.client).ttl(63);
                came_out(&ran, REDIRECT, &with(protocol, sent, port, 50_000));
                assert_eq!(ran.mark, MARK_CHECKED);
                // Not through the pod's own ENI.
                assert_eq!(way_out(&stage, (pod_address, target), (family.client, 50_000)), stage.other_eni);
            }
        }
    }
}

#[test]
fn nodeport_snat_to_remote_backend() {
    let sandbox = sandbox_or_skip!();
    let stage = stage(&sandbox);
    for family in BOTH {
        node_port(&stage, &family, &[family.remote], 8080, Frontend::default());
        for protocol in [TCP, UDP] {
            let there = with(protocol, outside().ip(family.client, family.node), 50_000, 30_080);
            let ran = from_vpc(&stage, &there, &THROUGH);
            let port = source_port(&family, &ran.packet);
            assert!(PORTS.contains(&port), "{port}");
            let arrives = with(protocol, outside().ip(family.node, family.remote).ttl(63), port, 8080);
            came_out(&ran, REDIRECT, &arrives);
            assert_eq!(ran.mark, MARK_CHECKED);
            came_out(&from_vpc(&stage, &there, &THROUGH[..1]), REDIRECT, &arrives);
            let back = with(protocol, outside().ip(family.remote, family.node), 8080, port);
            let returns = with(protocol, outside().ip(family.node, family.client).ttl(63), 30_080, 50_000);
            for _ in 0..2 {
                came_out(&from_vpc(&stage, &back, &THROUGH[..1]), REDIRECT, &returns);
            }
            for (source, destination) in
                [((family.client, 50_000), (family.node, 30_080)), ((family.remote, 8080), (family.node, port))]
            {
                assert_eq!(way_out(&stage, source, destination), stage.other_eni);
            }
        }
        // A datagram without a checksum keeps none.
        if !family.v6 {
            let mut bare = with(UDP, outside().ip(family.client, family.node), 50_000, 30_080).build();
            bare[40..42].fill(0);
            let ran = run(&stage, Program::FromVpc, stage.other_eni, &bare, &THROUGH[..1]);
            assert_eq!(ran.packet[40..42], [0, 0]);
        }
    }
}

#[test]
fn nodeport_snat_ports_are_unique() {
    let sandbox = sandbox_or_skip!();
    let stage = stage(&sandbox);
    for family in BOTH {
        node_port(&stage, &family, &[family.remote], 8080, Frontend::default());
        let no_port = || {
            let counters = stage.datapath.counters().read().unwrap();
            counters.iter().find(|(name, _)| *name == "snat_ports_exhausted").unwrap().1.packets
        };
        let (mut seen, mut refused, before) = (BTreeSet::new(), 0, no_port());
        for client in 0..300_u16 {
            let there = outside().ip(family.client, family.node).tcp(40_000 + client, 30_080, flags::SYN).build();
            let ran = stage.datapath.programs().run(Program::FromVpc, &there, RunContext::on(stage.other_eni)).unwrap();
            match ran.action {
                REDIRECT => assert!(seen.insert(source_port(&family, &ran.packet)), "a port twice"),
                SHOT => refused += 1,
                other => panic!("{other}"),
            }
        }
        // Six draws of a hundred ports find one of the last of them now and then.
        assert!((90..=100).contains(&seen.len()), "{}", seen.len());
        assert_eq!((refused + seen.len() as u64, no_port() - before), (300, refused));
    }
}

#[test]
fn nodeport_to_host_network_backend() {
    let sandbox = sandbox_or_skip!();
    let stage = stage(&sandbox);
    for family in BOTH {
        node_port(&stage, &family, &[family.node], 8080, Frontend::default());
        for protocol in [TCP, UDP] {
            let there = with(protocol, outside().ip(family.client, family.node), 50_000, 30_080);
            let arrives = with(protocol, outside().ip(family.client, family.node), 50_000, 8080);
            for expected in [&[("vpc_to_host", 1), ("flow_new", 1)][..], &[("vpc_to_host", 1)]] {
                came_out(&from_vpc(&stage, &there, expected), NEXT, &arrives);
            }
            let sent = || Frame::new(GATEWAY_MAC, UPLINK_MAC);
            let back = with(protocol, sent().ip(family.node, family.client), 8080, 50_000);
            let leaves = with(protocol, sent().ip(family.node, family.client), 30_080, 50_000);
            came_out(&to_vpc(&stage, &back, &[("host_to_vpc", 1)]), NEXT, &leaves);
            // Another port is not the Service's.
            let other = with(protocol, sent().ip(family.node, family.client), 8081, 50_000);
            came_out(&to_vpc(&stage, &other, &[("host_to_vpc", 1)]), NEXT, &other);
        }
        // It rejects a datagram.
        let arrived = outside().ip(family.client, family.node).udp(50_000, 8080).payload(b"some data");
        let named = outside().ip(family.client, family.node).udp(50_000, 30_080).payload(b"some data");
        let sent = Frame::new(GATEWAY_MAC, UPLINK_MAC).ip(family.node, family.client);
        let error = |about: &Frame| sent.clone().icmp(family.error.0, 3, [0; 4]).payload(quoted(&about.build()));
        let ran = to_vpc(&stage, &error(&arrived), &[("host_to_vpc", 1)]);
        came_out(&ran, NEXT, &error(&named));
    }
}

#[test]
fn nodeport_denied_clients_and_missing_backends() {
    let sandbox = sandbox_or_skip!();
    let stage = stage(&sandbox);
    for family in BOTH {
        let there = outside().ip(family.client, family.node).tcp(50_000, 30_080, flags::SYN);
        let datagram = outside().ip(family.client, family.node).udp(50_000, 30_080).payload(b"a question");
        // No backend: the rejection leaves through the client's uplink.
        node_port(&stage, &family, &[], 8080, Frontend::default());
        let ran = from_vpc(&stage, &there, &[("rejected", 1)]);
        assert_eq!((ran.action, ran.mark, macs(&ran.packet)), (REDIRECT, MARK_CHECKED, (GATEWAY_MAC, UPLINK_MAC)));
        assert!(checksums_are_right(&ran.packet));
        assert_eq!(ran.packet[family.transport + 13], flags::RST | flags::ACK);
        assert_eq!(source_port(&family, &ran.packet), 30_080);
        let ran = from_vpc(&stage, &datagram, &[("rejected", 1)]);
        assert!(ran.action == REDIRECT && checksums_are_right(&ran.packet));
        // Or the packet is dropped without a reply.
        let silent = Frontend {
            flags: frontend_flags::DROP_WITHOUT_REPLY | frontend_flags::EXTERNAL_LOCAL,
            ..Frontend::default()
        };
        node_port(&stage, &family, &[], 8080, silent);
        assert_eq!(from_vpc(&stage, &there, &[("no_backend", 1)]).action, SHOT);
        // externalTrafficPolicy Local with an outdated plan: drop rather than forward to another node.
        let local = Frontend { flags: frontend_flags::EXTERNAL_LOCAL, ..Frontend::default() };
        node_port(&stage, &family, &[family.remote], 8080, local);
        assert_eq!(from_vpc(&stage, &there, &[("no_backend", 1)]).action, SHOT);
        // A ClusterIP, and a port without a frontend: passed to the host stack.
        let internal = Frontend { flags: frontend_flags::IN_CLUSTER_ONLY, ..Frontend::default() };
        node_port(&stage, &family, &[family.a], 8080, internal);
        came_out(&from_vpc(&stage, &there, &[("vpc_to_host", 1)]), NEXT, &there);
        let other = outside().ip(family.client, family.node).tcp(50_000, 22, flags::SYN);
        came_out(&from_vpc(&stage, &other, &[("vpc_to_host", 1)]), NEXT, &other);
        // An interface that is no uplink, a spoofed source, an expired TTL.
        node_port(&stage, &family, &[family.a], 8080, Frontend::default());
        let astray = stage.by_gateway().ip(family.client, family.node).tcp(50_000, 30_080, flags::SYN).build();
        assert_eq!(run(&stage, Program::FromVpc, stage.eni, &astray, &[("no_uplink", 1)]).action, SHOT);
        let lie = outside().ip(family.b, family.node).tcp(50_000, 30_080, flags::SYN);
        assert_eq!(from_vpc(&stage, &lie, &[("spoofed_source", 1)]).action, SHOT);
        let last = there.clone().ttl(1);
        assert_eq!(from_vpc(&stage, &last, &[("hop_limit", 1), ("flow_new", 1)]).action, SHOT);
        // A Service that pods reach through the load balancer only.
        let external = Frontend { flags: frontend_flags::EXTERNAL_ONLY, ..Frontend::default() };
        serve(&stage, 300 + u32::from(family.v6), &at(family.vip, 80, TCP), &[backend(family.b, 80, TCP)], external);
        let out = stage.sent_by(&stage.a).ip(family.a, family.vip).tcp(40_000, 80, flags::SYN);
        let ran = from_pod(&stage, &stage.a, &out, &[("pod_to_vpc", 1), ("flow_new", 1)]);
        came_out(&ran, REDIRECT, &out.ttl(63));
    }
}

#[test]
fn nodeport_fragments() {
    let sandbox = sandbox_or_skip!();
    let stage = stage(&sandbox);
    for family in BOTH {
        node_port(&stage, &family, &[family.remote], 8080, Frontend::default());
        let first = |frame: Frame, source, port| frame.fragment(7, 0, true).udp(source, port).payload(&[1; 8]);
        let rest = |frame: Frame| frame.fragment(7, 16, false).protocol(UDP).payload(&[2; 8]);
        let ran = from_vpc(&stage, &first(outside().ip(family.client, family.node), 50_000, 30_080), &THROUGH);
        let transport = family.transport + if family.v6 { 8 } else { 0 };
        let port = u16::from_be_bytes([ran.packet[transport], ran.packet[transport + 1]]);
        let on = || outside().ip(family.node, family.remote).ttl(63);
        assert_eq!((ran.action, &ran.packet), (REDIRECT, &first(on(), port, 8080).build()));
        let ran = from_vpc(&stage, &rest(outside().ip(family.client, family.node)), &THROUGH[..1]);
        assert_eq!((ran.action, &ran.packet), (REDIRECT, &rest(on()).build()));
        let back = || outside().ip(family.remote, family.node);
        let to = || outside().ip(family.node, family.client).ttl(63);
        let ran = from_vpc(&stage, &first(back(), 8080, port), &THROUGH[..1]);
        assert_eq!((ran.action, &ran.packet), (REDIRECT, &first(to(), 30_080, 50_000).build()));
        let ran = from_vpc(&stage, &rest(back()), &THROUGH[..1]);
        assert_eq!((ran.action, &ran.packet), (REDIRECT, &rest(to()).build()));
    }
}

/// An ICMP error about a packet.
fn complaint(family: &Family, frame: Frame, about: &[u8]) -> Frame {
    frame.icmp(family.error.0, family.error.1, [0, 0, 5, 0]).payload(about)
}

#[test]
fn nodeport_icmp_errors_are_translated() {
    let sandbox = sandbox_or_skip!();
    let stage = stage(&sandbox);
    for family in BOTH {
        for protocol in [TCP, UDP] {
            // A local pod: 50000 → 30080 outside is 50000 → 8080 inside.
            node_port(&stage, &family, &[family.a], 8080, Frontend::default());
            let there = with(protocol, outside().ip(family.client, family.node), 50_000, 30_080);
            let arrived = with(protocol, to_pod(&stage.a).ip(family.client, family.a), 50_000, 8080);
            let back = with(protocol, stage.sent_by(&stage.a).ip(family.a, family.client), 8080, 50_000);
            let left = with(protocol, outside().ip(family.node, family.client), 30_080, 50_000);
            from_vpc(&stage, &there, &TO_POD);
            from_pod(&stage, &stage.a, &back, &[("pod_to_vpc", 1)]);
            for length in [usize::MAX, if family.v6 { 48 } else { 28 }] {
                let quote = |frame: &Frame| {
                    let bytes = frame.build();
                    quoted(&bytes)[..length.min(bytes.len() - 14)].to_vec()
                };
                // A router's error about a reply, then the client's own.
                for (from, source) in [(family.router, family.router), (family.client, family.client)] {
                    let error = complaint(&family, outside().ip(from, family.node), &quote(&left));
                    let ran = from_vpc(&stage, &error, &[("vpc_to_pod", 1)]);
                    came_out(&ran, REDIRECT, &complaint(&family, to_pod(&stage.a).ip(source, family.a), &quote(&back)));
                }
                // The pod's error about a request.
                let error = complaint(&family, stage.sent_by(&stage.a).ip(family.a, family.client), &quote(&arrived));
                let ran = from_pod(&stage, &stage.a, &error, &[("pod_to_vpc", 1)]);
                let sent = stage.sent_by(&stage.a).ip(family.node, family.client).ttl(63);
                came_out(&ran, REDIRECT, &complaint(&family, sent, &quote(&there.clone().ttl(63))));
                assert_eq!(ran.mark, MARK_CHECKED);
            }

            // A remote pod: errors leave with the node's address, else the VPC would drop them.
            node_port(&stage, &family, &[family.remote], 8080, Frontend::default());
            let there = with(protocol, outside().ip(family.client, family.node), 50_001, 30_080);
            let port = source_port(&family, &from_vpc(&stage, &there, &THROUGH).packet);
            let sent = with(protocol, outside().ip(family.node, family.remote), port, 8080);
            let back = with(protocol, outside().ip(family.remote, family.node), 8080, port);
            let left = with(protocol, outside().ip(family.node, family.client), 30_080, 50_001);
            let on = |to: &str| outside().ip(family.node, to).ttl(63);
            let cut = |frame: &Frame| quoted(&frame.build()).to_vec();
            for from in [family.router, family.remote] {
                let error = complaint(&family, outside().ip(from, family.node), &cut(&sent));
                let ran = from_vpc(&stage, &error, &THROUGH[..1]);
                came_out(&ran, REDIRECT, &complaint(&family, on(family.client), &cut(&there)));
            }
            for from in [family.router, family.client] {
                let error = complaint(&family, outside().ip(from, family.node), &cut(&left));
                let ran = from_vpc(&stage, &error, &THROUGH[..1]);
                came_out(&ran, REDIRECT, &complaint(&family, on(family.remote), &cut(&back)));
            }
        }
        // An error about a pod's connection to a Service: outside it quotes the backend, inside the Service.
        serve(
            &stage,
            200 + u32::from(family.v6),
            &at(family.vip, 80, UDP),
            &[backend(family.remote, 8080, UDP)],
            Frontend::default(),
        );
        let asked = stage.sent_by(&stage.b).ip(family.b, family.vip).udp(40_000, 80).payload(b"some data");
        from_pod(&stage, &stage.b, &asked, &[("pod_to_vpc", 1), ("flow_new", 1)]);
        let sent = stage.sent_by(&stage.b).ip(family.b, family.remote).udp(40_000, 8080).payload(b"some data").build();
        for (from, source) in [(family.router, family.router), (family.remote, family.vip)] {
            let error = complaint(&family, stage.by_gateway().ip(from, family.b), quoted(&sent)).build();
            let ran = run(&stage, Program::FromVpc, stage.eni, &error, &[("vpc_to_pod", 1)]);
            came_out(
                &ran,
                REDIRECT,
                &complaint(&family, to_pod(&stage.b).ip(source, family.b), quoted(&asked.build())),
            );
        }
        // An error about an unknown flow to the node: passed to the host stack.
        let unknown = outside().ip(family.node, family.remote).udp(999, 8080).build();
        let error = complaint(&family, outside().ip(family.router, family.node), quoted(&unknown));
        came_out(&from_vpc(&stage, &error, &[("vpc_to_host", 1)]), NEXT, &error);
    }
}

/// Direct connections to a backend whose tuple collides with a connection through the Service.
#[test]
fn direct_connection_to_backend_remaps_source_port() {
    let sandbox = sandbox_or_skip!();
    let stage = stage(&sandbox);
    for family in BOTH {
        for (n, protocol) in [(0, TCP), (1, UDP)] {
            let service = 400 + 2 * u32::from(family.v6) + n;
            serve(
                &stage,
                service,
                &at(family.vip, 80, protocol),
                &[backend(family.b, 8080, protocol)],
                Frontend::default(),
            );
            let first = |frame: Frame, source, destination| match protocol {
                TCP => frame.tcp(source, destination, flags::SYN),
                _ => frame.udp(source, destination).payload(b"some data"),
            };
            let sent = |to| stage.sent_by(&stage.a).ip(family.a, to);
            let back = |port| with(protocol, stage.sent_by(&stage.b).ip(family.b, family.a), 8080, port);
            let new = [("pod_to_pod", 1), ("flow_new", 1)];
            let returns = |from, source| with(protocol, to_pod(&stage.a).ip(from, family.a), source, 40_000);

            from_pod(&stage, &stage.a, &first(sent(family.vip), 40_000, 80), &new);
            // The source port of the direct connection is remapped, and stays so.
            let ran = stage
                .datapath
                .programs()
                .run(
                    Program::FromPod,
                    &first(sent(family.b), 40_000, 8080).build(),
                    RunContext::on(stage.a.host_ifindex),
                )
                .unwrap();
            let port = source_port(&family, &ran.packet);
            assert_ne!(port, 40_000, "the backend could not tell them apart");
            came_out(&ran, REDIRECT, &first(to_pod(&stage.b).ip(family.a, family.b), port, 8080));
            for _ in 0..2 {
                let ran = from_pod(&stage, &stage.a, &with(protocol, sent(family.b), 40_000, 8080), &new[..1]);
                came_out(&ran, REDIRECT, &with(protocol, to_pod(&stage.b).ip(family.a, family.b), port, 8080));
                // Replies of each connection come from its own peer.
                let ran = from_pod(&stage, &stage.b, &back(40_000), &new[..1]);
                came_out(&ran, REDIRECT, &returns(family.vip, 80));
                let ran = from_pod(&stage, &stage.b, &back(port), &new[..1]);
                came_out(&ran, REDIRECT, &returns(family.b, 8080));
            }
            // The connection to the Service ends; the direct one continues unchanged.
            let gone = Backend { generation: 9, ..Backend::default() };
            stage.datapath.services().set_backend(10 * service, &gone).unwrap();
            let ran = from_pod(&stage, &stage.a, &with(protocol, sent(family.b), 40_000, 8080), &new[..1]);
            came_out(&ran, REDIRECT, &with(protocol, to_pod(&stage.b).ip(family.a, family.b), port, 8080));
            // The same for an external client.
            node_port(&stage, &family, &[family.b], 8080, Frontend::default());
            from_vpc(&stage, &first(outside().ip(family.client, family.node), 50_000, 30_080), &TO_POD);
            let direct = first(stage.by_gateway().ip(family.client, family.b), 50_000, 8080).build();
            let ran = stage.datapath.programs().run(Program::FromVpc, &direct, RunContext::on(stage.eni)).unwrap();
            let port = source_port(&family, &ran.packet);
            assert_ne!(port, 50_000);
            for (from, to, oif) in
                [((50_000, family.node), 30_080, stage.other_eni), ((port, family.b), 8080, stage.eni)]
            {
                let ((port, source), answers) =
                    (from, with(protocol, stage.sent_by(&stage.b).ip(family.b, family.client), 8080, from.0));
                let ran = from_pod(&stage, &stage.b, &answers, &[("pod_to_vpc", 1)]);
                let out = stage.sent_by(&stage.b).ip(source, family.client).ttl(63);
                came_out(&ran, REDIRECT, &with(protocol, out, to, 50_000));
                assert_eq!(way_out(&stage, (family.b, 8080), (family.client, port)), oif);
            }
        }
    }
}

/// A route change keeps the backend of an established connection.
#[test]
fn nodeport_connection_keeps_backend_after_route_change() {
    let sandbox = sandbox_or_skip!();
    let stage = stage(&sandbox);
    for family in BOTH {
        let backends: Vec<Backend> = (1..9).map(|port| backend(family.remote, port, TCP)).collect();
        let place = node_port_key(family.v6, 30_080, TCP);
        serve(&stage, 600, &place, &backends, Frontend::default());
        let packet = |flags| outside().ip(family.client, family.node).tcp(50_000, 30_080, flags);
        let first = from_vpc(&stage, &packet(flags::SYN), &THROUGH);
        for round in 0..8_u8 {
            let other = format!("10.55.0.{round}/32");
            let hosts = ["10.0.0.100/32", "fd00::100/128", &other].map(|text| text.parse().unwrap());
            stage.datapath.host_prefixes().set(&hosts).unwrap();
            let stale = [("vpc_to_vpc", 1), ("flow_new", 1), ("flow_stale", 1)];
            let ran = from_vpc(&stage, &packet(flags::ACK), &stale);
            let ports = family.transport..family.transport + 4;
            assert_eq!(ran.packet[ports.clone()], first.packet[ports], "another port or backend");
        }
        // Unless the backend was removed.
        for number in 6000..6008 {
            stage.datapath.services().set_backend(number, &Backend { generation: 2, ..Backend::default() }).unwrap();
        }
        from_vpc(&stage, &packet(flags::ACK), &[("rejected", 1), ("flow_stale", 1)]);
    }
}

/// A route change keeps the NAT of replies, and the uplink through which they leave.
#[test]
fn nodeport_reply_nat_survives_route_change() {
    let sandbox = sandbox_or_skip!();
    let stage = stage(&sandbox);
    for (number, family) in (0_u8..).zip(BOTH) {
        let unsettle = |round: u8| {
            let other = format!("10.55.{number}.{round}/32");
            let hosts = ["10.0.0.100/32", "fd00::100/128", &other].map(|text| text.parse().unwrap());
            stage.datapath.host_prefixes().set(&hosts).unwrap();
        };
        let again = |way| [(way, 1), ("flow_new", 1), ("flow_stale", 1)];
        node_port(&stage, &family, &[family.a], 8080, Frontend::default());
        from_vpc(&stage, &with(TCP, outside().ip(family.client, family.node), 50_000, 30_080), &TO_POD);
        unsettle(1);
        let back = with(TCP, stage.sent_by(&stage.a).ip(family.a, family.client), 8080, 50_000);
        let sent = with(TCP, stage.sent_by(&stage.a).ip(family.node, family.client).ttl(63), 30_080, 50_000);
        for expected in [&again("pod_to_vpc")[..], &[("pod_to_vpc", 1)]] {
            came_out(&from_pod(&stage, &stage.a, &back, expected), REDIRECT, &sent);
            assert_eq!(way_out(&stage, (family.a, 8080), (family.client, 50_000)), stage.other_eni);
        }

        node_port(&stage, &family, &[family.remote], 8080, Frontend::default());
        let ran = from_vpc(&stage, &with(UDP, outside().ip(family.client, family.node), 50_001, 30_080), &THROUGH);
        let port = source_port(&family, &ran.packet);
        unsettle(2);
        let back = with(UDP, outside().ip(family.remote, family.node), 8080, port);
        let returns = with(UDP, outside().ip(family.node, family.client).ttl(63), 30_080, 50_001);
        for expected in [&again("vpc_to_vpc")[..], &THROUGH[..1]] {
            came_out(&from_vpc(&stage, &back, expected), REDIRECT, &returns);
            assert_eq!(way_out(&stage, (family.remote, 8080), (family.node, port)), stage.other_eni);
        }
    }
}

#[test]
fn nodeport_maglev_and_affinity() {
    let sandbox = sandbox_or_skip!();
    let stage = stage(&sandbox);
    for family in BOTH {
        let backends: Vec<Backend> = (1..9).map(|port| backend(family.a, port, UDP)).collect();
        let place = node_port_key(family.v6, 30_053, UDP);
        let chosen = |to: &str, port: u16| {
            let there = outside().ip(family.client, to).udp(port, 30_053).build();
            let ran = stage.datapath.programs().run(Program::FromVpc, &there, RunContext::on(stage.other_eni)).unwrap();
            ran.packet[family.transport + 3]
        };
        // Affinity depends on the client's address only.
        serve(&stage, 500, &place, &backends, Frontend { affinity: 600, ..Frontend::default() });
        let held: BTreeSet<u8> = (0..50).map(|n| chosen(family.node, 20_000 + n)).collect();
        assert_eq!(held.len(), 1, "{held:?}");
        // The Maglev backend does not depend on the node's address, so it is the same on every node.
        serve(&stage, 501, &place, &backends, Frontend { flags: frontend_flags::MAGLEV, ..Frontend::default() });
        stage
            .datapath
            .host_prefixes()
            .set(&[
                format!("{}/{}", family.vip, if family.v6 { 128 } else { 32 }).parse().unwrap(),
                format!("{}/{}", family.node, if family.v6 { 128 } else { 32 }).parse().unwrap(),
            ])
            .unwrap();
        stage.datapath.services().set_node_addresses(&[ip(family.vip), ip(family.node)]).unwrap();
        let by_hash: Vec<(u8, u8)> =
            (0..100).map(|n| (chosen(family.node, 21_000 + n), chosen(family.vip, 21_000 + n))).collect();
        assert!(by_hash.iter().all(|(one, other)| one == other), "{by_hash:?}");
        assert_eq!(by_hash.iter().collect::<BTreeSet<_>>().len(), 8);
    }
}
