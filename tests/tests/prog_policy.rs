//! The prog rung of network policies: the verdicts on every packet path.

#![allow(clippy::unwrap_used, reason = "a suite panics where it fails, for the stack trace")]

#[path = "prog_policy/flow_events.rs"]
mod flow_events;
#[path = "prog_policy/startup.rs"]
mod startup;

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::{Value, json};
use terway_abi::{Backend, BackendRange, BackendRef, Drop, Frontend, Program, backend_flags};
use terway_core::ident::PodRef;
use terway_core::objects::{Change, Kind, Object, ObjectKey, ObjectName, Objects};
use terway_core::policy::{Compiler, Event, MatchedRule, RuleId};
use terway_daemon::bpf::{Endpoint, Ran, RunContext};
use terway_tests::packet::{Frame, checksums_are_right, flags, quoted};
use terway_tests::prog_bench::Stage;
use terway_tests::prog_harness::{NEXT, REDIRECT, SHOT, frontend_key, run};
use terway_tests::sandbox::Sandbox;
use terway_tests::sandbox_or_skip;

struct Family {
    a: &'static str,
    b: &'static str,
    remote: &'static str,
    other: &'static str,
    host: &'static str,
    vip: &'static str,
    icmp: u8,
}

const BOTH: [Family; 2] = [
    Family {
        a: "10.0.0.1",
        b: "10.0.0.2",
        remote: "10.9.0.9",
        other: "10.8.0.8",
        host: "10.0.0.100",
        vip: "10.96.0.1",
        icmp: 8,
    },
    Family {
        a: "fd00::1",
        b: "fd00::2",
        remote: "fd09::9",
        other: "fd08::8",
        host: "fd00::100",
        vip: "fd96::1",
        icmp: 128,
    },
];

/// The stage with a policy compiler that writes its maps: local pods x/a and x/b, remote pod y/r.
struct Node {
    stage: Stage,
    objects: Objects,
    compiler: Compiler,
}

impl Node {
    fn set(sandbox: &Sandbox) -> Self {
        Self::on(Stage::set(sandbox).unwrap())
    }

    fn on(stage: Stage) -> Self {
        let (compiler, ops) = Compiler::new();
        ops.iter().for_each(|op| stage.datapath.policies().apply(op).unwrap());
        let mut node = Self { stage, objects: Objects::default(), compiler };
        node.step(Event::NodeAddresses(vec!["10.0.0.100".parse().unwrap(), "fd00::100".parse().unwrap()]));
        for (pod, name) in [(node.stage.a, "a"), (node.stage.b, "b")] {
            node.pod("x", name, &[]);
            node.attach(&pod, name);
        }
        node.pod("y", "r", &["10.9.0.9", "fd09::9"]);
        node
    }

    fn step(&mut self, event: Event) {
        let ops = self.compiler.step(event);
        self.count();
        ops.iter().for_each(|op| self.stage.datapath.policies().apply(op).unwrap());
    }

    /// Makes counters for reasons that have come into use, as the daemon does.
    fn count(&mut self) {
        let changes = self.compiler.take_rule_id_changes();
        changes.added.iter().for_each(|reason| self.stage.datapath.policy_counters().create(reason.0, 7).unwrap());
        changes.removed.iter().for_each(|reason| self.stage.datapath.policy_counters().remove(reason.0).unwrap());
    }

    fn attach(&mut self, pod: &Endpoint, name: &str) {
        let (slot, _) = self.stage.datapath.endpoints().reserve_slot(pod.host_ifindex).unwrap();
        let named = PodRef { namespace: "x".to_owned(), name: name.to_owned(), uid: String::new() };
        self.step(Event::Attach { slot, pod: named, addresses: pod.addresses });
    }

    fn put(&mut self, kind: Kind, document: &Value) {
        let change = Change::Upsert(Box::new(Object::read(kind, document).unwrap()));
        if let Some(event) = self.objects.apply(change).and_then(Event::from_applied) {
            self.step(event);
        }
    }

    fn pod(&mut self, namespace: &str, name: &str, ips: &[&str]) {
        let ips: Vec<Value> = ips.iter().map(|ip| json!({"ip": ip})).collect();
        self.put(
            Kind::Pod,
            &json!({
                "metadata": {"namespace": namespace, "name": name, "labels": {"pod": name}},
                "status": {"phase": "Running", "podIPs": ips},
            }),
        );
    }

