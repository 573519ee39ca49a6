//! The node's identity, its conflist and its queue of DELs across restarts.

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{SETTLE, agreement, fixed_pool, pod, with_cluster};

const READY_WITHIN: Duration = Duration::from_secs(30);

#[test]
fn cloned_state_folder_is_set_aside() -> Result<()> {
    with_cluster(
        |options| {
            options.nodes = 2;
            fixed_pool(options);
        },
        |cluster| {
            let (n1, n2) = (cluster.node(1), cluster.node(2));
            let pod = pod(n1, "a")?;
            let enis_before = n1.status()?.enis.len();
            for node in [n1, n2] {
                node.stop_daemon()?;
            }
            for file in ["node.json", "terway.redb", "subnets.json"] {
                std::fs::copy(n1.work().join("state").join(file), n2.work().join("state").join(file)).context(file)?;
            }
            for node in [n1, n2] {
                node.start_daemon()?;
                node.wait_ready(READY_WITHIN)?;
            }
            let identity = |node: &terway_sim::node::Node| -> Result<Value> {
                Ok(serde_json::from_slice(&std::fs::read(node.work().join("state/node.json"))?)?)
            };
            let (first, second) = (identity(n1)?, identity(n2)?);
            ensure!(first["identity"]["instance"] != second["identity"]["instance"], "{second}");
            ensure!(first["token_seed"] != second["token_seed"], "tokens of two nodes must differ");
            ensure!(n2.work().join("state/terway.redb.other-instance-1").exists(), "the store was not set aside");
            let log = n2.log_tail(200);
            ensure!(log.contains("the state folder is another instance's"), "{log}");
            ensure!(n1.status()?.enis.len() == enis_before, "ENIs of the other node are gone");
            n1.check(&pod)?;
            for node in [n1, n2] {
                agreement(cluster, node)?;
            }
            n1.del(&pod)?;
            Ok(())
        },
    )
}

#[test]
fn conflist_mode_and_precedence() -> Result<()> {
    with_cluster(
        |options| {
            options.nodes = 1;
            fixed_pool(options);
        },
        |cluster| {
            let node = cluster.node(1);
            let path = node.cni_conf_dir().join("10-terway.conflist");
            let mode = std::fs::metadata(&path)?.permissions().mode() & 0o777;
            ensure!(mode == 0o600, "{mode:o}");
            let other = node.cni_conf_dir().join("10-calico.conflist");
            std::fs::write(&other, "{}")?;
            let problem = |node: &terway_sim::node::Node| -> Result<Option<String>> {
                let problems = node.status()?.problems;
                Ok(problems.into_iter().find(|problem| problem.code == "TW0110").map(|problem| problem.detail))
            };
            node.wait(SETTLE, "status names the other file", |node| {
                Ok(problem(node)?.is_some_and(|detail| detail.contains("10-calico.conflist")))
            })?;
            ensure!(other.exists(), "moved aside without --cni-exclusive");
            std::fs::remove_file(&other)?;
            node.wait(SETTLE, "the problem is gone", |node| Ok(problem(node)?.is_none()))?;
            std::fs::remove_file(&path)?;
            node.wait(SETTLE, "the conflist is back", |_| Ok(path.exists()))
        },
    )
}

#[test]
fn queued_del_before_adoption() -> Result<()> {
    with_cluster(
        |options| {
            options.nodes = 1;
            fixed_pool(options);
        },
        |cluster| {
            let node = cluster.node(1);
            let (deleted, stays) = (pod(node, "deleted")?, pod(node, "stays")?);
            node.kill_daemon()?;
            node.del(&deleted)?;
            // Its namespace, and with it the interface, goes as when a sandbox is removed.
            drop(deleted);
            let lines = std::fs::read_to_string(node.daemon_log())?.lines().count();
            node.start_daemon()?;
            node.wait_ready(READY_WITHIN)?;
            node.wait(SETTLE, "one pod is left", |node| Ok(node.list_pods()?.len() == 1))?;
            let log = std::fs::read_to_string(node.daemon_log())?;
            let since: Vec<&str> = log.lines().skip(lines).collect();
            ensure!(!since.iter().any(|line| line.contains("failed to adopt")), "{since:#?}");
            ensure!(since.iter().any(|line| line.contains("carried out a queued DEL")), "{since:#?}");
            node.check(&stays)?;
            node.del(&stays)?;
            Ok(())
        },
    )
}
