//! The simulated cloud: a server of the ECS/VPC OpenAPI and of the metadata service, on the real wire format.
//!
//! One [`CloudSim`] is one account with one VPC. It can serve any number of listeners, each in whatever network namespace it was bound
//! in: OpenAPI at `/` and metadata at `/latest/`; the admin endpoint has listeners of its own. What it decides it tells a [`Fabric`].

mod actions;
mod addresses;
mod admin;
mod admin_actions;
mod auth;
mod calls;
mod config;
mod describe;
mod fabric_queue;
mod faults;
mod history;
mod metadata;
mod reply;
mod scenario;
mod server;
mod timeline;
mod vpc;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use terway_core::ident::EniId;
use tokio::net::TcpListener;

pub use self::admin_actions::{AdminAction, Timing};
use self::auth::Keys;
use self::calls::CallLog;
pub use self::calls::{CallRecord, Calls};
pub use self::config::{CloudConfig, InstanceConfig, InstanceTypeConfig, VSwitchConfig};
use self::fabric_queue::{Command, FabricQueue};
use self::faults::{Buckets, Faults};
pub use self::faults::{Fault, FaultKind};
use self::metadata::Sessions;
use self::scenario::RunningScenario;
pub use self::scenario::{Scenario, Step, Trigger};
pub use self::vpc::EniRecord;
use self::vpc::Vpc;
use crate::fabric::Fabric;

/// Which node a metadata request comes from, by its source address.
pub type CallerResolver = Arc<dyn Fn(SocketAddr) -> Option<String> + Send + Sync>;

/// A handle to the cloud; clones are the same cloud.
#[derive(Clone)]
pub struct CloudSim {
    inner: Arc<Inner>,
}

struct Inner {
    state: Locked<Vpc>,
    keys: Locked<Keys>,
    sessions: Locked<Sessions>,
    faults: Locked<Faults>,
    buckets: Locked<Buckets>,
    calls: Locked<CallLog>,
    stage: Locked<RunningScenario>,
    queue: FabricQueue,
    who: Locked<Option<CallerResolver>>,
    clock_offset: AtomicI64,
    seed: u64,
}

/// A mutex that a panicked test does not poison for its neighbours' assertions. Order of locking: sessions, state, keys.
struct Locked<T>(Mutex<T>);

impl<T> Locked<T> {
    const fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// The cloud's clock.
    fn now(&self) -> SystemTime {
        let offset = self.clock_offset.load(Ordering::Relaxed);
        let by = Duration::from_secs(offset.unsigned_abs());
        if offset < 0 { SystemTime::now() - by } else { SystemTime::now() + by }
    }

    /// Changes the VPC.
    fn alter<R>(&self, f: impl FnOnce(&mut Vpc) -> R) -> R {
        let mut vpc = self.state.lock();
        let result = f(&mut vpc);
        vpc.remember();
        result
    }

    fn who(&self, from: SocketAddr) -> Option<String> {
        if let Some(who) = self.who.lock().as_ref() {
            return who(from);
        }
        let ip = from.ip().to_canonical();
        let state = self.state.lock();
        let owns = |eni: &&EniRecord| match ip {
            IpAddr::V4(v4) => eni.v4.contains(&v4),
            IpAddr::V6(v6) => eni.v6.contains(&v6),
        };
        state.enis.values().find(owns).and_then(|eni| eni.node.clone())
    }
}

