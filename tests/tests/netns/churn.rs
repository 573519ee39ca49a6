//! Many pods: at once, one after another, and with the power going off in between.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use terway_sim::leftovers;
use terway_sim::node::Node;
use terway_sim::node::cni::{self, Pod};
use terway_sim::probe;

use super::{SETTLE, agreement, baseline, fixed_pool, with_cluster};

/// Numbers that look random and come again with the same seed (Knuth, TAOCP 2, 3.3.4, table 1).
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

#[test]
fn churn_64_pods_in_parallel() -> Result<()> {
    with_cluster(
        |options| {
            options.exclusive = true;
            options.nodes = 1;
            options.adapters = 6;
            fixed_pool(options);
        },
        |cluster| {
            let node = cluster.node(1);
            let before = baseline(node, 64)?;
            for round in 0..2 {
                let mut pods: Vec<Pod> =
                    (0..64).map(|n| node.new_pod(&format!("p{round}-{n}"))).collect::<Result<_>>()?;
                let start = Instant::now();
                std::thread::scope(|scope| {
                    let adding: Vec<_> = pods.iter_mut().map(|pod| scope.spawn(|| node.add(pod).map(drop))).collect();
                    adding.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
                })?;
                let added = start.elapsed();
                let mut ips: Vec<_> = pods.iter().flat_map(|pod| pod.ips.clone()).collect();
                ips.sort();
                ips.dedup();
                ensure!(ips.len() == 128, "{} different addresses", ips.len());
                ensure!(node.list_pods()?.len() == 64, "{} pods are listed", node.list_pods()?.len());
                for pair in pods.windows(2) {
                    probe::ping(&pair[0].ns, pair[1].v4()?, &[])?;
                }
                let start = Instant::now();
                std::thread::scope(|scope| {
                    let deleting: Vec<_> = pods.iter().map(|pod| scope.spawn(|| node.del(pod).map(drop))).collect();
                    deleting.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
                })?;
                println!("64 at once: added in {added:?}, deleted in {:?}", start.elapsed());
                leftovers::wait_until_restored(node, &before, SETTLE)?;
            }
            agreement(cluster, node)
        },
    )
}

#[test]
fn churn_1000_pods_in_sequence() -> Result<()> {
    with_cluster(
        |options| {
            options.nodes = 1;
            options.adapters = 3;
            options.cooling = 0;
            fixed_pool(options);
        },
        |cluster| {
            let node = cluster.node(1);
            let before = baseline(node, 30)?;
            let (mut adds, mut dels) = (Vec::new(), Vec::new());
            for number in 0..1000 {
                let mut pod = node.new_pod(&format!("p{number}"))?;
                adds.push(node.add(&mut pod).with_context(|| format!("pod {number}"))?.elapsed);
                if number % 100 == 0 {
                    probe::ping(&pod.ns, cluster.external_addresses().0, &[])?;
                }
                dels.push(node.del(&pod).with_context(|| format!("pod {number}"))?.elapsed);
            }
            adds.sort();
            dels.sort();
            println!("ADD p50 {:?} p99 {:?}, DEL p50 {:?} p99 {:?}", adds[500], adds[990], dels[500], dels[990]);
            leftovers::wait_until_restored(node, &before, SETTLE)?;
            agreement(cluster, node)
        },
    )
}

/// The runtime's view of a pod whose ADD was begun.
enum Fate {
    /// ADD answered with success.
    Added(Pod),
    /// ADD failed, or nobody knows.
    Unknown(Pod),
}

fn begin(node: &Node, name: String) -> Result<Fate> {
    let mut pod = node.new_pod(&name)?;
    match node.add(&mut pod) {
        Ok(_) => Ok(Fate::Added(pod)),
        Err(_) => Ok(Fate::Unknown(pod)),
    }
}

