//! A pod's first packets, and changes while packets flow: what is forbidden does not pass, not once.

use std::collections::BTreeMap;
use std::net::{Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use terway_sim::node::cni::Pod;

use super::stage::{Objects, Put as _, Stage, pod_object};
use crate::with_cluster;

/// Where packets are counted by their first four bytes.
const PORT: u16 = 9;

/// Pods that are started while they send, on each node.
const RACERS: usize = 14;

/// Longer than any packet is on its way.
const REST: Duration = Duration::from_millis(200);

/// Counts datagrams by their mark until it is stopped.
struct Sink {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<BTreeMap<u32, u32>>,
}

impl Sink {
    fn start(pod: &Pod) -> Result<Self> {
        let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, PORT));
        let socket = pod.ns.run(|| UdpSocket::bind(any))??;
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut seen = BTreeMap::new();
            let mut buffer = [0; 16];
            loop {
                match socket.recv(&mut buffer) {
                    Ok(4) => {
                        *seen.entry(u32::from_be_bytes([buffer[0], buffer[1], buffer[2], buffer[3]])).or_default() += 1;
                    }
                    Ok(_) => {}
                    Err(_) if ended.load(Ordering::Acquire) => return seen,
                    Err(_) => {}
                }
            }
        });
        Ok(Self { stop, thread })
    }

    fn finish(self) -> BTreeMap<u32, u32> {
        std::thread::sleep(REST);
        self.stop.store(true, Ordering::Release);
        self.thread.join().unwrap_or_default()
    }
}

/// Sends to both addresses of a pod as fast as it can, from before it has a network until it is stopped.
fn shout(pod: &Pod, to: &[SocketAddr], mark: u32, stop: &Arc<AtomicBool>) {
    let (to, stop) = (to.to_vec(), Arc::clone(stop));
    drop(pod.ns.spawn(move || {
        let sockets: Vec<_> =
            to.iter().map(|to| UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })).collect();
        while !stop.load(Ordering::Acquire) {
            for (socket, to) in sockets.iter().zip(&to) {
                // Until there is a network it is unreachable.
                let _ = socket.as_ref().map(|socket| socket.send_to(&mark.to_be_bytes(), to));
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }));
}

fn places(pod: &Pod) -> Vec<SocketAddr> {
    pod.ips.iter().map(|ip| SocketAddr::new(*ip, PORT)).collect()
}

#[test]
fn a_pod_is_isolated_before_its_first_packet() -> Result<()> {
    with_cluster(
        |_| {},
        |cluster| {
            let mut stage = Stage::set(cluster)?;
            // Nobody in x may send, whatever its labels; y is free.
            let mut objects = stage.base.clone();
            objects.policy("x", "deny", &json!({"podSelector": {}, "policyTypes": ["Egress"]}));
            let numbers: Vec<usize> = (0..2 * RACERS).collect();
            // Of every second pod the object is known before its network exists, of the others it never is.
            for n in numbers.iter().filter(|n| *n % 2 == 0) {
                let name = format!("r{n}");
                objects.pod("x", &name, pod_object("x", &name, &json!({"racer": "yes"}), &[]));
            }
            stage.publish(&objects)?;
            // One on each node.
            let sinks = [&stage.pods[6], &stage.pods[7]].map(|(_, pod)| Sink::start(pod));
            let to: Vec<SocketAddr> =
                [&stage.pods[6], &stage.pods[7]].iter().flat_map(|(_, pod)| places(pod)).collect();
            let stop = Arc::new(AtomicBool::new(false));
            let added: Vec<Result<(usize, Pod)>> = std::thread::scope(|scope| {
                let works: Vec<_> = [1, 2]
                    .map(|node| {
                        let (to, stop, numbers) = (&to, &stop, &numbers);
                        scope.spawn(move || {
                            let mine = numbers.iter().filter(move |n| *n / 2 % 2 == node - 1);
                            mine.map(|n| {
                                let mut pod = cluster.node(node).new_pod(&format!("r{n}"))?;
                                // Some may speak, so that it is known that silence is not for want of a network.
                                "x".clone_into(&mut pod.namespace);
                                shout(&pod, to, *n as u32, stop);
                                cluster.node(node).add(&mut pod)?;
                                Ok((node, pod))
                            })
                            .collect::<Vec<_>>()
                        })
                    })
                    .into();
                works.into_iter().flat_map(|work| work.join().unwrap_or_default()).collect()
            });
            let added: Vec<(usize, Pod)> = added.into_iter().collect::<Result<_>>()?;
            let free = stage.add(1, "y", "free")?;
            shout(&free, &to, 1_000_000, &stop);
            std::thread::sleep(REST);
            stop.store(true, Ordering::Release);
            std::thread::sleep(REST);
            for sink in sinks {
                let seen = sink?.finish();
                ensure!(seen.keys().eq([&1_000_000]), "packets leaked, or none passed: {seen:?}");
            }
            let held = cluster.node(1).status()?.problems;
            ensure!(held.iter().any(|problem| problem.code == "TW0508"), "{held:?}");
            for (node, pod) in added.iter().chain([&(1, free)]) {
                cluster.node(*node).del(pod)?;
            }
            stage.clear()
        },
    )
}

