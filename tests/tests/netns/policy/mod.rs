//! Network policies on two nodes: what packets do is what the documentation says, from a pod's first packet on, and from the moment a change
//! is acknowledged.

mod enforcement_switch;
mod flow_events;
mod pod_start;
mod policy_changes;
mod probes;
mod scenarios;
mod stage;

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;
use terway_core::objects::Kind;
use terway_sim::cluster::{Cluster, Options};
use terway_sim::node::ServiceSpec;
use terway_sim::probe::{self, Echo, Traffic};

use self::probes::{PORTS, Probes};
use self::stage::{NAMES, NAMESPACES, Put as _, Stage};
use super::panics::restarted;
use super::with_cluster;

/// What a change may take; some hundred times what it takes.
const SOON: Duration = Duration::from_secs(20);

/// What each pod is asked by each: ports, protocols, families.
const CELLS: usize = 2 * 3 * 2;

/// The name of a cell for people.
fn cell(n: usize) -> String {
    let (family, protocol, port, pod) = (n % 2, n / 2 % 3, n / 6 % 2, n / CELLS);
    let name = format!("{}/{}", NAMESPACES[pod / NAMES.len()], NAMES[pod % NAMES.len()]);
    let protocol = ["TCP", "UDP", "SCTP"][protocol];
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
                wrong.push(format!("{} to {} {verdict}", cell(CELLS * from).split(':').next().unwrap_or(""), cell(n)));
            }
        }
    }
    if !wrong.is_empty() {
        for node in stage.cluster.nodes() {
            println!(
                "{}",
                node.cli(&["drops"]).unwrap_or_default().lines().rev().take(10).collect::<Vec<_>>().join("\n")
            );
        }
    }
    ensure!(
        wrong.is_empty(),
        "{what}: {} of {} are wrong:\n{}",
        wrong.len(),
        9 * 9 * CELLS,
        wrong[..wrong.len().min(40)].join("\n")
    );
    Ok(())
}

