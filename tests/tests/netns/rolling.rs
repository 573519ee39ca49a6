//! An application and the cluster's DNS are rolled out anew, again and again, and nobody notices.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use terway_sim::cluster::Cluster;
use terway_sim::leftovers;
use terway_sim::node::cni::Pod;
use terway_sim::probe::{self, Echo};

use super::{SETTLE, pod, with_cluster};

/// How long it goes on.
const DURATION: Duration = Duration::from_secs(30);
/// A pod is replaced this often.
const EVERY: Duration = Duration::from_secs(1);
/// How long a pod that ends still answers after its endpoint is gone: a `preStop` sleep, shorter than which no cluster is without loss,
/// whatever its network: others learn of the end later.
const GRACE: Duration = Duration::from_millis(1500);
/// How long a client waits for an answer. It does not ask twice.
const ANSWER: Duration = Duration::from_millis(800);
/// Clients, each with a source port that it keeps.
const CLIENTS: u16 = 16;
const FIRST_PORT: u16 = 41_000;

fn vips() -> [IpAddr; 2] {
    [IpAddr::from([10, 96, 9, 1]), IpAddr::from([0xfd96, 0, 0, 0, 0, 0, 9, 1])]
}

/// A pod behind the Service, and how Kubernetes calls its state.
struct Backend {
    pod: Pod,
    node: usize,
    server: Echo,
    ending: bool,
}

impl Backend {
    fn start(cluster: &Cluster, number: usize) -> Result<Self> {
        let node = number % 2 + 1;
        let pod = pod(cluster.node(node), &format!("web{number}"))?;
        let server = Echo::start(&pod.ns)?;
        Ok(Self { pod, node, server, ending: false })
    }

    fn end(self, cluster: &Cluster) -> Result<()> {
        drop(self.server);
        cluster.node(self.node).del(&self.pod).map(drop)
    }
}

/// The Service with one port for UDP and TCP, as DNS has, and its slices.
fn objects(backends: &[Backend]) -> Value {
    let ports = |more: Value| {
        ["UDP", "TCP"].map(|protocol| {
            let mut port = json!({"name": protocol.to_lowercase(), "protocol": protocol});
            if let (Some(port), Some(more)) = (port.as_object_mut(), more.as_object()) {
                port.extend(more.clone());
            }
            port
        })
    };
    let slice = |vip: &IpAddr| {
        let family = if vip.is_ipv4() { "IPv4" } else { "IPv6" };
        let endpoints = backends.iter().filter_map(|backend| {
            let address = backend.pod.ips.iter().find(|ip| ip.is_ipv4() == vip.is_ipv4())?;
            let conditions = json!({"ready": !backend.ending, "serving": true, "terminating": backend.ending});
            Some(json!({"addresses": [address], "nodeName": format!("n{}", backend.node), "conditions": conditions}))
        });
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
            "metadata": {
                "name": format!("dns-{}", family.to_lowercase()), "namespace": "default",
                "labels": {"kubernetes.io/service-name": "dns"},
            },
            "ports": ports(json!({"port": probe::PORT})), "endpoints": endpoints.collect::<Vec<_>>(),
        })
    };
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "dns", "namespace": "default"},
        "spec": {
            "type": "ClusterIP", "clusterIP": vips()[0], "clusterIPs": vips(), "ipFamilies": ["IPv4", "IPv6"],
            "ports": ports(json!({"port": 53, "targetPort": probe::PORT})),
        },
    });
    let [v4, v6] = &vips();
    json!({"apiVersion": "v1", "kind": "List", "items": [service, slice(v4), slice(v6)]})
}

fn publish(cluster: &Cluster, backends: &[Backend]) -> Result<()> {
    let text = objects(backends).to_string();
    for node in cluster.nodes() {
        let fresh = node.objects_dir().join("dns.new");
        std::fs::write(&fresh, &text)?;
        std::fs::rename(fresh, node.objects_dir().join("dns.json"))?;
    }
    Ok(())
}

/// What became of one client's requests.
#[derive(Debug, Default)]
struct Seen {
    sent: u64,
    failures: Vec<String>,
}

