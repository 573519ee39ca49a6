//! Events and rule counters of new connections and drops; established packets cause neither.

use std::net::Ipv4Addr;

use terway_abi::{FlowEvent, PolicyCounter};
use terway_core::policy::{NO_POLICY, Verdict};
use terway_daemon::bpf::{Config, FlowEvents};

use super::*;

/// Runs in a tokio runtime, which the stream of events needs.
fn with_events(config: impl FnOnce(&mut Config), test: impl FnOnce(Node, FlowEvents, &Sandbox)) {
    let sandbox = match Sandbox::enter() {
        Ok(sandbox) => sandbox,
        Err(reason) => return println!("SKIP: {reason}"),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut wanted = Config::new(sandbox.pin_root());
        config(&mut wanted);
        let node = Node::on(Stage::with(&wanted).unwrap());
        let events = node.stage.datapath.programs().take_events().unwrap();
        test(node, events, &sandbox);
    });
}

fn all(events: &mut FlowEvents) -> Vec<FlowEvent> {
    std::iter::from_fn(|| events.try_next()).collect()
}

/// The verdict and rule of a direction: 0 egress, 1 ingress.
fn reason(node: &Node, event: &FlowEvent, side: usize) -> (bool, String) {
    let decision = Verdict(event.verdicts[side]);
    let text = node.compiler.rule(decision.rule_id()).map(ToString::to_string);
    (decision.is_allowed(), text.unwrap_or_default())
}

#[test]
fn new_connection_event_names_the_rules() {
    with_events(
        |_| {},
        |mut node, mut events, _| {
            let syn = |node: &Node, port: u16| node.a().ip("10.0.0.1", "10.0.0.2").tcp(port, 80, flags::SYN);
            // Sampling is off.
            node.by_a(syn(&node, 1000), &LOCAL);
            assert_eq!(all(&mut events), []);

            node.stage.datapath.policies().sample_flows(1).unwrap();
            node.policy("b", json!({"ingress": [{"from": [{"podSelector": {"matchLabels": {"pod": "a"}}}], "ports": [{"port": 80}]}]}));
            node.by_a(syn(&node, 1001), &LOCAL);
            let told = all(&mut events);
            let [event] = &told[..] else { panic!("{told:?}") };
            assert_eq!((event.reason, event.family, event.protocol, event.lost, event.service), (0, 4, 6, 0, 0));
            assert_eq!((event.program, event.ifindex), (Program::FromPod as u8, node.stage.a.host_ifindex));
            assert_eq!(event.ports.to_ne_bytes(), [3, 233, 0, 80]);
            assert_eq!(event.src[0].to_ne_bytes(), [10, 0, 0, 1]);
            assert_eq!((event.dst, event.policy_destination), ([event.dst[0], 0, 0, 0], event.dst));
            assert_eq!(Ipv4Addr::from(event.dst[0].to_ne_bytes()), Ipv4Addr::new(10, 0, 0, 2));
            assert_eq!(Verdict(event.verdicts[0]), Verdict::allow(NO_POLICY));
            assert_eq!(reason(&node, event, 1), (true, "NetworkPolicy x/of-b, ingress rule 0: Accept".to_owned()));

            // Established packets of both directions, retransmitted SYNs and rechecked flows cause no event.
            node.by_b(node.b().ip("10.0.0.2", "10.0.0.1").tcp(80, 1001, flags::SYN | flags::ACK), &LOCAL[..1]);
            node.by_a(node.a().ip("10.0.0.1", "10.0.0.2").tcp(1001, 80, flags::ACK), &LOCAL[..1]);
            node.by_a(syn(&node, 1001), &LOCAL[..1]);
            node.policy("a", json!({"policyTypes": ["Ingress"]}));
            node.by_a(
                node.a().ip("10.0.0.1", "10.0.0.2").tcp(1001, 80, flags::ACK),
                &[("pod_to_pod", 1), ("flow_stale", 1)],
            );
            assert_eq!(all(&mut events), []);

            // A drop event has the verdicts of both directions.
            node.by_a(node.a().ip("10.0.0.1", "10.0.0.2").tcp(1002, 81, flags::SYN), &INGRESS);
            let told = all(&mut events);
            let [event] = &told[..] else { panic!("{told:?}") };
            assert_eq!(event.reason, Drop::PolicyIngress as u16);
            assert_eq!(Verdict(event.verdicts[0]), Verdict::allow(NO_POLICY));
            let isolated = "isolated in ingress by NetworkPolicy x/of-b, none of whose rules allows it";
            assert_eq!(reason(&node, event, 1), (false, isolated.to_owned()));

            // A policy change keeps the sampling rate, and a change of the rate keeps the policies.
            node.step(Event::Enforce(false));
            node.by_a(syn(&node, 1003), &LOCAL);
            assert_eq!(all(&mut events).len(), 1);
            node.step(Event::Enforce(true));
            node.stage.datapath.policies().sample_flows(0).unwrap();
            node.by_a(syn(&node, 1004), &LOCAL);
            node.by_a(node.a().ip("10.0.0.1", "10.0.0.2").tcp(1005, 81, flags::SYN), &INGRESS);
            assert_eq!(all(&mut events).len(), 1);
        },
    );
}

