//! The netns rung: real plugin, real daemon and the simulated cloud on two nodes; pods are plain network namespaces.
//!
//! Every test ends by taking its cluster down, which fails if anything is left on the machine, and where pods were deleted, by comparing
//! the nodes with how they were before.
//!
//! One test at a time: on two cores, two clusters of two nodes each exceed time limits that are the daemon's own. Clusters that others started may run beside it
//! (`terway_sim::cluster`); tests that need the whole machine say `exclusive`.

mod addresses;
mod audit;
mod churn;
mod connectivity;
mod conntrack;
mod external_clients;
mod identity;
mod load_balancer;
mod matrix;
mod panics;
mod policy;
mod rolling;
mod sctp;
mod services;
mod soak;
mod sockets;
mod survival;

use std::time::Duration;

use anyhow::{Result, ensure};
use terway_sim::cluster::{Cluster, Options};
use terway_sim::leftovers::{self, Snapshot};
use terway_sim::node::Node;
use terway_sim::node::cni::Pod;

/// Long enough for background deletions and for the addresses to cool.
const SETTLE: Duration = Duration::from_secs(20);

/// Runs a test on a cluster, or says why it cannot.
fn with_cluster(change: impl FnOnce(&mut Options), test: impl FnOnce(&Cluster) -> Result<()>) -> Result<()> {
    let mut options = Options::new()?;
    change(&mut options);
    if let Some(obstacle) = Cluster::obstacle(&options) {
        println!("SKIP: {obstacle}");
        return Ok(());
    }
    let cluster = Cluster::start(&options)?;
    test(&cluster)?;
    // What a pod sent from an ENI that does not own its address would have been dropped here, unnoticed by the pod.
    let spoofed = cluster.vpc().spoofed()?;
    ensure!(spoofed.total() == 0, "the VPC dropped what did not belong to its ENI: {spoofed:?}");
    cluster.finish()
}

/// A pool that is never enlarged or reduced, so that a node can be compared with itself fact by fact.
fn fixed_pool(options: &mut Options) {
    let addresses = (options.adapters - 1) * options.addresses_per_adapter;
    options.pool = (addresses, addresses);
}

/// The state of a node without pods once its pool is filled.
fn baseline(node: &Node, idle: u32) -> Result<Snapshot> {
    node.wait(Duration::from_secs(20), "the pool is filled", |node| {
        let pool = node.status()?.pool.unwrap_or_default();
        ensure!(pool.idle >= idle && pool.pending == 0 && pool.bound == 0 && pool.cooling == 0, "{pool:?}");
        Ok(true)
    })?;
    leftovers::node(node)
}

/// A pod with its network.
fn pod(node: &Node, name: &str) -> Result<Pod> {
    let mut pod = node.new_pod(name)?;
    node.add(&mut pod)?;
    Ok(pod)
}

/// Cloud, VPC and daemon agree on which addresses a node's ENIs have.
fn agreement(cluster: &Cluster, node: &Node) -> Result<()> {
    node.wait(SETTLE, "cloud, VPC and daemon agree", |node| {
        let carried = cluster.vpc().addresses();
        let known = node.status()?.enis;
        let secondary = |name: Option<&str>| name == Some(node.name());
        let in_cloud: Vec<_> = cluster
            .cloud()
            .enis()
            .into_iter()
            .filter(|eni| secondary(eni.node.as_deref()) && eni.kind != terway_core::cloud::EniKind::Primary)
            .collect();
        ensure!(in_cloud.len() == known.len(), "cloud: {} ENIs, daemon: {}", in_cloud.len(), known.len());
        for eni in in_cloud {
            let addresses = eni.v4.len() + eni.v6.len();
            let on_wire = carried.get(&eni.id).map_or(0, std::collections::BTreeSet::len);
            ensure!(addresses == on_wire, "{}: cloud has {addresses} addresses, the VPC {on_wire}", eni.id);
            let Some(ours) = known.iter().find(|known| known.id == eni.id.as_str()) else {
                anyhow::bail!("the daemon does not know {}", eni.id)
            };
            ensure!(ours.mac == eni.mac.to_string() && !ours.ifname.is_empty(), "{ours:?} and {eni:?}");
            let pairs = eni.v4.len().max(eni.v6.len());
            ensure!(
                usize::try_from(ours.addresses)? == pairs || usize::try_from(ours.addresses)? == addresses,
                "{}: the daemon knows {} addresses, the cloud {:?} and {:?}",
                eni.id,
                ours.addresses,
                eni.v4,
                eni.v6
            );
        }
        Ok(true)
    })
}
