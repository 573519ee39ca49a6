//! The first packet of a connection between two pods that 1 000 policies select, by `BPF_PROG_TEST_RUN`: against none.

use anyhow::{Result, ensure};
use serde_json::json;
use terway_abi::{Drop, Program};
use terway_core::ident::PodRef;
use terway_core::objects::{Change, Kind, Object, Objects};
use terway_core::policy::{Compiler, Event};
use terway_daemon::bpf::Endpoint;

use crate::figures::{Bar, Better, Figure};
use crate::prog_bench::{FIRST_PORT, Stage, lowest_first, unsettle};
use crate::sandbox::Sandbox;

/// Policies, each with a rule for either direction.
const POLICIES: u16 = 1_000;
/// Nanoseconds.
const BAR: f64 = 700.0;

/// Measures on threads of their own, which enter a sandbox and end with it.
///
/// # Errors
/// When a right is missing or the kernel refuses a step.
pub fn measure() -> Result<Vec<Figure>> {
    let alone = |policies| {
        let thread = std::thread::spawn(move || run(policies));
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    };
    let (none, ruled) = (alone(0)?, alone(POLICIES)?);
    Ok(ruled
        .into_iter()
        .zip(none)
        .map(|((name, value), (_, anchor))| Figure {
            bench: "policy",
            name: format!("first_packet_{name}_ns"),
            value,
            anchor: Some(("no policy", anchor)),
            better: Better::Less,
            bars: vec![Bar::AtMost(BAR)],
        })
        .collect())
}

fn run(policies: u16) -> Result<Vec<(&'static str, f64)>> {
    let sandbox = Sandbox::enter().map_err(anyhow::Error::msg)?;
    let stage = Stage::set(&sandbox)?;
    obey(&stage, policies)?;
    // As in the benchmark `prog`: frames to this pod look like frames from `a`, so that a delivered packet can be run again.
    stage.datapath.endpoints().upsert(&Endpoint { host_mac: stage.a.pod_mac, pod_mac: stage.a.host_mac, ..stage.b })?;
    unsettle(&stage.datapath)?;
    let cases = [
        ("local_v4", "10.0.0.1", "10.0.0.2"),
        ("local_v6", "fd00::1", "fd00::2"),
        ("vpc_v4", "10.0.0.1", "10.0.9.9"),
        ("vpc_v6", "fd00::1", "fd00:9::9"),
    ];
    let mut results = Vec::new();
    for (name, from, to) in cases {
        let frame = stage.sent_by(&stage.a).ip(from, to);
        let before = drops(&stage)?;
        results.push((name, lowest_first(&stage.datapath, Program::FromPod, stage.a.host_ifindex, &frame)?));
        ensure!(drops(&stage)? == before, "{name}: packets were dropped");
    }
    Ok(results)
}

fn drops(stage: &Stage) -> Result<u64> {
    let counters = stage.datapath.counters().read()?;
    Ok(Drop::ALL.iter().map(|reason| counters.drop(*reason).packets).sum())
}

/// Puts both pods under so many policies, in which every rule means both ends but only one has the port.
fn obey(stage: &Stage, policies: u16) -> Result<()> {
    let (mut compiler, ops) = Compiler::new();
    ops.iter().try_for_each(|op| stage.datapath.policies().apply(op))?;
    let mut objects = Objects::default();
    let mut documents = Vec::new();
    for (name, addresses) in [("a", ["10.0.0.1", "fd00::1"]), ("b", ["10.0.0.2", "fd00::2"])] {
        let ips = addresses.map(|ip| json!({"ip": ip}));
        let pod = json!({"metadata": {"namespace": "x", "name": name}, "status": {"phase": "Running", "podIPs": ips}});
        documents.push((Kind::Pod, pod));
    }
    let peers =
        json!([{"podSelector": {}}, {"ipBlock": {"cidr": "10.0.9.0/24"}}, {"ipBlock": {"cidr": "fd00:9::/64"}}]);
    for n in 0..policies {
        let ports = json!([{"port": if n == policies / 2 { FIRST_PORT } else { 10_000 + 7 * n }}]);
        let spec = json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": peers, "ports": ports}], "egress": [{"to": peers, "ports": ports}]});
        let name = format!("p{n}");
        documents.push((Kind::NetworkPolicy, json!({"metadata": {"namespace": "x", "name": name}, "spec": spec})));
    }
    let mut step = |event: Event| -> Result<()> {
        let ops = compiler.step(event);
        Ok(ops.iter().try_for_each(|op| stage.datapath.policies().apply(op))?)
    };
    for (kind, document) in documents {
        let change = Change::Upsert(Box::new(Object::read(kind, &document)?));
        objects.apply(change).and_then(Event::from_applied).map_or(Ok(()), &mut step)?;
    }
    // Last, so that the rules are compiled once.
    for (endpoint, name) in [(stage.a, "a"), (stage.b, "b")] {
        let (slot, _) = stage.datapath.endpoints().reserve_slot(endpoint.host_ifindex)?;
        let pod = PodRef { namespace: "x".to_owned(), name: name.to_owned(), uid: String::new() };
        step(Event::Attach { slot, pod, addresses: endpoint.addresses })?;
    }
    Ok(())
}
