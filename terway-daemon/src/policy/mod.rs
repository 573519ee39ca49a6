//! The policy actor: compiles network policies and writes them to the datapath's maps.
//!
//! Objects come from the [feed](crate::objects::feed). A step (compile, write maps) runs on a blocking thread under one lock. ADD and DEL of a
//! pod take that lock themselves, so that a pod's policies are in the maps before its interface carries packets. Until the objects are
//! synced, running pods keep what an earlier daemon wrote, and a new pod is in quarantine: each direction that a policy known so far may
//! restrict is denied. After a panic of a step the compiler is made anew from the object store, over the maps as they are. A map operation that the kernel refuses puts only the pods whose policies are incomplete into lockdown
//! ([`terway_core::policy::Compiler::execute`]); it is retried with back-off, and shown for the policy.

mod counters;
mod metrics;
mod report;
mod state;

use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use ipnetwork::IpNetwork;
use terway_core::config::Config;
use terway_core::errors::{self, Error};
use terway_core::ident::{Addresses, PodRef};
use terway_core::objects::{Kind, ObjectName};
use terway_core::policy::{Explanation, FlowEnd};
use tokio::sync::{Notify, mpsc, watch};
use tracing::warn;

use crate::actor::{batch, current_addresses, sleep_until};
use crate::bpf::{self, Datapath};
use crate::objects::{ObjectChanges, ObjectStore, Subscriber};
use crate::supervise;

use counters::PolicyCounters;
pub(crate) use counters::{RuleCount, direction_label};
pub use metrics::PolicyMetrics;
pub use report::{NAMED_POLICIES, PolicyEntry, PolicyList, PolicyStatus, PolicyVerdict};
use state::{Command, State, WaitReason};

/// How long an ADD waits until the objects are synced.
const SYNCED_WITHIN: Duration = Duration::from_secs(3);

/// Objects that are not synced so long after the start are not waited for any more.
const STARTUP: Duration = Duration::from_secs(30);

/// How long an ADD waits for the pod's own object when a policy may restrict the pod; kubelet has it before it asks for the pod's network.
const KNOWN_WITHIN: Duration = Duration::from_secs(1);

/// The interval at which a waiting ADD checks.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// Deferred operations are run when nothing has changed for so long.
const IDLE: Duration = Duration::from_millis(50);

/// The kinds of objects that policies are compiled from.
const KINDS: [Kind; 4] = [Kind::Namespace, Kind::Pod, Kind::NetworkPolicy, Kind::ClusterNetworkPolicy];

/// Parameters of the policy actor.
#[derive(Debug)]
pub struct Setup {
    /// The datapath.
    pub datapath: Arc<Datapath>,
    /// All objects, written by the feed.
    pub objects: Arc<ObjectStore>,
    /// The node's own addresses, which always reach its pods.
    pub addresses: watch::Receiver<Arc<Vec<IpNetwork>>>,
    /// Whether policies are enforced.
    pub config: watch::Receiver<Arc<Config>>,
    /// Metrics.
    pub metrics: PolicyMetrics,
}

/// See the [module](self).
#[derive(Debug)]
pub struct Policies {
    /// Poisoned by a panic: whoever locks it next rebuilds it.
    state: Mutex<State>,
    changes: mpsc::UnboundedSender<Arc<ObjectChanges>>,
    /// The receivers of the actor's task.
    inputs: tokio::sync::Mutex<Inputs>,
    /// A pod was attached or detached, which may leave deferred operations.
    changed: Notify,
    started: Instant,
}

#[derive(Debug)]
struct Inputs {
    changes: mpsc::UnboundedReceiver<Arc<ObjectChanges>>,
    addresses: watch::Receiver<Arc<Vec<IpNetwork>>>,
    config: watch::Receiver<Arc<Config>>,
}

impl Policies {
    /// Starts the actor over the maps of an earlier daemon.
    ///
    /// # Errors
    /// When the maps cannot be read or written.
    pub fn start(setup: Setup) -> Result<Arc<Self>, Error> {
        let Setup { datapath, objects, addresses, config, metrics } = setup;
        let counters = Arc::new(PolicyCounters::new(Arc::clone(&datapath)));
        metrics.read_from(&counters);
        let state = State::new(datapath, objects, metrics, counters, config.borrow().policy_enabled)
            .map_err(|error| Error::new(errors::POLICY_FAILED, error.to_string()))?;
        let (sender, changes) = mpsc::unbounded_channel();
        let this = Arc::new(Self {
            state: Mutex::new(state),
            changes: sender,
            inputs: tokio::sync::Mutex::new(Inputs { changes, addresses, config }),
            changed: Notify::new(),
            started: Instant::now(),
        });
        supervise::spawn_restarting("policies", {
            let this = Arc::clone(&this);
            move || Arc::clone(&this).run()
        });
        Ok(this)
    }

