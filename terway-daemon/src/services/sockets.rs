//! Services at the socket: the programs on the cgroup, and the sockets that end with their backend.
//!
//! Which sockets end is decided by `terway_core::service::StaleSockets`. They are looked for twice: at once when a backend's life has ended, and again a
//! second later, because a program that was just running may have written one meanwhile. Then what the table holds of dead
//! backends is forgotten.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use terway_core::service::{SocketTermination, StaleSockets, TranslatedSocket};
use terway_proto::v1;
use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::cgroup::{self, CgroupAt};
use super::metrics::ServiceMetrics;
use super::{Setup, lock};
use crate::bpf::{BpfError, Datapath, RETIRE_AFTER, SocketRow};
use crate::net::{DestroyOutcome, Host, NetError, PodNetns, SockDiag, netns_cookie};

/// How often it is looked whether the programs are still attached.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// Tells the paths of the network namespaces of pods.
type Pods = Box<dyn Fn() -> Vec<String> + Send + Sync>;

/// See the [module](self).
pub struct SocketPath {
    datapath: Arc<Datapath>,
    /// Where, if it was said.
    wanted: Option<CgroupAt>,
    whose: SocketTermination,
    host: Arc<Host>,
    pods: Pods,
    metrics: ServiceMetrics,
    state: Mutex<State>,
    ended: Notify,
    count: AtomicU64,
    /// The kernel has said that it cannot end sockets.
    unable: AtomicBool,
    /// Cookies of network namespaces, by device and inode number.
    cookies: Mutex<HashMap<(u64, u64), u64>>,
}

#[derive(Default)]
struct State {
    /// The cgroup, once programs were attached to it.
    cgroup: Option<PathBuf>,
    /// What is wrong; told once in the log, and as long as it lasts in the status.
    reason: String,
}

impl fmt::Debug for SocketPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SocketPath").field("wanted", &self.wanted).field("whose", &self.whose).finish_non_exhaustive()
    }
}

impl SocketPath {
    pub(super) fn new(setup: &Setup, pods: Pods) -> Self {
        Self {
            datapath: Arc::clone(&setup.datapath),
            // Without Services there is nothing to resolve.
            wanted: if setup.has_source { setup.cgroup.clone() } else { Some(CgroupAt::None) },
            whose: setup.end_sockets,
            host: Arc::clone(&setup.host),
            pods,
            metrics: setup.metrics.clone(),
            state: Mutex::default(),
            ended: Notify::new(),
            count: AtomicU64::new(0),
            unable: AtomicBool::new(false),
            cookies: Mutex::default(),
        }
    }

    /// Some backend's life has ended.
    pub(super) fn lives_ended(&self) {
        self.ended.notify_one();
    }

    /// As the contract writes it.
    pub(super) async fn view(self: &Arc<Self>) -> v1::SocketPath {
        let this = Arc::clone(self);
        let look = move || this.datapath.sockets().attached().unwrap_or_default();
        let programs = tokio::task::spawn_blocking(look).await.unwrap_or_default();
        let state = lock(&self.state);
        v1::SocketPath {
            cgroup: state.cgroup.as_ref().map(|path| path.display().to_string()).unwrap_or_default(),
            programs: u32::try_from(programs).unwrap_or(u32::MAX),
            reason: state.reason.clone(),
            ended: self.count.load(Ordering::Relaxed),
        }
    }

    /// Keeps the programs attached and ends sockets; as long as the daemon runs.
    pub(super) async fn run(self: Arc<Self>) {
        let mut look_again = Instant::now() + LOOK_AGAIN;
        let mut last_look: Option<Instant> = None;
        loop {
            let due = last_look.unwrap_or(look_again).min(look_again);
            tokio::select! {
                () = self.ended.notified() => {
                    self.sweep(false).await;
                    last_look.get_or_insert(Instant::now() + RETIRE_AFTER);
                }
                () = tokio::time::sleep_until(due) => {
                    if last_look.take_if(|at| *at <= due).is_some() {
                        self.sweep(true).await;
                    }
                    if look_again <= due {
                        self.attach().await;
                        look_again = Instant::now() + LOOK_AGAIN;
                    }
                }
            }
        }
    }