/// `$TERWAY_SEED`, or one that changes by the second; shown, so that a failure can be had again.
pub(super) fn seed() -> u64 {
    let seed = std::env::var("TERWAY_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(1, |now| now.as_secs()));
    println!("TERWAY_SEED={seed}");
    seed
}

#[test]
fn daemon_killed_200_times_leaves_nothing() -> Result<()> {
    let mut random = Random(seed());
    with_cluster(
        |options| {
            options.nodes = 1;
            // Pods without DEL keep their address until the next start.
            options.adapters = 5;
            fixed_pool(options);
        },
        |cluster| {
            let node = cluster.node(1);
            let before = baseline(node, 60)?;
            let mut running: Vec<Pod> = Vec::new();
            let (mut plugin_kills, mut daemon_kills, mut abandoned) = (0, 0, 0);
            let start = Instant::now();
            for round in 0..200u32 {
                if round % 50 == 0 {
                    println!("round {round} after {:?}", start.elapsed());
                }
                // Releases go on in the background; a daemon that dies every second gets behind, but must catch up.
                node.wait(SETTLE, "deleted pods give their addresses back", |node| {
                    Ok(node.status()?.pool.unwrap_or_default().idle >= 8)
                })?;
                // A killed daemon costs a start; a third of the kills is enough of them.
                if random.below(3) != 0 {
                    plugin_kills += 1;
                    kill_plugin(node, round, &mut random, &mut abandoned)?;
                } else {
                    daemon_kills += 1;
                    kill_daemon(node, round, &mut random, &mut running).with_context(|| format!("round {round}"))?;
                }
                // Pods that runtimes know run on through all that.
                while running.len() > 4 {
                    let pod = running.swap_remove(random.below(running.len() as u64) as usize);
                    node.del(&pod)?;
                }
                if let Some(pod) = running.first() {
                    probe::ping(&pod.ns, cluster.external_addresses().0, &[])
                        .with_context(|| format!("round {round}"))?;
                }
            }
            println!(
                "killed the plugin {plugin_kills} times, the daemon {daemon_kills} times; {abandoned} without DEL"
            );
            for pod in &running {
                node.check(pod)?;
                node.del(pod)?;
            }
            drop(running);
            // The start frees what has no namespace any more.
            node.stop_daemon()?;
            node.start_daemon()?;
            node.wait_ready(Duration::from_secs(20))?;
            leftovers::wait_until_restored(node, &before, SETTLE)?;
            agreement(cluster, node)
        },
    )
}

/// Kills the plugin some time into an ADD or DEL; then the runtime deletes the pod, or forgets it.
fn kill_plugin(node: &Node, round: u32, random: &mut Random, abandoned: &mut u32) -> Result<()> {
    let mut pod = node.new_pod(&format!("k{round}"))?;
    let verb = if random.below(2) == 0 {
        "ADD"
    } else {
        node.add(&mut pod)?;
        "DEL"
    };
    let mut child = node.spawn_cni(verb, &pod)?;
    std::thread::sleep(Duration::from_micros(random.below(8000)));
    child.kill()?;
    child.wait()?;
    if random.below(4) == 0 {
        *abandoned += 1; // the namespace goes with the pod's name, as after a crash of the runtime
        return Ok(());
    }
    node.del(&pod).map(drop)
}

/// Kills the daemon while pods come and go, and starts it again.
fn kill_daemon(node: &Node, round: u32, random: &mut Random, running: &mut Vec<Pod>) -> Result<()> {
    let leaving = if running.is_empty() { None } else { Some(running.swap_remove(0)) };
    let delay = Duration::from_micros(random.below(12_000));
    let fates = Mutex::new(Vec::new());
    std::thread::scope(|scope| -> Result<()> {
        for n in 0..2 {
            let fates = &fates;
            scope.spawn(move || {
                let fate = begin(node, format!("d{round}-{n}"));
                fates.lock().unwrap_or_else(PoisonError::into_inner).push(fate);
            });
        }
        if let Some(pod) = &leaving {
            scope.spawn(move || node.cni("DEL", pod));
        }
        std::thread::sleep(delay);
        node.kill_daemon()?;
        // The plugins are still waiting for their answers.
        node.start_daemon()
    })?;
    node.wait_ready(Duration::from_secs(20))?;
    if let Some(pod) = &leaving {
        node.del(pod).context("a DEL that was interrupted is repeated")?;
    }
    for fate in fates.into_inner().unwrap_or_else(PoisonError::into_inner) {
        match fate? {
            Fate::Added(pod) => {
                node.check(&pod).context("a pod whose ADD succeeded is whole")?;
                running.push(pod);
            }
            Fate::Unknown(pod) => drop(node.del(&pod).context("an ADD that failed is cleared away")?),
        }
    }
    Ok(())
}

#[test]
fn finish_reads_what_a_plugin_printed() -> Result<()> {
    use std::process::{Command, Stdio};
    let child = |script: &str| {
        Command::new("sh")
            .args(["-c", script])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
    };
    let outcome = cni::finish(child("echo '{\"code\": 7}'; echo why >&2; exit 1")?, Instant::now())?;
    assert_eq!((outcome.code, outcome.json["code"].as_u64(), outcome.stderr.trim()), (1, Some(7), "why"));
    assert!(cni::finish(child("echo oops")?, Instant::now()).is_err());
    Ok(())
}
