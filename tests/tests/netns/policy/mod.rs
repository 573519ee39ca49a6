//! Network policies on two nodes: what packets do is what the documentation says, from a pod's first packet on, and from the moment a change
//! is acknowledged.

mod first;
mod probes;
mod scenarios;
mod stage;

use std::time::Instant;

use anyhow::{Result, ensure};
use serde_json::json;
use terway_sim::cluster::Cluster;

use self::probes::{PORTS, Probes};
use self::stage::{NAMES, NAMESPACES, Put as _, Stage};
use super::with_cluster;

/// The name of a cell for people.
fn cell(n: usize) -> String {
    let (family, protocol, port, pod) = (n % 2, n / 2 % 2, n / 4 % 2, n / 8);
    let name = format!("{}/{}", NAMESPACES[pod / NAMES.len()], NAMES[pod % NAMES.len()]);
    let protocol = if protocol == 0 { "TCP" } else { "UDP" };
    format!("{name}:{} {protocol} IPv{}", PORTS[port], if family == 0 { 4 } else { 6 })
}

/// Has everybody try to reach everybody, and compares with what the oracle says.
fn compare(stage: &Stage<'_>, probes: &mut Probes, objects: &stage::Objects, what: &str) -> Result<()> {
    let expected = stage.expected(objects)?;
    let answered = probes.probe(&expected)?;
    let mut wrong = Vec::new();
    for (from, (expected, answered)) in expected.iter().zip(&answered).enumerate() {
        for (n, (expected, answered)) in expected.iter().zip(answered).enumerate() {
            if expected != answered {
                let verdict = if *answered { "passes" } else { "is dropped" };
                wrong.push(format!("{} to {} {verdict}", cell(8 * from).split(':').next().unwrap_or(""), cell(n)));
            }
        }
    }
    if !wrong.is_empty() {
        for node in stage.cluster.nodes() {
            println!("{}", node.cli(&["drops"]).unwrap_or_default().lines().rev().take(10).collect::<Vec<_>>().join("\n"));
        }
    }
    ensure!(wrong.is_empty(), "{what}: {} of {} are wrong:\n{}", wrong.len(), 9 * 72, wrong[..wrong.len().min(40)].join("\n"));
    Ok(())
}

fn with_stage(test: impl FnOnce(&mut Stage<'_>, &mut Probes) -> Result<()>) -> Result<()> {
    with_cluster(
        |_| {},
        |cluster: &Cluster| {
            let mut stage = Stage::set(cluster)?;
            let mut probes = Probes::start(&stage.pods)?;
            test(&mut stage, &mut probes)?;
            drop(probes);
            stage.clear()
        },
    )
}

#[test]
fn a_policy_isolates_and_allows() -> Result<()> {
    with_stage(|stage, probes| {
        let mut objects = stage.base.clone();
        compare(stage, probes, &objects, "no policies")?;
        objects.policy("x", "deny", &json!({"podSelector": {"matchLabels": {"pod": "a"}}, "policyTypes": ["Ingress"]}));
        stage.publish(&objects)?;
        compare(stage, probes, &objects, "x/a is isolated")?;
        objects.policy(
            "x",
            "allow",
            &json!({
                "podSelector": {"matchLabels": {"pod": "a"}},
                "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"ns": "y"}}}], "ports": [{"port": 80}]}],
            }),
        );
        stage.publish(&objects)?;
        compare(stage, probes, &objects, "TCP 80 from y")?;
        println!("{}", stage.cluster.node(1).cli(&["policy", "list", "-o", "wide"])?);
        println!("{}", stage.cluster.node(1).cli(&["policy", "explain", "--from", "y/a", "--to", "x/a:80"])?);
        println!("{}", stage.cluster.node(1).cli(&["drops"])?.lines().last().unwrap_or_default());
        println!("{}", stage.cluster.node(1).cli(&["status"])?);
        stage.publish(&stage.base.clone())?;
        compare(stage, probes, &stage.base.clone(), "no policies again")
    })
}

#[test]
fn policies_mean_what_they_say() -> Result<()> {
    with_stage(|stage, probes| {
        let scenarios = scenarios::all(stage)?;
        let (count, start) = (scenarios.len(), Instant::now());
        let mut steps = 0;
        for (name, edits) in scenarios {
            let mut objects = stage.base.clone();
            for (number, edit) in edits.into_iter().enumerate() {
                edit(&mut objects);
                stage.publish(&objects)?;
                compare(stage, probes, &objects, &format!("{name}, step {number}"))?;
                steps += 1;
            }
        }
        println!("{count} scenarios, {steps} steps of {} probes in {:?}", 9 * 72, start.elapsed());
        Ok(())
    })
}
