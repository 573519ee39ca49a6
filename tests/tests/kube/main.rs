//! The object source `kube` against a real kube-apiserver and etcd, in a network namespace without a way out.

mod config;
mod manifests;
mod node;
mod rbac;
mod rig;
mod scale;
mod writes;

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use serde_json::json;
use terway_core::objects::Kind;

use self::rig::{Rig, namespace, pod, policy, service, slice};

#[test]
fn changes_arrive_within_a_second_and_are_applied_in_order() -> Result<()> {
    let Some(mut rig) = Rig::start("kube-changes")? else { return Ok(()) };
    rig.server.apply(&[
        namespace("shop"),
        service("shop", "web", "10.96.0.10"),
        slice("shop", "web", &["10.0.0.1"]),
    ])?;
    rig.follow(4)?;
    rig.wait_synced()?;
    assert!(rig.objects().services().values().any(|service| &*service.meta.object.name == "web"));
    assert!(rig.feed.problems().is_empty(), "{:?}", rig.feed.problems());
    for endpoints in [&["10.0.0.1", "10.0.0.2"][..], &["10.0.0.2"], &[]] {
        rig.server.apply(&[slice("shop", "web", endpoints)])?;
        let begun = Instant::now();
        rig.wait(|objects| {
            objects.slices().values().any(|slice| {
                slice.endpoints.len() == endpoints.len() && slice.service().is_some_and(|name| &**name == "web")
            })
        })?;
        ensure!(begun.elapsed() < Duration::from_secs(1) * rig::PATIENCE, "took {:?}", begun.elapsed());
    }
    rig.server.kubectl(&["delete", "service", "web", "-n", "shop"], "")?;
    rig.wait(|objects| objects.services().values().all(|service| &*service.meta.object.name != "web"))
}

#[test]
fn pods_of_other_nodes_are_read_while_a_policy_needs_them() -> Result<()> {
    let Some(mut rig) = Rig::start("kube-pods")? else { return Ok(()) };
    rig.server.apply(&[
        namespace("shop"),
        pod("shop", "own", Some(rig::NODE)),
        pod("shop", "other", Some("n2")),
        pod("shop", "unscheduled", None),
    ])?;
    rig.follow(100)?;
    rig.wait_synced()?;
    let names = |rig: &Rig| rig.objects().pods().keys().map(|name| name.name.to_string()).collect::<Vec<_>>();
    assert_eq!(names(&rig), ["own"]);
    rig.server.apply(&[policy("shop", "from-peers")])?;
    rig.wait(|objects| objects.policies().len() == 1)?;
    // The policy was delivered behind the pods that it needs.
    assert_eq!(names(&rig), ["other", "own", "unscheduled"]);
    rig.server.kubectl(&["delete", "networkpolicy", "from-peers", "-n", "shop"], "")?;
    rig.wait(|objects| objects.pods().len() == 1)?;
    assert_eq!(names(&rig), ["own"]);
    Ok(())
}

#[test]
fn state_stays_in_force_while_the_server_is_away_and_nothing_flaps_afterwards() -> Result<()> {
    let Some(mut rig) = Rig::start("kube-outage")? else { return Ok(()) };
    let services: Vec<_> = (1..=50).map(|i| service("default", &format!("s{i}"), &format!("10.96.1.{i}"))).collect();
    rig.server.apply(&services)?;
    rig.follow(20)?;
    rig.wait_synced()?;
    rig.wait(|objects| objects.services().len() >= 50)?;
    let before = rig.delivered();
    rig.server.kill()?;
    rig.wait_problem("API server")?;
    assert_eq!(rig.objects().services().len(), before.services, "the last state stays");
    rig.server.restart()?;
    rig.server.apply(&[service("default", "new", "10.96.2.1")])?;
    rig.server.kubectl(&["delete", "service", "s1"], "")?;
    rig.wait(|objects| {
        let has = |name: &str| objects.services().keys().any(|key| &*key.name == name);
        has("new") && !has("s1")
    })?;
    rig.wait_no_problem()?;
    // One Service came, one went; the kubernetes Service may have been written by the new server.
    let changed = rig.changed_since(&before, Kind::Service);
    let unexpected: Vec<_> =
        changed.iter().filter(|name| !["new", "s1", "kubernetes"].contains(&name.as_str())).collect();
    ensure!(unexpected.is_empty(), "flapped: {unexpected:?}");
    Ok(())
}

