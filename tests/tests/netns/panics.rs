//! A panic in a task of the daemon: what the operator sees, what goes on, and that the next daemon has whole state.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use terway_sim::node::Node;
use terway_sim::node::cni::Pod;
use terway_sim::probe::{self, Echo, Traffic};

use super::services::{at, put, service, vips};
use super::{SETTLE, agreement, fixed_pool, pod, with_cluster};

const READY_WITHIN: Duration = Duration::from_secs(30);

/// ADDs and DELs one pod after the other until `done`; returns how many ADDs there were. Every one must succeed: the plugin waits for a
/// daemon that restarts.
fn add_until(node: &Node, name: &str, done: &AtomicBool) -> Result<u32> {
    let mut adds = 0;
    while !done.load(Ordering::SeqCst) {
        let mut pod = node.new_pod(&format!("{name}-{adds}"))?;
        node.add(&mut pod).with_context(|| format!("ADD {adds} while the daemon panics"))?;
        node.del(&pod).with_context(|| format!("DEL {adds} while the daemon panics"))?;
        adds += 1;
    }
    Ok(adds)
}

#[test]
fn panic_in_engine_or_store_restarts_daemon() -> Result<()> {
    with_cluster(
        |options| {
            (options.nodes, options.adapters, options.panics) = (1, 2, true);
            fixed_pool(options);
        },
        |cluster| {
            let node = cluster.node(1);
            let pods = [pod(node, "a")?, pod(node, "b")?];
            let _echo = Echo::start(&pods[1].ns)?;
            let traffic = Traffic::start(&pods[0].ns, pods[1].v4()?)?;
            for task in
                ["engine", "store", "datapath", "engine-timer", "link-reaper", "audit", "del-queue", "grpc-server"]
            {
                let done = AtomicBool::new(false);
                let adds = std::thread::scope(|scope| -> Result<u32> {
                    let adds = scope.spawn(|| add_until(node, task, &done));
                    let outcome = end_and_restart(node, task);
                    done.store(true, Ordering::SeqCst);
                    let adds = adds.join().map_err(|_panic| anyhow::anyhow!("the thread of ADDs panicked"))?;
                    outcome?;
                    adds
                })
                .with_context(|| format!("a panic in {task}"))?;
                println!("panic in {task}: {adds} ADDs meanwhile");
                for pod in &pods {
                    node.check(pod).with_context(|| format!("after a panic in {task}"))?;
                }
                node.wait(SETTLE, "two pods are left", |node| Ok(node.list_pods()?.len() == 2))?;
            }
            let (tcp, udp) = traffic.stop()?;
            ensure!(tcp.lost == 0 && udp.lost == 0, "TCP {tcp:?}, UDP {udp:?}");
            agreement(cluster, node)
        },
    )
}

fn end_and_restart(node: &Node, task: &str) -> Result<()> {
    node.inject_panic(task)?;
    let status = node.daemon_exit(Duration::from_secs(20))?;
    ensure!(status.code() == Some(101), "ended with {status}");
    let log = node.log_tail(200);
    let panic = log.lines().rev().find(|line| line.contains("supervise: panic ")).context("no line about the panic")?;
    for word in ["TW0108", &format!("task=\"{task}\""), "supervise.rs:", "the daemon ends"] {
        ensure!(panic.contains(word), "{word} is missing in {panic}");
    }
    let last = log.lines().last().unwrap_or_default();
    ensure!(last.contains("terwayd ends") && last.contains(task) && last.contains("TW0108"), "last line: {last}");
    node.start_daemon()?;
    node.wait_ready(READY_WITHIN)
}

#[test]
fn panic_in_stateless_task_restarts_it() -> Result<()> {
    with_cluster(
        |options| {
            (options.nodes, options.panics) = (1, true);
            fixed_pool(options);
        },
        |cluster| {
            let node = cluster.node(1);
            let pod: Pod = pod(node, "a")?;
            for task in ["config-source", "http", "flow-log", "conflist"] {
                node.inject_panic(task)?;
                restarted(node, task, 1)?;
            }
            // They do their work again.
            node.edit_conf(serde_json::json!({"min_pool_size": 1}))?;
            node.wait(SETTLE, "an edit of the configuration is taken", |node| {
                Ok(node.status()?.configuration.is_some_and(|configuration| configuration.generation > 1))
            })?;
            std::fs::remove_file(node.cni_conf_dir().join("10-terway.conflist"))?;
            node.wait(SETTLE, "the conflist is back", |node| Ok(node.conflist().is_ok()))?;
            node.check(&pod)?;
            node.del(&pod)?;
            Ok(())
        },
    )
}