/// Sends one request after another, each from the same source port.
fn ask(to: SocketAddr, source: u16, stop: &AtomicBool) -> Result<Seen> {
    let tcp = source.is_multiple_of(2);
    let own = match to {
        SocketAddr::V4(_) => SocketAddr::from(([0; 4], source)),
        SocketAddr::V6(_) => SocketAddr::from(([0_u16; 8], source)),
    };
    let mut seen = Seen::default();
    let start = Instant::now();
    let mut taken = start;
    while !stop.load(Ordering::Acquire) {
        seen.sent += 1;
        let number = seen.sent.to_be_bytes();
        let outcome = if tcp { connection(own, to, number) } else { datagram(own, to, number) };
        // The socket before lives on for a moment in a process that was forked and has not become another program yet.
        if outcome.as_ref().is_err_and(is_taken) {
            seen.sent -= 1;
            ensure!(taken.elapsed() < ANSWER, "source port {source} stays taken");
            std::thread::sleep(Duration::from_millis(1));
            continue;
        }
        taken = Instant::now();
        if let Err(error) = outcome {
            seen.failures.push(format!("{number:?} after {:?}: {error:#}", start.elapsed()));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(seen)
}

fn is_taken(error: &anyhow::Error) -> bool {
    let code = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
    matches!(code, Some(libc::EADDRINUSE | libc::EADDRNOTAVAIL))
}

/// One short connection. It is reset at its end: a source port in TIME_WAIT could not be used again.
fn connection(own: SocketAddr, to: SocketAddr, number: [u8; 8]) -> Result<()> {
    use std::io::{Read as _, Write as _};
    let mut socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.bind(&SockAddr::from(own))?;
    socket.connect_timeout(&SockAddr::from(to), ANSWER).context("connect")?;
    socket.set_read_timeout(Some(ANSWER))?;
    socket.write_all(&number)?;
    let mut answer = [0; 8];
    socket.read_exact(&mut answer).context("answer")?;
    ensure!(answer == number, "the answer is {answer:?}");
    Ok(socket.set_linger(Some(Duration::ZERO))?)
}

/// One datagram there and one back, by a socket of its own as resolvers do.
fn datagram(own: SocketAddr, to: SocketAddr, number: [u8; 8]) -> Result<()> {
    let socket = std::net::UdpSocket::bind(own)?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(ANSWER))?;
    socket.send(&number)?;
    let mut answer = [0; 8];
    let length = socket.recv(&mut answer).context("answer")?;
    ensure!(length == 8 && answer == number, "the answer is {answer:?}");
    Ok(())
}

/// Replaces a pod a second until the time is over: the new one is ready first, then the old one ends, then its endpoint goes, then it does.
fn roll(cluster: &Cluster, backends: &mut Vec<Backend>) -> Result<usize> {
    let (start, mut number) = (Instant::now(), backends.len());
    let mut leaving = VecDeque::new();
    while start.elapsed() < DURATION {
        let turn = Instant::now();
        backends.push(Backend::start(cluster, number)?);
        number += 1;
        publish(cluster, backends)?;
        if let Some(oldest) = backends.first_mut() {
            oldest.ending = true;
        }
        publish(cluster, backends)?;
        std::thread::sleep(EVERY / 4);
        let oldest = backends.remove(0);
        publish(cluster, backends)?;
        leaving.push_back((Instant::now(), oldest));
        while let Some((_, backend)) = leaving.pop_front_if(|(since, _)| since.elapsed() >= GRACE) {
            backend.end(cluster)?;
        }
        std::thread::sleep(EVERY.saturating_sub(turn.elapsed()));
    }
    std::thread::sleep(GRACE);
    leaving.into_iter().try_for_each(|(_, backend)| backend.end(cluster))?;
    Ok(number)
}

#[test]
fn rolling_update_of_application_and_dns() -> Result<()> {
    with_cluster(
        |options| {
            options.pool = (6, 30);
            // Dead entries are collected every second, among them those of an address that a new pod gets.
            options.time_scale = 30;
            options.conf = json!({"conntrack_gc_interval": "1s", "bpf_ct_timeout_tcp_fin": "1s"});
        },
        |cluster| {
            let before: Vec<_> = cluster.nodes().iter().map(leftovers::node).collect::<Result<_>>()?;
            let clients = [pod(cluster.node(1), "c")?, pod(cluster.node(2), "d")?];
            let mut backends: Vec<_> = (0..4).map(|n| Backend::start(cluster, n)).collect::<Result<_>>()?;
            publish(cluster, &backends)?;
            for client in &clients {
                for vip in vips() {
                    let to = SocketAddr::new(vip, 53);
                    cluster
                        .node(1)
                        .wait(SETTLE, "the Service answers", |_| Ok(probe::tcp_at(&client.ns, to, 1).is_ok()))?;
                }
            }

            let stop = Arc::new(AtomicBool::new(false));
            let asking: Vec<_> = (0..CLIENTS)
                .map(|i| {
                    let (pod, vip) = (&clients[usize::from(i / 2 % 2)], vips()[usize::from(i / 4 % 2)]);
                    let (stop, to) = (Arc::clone(&stop), SocketAddr::new(vip, 53));
                    (i, pod.ns.spawn(move || ask(to, FIRST_PORT + i, &stop)))
                })
                .collect();
            let rolled = roll(cluster, &mut backends)?;
            stop.store(true, Ordering::Release);
            let (mut sent, mut failures) = (0, Vec::new());
            for (i, thread) in asking {
                let seen = thread.join().map_err(|_panic| anyhow!("a client panicked"))???;
                sent += seen.sent;
                failures.extend(seen.failures.into_iter().map(|failure| format!("client {i}: {failure}")));
            }
            println!("{sent} requests while {rolled} pods came and {} went", rolled - backends.len());
            let failed = failures.len();
            if failed > 0 {
                // What became of them: a packet that a node dropped says why.
                for node in cluster.nodes() {
                    let dropped = node.cli(&["flows", "--verdict", "dropped", "--last", "40"])?;
                    failures.push(format!("{} dropped:\n{dropped}", node.name()));
                }
            }
            ensure!(failed == 0, "{failed} of {sent} requests failed:\n{}", failures.join("\n"));
            ensure!(sent > 10_000, "only {sent} requests were made");

            for backend in backends {
                backend.end(cluster)?;
            }
            for (number, client) in clients.iter().enumerate() {
                cluster.node(number + 1).del(client)?;
            }
            for (node, before) in cluster.nodes().iter().zip(&before) {
                leftovers::wait_until_pods_removed(node, before, SETTLE)?;
            }
            Ok(())
        },
    )
}
