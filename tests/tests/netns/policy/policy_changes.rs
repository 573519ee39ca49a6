//! Changes while packets flow: what is forbidden does not pass, not once, and what is allowed is not lost.

use std::collections::BTreeMap;
use std::net::{Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use terway_sim::node::cni::Pod;

use super::stage::{Objects, Put as _, Stage};
use crate::with_cluster;

/// Where packets are counted by their mark.
pub(super) const PORT: u16 = 9;

/// Longer than any packet is on its way.
pub(super) const REST: Duration = Duration::from_millis(200);

/// Counts a datagram by its mark: four bytes, all that it has.
pub(super) fn count(seen: &mut BTreeMap<u32, u32>, datagram: &[u8]) {
    if let Ok(mark) = datagram.try_into() {
        *seen.entry(u32::from_be_bytes(mark)).or_default() += 1;
    }
}

/// Counts datagrams by their mark until it is stopped.
pub(super) struct Sink {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<BTreeMap<u32, u32>>,
}

impl Sink {
    pub(super) fn start(pod: &Pod, port: u16) -> Result<Self> {
        let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let socket = pod.ns.run(|| UdpSocket::bind(any))??;
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut seen = BTreeMap::new();
            let mut buffer = [0; 16];
            loop {
                match socket.recv(&mut buffer) {
                    Ok(length) => count(&mut seen, &buffer[..length]),
                    Err(_) if ended.load(Ordering::Acquire) => return seen,
                    Err(_) => {}
                }
            }
        });
        Ok(Self { stop, thread })
    }

    pub(super) fn finish(self) -> BTreeMap<u32, u32> {
        std::thread::sleep(REST);
        self.stop.store(true, Ordering::Release);
        self.thread.join().unwrap_or_default()
    }
}

/// A port of a pod, at each of its addresses.
pub(super) fn places(pod: &Pod, port: u16) -> Vec<SocketAddr> {
    pod.ips.iter().map(|ip| SocketAddr::new(*ip, port)).collect()
}

#[test]
fn policy_changes_under_traffic() -> Result<()> {
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
            let sinks = [Sink::start(&stage.pods[6].1, PORT)?, Sink::start(&stage.pods[7].1, PORT)?];
            let to: Vec<SocketAddr> = [6, 7].iter().flat_map(|n| places(&stage.pods[*n].1, PORT)).collect();
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
