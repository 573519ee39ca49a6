//! The addresses of the API servers: configured, learned from the slices of `default/kubernetes`, and kept on disk.
//!
//! The ClusterIP of that Service is tried last: whether it leads anywhere depends on what this daemon itself programs.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tracing::{info, warn};

use crate::atomic_file;

/// The addresses of one cluster's API servers.
#[derive(Debug)]
pub(super) struct Servers {
    state: Mutex<State>,
    /// The file that keeps learned addresses over restarts.
    file: PathBuf,
}

#[derive(Debug, Default)]
struct State {
    /// Named by the operator, or by the kubeconfig.
    configured: Vec<SocketAddr>,
    /// The endpoints of `default/kubernetes`.
    learned: BTreeSet<SocketAddr>,
    /// The ClusterIP of `default/kubernetes`, as a container is told it.
    cluster_ip: Option<SocketAddr>,
    /// The address that answered last.
    last_good: Option<SocketAddr>,
}

impl Servers {
    /// Reads what an earlier daemon has learned.
    pub(super) fn open(file: PathBuf) -> Self {
        let learned = match std::fs::read_to_string(&file) {
            Ok(text) => text.lines().filter_map(|line| line.trim().parse().ok()).collect(),
            Err(error) => {
                if error.kind() != std::io::ErrorKind::NotFound {
                    warn!(file = %file.display(), %error, "failed to read the kept addresses of the API servers");
                }
                BTreeSet::new()
            }
        };
        Self { state: Mutex::new(State { learned, ..State::default() }), file }
    }

    /// Adds addresses that the operator or the kubeconfig names.
    pub(super) fn add_configured(&self, addresses: &[SocketAddr]) {
        let mut state = self.lock();
        for address in addresses {
            if !state.configured.contains(address) {
                state.configured.push(*address);
            }
        }
    }

    /// Sets the ClusterIP of `default/kubernetes`.
    pub(super) fn set_cluster_ip(&self, address: Option<SocketAddr>) {
        self.lock().cluster_ip = address;
    }

    /// Replaces the learned addresses and keeps them on disk. An empty set is ignored: a cluster whose API answers has an API server.
    ///
    /// Returns whether they have changed.
    pub(super) fn learn(&self, addresses: BTreeSet<SocketAddr>) -> bool {
        if addresses.is_empty() || self.lock().learned == addresses {
            return false;
        }
        let text: String = addresses.iter().map(|address| format!("{address}\n")).collect();
        if let Err(error) = atomic_file::write_if_changed(&self.file, text.as_bytes()) {
            warn!(file = %self.file.display(), %error, "failed to keep the addresses of the API servers");
        }
        info!(?addresses, "addresses of the API servers");
        self.lock().learned = addresses;
        true
    }

    /// Notes which address has answered.
    pub(super) fn answered(&self, address: SocketAddr) {
        self.lock().last_good = Some(address);
    }

    /// All addresses in the order in which they are tried: the one that answered last, then configured, learned and ClusterIP.
    pub(super) fn in_order(&self) -> Vec<SocketAddr> {
        let state = self.lock();
        let mut seen = BTreeSet::new();
        let all = state.last_good.iter().chain(&state.configured).chain(&state.learned).chain(&state.cluster_ip);
        all.copied().filter(|address| seen.insert(*address)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The guarded values are written whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn last_good_server_is_tried_first_and_the_cluster_ip_last() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("api-servers");
        let [a, b, c, vip] = ["10.0.0.1:6443", "10.0.0.2:6443", "[fd00::3]:6443", "10.96.0.1:443"].map(address);
        let servers = Servers::open(file.clone());
        servers.add_configured(&[a]);
        servers.set_cluster_ip(Some(vip));
        assert_eq!(servers.in_order(), [a, vip]);
        assert!(servers.learn([a, b, c].into()));
        assert!(!servers.learn([a, b, c].into()));
        servers.answered(b);
        assert_eq!(servers.in_order(), [b, a, c, vip]);
        // An empty slice is a mistake or a moment, not a cluster without API server.
        assert!(!servers.learn(BTreeSet::new()));
        let restarted = Servers::open(file.clone());
        assert_eq!(restarted.in_order(), [a, b, c]);
        std::fs::write(&file, "garbage\n10.0.0.9:6443\n").unwrap();
        assert_eq!(Servers::open(file).in_order(), [address("10.0.0.9:6443")]);
    }
}
