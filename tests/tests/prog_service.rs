//! The prog rung of Services: NAT of packets to a frontend, and of replies.

#![allow(clippy::unwrap_used, reason = "a suite panics where it fails, for the stack trace")]

use std::collections::BTreeMap;

use terway_abi::{Backend, BackendRange, BackendRef, Frontend, Program, frontend_flags};
use terway_core::service::FrontendKey;
use terway_daemon::bpf::{Config, Endpoint, Ran, RunContext};
use terway_tests::packet::{Frame, checksums_are_right, flags, macs, quoted};
use terway_tests::prog_bench::Stage;
use terway_tests::prog_harness::{NEXT, REDIRECT, SHOT, at, backend, came_out, ip, run, serve};
use terway_tests::sandbox_or_skip;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// The addresses of the stage in one family, and two of Services.
struct Family {
    a: &'static str,
    b: &'static str,
    remote: &'static str,
    host: &'static str,
    vip: &'static str,
    other: &'static str,
}

const V4: Family = Family {
    a: "10.0.0.1",
    b: "10.0.0.2",
    remote: "10.9.0.9",
    host: "10.0.0.100",
    vip: "10.96.0.1",
    other: "10.96.0.2",
};
const V6: Family =
    Family { a: "fd00::1", b: "fd00::2", remote: "fd09::9", host: "fd00::100", vip: "fd96::1", other: "fd96::2" };
const BOTH: [Family; 2] = [V4, V6];

#[track_caller]
fn from_pod(stage: &Stage, pod: &Endpoint, frame: &Frame, expected: &[(&str, u64)]) -> Ran {
    run(stage, Program::FromPod, pod.host_ifindex, &frame.build(), expected)
}

const NEW: [(&str, u64); 2] = [("pod_to_pod", 1), ("flow_new", 1)];

#[test]
fn clusterip_from_pod_and_reply_nat() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    for (number, family) in (1..).zip(BOTH) {
        for (protocol, service) in [(TCP, 10 * number), (UDP, 10 * number + 1)] {
            serve(
                &stage,
                service,
                &at(family.vip, 80, protocol),
                &[backend(family.b, 8080, protocol)],
                Frontend::default(),
            );
            let with = |frame: Frame, source, destination| match protocol {
                TCP => frame.tcp(source, destination, flags::SYN).payload(b"some data"),
                _ => frame.udp(source, destination).payload(b"some data"),
            };
            let there = with(stage.sent_by(&stage.a).ip(family.a, family.vip), 40000, 80);
            let arrives =
                with(Frame::new(stage.b.pod_mac.0, stage.b.host_mac.0).ip(family.a, family.b).ttl(63), 40000, 8080);
            for expected in [&NEW[..], &NEW[..1]] {
                came_out(&from_pod(&stage, &stage.a, &there, expected), REDIRECT, &arrives);
            }
            let back = with(stage.sent_by(&stage.b).ip(family.b, family.a), 8080, 40000);
            let returns =
                with(Frame::new(stage.a.pod_mac.0, stage.a.host_mac.0).ip(family.vip, family.a).ttl(63), 80, 40000);
            came_out(&from_pod(&stage, &stage.b, &back, &NEW[..1]), REDIRECT, &returns);
        }
    }
}

/// NAT with every possible checksum, among them those that become 0, which means "no checksum" in UDP.
#[test]
fn udp_checksums_after_nat_and_zero_checksum() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    // For the second case of each family the changes of address and port cancel each other.
    let services = [(V4, V4.vip, 53), (V6, V6.vip, 53), (V4, "10.0.0.7", 5348), (V6, "fd00::7", 5348)];
    for (number, (family, vip, port)) in (1..).zip(services) {
        serve(&stage, number, &at(vip, port, UDP), &[backend(family.b, 5353, UDP)], Frontend::default());
        let query = stage.sent_by(&stage.a).ip(family.a, vip).udp(40000, port);
        let plain = query.clone().payload(&[0; 2]).build();
        let check = plain.len() - 4..plain.len() - 2;
        let translated = |packet: &[u8]| {
            let ran =
                stage.datapath.programs().run(Program::FromPod, packet, RunContext::on(stage.a.host_ifindex)).unwrap();
            assert_eq!((ran.action, packet.len()), (REDIRECT, ran.packet.len()));
            ran.packet
        };
        for word in 0..=u16::MAX {
            let packet = query.clone().payload(&word.to_be_bytes()).build();
            let none = packet[check.clone()] == [0; 2];
            let arrived = translated(&packet);
            assert_eq!(arrived[check.clone()] == [0; 2], none, "{arrived:02x?}");
            assert!(none || checksums_are_right(&arrived), "{arrived:02x?}");
        }
    }
}

