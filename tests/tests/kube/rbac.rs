//! The shipped role: nothing is missing, and nothing is too much.

use anyhow::{Result, ensure};
use serde_json::Value;
use terway_sim::apiserver::DAEMON;

use super::rig::{Rig, cluster_network_policy_crd};

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
    rig.follow(100)?;
    rig.wait_synced()?;
    ensure!(rig.feed.problems().is_empty(), "{:?}", rig.feed.problems());

    let whole = role()?;
    let rules = whole["rules"].as_array().cloned().unwrap_or_default();
    ensure!(!rules.is_empty(), "the role has no rules");
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
                    rules.retain(|rule| rule["resources"].as_array().is_some_and(|all| !all.is_empty()));
                });
                rig.server.apply(&[role])?;
                rig.follow_as(DAEMON, 100)?;
                // The API names verb, resource and subject.
                rig.wait_problem(&format!("cannot {verb} resource \"{resource}\""))?;
            }
        }
    }
    // Secrets and writes are not in it.
    let can = |verb: &str, what: &str| {
        rig.server
            .kubectl(&["auth", "can-i", verb, what, "--as", DAEMON.name, "-A"], "")
            .is_ok_and(|text| text.trim() == "yes")
    };
    for (verb, what) in
        [("get", "secrets"), ("list", "secrets"), ("create", "pods"), ("delete", "pods"), ("patch", "nodes")]
    {
        ensure!(!can(verb, what), "{verb} {what}");
    }
    Ok(())
}
