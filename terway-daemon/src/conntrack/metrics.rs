//! Metrics of the flow tables.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use super::pressure;
use crate::bpf::GcReport;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FamilyLabels {
    family: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

/// Metrics of the flow tables and of their garbage collection.
#[derive(Clone, Debug)]
pub struct ConntrackMetrics {
    entries: Family<FamilyLabels, Gauge>,
    capacity: Family<FamilyLabels, Gauge>,
    pressure: Family<FamilyLabels, Gauge<f64, AtomicU64>>,
    deleted: Family<ReasonLabels, Counter>,
    evicted: Counter,
    insert_failures: Counter,
    duration: Histogram,
    interval: Gauge<f64, AtomicU64>,
}

impl ConntrackMetrics {
    /// Creates and registers the metrics.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            entries: Family::default(),
            capacity: Family::default(),
            pressure: Family::default(),
            deleted: Family::default(),
            evicted: Counter::default(),
            insert_failures: Counter::default(),
            duration: Histogram::new([0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 30.0]),
            interval: Gauge::default(),
        };
        registry.register("terway_ct_entries", "Entries of the flow table at the last count", metrics.entries.clone());
        registry.register("terway_ct_capacity", "Capacity of the flow table in entries", metrics.capacity.clone());
        registry.register("terway_ct_pressure", "Used part of the flow table, 0 to 1", metrics.pressure.clone());
        registry.register(
            "terway_ct_deleted",
            "Entries that garbage collection deleted, by reason",
            metrics.deleted.clone(),
        );
        registry.register(
            "terway_ct_evicted",
            "Estimate of entries that the kernel evicted from a full table",
            metrics.evicted.clone(),
        );
        registry.register(
            "terway_ct_insert_failures",
            "Connections whose entry the kernel refused to insert; their packets were forwarded",
            metrics.insert_failures.clone(),
        );
        registry.register_with_unit(
            "terway_ct_gc_duration",
            "Duration of garbage collections that delete entries",
            Unit::Seconds,
            metrics.duration.clone(),
        );
        registry.register_with_unit(
            "terway_ct_gc_interval",
            "Interval of garbage collections that delete entries",
            Unit::Seconds,
            metrics.interval.clone(),
        );
        metrics
    }

    /// Records a run.
    pub(super) fn observe_run(&self, report: &GcReport, is_deleting: bool, interval: Duration) {
        let whole = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        for (family, report) in ["ipv4", "ipv6"].into_iter().zip(&report.families) {
            let labels = FamilyLabels { family };
            self.entries.get_or_create(&labels).set(whole(report.used.saturating_sub(report.deleted())));
            self.capacity.get_or_create(&labels).set(whole(report.capacity));
            self.pressure.get_or_create(&labels).set(pressure(report));
            self.deleted.get_or_create(&ReasonLabels { reason: "stale" }).inc_by(report.deleted_invalid);
            self.deleted.get_or_create(&ReasonLabels { reason: "expired" }).inc_by(report.deleted_expired);
        }
        self.interval.set(interval.as_secs_f64());
        if is_deleting {
            self.duration.observe(report.took.as_secs_f64());
        }
    }

    /// Counts evicted entries, and entries that could not be inserted.
    pub(super) fn add_losses(&self, evicted: u64, insert_failures: u64) {
        self.evicted.inc_by(evicted);
        self.insert_failures.inc_by(insert_failures);
    }
}