#[test]
fn clusterip_to_remote_and_host_network_backend() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    for (number, family) in (1..).zip(BOTH) {
        serve(&stage, 10 * number, &at(family.vip, 80, TCP), &[backend(family.remote, 8080, TCP)], Frontend::default());
        let there = stage.sent_by(&stage.a).ip(family.a, family.vip).tcp(40000, 80, flags::SYN);
        let ran = from_pod(&stage, &stage.a, &there, &[("pod_to_vpc", 1), ("flow_new", 1)]);
        came_out(
            &ran,
            REDIRECT,
            &stage.sent_by(&stage.a).ip(family.a, family.remote).ttl(63).tcp(40000, 8080, flags::SYN),
        );
        let back = stage.by_gateway().ip(family.remote, family.a).tcp(8080, 40000, flags::ACK);
        let ran = run(&stage, Program::FromVpc, stage.eni, &back.build(), &[("vpc_to_pod", 1)]);
        let returns = Frame::new(stage.a.pod_mac.0, stage.a.host_mac.0).ip(family.vip, family.a).ttl(63);
        came_out(&ran, REDIRECT, &returns.tcp(80, 40000, flags::ACK));

        // A host-network backend (the API server, say): the host stack gets the translated packet.
        serve(
            &stage,
            10 * number + 1,
            &at(family.vip, 443, TCP),
            &[backend(family.host, 6443, TCP)],
            Frontend::default(),
        );
        let there = stage.sent_by(&stage.a).ip(family.a, family.vip).tcp(40000, 443, flags::SYN);
        let ran = from_pod(&stage, &stage.a, &there, &[("pod_to_host", 1), ("flow_new", 1)]);
        came_out(&ran, NEXT, &stage.sent_by(&stage.a).ip(family.a, family.host).tcp(40000, 6443, flags::SYN));
        let back =
            Frame::new(stage.a.pod_mac.0, stage.a.host_mac.0).ip(family.host, family.a).tcp(6443, 40000, flags::ACK);
        let ran = run(&stage, Program::ToPod, stage.a.host_ifindex, &back.build(), &[("host_to_pod", 1)]);
        let returns = Frame::new(stage.a.pod_mac.0, stage.a.host_mac.0).ip(family.vip, family.a);
        came_out(&ran, NEXT, &returns.tcp(443, 40000, flags::ACK));
    }
}

#[test]
fn hairpin_via_cluster_ip() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    for (number, family) in (1..).zip(BOTH) {
        serve(&stage, number, &at(family.vip, 80, TCP), &[backend(family.a, 8080, TCP)], Frontend::default());
        let to_a = || Frame::new(stage.a.pod_mac.0, stage.a.host_mac.0).ttl(63);
        let there = stage.sent_by(&stage.a).ip(family.a, family.vip).tcp(40000, 80, flags::SYN);
        let arrives = to_a().ip(family.vip, family.a).tcp(40000, 8080, flags::SYN);
        came_out(&from_pod(&stage, &stage.a, &there, &NEW), REDIRECT, &arrives);
        let back = stage.sent_by(&stage.a).ip(family.a, family.vip).tcp(8080, 40000, flags::SYN | flags::ACK);
        let returns = to_a().ip(family.vip, family.a).tcp(80, 40000, flags::SYN | flags::ACK);
        came_out(&from_pod(&stage, &stage.a, &back, &NEW[..1]), REDIRECT, &returns);
    }
}

