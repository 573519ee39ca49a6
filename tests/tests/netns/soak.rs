//! Two thousand ADDs and DELs on a pool that must grow and shrink, while every fifth call of the cloud goes wrong.
//!
//! Calls that change something are held against a minimum: the calls that carried an effect. One with a `ClientToken` carries its effect
//! once, however often it is repeated; any other carries one with each success that is not the
//! repetition of one whose reply was lost. What exceeds the minimum is what
//! faults and haste cost: a refused call, the repetition of one whose reply was lost. The first is bounded by 1.3 times the minimum and
//! what chance adds; what no fault explains, by a twentieth of it.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use terway_proto::v1::StatusResponse;
use terway_sim::cloud::{CallRecord, Fault, FaultKind};
use terway_sim::cluster::Cluster;
use terway_sim::node::Node;
use terway_sim::node::cni::Pod;

use super::audit::cli;
use super::churn::{Random, seed};
use super::{SETTLE, agreement, with_cluster};

/// Pods that are made and deleted in one round of demand: each is an ADD and a DEL at least.
const PODS: u32 = 1000;
/// Calls with an effect that make a result meaningful. A quick machine needs more rounds for as many.
const EFFECTS: usize = 20;
/// Rounds at most.
const ROUNDS: u32 = 6;
/// Callers of the plugin at a time.
const CALLERS: u32 = 8;
/// Pods that one caller keeps, in the phases of demand.
const DEMAND: [u32; 6] = [4, 1, 3, 0, 4, 1];

/// The codes of the faults.
const FAULTS: [&str; 2] = ["Throttling", "InternalError"];

/// Every fifth call: four kinds, each with the probability that makes 20 % in all.
fn faults() -> Vec<Fault> {
    let error = |code: &str, status| FaultKind::Error { code: code.to_owned(), status };
    [error(FAULTS[0], 400), error(FAULTS[1], 500), FaultKind::LoseReply, FaultKind::Delay { ms: 200 }]
        .map(|kind| Fault { action: "*".to_owned(), nth: None, probability: Some(0.0543), times: None, kind })
        .into()
}

fn changes(call: &CallRecord) -> bool {
    !call.action.starts_with("Describe") && call.action != "metadata"
}

/// Calls that change something, and those among them that carried an effect.
fn cost(log: &[CallRecord]) -> (usize, usize) {
    let (mut tokens, mut unanswered) = (BTreeSet::new(), BTreeSet::new());
    let carried = |call: &&CallRecord| {
        if !call.code.is_empty() {
            return false;
        }
        if let Some(token) = &call.token {
            return tokens.insert((call.action.clone(), token.clone()));
        }
        let key = (call.action.clone(), call.subject.clone());
        let repeated = unanswered.remove(&key);
        if call.lost {
            unanswered.insert(key);
        }
        !repeated
    };
    let all = log.iter().filter(|call| changes(call)).count();
    (all, log.iter().filter(|call| changes(call)).filter(carried).count())
}

/// Addresses in use, by the answers that runtimes got.
#[derive(Default)]
struct Live(Mutex<BTreeSet<IpAddr>>);

impl Live {
    fn bound(&self, pod: &Pod) -> Result<()> {
        let mut live = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for ip in &pod.ips {
            ensure!(live.insert(*ip), "{ip} was given to {} while another pod has it", pod.name);
        }
        Ok(())
    }

    /// Before DEL: from then on another pod may have it.
    fn freed(&self, pod: &Pod) {
        let mut live = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for ip in &pod.ips {
            live.remove(ip);
        }
    }
}

