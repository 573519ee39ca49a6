//! Socket programs: resolve Services at the socket of clients on a cgroup, and destroy sockets whose backend was removed.
//!
//! `terway_core::service::StaleSockets` decides which sockets are destroyed. The table is swept twice: at once when a backend is removed, and
//! again after [`RETIRE_AFTER`], because a program that was running may still have written an entry of it. The second sweep also removes the
//! entries of removed backends.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use terway_core::service::{SocketTermination, StaleSockets, TranslatedSocket};
use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::cgroup::{self, CgroupAt};
use super::metrics::ServiceMetrics;
use super::{Setup, lock};
use crate::bpf::{BpfError, Datapath, RETIRE_AFTER, SocketRow};
use crate::net::{DestroyOutcome, Host, NetError, PodNetns, SockDiag, netns_cookie};
use crate::supervise;

/// The interval at which the attachment of the programs is checked.
const CHECK_INTERVAL: Duration = Duration::from_secs(60);

/// Returns the paths of the network namespaces of the node's pods.
type PodNamespaces = Box<dyn Fn() -> Vec<String> + Send + Sync>;

/// See the [module](self).
pub struct SocketPath {
    datapath: Arc<Datapath>,
    /// The option `--cgroup`.
    cgroup: Option<CgroupAt>,
    termination: SocketTermination,
    host: Arc<Host>,
    pods: PodNamespaces,
    metrics: ServiceMetrics,
    state: Mutex<State>,
    backends_removed: Notify,
    /// Sockets destroyed so far.
    destroyed: AtomicU64,
    /// The kernel cannot destroy sockets.
    is_unsupported: AtomicBool,
    /// Cookies of network namespaces, by device and inode number.
    cookies: Mutex<HashMap<(u64, u64), u64>>,
}

#[derive(Default)]
struct State {
    /// The cgroup, once programs were attached to it.
    cgroup: Option<PathBuf>,
    /// The reason for which not all programs are attached; empty if all are.
    reason: String,
}

/// Status of the socket programs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SocketPathStatus {
    /// The cgroup, if programs are attached.
    pub cgroup: Option<PathBuf>,
    /// The number of attached programs.
    pub programs: usize,
    /// The reason for which not all programs are attached; empty if all are.
    pub reason: String,
    /// Sockets that were destroyed because their backend was removed.
    pub destroyed: u64,
}

impl fmt::Debug for SocketPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SocketPath")
            .field("cgroup", &self.cgroup)
            .field("termination", &self.termination)
            .finish_non_exhaustive()
    }
}

impl SocketPath {
    pub(super) fn new(setup: &Setup, pods: PodNamespaces) -> Self {
        Self {
            datapath: Arc::clone(&setup.datapath),
            // Without Services there is nothing to resolve.
            cgroup: if setup.has_source { setup.cgroup.clone() } else { Some(CgroupAt::None) },
            termination: setup.end_sockets,
            host: Arc::clone(&setup.host),
            pods,
            metrics: setup.metrics.clone(),
            state: Mutex::default(),
            backends_removed: Notify::new(),
            destroyed: AtomicU64::new(0),
            is_unsupported: AtomicBool::new(false),
            cookies: Mutex::default(),
        }
    }

    /// Notifies that backends were removed.
    pub(super) fn backends_removed(&self) {
        self.backends_removed.notify_one();
    }

    /// The status, with programs as they are attached now.
    pub(super) async fn status(self: &Arc<Self>) -> SocketPathStatus {
        let this = Arc::clone(self);
        let count = move || this.datapath.sockets().attached().unwrap_or_default();
        let programs = supervise::blocking(count).await;
        let state = lock(&self.state);
        SocketPathStatus {
            cgroup: state.cgroup.clone(),
            programs,
            reason: state.reason.clone(),
            destroyed: self.destroyed.load(Ordering::Relaxed),
        }
    }

    /// Keeps the programs attached and destroys sockets. Runs as long as the daemon.
    pub(super) async fn run(self: Arc<Self>) {
        let mut next_check = Instant::now() + CHECK_INTERVAL;
        let mut second_sweep: Option<Instant> = None;
        loop {
            let due = second_sweep.unwrap_or(next_check).min(next_check);
            tokio::select! {
                () = self.backends_removed.notified() => {
                    self.sweep(false).await;
                    second_sweep.get_or_insert(Instant::now() + RETIRE_AFTER);
                }
                () = tokio::time::sleep_until(due) => {
                    if second_sweep.take_if(|at| *at <= due).is_some() {
                        self.sweep(true).await;
                    }
                    if next_check <= due {
                        self.attach().await;
                        next_check = Instant::now() + CHECK_INTERVAL;
                    }
                }
            }
        }
    }

