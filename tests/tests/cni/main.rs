//! The CNI verb matrix against the plugin, and what the plugin promises beyond it.
//!
//! `TERWAY_BIN_DIR` names the folder of the programs (`cargo xtask test netns` sets it).

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod behaviour;
mod real;
mod scripted;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use scripted::ScriptedDaemon;
use serde_json::{Value, json};
use terway_sim::netns::NetNs;
use terway_tests::cni_matrix::{self, Claims, Daemon, Deviation, Netns, Plugin, VERSIONS};

/// A namespace of this suite, which goes away with its handle.
fn namespace() -> NetNs {
    static SERIAL: AtomicU32 = AtomicU32::new(0);
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    NetNs::create(&format!("cni-{}-{serial}", std::process::id())).unwrap()
}

/// The plugin as it was built.
fn program() -> PathBuf {
    let program = terway_sim::node::bin_dir().unwrap().join("terway");
    assert!(program.exists(), "{} is missing; run `cargo xtask test netns`", program.display());
    program
}

/// The plugin in front of the scripted daemon.
struct Terway {
    node: NetNs,
    /// The scripted daemon touches no network, so one serves all pods.
    pod: NetNs,
    daemon: ScriptedDaemon,
    program: PathBuf,
}

impl Terway {
    fn new(folder: &Path) -> Self {
        Self { node: namespace(), pod: namespace(), daemon: ScriptedDaemon::new(folder), program: program() }
    }
}

impl Plugin for Terway {
    fn command(&self) -> Command {
        self.node.command(&self.program)
    }

    fn conf(&self) -> Value {
        json!({"type": "terway", "daemon_socket": self.daemon.socket(), "queue_dir": self.daemon.queue(), "timeout_ms": 1000})
    }

    fn versions(&self) -> &'static [&'static str] {
        &VERSIONS
    }

    fn netns(&self) -> Netns {
        Netns { path: self.pod.path().to_owned(), guard: Box::new(()) }
    }

    fn own_netns(&self) -> PathBuf {
        self.node.path().to_owned()
    }

    fn daemon(&self) -> Option<&dyn Daemon> {
        Some(&self.daemon)
    }

    fn claims(&self) -> Claims {
        Claims {
            ignores_unknown_fields: true,
            add_is_idempotent: true,
            del_without_daemon: true,
            release_within: Duration::from_secs(5),
            netns_code: Some(8),
            patience: Duration::from_secs(3),
        }
    }
}

impl Daemon for ScriptedDaemon {
    fn stop(&self) {
        Self::stop(self);
    }

    fn start(&self) {
        Self::start(self);
    }

    fn slow(&self, slow: bool) {
        self.script(|script| script.slow = slow);
    }

    fn holds(&self, container_id: &str) -> bool {
        Self::holds(self, container_id)
    }
}

#[test]
fn verb_matrix_with_scripted_daemon() {
    let folder = tempfile::tempdir().unwrap();
    let plugin = Terway::new(folder.path());
    let report = cni_matrix::run(&plugin);
    println!("{report}");
    report.assert_clean();
}

/// The reference plugin `ptp` with `host-local`, in a namespace of ours: proves the table on something we did not write.
struct Reference {
    node: NetNs,
    folder: PathBuf,
}

const REFERENCE: &str = "/usr/lib/cni";

impl Plugin for Reference {
    fn command(&self) -> Command {
        self.node.command(Path::new(REFERENCE).join("ptp"))
    }

    fn cni_path(&self) -> String {
        REFERENCE.to_owned()
    }

    fn conf(&self) -> Value {
        // IPv4 only: with IPv6, ptp waits seconds for duplicate address detection, and fails when it has waited ten.
        let ranges = json!([[{"subnet": "10.9.0.0/16"}]]);
        let routes = json!([{"dst": "0.0.0.0/0"}]);
        json!({"type": "ptp", "ipam": {"type": "host-local", "dataDir": self.folder, "ranges": ranges, "routes": routes}})
    }

    /// Those of the plugins 1.1.1, which Debian 12 has.
    fn versions(&self) -> &'static [&'static str] {
        &["0.3.0", "0.3.1", "0.4.0", "1.0.0"]
    }

    fn netns(&self) -> Netns {
        let namespace = namespace();
        Netns { path: namespace.path().to_owned(), guard: Box::new(namespace) }
    }

    fn own_netns(&self) -> PathBuf {
        self.node.path().to_owned()
    }

    fn deviations(&self) -> Vec<Deviation> {
        let container = "pkg/skel of libcni 1.1 looks at the container before the verb";
        let known = |cells, problem, reason| Deviation { cells, problem, reason, always: true };
        let race = |cells, problem, reason| Deviation { cells, problem, reason, always: false };
        vec![
            known("* * *", "the error has no cniVersion", "libcni's pkg/skel writes errors without it"),
            known("DEL * false-netns", "unknown FS magic", "ptp forgives a netns that is gone, not one that is none"),
            known("VERSION * unknown-command", "missing containerID", container),
            known("GC * good", "missing containerID", container),
            known("STATUS * good", "missing containerID", container),
            race("ADD * own-netns", "should fail", "plugins 1.1.1 do not compare; what they meet there may stop them"),
        ]
    }
}

#[test]
fn verb_matrix_of_reference_plugins() {
    if !Path::new(REFERENCE).join("ptp").exists() {
        println!("skipped: no {REFERENCE}/ptp (Debian package containernetworking-plugins)");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let plugin = Reference { node: namespace(), folder: folder.path().to_owned() };
    let report = cni_matrix::run(&plugin);
    println!("{report}");
    report.assert_clean();
}
