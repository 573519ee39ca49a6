//! A thousand ADDs and DELs in each round of demand, on a pool that must grow and shrink, while every fifth call of the cloud goes wrong.
//!
//! Calls that change something are held against a minimum: the calls that carried an effect. One with a `ClientToken` carries its effect
//! once, however often it is repeated; any other carries one with each success that is not the
//! repetition of one whose reply was lost. What exceeds the minimum is what
//! faults and haste cost: a refused call, the repetition of one whose reply was lost. The first is bounded by 1.3 times the minimum and
//! what chance adds; what no fault explains, by a twentieth of it.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
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
/// Idle addresses of the pool: at least and at most.
const POOL: (u32, u32) = (2, 6);
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

/// What demand is now, and when the callers may stop.
#[derive(Default)]
struct Phase {
    /// Pods that were made in all phases.
    made: AtomicU32,
    /// Pods that each caller keeps.
    demand: AtomicU32,
    /// Pods that are to be made by the end of this phase: then the callers rest until the pool has followed.
    until: AtomicU32,
    /// Set when all phases are over, or a caller failed.
    over: AtomicBool,
}

/// One caller: makes pods until all phases are over, and keeps as many as the phase demands.
fn caller(node: &Node, number: u32, seed: u64, phase: &Phase, failed: &AtomicU32, live: &Live) -> Result<()> {
    let mut random = Random(seed ^ u64::from(number) << 32);
    let mut running: Vec<Pod> = Vec::new();
    while !phase.over.load(Ordering::Relaxed) {
        let demand = phase.demand.load(Ordering::Relaxed) as usize;
        while running.len() > demand {
            let pod = running.swap_remove(random.below(running.len() as u64) as usize);
            live.freed(&pod);
            node.del(&pod)?;
        }
        if running.len() == demand && phase.made.load(Ordering::Relaxed) >= phase.until.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(5));
            continue;
        }
        let serial = phase.made.fetch_add(1, Ordering::Relaxed);
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
    }
    for pod in running {
        live.freed(&pod);
        node.del(&pod)?;
    }
    Ok(())
}

/// Goes through the phases of demand: each lasts until its pods are made and the pool has followed, so that a quick machine sees as many
/// calls of the cloud as a slow one. Returns the most addresses that the pool had.
fn phases(cluster: &Cluster, node: &Node, phase: &Phase) -> Result<u32> {
    let mut most = 0;
    for _ in 0..ROUNDS {
        for (number, demand) in DEMAND.into_iter().enumerate() {
            let until = phase.made.load(Ordering::Relaxed) + PODS / DEMAND.len() as u32;
            phase.demand.store(demand, Ordering::Relaxed);
            phase.until.store(until, Ordering::Relaxed);
            let grows = number == 0 || demand > DEMAND[number - 1];
            node.wait(SETTLE, &format!("the pool follows a demand of {demand} pods by each caller"), |node| {
                let addresses = addresses(&node.status()?);
                most = most.max(addresses);
                let kept = demand * CALLERS;
                ensure!(
                    phase.over.load(Ordering::Relaxed) || phase.made.load(Ordering::Relaxed) >= until,
                    "pods are still to be made"
                );
                ensure!(!grows || addresses >= kept, "{addresses} addresses for {kept} pods");
                ensure!(grows || addresses <= kept + POOL.1, "{addresses} addresses for {kept} pods");
                Ok(true)
            })?;
            if phase.over.load(Ordering::Relaxed) {
                return Ok(most);
            }
        }
        if cost(&cluster.cloud().log()).1 >= EFFECTS {
            break;
        }
    }
    Ok(most)
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
            options.pool = POOL;
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
    let (phase, failed, live) = (Phase::default(), AtomicU32::new(0), Live::default());
    let start = Instant::now();
    let most = std::thread::scope(|scope| -> Result<u32> {
        let (phase, failed, live) = (&phase, &failed, &live);
        let call = move |number| {
            let result = caller(node, number, seed, phase, failed, live);
            phase.over.fetch_or(result.is_err(), Ordering::Relaxed);
            result
        };
        let callers: Vec<_> = (0..CALLERS).map(|number| scope.spawn(move || call(number))).collect();
        let most = phases(cluster, node, phase);
        phase.over.store(true, Ordering::Relaxed);
        callers.into_iter().try_for_each(|caller| caller.join().expect("no panic"))?;
        most
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
        "{} pods in {elapsed:?}, {} ADDs repeated; the pool had {most} addresses, then {least}; {calls} calls for {needed} effects, \
         {struck} of {} calls refused or lost",
        phase.made.load(Ordering::Relaxed),
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