/// A route change invalidates reply entries of established connections. The client knows the Service's address only, so an untranslated
/// reply would break the connection.
#[test]
fn reply_nat_survives_route_change() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    let to_a = || Frame::new(stage.a.pod_mac.0, stage.a.host_mac.0).ttl(63);
    let again = |way| [(way, 1), ("flow_new", 1), ("flow_stale", 1)];
    for (number, family) in (1..).zip(BOTH) {
        // Another gateway changes the route of a pod, not its identity.
        let other_way = |pod: &Endpoint, other: bool| match other {
            true => Endpoint { gateway_v4: None, gateway_v6: None, ..*pod },
            false => *pod,
        };
        serve(&stage, 10 * number, &at(family.vip, 80, TCP), &[backend(family.b, 8080, TCP)], Frontend::default());
        let there = stage.sent_by(&stage.a).ip(family.a, family.vip).tcp(40000, 80, flags::SYN);
        from_pod(&stage, &stage.a, &there, &NEW);
        let back = stage.sent_by(&stage.b).ip(family.b, family.a).tcp(8080, 40000, flags::SYN | flags::ACK);
        let returns = to_a().ip(family.vip, family.a).tcp(80, 40000, flags::SYN | flags::ACK);
        for changed in [true, false] {
            stage.datapath.endpoints().upsert(&other_way(&stage.b, changed)).unwrap();
            came_out(&from_pod(&stage, &stage.b, &back, &again("pod_to_pod")), REDIRECT, &returns);
            came_out(&from_pod(&stage, &stage.b, &back, &NEW[..1]), REDIRECT, &returns);
        }

        // Hairpin.
        serve(
            &stage,
            10 * number + 1,
            &at(family.other, 80, TCP),
            &[backend(family.a, 8080, TCP)],
            Frontend::default(),
        );
        let there = stage.sent_by(&stage.a).ip(family.a, family.other).tcp(40001, 80, flags::SYN);
        from_pod(&stage, &stage.a, &there, &NEW);
        let back = stage.sent_by(&stage.a).ip(family.a, family.other).tcp(8080, 40001, flags::ACK);
        let returns = to_a().ip(family.other, family.a).tcp(80, 40001, flags::ACK);
        for changed in [true, false] {
            stage.datapath.endpoints().upsert(&other_way(&stage.a, changed)).unwrap();
            came_out(&from_pod(&stage, &stage.a, &back, &again("pod_to_pod")), REDIRECT, &returns);
        }

        // From a remote backend, and from the node.
        for (n, place, port) in [(2, family.remote, 6053), (3, family.host, 5353)] {
            serve(&stage, 10 * number + n, &at(family.vip, port, UDP), &[backend(place, 53, UDP)], Frontend::default());
            let there = stage.sent_by(&stage.a).ip(family.a, family.vip).udp(40002, port);
            let out = if n == 2 { "pod_to_vpc" } else { "pod_to_host" };
            from_pod(&stage, &stage.a, &there, &[(out, 1), ("flow_new", 1)]);
        }
        let hosts = ["10.0.0.100/32", "fd00::100/128", &format!("10.55.0.{number}/32")];
        stage.datapath.host_prefixes().set(&hosts.map(|text| text.parse().unwrap())).unwrap();
        let back = stage.by_gateway().ip(family.remote, family.a).udp(53, 40002);
        let ran = run(&stage, Program::FromVpc, stage.eni, &back.build(), &again("vpc_to_pod"));
        came_out(&ran, REDIRECT, &to_a().ip(family.vip, family.a).udp(6053, 40002));
        let from_host = Frame::new(stage.a.pod_mac.0, stage.a.host_mac.0);
        let back = from_host.clone().ip(family.host, family.a).udp(53, 40002);
        let ran = run(&stage, Program::ToPod, stage.a.host_ifindex, &back.build(), &again("host_to_pod"));
        came_out(&ran, NEXT, &from_host.ip(family.vip, family.a).udp(5353, 40002));
    }
}

