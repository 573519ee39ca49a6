//! Metrics of the object feed.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use terway_core::objects::Kind;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabels {
    kind: &'static str,
}

/// Gauges and counters of the object feed.
#[derive(Clone, Debug)]
pub struct ObjectMetrics {
    objects: Family<KindLabels, Gauge>,
    synced: Family<KindLabels, Gauge>,
    problems: Gauge,
    restarts: Counter,
}

impl ObjectMetrics {
    /// Makes them and registers them.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            objects: Family::default(),
            synced: Family::default(),
            problems: Gauge::default(),
            restarts: Counter::default(),
        };
        registry.register("terway_objects", "Kubernetes objects in the daemon's store", metrics.objects.clone());
        registry.register(
            "terway_objects_synced",
            "1 once all objects of the kind were listed, else 0",
            metrics.synced.clone(),
        );
        registry.register(
            "terway_object_problems",
            "Objects, kinds and documents that the object source cannot read",
            metrics.problems.clone(),
        );
        registry.register(
            "terway_object_source_restarts",
            "Times that the object source failed and was started again",
            metrics.restarts.clone(),
        );
        metrics
    }

    pub(super) fn kind(&self, kind: Kind, count: usize, is_synced: bool) {
        let labels = KindLabels { kind: kind.name() };
        self.objects.get_or_create(&labels).set(i64::try_from(count).unwrap_or(i64::MAX));
        self.synced.get_or_create(&labels).set(i64::from(is_synced));
    }

    pub(super) fn problems(&self, count: usize) {
        self.problems.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    pub(super) fn restarted(&self) {
        self.restarts.inc();
    }
}
