//! Services: what a pod gets behind a ClusterIP, by packets alone, on either node and in both families.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use terway_sim::cluster::Cluster;
use terway_sim::leftovers;
use terway_sim::node::ServiceSpec;
use terway_sim::node::cni::Pod;
use terway_sim::probe::{self, Echo, Traffic};

use super::{SETTLE, pod, with_cluster};

/// What a change may take until packets see it; some hundred times what it takes.
const SOON: Duration = Duration::from_secs(5);

/// A Service at 10.96.0.`number` and fd96::`number`, port 80 and the echo servers' own.
pub(super) fn service(name: &str, number: u8, endpoints: &[(&Pod, usize)]) -> ServiceSpec {
    ServiceSpec {
        name: name.to_owned(),
        cluster_ips: vips(number).to_vec(),
        ports: vec![(80, probe::PORT), (probe::PORT, probe::PORT)],
        endpoints: endpoints.iter().map(|(pod, node)| (pod.ips.clone(), format!("n{node}"))).collect(),
    }
}

pub(super) fn vips(number: u8) -> [IpAddr; 2] {
    [IpAddr::from([10, 96, 0, number]), IpAddr::from([0xfd96, 0, 0, 0, 0, 0, 0, number.into()])]
}

pub(super) fn at(number: u8, port: u16) -> [SocketAddr; 2] {
    vips(number).map(|ip| SocketAddr::new(ip, port))
}

/// Writes it on every node and waits until every node serves it with so many backends.
pub(super) fn put(cluster: &Cluster, service: &ServiceSpec) -> Result<()> {
    for node in cluster.nodes() {
        node.put_service(service)?;
    }
    let wanted = service.endpoints.len();
    for node in cluster.nodes() {
        node.wait(SOON, "the Service is served", |node| {
            let text = node.cli(&["svc", "show", &format!("default/{}", service.name), "-o", "json"])?;
            let shown: serde_json::Value = serde_json::from_str(&text)?;
            let ports = shown["ports"].as_array().context("no ports")?;
            ensure!(ports.len() == 2 * service.ports.len(), "{text}");
            for frontend in ports.iter().flat_map(|port| port["frontends"].as_array().into_iter().flatten()) {
                let (inside, port) = (&frontend["internal"], frontend["port"].as_u64());
                let backends = inside["backends"].as_array().map_or(0, Vec::len);
                ensure!(port == Some(0) || backends == wanted, "{frontend}");
            }
            Ok(true)
        })?;
    }
    Ok(())
}

