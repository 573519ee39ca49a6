//! Runs the decisions of the address pool: feeds it events, executes its effects, and answers the requests that wait.
//!
//! The pool is stepped under one short lock without any IO in it. What a step wants written is handed to the store under the same lock, so
//! that writes keep the order of the decisions; everything else starts when they are durable (see `terway_core::ipam`, the contract).

mod audit;
mod effects;
mod eni;
mod events;
mod flows;
mod mapping;
mod pod;
mod reaper;
mod start;
mod subnets;
mod uplink;
mod view;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Mutex, MutexGuard};
use terway_core::clock::Moment;
use terway_core::errors::{self, Error};
use terway_core::ident::{AttachmentKey, InstanceId, IpStack, PodRef};
use terway_core::ipam::{Add, Event, Pool, PoolConfig, Reply, Ticket};
use terway_proto::v1;
use tokio::sync::{RwLock, oneshot, watch};

use crate::bpf::{Datapath, FlowEvents};
use crate::cloud::Cloud;
use crate::metrics::Metrics;
use crate::net::{Host, NetMonitor};
use crate::policy::Policies;
use crate::store::Store;
use crate::supervise::{self, OnPanic};

use reaper::Reaper;

pub(crate) use events::{Filter, RecentAndLive, dropped_packet};

pub use pod::PodOptions;
pub use start::{NodeInfo, Parts, vanished_pods};

/// The engine's name as a supervised task.
const TASK: &str = "engine";

/// An ADD as the service hands it over.
#[derive(Clone, Debug)]
pub struct AddRequest {
    /// The attachment.
    pub key: AttachmentKey,
    /// Whose it is.
    pub pod: PodRef,
    /// Path of the pod's network namespace.
    pub netns: String,
    /// MTU in bytes that the configuration asks for.
    pub mtu: Option<u32>,
}

/// See the [module](self).
pub struct Engine {
    pool_state: Mutex<PoolState>,
    /// Number of the last write that is on disk.
    durable: watch::Sender<u64>,
    /// When the pool wants its next tick.
    wake: watch::Sender<Option<Moment>>,
    /// Changes with every step of the pool.
    stepped: watch::Sender<()>,
    /// Set once, when the daemon must end.
    fatal: watch::Sender<Option<Error>>,
    origin: Instant,
    store: Store,
    cloud: Arc<dyn Cloud>,
    datapath: Arc<Datapath>,
    policies: Arc<Policies>,
    host: Arc<Host>,
    links: NetMonitor,
    reaper: Reaper,
    audit: audit::Audit,
    /// Wiring and unwiring pods and ENIs hold it shared, corrections of an audit alone.
    wiring: RwLock<()>,
    events: events::FlowLog,
    flow_reader: tokio::sync::Mutex<Option<FlowEvents>>,
    info: NodeInfo,
    subnets: subnets::Subnets,
    /// What pods get unless their network configuration says otherwise.
    defaults: Mutex<PodOptions>,
    metrics: Metrics,
}

struct PoolState {
    pool: Pool,
    waiting: HashMap<Ticket, oneshot::Sender<Result<Reply, Error>>>,
    next_ticket: u64,
    /// Number of the last write that was handed to the store.
    written: u64,
}

impl Engine {
    fn now(&self) -> Moment {
        Moment::ZERO.after(self.origin.elapsed())
    }