/// A new pod with the address of a former backend sends no replies of the Service.
#[test]
fn new_pod_with_backend_address_gets_no_reply_nat() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    for (number, family) in (1..).zip(BOTH) {
        serve(&stage, number, &at(family.vip, 53, UDP), &[backend(family.b, 53, UDP)], Frontend::default());
        let there = stage.sent_by(&stage.a).ip(family.a, family.vip).udp(40000, 53);
        from_pod(&stage, &stage.a, &there, &NEW);
    }
    assert!(stage.datapath.endpoints().remove(stage.b.host_ifindex).unwrap());
    stage.datapath.endpoints().upsert(&stage.b).unwrap();
    for family in BOTH {
        let says = stage.sent_by(&stage.b).ip(family.b, family.a).udp(53, 40000);
        let arrives = Frame::new(stage.a.pod_mac.0, stage.a.host_mac.0).ttl(63).ip(family.b, family.a).udp(53, 40000);
        let ran = from_pod(&stage, &stage.b, &says, &[("pod_to_pod", 1), ("flow_new", 1), ("flow_stale", 1)]);
        came_out(&ran, REDIRECT, &arrives);
    }
}

#[test]
fn reply_tuple_collision_remaps_source_port() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    for (number, family) in (1..).zip(BOTH) {
        for (service, vip) in [(10 * number, family.vip), (10 * number + 1, family.other)] {
            serve(&stage, service, &at(vip, 80, TCP), &[backend(family.b, 8080, TCP)], Frontend::default());
        }
        let to = |vip: &str| stage.sent_by(&stage.a).ip(family.a, vip).tcp(40000, 80, flags::SYN);
        let arrives = Frame::new(stage.b.pod_mac.0, stage.b.host_mac.0).ip(family.a, family.b).ttl(63);
        came_out(
            &from_pod(&stage, &stage.a, &to(family.vip), &NEW),
            REDIRECT,
            &arrives.clone().tcp(40000, 8080, flags::SYN),
        );
        // The same source port: the backend sees another one, and replies are translated back.
        let expected = [("pod_to_pod", 1), ("flow_new", 1)];
        let ran = stage
            .datapath
            .programs()
            .run(Program::FromPod, &to(family.other).build(), RunContext::on(stage.a.host_ifindex))
            .unwrap();
        let transport = if family.a == V4.a { 34 } else { 54 };
        let port = u16::from_be_bytes([ran.packet[transport], ran.packet[transport + 1]]);
        assert_ne!(port, 40000);
        came_out(&ran, REDIRECT, &arrives.tcp(port, 8080, flags::SYN));
        came_out(
            &from_pod(&stage, &stage.a, &to(family.other), &expected[..1]),
            REDIRECT,
            &Frame::new(stage.b.pod_mac.0, stage.b.host_mac.0).ip(family.a, family.b).ttl(63).tcp(
                port,
                8080,
                flags::SYN,
            ),
        );
        for (port, vip) in [(40000, family.vip), (port, family.other)] {
            let back = stage.sent_by(&stage.b).ip(family.b, family.a).tcp(8080, port, flags::ACK);
            let returns = Frame::new(stage.a.pod_mac.0, stage.a.host_mac.0).ip(vip, family.a).ttl(63);
            came_out(&from_pod(&stage, &stage.b, &back, &NEW[..1]), REDIRECT, &returns.tcp(80, 40000, flags::ACK));
        }
    }
}

