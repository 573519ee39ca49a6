//! What an administrator sees of connections and of the policies that decide about them: `flows`, counters, metrics; live, and over a restart.

use std::io::Read as _;
use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use terway_sim::cluster::Cluster;
use terway_sim::node::{Node, ServiceSpec, bin_dir};
use terway_sim::probe::{self, Echo};

use super::SOON;
use super::stage::{Put as _, Stage, policy_object};
use crate::with_cluster;

/// Events that a filter takes, as JSON.
fn flows(node: &Node, filter: &[&str]) -> Result<Vec<Value>> {
    let text = node.cli(&[&["flows", "-o", "json"], filter].concat())?;
    text.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
}

fn pod_of(end: &Value) -> String {
    format!("{}/{}", end["pod"]["namespace"].as_str().unwrap_or("?"), end["pod"]["name"].as_str().unwrap_or("?"))
}

/// Connections that a policy let begin, and packets that it had dropped.
fn counted(node: &Node, name: &str) -> Result<(u64, u64)> {
    let shown: Value = serde_json::from_str(&node.cli(&["policy", "show", name, "-o", "json"])?)?;
    let policy = &shown["policies"][0];
    Ok((policy["allowed"].as_u64().context("allowed")?, policy["denied"].as_u64().context("denied")?))
}

fn metric(node: &Node, verdict: &str) -> Result<u64> {
    let metrics = node.netns().run(|| crate::conntrack::get("127.0.0.1:19099".parse()?, "/metrics"))??;
    let wanted =
        format!("terway_policy_verdicts_total{{policy=\"x/guard\",direction=\"ingress\",verdict=\"{verdict}\"}} ");
    let line = metrics.lines().find_map(|line| line.strip_prefix(&wanted));
    line.with_context(|| format!("{wanted} is not among\n{metrics}"))?.parse().context("a number")
}

