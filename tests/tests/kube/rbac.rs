//! The shipped role: nothing is missing, and nothing is too much.

use std::cell::Cell;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::Value;
use terway_core::errors::{self, Error};
use terway_core::ident::PodRef;
use terway_core::kube_writes::{NodeSettings, Reason};
use terway_sim::apiserver::DAEMON;

use super::rig::{NODE, Rig, cluster_network_policy_crd, namespace, pod};
use super::writes::Writes;

/// Makes the daemon write each thing that it writes, in each round something else.
fn provoke(writes: &Writes, round: u8) {
    writes.pool.set(100 + u32::from(round), 0, vec![Error::new(errors::NO_ADDRESS, format!("round {round}"))]);
    writes.pool.attach("web", "", [10, 0, 1, round]);
    let pod = |name: String| PodRef { namespace: "shop".to_owned(), name, uid: "u".to_owned() };
    // A new event, and one that is counted.
    writes.kube.record_on_pod(&pod(format!("p{round}")), Reason::AllocIpFailed, "no address");
    writes.kube.record_on_pod(&pod("web".to_owned()), Reason::AllocIpFailed, "no address");
}

/// The documents of the shipped manifest.
fn role() -> Result<Value> {
    let text = include_str!("../../../manifests/base/rbac.yaml");
    let documents = text.split("\n---\n").map(yaml_serde::from_str::<Value>);
    let documents = documents.collect::<Result<Vec<_>, _>>()?;
    Ok(documents.into_iter().find(|document| document["kind"] == "ClusterRole").unwrap_or_default())
}

#[test]
fn each_rule_of_the_role_is_needed_and_none_is_missing() -> Result<()> {
    let Some(mut rig) = Rig::start("kube-rbac")? else { return Ok(()) };
    rig.server.apply(&[cluster_network_policy_crd()])?;
    rig.server
        .kubectl(&["wait", "--for=condition=Established", "crd/clusternetworkpolicies.policy.networking.k8s.io"], "")?;
    rig.server.apply(&[namespace("shop"), pod("shop", "web", Some(NODE))])?;
    rig.apply_role()?;
    let settings = || NodeSettings { has_status: true, clears_network_unavailable: false, startup_taint: None };
    let writes = Writes::start(&mut rig, DAEMON, settings())?;
    rig.wait_synced()?;
    provoke(&writes, 0);
    rig.poll("the first events", || writes.kube.waiting_events() == 0)?;
    provoke(&writes, 1);
    let is_written = || {
        let get = |what: &[&str]| rig.server.kubectl(&[&["get", "-o", "yaml"], what].concat(), "").unwrap_or_default();
        get(&["node", NODE]).contains("SufficientIP")
            && get(&["node", NODE]).contains("max-available-ip: \"101\"")
            && get(&["pod", "web", "-n", "shop"]).contains("pod-ips: 10.0.1.1")
            && get(&["events", "-n", "shop"]).contains("count: 2")
    };
    rig.poll("all that is written", is_written)?;
    ensure!(rig.feed.problems().is_empty(), "{:?}", rig.feed.problems());
    ensure!(writes.kube.problems().is_empty(), "{:?}", writes.kube.problems());

    let whole = role()?;
    let rules = whole["rules"].as_array().cloned().unwrap_or_default();
    ensure!(!rules.is_empty(), "the role has no rules");
    let round = Cell::new(1_u8);
    for (number, rule) in rules.iter().enumerate() {
        for resource in rule["resources"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            for verb in rule["verbs"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                // The same role, where this verb of this resource is missing.
                let mut role = whole.clone();
                let mut lesser = rule.clone();
                lesser["resources"] = serde_json::json!([resource]);
                let verbs = rule["verbs"].as_array().into_iter().flatten().filter(|other| *other != verb);
                lesser["verbs"] = verbs.cloned().collect();
                let others = rule["resources"].as_array().into_iter().flatten().filter(|other| *other != resource);
                role["rules"][number]["resources"] = others.cloned().collect();
                let list = role["rules"].as_array_mut().into_iter();
                list.for_each(|rules| {
                    rules.push(lesser.clone());
                    let has = |rule: &Value, what: &str| rule[what].as_array().is_some_and(|all| !all.is_empty());
                    rules.retain(|rule| has(rule, "resources") && has(rule, "verbs"));
                });
                rig.server.apply(&[role])?;
                let writes = Writes::start(&mut rig, DAEMON, settings())?;
                // The API names verb, resource and subject.
                let text = format!("cannot {verb} resource \"{resource}\"");
                let provoked = Cell::new(Instant::now());
                rig.poll(&format!("a problem `{text}`"), || {
                    // Again and again: the API server takes a moment to learn of the role.
                    if provoked.get().elapsed() > Duration::from_millis(300) {
                        provoked.set(Instant::now());
                        round.set(round.get().wrapping_add(1));
                        provoke(&writes, round.get());
                    }
                    let problems = rig.feed.problems().into_iter().chain(writes.kube.problems());
                    problems.map(|problem| problem.to_string()).any(|problem| problem.contains(&text))
                })?;
            }
        }
    }
    // Secrets and further writes are not in it.
    let can = |verb: &str, what: &str| {
        rig.server
            .kubectl(&["auth", "can-i", verb, what, "--as", DAEMON.name, "-A"], "")
            .is_ok_and(|text| text.trim() == "yes")
    };
    for (verb, what) in [
        ("get", "secrets"),
        ("list", "secrets"),
        ("create", "pods"),
        ("delete", "pods"),
        ("update", "nodes"),
        ("update", "pods"),
    ] {
        ensure!(!can(verb, what), "{verb} {what}");
    }
    Ok(())
}