impl CloudSim {
    /// A cloud whose instances are still off: see [`CloudSim::power_on`].
    ///
    /// # Errors
    /// When the configuration contradicts itself.
    pub fn new(config: CloudConfig, fabric: Arc<dyn Fabric>) -> anyhow::Result<Self> {
        let queue = FabricQueue::new(fabric)?;
        let mut keys = Keys::default();
        for (id, secret) in &config.access_keys {
            keys.insert(id, secret);
        }
        let inner = Inner {
            keys: Locked::new(keys),
            sessions: Locked::default(),
            faults: Locked::new(Faults::new(config.seed, config.faults.clone())),
            buckets: Locked::new(Buckets::new(config.rate_limits.clone())),
            calls: Locked::new(CallLog::new()),
            stage: Locked::default(),
            who: Locked::default(),
            clock_offset: AtomicI64::new(config.clock_offset),
            seed: config.seed,
            queue: queue.clone(),
            state: Locked::new(Vpc::new(config, queue)?),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Replaces the rule by which metadata callers are told apart. By default a caller is the node whose ENI has its address.
    pub fn set_caller_resolver(&self, who: CallerResolver) {
        *self.inner.who.lock() = Some(who);
    }

    /// Serves HTTP on a listener until the future is dropped. Several may run at once.
    ///
    /// # Errors
    /// When accepting fails for good.
    pub async fn serve(&self, listener: TcpListener) -> std::io::Result<()> {
        let app = server::router(Arc::clone(&self.inner)).into_make_service_with_connect_info::<SocketAddr>();
        axum::serve(listener, app).await
    }

    /// Serves the admin endpoint (JSON over HTTP) on a listener until the future is dropped:
    ///
    /// - `GET /state`, `GET /calls` (counts), `GET /log?after=N` (each call), `DELETE /calls`
    /// - `GET`, `PUT` (replace) and `POST` (add) `/faults`: a list of [`Fault`]
    /// - `POST /orders`: one [`AdminAction`] or a list
    /// - `PUT /scenario`: a [`Scenario`], which begins at once; `GET /scenario`: `{"open": steps to come}`
    ///
    /// # Errors
    /// When accepting fails for good.
    pub async fn serve_admin(&self, listener: TcpListener) -> std::io::Result<()> {
        axum::serve(listener, admin::router(Arc::clone(&self.inner))).await
    }

    /// Begins a scenario in place of the present one and its faults. Must be called within a tokio runtime.
    pub fn play(&self, scenario: Scenario) {
        scenario::begin(&self.inner, scenario);
    }

    /// Steps of the scenario that are still to come.
    #[must_use]
    pub fn open_steps(&self) -> usize {
        scenario::open(&self.inner)
    }

    /// Does one thing beside the calls, at once.
    ///
    /// # Errors
    /// When it names something that does not exist.
    pub fn apply(&self, order: AdminAction) -> anyhow::Result<()> {
        self.inner.apply_action(order)
    }

    /// Adds temporary keys that live this long.
    pub fn add_temporary_key(&self, id: &str, secret: &str, token: &str, lifetime: Duration) {
        let until = self.inner.now() + lifetime;
        self.inner.keys.lock().insert_temporary(id, secret, token, until);
    }

    /// Plugs the primary ENI of a node and returns when the fabric has done so.
    ///
    /// # Errors
    /// When there is no such node, or the fabric fails.
    pub async fn power_on(&self, node: &str) -> anyhow::Result<()> {
        let eni = {
            let mut state = self.inner.state.lock();
            let id = state.primary_of(node).with_context(|| format!("no instance is node {node}"))?.id.clone();
            let eni = state.enis.get_mut(&id).context("the primary ENI is gone")?;
            eni.plugged = true;
            let eni = eni.clone();
            state.for_fabric(&eni).context("the primary ENI's vSwitch is gone")?
        };
        self.inner.queue.run(Command::Hotplug { node: node.to_owned(), eni }).await
    }

    /// Returns when the fabric has done all it was told so far.
    ///
    /// # Errors
    /// When the fabric's thread has died.
    pub async fn wait_until_idle(&self) -> anyhow::Result<()> {
        self.inner.queue.run(Command::Barrier).await
    }

    /// All ENIs, ordered by id.
    #[must_use]
    pub fn enis(&self) -> Vec<EniRecord> {
        self.inner.state.lock().enis.values().cloned().collect()
    }

    /// How often each action was called. The metadata service counts as `metadata`.
    #[must_use]
    pub fn calls(&self) -> BTreeMap<String, Calls> {
        self.inner.calls.lock().counts().clone()
    }

    /// Each call since the beginning or the last [`CloudSim::forget_calls`], in the order of their answers; at most the last 100 000.
    #[must_use]
    pub fn log(&self) -> Vec<CallRecord> {
        self.inner.calls.lock().records().cloned().collect()
    }

    /// Forgets the call counts and the log.
    pub fn forget_calls(&self) {
        self.inner.calls.lock().clear();
    }

    /// Replaces all faults.
    pub fn set_faults(&self, faults: Vec<Fault>) {
        self.inner.faults.lock().set(faults);
    }

    /// Puts the cloud's clock this many seconds ahead of this machine's.
    pub fn set_clock_offset(&self, seconds: i64) {
        self.inner.clock_offset.store(seconds, Ordering::Relaxed);
    }

    /// Makes all metadata tokens invalid.
    pub fn forget_metadata_tokens(&self) {
        self.inner.sessions.lock().forget_tokens();
    }

    /// Makes all keys of RAM roles expire now; the metadata service gives out new ones from now on.
    pub fn expire_role_keys(&self) {
        // Never refused.
        let _always = self.inner.apply_action(AdminAction::ExpireKeys);
    }

    /// What an administrator does in the console: takes an ENI away, whatever its state.
    ///
    /// # Errors
    /// When there is no such ENI.
    pub fn remove_eni(&self, id: &EniId) -> anyhow::Result<()> {
        self.inner.apply_action(AdminAction::RemoveEni { eni: id.to_string() })
    }

    /// Whether no ENI is on its way from one state to another.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        admin_actions::quiet(&self.inner.state.lock())
    }
}

impl<T: Default> Default for Locked<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}