    fn pool_state(&self) -> MutexGuard<'_, PoolState> {
        self.pool_state.lock()
    }

    /// Steps the pool and starts the effects.
    fn feed(self: &Arc<Self>, event: Event) {
        let mut state = self.pool_state();
        self.step(&mut state, event);
    }

    /// One step of the pool, whoever causes it. A panic here ends the process while the lock is held: nobody sees the pool half-changed.
    fn step(self: &Arc<Self>, state: &mut PoolState, event: Event) {
        supervise::scope(TASK, OnPanic::EndDaemon, || {
            let effects = state.pool.step(event, self.now());
            self.dispatch(state, effects);
        });
        self.stepped.send_replace(());
    }

    /// Feeds a request and waits for its answer. When the caller goes away, the request is cancelled; work under way goes on.
    async fn request(self: &Arc<Self>, event: impl FnOnce(Ticket) -> Event) -> Result<Reply, Error> {
        if let Some(error) = self.fatal.borrow().clone() {
            return Err(error);
        }
        let (ticket, answer) = {
            let mut state = self.pool_state();
            state.next_ticket += 1;
            let ticket = Ticket(state.next_ticket);
            let (sender, answer) = oneshot::channel();
            state.waiting.insert(ticket, sender);
            self.step(&mut state, event(ticket));
            (ticket, answer)
        };
        let mut cancel = CancelOnDrop { engine: self, ticket: Some(ticket) };
        let result = answer.await;
        cancel.ticket = None;
        result.unwrap_or_else(|_| Err(Error::new(errors::INTERNAL, "the request was dropped without an answer")))
    }

    /// ADD: returns when the pod's network is complete.
    ///
    /// # Errors
    /// What the catalogue says; the attachment is then undone or will be.
    pub async fn add(self: &Arc<Self>, request: AddRequest) -> Result<v1::Network, Error> {
        let defaults = self.defaults().clone();
        let options = PodOptions { mtu: request.mtu.or(defaults.mtu), ..defaults };
        let ip_stack = self.info.stack;
        let key = request.key.clone();
        let pod = request.pod.clone();
        let add = |ticket| {
            Event::Add(Add {
                ticket,
                key: request.key,
                pod: request.pod,
                netns: request.netns,
                ip_stack,
                options: options.encode(),
            })
        };
        match self.request(add).await? {
            Reply::Attached(lease) => Ok(self.network(&key, &pod, &lease, &options)),
            other => Err(Error::new(errors::INTERNAL, format!("unexpected answer {other:?}"))),
        }
    }

    /// Takes a new configuration: the pool at once, pods from the next ADD on.
    pub fn reconfigure(self: &Arc<Self>, pool: PoolConfig, defaults: PodOptions) {
        *self.defaults() = defaults;
        self.feed(Event::Configure(Box::new(pool)));
    }

    fn defaults(&self) -> MutexGuard<'_, PodOptions> {
        self.defaults.lock()
    }

    /// DEL: returns when the datapath forgot the pod and its release is on disk.
    ///
    /// # Errors
    /// Only when the state cannot be written.
    pub async fn del(self: &Arc<Self>, key: AttachmentKey) -> Result<(), Error> {
        self.request(|ticket| Event::Del { ticket, key }).await.map(|_| ())
    }

    /// GC: removes every attachment of `network` that is not in `valid` and returns what was removed.
    ///
    /// # Errors
    /// As [`Self::del`].
    pub async fn gc(self: &Arc<Self>, network: String, valid: Vec<AttachmentKey>) -> Result<Vec<AttachmentKey>, Error> {
        let valid: BTreeSet<AttachmentKey> = valid.into_iter().collect();
        match self.request(|ticket| Event::Gc { ticket, network, valid }).await? {
            Reply::GarbageCollected(keys) => Ok(keys),
            other => Err(Error::new(errors::INTERNAL, format!("unexpected answer {other:?}"))),
        }
    }

    /// Waits until the daemon cannot go on, and says why.
    pub async fn failed(&self) -> Error {
        let mut fatal = self.fatal.subscribe();
        match fatal.wait_for(Option::is_some).await {
            Ok(error) => error.clone().unwrap_or_else(|| Error::new(errors::INTERNAL, "")),
            Err(_) => Error::new(errors::INTERNAL, "the engine is gone"),
        }
    }

    /// Ticks the pool when it asked for it. Runs as long as the daemon.
    pub async fn run_timer(self: Arc<Self>) {
        let mut wake = self.wake.subscribe();
        loop {
            let due = *wake.borrow_and_update();
            let wait = due.map(|moment| moment.since(self.now()));
            tokio::select! {
                changed = wake.changed() => if changed.is_err() { return },
                () = async { match wait { Some(wait) => tokio::time::sleep(wait).await, None => std::future::pending().await } } => {
                    self.wake.send_if_modified(|w| {
                        let same = *w == due;
                        if same { *w = None; }
                        same
                    });
                    self.feed(Event::Tick);
                }
            }
        }
    }

    /// The node's addresses that other hosts reach, now and later.
    #[must_use]
    pub fn node_addresses(&self) -> watch::Receiver<Arc<Vec<ipnetwork::IpNetwork>>> {
        self.links.addresses()
    }

    /// The families pods of this node get.
    #[must_use]
    pub fn stack(&self) -> IpStack {
        self.info.stack
    }

    fn instance(&self) -> &InstanceId {
        &self.info.identity.instance
    }
}

/// A request whose caller went away is cancelled, so that nobody holds a ticket for ever.
struct CancelOnDrop<'a> {
    engine: &'a Arc<Engine>,
    ticket: Option<Ticket>,
}

impl Drop for CancelOnDrop<'_> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            self.engine.pool_state().waiting.remove(&ticket);
            self.engine.feed(Event::Cancel { ticket });
        }
    }
}