/// The Service actor builds its planner anew from the objects and the maps: what it was writing is written, and nobody's connection ends.
#[test]
fn panic_in_service_actor_restarts_it() -> Result<()> {
    with_cluster(
        |options| (options.nodes, options.panics) = (1, true),
        |cluster| {
            let node = cluster.node(1);
            let [a, b, client] = [pod(node, "a")?, pod(node, "b")?, pod(node, "c")?];
            let servers = [Echo::start(&a.ns)?, Echo::start(&b.ns)?];
            put(cluster, &service("web", 1, &[(&b, 1)]))?;
            put(cluster, &service("stays", 2, &[(&b, 1)]))?;
            let traffic = vips(2).map(|vip| Traffic::start(&client.ns, vip));
            for task in ["services", "socket-programs"] {
                node.inject_panic(task)?;
                restarted(node, task, 1)?;
                for to in [at(1, 80), at(2, 80)].concat() {
                    probe::tcp_at(&client.ns, to, 1000).with_context(|| format!("after a panic in {task}"))?;
                }
            }
            // Between plan and maps: an endpoint is exchanged, and a Service comes.
            for (round, backend) in [&a, &b].into_iter().enumerate() {
                let count = 2 + 2 * u32::try_from(round)?;
                node.inject_panic("service-step")?;
                put(cluster, &service("web", 1, &[(backend, 1)]))?;
                restarted(node, "services", count)?;
                let number = 3 + u8::try_from(round)?;
                node.inject_panic("service-step")?;
                put(cluster, &service(&format!("new-{round}"), number, &[(backend, 1)]))?;
                restarted(node, "services", count + 1)?;
                for to in [at(1, 80), at(number, 80)].concat() {
                    probe::tcp_at(&client.ns, to, 1000).with_context(|| format!("round {round}"))?;
                }
            }
            for traffic in traffic {
                let (tcp, udp) = traffic?.stop()?;
                ensure!(tcp.lost == 0 && udp.lost == 0, "TCP {tcp:?}, UDP {udp:?}");
            }
            // Only b is behind `web`, whatever the panics left half written.
            drop(servers);
            let _server = Echo::start(&b.ns)?;
            for _ in 0..16 {
                probe::tcp_at(&client.ns, at(1, 80)[0], 1)?;
            }
            Ok(())
        },
    )
}

/// The status, the metric and the log tell that `task` panicked `count` times and was started again.
pub(super) fn restarted(node: &Node, task: &str, count: u32) -> Result<()> {
    let name = format!("task {task} ");
    node.wait(SETTLE, "status shows the panic", |node| {
        let problems = node.status()?.problems;
        Ok(problems.iter().any(|problem| problem.code == "TW0108" && problem.detail.contains(&name)))
    })
    .with_context(|| format!("a panic in {task}"))?;
    let line = format!("terway_panics_total{{task=\"{task}\"}} {count}");
    node.wait(SETTLE, "the metric counts the panic", |node| {
        let metrics = metrics(node)?;
        let counts: Vec<&str> = metrics.lines().filter(|line| line.starts_with("terway_panics_total")).collect();
        ensure!(counts.contains(&line.as_str()), "no {line} in {counts:?}");
        Ok(true)
    })?;
    let restart = format!("restarting a task that panicked task=\"{task}\"");
    node.wait(SETTLE, "the log tells of the restart", |node| Ok(node.log_tail(400).contains(&restart)))
}

fn metrics(node: &Node) -> Result<String> {
    node.netns().run(|| -> Result<String> {
        let mut stream = TcpStream::connect("127.0.0.1:19099")?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })?
}
