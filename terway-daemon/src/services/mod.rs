//! Services of this node: from the source of objects, by the planner, into the datapath.
//!
//! One task waits for news; each step (objects in, plan, map writes) runs on a blocking thread, one after the other. Nothing is written before
//! the source has told everything, so that a restart takes nothing away that is only not known yet. A write that fails makes the planner
//! distrust what it knows: the maps are read again and the whole difference is planned anew.

mod cgroup;
mod health;
mod metrics;
mod sockets;
mod state;
mod view;

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;
use terway_core::errors::{self, Error};
use terway_core::objects::Objects;
use terway_core::service::{NodeFacts, Settings, SocketTermination};
use terway_proto::v1;
use tokio::sync::{mpsc, watch};
use tracing::{error, warn};

use crate::bpf::Datapath;
use crate::follow::{self, burst, until};
use crate::net::Host;
use crate::objects::{Batch, DirSource, ObjectSource as _, Update};
use crate::policy::News;

pub use cgroup::CgroupAt;
use health::{Health, Refused};
pub use metrics::ServiceMetrics;
pub use sockets::SocketPath;
use state::{Outlets, State, Work};

/// How often a folder that cannot be watched is tried again.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Batches that may wait; a source that is faster waits too.
const WAITING: usize = 64;

/// Where objects come from: the value of `--objects`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// `dir:PATH`: the manifests of a folder.
    Dir(PathBuf),
}

impl FromStr for Origin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("dir", path)) if !path.is_empty() => Ok(Self::Dir(path.into())),
            _ => Err("is not dir:PATH".to_owned()),
        }
    }
}

/// What Services are made with.
pub struct Setup {
    /// Where the objects come from; with none, the node serves no Services.
    pub origin: Option<Origin>,
    /// Who the node is.
    pub facts: NodeFacts,
    /// What its administrator set.
    pub settings: Settings,
    /// The kernel's side.
    pub datapath: Arc<Datapath>,
    /// The node's addresses, where node ports are served.
    pub addresses: watch::Receiver<Arc<Vec<IpNetwork>>>,
    /// Counters.
    pub metrics: ServiceMetrics,
    /// The cgroup whose processes are served at the socket; by default the root.
    pub cgroup: Option<CgroupAt>,
    /// Whose sockets end with their backend.
    pub end_sockets: SocketTermination,
    /// Who can enter network namespaces.
    pub host: Arc<Host>,
    /// Who else wants to know what changes.
    pub listener: mpsc::UnboundedSender<News>,
}

/// See the [module](self).
#[derive(Debug)]
pub struct Services {
    state: Mutex<State>,
    /// What is wrong, kept apart so that asking never waits for a step.
    problems: Mutex<Vec<Error>>,
    source_failure: Mutex<Option<Error>>,
    health: Arc<Refused>,
    in_force: watch::Receiver<bool>,
    sockets: Arc<SocketPath>,
}

impl Services {
    /// Begins to serve. `pods` tells the paths of the network namespaces of the node's pods.
    #[must_use]
    pub fn start(setup: Setup, pods: impl Fn() -> Vec<String> + Send + Sync + 'static) -> Arc<Self> {
        let sockets = Arc::new(SocketPath::new(&setup, Box::new(pods)));
        let Setup { origin, facts, settings, datapath, addresses, metrics, listener, .. } = setup;
        let (health, ports) = watch::channel(Health::default());
        let (tell, in_force) = watch::channel(false);
        let outlets = Outlets { health, in_force: tell, listener };
        let this = Arc::new(Self {
            state: Mutex::new(State::new(datapath, facts, settings, metrics, outlets)),
            problems: Mutex::default(),
            source_failure: Mutex::default(),
            health: Arc::default(),
            in_force,
            sockets: Arc::clone(&sockets),
        });
        tokio::spawn(health::serve(ports, Arc::clone(&this.health)));
        // Before the first pod: what is attached is part of how a node looks to whoever compares.
        sockets.attach_now();
        tokio::spawn(sockets.run());
        let (sender, news) = mpsc::channel(WAITING);
        tokio::spawn(Arc::clone(&this).follow(news, addresses));
        tokio::spawn(Arc::clone(&this).feed(origin, sender));
        this
    }

    /// What is wrong with objects, their source, or writing what follows from them.
    #[must_use]
    pub fn problems(&self) -> Vec<Error> {
        let failure = lock(&self.source_failure).clone();
        let problems = lock(&self.problems).clone();
        failure.into_iter().chain(problems).chain(self.health.problems()).collect()
    }