#[test]
fn flow_events_and_policy_counters() -> Result<()> {
    with_cluster(
        |_| {},
        |cluster: &Cluster| {
            let mut stage = Stage::set(cluster)?;
            let node = cluster.node(1);
            // The stage changes while they are spoken to.
            let pods = std::mem::take(&mut stage.pods);
            let (server, friend, stranger) = (&pods[0].1, &pods[6].1.ns, &pods[4].1.ns);
            let to = server.v4()?;
            let ips = server.ips.clone();
            let _echo = Echo::start(&server.ns)?;
            let mut objects = stage.base.clone();
            objects.policy(
                "x",
                "guard",
                &json!({
                    "podSelector": {"matchLabels": {"pod": "a"}},
                    "ingress": [{
                        "from": [{"namespaceSelector": {"matchLabels": {"ns": "z"}}}], "ports": [{"port": probe::PORT}],
                    }],
                }),
            );
            stage.publish(&objects)?;

            // Drops are told always, new connections to who asks for it; both are counted.
            probe::tcp(friend, to, 10)?;
            ensure!(probe::tcp(stranger, to, 10).is_err(), "a stranger gets through");
            node.wait(SOON, "a drop is told", |node| Ok(!flows(node, &["--policy", "guard"])?.is_empty()))?;
            ensure!(flows(node, &["--verdict", "allowed"])?.is_empty(), "nobody has asked for connections");
            let dropped = flows(node, &["--verdict", "dropped", "--policy", "x/guard"])?;
            let drop = dropped.last().context("no drop")?;
            ensure!(pod_of(&drop["source"]) == "y/b" && pod_of(&drop["destination"]) == "x/a", "{drop}");
            ensure!(drop["destination"]["port"] == probe::PORT && drop["reason"] == "policy_ingress", "{drop}");
            let why = "isolated in ingress by NetworkPolicy x/guard, none of whose rules allows it";
            ensure!(drop["ingress"]["reason"] == why && drop["ingress"]["allowed"] == false, "{drop}");
            ensure!(node.cli(&["drops"])?.contains(why), "drops tells the same");
            let (allowed, denied) = counted(node, "x/guard")?;
            ensure!(allowed == 1 && denied >= 1 && metric(node, "allowed")? == 1, "{allowed} {denied}");
            ensure!(metric(node, "denied")? >= denied);

            // Live, without a restart.
            node.edit_conf(json!({"flow_events_one_in": 1}))?;
            node.wait(SOON, "a connection is told", |node| {
                probe::tcp(friend, to, 10)?;
                Ok(!flows(node, &["--verdict", "allowed", "--pod", "x/a"])?.is_empty())
            })?;
            let told = flows(node, &["--verdict", "allowed", "--policy", "guard", "--last", "1"])?;
            let [event] = &told[..] else { anyhow::bail!("{told:?}") };
            ensure!(pod_of(&event["source"]) == "z/a" && pod_of(&event["destination"]) == "x/a", "{event}");
            ensure!(event["ingress"]["reason"] == "NetworkPolicy x/guard, ingress rule 0: Accept", "{event}");
            ensure!(event["egress"]["reason"] == "no policy decides about it", "{event}");
            ensure!(event["service"] == "" && event["backend"].is_null(), "{event}");
            let port = probe::PORT.to_string();
            for (filter, some) in [
                (&["--pod", "y/b", "--verdict", "allowed"][..], false),
                (&["--pod", "y/b", "--port", &port], true),
                (&["--pod", "z/a", "--port", &port], true),
                (&["--policy", "other"], false),
                (&["--port", "9"], false),
            ] {
                ensure!(flows(node, filter)?.is_empty() != some, "{filter:?}");
            }

            // Through a Service: the name, and the backend that policies were asked about.
            let vip = IpAddr::from([10, 96, 0, 9]);
            let service = ServiceSpec {
                name: "web".to_owned(),
                cluster_ips: vec![vip],
                ports: vec![(80, probe::PORT)],
                endpoints: vec![(ips, "n1".to_owned())],
            };
            node.put_service(&service)?;
            node.wait(SOON, "the Service is told", |node| {
                let _yet = probe::tcp_at(friend, (vip, 80).into(), 10);
                let told = flows(node, &["--pod", "x/a", "--port", "80"])?;
                Ok(told.iter().any(|event| {
                    event["service"] == "default/web"
                        && event["destination"]["address"] == "10.96.0.9"
                        && pod_of(&event["backend"]) == "x/a"
                        && event["backend"]["port"] == probe::PORT
                }))
            })?;
            println!("{}", node.cli(&["flows", "--policy", "guard", "--last", "8"])?);
            println!("{}{}", node.cli(&["policy", "list"])?, node.cli(&["policy", "show", "x/guard"])?);

            // Who follows is told what comes, and let go when the daemon ends.
            let mut follower = Command::new(bin_dir()?.join("terway-cli"))
                .args(["--socket".as_ref(), node.socket().as_os_str()])
                .args(["flows", "-f", "--pod", "y/b", "--last", "1"])
                .stdout(Stdio::piped())
                .spawn()?;
            std::thread::sleep(Duration::from_millis(500));
            ensure!(probe::tcp(stranger, to, 10).is_err(), "a stranger gets through");
            std::thread::sleep(Duration::from_millis(500));
            let before = counted(node, "x/guard")?;
            node.stop_daemon()?;
            let mut seen = String::new();
            follower.stdout.take().context("stdout")?.read_to_string(&mut seen)?;
            follower.wait()?;
            ensure!(
                seen.lines().count() >= 2 && seen.lines().all(|line| line.contains(" dropped TCP y/b (")),
                "{seen}"
            );

            // While no daemon is there the datapath counts on, and the next one takes it over, under other numbers of reasons.
            probe::tcp(friend, to, 10)?;
            node.start_daemon()?;
            node.wait_ready(Duration::from_secs(30))?;
            stage.reconnect()?;
            node.wait(SOON, "sums go on", |node| {
                let after = counted(node, "x/guard")?;
                ensure!(after.0 == before.0 + 1 && after.1 >= before.1, "{before:?} before, {after:?} after");
                Ok(metric(node, "allowed")? == after.0)
            })?;
            node.edit_conf(json!({"flow_events_one_in": 0}))?;
            node.wait(SOON, "connections are told no more", |node| {
                let before = flows(node, &["--verdict", "allowed"])?.len();
                probe::tcp(friend, to, 10)?;
                std::thread::sleep(Duration::from_millis(100));
                Ok(flows(node, &["--verdict", "allowed"])?.len() == before)
            })?;
            // A policy that is gone has no numbers.
            stage.publish(&stage.base.clone())?;
            node.wait(SOON, "its sums are forgotten", |node| Ok(metric(node, "allowed").is_err()))?;
            node.remove_service("web")?;
            stage.pods = pods;
            stage.clear()
        },
    )
}

