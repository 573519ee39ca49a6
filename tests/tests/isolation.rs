//! What the suites do stays inside their namespaces: the machine's own network is the same before, during and after.

use anyhow::{Result, ensure};
use terway_sim::cluster::{Cluster, Options};
use terway_sim::leftovers;

#[test]
fn machine_is_unchanged_by_a_cluster() -> Result<()> {
    let options = Options::new()?;
    if let Some(obstacle) = Cluster::obstacle(&options) {
        println!("SKIP: {obstacle}");
        return Ok(());
    }
    let before = leftovers::machine("tw-of-nobody")?;
    let cluster = Cluster::start(&options)?;
    let node = cluster.node(1);
    let mut pod = node.new_pod("a")?;
    node.add(&mut pod)?;
    // Names of ours are left out of both, since during the run they are there.
    let during = leftovers::machine("tw-of-nobody")?;
    ensure!(before.differences(&during).is_none(), "{}", before.differences(&during).unwrap_or_default());
    // No way out: not even the machine's own addresses are known inside.
    let routes = cluster.vpc().netns().output("ip", &["-4", "route", "show", "default"])?;
    ensure!(routes.trim().starts_with("blackhole"), "{routes}");
    node.del(&pod)?;
    cluster.finish()?;
    let after = leftovers::machine("tw-of-nobody")?;
    ensure!(before.differences(&after).is_none(), "{}", before.differences(&after).unwrap_or_default());
    Ok(())
}
