//! Writes to the Kubernetes API: events, the conditions, annotations and taints of the own Node, annotations of its pods.
//!
//! ```text
//!  ADD ──► EventRecorder ──► events task ──┐
//!  pool, object feed ──wake──► node task ──┼──► API server (the connection of the object source)
//!                              pods task ──┘
//! ```
//!
//! What is written is decided in `terway_core::kube_writes`. Nothing here blocks an ADD. While the API server is away the tasks try again with
//! a growing pause; what they then write is the state of that moment. Without `--objects kube` there is nothing to write to.

mod api;
mod events;
mod metrics;
mod node;
mod pods;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use backon::{BackoffBuilder as _, ExponentialBuilder};
use parking_lot::Mutex;
use terway_core::clock::Moment;
use terway_core::config::Config;
use terway_core::errors::{self, Error};
use terway_core::ident::{Addresses, PodRef};
use terway_core::ipam::Stats;
use terway_core::kube_writes::{
    Event, EventRecorder, EventTarget, EventType, NodeSettings, Reason, Recorded, RepeatLimiter, Stamp,
};
use terway_core::objects::ObjectName;
use tokio::sync::{Notify, watch};
use tracing::debug;

use crate::objects::{ApiClient, ObjectChanges, ObjectStore, Subscriber};
use crate::supervise;

pub use metrics::KubeWriteMetrics;

/// The time that changes are collected for before the state is compared.
const DEBOUNCE: Duration = Duration::from_millis(200);
/// The first and the longest pause after a failed write.
const PAUSES: (Duration, Duration) = (Duration::from_millis(800), Duration::from_secs(30));
/// The first and the longest pause before the same is written again.
const REPEAT: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));

/// Which events are written (`--events`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum EventLevel {
    /// All.
    #[default]
    All,
    /// Those of type Warning.
    Warnings,
    /// None.
    None,
}

/// The state of the node that is written to the API.
pub trait NodeState: Send + Sync {
    /// The pool in numbers, and its problems.
    fn pool(&self) -> (Stats, Vec<Error>);
    /// The pods that are attached, with their addresses.
    fn attached(&self) -> Vec<(PodRef, Addresses)>;
    /// Whether pods can start.
    fn is_ready(&self) -> bool;
    /// Changes with the pool.
    fn changed(&self) -> watch::Receiver<()>;
}

/// What the writes are made with.
pub struct Setup {
    /// The API server; without one, nothing is written.
    pub api: Option<Arc<ApiClient>>,
    /// The objects as the API has them.
    pub objects: Arc<ObjectStore>,
    /// Name of the own Node.
    pub node: String,
    /// What is written to the Node.
    pub settings: NodeSettings,
    /// Which events are written.
    pub events: EventLevel,
    /// The configuration: whether pods are annotated.
    pub config: watch::Receiver<Arc<Config>>,
    /// Metrics.
    pub metrics: KubeWriteMetrics,
    /// Pauses are divided by this.
    pub time_scale: u32,
}

/// See the [module](self).
pub struct KubeWrites {
    api: Option<Arc<ApiClient>>,
    objects: Arc<ObjectStore>,
    node: Arc<str>,
    settings: NodeSettings,
    events: EventLevel,
    config: watch::Receiver<Arc<Config>>,
    metrics: KubeWriteMetrics,
    time_scale: u32,
    origin: Instant,
    recorder: Mutex<EventRecorder>,
    recorded: Notify,
    /// Changes with the objects.
    delivered: watch::Sender<()>,
    /// What is wrong with the Node.
    node_problems: Mutex<Vec<Error>>,
    /// What cannot be written, by kind of write, and why.
    failures: Mutex<BTreeMap<&'static str, String>>,
}