    async fn attach(self: &Arc<Self>) {
        let this = Arc::clone(self);
        if let Err(error) = tokio::task::spawn_blocking(move || this.attach_now()).await {
            warn!(%error, "attaching to sockets ended by itself");
        }
    }

    /// Attaches where nothing is attached yet, or not all.
    pub(super) fn attach_now(&self) {
        let cgroup = match &self.wanted {
            Some(CgroupAt::None) => {
                // What an earlier daemon attached would go on translating what nobody keeps true.
                let reason = match self.datapath.sockets().detach() {
                    Ok(()) => "not wanted".to_owned(),
                    Err(error) => error.to_string(),
                };
                return self.told(None, reason, false);
            }
            Some(CgroupAt::Path(path)) => Ok(path.clone()),
            None => cgroup::find(),
        };
        let cgroup = match cgroup {
            Ok(cgroup) => cgroup,
            Err(reason) => return self.told(None, reason, true),
        };
        let known = lock(&self.state).cgroup.clone();
        if known.as_ref() == Some(&cgroup) && self.is_whole() {
            return;
        }
        match self.datapath.sockets().attach(&cgroup) {
            Ok(programs) => {
                info!(cgroup = %cgroup.display(), programs = programs.attached, "Services are resolved at the socket");
                let reason = programs.unprotected.map(|why| format!("ports of Services are not kept free: {why}"));
                let bad = reason.is_some();
                self.told(Some(cgroup), reason.unwrap_or_default(), bad);
            }
            Err(error) => self.told(None, said(&error), true),
        }
    }

    fn is_whole(&self) -> bool {
        let attached = self.datapath.sockets().attached().unwrap_or_default();
        self.metrics.socket_programs(attached);
        let state = lock(&self.state);
        // Those that could not be attached are not tried each minute.
        attached == terway_abi::names::SOCKET_PROGRAMS.len() + terway_abi::names::BIND_PROGRAMS.len()
            || (!state.reason.is_empty() && attached == terway_abi::names::SOCKET_PROGRAMS.len())
    }

