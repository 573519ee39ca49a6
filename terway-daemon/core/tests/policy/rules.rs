//! The rules that implementations get wrong, one by one.

use std::sync::Arc;

use serde_json::json;
use terway_core::objects::{Kind, Namespace, ObjectMeta, ObjectName};
use terway_core::policy::{Event, FlowEnd, MatchedRule, Op};

use crate::fixture::{ICMP, Node, SCTP, TCP, UDP, ip, name};

/// Two namespaces with two pods each, all on this node.
fn four() -> Node {
    let mut node = Node::new();
    node.namespace("x", json!({"team": "one"}));
    node.namespace("y", json!({"team": "two"}));
    node.local("x/a1", json!({"app": "a"}));
    node.local("x/b2", json!({"app": "b"}));
    node.local("y/a3", json!({"app": "a"}));
    node.local("y/b4", json!({"app": "b"}));
    node
}

#[test]
fn without_policy_types_egress_needs_rules_to_be_isolated() {
    let mut node = four();
    node.policy("x/p", json!({"podSelector": {}, "egress": []}));
    assert!(node.tcp("x/a1", "y/a3", 80), "an empty list of egress rules isolates nothing by itself");
    assert!(!node.tcp("y/a3", "x/a1", 80), "ingress is meant in any case");
    node.policy("x/p", json!({"podSelector": {}, "policyTypes": ["Egress"]}));
    assert!(!node.tcp("x/a1", "y/a3", 80));
    assert!(node.tcp("y/a3", "x/a1", 80));
}

#[test]
fn empty_rules_and_empty_rule() {
    let mut node = four();
    node.policy("x/p", json!({"podSelector": {}, "ingress": []}));
    assert!(!node.tcp("x/b2", "x/a1", 80));
    node.policy("x/p", json!({"podSelector": {}, "ingress": [{}]}));
    assert!(node.tcp("x/b2", "x/a1", 80) && node.passes(ip("192.0.2.1"), ip("x/a1"), ICMP, 0));
}

#[test]
fn peer_selectors_are_anded_and_peers_are_ored() {
    let mut node = four();
    let from = |peers| json!({"podSelector": {"matchLabels": {"app": "a"}}, "ingress": [{"from": peers}]});
    let (team, app) = (json!({"matchLabels": {"team": "two"}}), json!({"matchLabels": {"app": "b"}}));
    let seen = |node: &Node| ["x/b2", "y/a3", "y/b4"].map(|who| node.tcp(who, "x/a1", 80));
    node.policy("x/p", from(json!([{"namespaceSelector": team, "podSelector": app}])));
    assert_eq!(seen(&node), [false, false, true], "both");
    node.policy("x/p", from(json!([{"namespaceSelector": team}, {"podSelector": app}])));
    assert_eq!(seen(&node), [true, true, true], "either; pods alone are those of the policy's own namespace");
    node.policy("x/p", from(json!([{"podSelector": {}}])));
    assert_eq!(seen(&node), [true, false, false], "all of the own namespace");
    node.policy("x/p", from(json!([{"namespaceSelector": {}}])));
    assert_eq!(seen(&node), [true, true, true], "all of the cluster");
    assert!(!node.tcp("192.0.2.1", "x/a1", 80), "which is not the world");
    node.policy("x/p", from(json!([{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "y"}}}])));
    assert_eq!(seen(&node), [false, true, true], "by name");
    let not = json!({"matchExpressions": [{"key": "team", "operator": "NotIn", "values": ["two"]}]});
    node.policy("x/p", from(json!([{"namespaceSelector": not}])));
    assert_eq!(seen(&node), [true, false, false]);
}

#[test]
fn ports_by_protocol_number_range_and_default() {
    let mut node = four();
    let ports = |ports| json!({"podSelector": {"matchLabels": {"app": "a"}}, "ingress": [{"ports": ports}]});
    let seen = |node: &Node, protocol, port| node.passes(ip("x/b2"), ip("x/a1"), protocol, port);
    node.policy("x/p", ports(json!([{"port": 80}])));
    assert!(seen(&node, TCP, 80) && !seen(&node, TCP, 81) && !seen(&node, UDP, 80), "no protocol is TCP");
    assert!(!seen(&node, ICMP, 0), "a rule with ports says nothing about ICMP");
    node.policy("x/p", ports(json!([{"protocol": "SCTP"}])));
    assert!(seen(&node, SCTP, 1) && seen(&node, SCTP, 65535) && !seen(&node, TCP, 80), "no port is every port");
    node.policy("x/p", ports(json!([{"protocol": "UDP", "port": 32000, "endPort": 32768}])));
    let edges = [31999, 32000, 32767, 32768, 32769].map(|port| seen(&node, UDP, port));
    assert_eq!(edges, [false, true, true, true, false], "both ends are in");
    node.policy("x/p", ports(json!([{"port": "web", "endPort": 90}, {"port": 90, "endPort": 80}])));
    assert!((79..=91).all(|port| !seen(&node, TCP, port)), "what the API would refuse allows nothing");
}