fn with_stage(test: impl FnOnce(&mut Stage<'_>, &mut Probes) -> Result<()>) -> Result<()> {
    with_stage_of(|_| {}, test)
}

fn with_stage_of(
    configure: impl FnOnce(&mut Options),
    test: impl FnOnce(&mut Stage<'_>, &mut Probes) -> Result<()>,
) -> Result<()> {
    with_cluster(configure, |cluster: &Cluster| {
        let mut stage = Stage::set(cluster)?;
        let mut probes = Probes::start(&stage.pods)?;
        test(&mut stage, &mut probes)?;
        drop(probes);
        stage.clear()
    })
}

#[test]
fn policy_isolation_and_allow_rules() -> Result<()> {
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
fn policy_scenarios_against_oracle() -> Result<()> {
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
        println!("{count} scenarios, {steps} steps of {} probes in {:?}", 9 * 9 * CELLS, start.elapsed());
        Ok(())
    })
}

/// A Service in front of a pod: its backend's policies hold, with the client as it is; and what goes on through a change goes on unbroken.
#[test]
fn policy_behind_services() -> Result<()> {
    with_stage(|stage, _| {
        let backend = |number: usize| {
            let (node, pod) = &stage.pods[number];
            (pod.ips.clone(), format!("n{node}"))
        };
        let vips = [IpAddr::from([10, 96, 0, 9]), IpAddr::from([0xfd96, 0, 0, 0, 0, 0, 0, 9])];
        let service = ServiceSpec {
            name: "web".to_owned(),
            cluster_ips: vips.to_vec(),
            ports: vec![(probe::PORT, probe::PORT)],
            // On either node, and both are the same policies' business.
            endpoints: vec![backend(0), backend(1)],
        };
        let _servers = [Echo::start(&stage.pods[0].1.ns)?, Echo::start(&stage.pods[1].1.ns)?];
        for node in stage.cluster.nodes() {
            node.put_service(&service)?;
            node.wait(SOON, "the Service is served", |node| {
                Ok(node.cli(&["svc", "list"])?.matches("2/2").count() >= 4)
            })?;
        }
        let friend = |role: &str| {
            json!({
                "podSelector": {},
                "ingress": [{
                    "from": [{"namespaceSelector": {"matchLabels": {"ns": "y"}}, "podSelector": {"matchLabels": {"role": role}}}],
                    "ports": [{"port": probe::PORT}, {"port": probe::PORT, "protocol": "UDP"}],
                }],
            })
        };
        let mut objects = stage.base.clone();
        objects.label("y", "a", &json!({"pod": "a", "role": "friend"}));
        objects.label("y", "b", &json!({"pod": "b", "role": "friend"}));
        objects.policy("x", "guard", &friend("friend"));
        stage.publish(&objects)?;
        let mut traffic = Vec::new();
        for client in [3, 4] {
            for vip in vips {
                traffic.push(Traffic::start(&stage.pods[client].1.ns, vip)?);
            }
        }
        for vip in vips {
            ensure!(probe::udp(&stage.pods[6].1.ns, vip, 10).is_err(), "a stranger gets through the Service");
        }
        // Changes of all kinds that do not affect the friends: each makes the policy verdict of every flow stale.
        for round in 0..20 {
            match round % 4 {
                0 => objects.policy("x", "other", &json!({"podSelector": {}, "ingress": [{"ports": [{"port": 1}]}]})),
                1 => objects.policy("y", "out", &json!({"podSelector": {}, "egress": [{}], "policyTypes": ["Egress"]})),
                2 => objects.gone(Kind::NetworkPolicy, "x", "other"),
                _ => objects.gone(Kind::NetworkPolicy, "y", "out"),
            }
            stage.publish(&objects)?;
            std::thread::sleep(Duration::from_millis(20));
        }
        for traffic in traffic {
            let (tcp, udp) = traffic.stop()?;
            println!("TCP {tcp:?}, UDP {udp:?}");
            ensure!(tcp.lost == 0 && udp.lost == 0, "TCP {tcp:?}, UDP {udp:?}");
        }
        objects.policy("x", "guard", &friend("foe"));
        stage.publish(&objects)?;
        for vip in vips {
            ensure!(probe::udp(&stage.pods[3].1.ns, vip, 10).is_err(), "who is no friend any more gets through");
        }
        for node in stage.cluster.nodes() {
            node.remove_service("web")?;
        }
        Ok(())
    })
}

/// Neither the end of a daemon nor its start opens or closes anything, and what changed meanwhile holds when it is back.
#[test]
fn policy_survives_daemon_restart() -> Result<()> {
    with_stage(|stage, probes| {
        let mut objects = stage.base.clone();
        objects.policy("x", "deny", &json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}));
        objects.policy("y", "some", &json!({
            "podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"ns": "z"}}}], "ports": [{"protocol": "UDP"}]}],
        }));
        stage.publish(&objects)?;
        compare(stage, probes, &objects, "before")?;
        for round in 0..4 {
            for node in stage.cluster.nodes() {
                if round % 2 == 0 { node.stop_daemon()? } else { node.kill_daemon()? }
            }
            compare(stage, probes, &objects, "without a daemon")?;
            for node in stage.cluster.nodes() {
                node.start_daemon()?;
            }
            // While they start, nothing is different for a moment.
            for _ in 0..10 {
                compare(stage, probes, &objects, "while the daemons start")?;
            }
            for node in stage.cluster.nodes() {
                node.wait_ready(SOON)?;
            }
            stage.reconnect()?;
            if round == 2 {
                objects.gone(Kind::NetworkPolicy, "x", "deny");
            }
            stage.publish(&objects)?;
            compare(stage, probes, &objects, "with other daemons")?;
        }
        Ok(())
    })
}

/// The policy actor builds its compiler anew from the objects and the maps: nothing opens or closes meanwhile, and what it was writing is written.
#[test]
fn policy_survives_panics_of_its_actor() -> Result<()> {
    with_stage_of(
        |options| options.panics = true,
        |stage, probes| {
            let mut objects = stage.base.clone();
            objects.policy("x", "deny", &json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}));
            stage.publish(&objects)?;
            compare(stage, probes, &objects, "before")?;
            for round in 1..=3 {
                for node in stage.cluster.nodes() {
                    node.inject_panic("policies")?;
                }
                compare(stage, probes, &objects, "while the actor restarts")?;
                for node in stage.cluster.nodes() {
                    restarted(node, "policies", 2 * round - 1)?;
                    node.inject_panic("policy-step")?;
                }
                match round {
                    1 => objects.gone(Kind::NetworkPolicy, "x", "deny"),
                    2 => objects.policy("y", "some", &json!({
                        "podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"ns": "z"}}}]}],
                    })),
                    _ => objects.label("z", "a", &json!({"pod": "a", "role": "friend"})),
                }
                stage.publish(&objects)?;
                for node in stage.cluster.nodes() {
                    restarted(node, "policies", 2 * round)?;
                }
                compare(stage, probes, &objects, &format!("after round {round}"))?;
            }
            Ok(())
        },
    )
}