/// As many as a namespace has where each client has a policy of its own: put at once, they are in force soon, and can be read.
#[test]
fn flow_events_with_a_thousand_policies_for_one_pod() -> Result<()> {
    with_cluster(
        |options| options.nodes = 1,
        |cluster: &Cluster| {
            let node = cluster.node(1);
            let mut pods = Vec::new();
            let mut objects = Vec::new();
            for name in ["a", "b"] {
                let mut pod = node.new_pod(name)?;
                pod.namespace = "many".to_owned();
                node.add(&mut pod)?.ok()?;
                objects.push(json!({
                    "apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "many", "name": name},
                    "status": {"phase": "Running", "podIPs": pod.ips.iter().map(|ip| json!({"ip": ip})).collect::<Vec<_>>()},
                }));
                pods.push(pod);
            }
            node.put("pods", &objects)?;
            let policy = |n: u16| {
                let port = if n == 500 { probe::PORT } else { 20_000 + n };
                let ingress = json!([{"from": [{"podSelector": {}}], "ports": [{"port": port}]}]);
                policy_object("many", &format!("p{n}"), &json!({"podSelector": {}, "ingress": ingress}))
            };
            let [client, server] = &pods[..] else { anyhow::bail!("two pods") };
            let to = server.v4()?;
            let _echo = Echo::start(&server.ns)?;
            node.put("policies", &(0..1_000).map(policy).collect::<Vec<_>>())?;
            let listed = |node: &Node| -> Result<Vec<Value>> {
                let all: Value = serde_json::from_str(&node.cli(&["policy", "list", "-o", "json"])?)?;
                Ok(all["policies"].as_array().cloned().unwrap_or_default())
            };
            node.wait(SOON, "all are in force", |node| Ok(listed(node)?.len() == 1_000))?;
            // TCP is allowed by one of them, UDP by none.
            probe::tcp(&client.ns, to, 10)?;
            ensure!(probe::udp(&client.ns, to, 10).is_err(), "UDP gets through");
            let sum = |policies: &[Value]| policies.iter().map(|p| p["allowed"].as_u64().unwrap_or(0)).sum::<u64>();
            ensure!(sum(&listed(node)?) == 1 && counted(node, "many/p500")?.0 == 1, "one connection was allowed");
            node.wait(SOON, "the drop is told", |node| {
                // By policy: the kernel's own multicast, which is dropped too, may come after it.
                let told = flows(node, &["--verdict", "dropped", "--policy", "many/p0"])?;
                let why = told.last().and_then(|event| event["ingress"]["reason"].as_str()).unwrap_or_default();
                Ok(why.ends_with(" and 996 more, none of whose rules allows it"))
            })?;
            // And gone at once.
            node.put("policies", &[] as &[Value])?;
            node.wait(SOON, "none is left", |node| Ok(listed(node)?.is_empty()))?;
            probe::udp(&client.ns, to, 10)?;
            for pod in &pods {
                node.del(pod)?.ok()?;
            }
            Ok(())
        },
    )
}