#[test]
fn events_of_every_path_but_icmp_errors() {
    with_events(
        |_| {},
        |node, mut events, _| {
            node.stage.datapath.policies().sample_flows(1).unwrap();
            for family in BOTH {
                node.by_a(node.a().ip(family.a, family.remote).udp(2000, 53), &OUT);
                node.in_by_vpc(node.stage.by_gateway().ip(family.remote, family.a).tcp(2001, 80, flags::SYN), &IN);
                let by_host = node.to_a().ip(family.host, family.a).tcp(2002, 80, flags::SYN);
                node.run(Program::ToPod, node.stage.a.host_ifindex, &by_host, &[("host_to_pod", 1), ("flow_new", 1)]);
                let told = all(&mut events);
                let programs: Vec<u8> = told.iter().map(|event| event.program).collect();
                assert_eq!(programs, [Program::FromPod, Program::FromVpc, Program::ToPod].map(|program| program as u8));
                let version = if family.icmp == 8 { 4 } else { 6 };
                assert!(told.iter().all(|event| event.family == version && event.reason == 0), "{told:?}");
                // An ICMP error about an unknown flow passes without a policy, and begins no connection.
                let never = node.b().ip(family.b, family.a).udp(2999, 80).build();
                let (kind, code) = if family.icmp == 8 { (3, 3) } else { (1, 4) };
                let error = node.a().ip(family.a, family.b).icmp(kind, code, [0; 4]).payload(quoted(&never));
                node.by_a(error, &LOCAL[..1]);
                assert_eq!(all(&mut events), []);
            }
        },
    );
}

#[test]
fn service_event_has_frontend_and_backend() {
    with_events(
        |_| {},
        |mut node, mut events, _| {
            node.stage.datapath.policies().sample_flows(1).unwrap();
            for (number, family) in (1..).zip(BOTH) {
                serve(&node.stage, 10 * number, family.vip, family.b);
                node.by_a(node.a().ip(family.a, family.vip).tcp(3000, 80, flags::SYN), &LOCAL);
                let told = all(&mut events);
                let [event] = &told[..] else { panic!("{told:?}") };
                assert_eq!((event.reason, event.service), (0, 10 * number));
                assert_eq!(
                    (event.dst, event.policy_destination),
                    (words(family.vip.parse().unwrap()), words(family.b.parse().unwrap()))
                );
                assert_eq!(event.ports.to_ne_bytes()[2..], [0, 80]);
                assert_eq!(event.policy_port.to_ne_bytes()[..2], [0x1f, 0x90]);
                // Replies have an entry from the first packet on: no event.
                node.by_b(node.b().ip(family.b, family.a).tcp(8080, 3000, flags::SYN | flags::ACK), &LOCAL[..1]);
                assert_eq!(all(&mut events), []);
                // Drop events name the backend too: of a new connection, and of an established one, which does not know the Service any
                // more.
                node.policy("b", deny("Ingress"));
                node.by_a(node.a().ip(family.a, family.vip).tcp(3001, 80, flags::SYN), &INGRESS);
                node.by_a(
                    node.a().ip(family.a, family.vip).tcp(3000, 80, flags::ACK),
                    &[("policy_ingress", 1), ("flow_stale", 1)],
                );
                let told = all(&mut events);
                let services: Vec<u32> = told.iter().map(|event| event.service).collect();
                assert_eq!(services, [10 * number, 0]);
                for event in told {
                    assert_eq!(event.policy_destination, words(family.b.parse().unwrap()));
                    assert_eq!(event.policy_port.to_ne_bytes()[..2], [0x1f, 0x90]);
                }
                node.no_policy("b");
            }
        },
    );
}

#[test]
fn event_budget_reserves_half_for_drops() {
    with_events(
        |config| config.events_per_second = 10,
        |mut node, mut events, _| {
            node.stage.datapath.policies().sample_flows(1).unwrap();
            node.policy("b", json!({"ingress": [{"ports": [{"port": 80}]}]}));
            let cpu = nix::sched::CpuSet::new();
            let mut one = cpu;
            one.set(0).unwrap();
            nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &one).unwrap();
            // A second that begins with the first of them, so that it does not turn in between.
            std::thread::sleep(std::time::Duration::from_millis(1100));
            for port in 4000..4040 {
                node.by_a(node.a().ip("10.0.0.1", "10.0.0.2").tcp(port, 80, flags::SYN), &LOCAL);
            }
            let spoofed = node.a().ip("10.0.0.9", "10.0.0.2").tcp(1, 80, flags::SYN);
            for _ in 0..20 {
                node.stage
                    .datapath
                    .programs()
                    .run(Program::FromPod, &spoofed.build(), RunContext::on(node.stage.a.host_ifindex))
                    .unwrap();
            }
            let told = all(&mut events);
            let drops = told.iter().filter(|event| event.reason != 0).count();
            assert_eq!((told.len() - drops, drops), (5, 5), "one second's worth");
        },
    );
}