#[test]
fn named_port_of_the_destination_pod() {
    let mut node = four();
    let serving = |number: u16, protocol: &str| json!({"containers": [{"ports": [{"name": "web", "containerPort": number, "protocol": protocol}]}]});
    let running = json!({"phase": "Running"});
    node.pod_with("x/a1", json!({"app": "a"}), serving(80, "TCP"), running.clone());
    node.pod_with("y/a3", json!({"app": "a"}), serving(81, "TCP"), running.clone());
    node.pod_with("y/b4", json!({"app": "b"}), serving(80, "UDP"), running);
    node.policy("x/p", json!({"podSelector": {"matchLabels": {"app": "b"}}, "egress": [{"ports": [{"port": "web"}]}], "policyTypes": ["Egress"]}));
    assert!(node.tcp("x/b2", "x/a1", 80) && !node.tcp("x/b2", "x/a1", 81));
    assert!(node.tcp("x/b2", "y/a3", 81) && !node.tcp("x/b2", "y/a3", 80));
    assert!(!node.tcp("x/b2", "y/b4", 80), "served, but in another protocol");
    assert!(!node.tcp("x/b2", "192.0.2.1", 80), "nobody there names a port");
    for namespace in ["x", "y"] {
        node.policy(&format!("{namespace}/q"), json!({"podSelector": {}, "ingress": [{"ports": [{"port": "web"}]}]}));
    }
    assert!(node.tcp("192.0.2.1", "x/a1", 80) && node.tcp("192.0.2.1", "y/a3", 81));
    assert!(!node.tcp("192.0.2.1", "x/a1", 81) && !node.tcp("192.0.2.1", "y/b4", 80));
}

#[test]
fn ip_block_except_is_local_to_its_rule() {
    let mut node = four();
    let hole = json!({"ipBlock": {"cidr": "10.0.0.0/24", "except": ["10.0.0.2/32"]}});
    node.policy("x/p", json!({"podSelector": {"matchLabels": {"app": "a"}}, "ingress": [{"from": [hole]}]}));
    assert!(node.tcp("y/a3", "x/a1", 80), "a block speaks of pods, too");
    assert!(!node.tcp("x/b2", "x/a1", 80) && !node.tcp("10.0.1.1", "x/a1", 80));
    assert!(!node.tcp6("y/a3", "x/a1", 80), "and of one family only");
    node.policy(
        "x/q",
        json!({"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}], "ports": [{"port": 80}]}]}),
    );
    assert!(node.tcp("x/b2", "x/a1", 80) && !node.tcp("x/b2", "x/a1", 81));
    node.policy("x/r", json!({"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"port": 81}]}]}));
    assert!(node.tcp("x/b2", "x/a1", 81) && node.tcp("10.9.9.9", "x/a1", 81) && !node.tcp("10.9.9.9", "x/a1", 80));
}

#[test]
fn ingress_and_egress_on_one_node() {
    let mut node = four();
    node.policy(
        "x/p",
        json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": [{"to": [{"namespaceSelector": {}}]}]}),
    );
    node.policy("y/p", json!({"podSelector": {}}));
    assert!(!node.tcp("x/a1", "y/a3", 80) && node.tcp("x/a1", "x/b2", 80));
    node.policy("y/q", json!({"podSelector": {}, "ingress": [{}]}));
    assert!(node.tcp("x/a1", "y/a3", 80));
    node.delete(Kind::NetworkPolicy, "x/p");
    node.policy("x/q", json!({"podSelector": {}, "policyTypes": ["Egress"]}));
    assert!(!node.tcp("x/a1", "y/a3", 80));
}

#[test]
fn pod_to_itself_and_node_to_pod() {
    let mut node = four();
    node.policy("x/p", json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}));
    assert!(node.tcp("x/a1", "x/a1", 80) && node.tcp6("x/a1", "x/a1", 80));
    assert!(node.tcp("10.0.0.100", "x/a1", 80), "the local node");
    assert!(!node.tcp("10.0.0.101", "x/a1", 80), "another node");
    assert!(!node.tcp("x/a1", "10.0.0.100", 80), "to the node is not from the node");
    node.policy("x/q", json!({"podSelector": {}, "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.100/32"}}]}], "policyTypes": ["Egress"]}));
    assert!(node.tcp("x/a1", "10.0.0.100", 80));
}

