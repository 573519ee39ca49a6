//! The scenarios: every kind of peer with every kind of port in both directions, and what changes in a cluster's life.

use anyhow::Result;
use serde_json::{Value, json};
use terway_core::objects::Kind;

use super::stage::{Objects, Put as _, Stage, pod_object};

/// One step of a scenario: what it does to the objects.
pub(super) type Edit = Box<dyn FnOnce(&mut Objects)>;

fn edit(edit: impl FnOnce(&mut Objects) + 'static) -> Edit {
    Box::new(edit)
}

fn pods(name: &str) -> Value {
    json!({"podSelector": {"matchLabels": {"pod": name}}})
}

/// Kinds of peers. `z` are the addresses of the pod z/c.
fn peers(z: &[String]) -> Vec<(&'static str, Value)> {
    let block = |bits: [u8; 2]| -> Value {
        z.iter().zip(bits).map(|(ip, bits)| json!({"ipBlock": {"cidr": format!("{ip}/{bits}")}})).collect()
    };
    let holes: Value = z
        .iter()
        .zip([("10.0.0.0/8", 32), ("::/0", 128)])
        .map(|(ip, (all, bits))| json!({"ipBlock": {"cidr": all, "except": [format!("{ip}/{bits}")]}}))
        .collect();
    vec![
        ("anybody", json!([])),
        ("all pods of the namespace", json!([{"podSelector": {}}])),
        ("pods by label", json!([pods("b")])),
        (
            "pods by expression",
            json!([{"podSelector": {"matchExpressions": [{"key": "pod", "operator": "NotIn", "values": ["a", "b"]}]}}]),
        ),
        ("all namespaces", json!([{"namespaceSelector": {}}])),
        ("a namespace by label", json!([{"namespaceSelector": {"matchLabels": {"ns": "y"}}}])),
        ("a namespace by name", json!([{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "z"}}}])),
        (
            "pods of a namespace",
            json!([{"namespaceSelector": {"matchLabels": {"ns": "y"}}, "podSelector": {"matchLabels": {"pod": "b"}}}]),
        ),
        ("either of two", json!([{"namespaceSelector": {"matchLabels": {"ns": "y"}}}, pods("c")])),
        ("a block", block([32, 128])),
        ("a block with a hole", holes),
    ]
}

/// Kinds of ports.
fn ports() -> Vec<(&'static str, Value)> {
    vec![
        ("all ports", json!([])),
        ("TCP 80", json!([{"protocol": "TCP", "port": 80}])),
        ("81 of no protocol", json!([{"port": 81}])),
        ("UDP", json!([{"protocol": "UDP"}])),
        ("a range", json!([{"protocol": "UDP", "port": 70, "endPort": 80}])),
        ("a name", json!([{"protocol": "TCP", "port": "serve"}])),
        ("names of another protocol and of nobody", json!([{"protocol": "UDP", "port": "serve"}, {"port": "none"}])),
        (
            "three",
            json!([{"protocol": "TCP", "port": "serve"}, {"protocol": "UDP", "port": 81}, {"protocol": "SCTP", "port": 80}]),
        ),
    ]
}

fn selecting(name: &str) -> Value {
    json!({"matchLabels": {"pod": name}})
}

fn spec(selector: &Value, direction: &str, rules: &Value) -> Value {
    let types = if direction == "ingress" { "Ingress" } else { "Egress" };
    json!({"podSelector": selector, "policyTypes": [types], direction: rules})
}

