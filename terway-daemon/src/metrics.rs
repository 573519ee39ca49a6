//! Prometheus metrics of the daemon. Names follow the Prometheus rules: base units, `_total` for counters.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use std::sync::atomic::AtomicU64;

use terway_abi::{Drop, PathCounter};

use crate::bpf::Datapath;
use crate::supervise;

/// A step of an ADD or DEL that has a histogram of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Phase {
    /// From the request's arrival to the reply.
    Total,
    /// Waiting for addresses, including the cloud when the pool is empty.
    Addresses,
    /// Creating the pod's links, addresses and routes.
    Links,
    /// Attaching programs and writing map entries, or removing them.
    Datapath,
    /// Rules, routes and links of the node's side.
    Host,
}

/// The two verbs that change something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Verb {
    /// ADD.
    Add,
    /// DEL.
    Del,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabels {
    verb: Verb,
    phase: Phase,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RpcLabels {
    rpc_api: &'static str,
    /// Empty, or the name of the error in the catalogue.
    error: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    api: String,
    error: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabels {
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ActionLabels {
    action: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    state: &'static str,
}

/// All metrics of the daemon.
#[derive(Debug, Clone)]
pub struct Metrics {
    phases: Family<PhaseLabels, Histogram, fn() -> Histogram>,
    rpcs: Family<RpcLabels, Histogram, fn() -> Histogram>,
    calls: Family<CallLabels, Histogram, fn() -> Histogram>,
    addresses: Family<StateLabels, Gauge>,
    enis: Family<StateLabels, Gauge>,
    findings: Family<KindLabels, Gauge>,
    corrections: Family<ActionLabels, Counter>,
    start: Gauge<f64, AtomicU64>,
    spooled: Counter,
}

/// 0.25 ms to 4 s: a warm ADD sits in the lower third, a cold one in the upper.
fn fast() -> Histogram {
    Histogram::new([0.000_25, 0.000_5, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0, 4.0, 16.0])
}

/// 1 ms to a minute: calls that leave the node.
fn slow() -> Histogram {
    Histogram::new([0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0])
}

impl Metrics {
    /// Makes all metrics and registers them.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            phases: Family::new_with_constructor(fast),
            rpcs: Family::new_with_constructor(fast),
            calls: Family::new_with_constructor(slow),
            addresses: Family::default(),
            enis: Family::default(),
            findings: Family::default(),
            corrections: Family::default(),
            start: Gauge::default(),
            spooled: Counter::default(),
        };
        registry.register_with_unit(
            "terway_pod_phase",
            "Time of each phase of ADD and DEL",
            Unit::Seconds,
            metrics.phases.clone(),
        );
        registry.register_with_unit(
            "terway_rpc_latency",
            "Time of each gRPC call",
            Unit::Seconds,
            metrics.rpcs.clone(),
        );
        registry.register_with_unit(
            "aliyun_openapi_latency",
            "Time of each cloud API call by its error code",
            Unit::Seconds,
            metrics.calls.clone(),
        );
        registry.register("terway_pool_addresses", "Addresses of this node by state", metrics.addresses.clone());
        registry.register("terway_pool_enis", "ENIs of this node by state", metrics.enis.clone());
        registry.register(
            "terway_reconcile_findings",
            "Differences between store, kernel and datapath in the last audit",
            metrics.findings.clone(),
        );
        registry.register(
            "terway_reconcile_corrections",
            "Differences that audits corrected, by action",
            metrics.corrections.clone(),
        );
        registry.register_with_unit(
            "terway_start_duration",
            "Time from the daemon's start until it served",
            Unit::Seconds,
            metrics.start.clone(),
        );
        registry.register("terway_queued_dels", "DELs carried out from the plugin's queue", metrics.spooled.clone());
        supervise::register_metrics(registry);
        metrics
    }

    /// Records one phase.
    pub fn phase(&self, verb: Verb, phase: Phase, took: Duration) {
        self.phases.get_or_create(&PhaseLabels { verb, phase }).observe(took.as_secs_f64());
    }

    /// Records one gRPC call; `error` is a catalogue name or empty.
    pub fn rpc(&self, rpc_api: &'static str, error: &'static str, took: Duration) {
        self.rpcs.get_or_create(&RpcLabels { rpc_api, error }).observe(took.as_secs_f64());
    }

    /// Records one cloud call; `error` is the cloud's code or empty.
    pub fn cloud_call(&self, api: &str, error: &str, took: Duration) {
        let labels = CallLabels { api: api.to_owned(), error: error.to_owned() };
        self.calls.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// Sets how many addresses are in `state`.
    pub fn addresses(&self, state: &'static str, count: u32) {
        self.addresses.get_or_create(&StateLabels { state }).set(i64::from(count));
    }

    /// Sets how many ENIs are in `state`.
    pub fn enis(&self, state: &'static str, count: u32) {
        self.enis.get_or_create(&StateLabels { state }).set(i64::from(count));
    }

    /// Sets how many findings of `kind` the last audit had.
    pub fn findings(&self, kind: &'static str, count: usize) {
        self.findings.get_or_create(&KindLabels { kind }).set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Counts something that an audit has set right.
    pub fn corrected(&self, action: &'static str) {
        self.corrections.get_or_create(&ActionLabels { action }).inc();
    }

    /// Records how long the start took.
    pub fn started(&self, took: Duration) {
        self.start.set(took.as_secs_f64());
    }

    /// Counts a DEL carried out from the plugin's queue.
    pub fn spooled_del(&self) {
        self.spooled.inc();
    }
}

/// A registry with the metrics in it.
#[must_use]
pub fn new_registry() -> (Registry, Metrics) {
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    (registry, metrics)
}

/// Adds the datapath's counters; they are read from the kernel at each scrape.
pub fn register_datapath(registry: &mut Registry, datapath: &Arc<Datapath>) {
    registry.register_collector(Box::new(DatapathCounters(Arc::clone(datapath))));
}

#[derive(Debug)]
struct DatapathCounters(Arc<Datapath>);

impl Collector for DatapathCounters {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        // A scrape without the datapath's part is better than no scrape.
        let Ok(counters) = self.0.counters().read() else { return Ok(()) };
        let drops: Vec<_> = Drop::ALL.iter().map(|reason| (reason.name(), counters.drop(*reason))).collect();
        let ways: Vec<_> = PathCounter::ALL.iter().map(|kind| (kind.name(), counters.kind(*kind))).collect();
        for (name, help, label, rows) in [
            ("terway_drop", "dropped by the datapath", "reason", &drops),
            ("terway_forward", "forwarded by the datapath", "path", &ways),
        ] {
            for (unit, what) in [("packets", "Packets"), ("bytes", "Bytes")] {
                let (name, help) = (format!("{name}_{unit}"), format!("{what} {help}"));
                let mut family = encoder.encode_descriptor(&name, &help, None, MetricType::Counter)?;
                for (value, counter) in rows {
                    let count = if unit == "packets" { counter.packets } else { counter.bytes };
                    ConstCounter::new(count).encode(family.encode_family(&[(label, *value)])?)?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_labels_are_as_documented() {
        let (registry, metrics) = new_registry();
        metrics.phase(Verb::Add, Phase::Links, Duration::from_millis(1));
        metrics.rpc("AddPod", "", Duration::from_millis(2));
        metrics.cloud_call("AssignPrivateIpAddresses", "Throttling", Duration::from_millis(300));
        metrics.addresses("idle", 7);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            r#"terway_pod_phase_seconds_count{verb="Add",phase="Links"} 1"#,
            r#"terway_rpc_latency_seconds_count{rpc_api="AddPod",error=""} 1"#,
            r#"aliyun_openapi_latency_seconds_count{api="AssignPrivateIpAddresses",error="Throttling"} 1"#,
            r#"terway_pool_addresses{state="idle"} 7"#,
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }
}