    async fn attach(self: &Arc<Self>) {
        let this = Arc::clone(self);
        supervise::blocking(move || this.attach_now()).await;
    }

    /// Attaches the programs that are not attached yet.
    pub(super) fn attach_now(&self) {
        let cgroup = match &self.cgroup {
            Some(CgroupAt::None) => {
                // Programs of an earlier daemon would translate by entries that are no longer updated.
                let reason = match self.datapath.sockets().detach() {
                    Ok(()) => "not wanted".to_owned(),
                    Err(error) => error.to_string(),
                };
                return self.set_state(None, reason, false);
            }
            Some(CgroupAt::Path(path)) => Ok(path.clone()),
            None => cgroup::find(),
        };
        let cgroup = match cgroup {
            Ok(cgroup) => cgroup,
            Err(reason) => return self.set_state(None, reason, true),
        };
        let known = lock(&self.state).cgroup.clone();
        if known.as_ref() == Some(&cgroup) && self.is_attached() {
            return;
        }
        match self.datapath.sockets().attach(&cgroup) {
            Ok(programs) => {
                info!(cgroup = %cgroup.display(), programs = programs.attached, "Services are resolved at the socket");
                let reason = programs.unprotected.map(|why| format!("ports of Services are not kept free: {why}"));
                let is_problem = reason.is_some();
                self.set_state(Some(cgroup), reason.unwrap_or_default(), is_problem);
            }
            Err(error) => self.set_state(None, first_line(&error), true),
        }
    }

    fn is_attached(&self) -> bool {
        let attached = self.datapath.sockets().attached().unwrap_or_default();
        self.metrics.socket_programs(attached);
        let state = lock(&self.state);
        // Bind programs that could not be attached are not retried each minute.
        attached == terway_abi::names::SOCKET_PROGRAMS.len() + terway_abi::names::BIND_PROGRAMS.len()
            || (!state.reason.is_empty() && attached == terway_abi::names::SOCKET_PROGRAMS.len())
    }

    fn set_state(&self, cgroup: Option<PathBuf>, reason: String, is_problem: bool) {
        self.metrics.socket_programs(self.datapath.sockets().attached().unwrap_or_default());
        let mut state = lock(&self.state);
        if is_problem && state.reason != reason {
            match &cgroup {
                Some(_) => warn!("{reason}"),
                None => warn!(
                    reason,
                    "Services are resolved by packets alone: pods are served, the node's own processes are not"
                ),
            }
        }
        *state = State { cgroup, reason };
    }

    /// Destroys the sockets whose backend was removed; with `remove_entries` also removes their entries of the table.
    async fn sweep(self: &Arc<Self>, remove_entries: bool) {
        let this = Arc::clone(self);
        let stale = supervise::blocking(move || -> Result<Vec<SocketRow>, BpfError> {
            let all = this.datapath.sockets().list()?;
            Ok(all.into_iter().filter(|row| !row.alive).collect())
        });
        let stale = match stale.await {
            Ok(rows) => rows,
            Err(error) => return warn!(%error, "cannot read the table of translated sockets"),
        };
        if stale.is_empty() {
            return;
        }
        let sockets = StaleSockets::of(stale.iter().filter(|row| !row.note).map(translated), self.termination);
        if !sockets.is_empty() && !self.is_unsupported.load(Ordering::Relaxed) {
            self.destroy(Arc::new(sockets)).await;
        }
        // A socket that is not destroyed still needs the entry for the name of its peer.
        let is_destroyed = |row: &SocketRow| self.termination.protocols().contains(&row.protocol);
        let stale: Vec<SocketRow> = stale.into_iter().filter(is_destroyed).collect();
        if remove_entries && !self.is_unsupported.load(Ordering::Relaxed) {
            let datapath = Arc::clone(&self.datapath);
            if let Err(error) = supervise::blocking(move || datapath.sockets().forget(&stale)).await {
                warn!(%error, "cannot remove entries of sockets whose backend was removed");
            }
        }
    }

