//! A big cluster, seen from one node, and the kinds of changes that happen to it. For the measure of size this is the world of the bar: 1 000
//! namespaces with 100 pods and 10 policies each, 200 pods of this node.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use serde_json::{Value, json};
use terway_core::ident::{Addresses, PodRef};
use terway_core::objects::{Kind, Object, ObjectName};
use terway_core::policy::Event;

/// Pods of each namespace.
pub const PODS: usize = 100;
const POLICIES: usize = 10;
/// Namespaces of which this node has pods.
const HERE: usize = 50;
const LOCALS: u32 = 200;

/// A cluster of so many namespaces.
#[derive(Clone, Copy, Debug)]
pub struct Cluster {
    /// Namespaces.
    pub spaces: usize,
}

/// One kind of change, some times over.
pub struct Changes {
    /// Which kind.
    pub kind: &'static str,
    /// The changes, in their order.
    pub events: Vec<Event>,
}

fn read(kind: Kind, document: &Value) -> Event {
    match Object::read(kind, document) {
        Ok(Object::Namespace(o)) => Event::Namespace(Arc::clone(&o.meta.object.name), Some(Arc::new(o))),
        Ok(Object::Pod(o)) => Event::Pod(o.meta.object.clone(), Some(Arc::new(o))),
        Ok(Object::NetworkPolicy(o)) => Event::NetworkPolicy(o.meta.object.clone(), Some(Arc::new(o))),
        Ok(Object::ClusterNetworkPolicy(o)) => Event::ClusterNetworkPolicy(o.meta.object.clone(), Some(Arc::new(o))),
        other => unreachable!("{document} is no object of the cluster: {other:?}"),
    }
}

fn address(space: usize, n: usize) -> Ipv4Addr {
    Ipv4Addr::from(0x0a00_0000 + (space * 128 + n) as u32 + 1)
}

fn namespace(space: usize, team: usize) -> Event {
    let labels = json!({"team": format!("t{team}"), "stage": if space.is_multiple_of(3) { "prod" } else { "test" }});
    read(Kind::Namespace, &json!({"metadata": {"name": format!("ns{space}"), "labels": labels}}))
}

/// Five Deployments of 19 pods and a StatefulSet of five, whose pods all have labels of their own.
fn pod(space: usize, n: usize, version: &str) -> Event {
    let app = format!("app{}", n % 5);
    let labels = if n >= 95 {
        json!({"app": "db", "statefulset.kubernetes.io/pod-name": format!("db-{n}"), "apps.kubernetes.io/pod-index": n.to_string()})
    } else {
        json!({"app": app, "pod-template-hash": format!("{:x}{space}", n % 5), "version": version,
            "app.kubernetes.io/name": app, "app.kubernetes.io/part-of": format!("s{space}"), "app.kubernetes.io/managed-by": "Helm"})
    };
    let meta = json!({"namespace": format!("ns{space}"), "name": format!("{app}-{n:05}-abcde"), "labels": labels,
        "uid": format!("{space:08x}-0000-0000-0000-{n:012x}")});
    let ports = json!([{"name": "http", "containerPort": 8080}, {"name": "metrics", "containerPort": 9090}]);
    let status = json!({"phase": "Running", "podIPs": [{"ip": address(space, n)}]});
    read(Kind::Pod, &json!({"metadata": meta, "spec": {"containers": [{"ports": ports}]}, "status": status}))
}

fn policy(space: usize, n: usize, port: u16) -> Event {
    let app = |k: usize| json!({"matchLabels": {"app": format!("app{k}")}});
    let spec = match n {
        0 => json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}),
        1..=4 => {
            json!({"podSelector": app(n), "ingress": [{"from": [{"podSelector": app(n - 1)}], "ports": [{"port": port}]}]})
        }
        5 => {
            json!({"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"team": format!("t{}", space % 50)}}}], "ports": [{"port": "http"}]}]})
        }
        6 => {
            json!({"podSelector": {}, "egress": [{"to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ns0"}}, "podSelector": app(0)}],
            "ports": [{"port": 53, "protocol": "UDP"}, {"port": 53}]}], "policyTypes": ["Egress"]})
        }
        7 => {
            json!({"podSelector": app(0), "egress": [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8", "100.64.0.0/10"]}}], "ports": [{"port": 443}]}], "policyTypes": ["Egress"]})
        }
        8 => {
            json!({"podSelector": app(1), "egress": [{"to": [{"ipBlock": {"cidr": format!("172.{}.{}.0/24", 16 + space / 256, space % 256)}}]}], "policyTypes": ["Egress"]})
        }
        _ => json!({"podSelector": {"matchExpressions": [{"key": "app", "operator": "In", "values": ["app2", "db"]}]},
            "ingress": [{"from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "app3"}}}], "ports": [{"port": 9000, "endPort": 9999}]}]}),
    };
    network_policy(space, &format!("p{n}"), &spec)
}

/// A NetworkPolicy of a namespace.
#[must_use]
pub fn network_policy(space: usize, name: &str, spec: &Value) -> Event {
    let meta = json!({"namespace": format!("ns{space}"), "name": name});
    read(Kind::NetworkPolicy, &json!({"metadata": meta, "spec": spec}))
}

fn attach(slot: u32, space: usize, n: usize) -> Event {
    let pod =
        PodRef { namespace: format!("ns{space}"), name: format!("app{}-{n:05}-abcde", n % 5), uid: String::new() };
    Event::Attach { slot, pod, addresses: Addresses { v4: Some(address(space, n)), v6: None } }
}

/// A pod that is not among those of its namespace.
fn extra(n: usize, labels: Option<&str>) -> Event {
    let Event::Pod(like, Some(pod)) = pod(7, n % 95, "1") else { unreachable!("as made above") };
    let mut pod = (*pod).clone();
    let name = ObjectName::new(&like.namespace, &format!("extra{n}"));
    pod.meta.object = name.clone();
    pod.ips = [IpAddr::from(Ipv4Addr::from(0x0aff_0000 + n as u32))].into();
    if let Some(app) = labels {
        pod.meta.labels = [("app", app)].into_iter().collect();
    }
    Event::Pod(name, Some(Arc::new(pod)))
}

fn block(cidr: &str) -> Event {
    network_policy(3, "block", &json!({"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": cidr}}]}]}))
}