/// After a reset the NAT source port is free, for direct connections to the backend and for other Services.
#[test]
fn rst_frees_the_nat_source_port() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    for (number, family) in (1..).zip(BOTH) {
        serve(&stage, number, &at(family.vip, 80, TCP), &[backend(family.b, 8080, TCP)], Frontend::default());
        let to_vip = |flags| stage.sent_by(&stage.a).ip(family.a, family.vip).tcp(40000, 80, flags);
        from_pod(&stage, &stage.a, &to_vip(flags::SYN), &NEW);
        from_pod(&stage, &stage.a, &to_vip(flags::RST | flags::ACK), &NEW[..1]);
        let direct = stage.sent_by(&stage.a).ip(family.a, family.b).tcp(40000, 8080, flags::SYN);
        let arrives = Frame::new(stage.b.pod_mac.0, stage.b.host_mac.0).ip(family.a, family.b).ttl(63);
        came_out(&from_pod(&stage, &stage.a, &direct, &NEW), REDIRECT, &arrives.tcp(40000, 8080, flags::SYN));
    }
}

#[test]
fn service_without_backend_is_rejected() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    for (number, family) in (1..).zip(BOTH) {
        let v6 = family.a == V6.a;
        // One Service without backends, and all other ports of its address.
        serve(&stage, number, &at(family.vip, 80, TCP), &[], Frontend::default());
        stage.datapath.services().set_frontend(&FrontendKey::rest(ip(family.vip)), &Frontend::default()).unwrap();
        let back = || Frame::new(stage.a.pod_mac.0, stage.a.host_mac.0).ip(family.vip, family.a).ttl(64);
        for port in [80, 81] {
            let syn = stage.sent_by(&stage.a).ip(family.a, family.vip).tcp(40000, port, flags::SYN).payload(&[7; 100]);
            let ran = from_pod(&stage, &stage.a, &syn, &[("rejected", 1)]);
            assert_eq!((ran.action, macs(&ran.packet)), (REDIRECT, (stage.a.pod_mac.0, stage.a.host_mac.0)));
            assert!(checksums_are_right(&ran.packet));
            let transport = if v6 { 54 } else { 34 };
            let [high, low] = port.to_be_bytes();
            // The reset acknowledges the SYN and its hundred bytes of payload.
            assert_eq!(ran.packet[transport..transport + 4], [high, low, 0x9c, 0x40]);
            assert_eq!(ran.packet[transport + 8..transport + 14], [0, 0, 0, 1 + 1 + 100, 0x50, 0x14]);
            assert_eq!(ran.packet.len(), transport + 20);
        }
        let datagram = stage.sent_by(&stage.a).ip(family.a, family.vip).udp(40000, 53).payload(b"a question").build();
        let ran = run(&stage, Program::FromPod, stage.a.host_ifindex, &datagram, &[("rejected", 1)]);
        let (kind, code, header) = if v6 { (1, 4, 48) } else { (3, 3, 28) };
        let quote = &quoted(&datagram)[..header];
        let mut expected = back().icmp(kind, code, [0; 4]).payload(quote).build();
        // The errors of IPv4 say neither type of service nor identification here.
        if !v6 {
            expected[18..20].copy_from_slice(&ran.packet[18..20]);
            expected[24..26].copy_from_slice(&ran.packet[24..26]);
        }
        assert!(checksums_are_right(&ran.packet), "{:02x?}", ran.packet);
        assert_eq!((ran.action, ran.packet), (REDIRECT, expected));
        // A reset is not rejected with a reset, and a spoofed packet gets no reply.
        let reset = stage.sent_by(&stage.a).ip(family.a, family.vip).tcp(40000, 80, flags::RST);
        assert_eq!(from_pod(&stage, &stage.a, &reset, &[("no_backend", 1)]).action, SHOT);
        let lie = stage.sent_by(&stage.a).ip(family.b, family.vip).tcp(40000, 80, flags::SYN);
        assert_eq!(from_pod(&stage, &stage.a, &lie, &[("spoofed_source", 1)]).action, SHOT);
    }
    assert_eq!(stage.datapath.flows().count().unwrap(), (0, 0));
}