    /// Waits, for so long at the most, until the maps have held for the first time what follows from all objects: a pod that starts
    /// then finds every Service that was there before it.
    ///
    /// A daemon that takes over maps of an earlier one lets pods start even so: the Services in them are served.
    ///
    /// # Errors
    /// [`errors::SERVICES_UNSYNCED`], with what is in the way as far as it is known.
    pub async fn synced(&self, limit: Duration) -> Result<(), Error> {
        let mut in_force = self.in_force.clone();
        let waited = tokio::time::timeout(limit, in_force.wait_for(|synced| *synced)).await;
        if matches!(waited, Ok(Ok(_))) {
            return Ok(());
        }
        let reason =
            self.problems().first().map_or_else(|| "The objects are still being read.".to_owned(), ToString::to_string);
        Err(Error::new(errors::SERVICES_UNSYNCED, reason))
    }

    /// How Services are resolved at the socket.
    pub async fn socket_path(&self) -> v1::SocketPath {
        self.sockets.view().await
    }

    /// What is served, of one namespace or name if they are not empty.
    ///
    /// # Errors
    /// When the daemon is ending.
    pub async fn list(self: &Arc<Self>, namespace: String, name: String) -> Result<v1::ListServicesResponse, Error> {
        let this = Arc::clone(self);
        let list = move || lock(&this.state).list(&namespace, &name);
        tokio::task::spawn_blocking(list).await.map_err(|error| Error::new(errors::INTERNAL, error.to_string()))
    }

    /// What the datapath's numbers of ports stand for: the name of the Service, or of the pod whose host port it is. Blocks.
    #[must_use]
    pub fn names(&self, numbers: &BTreeSet<u32>) -> HashMap<u32, String> {
        if numbers.is_empty() { HashMap::new() } else { lock(&self.state).names(numbers) }
    }

    /// Keeps a source running for as long as anybody listens.
    async fn feed(self: Arc<Self>, origin: Option<Origin>, news: mpsc::Sender<Batch>) {
        let Some(Origin::Dir(path)) = origin else {
            // No objects is a complete view too: what an earlier daemon served is taken away.
            let _ = news.send(Batch { updates: vec![Update::Synced], problems: None }).await;
            return;
        };
        loop {
            let ended = match DirSource::new(&path) {
                Ok(source) => {
                    lock(&self.source_failure).take();
                    Box::new(source).run(news.clone()).await
                }
                Err(error) => Err(error),
            };
            let Err(error) = ended else { return };
            if lock(&self.source_failure).replace(Error::new(errors::OBJECTS_UNREADABLE, error.to_string())).is_none() {
                error!(%error, "no news of objects; Services stay as they are");
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    async fn follow(
        self: Arc<Self>,
        mut news: mpsc::Receiver<Batch>,
        mut addresses: watch::Receiver<Arc<Vec<IpNetwork>>>,
    ) {
        let first = follow::addresses(&mut addresses);
        let mut due = self.step(Work::Addresses(first)).await;
        loop {
            let work = tokio::select! {
                Some(batch) = news.recv() => Work::News(burst(batch, || news.try_recv().ok())),
                Ok(()) = addresses.changed() => Work::Addresses(follow::addresses(&mut addresses)),
                () = until(due) => Work::Due,
            };
            due = self.step(work).await;
        }
    }

    /// Does some work on a blocking thread; when the next is due.
    async fn step(self: &Arc<Self>, work: Work) -> Option<Instant> {
        let this = Arc::clone(self);
        let step = move || {
            let mut state = lock(&this.state);
            let due = state.step(work);
            *lock(&this.problems) = state.problems();
            if state.lives_ended() {
                this.sockets.lives_ended();
            }
            due
        };
        match tokio::task::spawn_blocking(step).await {
            Ok(due) => due,
            Err(error) => {
                // A panic may have left the planner torn; the maps are the truth.
                warn!(%error, "a step of Services ended by itself; reading the maps again");
                Some(lock(&self.state).distrust())
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All batches, in order, taken into the store: what changed, and whether the view became complete.
fn take_in(objects: &mut Objects, batches: Vec<Batch>) -> (Vec<terway_core::objects::Applied>, bool) {
    let (mut applied, mut synced) = (Vec::new(), false);
    for batch in batches {
        let (more, complete) = batch.apply(objects);
        applied.extend(more);
        synced |= complete;
    }
    (applied, synced)
}

#[cfg(test)]
mod tests;