#[test]
fn pods_reach_services_by_cluster_ip() -> Result<()> {
    with_cluster(
        |_| {},
        |cluster| {
            let (n1, n2) = (cluster.node(1), cluster.node(2));
            let before = [leftovers::node(n1)?, leftovers::node(n2)?];
            let (a, b) = (pod(n1, "a")?, pod(n2, "b")?);
            let clients = [pod(n1, "c")?, pod(n2, "d")?];
            let server_a = Echo::start(&a.ns)?;
            let server_b = Echo::start(&b.ns)?;
            put(cluster, &service("web", 1, &[(&a, 1), (&b, 2)]))?;
            put(cluster, &service("near", 2, &[(&a, 1)]))?;
            put(cluster, &service("far", 3, &[(&b, 2)]))?;
            put(cluster, &service("empty", 4, &[]))?;

            // One backend each, so that both ways are known to have been taken.
            for client in &clients {
                for to in [at(1, 80), at(2, 80), at(3, 80), at(3, probe::PORT)].concat() {
                    for length in [1, 1000, 300_000] {
                        probe::tcp_at(&client.ns, to, length)?;
                    }
                    for length in [1, 1000] {
                        probe::udp_at(&client.ns, to, length)?;
                    }
                }
                for to in [at(1, 81), at(4, 80)].concat() {
                    probe::refused(&client.ns, to).context("a port without endpoints")?;
                }
            }
            // Both to themselves: as the only backend, and as one of two.
            for to in [at(2, 80), at(1, 80)].concat() {
                for _ in 0..8 {
                    probe::tcp_at(&a.ns, to, 1000).context("hairpin")?;
                    probe::udp_at(&a.ns, to, 1000).context("hairpin")?;
                }
            }
            println!("{}", n1.cli(&["svc", "list", "-o", "wide"])?);
            let listed = n1.cli(&["svc", "list"])?;
            for text in ["default/web", "10.96.0.1:80/TCP", "[fd96::1]:80/UDP", "2/2", "reject"] {
                ensure!(listed.contains(text), "{text} is missing:\n{listed}");
            }
            let flows = n1.cli(&["ct", "list", "--pod", "default/c", "--proto", "tcp"])?;
            ensure!(flows.contains("10.96.0.1:80"), "{flows}");
            println!("{}", n1.cli(&["ct", "stats"])?);

            // With one server gone, connections to the Service fail for as long as its endpoint is there, and not after.
            drop(server_b);
            let tries = |client: &Pod| -> Vec<bool> {
                (0..24).map(|_| probe::tcp_at(&client.ns, at(1, 80)[0], 1).is_ok()).collect()
            };
            for client in &clients {
                let seen = tries(client);
                ensure!(seen.contains(&true) && seen.contains(&false), "both backends are drawn: {seen:?}");
            }
            put(cluster, &service("web", 1, &[(&a, 1)]))?;
            for client in &clients {
                ensure!(tries(client).iter().all(|ok| *ok), "an endpoint that was removed is still drawn");
                for to in at(1, 80) {
                    probe::udp_at(&client.ns, to, 100)?;
                }
            }
            // A Service that is gone is nobody's address.
            for node in cluster.nodes() {
                node.remove_service("near")?;
                node.wait(SOON, "the Service is gone", |node| {
                    Ok(!node.cli(&["svc", "list"])?.contains("default/near"))
                })?;
            }
            ensure!(probe::tcp_at(&clients[0].ns, at(2, 80)[0], 1).is_err(), "a removed Service answers");
            drop(server_a);
            for (node, pod) in [(n1, &a), (n2, &b), (n1, &clients[0]), (n2, &clients[1])] {
                node.check(pod)?;
                node.del(pod)?;
            }
            leftovers::wait_until_pods_removed(n1, &before[0], SETTLE)?;
            leftovers::wait_until_pods_removed(n2, &before[1], SETTLE)
        },
    )
}

#[test]
fn service_requests_survive_daemon_restart() -> Result<()> {
    with_cluster(
        |_| {},
        |cluster| {
            let (n1, n2) = (cluster.node(1), cluster.node(2));
            let (a, b, c) = (pod(n1, "a")?, pod(n2, "b")?, pod(n1, "c")?);
            let _servers = [Echo::start(&a.ns)?, Echo::start(&b.ns)?];
            put(cluster, &service("near", 2, &[(&a, 1)]))?;
            put(cluster, &service("far", 3, &[(&b, 2)]))?;
            put(cluster, &service("web", 1, &[(&a, 1), (&b, 2)]))?;
            let traffic = [vips(1), vips(2), vips(3)].concat().into_iter();
            let traffic: Vec<(IpAddr, Traffic)> =
                traffic.map(|to| Traffic::start(&c.ns, to).map(|t| (to, t))).collect::<Result<_>>()?;
            for round in 0..4 {
                for node in cluster.nodes() {
                    if round % 2 == 0 { node.stop_daemon()? } else { node.kill_daemon()? }
                }
                std::thread::sleep(Duration::from_millis(200));
                for to in [at(1, 80), at(2, 80), at(3, 80)].concat() {
                    probe::tcp_at(&c.ns, to, 10_000).context("without a daemon")?;
                }
                // In the last round something changed while nobody looked.
                if round == 3 {
                    for node in cluster.nodes() {
                        node.put_service(&service("late", 5, &[(&b, 2)]))?;
                    }
                }
                for node in cluster.nodes() {
                    node.start_daemon()?;
                }
                for node in cluster.nodes() {
                    node.wait_ready(Duration::from_secs(20))?;
                    node.wait(SOON, "Services are known", |node| {
                        Ok(node.cli(&["svc", "list"])?.contains("default/web"))
                    })?;
                }
                // Whatever the first sync wants to retire is retired.
                std::thread::sleep(Duration::from_millis(1200));
            }
            put(cluster, &service("late", 5, &[(&b, 2)]))?;
            for to in at(5, 80) {
                probe::tcp_at(&c.ns, to, 1000)?;
            }
            for (to, traffic) in traffic {
                let (tcp, udp) = traffic.stop().with_context(|| format!("to {to}"))?;
                println!("to {to}: TCP {tcp:?}, UDP {udp:?}");
                ensure!(tcp.lost == 0 && udp.lost == 0, "to {to}: TCP {tcp:?}, UDP {udp:?}");
            }
            for (node, pod) in [(n1, &a), (n2, &b), (n1, &c)] {
                node.del(pod)?;
            }
            Ok(())
        },
    )
}

