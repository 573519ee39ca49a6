//! The CNI verb matrix against the real plugin, the real daemon and its datapath, on one node of the simulated cloud.

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use terway_proto::v1::PodState;
use terway_sim::cluster::{Cluster, Options};
use terway_sim::node::Node;
use terway_tests::cni_matrix::{self, Claims, Daemon, Netns, Plugin, VERSIONS};

use crate::namespace;

/// The plugin on a node.
struct OnNode<'a> {
    node: &'a Node,
    /// As the daemon wrote it.
    conf: Value,
    slow: AtomicBool,
}

impl Plugin for OnNode<'_> {
    fn command(&self) -> Command {
        self.node.netns().command(self.node.plugin())
    }

    fn conf(&self) -> Value {
        let mut conf = self.conf.clone();
        // Short only where the time is to pass: an ADD that needs a new ENI takes its while.
        conf["timeout_ms"] = if self.slow.load(Ordering::Relaxed) { 1000 } else { 30_000 }.into();
        conf
    }

    fn versions(&self) -> &'static [&'static str] {
        &VERSIONS
    }

    fn netns(&self) -> Netns {
        let namespace = namespace();
        Netns { path: namespace.path().to_owned(), guard: Box::new(namespace) }
    }

    fn own_netns(&self) -> PathBuf {
        self.node.netns().path().to_owned()
    }

    fn daemon(&self) -> Option<&dyn Daemon> {
        Some(self)
    }

    fn claims(&self) -> Claims {
        Claims {
            ignores_unknown_fields: true,
            add_is_idempotent: true,
            del_without_daemon: true,
            // The daemon looks into the queue every 30 s.
            release_within: Duration::from_secs(40),
            netns_code: Some(8),
            // An ADD waits 5 s for a daemon that is not there.
            patience: Duration::from_secs(12),
        }
    }
}

impl Daemon for OnNode<'_> {
    fn stop(&self) {
        self.node.kill_daemon().unwrap();
    }

    fn start(&self) {
        self.node.start_daemon().unwrap();
        self.node.wait_ready(Duration::from_secs(20)).unwrap();
    }

    /// A daemon that is stopped accepts connections, by the kernel's hand, and says nothing.
    fn slow(&self, slow: bool) {
        self.slow.store(slow, Ordering::Relaxed);
        let pid = i32::try_from(self.node.daemon_pid().unwrap()).unwrap();
        kill(Pid::from_raw(pid), if slow { Signal::SIGSTOP } else { Signal::SIGCONT }).unwrap();
    }

    /// What is being released holds nothing any more: its links go in the background.
    fn holds(&self, container_id: &str) -> bool {
        let pods = self.node.list_pods().unwrap();
        let is = |pod: &PodState| pod.attachment.as_ref().is_some_and(|key| key.container_id == container_id);
        pods.iter().any(|pod| is(pod) && pod.phase != "releasing")
    }
}

#[test]
fn verb_matrix_on_a_node() {
    let mut options = Options::new().unwrap();
    options.nodes = 1;
    options.pool = (40, 60);
    if let Some(obstacle) = Cluster::obstacle(&options) {
        println!("SKIP: {obstacle}");
        return;
    }
    let cluster = Cluster::start(&options).unwrap();
    let node = cluster.node(1);
    let conf = node.conflist().unwrap()["plugins"][0].clone();
    let report = cni_matrix::run(&OnNode { node, conf, slow: AtomicBool::new(false) });
    println!("{report}");
    report.assert_clean();
    cluster.finish().unwrap();
}
