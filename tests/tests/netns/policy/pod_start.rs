//! A pod's first packets: five hundred pods that send from before they have a network, and are sent to from the moment they have one. What
//! their policies forbid does not pass, not once, and what they allow does.

use std::collections::BTreeMap;
use std::net::{Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::json;
use terway_sim::cluster::Cluster;
use terway_sim::node::cni::Pod;

use super::SOON;
use super::policy_changes::{PORT, REST, Sink, count, places};
use super::stage::{Put as _, Stage, pod_object};
use crate::{fixed_pool, with_cluster};

/// Where everybody may send to.
const OPEN: u16 = 10;

/// Pods of one wave on each node: with those of the stage they fit into the node's addresses.
const WAVE: u32 = 50;
const WAVES: u32 = 5;

/// The marks of who sends to new pods: of one whom they must not hear, and of one whom they may.
const FOREIGN: u32 = 1_000_000;
const FRIENDLY: u32 = 2_000_000;

/// What a racer does: it sends without a pause, then with pauses, then it ends.
const RACING: u8 = 0;
const STEADY: u8 = 1;
const DONE: u8 = 2;

/// A pod that talks from before it has a network, and listens.
struct Racer {
    pod: Pod,
    mark: u32,
    pace: Pace,
    heard: JoinHandle<Result<std::io::Result<BTreeMap<u32, u32>>>>,
}

/// How a racer is told what to do. It ends with this, so that a test that failed does not leave it racing.
struct Pace(Arc<AtomicU8>);

impl Pace {
    fn set(&self, pace: u8) {
        self.0.store(pace, Ordering::Release);
    }
}

impl Drop for Pace {
    fn drop(&mut self) {
        self.set(DONE);
    }
}

impl Racer {
    fn start(pod: Pod, mark: u32, to: &[SocketAddr]) -> Self {
        let (to, pace) = (to.to_vec(), Arc::new(AtomicU8::new(RACING)));
        let asked = Arc::clone(&pace);
        let heard = pod.ns.spawn(move || {
            let ear = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, PORT))?;
            ear.set_nonblocking(true)?;
            let (v4, v6) = (UdpSocket::bind("0.0.0.0:0")?, UdpSocket::bind("[::]:0")?);
            let mut heard = BTreeMap::new();
            let mut buffer = [0; 16];
            loop {
                let pace = asked.load(Ordering::Acquire);
                for to in &to {
                    let mouth = if to.is_ipv4() { &v4 } else { &v6 };
                    // Until there is a network it is unreachable.
                    let _ = mouth.send_to(&mark.to_be_bytes(), to);
                }
                while let Ok(length) = ear.recv(&mut buffer) {
                    count(&mut heard, &buffer[..length]);
                }
                match pace {
                    RACING => std::thread::yield_now(),
                    STEADY => std::thread::sleep(Duration::from_millis(50)),
                    _ => return Ok(heard),
                }
            }
        });
        Self { pod, mark, pace: Pace(pace), heard }
    }

    /// Ends it; what it heard.
    fn finish(self) -> Result<(Pod, u32, BTreeMap<u32, u32>)> {
        self.pace.set(DONE);
        let heard = self.heard.join().map_err(|_panic| anyhow!("a racer panicked"))???;
        Ok((self.pod, self.mark, heard))
    }
}

/// Some are never known to the API server, and no policy can let them do anything. They are few, because each is waited for.
const fn is_known(mark: u32) -> bool {
    mark % 25 != 7
}

fn name(mark: u32) -> String {
    format!("r{mark}")
}

/// One wave on one node: pods that race, one after the other, while those before them talk on.
fn run(
    cluster: &Cluster,
    node: usize,
    marks: &[u32],
    to: &[SocketAddr],
    callers: &[(u32, &Pod)],
) -> Result<Vec<Racer>> {
    let node = cluster.node(node);
    let mut mouths = Vec::new();
    for (mark, caller) in callers {
        let [v4, v6] = caller.ns.run(|| ["0.0.0.0:0", "[::]:0"].map(UdpSocket::bind))?;
        mouths.push((mark.to_be_bytes(), v4?, v6?));
    }
    let mut racers: Vec<Racer> = Vec::new();
    for mark in marks {
        let mut pod = node.new_pod(&name(*mark))?;
        "x".clone_into(&mut pod.namespace);
        let mut racer = Racer::start(pod, *mark, to);
        node.add(&mut racer.pod)?;
        for at in places(&racer.pod, PORT) {
            for (mark, v4, v6) in &mouths {
                let mouth = if at.is_ipv4() { v4 } else { v6 };
                for _ in 0..3 {
                    mouth.send_to(mark, at)?;
                }
            }
        }
        racer.pace.set(STEADY);
        racers.push(racer);
    }
    Ok(racers)
}

