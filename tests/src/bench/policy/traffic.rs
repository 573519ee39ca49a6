//! Two pods of one node that 0, 10 and 1 000 policies select, each selecting both ends: against two that none selects, in turns.

use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};
use terway_sim::node::Node;
use terway_sim::node::cni::Pod;

use crate::bench::path::{Turns, in_turns};
use crate::figures::{Bar, Better, Figure};
use crate::load::{Ends, Kind, PORT};

/// Policies of the namespace.
const SIZES: [usize; 3] = [0, 10, 1_000];
/// Turns of two ways, one right after the other.
const TURNS: Turns = Turns { count: 40, length: Duration::from_millis(250) };
/// What is left of the throughput. A flow's verdict stands in its entry, so there is nothing that could cost.
const LEFT: f64 = 0.98;
/// Longest time until the policies are in force.
const PATIENCE: Duration = Duration::from_secs(60);

/// One of so many policies: every one means both pods, one has the port.
fn policy(n: usize) -> Value {
    let ports = json!([{"port": if n == 0 { usize::from(PORT) } else { 20_000 + n }}]);
    let peers = json!([{"podSelector": {}}]);
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"namespace": "ruled", "name": format!("p{n}")},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": peers, "ports": ports}], "egress": [{"to": peers, "ports": ports}]},
    })
}

/// Measures on a node whose daemon watches its folder of objects; makes its own pods.
///
/// # Errors
/// When something does not carry traffic.
pub fn measure(node: &Node) -> Result<Vec<Figure>> {
    let names =
        [("bare", "bare-client"), ("bare", "bare-server"), ("ruled", "ruled-client"), ("ruled", "ruled-server")];
    let objects = names.map(|(namespace, name)| {
        json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": namespace, "name": name, "uid": format!("uid-{name}")}, "status": {"phase": "Running"}})
    });
    node.put("pods", &objects)?;
    let mut pods: Vec<Pod> = Vec::new();
    for (namespace, name) in names {
        let mut pod = node.new_pod(name)?;
        pod.namespace = namespace.to_owned();
        node.add(&mut pod)?.ok()?;
        pods.push(pod);
    }
    let ends = |client: &Pod, server: &Pod| -> Result<Ends> {
        Ok(Ends {
            client: client.ns.path().to_owned(),
            server: server.ns.path().to_owned(),
            address: server.v4()?,
            cgroup: None,
        })
    };
    let (bare, ruled) = (ends(&pods[0], &pods[1])?, ends(&pods[2], &pods[3])?);
    let mut figures = Vec::new();
    let mut rpc = node.rpc()?;
    for size in SIZES {
        node.put("policies", &(0..size).map(policy).collect::<Vec<_>>())?;
        node.wait(PATIENCE, "the policies are in force", |_| Ok(rpc.policies("ruled")?.policies.len() == size))?;
        for (kind, bar) in
            [(Kind::TcpStream, Bar::Ratio(LEFT)), (Kind::TcpRr, Bar::Ratio(LEFT)), (Kind::TcpCrr, Bar::None)]
        {
            let (value, anchor) = in_turns(kind, &ruled, &bare, TURNS)?;
            let unit = if kind == Kind::TcpStream { "bytes_per_s" } else { "per_s" };
            figures.push(Figure {
                bench: "policy",
                name: format!("policies_{size}_{}_{unit}", kind.name()),
                value,
                anchor: Some(("no policy", anchor)),
                better: Better::More,
                bars: vec![bar],
            });
        }
    }
    for pod in &pods {
        node.del(pod)?.ok()?;
    }
    Ok(figures)
}