#[test]
fn event_sampling_rate() {
    with_events(
        |config| config.events_per_second = u32::MAX,
        |node, mut events, _| {
            node.stage.datapath.policies().sample_flows(8).unwrap();
            let mut told = 0;
            for port in 0..4000 {
                let syn = node.a().ip("10.0.0.1", "10.0.0.2").tcp(5000 + port, 80, flags::SYN).build();
                node.stage
                    .datapath
                    .programs()
                    .run(Program::FromPod, &syn, RunContext::on(node.stage.a.host_ifindex))
                    .unwrap();
                told += all(&mut events).len();
            }
            // 500 are expected; twelve standard deviations to each side.
            assert!((250..750).contains(&told), "{told} of 4000");
        },
    );
}

#[test]
fn policy_rule_counters() {
    let sandbox = sandbox_or_skip!();
    let mut node = Node::set(&sandbox);
    let counted = |node: &Node| -> BTreeMap<String, (u64, u64)> {
        let reasons = node.stage.datapath.policy_counters().rule_ids().unwrap();
        let one = |reason: u32| {
            let PolicyCounter { packets, bytes, tag } = node.stage.datapath.policy_counters().read(reason).unwrap();
            assert_eq!(tag, 7);
            (node.compiler.rule(RuleId(reason)).unwrap().to_string(), (packets, bytes))
        };
        reasons.into_iter().map(one).collect()
    };
    assert_eq!(counted(&node), BTreeMap::new());
    node.policy("b", json!({"ingress": [{"ports": [{"port": 80}]}, {"ports": [{"port": 81}]}]}));
    node.policy("a", json!({"policyTypes": ["Egress"], "egress": [{}]}));
    let (rule, isolated) = (
        "NetworkPolicy x/of-b, ingress rule",
        "isolated in ingress by NetworkPolicy x/of-b, none of whose rules allows it",
    );
    let (egress, never) = (
        "NetworkPolicy x/of-a, egress rule 0: Accept",
        "isolated in egress by NetworkPolicy x/of-a, none of whose rules allows it",
    );
    let mut expected: BTreeMap<String, (u64, u64)> = [
        format!("{rule} 0: Accept"),
        format!("{rule} 1: Accept"),
        isolated.to_owned(),
        egress.to_owned(),
        never.to_owned(),
    ]
    .map(|text| (text, (0, 0)))
    .into();
    assert_eq!(counted(&node), expected);

    for (family, length) in BOTH.into_iter().zip([54, 74]) {
        let syn = |node: &Node, from: u16, to: u16| node.a().ip(family.a, family.b).tcp(from, to, flags::SYN);
        node.by_a(syn(&node, 6000, 80), &LOCAL);
        node.by_a(syn(&node, 6001, 81), &LOCAL);
        node.by_a(syn(&node, 6002, 81), &LOCAL);
        // Established packets are not counted.
        node.by_a(node.a().ip(family.a, family.b).tcp(6000, 80, flags::ACK), &LOCAL[..1]);
        node.by_b(node.b().ip(family.b, family.a).tcp(80, 6000, flags::ACK), &LOCAL[..1]);
        // Each dropped packet is counted, for the denying rule only.
        for _ in 0..3 {
            node.by_a(syn(&node, 6003, 82), &INGRESS);
        }
        for (text, packets) in [
            (format!("{rule} 0: Accept"), 1),
            (format!("{rule} 1: Accept"), 2),
            (isolated.to_owned(), 3),
            (egress.to_owned(), 3),
        ] {
            let sum = expected.get_mut(&text).unwrap();
            *sum = (sum.0 + packets, sum.1 + packets * length);
        }
        assert_eq!(counted(&node), expected);
    }
    // Packets of an established connection that a change denies are counted as dropped; those of one that stays allowed are not counted.
    node.policy("a", json!({"policyTypes": ["Egress"], "egress": [{"ports": [{"port": 80}]}]}));
    node.by_a(node.a().ip("10.0.0.1", "10.0.0.2").tcp(6000, 80, flags::ACK), &[("pod_to_pod", 1), ("flow_stale", 1)]);
    node.by_a(
        node.a().ip("10.0.0.1", "10.0.0.2").tcp(6001, 81, flags::ACK),
        &[("policy_egress", 1), ("flow_stale", 1)],
    );
    let now = counted(&node);
    assert_eq!(now[never], (1, 54));
    assert_eq!(now[isolated], expected[isolated]);
    // Removed rules have no counters after the next synchronisation.
    node.no_policy("a");
    node.no_policy("b");
    for _ in 0..2 {
        let ops = node.compiler.run_deferred();
        node.count();
        ops.iter().for_each(|op| node.stage.datapath.policies().apply(op).unwrap());
    }
    assert_eq!(counted(&node), BTreeMap::new());
    // Without counters packets are handled the same.
    node.by_a(node.a().ip("10.0.0.1", "10.0.0.2").tcp(6010, 80, flags::SYN), &LOCAL);
}