    fn policy(&mut self, pod: &str, spec: Value) {
        let mut spec = spec;
        spec["podSelector"] = json!({"matchLabels": {"pod": pod}});
        self.put(
            Kind::NetworkPolicy,
            &json!({"metadata": {"namespace": "x", "name": format!("of-{pod}")}, "spec": spec}),
        );
    }

    fn no_policy(&mut self, pod: &str) {
        let name = ObjectName::new("x", &format!("of-{pod}"));
        let change = Change::Delete(ObjectKey { kind: Kind::NetworkPolicy, name });
        if let Some(event) = self.objects.apply(change).and_then(Event::from_applied) {
            self.step(event);
        }
    }

    /// Runs a program once and compares every counter.
    #[track_caller]
    fn run(&self, program: Program, ifindex: u32, frame: &Frame, expected: &[(&str, u64)]) -> Ran {
        let ran = run(&self.stage, program, ifindex, &frame.build(), expected);
        let dropped = expected.iter().any(|(name, _)| Drop::ALL.iter().any(|drop| drop.name() == *name));
        assert_eq!(ran.action == SHOT, dropped);
        ran
    }

    #[track_caller]
    fn by_a(&self, frame: Frame, expected: &[(&str, u64)]) -> Ran {
        self.run(Program::FromPod, self.stage.a.host_ifindex, &frame, expected)
    }

    #[track_caller]
    fn by_b(&self, frame: Frame, expected: &[(&str, u64)]) -> Ran {
        self.run(Program::FromPod, self.stage.b.host_ifindex, &frame, expected)
    }

    #[track_caller]
    fn in_by_vpc(&self, frame: Frame, expected: &[(&str, u64)]) -> Ran {
        self.run(Program::FromVpc, self.stage.eni, &frame, expected)
    }

    fn a(&self) -> Frame {
        self.stage.sent_by(&self.stage.a)
    }

    fn b(&self) -> Frame {
        self.stage.sent_by(&self.stage.b)
    }

    /// What the host stack sends to `a`.
    fn to_a(&self) -> Frame {
        Frame::new(self.stage.a.pod_mac.0, self.stage.a.host_mac.0)
    }
}

const LOCAL: [(&str, u64); 2] = [("pod_to_pod", 1), ("flow_new", 1)];
const OUT: [(&str, u64); 2] = [("pod_to_vpc", 1), ("flow_new", 1)];
const IN: [(&str, u64); 2] = [("vpc_to_pod", 1), ("flow_new", 1)];
const EGRESS: [(&str, u64); 1] = [("policy_egress", 1)];
const INGRESS: [(&str, u64); 1] = [("policy_ingress", 1)];

fn deny(direction: &str) -> Value {
    json!({"policyTypes": [direction]})
}

#[test]
fn ingress_and_egress_between_local_pods() {
    let sandbox = sandbox_or_skip!();
    let mut node = Node::set(&sandbox);
    for family in BOTH {
        let there = |node: &Node, port: u16| node.a().ip(family.a, family.b).tcp(port, 80, flags::SYN);
        let back = |node: &Node, port: u16| node.b().ip(family.b, family.a).tcp(80, port, flags::SYN | flags::ACK);
        node.by_a(there(&node, 1000), &LOCAL);
        node.by_b(back(&node, 1000), &LOCAL[..1]);

        node.policy("a", deny("Egress"));
        node.by_a(there(&node, 1001), &EGRESS);
        // The other direction is allowed, and its replies pass.
        node.by_b(node.b().ip(family.b, family.a).tcp(1002, 80, flags::SYN), &LOCAL);
        node.by_a(node.a().ip(family.a, family.b).tcp(80, 1002, flags::SYN | flags::ACK), &LOCAL[..1]);
        // A SYN-ACK without a flow entry is a new connection.
        node.by_a(node.a().ip(family.a, family.b).tcp(80, 1003, flags::SYN | flags::ACK), &EGRESS);
        node.by_a(node.a().ip(family.a, family.b).tcp(80, 1003, flags::ACK), &EGRESS);

        node.policy("a", json!({"policyTypes": ["Egress"], "egress": [{"to": [{"podSelector": {}}]}]}));
        node.by_a(there(&node, 1004), &LOCAL);
        node.policy("b", deny("Ingress"));
        node.by_a(there(&node, 1005), &INGRESS);
        let only =
            json!({"ingress": [{"from": [{"podSelector": {"matchLabels": {"pod": "a"}}}], "ports": [{"port": 80}]}]});
        node.policy("b", only);
        node.by_a(there(&node, 1006), &LOCAL);
        node.by_a(node.a().ip(family.a, family.b).tcp(1007, 81, flags::SYN), &INGRESS);
        node.by_a(node.a().ip(family.a, family.b).udp(1008, 80), &INGRESS);
        let sctp = node.a().ip(family.a, family.b).protocol(132).payload(&[3, 0xf1, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0]);
        node.by_a(sctp, &INGRESS);
        // A pod reaches itself whatever the policies say.
        node.policy("a", json!({"policyTypes": ["Ingress", "Egress"]}));
        node.by_a(node.a().ip(family.a, family.a).udp(1010, 80), &LOCAL);
        node.no_policy("a");
        node.no_policy("b");
    }
}

