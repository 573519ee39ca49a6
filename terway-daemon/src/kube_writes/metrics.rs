//! Metrics of the writes to the API server. The values of all labels are constants of the code.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use terway_core::kube_writes::{Reason, Recorded};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WriteLabels {
    what: &'static str,
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EventLabels {
    reason: &'static str,
    result: &'static str,
}

/// Counters of writes and events.
#[derive(Clone, Debug)]
pub struct KubeWriteMetrics {
    writes: Family<WriteLabels, Counter>,
    events: Family<EventLabels, Counter>,
    waiting: Gauge,
}

impl KubeWriteMetrics {
    /// Makes them and registers them.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self { writes: Family::default(), events: Family::default(), waiting: Gauge::default() };
        registry.register(
            "terway_kube_writes",
            "Requests that write to the API server, by what they write and their result",
            metrics.writes.clone(),
        );
        registry.register(
            "terway_kube_events",
            "Kubernetes events, by reason and whether they are written or dropped",
            metrics.events.clone(),
        );
        registry.register(
            "terway_kube_events_waiting",
            "Event objects that wait for being written",
            metrics.waiting.clone(),
        );
        metrics
    }

    pub(super) fn write(&self, what: &'static str, result: &'static str) {
        self.writes.get_or_create(&WriteLabels { what, result }).inc();
    }

    pub(super) fn event(&self, reason: Reason, recorded: Recorded, waiting: usize) {
        let result = match recorded {
            Recorded::Waiting => "recorded",
            Recorded::RateLimited => "rate-limited",
            Recorded::Overflow => "overflow",
        };
        self.events.get_or_create(&EventLabels { reason: reason.as_str(), result }).inc();
        self.waiting(waiting);
    }

    pub(super) fn waiting(&self, waiting: usize) {
        self.waiting.set(i64::try_from(waiting).unwrap_or(i64::MAX));
    }
}
