//! A large cluster behind a real API server: what the source costs, and that changes do not wait behind lists.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::rig::{NODE, PATIENCE, Rig, namespace, pod, policy, service, slice};

/// Objects in the ladder; the figures in docs/kubernetes.md are of `TERWAY_KUBE_PODS=20000 TERWAY_KUBE_SERVICES=5000`.
fn size(variable: &str, default: usize) -> usize {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// The resident memory of this process in KiB (proc(5), VmRSS).
fn resident() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse()?)
}

#[test]
fn large_lists_are_read_in_bounded_memory_and_own_pods_do_not_wait() -> Result<()> {
    let Some(mut rig) = Rig::start("kube-scale")? else { return Ok(()) };
    let (pods, services) = (size("TERWAY_KUBE_PODS", 2_000), size("TERWAY_KUBE_SERVICES", 500));
    rig.server.apply(&[namespace("load"), policy("load", "from-peers")])?;
    let begun = Instant::now();
    let created: Vec<Value> = (0..pods)
        .map(|i| pod("load", &format!("p{i}"), Some(if i % 100 == 0 { NODE } else { "n2" })))
        .chain((0..services).flat_map(|i| {
            let vip = format!("10.96.{}.{}", 16 + i / 250, i % 250 + 1);
            let backend = format!("10.1.{}.{}", i / 250, i % 250 + 1);
            [service("load", &format!("s{i}"), &vip), slice("load", &format!("s{i}"), &[&backend])]
        }))
        .collect();
    rig.server.create(&created)?;
    println!("created {} objects in {:?}", created.len(), begun.elapsed());
    drop(created);

    let before = resident()?;
    let begun = Instant::now();
    rig.follow(20)?;
    rig.wait(|objects| objects.pods().len() >= pods.div_ceil(100))?;
    let own = begun.elapsed();
    rig.wait_synced()?;
    let all = begun.elapsed();
    rig.wait(|objects| objects.pods().len() == pods && objects.policies().len() == 1)?;
    ensure!(rig.objects().services().len() >= services && rig.objects().slices().len() >= services);
    let growth = resident()?.saturating_sub(before);
    println!("own pods after {own:?}, everything after {all:?}, {growth} KiB more");
    // A pod is some 300 bytes in the store; twice the whole JSON would be 10 KiB for each.
    let bound = 20_000 + (pods + services * 2) as u64 * 4;
    ensure!(growth < bound, "{growth} KiB for {pods} pods and {services} Services, bound {bound}");

    // A change is delivered while pods are being created.
    let more: Vec<Value> = (0..pods / 10).map(|i| pod("load", &format!("q{i}"), Some("n2"))).collect();
    let latency = std::thread::scope(|scope| -> Result<Duration> {
        let loader = scope.spawn(|| rig.server.create(&more));
        std::thread::sleep(Duration::from_millis(50));
        rig.server.apply(&[slice("load", "s0", &["10.1.200.1", "10.1.200.2"])])?;
        let begun = Instant::now();
        rig.wait(|objects| {
            objects.slices().iter().any(|(name, slice)| &*name.name == "s0-1" && slice.endpoints.len() == 2)
        })?;
        let latency = begun.elapsed();
        loader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok(latency)
    })?;
    println!("one change after {latency:?}");
    ensure!(latency < Duration::from_secs(1) * PATIENCE, "{latency:?}");
    rig.wait(|objects| objects.pods().len() == pods + pods / 10)
}
