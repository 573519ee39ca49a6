//! Metrics of the policy actor.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use terway_core::policy::Stats;

use super::counters::{PolicyCounters, direction_label};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabels {
    kind: &'static str,
}

/// Metrics of the policy actor.
#[derive(Clone, Debug)]
pub struct PolicyMetrics {
    entries: Family<KindLabels, Gauge>,
    quarantined: Gauge,
    unapplied: Gauge,
    locked: Gauge,
    steps: Histogram,
    counters: Arc<OnceLock<Arc<PolicyCounters>>>,
}

/// Collector of policy verdicts, read from the kernel at each scrape.
#[derive(Debug)]
struct VerdictCollector(Arc<OnceLock<Arc<PolicyCounters>>>);

impl Collector for VerdictCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let totals = self.0.get().map(|counters| counters.totals()).unwrap_or_default();
        let (name, help) = (
            "terway_policy_verdicts",
            "Connections that a network policy allowed, and packets that it denied, at pods of this node",
        );
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for ((policy, direction), verdicts) in &totals {
            let policy = policy.name.to_string();
            for (verdict, count) in [("allowed", verdicts.allowed), ("denied", verdicts.denied)] {
                let labels =
                    [("policy", policy.as_str()), ("direction", direction_label(*direction)), ("verdict", verdict)];
                ConstCounter::new(count.packets).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

impl PolicyMetrics {
    /// Makes them and registers them.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            entries: Family::default(),
            quarantined: Gauge::default(),
            unapplied: Gauge::default(),
            locked: Gauge::default(),
            // A new pod takes a part of a millisecond, two changes in a row a grace period, a large cluster's first compile some seconds.
            counters: Arc::default(),
            steps: Histogram::new([0.000_1, 0.000_25, 0.000_5, 0.001, 0.002, 0.005, 0.02, 0.05, 0.1, 0.5, 2.0, 5.0]),
        };
        registry.register(
            "terway_policy_entries",
            "Entries that network policies are compiled to",
            metrics.entries.clone(),
        );
        registry.register(
            "terway_policy_quarantined_pods",
            "Pods of this node in quarantine: denied until their labels are known",
            metrics.quarantined.clone(),
        );
        registry.register(
            "terway_policy_unapplied_objects",
            "Policies and pods with map entries that the kernel refused; retried with back-off",
            metrics.unapplied.clone(),
        );
        registry.register(
            "terway_policy_locked_pods",
            "Pods of this node in lockdown: denied until their policies are completely programmed",
            metrics.locked.clone(),
        );
        registry.register_with_unit(
            "terway_policy_step",
            "Time from the arrival of changed objects until the maps are written",
            Unit::Seconds,
            metrics.steps.clone(),
        );
        registry.register_collector(Box::new(VerdictCollector(Arc::clone(&metrics.counters))));
        metrics
    }

    /// Sets the counters that a scrape reads.
    pub(super) fn read_from(&self, counters: &Arc<PolicyCounters>) {
        // The actor is started once.
        let _ = self.counters.set(Arc::clone(counters));
    }

    /// Sets the gauges.
    pub(super) fn stats(&self, stats: &Stats, quarantined: usize) {
        let Stats { policies, pods, classes, identities, cidrs, sets, entries, port_tables, endpoints } = *stats;
        for (kind, count) in [
            ("policies", policies),
            ("pods", pods),
            ("classes", classes),
            ("identities", identities),
            ("cidrs", cidrs),
            ("sets", sets),
            ("set_entries", entries),
            ("port_tables", port_tables),
            ("endpoints", endpoints),
        ] {
            self.entries.get_or_create(&KindLabels { kind }).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        self.quarantined.set(i64::try_from(quarantined).unwrap_or(i64::MAX));
    }

    /// Sets how many objects have refused map entries, and how many pods are in lockdown.
    pub(super) fn unapplied(&self, objects: usize, locked: usize) {
        self.unapplied.set(i64::try_from(objects).unwrap_or(i64::MAX));
        self.locked.set(i64::try_from(locked).unwrap_or(i64::MAX));
    }

    /// Records one step.
    pub(super) fn stepped(&self, took: Duration) {
        self.steps.observe(took.as_secs_f64());
    }
}
