//! Invariant 4: the daemon's absence changes no packet of a running pod, and DEL still succeeds.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use terway_sim::leftovers;
use terway_sim::probe::{self, Echo, Traffic};

use super::{SETTLE, agreement, baseline, fixed_pool, pod, with_cluster};

#[test]
fn pod_traffic_survives_daemon_restart_and_crash() -> Result<()> {
    with_cluster(
        |_| {},
        |cluster| {
            let (n1, n2) = (cluster.node(1), cluster.node(2));
            let (a, b, c) = (pod(n1, "a")?, pod(n1, "b")?, pod(n2, "c")?);
            let _servers = [Echo::start(&b.ns)?, Echo::start(&c.ns)?, Echo::start(cluster.external())?];
            let traffic = [b.v4()?, b.v6()?, c.v4()?, c.v6()?, cluster.external_addresses().0]
                .map(|to| Traffic::start(&a.ns, to).map(|traffic| (to, traffic)));
            let traffic = traffic.into_iter().collect::<Result<Vec<_>>>()?;
            for round in 0..4 {
                for node in cluster.nodes() {
                    if round % 2 == 0 { node.stop_daemon()? } else { node.kill_daemon()? }
                }
                std::thread::sleep(Duration::from_millis(200));
                // Without a daemon, flows that are new are made as well.
                for to in [b.v4()?, c.v6()?] {
                    probe::tcp(&a.ns, to, 50_000)?;
                    probe::ping(&a.ns, to, &[])?;
                }
                for node in cluster.nodes() {
                    node.start_daemon()?;
                }
                for node in cluster.nodes() {
                    node.wait_ready(Duration::from_secs(20))?;
                }
            }
            for (to, traffic) in traffic {
                let (tcp, udp) = traffic.stop().with_context(|| format!("to {to}"))?;
                println!("to {to}: TCP {tcp:?}, UDP {udp:?}");
                ensure!(tcp.lost == 0 && udp.lost == 0, "to {to}: TCP {tcp:?}, UDP {udp:?}");
            }
            for (node, pod) in [(n1, &a), (n1, &b), (n2, &c)] {
                node.check(pod)?;
                node.del(pod)?;
            }
            Ok(())
        },
    )
}

/// The programs are exchanged under traffic, again and again: no packet is lost, and new connections write their lines.
#[test]
fn datapath_log_is_switched_under_traffic() -> Result<()> {
    with_cluster(
        |_| {},
        |cluster| {
            let node = cluster.node(1);
            let [client, near, far] = [pod(node, "client")?, pod(node, "near")?, pod(cluster.node(2), "far")?];
            let _servers = [Echo::start(&near.ns)?, Echo::start(&far.ns)?];
            let traffic = [near.v4()?, far.v4()?].map(|to| Traffic::start(&client.ns, to));
            let lines = || -> Result<usize> {
                let log = std::fs::read_to_string(node.daemon_log())?;
                Ok(log.lines().filter(|line| line.contains(" terway_datapath: ") && line.contains("route: ")).count())
            };
            for round in 0..3 {
                let known = lines()?;
                ensure!(node.cli(&["datapath-log", "on"])?.contains("is on"), "round {round}");
                probe::tcp(&client.ns, far.v4()?, 1000)?;
                // A pod that comes now has the same programs.
                let late = pod(node, &format!("late-{round}"))?;
                probe::tcp(&late.ns, far.v4()?, 1000)?;
                node.wait(SETTLE, "the decisions are logged", |_| Ok(lines()? >= known + 2))?;
                ensure!(node.cli(&["datapath-log", "off"])?.contains("is off"), "round {round}");
                let known = lines()?;
                probe::tcp(&client.ns, far.v4()?, 1000)?;
                probe::tcp(&late.ns, far.v4()?, 1000)?;
                ensure!(lines()? == known, "the log goes on after it was switched off");
                node.del(&late)?;
            }
            ensure!(node.cli(&["datapath-log"])?.contains("is off"), "the state is told without an argument");
            for traffic in traffic {
                let (tcp, udp) = traffic?.stop()?;
                ensure!(tcp.lost == 0 && udp.lost == 0, "TCP {tcp:?}, UDP {udp:?}");
            }
            Ok(())
        },
    )
}

#[test]
fn del_without_daemon() -> Result<()> {
    with_cluster(
        |options| {
            options.nodes = 1;
            options.adapters = 2;
            fixed_pool(options);
        },
        |cluster| {
            let node = cluster.node(1);
            let before = baseline(node, 15)?;
            let pods = [pod(node, "a")?, pod(node, "b")?, pod(node, "c")?];
            node.kill_daemon()?;
            for (what, pod) in [("known", &pods[0]), ("again", &pods[0]), ("never added", &node.new_pod("never")?)] {
                let outcome = node.del(pod).context(what)?;
                println!("DEL without the daemon, {what}: {:?}", outcome.elapsed);
            }
            // Its namespace goes and no DEL comes, as after a reboot of the runtime.
            let [_deleted, gone, stays] = pods;
            drop(gone);
            let failed = node.cni("ADD", &node.new_pod("new")?)?;
            ensure!(failed.code != 0 && failed.json["code"].as_u64().is_some(), "{failed:?}");
            println!("ADD without the daemon: {:?}", failed.elapsed);
            probe::ping(&stays.ns, cluster.external_addresses().0, &[])?;
            node.start_daemon()?;
            node.wait_ready(Duration::from_secs(20))?;
            node.wait(SETTLE, "one pod is left", |node| Ok(node.list_pods()?.len() == 1))?;
            probe::ping(&stays.ns, cluster.external_addresses().0, &[])?;
            node.check(&stays)?;
            node.del(&stays)?;
            leftovers::wait_until_restored(node, &before, SETTLE)?;
            agreement(cluster, node)
        },
    )
}
