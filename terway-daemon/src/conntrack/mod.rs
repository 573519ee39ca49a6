//! Garbage collection of the flow tables while the daemon runs: counts their entries every half minute, deletes dead ones at an interval
//! that adapts itself, and reports how full the tables are.
//!
//! `terway_core::conntrack` decides when an entry is dead, how often to collect, and how many entries the kernel must have evicted; reading
//! and deleting is `bpf`'s. Counting and deleting both read the whole table, so one run does both where both are due.

mod metrics;

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use terway_abi::PathCounter;
use terway_core::config::{self, Config};
use terway_core::conntrack::{EvictionInputs, GcInterval, GcPass, estimate_evictions};
use terway_proto::v1;
use tokio::sync::watch;
use tracing::{debug, info, warn};

use crate::bpf::{BpfError, Datapath, FamilyGcReport, GcOptions, GcReport};
use crate::supervise;

pub use metrics::ConntrackMetrics;

/// Time between two runs that count, as in Cilium (pkg/maps/ctmap, pressure metrics).
const COUNT_INTERVAL: Duration = Duration::from_secs(30);

/// A run that takes longer is logged.
const SLOW_RUN: Duration = Duration::from_secs(30);

/// Above this usage a warning is logged.
const NEARLY_FULL: f64 = 0.9;

/// The garbage collector of the flow tables.
#[derive(Debug)]
pub struct Conntrack {
    datapath: Arc<Datapath>,
    metrics: ConntrackMetrics,
    cpus: u64,
    /// Statistics and settings: a panic of its holder leaves nothing that the next run needs.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    settings: config::Conntrack,
    interval: GcInterval,
    last: Option<LastRun>,
    /// When the last run that deleted began.
    last_deletion: Option<Instant>,
    totals: Totals,
    is_nearly_full: bool,
}

/// The previous run, which the next one compares with.
#[derive(Clone, Copy, Debug)]
struct LastRun {
    report: GcReport,
    at: Instant,
    is_deleting: bool,
    counters: FlowCounters,
}

/// Counters of flow entries at one moment: those of the programs, and that of deletions on request.
#[derive(Clone, Copy, Debug, Default)]
struct FlowCounters {
    created: u64,
    replaced: u64,
    insert_failures: u64,
    flushed: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    runs: u64,
    deleted_invalid: u64,
    deleted_expired: u64,
    evicted: u64,
}

impl Conntrack {
    /// Starts the collector, whose first run is at once.
    #[must_use]
    pub fn start(
        datapath: Arc<Datapath>,
        mut config: watch::Receiver<Arc<Config>>,
        metrics: ConntrackMetrics,
        time_scale: u32,
    ) -> Arc<Self> {
        let settings = config.borrow_and_update().conntrack;
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
        let interval = GcInterval::new(settings.gc_interval, settings.gc_max_interval);
        let state = State {
            settings,
            interval,
            last: None,
            last_deletion: None,
            totals: Totals::default(),
            is_nearly_full: false,
        };
        let this = Arc::new(Self { datapath, metrics, cpus, state: Mutex::new(state) });
        supervise::spawn_restarting("conntrack-gc", {
            let this = Arc::clone(&this);
            move || Arc::clone(&this).run_periodically(config.clone(), COUNT_INTERVAL / time_scale.max(1))
        });
        this
    }

    async fn run_periodically(self: Arc<Self>, mut config: watch::Receiver<Arc<Config>>, count_interval: Duration) {
        loop {
            let delete = self.deletion_is_due();
            let this = Arc::clone(&self);
            let report = match supervise::blocking(move || this.run(delete)).await {
                Ok(report) => Some(report),
                Err(error) => {
                    warn!(%error, "failed to read the flow tables; trying again");
                    None
                }
            };
            if !delete && report.is_some_and(|report| is_urgent(&report)) {
                self.state.lock().last_deletion = None;
                continue;
            }
            let next = self.time_to_deletion().map_or(count_interval, |due| due.min(count_interval));
            tokio::select! {
                () = tokio::time::sleep(next) => {}
                Ok(()) = config.changed() => {
                    let settings = config.borrow_and_update().conntrack;
                    let mut state = self.state.lock();
                    if settings != state.settings {
                        state.settings = settings;
                        state.interval.configure(settings.gc_interval, settings.gc_max_interval);
                        // New timeouts apply at once.
                        state.last_deletion = None;
                    }
                }
            }
        }
    }

    fn time_to_deletion(&self) -> Option<Duration> {
        let state = self.state.lock();
        state.last_deletion.map(|at| state.interval.interval().saturating_sub(at.elapsed()))
    }

    fn deletion_is_due(&self) -> bool {
        self.time_to_deletion().is_none_or(|left| left.is_zero())
    }

