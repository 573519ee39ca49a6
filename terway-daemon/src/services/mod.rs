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
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use ipnetwork::IpNetwork;
use terway_core::errors::{self, Error};
use terway_core::objects::Kind;
use terway_core::service::{NodeFacts, Settings, SocketTermination};
use terway_proto::v1;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::warn;

use crate::bpf::Datapath;
use crate::follow::{self, until};
use crate::net::Host;
use crate::objects::{ObjectChanges, ObjectStore, Subscriber};

pub use cgroup::CgroupAt;
use health::{Health, Refused};
pub use metrics::ServiceMetrics;
pub use sockets::SocketPath;
use state::{Outlets, State, Work};

/// The kinds of objects that Services are planned from.
const KINDS: [Kind; 4] = [Kind::Service, Kind::EndpointSlice, Kind::Node, Kind::Pod];

/// What Services are made with.
pub struct Setup {
    /// All objects, written by the feed.
    pub objects: Arc<ObjectStore>,
    /// Whether there is an object source; without one, the node serves no Services.
    pub has_source: bool,
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
}

/// See the [module](self).
#[derive(Debug)]
pub struct Services {
    state: Mutex<State>,
    /// What is wrong, kept apart so that asking never waits for a step.
    problems: Mutex<Vec<Error>>,
    commands: mpsc::UnboundedSender<Work>,
    health: Arc<Refused>,
    in_force: watch::Receiver<bool>,
    sockets: Arc<SocketPath>,
}

impl Services {
    /// Begins to serve. `pods` tells the paths of the network namespaces of the node's pods.
    #[must_use]
    pub fn start(setup: Setup, pods: impl Fn() -> Vec<String> + Send + Sync + 'static) -> Arc<Self> {
        let sockets = Arc::new(SocketPath::new(&setup, Box::new(pods)));
        let Setup { objects, facts, settings, datapath, addresses, metrics, .. } = setup;
        let (health, ports) = watch::channel(Health::default());
        let (tell, in_force) = watch::channel(false);
        let outlets = Outlets { health, in_force: tell };
        let (commands, received) = mpsc::unbounded_channel();
        let this = Arc::new(Self {
            state: Mutex::new(State::new(datapath, objects, facts, settings, metrics, outlets)),
            problems: Mutex::default(),
            commands,
            health: Arc::default(),
            in_force,
            sockets: Arc::clone(&sockets),
        });
        tokio::spawn(health::serve(ports, Arc::clone(&this.health)));
        // Before the first pod: what is attached is part of how a node looks to whoever compares.
        sockets.attach_now();
        tokio::spawn(sockets.run());
        tokio::spawn(Arc::clone(&this).follow(received, addresses));
        this
    }

    /// What is wrong with Services, or with writing them.
    #[must_use]
    pub fn problems(&self) -> Vec<Error> {
        let problems = lock(&self.problems).clone();
        problems.into_iter().chain(self.health.problems()).collect()
    }

    /// Waits, for so long at the most, until the maps have held for the first time what follows from all objects: a pod that starts
    /// then finds every Service that was there before it.
    ///
    /// A daemon that takes over maps of an earlier one lets pods start even so: the Services in them are served.
    ///
    /// Returns whether that is so.
    pub async fn synced(&self, limit: Duration) -> bool {
        let mut in_force = self.in_force.clone();
        let waited = tokio::time::timeout(limit, in_force.wait_for(|synced| *synced)).await;
        matches!(waited, Ok(Ok(_)))
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

    async fn follow(
        self: Arc<Self>,
        mut commands: mpsc::UnboundedReceiver<Work>,
        mut addresses: watch::Receiver<Arc<Vec<IpNetwork>>>,
    ) {
        let first = follow::addresses(&mut addresses);
        let mut due = self.step(Work::Addresses(first)).await;
        loop {
            let work = tokio::select! {
                Some(command) = commands.recv() => command,
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

#[async_trait]
impl Subscriber for Services {
    /// Returns when the maps hold what follows from the changes, or the write has failed and will be tried again.
    async fn deliver(&self, changes: Arc<ObjectChanges>) {
        let (done, is_done) = oneshot::channel();
        if self.commands.send(Work::Objects(changes, done)).is_ok() {
            // The sender is dropped without a message when the step panics.
            let _ = is_done.await;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
