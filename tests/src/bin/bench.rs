//! `cargo xtask bench [NAME] [--json]`: what it costs, against what a user would take instead.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use terway_sim::cluster::{Cluster, Options};
use terway_tests::bench::{self, add, ipam, path, policy, prog, svc};
use terway_tests::figures::Figure;

/// Measures; exit code 1 when a bar is missed.
#[derive(Debug, Parser)]
struct Cli {
    /// Which benchmark; all of them if not given.
    #[arg(value_enum)]
    name: Option<Name>,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Name {
    /// The plugin, from exec to exit.
    Add,
    /// Addresses: a cold node, a decision, an ADD without the plugin.
    Ipam,
    /// Pod to pod.
    Path,
    /// Network policies: packets under them, and their compiler.
    Policy,
    /// The programs alone.
    Prog,
    /// Services.
    Svc,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(cli: &Cli) -> Result<bool> {
    let wanted = |name| cli.name.is_none_or(|only| only == name);
    if !cli.json {
        println!(
            "{:6} {:34} {:>14} {:18} {:>14} {:>8}  bar",
            "bench", "figure", "value", "anchor", "anchor value", "ratio"
        );
    }
    let mut met = true;
    let mut show = |figures: Vec<Figure>| {
        for figure in figures {
            met &= figure.met();
            if cli.json {
                println!("{}", figure.json());
            } else {
                println!("{figure}");
            }
        }
    };
    if wanted(Name::Prog) {
        show(prog::measure()?);
    }
    if wanted(Name::Add) {
        let cluster = Cluster::start(&warm("ipv4")?)?;
        let node = cluster.node(1);
        wait_for_idle(node, 60)?;
        let reference = add::Reference::create(&format!("{}-ptp", cluster.prefix()))?;
        show(add::measure(node, &reference)?);
        drop(reference);
        cluster.finish()?;

        let cluster = Cluster::start(&warm("dual")?)?;
        let node = cluster.node(1);
        wait_for_idle(node, 60)?;
        show(add::measure_dual(node)?);
        show(add::footprint(node, 100)?);
        cluster.finish()?;
    }
    if wanted(Name::Ipam) {
        show(ipam::step()?);
        let cluster = Cluster::start(&ipam::cold_node()?)?;
        show(ipam::cold(&cluster)?);
        cluster.finish()?;
        let cluster = Cluster::start(&warm("ipv4")?)?;
        wait_for_idle(cluster.node(1), 60)?;
        show(ipam::warm(cluster.node(1))?);
        cluster.finish()?;
    }
    if wanted(Name::Svc) {
        let cluster = Cluster::start(&bench::one_node("info")?)?;
        show(svc::sync::measure(cluster.node(1))?);
        cluster.finish()?;

        let cluster = Cluster::start(&svc::traffic::node()?)?;
        let node = cluster.node(1);
        let mut pods = [node.new_pod("client")?, node.new_pod("near")?, node.new_pod("behind")?];
        for pod in &mut pods {
            node.add(pod)?;
        }
        let [client, near, behind] = &pods;
        let mut traffic = svc::traffic::Traffic::create(node, client, near, behind, cluster.prefix())?;
        for size in svc::traffic::SIZES {
            show(traffic.measure(size)?);
        }
        drop(traffic);
        for pod in &pods {
            node.del(pod)?;
        }
        drop(pods);
        cluster.finish()?;
    }
    if wanted(Name::Policy) {
        show(policy::compile()?);
        show(policy::first()?);
        let cluster = Cluster::start(&bench::one_node("warn")?)?;
        show(policy::traffic(cluster.node(1))?);
        cluster.finish()?;
    }
    if wanted(Name::Path) {
        let mut options = Options::exclusive()?;
        options.nodes = 2;
        options.log = "warn".to_owned();
        let cluster = Cluster::start(&options)?;
        let routed = path::Routed::create(&format!("{}-raw", cluster.prefix()))?;
        let mut pods = Vec::new();
        for (node, name) in [(1, "client"), (1, "near"), (2, "far")] {
            let node = cluster.node(node);
            let mut pod = node.new_pod(name)?;
            node.add(&mut pod)?;
            pods.push(pod);
        }
        if let [client, near, far] = pods.as_slice() {
            show(path::measure(&path::paths(client, near, far)?, &routed)?);
            cluster.node(1).del(client)?;
            cluster.node(1).del(near)?;
            cluster.node(2).del(far)?;
        }
        drop(routed);
        drop(pods);
        cluster.finish()?;
    }
    Ok(met)
}

/// One node with a pool that never runs dry while pods come and go one at a time, however long addresses cool.
fn warm(ip_stack: &'static str) -> Result<Options> {
    let mut options = Options::exclusive()?;
    options.nodes = 1;
    options.ip_stack = ip_stack;
    options.pool = (60, 120);
    options.addresses_per_adapter = 60;
    options.cooling = 1;
    Ok(options)
}

fn wait_for_idle(node: &terway_sim::node::Node, count: u32) -> Result<()> {
    node.wait(std::time::Duration::from_secs(60), "the pool is warm", |node| {
        Ok(node.status()?.pool.is_some_and(|pool| pool.idle >= count))
    })
}