/// All scenarios, by name.
pub(super) fn all(stage: &Stage<'_>) -> Result<Vec<(String, Vec<Edit>)>> {
    let (_, last) = stage.pods.last().ok_or_else(|| anyhow::anyhow!("no pods"))?;
    let z = [last.v4()?.to_string(), last.v6()?.to_string()];
    let mut all: Vec<(String, Vec<Edit>)> = Vec::new();
    // Every kind of peer with every kind of port is much; each peer meets each port in one of the directions.
    for (n, (who, peer)) in peers(&z).into_iter().enumerate() {
        for (m, (which, port)) in ports().into_iter().enumerate() {
            let (direction, side) = if (n + m) % 2 == 0 { ("ingress", "from") } else { ("egress", "to") };
            let rule = json!([{side: peer, "ports": port}]);
            let spec = spec(&selecting("a"), direction, &rule);
            all.push((format!("{direction}: {who}, {which}"), vec![edit(move |o| o.policy("x", "p", &spec))]));
        }
    }
    all.extend(whole());
    all.extend(changes(&last.ips));
    all.extend(cluster());
    Ok(all)
}

/// Everything denied, everything allowed, several policies.
fn whole() -> Vec<(String, Vec<Edit>)> {
    let mut all = Vec::new();
    for direction in ["ingress", "egress"] {
        for (name, selector, rules) in [
            ("nothing for all", json!({}), json!([])),
            ("nothing for one", selecting("b"), json!([])),
            ("everything for all", json!({}), json!([{}])),
        ] {
            let spec = spec(&selector, direction, &rules);
            all.push((format!("{direction}: {name}"), vec![edit(move |o| o.policy("y", "p", &spec))]));
        }
        let (deny, allow) = (spec(&json!({}), direction, &json!([])), spec(&selecting("a"), direction, &json!([{}])));
        let (first, again) = (deny.clone(), deny.clone());
        all.push((
            format!("{direction}: denied, allowed by another, denied again"),
            vec![
                edit(move |o| o.policy("x", "deny", &first)),
                edit(move |o| o.policy("x", "allow", &allow)),
                edit(|o| o.gone(Kind::NetworkPolicy, "x", "allow")),
                edit(|o| o.gone(Kind::NetworkPolicy, "x", "deny")),
                edit(move |o| o.policy("x", "deny", &again)),
            ],
        ));
    }
    let both = json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]});
    all.push((
        "every namespace denied both ways, one at a time".to_owned(),
        ["x", "y", "z"]
            .map(|ns| {
                let both = both.clone();
                edit(move |o: &mut Objects| o.policy(ns, "deny", &both))
            })
            .into(),
    ));
    let defaults = json!({"podSelector": selecting("c"), "egress": []});
    all.push(("no types, no rules: ingress only".to_owned(), vec![edit(move |o| o.policy("x", "p", &defaults))]));
    let (out, into) = (
        spec(&selecting("a"), "egress", &json!([{"to": [pods("b")]}])),
        spec(&selecting("b"), "ingress", &json!([{"from": [pods("c")]}])),
    );
    all.push((
        "egress allows what ingress denies".to_owned(),
        vec![edit(move |o| {
            o.policy("x", "out", &out);
            o.policy("x", "in", &into);
        })],
    ));
    all
}