#[test]
fn restored_etcd_with_lower_resource_versions_is_listed_again() -> Result<()> {
    let Some(mut rig) = Rig::start("kube-reset")? else { return Ok(()) };
    let services: Vec<_> = (1..=20).map(|i| service("default", &format!("old{i}"), &format!("10.96.1.{i}"))).collect();
    rig.server.apply(&services)?;
    rig.follow(20)?;
    rig.wait_synced()?;
    rig.wait(|objects| objects.services().len() >= 20)?;
    rig.server.reset()?;
    rig.apply_role()?;
    rig.server.apply(&[service("default", "fresh", "10.96.1.1")])?;
    rig.wait(|objects| {
        let names: Vec<_> = objects.services().keys().map(|key| key.name.to_string()).collect();
        names.contains(&"fresh".to_owned()) && !names.iter().any(|name| name.starts_with("old"))
    })
}

#[test]
fn server_that_stops_answering_is_noticed_and_recovered_from() -> Result<()> {
    let Some(mut rig) = Rig::start("kube-frozen")? else { return Ok(()) };
    rig.follow(20)?;
    rig.wait_synced()?;
    rig.server.signal(Signal::SIGSTOP)?;
    let begun = Instant::now();
    // HTTP/2 pings: 15 s until one is sent, 15 s for its answer.
    rig.wait_problem("API server")?;
    ensure!(begun.elapsed() < Duration::from_secs(45) * rig::PATIENCE, "{:?}", begun.elapsed());
    rig.server.signal(Signal::SIGCONT)?;
    rig.wait_no_problem()?;
    rig.server.apply(&[service("default", "after", "10.96.1.1")])?;
    rig.wait(|objects| objects.services().keys().any(|key| &*key.name == "after"))
}

#[test]
fn custom_resource_that_appears_later_is_read_then() -> Result<()> {
    let Some(mut rig) = Rig::start("kube-crd")? else { return Ok(()) };
    rig.follow(100)?;
    rig.wait_synced()?;
    rig.server.apply(&[rig::cluster_network_policy_crd()])?;
    rig.server
        .kubectl(&["wait", "--for=condition=Established", "crd/clusternetworkpolicies.policy.networking.k8s.io"], "")?;
    let policy = json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy", "metadata": { "name": "guard" },
        "spec": { "tier": "Admin", "priority": 10, "subject": { "namespaces": {} } },
    });
    rig.server.apply(&[policy])?;
    rig.wait(|objects| objects.cluster_policies().len() == 1)?;
    assert!(rig.feed.problems().is_empty(), "{:?}", rig.feed.problems());
    Ok(())
}

#[test]
fn object_that_cannot_be_decoded_is_named_and_its_neighbours_are_served() -> Result<()> {
    let Some(mut rig) = Rig::start("kube-invalid")? else { return Ok(()) };
    rig.server.apply(&[rig::cluster_network_policy_crd()])?;
    rig.server
        .kubectl(&["wait", "--for=condition=Established", "crd/clusternetworkpolicies.policy.networking.k8s.io"], "")?;
    // The schema of the test's resource lets through what the daemon cannot use.
    let cluster_policy = |name: &str, priority: serde_json::Value| {
        json!({
            "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy", "metadata": { "name": name },
            "spec": { "tier": "Admin", "priority": priority, "subject": { "namespaces": {} } },
        })
    };
    rig.server.apply(&[cluster_policy("good", json!(1)), cluster_policy("bad", json!(2))])?;
    rig.follow(20)?;
    rig.wait(|objects| objects.cluster_policies().len() == 2)?;
    rig.server.apply(&[cluster_policy("bad", json!("first")), cluster_policy("third", json!(3))])?;
    rig.wait(|objects| objects.cluster_policies().len() == 3)?;
    rig.wait_problem("ClusterNetworkPolicy bad")?;
    let priority = |rig: &Rig| {
        rig.objects()
            .cluster_policies()
            .iter()
            .find(|(name, _)| &*name.name == "bad")
            .map(|(_, policy)| policy.priority)
    };
    assert_eq!(priority(&rig), Some(2), "the last good version stays");
    rig.server.kill()?;
    rig.server.restart()?;
    rig.server.apply(&[cluster_policy("fourth", json!(4))])?;
    rig.wait(|objects| objects.cluster_policies().len() == 4)?;
    assert_eq!(priority(&rig), Some(2), "over a new list, too");
    rig.server.apply(&[cluster_policy("bad", json!(5))])?;
    rig.wait_no_problem()?;
    assert_eq!(priority(&rig), Some(5));
    Ok(())
}