#[test]
fn removed_backend_invalidates_flows() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    for (number, family) in (1..).zip(BOTH) {
        serve(&stage, number, &at(family.vip, 53, UDP), &[backend(family.b, 53, UDP)], Frontend::default());
        let there = stage.sent_by(&stage.a).ip(family.a, family.vip).udp(40000, 53);
        from_pod(&stage, &stage.a, &there, &NEW);
        // Another backend replaces it, in the planner's order of writes.
        stage.datapath.services().set_backend(10 * number + 1, &backend(family.remote, 53, UDP)).unwrap();
        stage
            .datapath
            .services()
            .set_members(10 * number + 5, &[BackendRef { backend: 10 * number + 1, generation: 1 }])
            .unwrap();
        let run = BackendRange { first: 10 * number + 5, count: 1 };
        let frontend = Frontend { service: number, internal: run, external: run, ..Frontend::default() };
        stage.datapath.services().set_frontend(&at(family.vip, 53, UDP), &frontend).unwrap();
        // The flow continues while the old backend is terminating …
        from_pod(&stage, &stage.a, &there, &NEW[..1]);
        // … and ends with its removal.
        stage.datapath.services().set_backend(10 * number, &Backend { generation: 2, ..Backend::default() }).unwrap();
        let ran = from_pod(&stage, &stage.a, &there, &[("pod_to_vpc", 1), ("flow_new", 1), ("flow_stale", 1)]);
        came_out(&ran, REDIRECT, &stage.sent_by(&stage.a).ip(family.a, family.remote).ttl(63).udp(40000, 53));
    }
}

#[test]
fn fragments_to_cluster_ip() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::set(&sandbox).unwrap();
    for (number, family) in (1..).zip(BOTH) {
        serve(&stage, number, &at(family.vip, 53, UDP), &[backend(family.b, 53, UDP)], Frontend::default());
        let of = |frame: Frame, offset, more| frame.fragment(7, offset, more);
        let first = |frame: Frame| of(frame, 0, true).udp(40000, 53).payload(&[1; 8]);
        let rest = |frame: Frame| of(frame.protocol(UDP), 16, false).payload(&[2; 8]);
        let sent = || stage.sent_by(&stage.a).ip(family.a, family.vip);
        let arrives = || Frame::new(stage.b.pod_mac.0, stage.b.host_mac.0).ip(family.a, family.b).ttl(63);
        let ran = from_pod(&stage, &stage.a, &first(sent()), &NEW);
        assert_eq!(ran.action, REDIRECT);
        // Frames of this suite have no checksum in their first fragments, so there is none to change.
        assert_eq!(ran.packet, first(arrives()).build());
        let ran = from_pod(&stage, &stage.a, &rest(sent()), &NEW[..1]);
        assert_eq!((ran.action, ran.packet), (REDIRECT, rest(arrives()).build()));
    }
}

#[test]
fn session_affinity() {
    let sandbox = sandbox_or_skip!();
    let stage = Stage::with(&Config::new(sandbox.pin_root())).unwrap();
    for (number, family) in (1..).zip(BOTH) {
        let backends: Vec<Backend> = (1..9).map(|port| backend(family.b, port, UDP)).collect();
        let transport = if family.a == V4.a { 34 } else { 54 };
        for (affinity, flags, one) in [(600, 0, true), (0, 0, false), (0, frontend_flags::MAGLEV, false)] {
            let template = Frontend { affinity, flags, ..Frontend::default() };
            serve(&stage, number, &at(family.vip, 53, UDP), &backends, template);
            let mut seen = BTreeMap::new();
            for port in 0..200_u16 {
                let port = 41_000 + port + affinity as u16 + flags as u16 * 1000;
                let there = stage.sent_by(&stage.a).ip(family.a, family.vip).udp(port, 53);
                let ran = stage
                    .datapath
                    .programs()
                    .run(Program::FromPod, &there.build(), RunContext::on(stage.a.host_ifindex))
                    .unwrap();
                *seen.entry(ran.packet[transport + 3]).or_insert(0) += 1;
            }
            // Of 200 connections over eight backends, none gets fewer than five but for once in a hundred million runs.
            assert!(if one { seen.len() == 1 } else { seen.len() == 8 && seen.values().all(|n| *n >= 5) }, "{seen:?}");
        }
    }
}