#[test]
fn policy_for_external_peers_and_local_node() {
    let sandbox = sandbox_or_skip!();
    let mut node = Node::set(&sandbox);
    for family in BOTH {
        let out = |node: &Node, to: &str, port: u16| node.a().ip(family.a, to).tcp(port, 443, flags::SYN);
        let come =
            |node: &Node, from: &str, port: u16| node.stage.by_gateway().ip(from, family.a).tcp(port, 80, flags::SYN);
        node.by_a(out(&node, family.other, 2000), &OUT);
        node.in_by_vpc(come(&node, family.other, 2001), &IN);

        node.policy("a", json!({"policyTypes": ["Ingress", "Egress"]}));
        node.by_a(out(&node, family.other, 2002), &EGRESS);
        node.in_by_vpc(come(&node, family.other, 2003), &INGRESS);
        // The local node reaches its pod; another node's address on the same path does not; the pod does not reach the node.
        let hosts = |node: &Node, from: &str, port: u16| node.to_a().ip(from, family.a).tcp(port, 80, flags::SYN);
        let ran = node.run(
            Program::ToPod,
            node.stage.a.host_ifindex,
            &hosts(&node, family.host, 2004),
            &[("host_to_pod", 1), ("flow_new", 1)],
        );
        assert_eq!(ran.action, NEXT);
        node.by_a(node.a().ip(family.a, family.host).tcp(80, 2004, flags::SYN | flags::ACK), &[("pod_to_host", 1)]);
        node.run(Program::ToPod, node.stage.a.host_ifindex, &hosts(&node, family.other, 2005), &INGRESS);
        node.by_a(node.a().ip(family.a, family.host).tcp(2006, 80, flags::SYN), &EGRESS);

        // A remote pod by its labels, a CIDR with an exception, and replies.
        let cidr = if family.icmp == 8 { ("10.0.0.0/8", "10.8.0.0/16") } else { ("fd00::/8", "fd08::/16") };
        node.policy(
            "a",
            json!({
                "policyTypes": ["Ingress", "Egress"],
                "ingress": [{"from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"pod": "r"}}}]}],
                "egress": [{"to": [{"ipBlock": {"cidr": cidr.0, "except": [cidr.1]}}], "ports": [{"port": 400, "endPort": 500}]}],
            }),
        );
        node.in_by_vpc(come(&node, family.remote, 2007), &IN);
        node.by_a(node.a().ip(family.a, family.remote).tcp(80, 2007, flags::SYN | flags::ACK), &OUT[..1]);
        node.in_by_vpc(come(&node, family.other, 2008), &INGRESS);
        node.by_a(out(&node, family.remote, 2009), &OUT);
        node.in_by_vpc(node.stage.by_gateway().ip(family.remote, family.a).tcp(443, 2009, flags::ACK), &IN[..1]);
        node.by_a(out(&node, family.other, 2010), &EGRESS);
        node.by_a(node.a().ip(family.a, family.remote).tcp(2011, 501, flags::SYN), &EGRESS);
        node.no_policy("a");
    }
}

#[test]
fn policy_tiers_in_order() {
    let sandbox = sandbox_or_skip!();
    let mut node = Node::set(&sandbox);
    let mut port = 9_000;
    let mut expect = |node: &Node, passes: &[u16], stops: &[u16], why: [(&str, u64); 1]| {
        for family in BOTH {
            port += 1;
            let to = |at| node.a().ip(family.a, family.b).tcp(port, at, flags::SYN);
            passes.iter().for_each(|at| drop(node.by_a(to(*at), &LOCAL)));
            stops.iter().for_each(|at| drop(node.by_a(to(*at), &why)));
        }
    };
    let cluster = |tier: &str, direction: &str, rules: Value| {
        let spec = json!({"tier": tier, "priority": 1, "subject": {"namespaces": {}}, direction: rules});
        json!({"metadata": {"name": tier.to_lowercase()}, "spec": spec})
    };
    let rule = |action: &str, peers: &str, port: Option<u16>| {
        let mut rule = json!({"action": action, peers: [{"namespaces": {}}]});
        if let Some(port) = port {
            rule["protocols"] = json!([{"tcp": {"destinationPort": {"number": port}}}]);
        }
        rule
    };
    // The next tier decides where the admin tier passes or says nothing; without any policy the packet passes.
    let admin = [("Accept", 80), ("Deny", 81), ("Pass", 82)].map(|(action, at)| rule(action, "from", Some(at)));
    node.put(Kind::ClusterNetworkPolicy, &cluster("Admin", "ingress", json!(admin)));
    expect(&node, &[80, 82], &[81], INGRESS);
    expect(&node, &[80, 83], &[81], INGRESS);
    node.put(Kind::ClusterNetworkPolicy, &cluster("Baseline", "ingress", json!([rule("Deny", "from", None)])));
    expect(&node, &[80], &[81, 82, 83], INGRESS);
    // A NetworkPolicy is evaluated before the baseline tier.
    node.policy("b", json!({"ingress": [{"ports": [{"port": 81}, {"port": 82}]}]}));
    expect(&node, &[80, 82], &[81, 83], INGRESS);
    // The other direction has sets of its own.
    let egress = cluster("Admin", "egress", json!([rule("Accept", "to", Some(82)), rule("Deny", "to", None)]));
    node.put(Kind::ClusterNetworkPolicy, &egress);
    expect(&node, &[82], &[80, 81, 83], EGRESS);
    node.policy("a", deny("Egress"));
    expect(&node, &[82], &[80, 81, 83], EGRESS);
}

#[test]
fn policy_for_portless_protocols_and_fragments() {
    let sandbox = sandbox_or_skip!();
    let mut node = Node::set(&sandbox);
    for family in BOTH {
        let ping = |node: &Node, id: u8| node.a().ip(family.a, family.b).icmp(family.icmp, 0, [0, id, 0, 1]);
        node.policy("b", json!({"ingress": [{"ports": [{"protocol": "UDP", "port": 80}]}]}));
        node.by_a(ping(&node, 1), &INGRESS);
        let datagram = node.a().ip(family.a, family.b).udp(3000, 80);
        node.by_a(datagram.clone(), &LOCAL);
        // An ICMP error about that datagram is related to its flow, although no rule allows ICMP to `a`.
        node.policy("a", json!({"policyTypes": ["Ingress"]}));
        node.by_a(datagram.clone(), &[("pod_to_pod", 1), ("flow_stale", 1)]);
        let datagram = datagram.build();
        let (kind, code) = if family.icmp == 8 { (3, 3) } else { (1, 4) };
        let error = node.b().ip(family.b, family.a).icmp(kind, code, [0; 4]).payload(quoted(&datagram));
        node.by_b(error, &LOCAL[..1]);
        // An error about an unknown flow is denied.
        let never = node.a().ip(family.a, family.b).udp(3999, 80).build();
        let lie = node.b().ip(family.b, family.a).icmp(kind, code, [0; 4]).payload(quoted(&never));
        node.by_b(lie, &INGRESS);
        node.no_policy("a");
        // Later fragments follow the first one, also when policies change in between.
        let piece = || node.a().ip(family.a, family.b);
        let first = piece().udp(3001, 80).payload(&[1; 32]).fragment(7, 0, true);
        let later = piece().protocol(17).payload(&[2; 16]).fragment(7, 40, false);
        node.by_a(first.clone(), &LOCAL);
        node.by_a(later.clone(), &LOCAL[..1]);
        let refused = piece().udp(3002, 81).payload(&[1; 32]).fragment(8, 0, true);
        node.by_a(refused, &INGRESS);
        node.by_a(piece().protocol(17).payload(&[2; 16]).fragment(8, 40, false), &INGRESS);
        node.policy("b", json!({"ingress": [{"ports": [{"protocol": "UDP", "port": 80}, {"port": 80}]}]}));
        node.by_a(later.clone(), &[("pod_to_pod", 1), ("flow_stale", 1)]);
        node.policy("b", json!({"ingress": [{"ports": [{"port": 80}]}]}));
        for piece in [first, later] {
            node.by_a(piece, &[("policy_ingress", 1), ("flow_stale", 1)]);
        }
        node.policy("b", json!({"ingress": [{}]}));
        node.by_a(ping(&node, 2), &LOCAL);
        node.no_policy("b");
    }
}

#[test]
fn established_connections_are_rechecked_after_policy_change() {
    let sandbox = sandbox_or_skip!();
    let mut node = Node::set(&sandbox);
    for family in BOTH {
        let there = node.a().ip(family.a, family.b).tcp(4000, 80, flags::ACK);
        let back = node.b().ip(family.b, family.a).tcp(80, 4000, flags::ACK);
        node.by_a(node.a().ip(family.a, family.b).tcp(4000, 80, flags::SYN), &LOCAL);
        node.by_b(back.clone(), &LOCAL[..1]);
        // An allowed connection keeps its entry; the next packet of either end has it checked in its original direction.
        node.policy("b", json!({"policyTypes": ["Ingress", "Egress"], "ingress": [{"ports": [{"port": 80}]}]}));
        node.by_b(back.clone(), &[("pod_to_pod", 1), ("flow_stale", 1)]);
        node.by_a(there.clone(), &LOCAL[..1]);
        // A denied connection is dropped in both directions, each time.
        node.policy("b", json!({"policyTypes": ["Ingress"], "ingress": [{"ports": [{"port": 81}]}]}));
        for _ in 0..2 {
            node.by_b(back.clone(), &[("policy_ingress", 1), ("flow_stale", 1)]);
            node.by_a(there.clone(), &[("policy_ingress", 1), ("flow_stale", 1)]);
        }
        // Allowed again, it continues.
        node.no_policy("b");
        node.by_b(back.clone(), &[("pod_to_pod", 1), ("flow_stale", 1)]);
        node.by_a(there.clone(), &LOCAL[..1]);
        // Switching enforcement off and on is a policy change.
        node.policy("a", deny("Egress"));
        node.step(Event::Enforce(false));
        node.by_a(there.clone(), &[("pod_to_pod", 1), ("flow_stale", 1)]);
        node.step(Event::Enforce(true));
        node.by_a(there, &[("policy_egress", 1), ("flow_stale", 1)]);
        node.no_policy("a");
    }
}

fn words(address: IpAddr) -> [u32; 4] {
    let mut bytes = [0; 16];
    match address {
        IpAddr::V4(v4) => bytes[..4].copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => bytes.copy_from_slice(&v6.octets()),
    }
    std::array::from_fn(|i| u32::from_ne_bytes(bytes[4 * i..4 * i + 4].try_into().unwrap()))
}

/// A Service at the family's address, port 80, with one backend at 8080.
fn serve(stage: &Stage, service: u32, vip: &str, backend: &str) {
    let address: IpAddr = backend.parse().unwrap();
    let backend = Backend {
        address: words(address),
        port: 8080_u16.to_be(),
        protocol: 6,
        flags: if address.is_ipv6() { backend_flags::V6 } else { 0 },
        generation: 1,
        spare: [0; 2],
    };
    stage.datapath.services().set_backend(service, &backend).unwrap();
    stage.datapath.services().set_members(service, &[BackendRef { backend: service, generation: 1 }]).unwrap();
    let run = BackendRange { first: service, count: 1 };
    let frontend = Frontend { service, internal: run, external: run, ..Frontend::default() };
    let at = frontend_key(vip.parse().unwrap(), 80, 6);
    stage.datapath.services().set_frontend(&at, &frontend).unwrap();
}

#[test]
fn policy_for_services_applies_to_backend() {
    let sandbox = sandbox_or_skip!();
    let mut node = Node::set(&sandbox);
    for (number, family) in (1..).zip(BOTH) {
        serve(&node.stage, 10 * number, family.vip, family.b);
        let there = |node: &Node, port: u16, what: u8| node.a().ip(family.a, family.vip).tcp(port, 80, what);
        let back = |node: &Node, port: u16| node.b().ip(family.b, family.a).tcp(8080, port, flags::ACK);
        // The backend's port, not the Service's; the client, not the Service.
        node.policy(
            "b",
            json!({"ingress": [{"from": [{"podSelector": {"matchLabels": {"pod": "a"}}}], "ports": [{"port": 80}]}]}),
        );
        node.by_a(there(&node, 5000, flags::SYN), &INGRESS);
        node.policy(
            "b",
            json!({"ingress": [{"from": [{"podSelector": {"matchLabels": {"pod": "a"}}}], "ports": [{"port": 8080}]}]}),
        );
        node.by_a(there(&node, 5001, flags::SYN), &LOCAL);
        // After a policy change the connection keeps its backend, although the Service has another one by now.
        serve(&node.stage, 10 * number + 1, family.vip, family.remote);
        node.policy("a", json!({"policyTypes": ["Ingress"]}));
        let ran = node.by_b(back(&node, 5001), &[("pod_to_pod", 1), ("flow_stale", 1)]);
        let expected = node.to_a().ip(family.vip, family.a).ttl(63).tcp(80, 5001, flags::ACK).build();
        assert!(checksums_are_right(&ran.packet));
        assert_eq!((ran.action, ran.packet), (REDIRECT, expected));
        let ran = node.by_a(there(&node, 5001, flags::ACK), &[("pod_to_pod", 1), ("flow_stale", 1)]);
        let to_b = Frame::new(node.stage.b.pod_mac.0, node.stage.b.host_mac.0);
        let expected = to_b.ip(family.a, family.b).ttl(63).tcp(5001, 8080, flags::ACK).build();
        assert!(checksums_are_right(&ran.packet));
        assert_eq!(ran.packet, expected);
        node.policy("b", deny("Ingress"));
        node.by_a(there(&node, 5001, flags::ACK), &[("policy_ingress", 1), ("flow_stale", 1)]);
        node.by_b(back(&node, 5001), &[("policy_ingress", 1), ("flow_stale", 1)]);
        // Hairpin.
        node.no_policy("b");
        serve(&node.stage, 10 * number + 2, family.vip, family.a);
        node.policy("a", json!({"policyTypes": ["Ingress", "Egress"]}));
        node.by_a(there(&node, 5002, flags::SYN), &LOCAL);
        node.no_policy("a");
    }
}

#[test]
fn new_pod_does_not_inherit_flow_direction() {
    let sandbox = sandbox_or_skip!();
    let mut node = Node::set(&sandbox);
    for family in BOTH {
        // A connection from outside; `a` may only reply.
        node.policy("a", deny("Egress"));
        node.in_by_vpc(node.stage.by_gateway().ip(family.remote, family.a).udp(6000, 53), &IN);
        let answer = node.a().ip(family.a, family.remote).udp(53, 6000);
        node.by_a(answer.clone(), &OUT[..1]);
        // The gateway changes: the route is decided anew, and the packet still goes in the reply direction.
        let changed = Endpoint { gateway_v4: Some("10.0.0.252".parse().unwrap()), ..node.stage.a };
        node.stage.datapath.endpoints().upsert(&changed).unwrap();
        node.by_a(answer.clone(), &[("pod_to_vpc", 1), ("flow_new", 1), ("flow_stale", 1)]);
        // A new pod gets address and slot: its packet is a new connection.
        assert!(node.stage.datapath.endpoints().remove(node.stage.a.host_ifindex).unwrap());
        node.attach(&node.stage.a.clone(), "a");
        node.stage.datapath.endpoints().upsert(&node.stage.a).unwrap();
        node.by_a(answer, &[("policy_egress", 1), ("flow_stale", 1)]);
        node.no_policy("a");
    }
}

#[tokio::test]
async fn drop_event_names_the_rule() {
    let sandbox = sandbox_or_skip!();
    let mut node = Node::set(&sandbox);
    let mut events = node.stage.datapath.programs().take_events().unwrap();
    node.policy("b", deny("Ingress"));
    let cluster = json!({
        "metadata": {"name": "guard"},
        "spec": {
            "tier": "Admin", "priority": 1, "subject": {"namespaces": {}},
            "egress": [{"name": "none", "action": "Deny", "to": [{"networks": ["10.8.0.0/16"]}]}],
        },
    });
    node.put(Kind::ClusterNetworkPolicy, &cluster);
    node.by_a(node.a().ip("10.0.0.1", "10.0.0.2").tcp(7000, 80, flags::SYN), &INGRESS);
    node.by_a(node.a().ip("10.0.0.1", "10.8.0.8").tcp(7001, 80, flags::SYN), &EGRESS);
    for (drop, named) in [(Drop::PolicyIngress, "of-b"), (Drop::PolicyEgress, "guard")] {
        let event = events.try_next().unwrap();
        assert_eq!(event.reason, drop as u16);
        let [egress, ingress] = event.verdicts;
        let decision = if drop == Drop::PolicyEgress { egress } else { ingress };
        let reason = node.compiler.rule(RuleId(decision)).unwrap();
        assert!(
            matches!(reason, MatchedRule::Rule { .. } | MatchedRule::Isolated { .. })
                && reason.to_string().contains(named),
            "{reason}"
        );
    }
}
