//! Connection tracking while the daemon runs: counts the flow tables every half minute, takes away what is dead at a pace that adapts
//! itself, and tells how full they are.
//!
//! What is dead, how often, and what the kernel must have thrown away is decided by `terway_core::conntrack`; reading and deleting is
//! `bpf`'s. Both counting and deleting read the whole table, so a pass does both where both are due.

mod metrics;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use terway_abi::PathCounter;
use terway_core::config::{self, Config};
use terway_core::conntrack::{EvictionInputs, GcInterval, GcPass, estimate_evictions};
use terway_proto::v1;
use tokio::sync::watch;
use tracing::{debug, info, warn};

use crate::bpf::{BpfError, Datapath, FamilyGcReport, GcOptions, GcReport};

pub use metrics::ConntrackMetrics;

/// Time between two counts, as in Cilium (reference: pkg/maps/ctmap, pressure metrics).
const COUNT_EVERY: Duration = Duration::from_secs(30);

/// A pass that takes longer is worth a line in the log.
const SLOW: Duration = Duration::from_secs(30);

/// Tables are called nearly full from here on.
const NEARLY_FULL: f64 = 0.9;

/// Connection tracking of a running daemon.
#[derive(Debug)]
pub struct Conntrack {
    datapath: Arc<Datapath>,
    metrics: ConntrackMetrics,
    cpus: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    settings: config::Conntrack,
    pace: GcInterval,
    last: Option<Last>,
    /// The last pass that deleted.
    collected: Option<Instant>,
    totals: Totals,
    nearly_full: bool,
}

/// What the next pass compares with.
#[derive(Clone, Copy, Debug)]
struct Last {
    found: GcReport,
    at: Instant,
    deleting: bool,
    counters: Counted,
}

/// Counters of the programs, and what was deleted on request, at one moment.
#[derive(Clone, Copy, Debug, Default)]
struct Counted {
    made: u64,
    replaced: u64,
    refused: u64,
    flushed: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    passes: u64,
    void: u64,
    expired: u64,
    lost: u64,
}

