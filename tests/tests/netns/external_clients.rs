//! Services for a client outside, a host of the VPC that is no node: large payloads, backends on the nodes themselves, refusals, narrow paths,
//! and a daemon that goes away. Who is reached by whom, and seen as whom, is the matrix's subject.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use terway_sim::probe::{self, Echo, Traffic};

use super::load_balancer::{Exposed, Mirror, by_tcp, by_udp, lead_to, node_addresses};
use super::{pod, with_cluster};

/// What a change may take until packets see it.
const SOON: Duration = Duration::from_secs(5);
/// How long a client waits for an answer.
const PATIENCE: Duration = Duration::from_secs(2);

#[test]
fn external_clients_of_services() -> Result<()> {
    with_cluster(
        |_| {},
        |cluster| {
            let (n1, n2) = (cluster.node(1), cluster.node(2));
            let primary = |name| cluster.vpc().primary(name).context("no primary ENI");
            let (eni1, eni2) = (primary("n1")?, primary("n2")?);
            let (n1_ips, n2_ips) = (node_addresses(&eni1), node_addresses(&eni2));
            let (a, b) = (pod(n1, "a")?, pod(n2, "b")?);
            let mut servers = Vec::new();
            for ns in [&a.ns, &b.ns, n1.netns()] {
                servers.push((Mirror::start(ns)?, Echo::start(ns)?));
            }
            let exposed = |name, number, policy, endpoints| Exposed {
                name,
                number,
                base: 30_000 + u16::from(number) * 10,
                policy,
                endpoints,
                ranges: &[],
            };
            let on_a = || vec![(a.ips.clone(), "n1")];
            let on_b = || vec![(b.ips.clone(), "n2")];
            let near = exposed("near", 1, "Cluster", on_a());
            let far = exposed("far", 2, "Cluster", on_b());
            let near_local = exposed("near-local", 3, "Local", on_a());
            let far_local = exposed("far-local", 4, "Local", on_b());
            let host = exposed("host", 5, "Cluster", vec![(n1_ips.to_vec(), "n1")]);
            let empty = exposed("empty", 6, "Cluster", Vec::new());
            let barred = Exposed { ranges: &["192.0.2.0/24"], ..exposed("barred", 7, "Cluster", on_a()) };
            let all = [&near, &far, &near_local, &far_local, &host, &empty, &barred];
            let objects: Vec<Value> = all.iter().flat_map(|service| service.objects()).collect();
            cluster.put("services", &objects)?;
            for node in cluster.nodes() {
                node.wait(SOON, "the Services are served", |node| {
                    let listed = node.cli(&["svc", "list"])?;
                    ensure!(all.iter().all(|service| listed.contains(service.name)), "{listed}");
                    Ok(true)
                })?;
            }
            let ways: Vec<IpAddr> = all.iter().flat_map(|s| [s.balancers(), s.externals()].concat()).collect();
            lead_to(cluster, &eni1, &ways)?;

            let outside = cluster.external();
            let (me_v4, me_v6) = cluster.external_addresses();
            let me = |to: IpAddr| if to.is_ipv4() { me_v4 } else { me_v6 };
            let node = |ips: [IpAddr; 2], to: IpAddr| if to.is_ipv4() { ips[0] } else { ips[1] };
            println!("{}", n1.cli(&["svc", "list", "-o", "wide"])?);

            // By node ports of either node, and by addresses that lead to n1.
            for service in [&near, &far, &near_local, &host] {
                let by = [n1_ips, n2_ips].concat().into_iter().map(|ip| SocketAddr::new(ip, service.base + 1));
                let ways = [service.balancers(), service.externals()].concat();
                let all = by.chain(ways.into_iter().map(|ip| SocketAddr::new(ip, probe::PORT)));
                for to in all.filter(|to| service.policy == "Cluster" || !n2_ips.contains(&to.ip())) {
                    for length in [1, 1000, 300_000] {
                        probe::tcp_at(outside, to, length).context(service.name)?;
                    }
                    for length in [1, 1000, 4000] {
                        probe::udp_at(outside, to, length).context(service.name)?;
                    }
                }
            }
            // A backend that is the node itself sees the client, or the node that passed it on, as a pod does.
            for ip in [n1_ips, n2_ips].concat() {
                let passed_on = n2_ips.contains(&ip);
                let wanted = if passed_on { node(n2_ips, ip) } else { me(ip) };
                let to = SocketAddr::new(ip, host.base);
                let seen = [by_tcp(outside, to, PATIENCE)?, by_udp(outside, to, PATIENCE)?];
                ensure!(seen == [wanted; 2], "{to}: seen as {seen:?}, not {wanted}");
            }
            // Refused at once, or without a word.
            for ip in [n1_ips, empty.balancers()].concat() {
                let port = if n1_ips.contains(&ip) { empty.base } else { 80 };
                probe::refused(outside, SocketAddr::new(ip, port)).context("no endpoints")?;
            }
            for to in [SocketAddr::new(n1_ips[0], far_local.base), SocketAddr::new(barred.balancers()[1], 80)] {
                let error = by_tcp(outside, to, PATIENCE).err().with_context(|| format!("{to} answers"))?;
                let kind = error.chain().find_map(|e| e.downcast_ref::<std::io::Error>()).map(std::io::Error::kind);
                ensure!(kind == Some(std::io::ErrorKind::TimedOut), "{to}: {error:#}");
            }
            println!("{}", n1.cli(&["ct", "list", "--proto", "tcp"])?);

            // A path that is narrower than the pods believe: they must be told in their own words.
            cluster.vpc().set_mtu(&terway_core::ident::EniId::new("eni-external"), 1300)?;
            for service in [&near, &far, &host] {
                for ip in n1_ips {
                    probe::tcp_at(outside, SocketAddr::new(ip, service.base + 1), 300_000).context("narrow path")?;
                }
            }
            cluster.vpc().set_mtu(&terway_core::ident::EniId::new("eni-external"), 1500)?;

            // Connections outlive the daemon, and new ones do not need it.
            let traffic = [near.balancers(), far.balancers(), host.balancers()].concat().into_iter();
            let traffic: Vec<(IpAddr, Traffic)> =
                traffic.map(|to| Traffic::start(outside, to).map(|t| (to, t))).collect::<Result<_>>()?;
            n1.kill_daemon()?;
            by_tcp(outside, SocketAddr::new(far.balancers()[0], 80), PATIENCE).context("without a daemon")?;
            n1.start_daemon()?;
            n1.wait_ready(Duration::from_secs(20))?;
            std::thread::sleep(Duration::from_millis(1500));
            for (to, traffic) in traffic {
                let (tcp, udp) = traffic.stop().with_context(|| format!("to {to}"))?;
                ensure!(tcp.lost == 0 && udp.lost == 0, "to {to}: TCP {tcp:?}, UDP {udp:?}");
            }
            for (node, pod) in [(n1, &a), (n2, &b)] {
                node.del(pod)?;
            }
            lead_to(cluster, &eni1, &[])
        },
    )
}
