//! Connection tracking and health checks as a user of a node sees them.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use terway_sim::node::Node;
use terway_sim::probe::{self, Echo};

use super::{pod, with_cluster};

const SOON: Duration = Duration::from_secs(10);

fn tracking(node: &Node) -> Result<Value> {
    Ok(serde_json::from_str(&node.cli(&["ct", "stats", "-o", "json"])?)?)
}

#[test]
fn conntrack_timeouts_and_metrics() -> Result<()> {
    with_cluster(
        |options| {
            options.nodes = 1;
            // Counted, and collected, every second.
            options.time_scale = 30;
            options.conf =
                json!({"conntrack_gc_interval": "1s", "bpf_ct_max_v4": 4096, "bpf_ct_timeout_tcp_fin": "1s"});
        },
        |cluster| {
            let node = cluster.node(1);
            let (client, server) = (pod(node, "c")?, pod(node, "s")?);
            let _echo = Echo::start(&server.ns)?;
            for _ in 0..20 {
                probe::tcp(&client.ns, server.v4()?, 1000)?;
            }
            probe::udp(&client.ns, server.v4()?, 1000)?;
            let before = tracking(node)?;
            ensure!(before["capacityV4"] == 4096 && before["capacityV6"].as_u64() > Some(4096), "{before}");
            ensure!(before["usedV4"].as_u64() >= Some(1), "{before}");
            node.wait(SOON, "closed connections are forgotten", |node| {
                let now = tracking(node)?;
                let known = &now["tracking"];
                ensure!(known["deletedExpired"].as_u64() >= Some(20) && known["passes"].as_u64() >= Some(2), "{now}");
                ensure!(known["intervalMilliseconds"] == 1000 && known["evictedEstimate"] == 0, "{now}");
                ensure!(now["protocols"]["udp"].as_u64() >= Some(1), "UDP stays for a minute: {now}");
                Ok(true)
            })?;
            println!("{}", node.cli(&["ct", "stats"])?);
            // A shorter time for UDP takes effect while the daemon runs.
            node.edit_conf(json!({"bpf_ct_timeout_udp": "1s", "bpf_ct_timeout_udp_single": "1s"}))?;
            node.wait(SOON, "UDP is forgotten too", |node| {
                let now = tracking(node)?;
                ensure!(now["protocols"]["udp"].is_null(), "{now}");
                Ok(true)
            })?;
            // Another size: told to wait for a restart, and there with one, which keeps what is open.
            let open = probe::Traffic::start(&client.ns, server.v4()?)?;
            node.edit_conf(json!({"bpf_ct_max_v4": 8192}))?;
            node.wait(SOON, "the size waits for a restart", |node| {
                let pending = node.status()?.configuration.unwrap_or_default().pending_restart;
                Ok(pending.iter().any(|change| change.key == "bpf_ct_max_v4"))
            })?;
            ensure!(tracking(node)?["capacityV4"] == 4096);
            node.stop_daemon()?;
            node.start_daemon()?;
            node.wait_ready(Duration::from_secs(30))?;
            ensure!(tracking(node)?["capacityV4"] == 8192, "{}", tracking(node)?);
            let (tcp, udp) = open.stop()?;
            ensure!(tcp.lost == 0 && udp.lost == 0, "TCP {tcp:?}, UDP {udp:?}");
            let metrics = node.netns().run(|| get("127.0.0.1:19099".parse()?, "/metrics"))??;
            for line in [
                "terway_ct_pressure{family=\"ipv4\"} 0.",
                "terway_ct_evicted_total 0",
                "terway_ct_gc_interval_seconds 1",
            ] {
                ensure!(metrics.contains(line), "{line} is not among\n{metrics}");
            }
            for pod in [&client, &server] {
                node.del(pod)?;
            }
            Ok(())
        },
    )
}

/// What a server says to a GET.
pub(crate) fn get(address: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: node\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// A Service for a load balancer with a port for health checks; `endpoints` are the nodes of its endpoints.
fn balanced(node: &Node, name: &str, number: u8, port: u16, endpoints: &[&str]) -> Result<()> {
    let endpoints: Vec<Value> = endpoints
        .iter()
        .zip(1..)
        .map(|(at, n)| json!({"addresses": [format!("10.77.0.{n}")], "nodeName": at, "conditions": {"ready": true}}))
        .collect();
    let list = json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"}, "spec": {
            "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": port,
            "clusterIP": format!("10.96.7.{number}"), "clusterIPs": [format!("10.96.7.{number}")],
            "ports": [{"name": "web", "port": 80, "protocol": "TCP"}]}},
        {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": format!("{name}-x"), "namespace": "default", "labels": {"kubernetes.io/service-name": name}},
            "ports": [{"name": "web", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints},
    ]});
    let fresh = node.objects_dir().join(format!("{name}.new"));
    std::fs::write(&fresh, list.to_string())?;
    Ok(std::fs::rename(fresh, node.objects_dir().join(format!("{name}.json")))?)
}

#[test]
fn health_check_node_port() -> Result<()> {
    with_cluster(
        |options| options.nodes = 1,
        |cluster| {
            let node = cluster.node(1);
            let ask = |port: u16, family: &str| -> Result<String> {
                let address = match family {
                    "v4" => SocketAddr::from(([127, 0, 0, 1], port)),
                    _ => SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, port)),
                };
                node.netns().run(move || get(address, "/healthz"))?
            };
            let says = |port: u16, status: &str, count: u32, name: &str| {
                node.wait(SOON, "health checks say so", |_| {
                    for family in ["v4", "v6"] {
                        let text = ask(port, family)?;
                        let (head, body) = text.split_once("\r\n\r\n").context("no body")?;
                        ensure!(head.lines().next().unwrap_or_default().contains(status), "{text}");
                        ensure!(head.contains(&format!("x-load-balancing-endpoint-weight: {count}")), "{text}");
                        let body: Value = serde_json::from_str(body)?;
                        ensure!(
                            body == json!({"service": {"namespace": "default", "name": name}, "localEndpoints": count, "serviceProxyHealthy": true}),
                            "{text}"
                        );
                    }
                    Ok(true)
                })
            };
            // Somebody has one of the ports already.
            let squatter = node.netns().run(|| TcpListener::bind("0.0.0.0:32002"))??;
            balanced(node, "busy", 2, 32002, &["n1"])?;
            balanced(node, "web", 1, 32001, &["n1", "n1", "n2"])?;
            says(32001, "200", 2, "web")?;
            node.wait(SOON, "the busy port is told", |node| {
                let problems = node.status()?.problems;
                let told: Vec<_> = problems.iter().filter(|p| p.code == "TW0506").collect();
                ensure!(
                    told.len() == 1 && told[0].detail.contains("port 32002 of Service default/busy"),
                    "{problems:?}"
                );
                Ok(true)
            })?;
            drop(squatter);
            balanced(node, "web", 1, 32001, &["n2"])?;
            says(32001, "503", 0, "web")?;
            // Opened once the other one has gone, and nothing is wrong any more.
            node.wait(Duration::from_secs(20), "the port is tried again", |node| {
                Ok(node.status()?.problems.is_empty() && ask(32002, "v4").is_ok())
            })?;
            says(32002, "200", 1, "busy")?;
            // Another port, and none.
            balanced(node, "web", 1, 32003, &["n1"])?;
            says(32003, "200", 1, "web")?;
            ensure!(ask(32001, "v4").is_err(), "the old port is closed");
            node.remove_service("web")?;
            node.wait(SOON, "the port is closed", |_| Ok(ask(32003, "v4").is_err()))
        },
    )
}