    fn read_counters(&self) -> Result<FlowCounters, BpfError> {
        let counters = self.datapath.counters().read()?;
        let of = |kind| counters.kind(kind).packets;
        Ok(FlowCounters {
            created: of(PathCounter::FlowNew),
            replaced: of(PathCounter::FlowStale),
            insert_failures: of(PathCounter::FlowInsertFailed),
            flushed: self.datapath.flows().flushed(),
        })
    }

    /// One run over both tables.
    fn run(&self, delete: bool) -> Result<GcReport, BpfError> {
        let (timeouts, last) = {
            let state = self.state.lock();
            (state.settings.timeouts, state.last)
        };
        let counters = self.read_counters()?;
        let options = GcOptions {
            timeouts,
            delete,
            recount_connections: self.datapath.services().uses_connection_counts(),
            previous_began: last.map(|last| last.report.began),
        };
        let at = Instant::now();
        let report = self.datapath.flows().collect_garbage(&options)?;
        let evicted = last.map_or(0, |last| evictions(&last, &report, &counters, self.cpus));
        let mut state = self.state.lock();
        if delete {
            let since = state.last_deletion.map_or(Duration::ZERO, |before| before.elapsed());
            if let Some(worst) = report.families.iter().max_by_key(|f| f.deleted() * 1000 / f.capacity.max(1)) {
                state.interval.passed(worst.deleted(), worst.capacity, since);
            }
            state.last_deletion = Some(at);
            state.totals.runs += 1;
        }
        for family in &report.families {
            state.totals.deleted_invalid += family.deleted_invalid;
            state.totals.deleted_expired += family.deleted_expired;
        }
        state.totals.evicted += evicted;
        self.metrics.observe_run(&report, delete, state.interval.interval());
        let failures_before = last.map_or(0, |last| last.counters.insert_failures);
        self.metrics.add_losses(evicted, counters.insert_failures.saturating_sub(failures_before));
        state.log_pressure(&report);
        state.last = Some(LastRun { report, at, is_deleting: delete, counters });
        drop(state);
        debug!(?report, delete, evicted, "flow tables");
        if report.took > SLOW_RUN {
            info!(took = ?report.took, "garbage collection of the flow tables is slow");
        }
        Ok(report)
    }

    /// The state of the collector, for the command line.
    #[must_use]
    pub fn view(&self) -> v1::FlowTracking {
        let state = self.state.lock();
        let Some(last) = &state.last else { return v1::FlowTracking::default() };
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let deleted = if last.is_deleting { last.report.families.iter().map(FamilyGcReport::deleted).sum() } else { 0 };
        let [v4, v6] = last.report.families.map(|family| pressure(&family));
        v1::FlowTracking {
            pressure_v4: v4,
            pressure_v6: v6,
            made: last.counters.created,
            refused: last.counters.insert_failures,
            lost: state.totals.evicted,
            interval_ms: milliseconds(state.interval.interval()),
            passes: state.totals.runs,
            last_ms_ago: milliseconds(last.at.elapsed()),
            last_took_us: u64::try_from(last.report.took.as_micros()).unwrap_or(u64::MAX),
            last_deleted: deleted,
            deleted_stale: state.totals.deleted_invalid,
            deleted_expired: state.totals.deleted_expired,
        }
    }
}

impl State {
    /// Logs once when a table becomes nearly full, and once when it no longer is.
    fn log_pressure(&mut self, report: &GcReport) {
        let fullest = report.families.iter().map(pressure).fold(0.0, f64::max);
        if !self.is_nearly_full && fullest >= NEARLY_FULL {
            warn!(
                fullest,
                "a flow table is nearly full: the kernel evicts the oldest flows for new ones; see docs/conntrack.md"
            );
            self.is_nearly_full = true;
        } else if self.is_nearly_full && fullest < NEARLY_FULL * 0.9 {
            info!(fullest, "the flow tables are no longer nearly full");
            self.is_nearly_full = false;
        }
    }
}

/// The used part of a table after a run, 0 to 1.
fn pressure(family: &FamilyGcReport) -> f64 {
    family.used.saturating_sub(family.deleted()) as f64 / family.capacity.max(1) as f64
}

/// Whether dead entries are to be deleted before the interval has passed.
fn is_urgent(report: &GcReport) -> bool {
    report.families.iter().any(|f| GcInterval::is_urgent(f.used, f.invalid + f.expired, f.capacity))
}

/// The estimate of entries that the kernel evicted between two runs.
fn evictions(last: &LastRun, report: &GcReport, counters: &FlowCounters, cpus: u64) -> u64 {
    let before = last.report.families.map(|family| GcPass {
        left: (family.old + family.new).saturating_sub(family.deleted()),
        capacity: family.capacity,
    });
    let since = EvictionInputs {
        made: counters.created.saturating_sub(last.counters.created),
        replaced: counters.replaced.saturating_sub(last.counters.replaced),
        flushed: counters.flushed.saturating_sub(last.counters.flushed),
        old: report.families.iter().map(|family| family.old).sum(),
        young: report.families.iter().map(|family| family.new).sum(),
    };
    estimate_evictions(&before, &since, cpus)
}
