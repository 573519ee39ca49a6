//! The simulated cloud: a server of the ECS/VPC OpenAPI and of the metadata service, on the real wire format.
//!
//! One [`CloudSim`] is one account with one VPC. It can serve any number of listeners, each in whatever network namespace it was bound
//! in: OpenAPI at `/`, metadata at `/latest/`, and for tests `/_sim/`. What it decides it tells a [`Fabric`].

mod actions;
mod auth;
mod config;
mod describe;
mod faults;
mod metadata;
mod reply;
mod server;
mod timeline;
mod vpc;
mod wire;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use serde::Serialize;
use terway_core::cloud::EniStatus;
use terway_core::ident::EniId;
use tokio::net::TcpListener;

use self::auth::Keys;
pub use self::config::{CloudConfig, InstanceConfig, InstanceTypeConfig, VSwitchConfig};
use self::faults::{Buckets, Faults};
pub use self::faults::{Fault, FaultKind};
use self::metadata::Sessions;
pub use self::vpc::EniRecord;
use self::vpc::Vpc;
use self::wire::{Command, Wire};
use crate::fabric::Fabric;

/// Which node a metadata request comes from, by its source address.
pub type WhoAsks = Arc<dyn Fn(SocketAddr) -> Option<String> + Send + Sync>;

/// Calls of one action.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Calls {
    /// All that came in, refused ones included.
    pub total: u64,
    /// Refused ones by code. For the metadata service the code is the HTTP status.
    pub refused: BTreeMap<String, u64>,
    /// Those that had their effect, but whose answer did not arrive.
    pub lost: u64,
}

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
    calls: Locked<BTreeMap<String, Calls>>,
    wire: Wire,
    who: Locked<Option<WhoAsks>>,
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
        let wire = Wire::new(fabric)?;
        let mut keys = Keys::default();
        for (id, secret) in &config.access_keys {
            keys.insert(id, secret);
        }
        let inner = Inner {
            keys: Locked::new(keys),
            sessions: Locked::default(),
            faults: Locked::new(Faults::new(config.seed, config.faults.clone())),
            buckets: Locked::new(Buckets::new(config.rate_limits.clone())),
            calls: Locked::default(),
            who: Locked::default(),
            clock_offset: AtomicI64::new(config.clock_offset),
            seed: config.seed,
            wire: wire.clone(),
            state: Locked::new(Vpc::new(config, wire)?),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Replaces the rule by which metadata callers are told apart. By default a caller is the node whose ENI has its address.
    pub fn who_asks(&self, who: WhoAsks) {
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
        self.inner.wire.run(Command::Plug { node: node.to_owned(), eni }).await
    }

    /// Returns when the fabric has done all it was told so far.
    ///
    /// # Errors
    /// When the fabric's thread has died.
    pub async fn settle(&self) -> anyhow::Result<()> {
        self.inner.wire.run(Command::Barrier).await
    }

    /// All ENIs, ordered by id.
    #[must_use]
    pub fn enis(&self) -> Vec<EniRecord> {
        self.inner.state.lock().enis.values().cloned().collect()
    }

    /// How often each action was called. The metadata service counts as `metadata`.
    #[must_use]
    pub fn calls(&self) -> BTreeMap<String, Calls> {
        self.inner.calls.lock().clone()
    }

    /// Forgets the call counts.
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
        let now = self.inner.now();
        self.inner.sessions.lock().forget_roles();
        self.inner.keys.lock().expire_temporary(now);
    }

    /// What an administrator does in the console: takes an ENI away, whatever its state.
    ///
    /// # Errors
    /// When there is no such ENI.
    pub fn remove_eni(&self, id: &EniId) -> anyhow::Result<()> {
        let mut state = self.inner.state.lock();
        let eni = state.enis.remove(id).with_context(|| format!("no ENI {id}"))?;
        timeline::release(&mut state, &eni);
        Ok(())
    }

    /// Whether no ENI is on its way from one state to another.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        let state = self.inner.state.lock();
        state.enis.values().all(|eni| matches!(eni.status, EniStatus::Available | EniStatus::InUse))
    }
}

impl<T: Default> Default for Locked<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}
