//! The Service actor: plans Services and writes them to the datapath's maps.
//!
//! Objects come from the [feed](crate::objects::feed). One task receives commands; each step (plan, map writes) runs on a blocking thread, one
//! after the other. Nothing is written before the objects are synced, so that a restart removes nothing that is only not known yet. After a
//! panic of a step the maps are read anew and the whole difference is planned. A map operation that the kernel refuses delays only what depends on
//! it ([`terway_core::service::Planner::execute`]); it is retried with back-off, and shown for the object and the frontend.

mod cgroup;
mod health;
mod metrics;
mod sockets;
mod state;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use ipnetwork::IpNetwork;
use terway_core::errors::Error;
use terway_core::objects::{Kind, ObjectKey, ObjectName};
use terway_core::service::{FrontendKey, MapContents, NodeFacts, Owner, PortView, Settings, SocketTermination};
use tokio::sync::{mpsc, oneshot, watch};

use crate::actor::{current_addresses, sleep_until};
use crate::bpf::Datapath;
use crate::net::Host;
use crate::objects::{ObjectChanges, ObjectStore, Subscriber};
use crate::supervise;

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
    /// The desired contents of the Service maps.
    pub maps: MapContents,
    /// Frontends that are not in the maps as desired, each with the reason.
    pub frontend_problems: BTreeMap<FrontendKey, String>,
    /// Objects that are not in the maps as desired, each with the map entries concerned.
    pub unapplied: BTreeMap<ObjectKey, BTreeSet<String>>,
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
    /// Poisoned by a panic: whoever locks it next invalidates it.
    state: Mutex<State>,
    /// The receivers of the actor's task.
    inputs: tokio::sync::Mutex<Inputs>,
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
            inputs: tokio::sync::Mutex::new(Inputs { commands: received, addresses }),
            problems: Mutex::default(),
            commands,
            health: Arc::default(),
            in_force,
            sockets: Arc::clone(&sockets),
        });
        supervise::spawn_restarting("health-checks", {
            let unbound = Arc::clone(&this.health);
            move || health::serve(ports.clone(), Arc::clone(&unbound))
        });
        // Before the first pod starts, so that its first socket is served.
        sockets.attach_now();
        supervise::spawn_restarting("socket-programs", move || Arc::clone(&sockets).run());
        supervise::spawn_restarting("services", {
            let this = Arc::clone(&this);
            move || Arc::clone(&this).run()
        });
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

    /// Whether the maps hold the Services.
    #[must_use]
    pub fn is_in_force(&self) -> bool {
        *self.in_force.borrow()
    }

    /// Status of the programs that resolve Services at the socket.
    pub async fn socket_path(&self) -> SocketPathStatus {
        self.sockets.status().await
    }

    /// The ports that are served, of one namespace or name where these are not empty.
    pub async fn list(self: &Arc<Self>, namespace: String, name: String) -> ServiceList {
        let this = Arc::clone(self);
        supervise::blocking(move || this.state().list(&namespace, &name)).await
    }

    /// The state. After a panic of whoever held it last, the planner is made anew from the maps at the next step.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| {
            let mut state = poisoned.into_inner();
            state.invalidate();
            self.state.clear_poison();
            state
        })
    }

    /// The owners of ports by port id: Services, or pods with host ports. Blocks.
    #[must_use]
    pub fn port_owners(&self, numbers: &BTreeSet<u32>) -> HashMap<u32, String> {
        if numbers.is_empty() { HashMap::new() } else { self.state().port_owners(numbers) }
    }

    /// Receives commands as long as the daemon runs. Started again after a panic, which has invalidated the state.
    async fn run(self: Arc<Self>) {
        let mut inputs = self.inputs.lock().await;
        let Inputs { commands, addresses } = &mut *inputs;
        let mut due = self.step(Command::Addresses(current_addresses(addresses))).await;
        loop {
            let command = tokio::select! {
                Some(command) = commands.recv() => command,
                Ok(()) = addresses.changed() => Command::Addresses(current_addresses(addresses)),
                () = sleep_until(due) => Command::Due,
            };
            due = self.step(command).await;
        }
    }

    /// Executes a command on a blocking thread; returns when the next is due.
    async fn step(self: &Arc<Self>, command: Command) -> Option<Instant> {
        let this = Arc::clone(self);
        let step = move || {
            let mut state = this.state();
            let due = state.step(command);
            *lock(&this.problems) = state.problems();
            if state.take_backends_removed() {
                this.sockets.backends_removed();
            }
            due
        };
        supervise::blocking(step).await
    }
}

#[derive(Debug)]
struct Inputs {
    commands: mpsc::UnboundedReceiver<Command>,
    addresses: watch::Receiver<Arc<Vec<IpNetwork>>>,
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
