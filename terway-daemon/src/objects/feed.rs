//! The feed of Kubernetes objects: owns the object source and writes the [`ObjectStore`], delivers what changed to policies, then to Services.
//!
//! ```text
//! source ──batches──► feed ──applies──► store
//!                      │
//!                      ├─ 1. policies   receive the changes, work on them later
//!                      └─ 2. Services   the feed waits until their maps are written
//! ```
//!
//! The contract:
//!
//! * **Order.** Batches are applied in the order in which the source sends them. The feed delivers to its subscribers one after the other, in the order
//!   of [`Setup::subscribers`]. Policies come first, because they decide which connections to a Service are allowed.
//! * **Batches.** Batches that wait while a delivery is under way are applied and delivered as one. A subscriber sees a batch whole or not at all.
//!   Updates that change nothing in the store are not delivered.
//! * **Store and changes.** From the call of [`Subscriber::deliver`] until it returns, the store holds exactly what was delivered so far. A subscriber
//!   that works on changes later may find newer objects in the store; the changes that led to them follow.
//! * **Synced, per kind.** A kind is synced once the source has sent a complete list of it ([`Update::Replace`](super::Update::Replace),
//!   [`Update::ListEnd`](super::Update::ListEnd)), and stays so. Changes of a kind may be delivered before. A subscriber deletes nothing from the
//!   kernel's maps before all the kinds that it uses are synced; one kind that cannot be read therefore stops only the subscribers that use it.
//! * **Source away.** A source that fails or panics is started again after [`RESTART_AFTER`]. Meanwhile nothing is delivered, the store and the
//!   maps keep the last state, and [`Feed::problems`] says so. The new run lists everything again; only differences are delivered.
//! * **Blocking.** While a subscriber's `deliver` is pending the feed does not apply anything, and the source waits once [`WAITING`] batches are queued. A
//!   subscriber may therefore wait in `deliver` for its own map writes, but not for the feed, for the source, or for another subscriber.
//! * **Panics.** When the feed panics while applying, the source is started again, and subscribers are told to rebuild their state from the store
//!   ([`ObjectChanges::resync`]).

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use parking_lot::{Mutex, MutexGuard};
use terway_core::errors::{self, Error};
use terway_core::objects::Kind;
use tokio::sync::{Notify, mpsc};
use tracing::{error, info};

use super::store::StoreWriter;
use super::{
    ApiClient, Batch, EmptySource, NodeContext, ObjectChanges, ObjectMetrics, ObjectSource, ObjectStore, Origin,
    Problem, Scope, SourceError,
};
use crate::actor::batch;
use crate::supervise;

/// The time until a source that failed is started again.
pub const RESTART_AFTER: Duration = Duration::from_secs(1);

/// Batches that may wait for delivery; a source that is faster waits too.
pub const WAITING: usize = 64;

/// Problems that the status lists one by one.
const LISTED: usize = 20;

/// A consumer of object changes.
#[async_trait]
pub trait Subscriber: Send + Sync {
    /// Receives changes; see the [contract](self) for what it may wait for.
    async fn deliver(&self, changes: Arc<ObjectChanges>);
}

/// Opens the object source; called again after each failure.
pub type OpenSource = Box<dyn Fn() -> Result<Box<dyn ObjectSource>, SourceError> + Send + Sync>;

/// Opens the source that `--objects` names, or an empty one. The API server is read by `api`, if given.
#[must_use]
pub fn open(origin: Option<Origin>, context: NodeContext, api: Option<Arc<ApiClient>>) -> OpenSource {
    Box::new(move || match &origin {
        Some(origin) => origin.open(&context, api.as_ref()),
        None => Ok(Box::new(EmptySource)),
    })
}

/// What a feed is made with.
pub struct Setup {
    /// The source.
    pub open: OpenSource,
    /// The store, empty.
    pub store: Arc<ObjectStore>,
    /// The subscribers, in the order of delivery.
    pub subscribers: Vec<Arc<dyn Subscriber>>,
    /// Metrics.
    pub metrics: ObjectMetrics,
}

/// One kind of objects in the feed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KindStatus {
    /// The kind.
    pub kind: Kind,
    /// Its objects in the store.
    pub count: usize,
    /// Whether all objects of the kind were listed at least once.
    pub is_synced: bool,
}

/// See the [module](self).
#[derive(Debug)]
pub struct Feed {
    status: Mutex<Status>,
    /// The source is to list everything again.
    relist: Notify,
    metrics: ObjectMetrics,
}

#[derive(Debug, Default)]
struct Status {
    kinds: Vec<KindStatus>,
    problems: Vec<Problem>,
    /// Why the source does not run.
    failure: Option<String>,
}