#[test]
fn what_is_acknowledged_holds_for_every_packet() -> Result<()> {
    with_cluster(
        |_| {},
        |cluster| {
            let mut stage = Stage::set(cluster)?;
            let base = stage.base.clone();
            let mut denied = base.clone();
            denied.policy(
                "x",
                "deny",
                &json!({"podSelector": {"matchLabels": {"pod": "a"}}, "policyTypes": ["Egress"]}),
            );
            let sinks = [Sink::start(&stage.pods[6].1)?, Sink::start(&stage.pods[7].1)?];
            let to: Vec<SocketAddr> = [6, 7].iter().flat_map(|n| places(&stage.pods[*n].1)).collect();
            // Even numbers: nothing forbids it, and that was acknowledged; 3 modulo 4: forbidden, acknowledged; 1 modulo 4: changing.
            let phase = Arc::new(AtomicU32::new(0));
            let stop = Arc::new(AtomicBool::new(false));
            let sent = {
                let (phase, stop) = (Arc::clone(&phase), Arc::clone(&stop));
                stage.pods[0].1.ns.spawn(move || -> BTreeMap<u32, u32> {
                    let mut sent = BTreeMap::new();
                    let sockets: Vec<_> = to
                        .iter()
                        .map(|to| UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }))
                        .collect();
                    while !stop.load(Ordering::Acquire) {
                        for (socket, to) in sockets.iter().zip(&to) {
                            let mark = phase.load(Ordering::SeqCst);
                            if socket.as_ref().is_ok_and(|socket| socket.send_to(&mark.to_be_bytes(), to).is_ok()) {
                                *sent.entry(mark).or_default() += 1;
                            }
                        }
                        std::thread::sleep(Duration::from_micros(100));
                    }
                    sent
                })
            };
            let change = |stage: &mut Stage<'_>, objects: &Objects, now: u32| -> Result<()> {
                std::thread::sleep(Duration::from_millis(20));
                phase.fetch_or(1, Ordering::SeqCst);
                // Who has read the old number has sent by then.
                std::thread::sleep(Duration::from_millis(20));
                stage.publish(objects)?;
                phase.store(now, Ordering::SeqCst);
                Ok(())
            };
            let rounds = 25;
            for round in 0..rounds {
                change(&mut stage, &denied, 4 * round + 3)?;
                // From forbidden to changing: its number must not be that of what is forbidden.
                std::thread::sleep(Duration::from_millis(20));
                phase.store(4 * round + 5, Ordering::SeqCst);
                change(&mut stage, &base, 4 * round + 4)?;
            }
            std::thread::sleep(REST);
            stop.store(true, Ordering::Release);
            let sent = sent.join().map_err(|_panic| anyhow::anyhow!("the sender panicked"))??;
            let mut seen: BTreeMap<u32, u32> = BTreeMap::new();
            for sink in sinks {
                for (mark, count) in sink.finish() {
                    *seen.entry(mark).or_default() += count;
                }
            }
            let (mut forbidden, mut allowed) = (0, 0);
            for (mark, count) in &sent {
                let arrived = seen.get(mark).copied().unwrap_or(0);
                if mark % 4 == 3 {
                    forbidden += count;
                    ensure!(
                        arrived == 0,
                        "{arrived} of {count} packets passed after the change that forbids them ({mark})"
                    );
                } else if mark % 2 == 0 {
                    allowed += count;
                    ensure!(arrived == *count, "{arrived} of {count} packets passed that nothing forbids ({mark})");
                }
            }
            println!("{rounds} changes: {forbidden} packets forbidden, {allowed} allowed");
            ensure!(forbidden > 1000 && allowed > 1000, "too few: {forbidden}, {allowed}");
            stage.clear()
        },
    )
}
