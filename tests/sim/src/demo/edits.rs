//! The checks of the demo that edit `eni-config` and disturb the cloud. They come last: afterwards the nodes are not as they were.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use serde_json::json;

use super::Report;
use crate::cloud::{AdminAction, CloudConfig, VSwitchConfig};
use crate::cluster::Cluster;
use crate::node::Node;
use crate::node::cni::Pod;
use crate::probe;

const SOON: Duration = Duration::from_secs(20);

/// A second vSwitch for pods in the nodes' zone.
pub(super) fn spare_vswitch(cloud: &mut CloudConfig) {
    let zones = cloud.vswitches.first().map(|vswitch| vswitch.zone.clone());
    if let (Some(zone), Ok(cidr_v4), Ok(cidr_v6)) = (zones, "10.0.8.0/24".parse(), "2001:db8:0:8::/64".parse()) {
        cloud.vswitches.push(VSwitchConfig { id: "vsw-more".to_owned(), zone, cidr_v4, cidr_v6: Some(cidr_v6) });
    }
}

pub(super) fn all(report: &mut Report, cluster: &Cluster) {
    let node = cluster.node(1);
    report.check("a bad edit of eni-config is refused by name and reason, and pods still come", || {
        node.write_conf(r#"{"max_pool_size": "ten"}"#)?;
        let mut told = String::new();
        node.wait(SOON, "the status tells of the bad edit", |node| {
            let problems = node.status()?.problems;
            let bad = problems.into_iter().find(|problem| problem.detail.contains("max_pool_size"));
            told = bad.map(|problem| format!("{} {}", problem.code, problem.detail)).unwrap_or_default();
            Ok(!told.is_empty())
        })?;
        delete(node, add(node, "despite")?)?;
        node.edit_conf(json!({}))?;
        node.wait(SOON, "the edit is mended", |node| {
            Ok(!node.status()?.problems.iter().any(|problem| problem.detail.contains("max_pool_size")))
        })?;
        Ok(told)
    });
    report.check(
        "an empty vSwitch is named to the pod, and an edit that adds another cures it without a restart",
        || {
            let pid = node.daemon_pid();
            cluster.cloud().apply(AdminAction::Occupy { vswitch: "vsw-pods".to_owned(), leave: 0 })?;
            let mut pods = Vec::new();
            let refusal = loop {
                ensure!(pods.len() < 100, "the vSwitch gives without end");
                let mut pod = node.new_pod(&format!("crowd-{}", pods.len()))?;
                match node.add(&mut pod) {
                    Ok(_) => pods.push(pod),
                    Err(error) => break format!("{error:#}"),
                }
            };
            ensure!(refusal.contains("TW0202") && refusal.contains("vsw-pods"), "{refusal}");
            node.edit_conf(json!({"vswitches": {zone(node)?: ["vsw-pods", "vsw-more"]}}))?;
            let cured = patiently(node, "cured")?;
            ensure!(cured.v4()?.to_string().starts_with("10.0.8."), "{:?}", cured.ips);
            probe::ping(cluster.external(), cured.v6()?, &[])?;
            ensure!(node.daemon_pid() == pid, "the daemon was restarted");
            let told = format!("TW0202 for pod {} of the node, then {}", pods.len() + 1, cured.v4()?);
            pods.push(cured);
            pods.into_iter().try_for_each(|pod| delete(node, pod))?;
            Ok(told)
        },
    );
    report.check("terway-cli compares pods with kernel, datapath and cloud, and finds no mismatch", || {
        let pod = add(node, "compared")?;
        let table = node.cli(&["mapping"])?;
        ensure!(table.contains("default/compared"), "{table}");
        delete(node, pod)?;
        Ok(String::new())
    });
}

/// The zone that the nodes are in, as their configuration names it.
fn zone(node: &Node) -> Result<String> {
    let conf = node.conf();
    let Some((zone, _)) = conf["vswitches"].as_object().and_then(|zones| zones.iter().next()) else {
        bail!("no zone in {conf}");
    };
    Ok(zone.clone())
}

fn add(node: &Node, name: &str) -> Result<Pod> {
    let mut pod = node.new_pod(name)?;
    node.add(&mut pod)?;
    Ok(pod)
}

fn delete(node: &Node, pod: Pod) -> Result<()> {
    node.del(&pod).map(drop)
}

/// As a runtime does: again until it works.
fn patiently(node: &Node, name: &str) -> Result<Pod> {
    let start = Instant::now();
    loop {
        match add(node, name) {
            Ok(pod) => return Ok(pod),
            Err(error) if start.elapsed() > SOON => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}