    fn told(&self, cgroup: Option<PathBuf>, reason: String, bad: bool) {
        self.metrics.socket_programs(self.datapath.sockets().attached().unwrap_or_default());
        let mut state = lock(&self.state);
        if bad && state.reason != reason {
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

    /// Ends the sockets whose backend is gone.
    async fn sweep(self: &Arc<Self>, forget: bool) {
        let this = Arc::clone(self);
        let dead = tokio::task::spawn_blocking(move || -> Result<Vec<SocketRow>, BpfError> {
            let all = this.datapath.sockets().list()?;
            Ok(all.into_iter().filter(|row| !row.alive).collect())
        });
        let dead = match dead.await {
            Ok(Ok(dead)) => dead,
            Ok(Err(error)) => return warn!(%error, "cannot read which sockets Services have translated"),
            Err(error) => return warn!(%error, "looking for sockets ended by itself"),
        };
        if dead.is_empty() {
            return;
        }
        let doomed = StaleSockets::of(dead.iter().filter(|row| !row.note).map(translated), self.whose);
        if !doomed.is_empty() && !self.unable.load(Ordering::Relaxed) {
            self.end(Arc::new(doomed)).await;
        }
        // A socket that lives on keeps the name of its peer.
        let ending = |row: &SocketRow| self.whose.protocols().contains(&row.protocol);
        let dead: Vec<SocketRow> = dead.into_iter().filter(ending).collect();
        if forget && !self.unable.load(Ordering::Relaxed) {
            let datapath = Arc::clone(&self.datapath);
            match tokio::task::spawn_blocking(move || datapath.sockets().forget(&dead)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => warn!(%error, "cannot forget sockets whose backend is gone"),
                Err(error) => warn!(%error, "forgetting sockets ended by itself"),
            }
        }
    }

    /// Enters each network namespace that has some, and ends them there.
    async fn end(&self, doomed: Arc<StaleSockets>) {
        let mut tally = Tally::default();
        // 0: the kernel tells no cookies, so every namespace may have some.
        let own = self.datapath.features().host_netns;
        if own == 0 || doomed.netns().contains(&own) {
            let doomed = Arc::clone(&doomed);
            let done = self.host.pool().run_in_host(move || end_here(&doomed)).await;
            tally.take(done.flatten());
        }
        for netns in self.places(&doomed, own).await {
            let doomed = Arc::clone(&doomed);
            let done = self.host.pool().run_in(&netns, move || end_here(&doomed)).await;
            tally.take(done.flatten());
        }
        for ((protocol, outcome), count) in tally.0 {
            self.metrics.sockets_ended(protocol, outcome, count);
            if outcome == ENDED {
                self.count.fetch_add(count, Ordering::Relaxed);
                debug!(protocol, count, "ended sockets whose backend is gone");
            }
            if outcome == UNSUPPORTED && !self.unable.swap(true, Ordering::Relaxed) {
                warn!(
                    "this kernel cannot end sockets (CONFIG_INET_DIAG_DESTROY): clients that hold a connected UDP socket to a Service \
                     notice by themselves, or not, that their backend is gone"
                );
            }
        }
    }

    /// The network namespaces of pods that have doomed sockets.
    async fn places(&self, doomed: &StaleSockets, own: u64) -> Vec<PodNetns> {
        if own != 0 && doomed.netns().iter().all(|netns| *netns == own) {
            return Vec::new();
        }
        let mut places = HashMap::new();
        for path in (self.pods)() {
            // A pod that is just going has no sockets to care for.
            let Ok(netns) = self.host.open_netns(&path) else { continue };
            places.insert(netns.id(), netns);
        }
        lock(&self.cookies).retain(|id, _| places.contains_key(id));
        if own == 0 {
            return places.into_values().collect();
        }
        let mut wanted = Vec::new();
        for (id, netns) in places {
            let known = lock(&self.cookies).get(&id).copied();
            let cookie = match known {
                Some(cookie) => Some(cookie),
                None => self.host.pool().run_in(&netns, netns_cookie).await.ok().and_then(Result::ok).flatten(),
            };
            if let Some(cookie) = cookie {
                lock(&self.cookies).insert(id, cookie);
            }
            if cookie.is_none_or(|cookie| doomed.netns().contains(&cookie)) {
                wanted.push(netns);
            }
        }
        wanted
    }
}

const ENDED: &str = "ended";
const UNSUPPORTED: &str = "unsupported";

/// What became of sockets, by protocol.
#[derive(Default)]
struct Tally(BTreeMap<(u8, &'static str), u64>);

impl Tally {
    fn take(&mut self, done: Result<Self, NetError>) {
        match done {
            Ok(other) => other.0.into_iter().for_each(|(what, count)| *self.0.entry(what).or_default() += count),
            Err(error) => warn!(%error, "cannot look for sockets in a network namespace"),
        }
    }
}

/// Ends the doomed sockets of the calling thread's network namespace.
fn end_here(doomed: &StaleSockets) -> Result<Tally, NetError> {
    let mut tally = Tally::default();
    let mut diag = SockDiag::open()?;
    for protocol in doomed.protocols() {
        for socket in diag.connected(*protocol)? {
            if !doomed.contains(socket.cookie, *protocol, socket.peer) {
                continue;
            }
            let outcome = match diag.destroy(&socket) {
                Ok(DestroyOutcome::Destroyed) => ENDED,
                Ok(DestroyOutcome::NotFound) => "gone",
                Ok(DestroyOutcome::NotSupported) => UNSUPPORTED,
                Err(error) => {
                    debug!(%error, peer = %socket.peer, "cannot end a socket");
                    "failed"
                }
            };
            *tally.0.entry((*protocol, outcome)).or_default() += 1;
        }
    }
    Ok(tally)
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

/// An error with its causes, on one line: the verifier's words would fill pages.
fn said(error: &BpfError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