fn lock(mutex: &Mutex<State>) -> MutexGuard<'_, State> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Conntrack {
    /// Begins, with a pass at once.
    #[must_use]
    pub fn start(
        datapath: Arc<Datapath>,
        mut config: watch::Receiver<Arc<Config>>,
        metrics: ConntrackMetrics,
        time_scale: u32,
    ) -> Arc<Self> {
        let settings = config.borrow_and_update().conntrack;
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
        let pace = GcInterval::new(settings.gc_interval, settings.gc_max_interval);
        let state =
            State { settings, pace, last: None, collected: None, totals: Totals::default(), nearly_full: false };
        let this = Arc::new(Self { datapath, metrics, cpus, state: Mutex::new(state) });
        tokio::spawn(Arc::clone(&this).follow(config, COUNT_EVERY / time_scale.max(1)));
        this
    }

    async fn follow(self: Arc<Self>, mut config: watch::Receiver<Arc<Config>>, count_every: Duration) {
        loop {
            let delete = self.collection_is_due();
            let this = Arc::clone(&self);
            let found = match tokio::task::spawn_blocking(move || this.run(delete)).await {
                Ok(Ok(found)) => Some(found),
                Ok(Err(error)) => {
                    warn!(%error, "the flow tables cannot be gone through; trying again");
                    None
                }
                Err(error) => {
                    warn!(%error, "a pass over the flow tables ended by itself");
                    None
                }
            };
            if !delete && found.is_some_and(|found| is_urgent(&found)) {
                lock(&self.state).collected = None;
                continue;
            }
            let next = self.next_collection().map_or(count_every, |due| due.min(count_every));
            tokio::select! {
                () = tokio::time::sleep(next) => {}
                Ok(()) = config.changed() => {
                    let settings = config.borrow_and_update().conntrack;
                    let mut state = lock(&self.state);
                    if settings != state.settings {
                        state.settings = settings;
                        state.pace.configure(settings.gc_interval, settings.gc_max_interval);
                        // What new timeouts say shall be true soon.
                        state.collected = None;
                    }
                }
            }
        }
    }

    fn next_collection(&self) -> Option<Duration> {
        let state = lock(&self.state);
        state.collected.map(|at| state.pace.interval().saturating_sub(at.elapsed()))
    }

    fn collection_is_due(&self) -> bool {
        self.next_collection().is_none_or(|left| left.is_zero())
    }

    fn counted(&self) -> Result<Counted, BpfError> {
        let counters = self.datapath.counters().read()?;
        let of = |kind| counters.kind(kind).packets;
        Ok(Counted {
            made: of(PathCounter::FlowNew),
            replaced: of(PathCounter::FlowStale),
            refused: of(PathCounter::FlowInsertFailed),
            flushed: self.datapath.flows().flushed(),
        })
    }

    /// One pass.
    fn run(&self, delete: bool) -> Result<GcReport, BpfError> {
        let (timeouts, last) = {
            let state = lock(&self.state);
            (state.settings.timeouts, state.last)
        };
        let counters = self.counted()?;
        let options = GcOptions {
            timeouts,
            delete,
            recount_connections: self.datapath.services().uses_connection_counts(),
            previous_began: last.map(|last| last.found.began),
        };
        let at = Instant::now();
        let found = self.datapath.flows().collect_garbage(&options)?;
        let gone = last.map_or(0, |last| disappeared(&last, &found, &counters, self.cpus));
        let mut state = lock(&self.state);
        if delete {
            let since = state.collected.map_or(Duration::ZERO, |before| before.elapsed());
            if let Some(worst) = found.families.iter().max_by_key(|f| f.deleted() * 1000 / f.capacity.max(1)) {
                state.pace.passed(worst.deleted(), worst.capacity, since);
            }
            state.collected = Some(at);
            state.totals.passes += 1;
        }
        for family in &found.families {
            state.totals.void += family.deleted_invalid;
            state.totals.expired += family.deleted_expired;
        }
        state.totals.lost += gone;
        self.metrics.passed(&found, delete, state.pace.interval());
        self.metrics
            .lost(gone, last.map_or(counters.refused, |last| counters.refused.saturating_sub(last.counters.refused)));
        state.tell_pressure(&found);
        state.last = Some(Last { found, at, deleting: delete, counters });
        drop(state);
        debug!(?found, delete, gone, "flow tables");
        if found.took > SLOW {
            info!(took = ?found.took, "going through the flow tables takes long");
        }
        Ok(found)
    }

    /// What is known, for the command line.
    #[must_use]
    pub fn view(&self) -> v1::FlowTracking {
        let state = lock(&self.state);
        let Some(last) = &state.last else { return v1::FlowTracking::default() };
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let deleted = if last.deleting { last.found.families.iter().map(FamilyGcReport::deleted).sum() } else { 0 };
        let [v4, v6] = last.found.families.map(|family| pressure(&family));
        v1::FlowTracking {
            pressure_v4: v4,
            pressure_v6: v6,
            made: last.counters.made,
            refused: last.counters.refused,
            lost: state.totals.lost,
            interval_ms: milliseconds(state.pace.interval()),
            passes: state.totals.passes,
            last_ms_ago: milliseconds(last.at.elapsed()),
            last_took_us: u64::try_from(last.found.took.as_micros()).unwrap_or(u64::MAX),
            last_deleted: deleted,
            deleted_stale: state.totals.void,
            deleted_expired: state.totals.expired,
        }
    }
}

impl State {
    /// Once when a table becomes nearly full, and once when it no longer is.
    fn tell_pressure(&mut self, found: &GcReport) {
        let fullest = found.families.iter().map(pressure).fold(0.0, f64::max);
        if !self.nearly_full && fullest >= NEARLY_FULL {
            warn!(
                fullest,
                "a flow table is nearly full: the oldest flows make room for new ones; see docs/conntrack.md"
            );
            self.nearly_full = true;
        } else if self.nearly_full && fullest < NEARLY_FULL * 0.9 {
            info!(fullest, "the flow tables have room again");
            self.nearly_full = false;
        }
    }
}

/// The part of a table that is in use after the pass.
fn pressure(family: &FamilyGcReport) -> f64 {
    family.used.saturating_sub(family.deleted()) as f64 / family.capacity.max(1) as f64
}

fn is_urgent(found: &GcReport) -> bool {
    found.families.iter().any(|f| GcInterval::is_urgent(f.used, f.invalid + f.expired, f.capacity))
}

/// The estimate of entries that the kernel took away between two passes.
fn disappeared(last: &Last, found: &GcReport, counters: &Counted, cpus: u64) -> u64 {
    let before = last.found.families.map(|family| GcPass {
        left: (family.old + family.new).saturating_sub(family.deleted()),
        capacity: family.capacity,
    });
    let since = EvictionInputs {
        made: counters.made.saturating_sub(last.counters.made),
        replaced: counters.replaced.saturating_sub(last.counters.replaced),
        flushed: counters.flushed.saturating_sub(last.counters.flushed),
        old: found.families.iter().map(|family| family.old).sum(),
        young: found.families.iter().map(|family| family.new).sum(),
    };
    estimate_evictions(&before, &since, cpus)
}