#[test]
fn host_network_pods_are_no_peers() {
    let mut node = four();
    let host = json!({"hostNetwork": true});
    node.pod_with("x/h5", json!({"app": "b"}), host, json!({"phase": "Running", "podIPs": [{"ip": "10.0.0.101"}]}));
    node.policy("x/p", json!({"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}]}]}));
    assert!(!node.tcp("10.0.0.101", "x/a1", 80), "its labels must not open the node it lives on");
    node.policy("x/q", json!({"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.101/32"}}]}]}));
    assert!(node.tcp("10.0.0.101", "x/a1", 80));
}

#[test]
fn reused_address_has_no_old_identity() {
    let mut node = four();
    node.policy("x/p", json!({"podSelector": {"matchLabels": {"app": "a"}}, "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "b"}}}]}]}));
    node.pod("x/b9", json!({"app": "b"}));
    assert!(node.tcp("x/b9", "x/a1", 80));
    node.pod_with("x/b9", json!({"app": "b"}), json!({}), json!({"phase": "Succeeded"}));
    assert!(!node.tcp("x/b9", "x/a1", 80), "it has ended");
    node.pod("x/b9", json!({"app": "b"}));
    // The address is given to another pod here, before anybody says that the old one is gone.
    node.pod_with("y/c9", json!({"app": "c"}), json!({}), json!({"podIPs": []}));
    node.attach("y/c9", "y/c9");
    assert!(!node.tcp("y/c9", "x/a1", 80));
    node.delete(Kind::Pod, "x/b9");
    assert!(!node.tcp("y/c9", "x/a1", 80));
}

#[test]
fn unknown_pod_is_isolated() {
    let mut node = four();
    node.attach("x/new7", "second");
    assert!(node.tcp("x/new7", "y/a3", 80), "nothing could select it");
    node.policy("x/p", json!({"podSelector": {"matchLabels": {"app": "z"}}, "policyTypes": ["Egress"]}));
    assert!(!node.tcp("x/new7", "y/a3", 80) && node.tcp("y/a3", "x/new7", 80), "now something might");
    // A namesake's labels are not its own.
    node.pod("x/new7", json!({"app": "y"}));
    assert!(!node.tcp("x/new7", "y/a3", 80));
    node.object(
        Kind::Pod,
        &json!({"metadata": {"namespace": "x", "name": "new7", "uid": "second", "labels": {"app": "y"}}}),
    );
    assert!(node.tcp("x/new7", "y/a3", 80), "known, and not selected");
}

#[test]
fn label_change() {
    let mut node = four();
    let from =
        json!([{"namespaceSelector": {"matchLabels": {"team": "two"}}, "podSelector": {"matchLabels": {"app": "b"}}}]);
    node.policy("x/p", json!({"podSelector": {"matchLabels": {"app": "a"}}, "ingress": [{"from": from}]}));
    let seen = |node: &Node| node.tcp("y/a3", "x/a1", 80);
    assert!(!seen(&node));
    node.pod("y/a3", json!({"app": "b"}));
    assert!(seen(&node), "the peer's labels");
    node.namespace("y", json!({"team": "three"}));
    assert!(!seen(&node), "its namespace's labels");
    node.pod("x/a1", json!({"app": "z"}));
    assert!(seen(&node), "the selected pod's labels");
    node.delete(Kind::Pod, "x/a1");
    assert!(!seen(&node), "nothing is known of it any more, and the policy might select it");
}

#[test]
fn tier_order() {
    let mut node = four();
    let everybody = json!([{"namespaces": {}}]);
    let spec = |tier: &str, priority: u16, action: &str, protocols: serde_json::Value| {
        json!({"tier": tier, "priority": priority, "subject": {"namespaces": {"matchLabels": {"team": "one"}}},
            "ingress": [{"name": "rule", "action": action, "from": everybody, "protocols": protocols}]})
    };
    let web = json!([{"tcp": {"destinationPort": {"number": 80}}}]);
    let seen = |node: &Node| [80, 81].map(|port| node.tcp("y/a3", "x/a1", port));
    node.cluster("base", spec("Baseline", 0, "Deny", json!([])));
    assert_eq!(seen(&node), [false, false], "the baseline");
    assert!(node.tcp("192.0.2.1", "x/a1", 80), "speaks of pods only");
    node.policy("x/p", json!({"podSelector": {}, "ingress": [{"ports": [{"port": 81}]}]}));
    assert_eq!(seen(&node), [false, true], "NetworkPolicies come before it, and decide");
    node.cluster("late", spec("Admin", 9, "Deny", json!([])));
    assert_eq!(seen(&node), [false, false], "an admin's word");
    node.cluster("early", spec("Admin", 1, "Accept", web));
    assert_eq!(seen(&node), [true, false], "the lower number first");
    node.cluster("early", spec("Admin", 1, "Pass", json!([])));
    assert_eq!(seen(&node), [false, true], "leaves the tier");
    let unknown = json!([{"icmp": {}}]);
    node.cluster("early", spec("Admin", 1, "Accept", unknown.clone()));
    assert_eq!(seen(&node), [false, false], "not understood: matches nothing");
    node.delete(Kind::ClusterNetworkPolicy, "/late");
    node.cluster("early", spec("Admin", 1, "Pass", unknown));
    assert_eq!(seen(&node), [false, false], "not understood: denies");
    assert!(!node.tcp("192.0.2.1", "x/a1", 80), "everything");
}

#[test]
fn enforcement_switch() {
    let mut node = four();
    node.policy("x/p", json!({"podSelector": {}}));
    let ops = node.step(Event::Enforce(false));
    assert!(node.tcp("y/a3", "x/a1", 80));
    assert_eq!(ops.iter().filter(|op| matches!(op, Op::SetControlWord { .. })).count(), 1);
    assert_eq!(
        ops.len(),
        2 + usize::from(ops.contains(&Op::RcuBarrier)) * (ops.len() - 2),
        "one write and a word about flows: {ops:?}"
    );
    node.step(Event::Enforce(true));
    assert!(!node.tcp("y/a3", "x/a1", 80));
}

#[test]
fn explanation_names_policy_and_rule() {
    let mut node = four();
    node.pod("y/far8", json!({"app": "b"}));
    node.policy("x/deny", json!({"podSelector": {}}));
    node.policy(
        "x/web",
        json!({"podSelector": {}, "ingress": [{"ports": [{"port": 443}]}, {"ports": [{"port": 80}]}]}),
    );
    node.policy("y/out", json!({"podSelector": {"matchLabels": {"app": "b"}}, "policyTypes": ["Egress"]}));
    let explain = |node: &Node, from: &str, to: &str, port| {
        let party = |text: &str| text.parse().map_or_else(|_| FlowEnd::Pod(name(text)), FlowEnd::Address);
        node.compiler.explain(&party(from), &party(to), TCP, port).unwrap().remove(0)
    };
    let said = explain(&node, "y/a3", "x/a1", 80);
    assert!(said.is_allowed());
    assert_eq!(said.egress.unwrap().rule, MatchedRule::NoPolicy);
    let side = said.ingress.unwrap();
    assert_eq!(side.rule.to_string(), "NetworkPolicy x/web, ingress rule 1: Accept");
    assert!(side.is_local);
    let side = explain(&node, "192.0.2.1", "x/a1", 81).ingress.unwrap();
    assert!(!side.allowed);
    let text = "isolated in ingress by NetworkPolicy x/deny, NetworkPolicy x/web, none of whose rules allows it";
    assert_eq!(side.rule.to_string(), text);
    // A pod of another node, by the same rules.
    let side = explain(&node, "y/far8", "x/a1", 80).egress.unwrap();
    assert!(!side.allowed && !side.is_local);
    assert_eq!(side.rule.to_string(), "isolated in egress by NetworkPolicy y/out, none of whose rules allows it");
    assert!(node.compiler.explain(&FlowEnd::Pod(name("x/nobody")), &FlowEnd::Address(ip("x/a1")), TCP, 80).is_err());
}

/// One label of a namespace turns both sides of two connections round, in opposite senses: whichever side were written first, one of them would be open
/// for a moment that is closed before and after.
#[test]
fn simultaneous_ingress_and_egress_change() {
    let mut node = Node::new();
    node.namespace("x", json!({"m": "1"}));
    for (pod, app) in [("x/a1", "a"), ("x/b2", "b"), ("x/c3", "c"), ("x/d4", "d")] {
        node.local(pod, json!({"app": app}));
    }
    for (app, operator, key, list) in [
        ("a", "In", "egress", "to"),
        ("b", "NotIn", "ingress", "from"),
        ("c", "NotIn", "egress", "to"),
        ("d", "In", "ingress", "from"),
    ] {
        let selector = json!({"matchExpressions": [{"key": "m", "operator": operator, "values": ["1"]}]});
        let types = if key == "egress" { "Egress" } else { "Ingress" };
        let spec = json!({"podSelector": {"matchLabels": {"app": app}}, "policyTypes": [types],
            key: [{ list: [{"namespaceSelector": selector}] }]});
        node.policy(&format!("x/{app}"), spec);
    }
    let closed = |node: &Node| !node.tcp("x/a1", "x/b2", 80) && !node.tcp("x/c3", "x/d4", 80);
    assert!(closed(&node));
    assert!(node.tcp("x/a1", "x/d4", 80) && !node.tcp("x/c3", "x/b2", 80));
    let meta = ObjectMeta {
        object: ObjectName::new("", "x"),
        labels: [("m", "2")].into_iter().collect(),
        ..ObjectMeta::default()
    };
    for op in node.compiler.step(Event::Namespace("x".into(), Some(Arc::new(Namespace { meta })))) {
        node.maps.apply(&op);
        assert!(closed(&node), "open after {op:?}");
    }
    assert!(!node.tcp("x/a1", "x/d4", 80) && node.tcp("x/c3", "x/b2", 80), "both were turned");
}

/// What a change costs in writes.
#[test]
fn incremental_change_writes_few_entries() {
    let mut node = four();
    for n in 20..70 {
        node.pod(&format!("y/far{n}"), json!({"app": "b"}));
    }
    node.policy("x/p", json!({"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "b"}}}]}]}));
    for _ in 0..2 {
        let ops = node.compiler.run_deferred();
        ops.iter().for_each(|op| node.maps.apply(op));
    }
    let writes = |ops: &[Op]| ops.iter().filter(|op| !matches!(op, Op::Revalidate(_))).cloned().collect::<Vec<_>>();
    let ops = writes(&node.pod("y/far70", json!({"app": "b"})));
    assert!(
        ops.len() == 2 && ops.iter().all(|op| matches!(op, Op::PutAddress { .. })),
        "one for each address: {ops:?}"
    );
    let ops = writes(&node.pod("y/far70", json!({"app": "b", "pod-template-hash": "1234"})));
    assert!(ops.is_empty(), "nobody looks at that label: {ops:?}");
    let ops = writes(&node.pod("y/far70", json!({"app": "c"})));
    assert!(ops.iter().filter(|op| matches!(op, Op::PutAddress { .. })).count() == 2 && ops.len() <= 5, "{ops:?}");
    // A block around all pods takes over their identities instead of giving them new ones.
    let block = json!({"ipBlock": {"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8"]}});
    let ops =
        writes(&node.policy("y/q", json!({"podSelector": {"matchLabels": {"app": "z"}}, "egress": [{"to": [block]}]})));
    let addresses = ops.iter().filter(|op| matches!(op, Op::PutAddress { .. })).count();
    assert!(addresses <= 1, "the node's own at most: {ops:?}");
    assert!(node.tcp("y/far20", "x/a1", 80) && !node.tcp("y/a3", "x/a1", 80));
}

#[test]
fn removed_rule_set_leaves_no_entries() {
    let mut node = Node::new();
    node.namespace("y", json!({"team": "t"}));
    node.local("x/a1", json!({}));
    node.pod("y/b2", json!({}));
    let peer = json!({"namespaceSelector": {"matchLabels": {"team": "t"}}});
    node.policy("x/p", json!({"podSelector": {}, "ingress": [{"from": [peer], "ports": [{"port": 80}]}]}));
    assert!(!node.maps.peers.is_empty());
    // The entries go with the label, in the phase that counts; before the other one follows, the set goes as a whole.
    node.namespace("y", json!({}));
    node.delete(Kind::NetworkPolicy, "x/p");
    for _ in 0..2 {
        node.compiler.run_deferred().iter().for_each(|op| node.maps.apply(op));
    }
    assert_eq!(node.maps.peers, node.compiler.maps().peers);
}
