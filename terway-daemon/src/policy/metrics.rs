//! What is counted about policies.

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

use super::ledger::{Ledger, word};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabels {
    kind: &'static str,
}

/// Numbers of policies.
#[derive(Clone, Debug)]
pub struct PolicyMetrics {
    entries: Family<KindLabels, Gauge>,
    held: Gauge,
    steps: Histogram,
    ledger: Arc<OnceLock<Arc<Ledger>>>,
}

/// What policies decided, read from the kernel at each scrape.
#[derive(Debug)]
struct Verdicts(Arc<OnceLock<Arc<Ledger>>>);

impl Collector for Verdicts {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let sums = self.0.get().map(|ledger| ledger.sums()).unwrap_or_default();
        let (name, help) = (
            "terway_policy_verdicts",
            "Connections that a network policy let begin, and packets that it had dropped, at pods of this node",
        );
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for ((policy, direction), verdicts) in &sums {
            let policy = policy.name.to_string();
            for (verdict, tally) in [("allowed", verdicts.allowed), ("denied", verdicts.denied)] {
                let labels = [("policy", policy.as_str()), ("direction", word(*direction)), ("verdict", verdict)];
                ConstCounter::new(tally.packets).encode(family.encode_family(&labels)?)?;
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
            held: Gauge::default(),
            // A new pod takes a part of a millisecond, two changes in a row a grace period, a large cluster's first compile some seconds.
            ledger: Arc::default(),
            steps: Histogram::new([0.000_1, 0.000_25, 0.000_5, 0.001, 0.002, 0.005, 0.02, 0.05, 0.1, 0.5, 2.0, 5.0]),
        };
        registry.register("terway_policy_entries", "What network policies are compiled to", metrics.entries.clone());
        registry.register(
            "terway_policy_held_pods",
            "Pods of this node that are held back because their labels are not known",
            metrics.held.clone(),
        );
        registry.register_with_unit(
            "terway_policy_step",
            "Time from the arrival of changed objects until the maps held what follows from them",
            Unit::Seconds,
            metrics.steps.clone(),
        );
        registry.register_collector(Box::new(Verdicts(Arc::clone(&metrics.ledger))));
        metrics
    }

    /// Says where counters of policies come from.
    pub(super) fn count_by(&self, ledger: &Arc<Ledger>) {
        // Policies are started once.
        let _ = self.ledger.set(Arc::clone(ledger));
    }

    /// Sets how much there is.
    pub(super) fn stats(&self, stats: &Stats, held: usize) {
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
        self.held.set(i64::try_from(held).unwrap_or(i64::MAX));
    }

    /// Records one step.
    pub(super) fn stepped(&self, took: Duration) {
        self.steps.observe(took.as_secs_f64());
    }
}
