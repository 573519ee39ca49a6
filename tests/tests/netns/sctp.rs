//! SCTP through Services, packet by packet, because this machine's kernel may not have it: addresses are translated there and back, ports
//! and the checksum stay as they are.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};
use terway_sim::netns::NetNs;
use terway_sim::node::cni::Pod;
use terway_sim::probe;
use terway_tests::sctp::{Chunk, Packet, Raw};

use super::load_balancer::{Exposed, lead_to, node_addresses};
use super::{pod, with_cluster};

/// What a change may take until packets see it.
const SOON: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(2);
const SILENCE: Duration = Duration::from_millis(300);

/// Answers everybody in a pod, and keeps what it saw: who asked, from which port; nothing in place of what is damaged.
struct Answerer {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Vec<(IpAddr, Option<Packet>)>>,
}

impl Answerer {
    fn start(pod: &Pod) -> Result<Self> {
        let raw = pod.ns.run(Raw::open)??;
        let stop = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut seen = Vec::new();
            while !ended.load(Ordering::Acquire) {
                seen.extend(raw.answer());
                std::thread::sleep(Duration::from_millis(1));
            }
            seen
        });
        Ok(Self { stop, thread })
    }

    fn finish(self) -> Result<Vec<(IpAddr, Option<Packet>)>> {
        self.stop.store(true, Ordering::Release);
        self.thread.join().map_err(|_panic| anyhow!("an answering thread panicked"))
    }
}

/// Opens an association from a port; whether it is answered by whom it asked, intact.
fn opens(ns: &NetNs, from: u16, to: SocketAddr, tag: u32, patience: Duration) -> Result<bool> {
    let raw = ns.run(Raw::open)??;
    let start = Instant::now();
    let mut sent = None;
    while start.elapsed() < patience {
        if sent.is_none_or(|sent: Instant| sent.elapsed() > Duration::from_millis(500)) {
            raw.send(to.ip(), &Packet::init((from, to.port()), tag))?;
            sent = Some(Instant::now());
        }
        for (source, packet) in raw.received() {
            let packet = packet.with_context(|| format!("{to}: what {source} sent is damaged"))?;
            if packet.tag != tag {
                continue;
            }
            let wanted = Packet { ports: (to.port(), from), tag, chunk: Chunk::InitAck(!tag) };
            ensure!(source == to.ip() && packet == wanted, "{to}: answered by {source} with {packet:?}");
            return Ok(true);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(false)
}

/// The Service's objects with SCTP in place of TCP, and without UDP.
fn of_sctp(service: &Exposed<'_>) -> Vec<Value> {
    let mut objects = service.objects();
    for object in &mut objects {
        let ports = if object["kind"] == "Service" { &mut object["spec"]["ports"] } else { &mut object["ports"] };
        let kept: Vec<Value> =
            ports.as_array().into_iter().flatten().filter(|port| port["protocol"] == "TCP").cloned().collect();
        *ports = kept
            .into_iter()
            .map(|mut port| {
                port["protocol"] = json!("SCTP");
                port
            })
            .collect();
    }
    objects
}

#[test]
fn sctp_through_cluster_ip_and_nodeport() -> Result<()> {
    with_cluster(
        |_| {},
        |cluster| {
            let (n1, n2) = (cluster.node(1), cluster.node(2));
            let eni1 = cluster.vpc().primary("n1").context("no primary ENI")?;
            let (a, b, c) = (pod(n1, "a")?, pod(n2, "b")?, pod(n1, "c")?);
            let service = |name, number, pod: &Pod, node| Exposed {
                name,
                number,
                base: 30_000 + u16::from(number) * 10,
                policy: "Cluster",
                endpoints: vec![(pod.ips.clone(), node)],
                ranges: &[],
            };
            let (near, far) = (service("near", 1, &a, "n1"), service("far", 2, &b, "n2"));
            cluster.put("services", &[of_sctp(&near), of_sctp(&far)].concat())?;
            for node in cluster.nodes() {
                node.wait(SOON, "the Services are served", |node| {
                    let listed = node.cli(&["svc", "list"])?;
                    ensure!(listed.contains("default/near") && listed.contains("default/far"), "{listed}");
                    Ok(true)
                })?;
            }
            lead_to(cluster, &eni1, &[near.balancers(), far.balancers()].concat())?;
            let outside = cluster.external_addresses();
            let node = node_addresses(&eni1);
            let pods = [c.v4()?, c.v6()?];
            let mut tag = 0;
            for (service, backend, via) in [(&near, &a, [outside.0, outside.1]), (&far, &b, node)] {
                let answerer = Answerer::start(backend)?;
                let mut wanted = Vec::new();
                for (ns, vips, seen) in
                    [(&c.ns, service.cluster_ips(), pods), (cluster.external(), service.balancers(), via)]
                {
                    for (vip, seen) in vips.into_iter().zip(seen) {
                        // The second packet finds the first one's flow.
                        for round in 0..2 {
                            tag += 1;
                            let to = SocketAddr::new(vip, probe::PORT);
                            let opened = opens(ns, 41_000, to, tag, PATIENCE).context(service.name)?;
                            ensure!(opened, "{} at {to} does not answer, round {round}", service.name);
                            wanted.push((seen, Some(Packet::init((41_000, probe::PORT), tag))));
                        }
                        // A port that would have to change would change the checksum, too: not served, and nobody is bothered.
                        let other = SocketAddr::new(vip, 80);
                        ensure!(!opens(ns, 41_001, other, 999_999, SILENCE)?, "{other} answers");
                    }
                }
                let mut seen = answerer.finish()?;
                // Sent again on a slow machine.
                seen.dedup();
                ensure!(seen == wanted, "{}: the pod saw {seen:#?}, not {wanted:#?}", service.name);
            }
            for (node, pod) in [(n1, &a), (n2, &b), (n1, &c)] {
                node.del(pod)?;
            }
            lead_to(cluster, &eni1, &[])
        },
    )
}
