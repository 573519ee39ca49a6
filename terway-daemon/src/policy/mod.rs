//! Network policies of this node: from the source of objects, by the compiler, into the datapath.
//!
//! Objects come from the [feed](crate::objects::feed). A step (compile, write maps) runs on a blocking thread under one lock; a pod's
//! ADD and DEL take that lock themselves, so that a pod's interface carries no packet before its policies stand in the maps. As long as the
//! source has not told everything, running pods keep what an earlier daemon wrote; a new pod is denied every direction in which a policy that
//! is known might restrict it. Operations that the kernel refuses are kept in their order and tried again, and meanwhile no pod is added.

mod ledger;
mod metrics;
mod state;
mod view;

use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use ipnetwork::IpNetwork;
use terway_core::config::Config;
use terway_core::errors::{self, Error};
use terway_core::ident::{Addresses, PodRef};
use terway_core::objects::Kind;
use terway_proto::v1;
use tokio::sync::{Notify, mpsc, watch};
use tracing::warn;

use crate::bpf::{self, Datapath};
use crate::follow::{self, burst, until};
use crate::objects::{ObjectChanges, Subscriber};

use ledger::Ledger;
pub use metrics::PolicyMetrics;
use state::{State, Work};

/// How long an ADD waits for the source of objects to tell everything.
const COMPLETE_WITHIN: Duration = Duration::from_secs(3);

/// A source that has not told everything so long after the start is not waited for any more.
const STARTING: Duration = Duration::from_secs(30);

/// How long an ADD waits for the pod's own object when a policy may restrict the pod; kubelet has it before it asks for the pod's network.
const KNOWN_WITHIN: Duration = Duration::from_secs(1);

/// How often a waiting ADD looks.
const LOOK: Duration = Duration::from_millis(2);

/// What can wait is done when nothing has changed for so long.
const IDLE: Duration = Duration::from_millis(50);

/// How often what the kernel refused is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// The kinds of objects that policies are compiled from.
const KINDS: [Kind; 4] = [Kind::Namespace, Kind::Pod, Kind::NetworkPolicy, Kind::ClusterNetworkPolicy];

/// What policies are made with.
#[derive(Debug)]
pub struct Setup {
    /// The kernel's side.
    pub datapath: Arc<Datapath>,
    /// The node's own addresses, which always reach its pods.
    pub addresses: watch::Receiver<Arc<Vec<IpNetwork>>>,
    /// Whether policies are enforced.
    pub config: watch::Receiver<Arc<Config>>,
    /// Counters.
    pub metrics: PolicyMetrics,
}

/// See the [module](self).
#[derive(Debug)]
pub struct Policies {
    state: Mutex<State>,
    commands: mpsc::UnboundedSender<Arc<ObjectChanges>>,
    /// A pod came or went, which may leave something for later.
    changed: Notify,
    started: Instant,
}