    /// The state. After a panic of whoever held it last, it is rebuilt from the object store and the maps first.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| {
            let mut state = poisoned.into_inner();
            state.rebuild();
            self.state.clear_poison();
            state
        })
    }

    /// Waits, within bounds, until a pod's policies are known: the objects are synced, and the pod's labels known if a policy may select it.
    pub async fn wait_until_known(&self, pod: &PodRef) {
        let start = Instant::now();
        loop {
            let wait = match self.state.try_lock() {
                Ok(state) => state.wait_reason(pod),
                // The step, or the rebuild after a panic, may be the one that makes the pod known.
                Err(TryLockError::WouldBlock | TryLockError::Poisoned(_)) => Some(WaitReason::StepInProgress),
            };
            let within = match wait {
                None => return,
                Some(WaitReason::ObjectsUnsynced) if self.started.elapsed() > STARTUP => Duration::ZERO,
                Some(WaitReason::ObjectsUnsynced | WaitReason::StepInProgress) => SYNCED_WITHIN,
                Some(WaitReason::PodUnknown) => KNOWN_WITHIN,
            };
            if start.elapsed() >= within {
                warn!(%pod, reason = ?wait, "adding a pod whose policies are not known; directions that a policy may restrict are denied");
                return;
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Writes a pod's policies to the maps. To be called before its endpoint is written and its interface carries packets. Blocks.
    ///
    /// # Errors
    /// [`errors::POLICY_FAILED`] if the kernel refuses, or [`errors::BPF_FAILED`] if there is no room for another pod.
    pub fn attach(&self, host_ifindex: u32, pod: &PodRef, addresses: Addresses) -> Result<(), Error> {
        let attached = self.state().attach(host_ifindex, pod, addresses);
        self.changed.notify_one();
        attached
    }

    /// Detaches the pods whose endpoints were removed. Blocks.
    pub fn detach_removed(&self) {
        self.state().detach_removed();
        self.changed.notify_one();
    }

    /// Reads the state on a blocking thread: a step holds the lock for as long as compiling takes, and the runtime has one worker.
    async fn read<T: Send + 'static>(self: &Arc<Self>, read: impl FnOnce(&State) -> T + Send + 'static) -> T {
        let this = Arc::clone(self);
        supervise::blocking(move || read(&this.state())).await
    }

    /// The status, and what is wrong.
    pub async fn status(self: &Arc<Self>) -> (PolicyStatus, Vec<Error>) {
        self.read(|state| (state.status(), state.problems())).await
    }

    /// Calls `annotate` with the names of pods and rules as they are at one moment. Blocks.
    pub fn annotate<T>(&self, annotate: impl FnOnce(&FlowAnnotator<'_>) -> T) -> T {
        annotate(&FlowAnnotator(&self.state()))
    }

    /// The policies in force, of one namespace or name where these are not empty.
    pub async fn list(self: &Arc<Self>, namespace: String, name: String) -> PolicyList {
        self.read(move |state| state.list(&namespace, &name)).await
    }

    /// Explains for each IP family why a connection is allowed or denied.
    ///
    /// # Errors
    /// Why that cannot be told, in a sentence.
    pub async fn explain(self: &Arc<Self>, connection: Connection) -> Result<Vec<Explanation>, String> {
        self.read(move |state| state.explain(&connection)).await
    }

    /// Receives commands as long as the daemon runs. Started again after a panic: the state is rebuilt when it is locked.
    async fn run(self: Arc<Self>) {
        let mut inputs = self.inputs.lock().await;
        let Inputs { changes, addresses, config } = &mut *inputs;
        // Before the first objects: nothing may be compiled for a node without addresses.
        self.step(Command::Addresses(current_addresses(addresses))).await;
        let enforce = config.borrow_and_update().policy_enabled;
        self.step(Command::Enforce(enforce)).await;
        let mut due = Some(Instant::now() + IDLE);
        loop {
            let command = tokio::select! {
                Some(first) = changes.recv() => Command::Objects(batch(first, || changes.try_recv().ok())),
                Ok(()) = addresses.changed() => Command::Addresses(current_addresses(addresses)),
                Ok(()) = config.changed() => Command::Enforce(config.borrow_and_update().policy_enabled),
                () = self.changed.notified() => {
                    due = Some(Instant::now() + IDLE);
                    continue;
                }
                () = sleep_until(due) => {
                    due = self.idle().await;
                    continue;
                }
            };
            self.step(command).await;
            due = Some(Instant::now() + IDLE);
        }
    }

    async fn step(self: &Arc<Self>, command: Command) {
        let this = Arc::clone(self);
        supervise::blocking(move || this.state().step(command)).await;
    }

    /// Runs deferred operations, or retries refused ones. The RCU grace period is waited for without the lock, so that no ADD waits for it.
    async fn idle(self: &Arc<Self>) -> Option<Instant> {
        let this = Arc::clone(self);
        let work = move || {
            let deferred = this.state().deferred();
            let Some(generation) = deferred else { return this.state().retry() };
            bpf::synchronize_rcu();
            let mut state = this.state();
            let has_more = state.run_deferred(generation);
            let retry = state.retry();
            if has_more { Some(Instant::now() + IDLE) } else { retry }
        };
        supervise::blocking(work).await
    }
}

#[async_trait]
impl Subscriber for Policies {
    /// Returns at once: a compile may take seconds, and Services shall not wait for it.
    async fn deliver(&self, changes: Arc<ObjectChanges>) {
        // Nobody receives any more when the daemon ends.
        let _ = self.changes.send(changes);
    }
}

/// A connection that [`Policies::explain`] is asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Its source.
    pub from: FlowEnd,
    /// Its destination.
    pub to: FlowEnd,
    /// IP protocol number.
    pub protocol: u8,
    /// Destination port.
    pub port: u16,
}

/// Annotates flow events with the names of pods and policies.
#[derive(Debug)]
pub struct FlowAnnotator<'a>(&'a State);

impl FlowAnnotator<'_> {
    /// The pod that has an address, of any node.
    #[must_use]
    pub fn pod(&self, address: IpAddr) -> Option<ObjectName> {
        self.0.pod_at(address)
    }

    /// The verdict that an event's number stands for; none if policies of this node do not apply.
    #[must_use]
    pub fn verdict(&self, number: u32) -> Option<PolicyVerdict> {
        self.0.verdict(number)
    }
}