impl Feed {
    /// Starts the source and the delivery.
    #[must_use]
    pub fn start(setup: Setup) -> Arc<Self> {
        let Setup { open, store, subscribers, metrics } = setup;
        let this = Arc::new(Self { status: Mutex::default(), relist: Notify::new(), metrics });
        let (sender, batches) = mpsc::channel(WAITING);
        // Panics of a source and of applying are handled inside; any other one leaves no delivery and ends the daemon.
        supervise::spawn("object-source", Arc::clone(&this).run_source(open, sender));
        supervise::spawn("object-feed", Arc::clone(&this).deliver(store, subscribers, batches));
        this
    }

    /// The kinds of objects and how many there are of each. Empty before the first batch.
    #[must_use]
    pub fn kinds(&self) -> Vec<KindStatus> {
        self.status().kinds.clone()
    }

    /// What the source cannot read at the moment, the most important first.
    #[must_use]
    pub fn problems(&self) -> Vec<Error> {
        let status = self.status();
        let failure = status.failure.iter().map(|reason| Error::new(errors::OBJECTS_UNREADABLE, format!("{reason}.")));
        let error = |problem: &Problem| match problem.scope {
            Scope::Source | Scope::Kind(_) => Error::new(errors::OBJECTS_UNREADABLE, format!("{problem}.")),
            Scope::Object(_) | Scope::Document { .. } => Error::new(errors::OBJECT_INVALID, format!("{problem}.")),
        };
        failure.chain(status.problems.iter().take(LISTED).map(error)).collect()
    }

    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock()
    }

    /// Runs the source, and starts it again when it fails.
    async fn run_source(self: Arc<Self>, open: OpenSource, batches: mpsc::Sender<Batch>) {
        loop {
            let ended = match open() {
                Ok(source) => {
                    self.status().failure = None;
                    // A panic of the source ends this run only.
                    let run = supervise::contain("object-source-run", source.run(batches.clone()));
                    tokio::select! {
                        ended = run => ended.unwrap_or_else(|panic| Err(SourceError::Panicked(panic.detail))),
                        () = self.relist.notified() => Err(SourceError::BatchLost),
                    }
                }
                Err(error) => Err(error),
            };
            let Err(error) = ended else { return };
            self.metrics.restarted();
            if self.status().failure.replace(error.to_string()).is_none() {
                error!(%error, "the object source failed; the last state of all objects stays in force");
            }
            tokio::time::sleep(RESTART_AFTER).await;
        }
    }

    /// Applies batches to the store and delivers what changed.
    async fn deliver(
        self: Arc<Self>,
        store: Arc<ObjectStore>,
        subscribers: Vec<Arc<dyn Subscriber>>,
        mut batches: mpsc::Receiver<Batch>,
    ) {
        let writer = Arc::new(Mutex::new(StoreWriter::new(store)));
        let mut synced = 0;
        while let Some(first) = batches.recv().await {
            let received = Instant::now();
            let burst = batch(first, || batches.try_recv().ok());
            self.note_problems(&burst);
            let apply = {
                let writer = Arc::clone(&writer);
                move || writer.lock().apply(burst)
            };
            let apply = supervise::contain("object-apply", supervise::blocking(apply));
            let changes = apply.await.unwrap_or_else(|error| {
                error!(%error, "applying object changes panicked; listing all objects again");
                self.relist.notify_one();
                writer.lock().resync()
            });
            self.note_kinds(&writer.lock());
            let newly_synced = changes.synced.len() > std::mem::replace(&mut synced, changes.synced.len());
            if changes.changes.is_empty() && !changes.resync && !newly_synced {
                continue;
            }
            if newly_synced && changes.has_synced(&Kind::ALL) {
                info!("all Kubernetes objects are listed");
            }
            let changes = Arc::new(ObjectChanges { received: Some(received), ..changes });
            for subscriber in &subscribers {
                subscriber.deliver(Arc::clone(&changes)).await;
            }
        }
    }

    fn note_problems(&self, burst: &[Batch]) {
        let Some(problems) = burst.iter().rev().find_map(|batch| batch.problems.clone()) else { return };
        self.metrics.problems(problems.len());
        self.status().problems = problems;
    }

    fn note_kinds(&self, writer: &StoreWriter) {
        let kinds = writer.kinds();
        for KindStatus { kind, count, is_synced } in &kinds {
            self.metrics.kind(*kind, *count, *is_synced);
        }
        self.status().kinds = kinds;
    }
}

#[cfg(test)]
mod tests;