/// One caller: makes pods until all are made, and keeps as many as the phase demands.
fn caller(
    cluster: &Cluster,
    node: &Node,
    number: u32,
    seed: u64,
    made: &AtomicU32,
    failed: &AtomicU32,
    live: &Live,
) -> Result<()> {
    let mut random = Random(seed ^ u64::from(number) << 32);
    let mut running: Vec<Pod> = Vec::new();
    loop {
        let serial = made.fetch_add(1, Ordering::Relaxed);
        // Whole rounds only, each with all phases of demand.
        if serial >= PODS * ROUNDS
            || serial >= PODS && serial.is_multiple_of(PODS) && cost(&cluster.cloud().log()).1 >= EFFECTS
        {
            made.fetch_max(PODS * ROUNDS, Ordering::Relaxed);
            break;
        }
        let phase = (serial % PODS) as usize * DEMAND.len() / PODS as usize;
        let mut pod = node.new_pod(&format!("s{serial}"))?;
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            match node.add(&mut pod) {
                Ok(_) => break,
                Err(error) if Instant::now() > deadline => return Err(error.context(format!("pod {serial}"))),
                Err(_) => {
                    failed.fetch_add(1, Ordering::Relaxed);
                    node.del(&pod)?;
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
        live.bound(&pod)?;
        running.push(pod);
        while running.len() > DEMAND[phase] as usize {
            let pod = running.swap_remove(random.below(running.len() as u64) as usize);
            live.freed(&pod);
            node.del(&pod)?;
        }
    }
    for pod in running {
        live.freed(&pod);
        node.del(&pod)?;
    }
    Ok(())
}

#[test]
fn soak_adds_and_dels_with_cloud_faults() -> Result<()> {
    let seed = seed();
    with_cluster(
        |options| {
            options.exclusive = true;
            options.nodes = 1;
            options.adapters = 5;
            options.addresses_per_adapter = 10;
            options.pool = (2, 6);
            options.cooling = 0;
            options.time_scale = 60;
            options.attach = (Duration::from_millis(50), Duration::from_millis(20));
        },
        |cluster| soak(cluster, cluster.node(1), seed),
    )
}

fn soak(cluster: &Cluster, node: &Node, seed: u64) -> Result<()> {
    cluster.cloud().set_faults(faults());
    cluster.cloud().forget_calls();
    let (made, failed, live) = (AtomicU32::new(0), AtomicU32::new(0), Live::default());
    let start = Instant::now();
    let mut most = 0;
    std::thread::scope(|scope| -> Result<()> {
        let (made, failed, live) = (&made, &failed, &live);
        let callers: Vec<_> =
            (0..CALLERS).map(|n| scope.spawn(move || caller(cluster, node, n, seed, made, failed, live))).collect();
        while callers.iter().any(|caller| !caller.is_finished()) {
            if let Ok(status) = node.status() {
                most = most.max(addresses(&status));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        callers.into_iter().try_for_each(|caller| caller.join().expect("no panic"))
    })?;
    let mut least = most;
    node.wait(SETTLE, "the pool shrinks", |node| {
        least = addresses(&node.status()?);
        ensure!(least + 15 <= most, "{least} of {most} addresses are left");
        Ok(true)
    })?;
    let elapsed = start.elapsed();
    let log = cluster.cloud().log();
    let (calls, needed) = cost(&log);
    let struck = cluster.cloud().calls().values().map(|c| c.failed + c.lost).sum::<u64>();
    println!(
        "rounds of {PODS} pods in {elapsed:?}, {} ADDs repeated; the pool had {most} addresses, then {least}; {calls} calls for {needed} effects, \
         {struck} of {} calls refused or lost",
        failed.load(Ordering::Relaxed),
        log.len()
    );
    ensure!(most >= 28, "the pool did not grow: {most}");
    ensure!(needed >= EFFECTS, "only {needed} calls had an effect: this proves nothing");
    ensure!(struck > 0, "no call went wrong");

    cluster.cloud().set_faults(Vec::new());
    node.wait(SETTLE, "no pod is left", |node| {
        let pool = node.status()?.pool.unwrap_or_default();
        ensure!(node.list_pods()?.is_empty() && pool.bound == 0 && pool.pending == 0, "{pool:?}");
        Ok(true)
    })?;
    agreement(cluster, node)?;
    node.wait(SETTLE, "cloud, store, kernel and daemon agree", |node| {
        let (exit, text) = cli(node, &["mapping"])?;
        ensure!(exit == 0, "{text}");
        Ok(true)
    })?;
    let links = node.netns().output("ip", &["-o", "link"])?;
    ensure!(!links.contains("cali"), "links of pods are left:\n{links}");
    let forced = log.iter().filter(|call| changes(call) && (call.lost || FAULTS.contains(&&*call.code))).count();
    let idle = calls.saturating_sub(needed + forced);
    println!("{forced} of the calls were struck, {idle} were neither struck nor needed");
    ensure!(idle * 20 <= needed, "{idle} calls that nothing forced, for {needed} effects: {}", listing(&log));
    // How many are struck is chance, and the square root of the calls a measure of it.
    ensure!(calls * 10 <= needed * 13 + 10 * calls.isqrt(), "{calls} calls for {needed} effects: {}", listing(&log));
    Ok(())
}

/// Addresses on the node's ENIs.
fn addresses(status: &StatusResponse) -> u32 {
    let pool = status.pool.unwrap_or_default();
    pool.idle + pool.bound + pool.cooling
}

/// The calls that changed nothing, by action and code.
fn listing(log: &[CallRecord]) -> String {
    let mut counts = std::collections::BTreeMap::new();
    for call in log.iter().filter(|call| changes(call)) {
        *counts.entry((call.action.as_str(), call.code.as_str(), call.lost)).or_insert(0) += 1;
    }
    format!("{counts:#?}")
}