impl Cluster {
    /// Namespaces and policies.
    #[must_use]
    pub fn rules(self) -> Vec<Event> {
        let policies = (0..self.spaces).flat_map(|s| (0..POLICIES).map(move |n| policy(s, n, 8080)));
        (0..self.spaces).map(|s| namespace(s, s % 50)).chain(policies).collect()
    }

    /// The pods of a namespace.
    #[must_use]
    pub fn pods(self, space: usize) -> Vec<Event> {
        (0..PODS).map(|n| pod(space, n, "1")).collect()
    }

    /// The interfaces of the pods of this node.
    #[must_use]
    pub fn interfaces(self) -> Vec<Event> {
        (0..LOCALS).map(|slot| attach(slot, slot as usize % HERE, slot as usize / HERE)).collect()
    }

    /// What happens to it, to be fed in this order.
    #[must_use]
    pub fn changes(self) -> Vec<Changes> {
        let elsewhere = self.spaces / 2;
        let admin = |n: u16| {
            let rule = json!({"action": "Deny", "from": [{"namespaces": {"matchLabels": {"stage": "test"}}}],
                "protocols": [{"tcp": {"destinationPort": {"number": 22 + n}}}]});
            let subject = json!({"namespaces": {"matchLabels": {"stage": "prod"}}});
            let spec = json!({"tier": "Admin", "priority": 1, "subject": subject, "ingress": [rule]});
            read(Kind::ClusterNetworkPolicy, &json!({"metadata": {"name": "admin"}, "spec": spec}))
        };
        let key = |key: &str| {
            let peer = json!({"podSelector": {"matchExpressions": [{"key": key, "operator": "Exists"}]}});
            network_policy(3, "key", &json!({"podSelector": {}, "ingress": [{"from": [peer]}]}))
        };
        let no_block = Event::NetworkPolicy(ObjectName::new("ns3", "block"), None);
        let keys = ["version", "app.kubernetes.io/name", "app.kubernetes.io/part-of", "app.kubernetes.io/managed-by"];
        let kinds = [
            ("new_pod_of_known_labels", (0..50).map(|n| extra(n, None)).collect()),
            ("pod_label_nobody_looks_at", (0..50).map(|n| pod(7, n, "2")).collect()),
            ("new_pod_of_new_labels", (0..50).map(|n| extra(1000 + n, Some(&format!("new{n}")))).collect()),
            ("interface", (0..50).map(|n| attach(300 + n, HERE + 10 + n as usize, 1)).collect()),
            ("interface_gone", (300..350).map(|slot| Event::Detach { slot }).collect()),
            ("policy_of_pods_here", (0..50).map(|s| policy(s, 3, 9090)).collect()),
            ("policy_of_pods_elsewhere", (0..50).map(|s| policy(elsewhere + s, 3, 9090)).collect()),
            ("namespace_labels", (0..50).map(|s| namespace(s, (s + 1) % 50)).collect()),
            ("block_outside", (0..50).map(|n| block(&format!("198.51.100.{n}/32"))).collect()),
            ("block_of_a_namespace", (0..20).map(|n| block(&format!("{}/25", address(n, 0)))).collect()),
            // At last it is gone again, or there were nothing left to forbid.
            ("block_of_all_pods", (1..8).map(|bits| block(&format!("10.0.0.0/{bits}"))).chain([no_block]).collect()),
            ("label_key_of_all_pods", keys.map(key).into()),
            ("cluster_policy_of_a_third", (0..7).map(admin).collect()),
        ];
        kinds.into_iter().map(|(kind, events)| Changes { kind, events }).collect()
    }
}
