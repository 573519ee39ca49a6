//! The shipped role: nothing is missing, and nothing is too much.

use anyhow::{Result, ensure};
use serde_json::Value;
use terway_core::errors::{self, Error};
use terway_core::ident::PodRef;
use terway_core::kube_writes::{NodeSettings, Reason};
use terway_sim::apiserver::DAEMON;

use super::rig::{NODE, Rig, cluster_network_policy_crd, namespace, pod};
use super::writes::Writes;

fn capacity(round: u8) -> u32 {
    100 + u32::from(round)
}

/// Makes the daemon write each thing that it writes, in each round something else.
fn provoke(rig: &Rig, writes: &Writes, round: u8) -> Result<()> {
    // Each round has another status.
    let problems = match round % 2 {
        0 => Vec::new(),
        _ => vec![Error::new(errors::NO_ADDRESS, "")],
    };
    writes.pool.set(capacity(round), 1 - u32::from(round % 2), problems);
    writes.pool.attach("web", "", [10, 0, 1, round]);
    let web = PodRef { namespace: "shop".to_owned(), name: "web".to_owned(), uid: String::new() };
    let message = format!("round {round}");
    writes.kube.record_on_pod(&web, Reason::AllocIpFailed, message.clone());
    rig.poll("the first event", || writes.kube.waiting_events() == 0)?;
    writes.kube.record_on_pod(&web, Reason::AllocIpFailed, message);
    Ok(())
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
    provoke(&rig, &writes, 0)?;
    let is_written = |number: u8| {
        let get = |what: &[&str]| rig.server.kubectl(&[&["get", "-o", "yaml"], what].concat(), "").unwrap_or_default();
        get(&["node", NODE]).contains("SufficientIP")
            && get(&["node", NODE]).contains(&format!("max-available-ip: \"{}\"", capacity(number)))
            && get(&["pod", "web", "-n", "shop"]).contains(&format!("pod-ips: 10.0.1.{number}"))
            && get(&["events", "-n", "shop"]).contains("count: 2")
    };
    rig.poll("all that is written", || is_written(0))?;
    ensure!(rig.feed.problems().is_empty(), "{:?}", rig.feed.problems());
    ensure!(writes.kube.problems().is_empty(), "{:?}", writes.kube.problems());

    let whole = role()?;
    let rules = whole["rules"].as_array().cloned().unwrap_or_default();
    ensure!(!rules.is_empty(), "the role has no rules");
    let mut round = 0;
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
                round += 1;
                provoke(&rig, &writes, round)?;
                // The API names verb, resource and subject.
                let text = format!("cannot {verb} resource \"{resource}\"");
                rig.poll(&format!("a problem `{text}`"), || {
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
        ("patch", "pods/status"),
    ] {
        ensure!(!can(verb, what), "{verb} {what}");
    }
    Ok(())
}
