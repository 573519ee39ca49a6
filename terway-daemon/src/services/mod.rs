//! The Service actor: plans Services and writes them to the datapath's maps.
//!
//! Objects come from the [feed](crate::objects::feed). One task receives commands; each step (plan, map writes) runs on a blocking thread, one
//! after the other. Nothing is written before the objects are synced, so that a restart removes nothing that is only not known yet. After a
//! failed write the maps are read anew and the whole difference is planned.

mod cgroup;
mod health;
mod metrics;
mod sockets;
mod state;

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use ipnetwork::IpNetwork;
use terway_core::errors::{self, Error};
use terway_core::objects::{Kind, ObjectName};
use terway_core::service::{MapContents, NodeFacts, Owner, PortView, Settings, SocketTermination};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::warn;

use crate::bpf::Datapath;
use crate::follow::{self, until};
use crate::net::Host;
use crate::objects::{ObjectChanges, ObjectStore, Subscriber};

pub use cgroup::CgroupAt;
use health::{Health, UnboundPorts};
pub use metrics::ServiceMetrics;
pub use sockets::{SocketPath, SocketPathStatus};
use state::{Command, Notifiers, State};

/// The kinds of objects that Services are planned from.
const KINDS: [Kind; 4] = [Kind::Service, Kind::EndpointSlice, Kind::Node, Kind::Pod];

/// Parameters of the Service actor.
pub struct Setup {
    /// All objects, written by the feed.
    pub objects: Arc<ObjectStore>,
    /// Whether there is an object source; without one, the node serves no Services.
    pub has_source: bool,
    /// Name and zone of the node.
    pub facts: NodeFacts,
    /// Settings of the configuration.
    pub settings: Settings,
    /// The datapath.
    pub datapath: Arc<Datapath>,
    /// The node's addresses, where node ports are served.
    pub addresses: watch::Receiver<Arc<Vec<IpNetwork>>>,
    /// Metrics.
    pub metrics: ServiceMetrics,
    /// The cgroup whose processes resolve Services at the socket; by default the root.
    pub cgroup: Option<CgroupAt>,
    /// Which sockets are destroyed when their backend is removed.
    pub end_sockets: SocketTermination,
    /// Runs functions in network namespaces.
    pub host: Arc<Host>,
}

/// The ports that are served, with the maps' contents that they refer to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceList {
    /// The ports.
    pub ports: Vec<PortView>,
    /// The contents of the Service maps.
    pub maps: MapContents,
    /// Whether all objects that Services need were listed.
    pub is_synced: bool,
}

/// The name of a port's owner, whatever its kind.
pub(crate) const fn owner_name(owner: &Owner) -> &ObjectName {
    match owner {
        Owner::Service(name) | Owner::Pod(name) => name,
    }
}

/// See the [module](self).
#[derive(Debug)]
pub struct Services {
    state: Mutex<State>,
    /// Problems, outside the state so that reading them never waits for a step.
    problems: Mutex<Vec<Error>>,
    commands: mpsc::UnboundedSender<Command>,
    health: Arc<UnboundPorts>,
    in_force: watch::Receiver<bool>,
    sockets: Arc<SocketPath>,
}

impl Services {
    /// Starts the actor. `pods` returns the paths of the network namespaces of the node's pods.
    #[must_use]
    pub fn start(setup: Setup, pods: impl Fn() -> Vec<String> + Send + Sync + 'static) -> Arc<Self> {
        let sockets = Arc::new(SocketPath::new(&setup, Box::new(pods)));
        let Setup { objects, facts, settings, datapath, addresses, metrics, .. } = setup;
        let (health, ports) = watch::channel(Health::default());
        let (in_force_sender, in_force) = watch::channel(false);
        let notifiers = Notifiers { health, in_force: in_force_sender };
        let (commands, received) = mpsc::unbounded_channel();
        let this = Arc::new(Self {
            state: Mutex::new(State::new(datapath, objects, facts, settings, metrics, notifiers)),
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
        tokio::spawn(Arc::clone(&this).run(received, addresses));
        this
    }

    /// What is wrong with Services, or with writing them.
    #[must_use]
    pub fn problems(&self) -> Vec<Error> {
        let problems = lock(&self.problems).clone();
        problems.into_iter().chain(self.health.problems()).collect()
    }

    /// Waits until the maps hold the Services of all objects for the first time, `limit` at most; returns whether they do. A pod that
    /// starts then finds every Service that existed before it. Over the maps of an earlier daemon this is true at once.
    pub async fn wait_until_synced(&self, limit: Duration) -> bool {
        let mut in_force = self.in_force.clone();
        let waited = tokio::time::timeout(limit, in_force.wait_for(|synced| *synced)).await;
        matches!(waited, Ok(Ok(_)))
    }

    /// Status of the programs that resolve Services at the socket.
    pub async fn socket_path(&self) -> SocketPathStatus {
        self.sockets.status().await
    }

    /// The ports that are served, of one namespace or name where these are not empty.
    ///
    /// # Errors
    /// When the daemon is ending.
    pub async fn list(self: &Arc<Self>, namespace: String, name: String) -> Result<ServiceList, Error> {
        let this = Arc::clone(self);
        let list = move || lock(&this.state).list(&namespace, &name);
        tokio::task::spawn_blocking(list).await.map_err(|error| Error::new(errors::INTERNAL, error.to_string()))
    }

    /// The owners of ports by port id: Services, or pods with host ports. Blocks.
    #[must_use]
    pub fn port_owners(&self, numbers: &BTreeSet<u32>) -> HashMap<u32, String> {
        if numbers.is_empty() { HashMap::new() } else { lock(&self.state).port_owners(numbers) }
    }

    async fn run(
        self: Arc<Self>,
        mut commands: mpsc::UnboundedReceiver<Command>,
        mut addresses: watch::Receiver<Arc<Vec<IpNetwork>>>,
    ) {
        let first = follow::addresses(&mut addresses);
        let mut due = self.step(Command::Addresses(first)).await;
        loop {
            let command = tokio::select! {
                Some(command) = commands.recv() => command,
                Ok(()) = addresses.changed() => Command::Addresses(follow::addresses(&mut addresses)),
                () = until(due) => Command::Due,
            };
            due = self.step(command).await;
        }
    }

    /// Executes a command on a blocking thread; returns when the next is due.
    async fn step(self: &Arc<Self>, command: Command) -> Option<Instant> {
        let this = Arc::clone(self);
        let step = move || {
            let mut state = lock(&this.state);
            let due = state.step(command);
            *lock(&this.problems) = state.problems();
            if state.take_backends_removed() {
                this.sockets.backends_removed();
            }
            due
        };
        match tokio::task::spawn_blocking(step).await {
            Ok(due) => due,
            Err(error) => {
                // A panic may have left the planner half-changed.
                warn!(%error, "a step of the Service actor panicked; reading the maps again");
                Some(lock(&self.state).invalidate())
            }
        }
    }
}

#[async_trait]
impl Subscriber for Services {
    /// Returns when the maps hold what follows from the changes, or the write has failed and will be tried again.
    async fn deliver(&self, changes: Arc<ObjectChanges>) {
        let (done, is_done) = oneshot::channel();
        if self.commands.send(Command::Objects(changes, done)).is_ok() {
            // The sender is dropped without a message when the step panics.
            let _ = is_done.await;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
