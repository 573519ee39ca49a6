//! Who reaches whom, with what, and who must not.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use terway_sim::cluster::Cluster;
use terway_sim::leftovers;
use terway_sim::netns::NetNs;
use terway_sim::node::Node;
use terway_sim::node::cni::Pod;
use terway_sim::probe::{self, Echo};

use super::{SETTLE, pod, with_cluster};

/// One end of a path.
struct End<'a> {
    name: &'a str,
    ns: &'a NetNs,
    ips: Vec<IpAddr>,
}

impl<'a> End<'a> {
    fn pod(pod: &'a Pod) -> Self {
        Self { name: &pod.name, ns: &pod.ns, ips: pod.ips.clone() }
    }

    fn node(cluster: &Cluster, node: &'a Node) -> Result<Self> {
        let primary = cluster.vpc().primary(node.name()).context("no primary ENI")?;
        let (v4, v6) = (primary.v4.first().context("no IPv4")?, primary.v6.first().context("no IPv6")?);
        Ok(Self { name: node.name(), ns: node.netns(), ips: vec![IpAddr::V4(*v4), IpAddr::V6(*v6)] })
    }
}

#[test]
fn pod_to_pod_all_protocols_and_families() -> Result<()> {
    with_cluster(
        |_| {},
        |cluster| {
            let (n1, n2) = (cluster.node(1), cluster.node(2));
            let before = [leftovers::node(n1)?, leftovers::node(n2)?];
            let pods = [pod(n1, "a")?, pod(n1, "b")?, pod(n2, "c")?];
            for pod in &pods {
                ensure!(pod.ips.len() == 2 && pod.v4().is_ok() && pod.v6().is_ok(), "{:?}", pod.ips);
            }
            let external = cluster.external_addresses();
            let mut ends: Vec<End<'_>> = pods.iter().map(End::pod).collect();
            ends.extend([End::node(cluster, n1)?, End::node(cluster, n2)?]);
            ends.push(End { name: "external", ns: cluster.external(), ips: vec![external.0, external.1] });
            let _servers: Vec<Echo> = ends.iter().map(|end| Echo::start(end.ns)).collect::<Result<_>>()?;
            let mut failures = Vec::new();
            for (i, from) in ends.iter().enumerate() {
                for to in ends.iter().enumerate().filter(|(j, _)| *j != i).map(|(_, to)| to) {
                    for ip in &to.ips {
                        for result in [
                            probe::ping(from.ns, *ip, &[]).map(drop),
                            // Two fragments; and the largest packet in one piece.
                            probe::ping(from.ns, *ip, &["-s", "2000"]).map(drop),
                            probe::ping(from.ns, *ip, &["-M", "do", "-s", if ip.is_ipv4() { "1472" } else { "1452" }])
                                .map(drop),
                            probe::tcp(from.ns, *ip, 1),
                            probe::tcp(from.ns, *ip, 300_000),
                            probe::udp(from.ns, *ip, 1),
                            probe::udp(from.ns, *ip, 20_000),
                        ] {
                            failures
                                .extend(result.err().map(|error| format!("{} to {}: {error:#}", from.name, to.name)));
                        }
                    }
                }
            }
            ensure!(failures.is_empty(), "{} paths fail:\n{}", failures.len(), failures.join("\n"));
            for pod in &pods[..2] {
                n1.check(pod)?;
                n1.del(pod)?;
            }
            n2.del(&pods[2])?;
            leftovers::wait_until_pods_removed(n1, &before[0], SETTLE)?;
            leftovers::wait_until_pods_removed(n2, &before[1], SETTLE)
        },
    )
}

#[test]
fn icmp_errors_reach_pod() -> Result<()> {
    with_cluster(
        |_| {},
        |cluster| {
            let (a, c) = (pod(cluster.node(1), "a")?, pod(cluster.node(2), "c")?);
            let eni = cluster
                .cloud()
                .enis()
                .into_iter()
                .find(|eni| c.v4().is_ok_and(|v4| eni.v4.iter().any(|own| IpAddr::V4(*own) == v4)))
                .context("no ENI has the pod's address")?;
            // A narrow path behind the far ENI: the VPC answers for it.
            cluster.vpc().set_mtu(&eni.id, 1400)?;
            let told = |ip: IpAddr, size: &str, words: &[&str]| -> Result<()> {
                let Err(error) = probe::ping(&a.ns, ip, &["-M", "do", "-s", size]) else {
                    bail!("{size} bytes passed")
                };
                let text = format!("{error:#}");
                ensure!(words.iter().any(|word| text.contains(word)), "{text}");
                Ok(())
            };
            told(c.v4()?, "1472", &["Frag needed", "message too long", "Message too long"])?;
            told(c.v6()?, "1452", &["too big", "too long"])?;
            // Path MTU discovery makes of that a connection that works.
            let _server = Echo::start(&c.ns)?;
            for ip in [c.v4()?, c.v6()?] {
                probe::tcp(&a.ns, ip, 200_000)?;
            }
            // Hop by hop, as traceroute does: somebody on the way answers, and the last hop is the pod.
            for ip in [c.v4()?, c.v6()?] {
                let mut answers = BTreeMap::new();
                for ttl in 1..=6 {
                    let hops = ttl.to_string();
                    let text = match probe::ping(&a.ns, ip, &["-t", &hops]) {
                        Ok(_) => "arrived",
                        Err(error) if format!("{error:#}").contains("exceeded") => "exceeded",
                        Err(_) => "silence",
                    };
                    answers.insert(ttl, text);
                    if text == "arrived" {
                        break;
                    }
                }
                ensure!(answers.values().any(|text| *text == "exceeded"), "{ip}: {answers:?}");
                ensure!(answers.values().next_back() == Some(&"arrived"), "{ip}: {answers:?}");
            }
            // A closed UDP port is told at once, by the pod itself and through the error's inner packet.
            drop(_server);
            for ip in [c.v4()?, c.v6()?] {
                let start = std::time::Instant::now();
                ensure!(probe::udp(&a.ns, ip, 10).is_err(), "somebody answered");
                ensure!(start.elapsed() < Duration::from_millis(1000), "no port unreachable from {ip}");
            }
            cluster.node(1).del(&a)?;
            cluster.node(2).del(&c).map(drop)
        },
    )
}