#[test]
fn policy_isolates_500_pods_before_their_first_packet() -> Result<()> {
    with_cluster(fixed_pool, |cluster| {
        let mut stage = Stage::set(cluster)?;
        let mut objects = stage.base.clone();
        // Nobody in x may send but to one port, or hear anybody but those of z.
        objects.policy(
            "x",
            "race",
            &json!({
                "podSelector": {}, "policyTypes": ["Ingress", "Egress"],
                "egress": [{"ports": [{"protocol": "UDP", "port": OPEN}]}],
                "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"ns": "z"}}}]}],
            }),
        );
        for mark in (0..2 * WAVE * WAVES).filter(|mark| is_known(*mark)) {
            objects.pod("x", &name(mark), pod_object("x", &name(mark), &json!({"racer": "yes"}), &[]));
        }
        stage.publish(&objects)?;
        // A pod on each node, at a port that is closed and at one that is open.
        let targets = [&stage.pods[6].1, &stage.pods[7].1];
        let mut to = Vec::new();
        let mut sinks = Vec::new();
        for port in [PORT, OPEN] {
            to.extend(targets.iter().flat_map(|pod| places(pod, port)));
            sinks.push([Sink::start(targets[0], port)?, Sink::start(targets[1], port)?]);
        }
        let callers = [(FOREIGN, &stage.pods[3].1), (FRIENDLY, targets[0])];
        let start = Instant::now();
        for wave in 0..WAVES {
            for node in cluster.nodes() {
                node.wait(SOON, "the last wave's addresses are free", |node| {
                    Ok(node.status()?.pool.unwrap_or_default().idle >= WAVE)
                })?;
            }
            let racers: Vec<Vec<Racer>> = std::thread::scope(|scope| {
                let works: Vec<_> = [1, 2]
                    .map(|node: u32| {
                        let first = (2 * wave + node - 1) * WAVE;
                        let marks: Vec<u32> = (first..first + WAVE).collect();
                        let (to, callers) = (&to, &callers);
                        scope.spawn(move || run(cluster, node as usize, &marks, to, callers))
                    })
                    .into();
                works
                    .into_iter()
                    .map(|work| work.join().map_err(|_panic| anyhow!("a wave panicked"))?)
                    .collect::<Result<_>>()
            })?;
            std::thread::sleep(REST);
            let problems = cluster.node(1).status()?.problems;
            ensure!(problems.iter().any(|problem| problem.code == "TW0508"), "who is unknown is told: {problems:?}");
            std::thread::scope(|scope| {
                let works: Vec<_> = cluster
                    .nodes()
                    .iter()
                    .zip(racers)
                    .map(|(node, racers)| {
                        scope.spawn(move || -> Result<()> {
                            for racer in racers {
                                let (pod, mark, heard) = racer.finish()?;
                                let right =
                                    if is_known(mark) { heard.keys().eq([&FRIENDLY]) } else { heard.is_empty() };
                                ensure!(right, "{} heard {heard:?}", pod.name);
                                node.del(&pod)?;
                            }
                            Ok(())
                        })
                    })
                    .collect();
                works.into_iter().try_for_each(|work| work.join().map_err(|_panic| anyhow!("an end panicked"))?)
            })?;
        }
        let mut sinks = sinks.into_iter();
        let closed = sinks.next().context("no sinks")?.map(Sink::finish);
        ensure!(closed.iter().all(BTreeMap::is_empty), "packets leaked: {closed:?}");
        let open = sinks.next().context("no sinks")?.map(Sink::finish);
        let known: Vec<u32> = (0..2 * WAVE * WAVES).filter(|mark| is_known(*mark)).collect();
        for seen in &open {
            ensure!(seen.keys().eq(&known), "of {} pods {} were heard, all but: {:?}", known.len(), seen.len(), {
                known.iter().filter(|mark| !seen.contains_key(mark)).collect::<Vec<_>>()
            });
        }
        let packets: u32 = open.iter().flat_map(BTreeMap::values).sum();
        println!(
            "{} pods in {:?}; {packets} allowed packets, none that is forbidden",
            2 * WAVE * WAVES,
            start.elapsed()
        );
        stage.clear()
    })
}
