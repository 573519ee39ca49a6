//! `policy`: what policies cost packets, first ones and later ones, and what their compiler takes for a big cluster and for one change in it.

mod first;
mod traffic;

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use terway_core::policy::{Compiler, Event};

use crate::figures::{Bar, Better, Figure, percentile};
use terway_oracle::large_cluster::{Cluster, PODS};

pub use first::measure as first;
pub use traffic::measure as traffic;

/// 1 000 namespaces of 100 pods and 10 policies.
const CLUSTER: Cluster = Cluster { spaces: 1000 };
/// Seconds until everything has been compiled for the first time.
const FIRST: f64 = 3.0;
/// Milliseconds from one change to its operations.
const CHANGE: f64 = 5.0;
/// Bytes of the compiler for each pod of the cluster.
const PER_POD: f64 = 1024.0;

fn figure(name: impl Into<String>, value: f64, bar: Bar) -> Figure {
    Figure { bench: "policy", name: name.into(), value, anchor: None, better: Better::Less, bars: vec![bar] }
}

/// Bytes of memory that the process has (proc_pid_statm(5): pages).
fn resident() -> Result<f64> {
    let text = fs::read_to_string("/proc/self/statm")?;
    Ok(text.split(' ').nth(1).context("/proc/self/statm has no second field")?.parse::<f64>()? * 4096.0)
}

fn feed(compiler: &mut Compiler, events: Vec<Event>) -> Duration {
    let start = Instant::now();
    events.into_iter().for_each(|event| drop(compiler.step(event)));
    start.elapsed()
}

/// Measures the compiler alone, in this thread.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn compile() -> Result<Vec<Figure>> {
    let (mut compiler, _) = Compiler::new();
    let mut spent = feed(&mut compiler, CLUSTER.rules());
    let before = resident()?;
    // Not all at once: the objects themselves must not be counted as the compiler's memory.
    for space in 0..CLUSTER.spaces {
        spent += feed(&mut compiler, CLUSTER.pods(space));
    }
    let per_pod = (resident()? - before) / (CLUSTER.spaces * PODS) as f64;
    spent += feed(&mut compiler, CLUSTER.interfaces());
    let mut figures = vec![
        figure("first_compile_s", spent.as_secs_f64(), Bar::AtMost(FIRST)),
        figure("memory_per_pod_bytes", per_pod, Bar::AtMost(PER_POD)),
    ];
    for changes in CLUSTER.changes() {
        let mut times = Vec::new();
        for event in changes.events {
            let start = Instant::now();
            let operations = compiler.step(event);
            times.push(start.elapsed().as_secs_f64() * 1e3);
            drop(operations);
            compiler.run_deferred();
        }
        figures.push(figure(format!("{}_ms", changes.kind), percentile(&times, 50.0), Bar::AtMost(CHANGE)));
    }
    Ok(figures)
}