/// Labels, namespaces and policies that change, pods that end.
fn changes(ips: &[std::net::IpAddr]) -> Vec<(String, Vec<Edit>)> {
    let by_label = spec(
        &selecting("a"),
        "ingress",
        &json!([{"from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"role": "friend"}}}]}]),
    );
    let by_ns = spec(
        &selecting("a"),
        "ingress",
        &json!([{"from": [{"namespaceSelector": {"matchLabels": {"tier": "gold"}}}]}]),
    );
    let of_role = spec(&json!({"matchLabels": {"role": "guarded"}}), "egress", &json!([{"to": [pods("b")]}]));
    let ended = {
        let mut pod = pod_object("z", "c", &json!({"pod": "c"}), ips);
        pod["status"]["phase"] = json!("Succeeded");
        pod
    };
    let block =
        spec(&selecting("a"), "ingress", &json!([{"from": [{"namespaceSelector": {"matchLabels": {"ns": "z"}}}]}]));
    vec![
        (
            "a pod gets a label that a rule looks for, and loses it".to_owned(),
            vec![
                edit(move |o| o.policy("x", "p", &by_label)),
                edit(|o| o.label("y", "b", &json!({"pod": "b", "role": "friend"}))),
                edit(|o| o.label("x", "c", &json!({"pod": "c", "role": "friend"}))),
                edit(|o| o.label("y", "b", &json!({"pod": "b", "role": "foe"}))),
                edit(|o| o.label("x", "c", &json!({}))),
            ],
        ),
        (
            "a pod gets a label that a policy selects, and loses it".to_owned(),
            vec![
                edit(move |o| o.policy("y", "p", &of_role)),
                edit(|o| o.label("y", "a", &json!({"pod": "a", "role": "guarded"}))),
                edit(|o| o.label("y", "c", &json!({"pod": "c", "role": "guarded"}))),
                edit(|o| o.label("y", "a", &json!({"pod": "a"}))),
            ],
        ),
        (
            "a namespace gets a label, loses it, and goes".to_owned(),
            vec![
                edit(move |o| o.policy("x", "p", &by_ns)),
                edit(|o| o.namespace("z", &json!({"ns": "z", "tier": "gold"}))),
                edit(|o| o.namespace("y", &json!({"tier": "gold"}))),
                edit(|o| o.namespace("z", &json!({"ns": "z"}))),
                edit(|o| o.gone(Kind::Namespace, "", "y")),
            ],
        ),
        (
            "a pod ends: nobody's peer any more".to_owned(),
            vec![edit(move |o| o.policy("x", "p", &block)), edit(move |o| o.pod("z", "c", ended))],
        ),
        (
            "a policy changes its ports, its peers, its pods".to_owned(),
            [
                spec(&selecting("a"), "ingress", &json!([{"from": [pods("b")], "ports": [{"port": 80}]}])),
                spec(&selecting("a"), "ingress", &json!([{"from": [pods("b")], "ports": [{"port": 81}]}])),
                spec(&selecting("a"), "ingress", &json!([{"from": [pods("c")], "ports": [{"port": 81}]}])),
                spec(&selecting("b"), "ingress", &json!([{"from": [pods("c")], "ports": [{"port": 81}]}])),
                spec(&selecting("b"), "egress", &json!([{"to": [pods("c")], "ports": [{"port": 81}]}])),
            ]
            .map(|spec| edit(move |o: &mut Objects| o.policy("x", "p", &spec)))
            .into(),
        ),
    ]
}

/// ClusterNetworkPolicies before, among and behind the others.
fn cluster() -> Vec<(String, Vec<Edit>)> {
    let of = |tier: &str, priority: u32, action: &str| {
        json!({
            "tier": tier, "priority": priority, "subject": {"namespaces": {"matchLabels": {"ns": "x"}}},
            "ingress": [{"action": action, "from": [{"namespaces": {"matchLabels": {"ns": "y"}}}]}],
        })
    };
    let (deny, pass, late, base) =
        (of("Admin", 10, "Deny"), of("Admin", 5, "Pass"), of("Admin", 1, "Accept"), of("Baseline", 1, "Deny"));
    let isolating =
        spec(&json!({}), "ingress", &json!([{"from": [{"namespaceSelector": {"matchLabels": {"ns": "z"}}}]}]));
    let own = isolating.clone();
    vec![
        (
            "an administrator denies, passes, accepts".to_owned(),
            vec![
                edit(move |o| o.cluster("deny", &deny)),
                edit(move |o| o.policy("x", "p", &isolating)),
                edit(move |o| o.cluster("pass", &pass)),
                edit(move |o| o.cluster("accept", &late)),
                edit(|o| o.gone(Kind::ClusterNetworkPolicy, "", "accept")),
            ],
        ),
        (
            "a baseline holds for who has no policy".to_owned(),
            vec![edit(move |o| o.cluster("base", &base)), edit(move |o| o.policy("x", "p", &own))],
        ),
    ]
}