/// Drops by reason of one node.
fn drops(node: &Node) -> Result<BTreeMap<String, u64>> {
    Ok(node.status()?.datapath.unwrap_or_default().drops.into_iter().collect())
}

#[test]
fn source_address_spoofing_is_dropped() -> Result<()> {
    with_cluster(
        |_| {},
        |cluster| {
            let node = cluster.node(1);
            let (a, b, c) = (pod(node, "a")?, pod(node, "b")?, pod(cluster.node(2), "c")?);
            let primary = cluster.vpc().primary("n1").context("no primary ENI")?;
            let node_v4 = IpAddr::V4(*primary.v4.first().context("no IPv4")?);
            // Warm and legal, so that flows and neighbours are known and only the source makes the difference.
            for to in [b.v4()?, b.v6()?, c.v4()?, c.v6()?, node_v4] {
                probe::ping(&a.ns, to, &[])?;
            }
            let targets = |v4: bool| -> Result<Vec<IpAddr>> {
                Ok(if v4 { vec![b.v4()?, c.v4()?, cluster.external_addresses().0] } else { vec![b.v6()?, c.v6()?] })
            };
            let foreign: [(IpAddr, u8); 4] =
                [("10.0.7.77".parse()?, 32), ("2001:db8:0:4::7777".parse()?, 128), (b.v4()?, 32), (node_v4, 32)];
            for (address, bits) in foreign {
                let before = drops(node)?;
                a.ns.ip(&format!("addr add {address}/{bits} dev lo\n"))?;
                for to in targets(address.is_ipv4())?.into_iter().filter(|to| *to != address) {
                    let source = address.to_string();
                    ensure!(probe::ping(&a.ns, to, &["-I", &source]).is_err(), "{address} was answered by {to}");
                }
                a.ns.ip(&format!("addr del {address}/{bits} dev lo\n"))?;
                let after = drops(node)?;
                let increased: Vec<&String> = after
                    .iter()
                    .filter(|(k, v)| **v > before.get(*k).copied().unwrap_or_default())
                    .map(|(k, _)| k)
                    .collect();
                ensure!(!increased.is_empty(), "{address}: no drop was counted: {after:?}");
                println!("{address}: {increased:?}");
            }
            // A MAC that is not its own. Changing it makes the kernel forget the permanent neighbours.
            let before = drops(node)?;
            let link = a.ns.output("ip", &["-br", "link", "show", "eth0"])?;
            let own = link.split_whitespace().nth(2).context("no MAC")?;
            let neighbours = a.ns.output("ip", &["neigh", "show", "nud", "permanent"])?;
            let wear = |mac: &str| -> Result<()> {
                let restore: String = neighbours
                    .lines()
                    .map(|line| format!("neigh replace {}\n", line.replace("PERMANENT", "nud permanent")))
                    .collect();
                a.ns.ip(&format!("link set eth0 address {mac}\n{restore}"))
            };
            wear("02:00:00:00:00:66")?;
            for to in [b.v4()?, c.v6()?] {
                ensure!(probe::ping(&a.ns, to, &[]).is_err(), "a foreign MAC was answered by {to}");
            }
            let (of, after) = ("spoofed_mac", drops(node)?);
            ensure!(after.get(of) > before.get(of), "no drop was counted: {after:?}");
            wear(own)?;
            for to in [b.v4()?, c.v6()?] {
                probe::ping(&a.ns, to, &[]).context("after all that it is still itself")?;
            }
            for (node, pod) in [(node, &a), (node, &b), (cluster.node(2), &c)] {
                node.del(pod)?;
            }
            Ok(())
        },
    )
}
