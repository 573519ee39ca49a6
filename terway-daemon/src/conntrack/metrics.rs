//! What is counted about the flow tables.

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

/// Numbers of the flow tables.
#[derive(Clone, Debug)]
pub struct ConntrackMetrics {
    entries: Family<FamilyLabels, Gauge>,
    capacity: Family<FamilyLabels, Gauge>,
    pressure: Family<FamilyLabels, Gauge<f64, AtomicU64>>,
    deleted: Family<ReasonLabels, Counter>,
    evicted: Counter,
    refused: Counter,
    passes: Histogram,
    interval: Gauge<f64, AtomicU64>,
}

impl ConntrackMetrics {
    /// Makes them and registers them.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            entries: Family::default(),
            capacity: Family::default(),
            pressure: Family::default(),
            deleted: Family::default(),
            evicted: Counter::default(),
            refused: Counter::default(),
            passes: Histogram::new([0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 30.0]),
            interval: Gauge::default(),
        };
        registry.register(
            "terway_ct_entries",
            "Entries of the flow table when it was last counted",
            metrics.entries.clone(),
        );
        registry.register("terway_ct_capacity", "Entries that the flow table can have", metrics.capacity.clone());
        registry.register(
            "terway_ct_pressure",
            "The part of the flow table that is in use, 0 to 1",
            metrics.pressure.clone(),
        );
        registry.register("terway_ct_deleted", "Entries that the daemon took away, by reason", metrics.deleted.clone());
        registry.register(
            "terway_ct_evicted",
            "Estimate of entries that the kernel took away because the table was full",
            metrics.evicted.clone(),
        );
        registry.register(
            "terway_ct_insert_failures",
            "Connections whose entry the kernel would not take; their packets went their way",
            metrics.refused.clone(),
        );
        registry.register_with_unit(
            "terway_ct_gc_duration",
            "Time of passes that delete dead entries",
            Unit::Seconds,
            metrics.passes.clone(),
        );
        registry.register_with_unit(
            "terway_ct_gc_interval",
            "Time from one such pass to the next",
            Unit::Seconds,
            metrics.interval.clone(),
        );
        metrics
    }

    /// Takes in a pass.
    pub(super) fn passed(&self, found: &GcReport, deleting: bool, interval: Duration) {
        let whole = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        for (family, found) in ["ipv4", "ipv6"].into_iter().zip(&found.families) {
            let labels = FamilyLabels { family };
            self.entries.get_or_create(&labels).set(whole(found.used.saturating_sub(found.deleted())));
            self.capacity.get_or_create(&labels).set(whole(found.capacity));
            self.pressure.get_or_create(&labels).set(pressure(found));
            self.deleted.get_or_create(&ReasonLabels { reason: "void" }).inc_by(found.deleted_invalid);
            self.deleted.get_or_create(&ReasonLabels { reason: "expired" }).inc_by(found.deleted_expired);
        }
        self.interval.set(interval.as_secs_f64());
        if deleting {
            self.passes.observe(found.took.as_secs_f64());
        }
    }

    /// Counts entries that are gone by the kernel's doing, and those that never came to be.
    pub(super) fn lost(&self, evicted: u64, refused: u64) {
        self.evicted.inc_by(evicted);
        self.refused.inc_by(refused);
    }
}
