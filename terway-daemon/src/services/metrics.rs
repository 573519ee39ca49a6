//! What is counted about Services.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabels {
    kind: &'static str,
}

/// Numbers of Services.
#[derive(Clone, Debug)]
pub struct ServiceMetrics {
    entries: Family<KindLabels, Gauge>,
    syncs: Histogram,
    problems: Gauge,
    socket_programs: Gauge,
    sockets_ended: Family<EndedLabels, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndedLabels {
    protocol: &'static str,
    /// `ended`, or why not: `gone`, `unsupported`, `failed`.
    outcome: &'static str,
}

impl ServiceMetrics {
    /// Makes them and registers them.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            entries: Family::default(),
            // A changed endpoint takes a part of a millisecond, the first sync of a large cluster a second or two.
            syncs: Histogram::new([
                0.000_1, 0.000_25, 0.000_5, 0.001, 0.002, 0.005, 0.02, 0.1, 0.5, 1.0, 2.0, 5.0, 20.0,
            ]),
            problems: Gauge::default(),
            socket_programs: Gauge::default(),
            sockets_ended: Family::default(),
        };
        registry.register("terway_services", "What the datapath's maps hold of Services", metrics.entries.clone());
        registry.register_with_unit(
            "terway_service_sync",
            "Time from the arrival of changed objects until the maps held what follows from them",
            Unit::Seconds,
            metrics.syncs.clone(),
        );
        registry.register(
            "terway_service_problems",
            "Services and host ports that are not served as their objects ask for",
            metrics.problems.clone(),
        );
        registry.register(
            "terway_socket_programs",
            "Programs that resolve Services at the socket, as far as they are attached; 0 leaves them to the packets' path",
            metrics.socket_programs.clone(),
        );
        registry.register(
            "terway_sockets_ended",
            "Sockets that had a Service's backend which is gone, by what became of them",
            metrics.sockets_ended.clone(),
        );
        metrics
    }

    /// Sets how many programs are attached to sockets.
    pub(super) fn socket_programs(&self, count: usize) {
        self.socket_programs.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Counts sockets whose backend is gone.
    pub(super) fn sockets_ended(&self, protocol: u8, outcome: &'static str, count: u64) {
        let protocol = if protocol == libc::IPPROTO_UDP as u8 { "udp" } else { "tcp" };
        self.sockets_ended.get_or_create(&EndedLabels { protocol, outcome }).inc_by(count);
    }

    /// Sets how many frontends and backends the maps hold.
    pub(super) fn entries(&self, frontends: usize, backends: usize) {
        for (kind, count) in [("frontends", frontends), ("backends", backends)] {
            self.entries.get_or_create(&KindLabels { kind }).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// Records one plan that was carried out.
    pub(super) fn synced(&self, took: Duration) {
        self.syncs.observe(took.as_secs_f64());
    }

    /// Sets how many problems there are.
    pub(super) fn problems(&self, count: usize) {
        self.problems.set(i64::try_from(count).unwrap_or(i64::MAX));
    }
}