    /// Destroys sockets in each network namespace that has some.
    async fn destroy(&self, sockets: Arc<StaleSockets>) {
        let mut outcomes = Outcomes::default();
        // 0: the kernel has no cookies of namespaces, so every namespace may have some.
        let own = self.datapath.features().host_netns;
        if own == 0 || sockets.netns().contains(&own) {
            let sockets = Arc::clone(&sockets);
            let done = self.host.pool().run_in_host(move || destroy_in_current_netns(&sockets)).await;
            outcomes.add(done.flatten());
        }
        for netns in self.pod_namespaces(&sockets, own).await {
            let sockets = Arc::clone(&sockets);
            let done = self.host.pool().run_in(&netns, move || destroy_in_current_netns(&sockets)).await;
            outcomes.add(done.flatten());
        }
        for ((protocol, outcome), count) in outcomes.0 {
            self.metrics.sockets_destroyed(protocol, outcome, count);
            if outcome == DESTROYED {
                self.destroyed.fetch_add(count, Ordering::Relaxed);
                debug!(protocol, count, "destroyed sockets whose backend was removed");
            }
            if outcome == UNSUPPORTED && !self.is_unsupported.swap(true, Ordering::Relaxed) {
                warn!(
                    "this kernel cannot destroy sockets (CONFIG_INET_DIAG_DESTROY): clients with a connected UDP socket to a removed \
                     backend have to notice by themselves"
                );
            }
        }
    }

    /// The network namespaces of pods that have such sockets.
    async fn pod_namespaces(&self, sockets: &StaleSockets, own: u64) -> Vec<PodNetns> {
        if own != 0 && sockets.netns().iter().all(|netns| *netns == own) {
            return Vec::new();
        }
        let mut namespaces = HashMap::new();
        for path in (self.pods)() {
            // The pod is being deleted, and its sockets with it.
            let Ok(netns) = self.host.open_netns(&path) else { continue };
            namespaces.insert(netns.id(), netns);
        }
        lock(&self.cookies).retain(|id, _| namespaces.contains_key(id));
        if own == 0 {
            return namespaces.into_values().collect();
        }
        let mut wanted = Vec::new();
        for (id, netns) in namespaces {
            let known = lock(&self.cookies).get(&id).copied();
            let cookie = match known {
                Some(cookie) => Some(cookie),
                None => self.host.pool().run_in(&netns, netns_cookie).await.ok().and_then(Result::ok).flatten(),
            };
            if let Some(cookie) = cookie {
                lock(&self.cookies).insert(id, cookie);
            }
            if cookie.is_none_or(|cookie| sockets.netns().contains(&cookie)) {
                wanted.push(netns);
            }
        }
        wanted
    }
}

const DESTROYED: &str = "destroyed";
const UNSUPPORTED: &str = "unsupported";

/// Numbers of sockets by protocol and outcome.
#[derive(Default)]
struct Outcomes(BTreeMap<(u8, &'static str), u64>);

impl Outcomes {
    fn add(&mut self, done: Result<Self, NetError>) {
        match done {
            Ok(other) => other.0.into_iter().for_each(|(what, count)| *self.0.entry(what).or_default() += count),
            Err(error) => warn!(%error, "cannot list sockets in a network namespace"),
        }
    }
}

/// Destroys the stale sockets of the calling thread's network namespace.
fn destroy_in_current_netns(sockets: &StaleSockets) -> Result<Outcomes, NetError> {
    let mut outcomes = Outcomes::default();
    let mut diag = SockDiag::open()?;
    for protocol in sockets.protocols() {
        for socket in diag.connected(*protocol)? {
            if !sockets.contains(socket.cookie, *protocol, socket.peer) {
                continue;
            }
            let outcome = match diag.destroy(&socket) {
                Ok(DestroyOutcome::Destroyed) => DESTROYED,
                Ok(DestroyOutcome::NotFound) => "gone",
                Ok(DestroyOutcome::NotSupported) => UNSUPPORTED,
                Err(error) => {
                    debug!(%error, peer = %socket.peer, "cannot destroy a socket");
                    "failed"
                }
            };
            *outcomes.0.entry((*protocol, outcome)).or_default() += 1;
        }
    }
    Ok(outcomes)
}

fn translated(row: &SocketRow) -> TranslatedSocket {
    TranslatedSocket {
        cookie: row.cookie,
        netns: row.netns,
        protocol: row.protocol,
        backend: row.backend,
        backend_alive: row.alive,
    }
}

/// The first line of an error: the verifier's log would fill pages.
fn first_line(error: &BpfError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
