//! The whole daemon on a node with an API server and a simulated cloud.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use terway_sim::apiserver::{ApiServer, DAEMON, Programs};
use terway_sim::cluster::{Cluster, Options};
use terway_sim::node::Node;

const ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 6));
const LIMIT: Duration = Duration::from_secs(90);

fn wait(what: &str, done: impl Fn() -> bool) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        if Instant::now() > deadline {
            bail!("waited in vain for {what}");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

#[test]
fn shortage_of_addresses_is_told_by_condition_and_events() -> Result<()> {
    let Some(programs) = Programs::find() else {
        println!("SKIP: no kube-apiserver (cargo xtask setup, or KUBEBUILDER_ASSETS)");
        return Ok(());
    };
    // One ENI with three addresses for pods.
    let options = Options {
        nodes: 1,
        adapters: 2,
        addresses_per_adapter: 3,
        pool: (0, 3),
        cooling: 0,
        time_scale: 30,
        ip_stack: "ipv4",
        ..Options::new()?
    };
    if let Some(reason) = Cluster::obstacle(&options) {
        println!("SKIP: {reason}");
        return Ok(());
    }
    let cluster = Cluster::start(&options)?;
    let outcome = tell_shortage(cluster.node(1), programs);
    cluster.finish()?;
    outcome
}

fn tell_shortage(node: &Node, programs: Programs) -> Result<()> {
    node.stop_daemon()?;
    node.netns().ip(&format!("addr add {ADDRESS}/32 dev lo\n"))?;
    let server = ApiServer::start(Arc::clone(node.netns()), ADDRESS, programs, &node.work().join("server"))?;
    server.kubectl(&["apply", "-f", "-"], include_str!("../../../manifests/base/rbac.yaml"))?;
    server.apply(&[json!({
        "apiVersion": "v1", "kind": "Node", "metadata": { "name": node.name() },
        "status": { "addresses": [{ "type": "InternalIP", "address": "10.0.0.1" }], "allocatable": { "pods": "110" } },
    })])?;
    node.set_api_server(server.kubeconfig(DAEMON)?);
    node.start_daemon()?;
    let get = |what: &[&str]| -> Result<Value> {
        Ok(serde_json::from_str(&server.kubectl(&[&["get", "-o", "json"], what].concat(), "")?)?)
    };
    let condition = |status: &str, reason: &str| {
        let node = get(&["node", node.name()]).unwrap_or_default();
        let conditions = node["status"]["conditions"].as_array().cloned().unwrap_or_default();
        conditions.iter().any(|c| c["type"] == "SufficientIP" && c["status"] == status && c["reason"] == reason)
    };
    let count = |reason: &str, kind: &str| {
        let events = get(&["events"]).unwrap_or_default();
        let events = events["items"].as_array().cloned().unwrap_or_default();
        events.iter().filter(|event| event["reason"] == reason && event["involvedObject"]["kind"] == kind).count()
    };
    wait("the condition", || condition("True", "SufficientIP"))?;
    let annotation = get(&["node", node.name()])?["metadata"]["annotations"]["k8s.aliyun.com/max-available-ip"].clone();
    let status = node.status()?;
    let capacity = status.pool.context("a pool")?.capacity.to_string();
    ensure!(annotation.as_str() == Some(&*capacity), "{annotation}");
    wait("the warning of maxPods", || {
        node.status().is_ok_and(|status| status.problems.iter().any(|problem| problem.code == "TW0603"))
    })?;
    wait("its event", || count("MaxPodsExceedCapacity", "Node") == 1)?;

    let mut pods = Vec::new();
    let mut failed = node.new_pod("last")?;
    for number in 0..10 {
        let mut pod = node.new_pod(&format!("p{number}"))?;
        if node.add(&mut pod).is_err() {
            failed = pod;
            break;
        }
        pods.push(pod);
    }
    ensure!(!pods.is_empty() && pods.len() < 10, "{} pods", pods.len());
    wait("the shortage", || condition("False", "InsufficientIP"))?;
    wait("an event on the pod that got no address", || count("AllocIPFailed", "Pod") == 1)?;
    wait("an event on the node", || count("AllocIPFailed", "Node") == 1)?;
    wait("events on the pods that got theirs", || count("AllocIPSucceed", "Pod") == pods.len())?;
    node.del(&failed)?;
    if let Some(pod) = pods.pop() {
        node.del(&pod)?;
    }
    wait("the end of the shortage", || condition("True", "SufficientIP"))?;
    for pod in pods {
        node.del(&pod)?;
    }
    node.stop_daemon().map(drop)
}

/// What `kubectl edit configmap eni-config` and the node's label do, from the API server to the pool of the running daemon.
#[test]
fn edit_of_the_config_map_reaches_the_running_daemon() -> Result<()> {
    let Some(programs) = Programs::find() else {
        println!("SKIP: no kube-apiserver (cargo xtask setup, or KUBEBUILDER_ASSETS)");
        return Ok(());
    };
    let options = Options { nodes: 1, time_scale: 30, ..Options::new()? };
    if let Some(reason) = Cluster::obstacle(&options) {
        println!("SKIP: {reason}");
        return Ok(());
    }
    let cluster = Cluster::start(&options)?;
    let outcome = follow_config_map(cluster.node(1), programs);
    cluster.finish()?;
    outcome
}

fn follow_config_map(node: &Node, programs: Programs) -> Result<()> {
    node.stop_daemon()?;
    node.netns().ip(&format!("addr add {ADDRESS}/32 dev lo\n"))?;
    let mut server = ApiServer::start(Arc::clone(node.netns()), ADDRESS, programs, &node.work().join("server"))?;
    server.kubectl(&["apply", "-f", "-"], include_str!("../../../manifests/base/rbac.yaml"))?;
    let config_map = |name: &str, eni_conf: &Value| {
        json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"namespace": "kube-system", "name": name},
            "data": {"eni_conf": eni_conf.to_string()},
        })
    };
    let node_object = |labels: Value| json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name(), "labels": labels}});
    server.apply(&[config_map("eni-config", node.eni_conf()), node_object(json!({}))])?;
    node.set_api_server(server.kubeconfig(DAEMON)?);
    node.read_config_map();
    // Its last good configuration is another, so that this one can only come from the API server.
    std::fs::remove_file(node.work().join("state/config.json"))?;
    node.start_daemon()?;
    node.wait_ready(LIMIT)?;
    let mut pod = node.new_pod("a")?;
    node.add(&mut pod)?;

    let generation = || {
        node.status().ok().and_then(|status| status.configuration).map_or(0, |configuration| configuration.generation)
    };
    let known = generation();
    let mut edited = node.eni_conf().clone();
    edited["min_pool_size"] = json!(1);
    server.apply(&[config_map("eni-config", &edited)])?;
    let start = Instant::now();
    wait("the edit", || generation() > known)?;
    println!("the edit was in force {:?} after kubectl", start.elapsed());

    // A bad edit is refused and told, and the daemon goes on with the last good one.
    let mut bad = edited.clone();
    bad["min_pool_size"] = json!("many");
    server.apply(&[config_map("eni-config", &bad)])?;
    let failure = || node.status().ok()?.configuration?.failure;
    wait("the refusal", || failure().is_some_and(|failure| failure.detail.contains("min_pool_size")))?;
    server.apply(&[config_map("eni-config", &edited)])?;
    wait("the end of the refusal", || failure().is_none())?;

    // The node's own ConfigMap, by its label; without the API server the daemon starts with what it had.
    let known = generation();
    server.apply(&[
        config_map("special", &json!({"min_pool_size": 2})),
        node_object(json!({"terway-config": "special"})),
    ])?;
    wait("the node's own configuration", || generation() > known)?;
    server.kill()?;
    node.stop_daemon()?;
    node.start_daemon()?;
    wait("a start without the API server", || node.status().is_ok_and(|status| status.ready))?;
    let problems = node.status()?.problems;
    ensure!(problems.iter().any(|problem| problem.code == "TW0403"), "the outage is told: {problems:?}");
    node.check(&pod)?;
    server.restart()?;
    wait("the API server", || node.status().is_ok_and(|status| status.problems.is_empty()))?;
    node.del(&pod)?;
    node.stop_daemon()
}