#[test]
fn service_errors_in_status() -> Result<()> {
    with_cluster(
        |options| options.nodes = 1,
        |cluster| {
            let node = cluster.node(1);
            let file = node.objects_dir().join("broken.yaml");
            std::fs::write(
                &file,
                "apiVersion: v1\nkind: Service\nmetadata: {name: x}\nspec: {ports: [{port: high}]}\n",
            )?;
            let codes = || -> Result<Vec<String>> { Ok(node.status()?.problems.into_iter().map(|p| p.code).collect()) };
            node.wait(SOON, "the bad document is told", |node| {
                let problems = node.status()?.problems;
                let told = problems.iter().any(|p| p.code == "TW0501" && p.detail.contains("broken.yaml:4"));
                ensure!(told, "{problems:?}");
                Ok(true)
            })?;
            std::fs::remove_file(&file)?;
            // Two Services claim one address: the first name has it.
            let client = pod(node, "c")?;
            let _server = Echo::start(&client.ns)?;
            put(cluster, &service("first", 7, &[(&client, 1)]))?;
            node.put_service(&service("before", 7, &[]))?;
            node.wait(SOON, "the loser is told", |_| Ok(codes()?.iter().any(|code| code == "TW0502")))?;
            probe::refused(&client.ns, at(7, 80)[0])?;
            node.remove_service("before")?;
            node.wait(SOON, "nothing is wrong any more", |_| Ok(codes()?.is_empty()))?;
            probe::tcp_at(&client.ns, at(7, 80)[0], 1)?;
            node.del(&client).map(drop)
        },
    )
}

/// A pod that starts before the node's Services are known would not reach them: ADD waits for them, and if they do not come, it is to be
/// tried again.
#[test]
fn pod_start_waits_for_services_sync() -> Result<()> {
    with_cluster(
        |options| options.nodes = 1,
        |cluster| {
            let node = cluster.node(1);
            let (server, away) = (pod(node, "server")?, node.work().join("away"));
            let _echo = Echo::start(&server.ns)?;
            // Nothing of an earlier daemon's is in force, and this one cannot know what there is.
            node.stop_daemon()?;
            node.put_service(&service("web", 1, &[(&server, 1)]))?;
            std::fs::rename(node.objects_dir(), &away)?;
            node.start_daemon()?;
            node.wait(Duration::from_secs(20), "it is told that there are no objects", |node| {
                Ok(node.status()?.problems.iter().any(|problem| problem.code == "TW0504"))
            })?;
            let early = node.new_pod("early")?;
            let refused = node.cni("ADD", &early)?;
            let (code, text) = (refused.json["code"].as_u64(), refused.json.to_string());
            // CNI specification 1.1.0, "Error": 11, try again later.
            ensure!(code == Some(11) && text.contains("TW0505") && text.contains("TW0504"), "{text}");
            let waited = refused.elapsed;
            ensure!(waited > Duration::from_secs(5) && waited < Duration::from_secs(20), "refused after {waited:?}");
            ensure!(node.list_pods()?.len() == 1, "a refused pod has an address");
            // They come while the next one waits: it is connected at once, and the Service is there for its first packet.
            let mut late = node.new_pod("late")?;
            std::thread::scope(|scope| -> Result<()> {
                let adding = scope.spawn(|| node.add(&mut late));
                // That it does *not* end within a time can only be seen by letting the time pass.
                std::thread::sleep(Duration::from_secs(1));
                ensure!(!adding.is_finished(), "ADD does not wait");
                std::fs::rename(&away, node.objects_dir())?;
                let added = adding.join().map_err(|_panic| anyhow::anyhow!("ADD panicked"))??;
                ensure!(added.elapsed < Duration::from_secs(5), "ADD took {:?}", added.elapsed);
                Ok(())
            })?;
            for to in at(1, 80) {
                probe::tcp_at(&late.ns, to, 1000).context("the first packets")?;
            }
            node.del(&early)?;
            node.del(&late)?;
            node.del(&server).map(drop)
        },
    )
}