impl KubeWrites {
    /// Takes events from now on; writes nothing before [`Self::start`].
    #[must_use]
    pub fn new(setup: Setup) -> Arc<Self> {
        let Setup { api, objects, node, settings, events, config, metrics, time_scale } = setup;
        let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let seed = u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX);
        Arc::new(Self {
            api,
            objects,
            node: node.into(),
            settings,
            events,
            config,
            metrics,
            time_scale: time_scale.max(1),
            origin: Instant::now(),
            recorder: Mutex::new(EventRecorder::new(seed, Moment::ZERO)),
            recorded: Notify::new(),
            delivered: watch::Sender::new(()),
            node_problems: Mutex::default(),
            failures: Mutex::default(),
        })
    }

    /// Starts writing. From now on a ready node is told to be.
    pub fn start(self: &Arc<Self>, state: &Arc<dyn NodeState>) {
        let Some(api) = &self.api else { return };
        supervise::spawn_restarting("kube-events", {
            let (this, api) = (Arc::clone(self), Arc::clone(api));
            move || Arc::clone(&this).write_events(Arc::clone(&api))
        });
        supervise::spawn_restarting("kube-node", {
            let (this, api, state) = (Arc::clone(self), Arc::clone(api), Arc::clone(state));
            move || Arc::clone(&this).write_node(Arc::clone(&api), Arc::clone(&state))
        });
        supervise::spawn_restarting("kube-pods", {
            let (this, api, state) = (Arc::clone(self), Arc::clone(api), Arc::clone(state));
            move || Arc::clone(&this).write_pods(Arc::clone(&api), Arc::clone(&state))
        });
    }

    /// Records an event; it is written later. Never waits for the API server.
    pub fn record(&self, event: Event) {
        let is_wanted = match self.events {
            EventLevel::All => true,
            EventLevel::Warnings => event.reason.event_type() == EventType::Warning,
            EventLevel::None => false,
        };
        if self.api.is_none() || !is_wanted {
            return;
        }
        let reason = event.reason;
        let mut recorder = self.recorder.lock();
        let recorded = recorder.record(event, Stamp { moment: self.now(), wall: SystemTime::now() });
        self.metrics.event(reason, recorded, recorder.waiting());
        drop(recorder);
        match recorded {
            Recorded::Waiting => self.recorded.notify_one(),
            Recorded::RateLimited | Recorded::Overflow => debug!(?reason, ?recorded, "dropped an event"),
        }
    }

    /// Records an event on a pod. One that no runtime for Kubernetes has named gets none.
    pub fn record_on_pod(&self, pod: &PodRef, reason: Reason, message: impl Into<String>) {
        if self.api.is_none() || pod.name.is_empty() {
            return;
        }
        let uid = if pod.uid.is_empty() {
            let name = ObjectName::new(&pod.namespace, &pod.name);
            self.objects.read().pods().get(&name).map(|pod| pod.meta.uid.to_string()).unwrap_or_default()
        } else {
            pod.uid.clone()
        };
        let target = EventTarget::Pod {
            namespace: pod.namespace.as_str().into(),
            name: pod.name.as_str().into(),
            uid: uid.into(),
        };
        self.record(Event::new(target, reason, message));
    }

    /// Records an event on the own Node.
    pub fn record_on_node(&self, reason: Reason, message: impl Into<String>) {
        self.record(Event::new(EventTarget::Node(Arc::clone(&self.node)), reason, message));
    }

    /// What is wrong with the Node, or with writing, for `terway-cli status`.
    #[must_use]
    pub fn problems(&self) -> Vec<Error> {
        let failure =
            |(what, reason): (&&str, &String)| Error::new(errors::KUBE_WRITE_FAILED, format!("{what}: {reason}."));
        let failures: Vec<_> = self.failures.lock().iter().map(failure).collect();
        self.node_problems.lock().iter().cloned().chain(failures).collect()
    }

    /// Event objects that wait for being written.
    #[must_use]
    pub fn waiting_events(&self) -> usize {
        self.recorder.lock().waiting()
    }

    fn now(&self) -> Moment {
        Moment::ZERO.after(self.origin.elapsed())
    }

    fn instant(&self, moment: Moment) -> Instant {
        self.origin + moment.since(Moment::ZERO)
    }

    fn scaled(&self, time: Duration) -> Duration {
        time / self.time_scale
    }

    fn limiter<W: std::hash::Hash + Eq>(&self) -> RepeatLimiter<W> {
        RepeatLimiter::new(self.scaled(REPEAT.0), self.scaled(REPEAT.1))
    }

    /// Pauses after failures in a row, with jitter.
    fn pauses(&self) -> impl Iterator<Item = Duration> + use<> {
        let (first, longest) = (self.scaled(PAUSES.0), self.scaled(PAUSES.1));
        ExponentialBuilder::default()
            .with_min_delay(first)
            .with_max_delay(longest)
            .with_factor(2.0)
            .with_jitter()
            .without_max_times()
            .build()
    }
}

#[async_trait]
impl Subscriber for KubeWrites {
    async fn deliver(&self, _changes: Arc<ObjectChanges>) {
        self.delivered.send_replace(());
    }
}