impl Policies {
    /// Takes up what an earlier daemon left, and begins to follow.
    ///
    /// # Errors
    /// When the maps cannot be read or written.
    pub fn start(setup: Setup) -> Result<Arc<Self>, Error> {
        let Setup { datapath, mut addresses, mut config, metrics } = setup;
        let enforce = config.borrow_and_update().policy_enabled;
        let node = follow::addresses(&mut addresses);
        let ledger = Arc::new(Ledger::new(Arc::clone(&datapath)));
        metrics.count_by(&ledger);
        let state = State::new(datapath, metrics, ledger, node, enforce)
            .map_err(|error| Error::new(errors::POLICY_FAILED, error.to_string()))?;
        let (commands, received) = mpsc::unbounded_channel();
        let this =
            Arc::new(Self { state: Mutex::new(state), commands, changed: Notify::new(), started: Instant::now() });
        tokio::spawn(Arc::clone(&this).follow(received, addresses, config));
        Ok(this)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits, within bounds, until a pod's policies can be known: the source has told everything, and the pod itself if that matters.
    pub async fn expect(&self, pod: &PodRef) {
        let start = Instant::now();
        loop {
            let wait = match self.state.try_lock() {
                Ok(state) => state.awaits(pod),
                Err(TryLockError::Poisoned(state)) => state.into_inner().awaits(pod),
                // A step is under way, and may be the one that is waited for.
                Err(TryLockError::WouldBlock) => Some(state::Awaited::Step),
            };
            let within = match wait {
                None => return,
                Some(state::Awaited::View) if self.started.elapsed() > STARTING => Duration::ZERO,
                Some(state::Awaited::View | state::Awaited::Step) => COMPLETE_WITHIN,
                Some(state::Awaited::Pod) => KNOWN_WITHIN,
            };
            if start.elapsed() >= within {
                warn!(%pod, waiting_for = ?wait, "going on without; what a policy might restrict is denied");
                return;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Has a pod's policies in the maps, before its endpoint is written and its interface carries packets. Blocks.
    ///
    /// # Errors
    /// [`errors::POLICY_FAILED`] if the kernel refuses, or [`errors::BPF_FAILED`] if there is no room for another pod.
    pub fn attach(&self, host_ifindex: u32, pod: &PodRef, addresses: Addresses) -> Result<(), Error> {
        let attached = self.state().attach(host_ifindex, pod, addresses);
        self.changed.notify_one();
        attached
    }

    /// Forgets the pods whose endpoints have been removed. Blocks.
    pub fn forget_gone(&self) {
        self.state().forget_gone();
        self.changed.notify_one();
    }

    /// Asks on a thread that may block: a step holds the lock for as long as compiling takes, and the runtime has one worker.
    async fn ask<T: Send + 'static>(
        self: &Arc<Self>,
        question: impl FnOnce(&State) -> T + Send + 'static,
    ) -> Result<T, Error> {
        let this = Arc::clone(self);
        let asked = tokio::task::spawn_blocking(move || question(&this.state()));
        asked.await.map_err(|error| Error::new(errors::INTERNAL, error.to_string()))
    }

    /// The line of the status, and what is wrong.
    ///
    /// # Errors
    /// When the daemon is ending.
    pub async fn status(self: &Arc<Self>) -> Result<(v1::PolicyStatus, Vec<Error>), Error> {
        self.ask(|state| (state.status(), state.problems())).await
    }

    /// Has someone ask for the names of what events hold, as they are at one moment. Blocks.
    pub fn names<T>(&self, ask: impl FnOnce(&Names<'_>) -> T) -> T {
        ask(&Names(&self.state()))
    }

    /// The policies in force.
    ///
    /// # Errors
    /// When the daemon is ending.
    pub async fn list(self: &Arc<Self>, request: v1::ListPoliciesRequest) -> Result<v1::ListPoliciesResponse, Error> {
        self.ask(move |state| state.list(&request)).await
    }

    /// Why a connection passes or not.
    ///
    /// # Errors
    /// When the daemon is ending.
    pub async fn explain(
        self: &Arc<Self>,
        request: v1::ExplainPolicyRequest,
    ) -> Result<v1::ExplainPolicyResponse, Error> {
        self.ask(move |state| state.explain(&request)).await
    }

    async fn follow(
        self: Arc<Self>,
        mut changes: mpsc::UnboundedReceiver<Arc<ObjectChanges>>,
        mut addresses: watch::Receiver<Arc<Vec<IpNetwork>>>,
        mut config: watch::Receiver<Arc<Config>>,
    ) {
        let mut due = None;
        loop {
            let work = tokio::select! {
                Some(first) = changes.recv() => Work::Objects(burst(first, || changes.try_recv().ok())),
                Ok(()) = addresses.changed() => Work::Addresses(follow::addresses(&mut addresses)),
                Ok(()) = config.changed() => Work::Enforce(config.borrow_and_update().policy_enabled),
                () = self.changed.notified() => {
                    due = Some(Instant::now() + IDLE);
                    continue;
                }
                () = until(due) => {
                    due = self.idle().await;
                    continue;
                }
            };
            let this = Arc::clone(&self);
            let step = move || this.state().step(work);
            if let Err(error) = tokio::task::spawn_blocking(step).await {
                warn!(%error, "a step of policies ended by itself");
            }
            due = Some(Instant::now() + IDLE);
        }
    }

    /// Does what was left for later, or what was refused. The grace period is waited for without the lock, so that no ADD waits for it.
    async fn idle(self: &Arc<Self>) -> Option<Instant> {
        let this = Arc::clone(self);
        let work = move || {
            let before = this.state().unsettled();
            let Some(generation) = before else { return this.state().retry().then(|| Instant::now() + RETRY) };
            bpf::synchronize_rcu();
            this.state().settle(generation).then(|| Instant::now() + IDLE)
        };
        tokio::task::spawn_blocking(work).await.unwrap_or(Some(Instant::now() + RETRY))
    }
}

#[async_trait]
impl Subscriber for Policies {
    /// Returns at once: a compile may take seconds, and Services shall not wait for it.
    async fn deliver(&self, changes: Arc<ObjectChanges>) {
        // Nobody receives any more when the daemon ends.
        let _ = self.commands.send(changes);
    }
}

/// Names of what events hold.
#[derive(Debug)]
pub struct Names<'a>(&'a State);

impl Names<'_> {
    /// The pod that has an address, of any node.
    #[must_use]
    pub fn pod(&self, address: IpAddr) -> Option<v1::Pod> {
        self.0.pod_at(address)
    }

    /// What a decision means; none if it is none of this node.
    #[must_use]
    pub fn decision(&self, decision: u32) -> Option<v1::FlowDecision> {
        self.0.decision(decision)
    }
}
