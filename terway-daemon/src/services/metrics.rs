//! Metrics of the Service actor.

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

/// Metrics of the Service actor.
#[derive(Clone, Debug)]
pub struct ServiceMetrics {
    entries: Family<KindLabels, Gauge>,
    syncs: Histogram,
    problems: Gauge,
    unapplied: Gauge,
    socket_programs: Gauge,
    sockets_destroyed: Family<DestroyedLabels, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DestroyedLabels {
    protocol: &'static str,
    /// `destroyed`, or why not: `gone`, `unsupported`, `failed`.
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
            unapplied: Gauge::default(),
            socket_programs: Gauge::default(),
            sockets_destroyed: Family::default(),
        };
        registry.register("terway_services", "Entries of the Service maps", metrics.entries.clone());
        registry.register_with_unit(
            "terway_service_sync",
            "Time from the arrival of changed objects until the maps are written",
            Unit::Seconds,
            metrics.syncs.clone(),
        );
        registry.register(
            "terway_service_problems",
            "Services and host ports that are not served as their objects ask for",
            metrics.problems.clone(),
        );
        registry.register(
            "terway_service_unapplied_objects",
            "Services and host ports with map entries that the kernel refused; retried with back-off",
            metrics.unapplied.clone(),
        );
        registry.register(
            "terway_socket_programs",
            "Attached programs that resolve Services at the socket; with 0 Services are resolved by packets only",
            metrics.socket_programs.clone(),
        );
        registry.register(
            "terway_sockets_destroyed",
            "Sockets whose backend was removed, by outcome",
            metrics.sockets_destroyed.clone(),
        );
        metrics
    }

    /// Sets how many programs are attached to sockets.
    pub(super) fn socket_programs(&self, count: usize) {
        self.socket_programs.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Counts sockets whose backend was removed.
    pub(super) fn sockets_destroyed(&self, protocol: u8, outcome: &'static str, count: u64) {
        let protocol = if protocol == libc::IPPROTO_UDP as u8 { "udp" } else { "tcp" };
        self.sockets_destroyed.get_or_create(&DestroyedLabels { protocol, outcome }).inc_by(count);
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

    /// Sets how many objects have refused map entries.
    pub(super) fn unapplied(&self, count: usize) {
        self.unapplied.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Sets how many problems there are.
    pub(super) fn problems(&self, count: usize) {
        self.problems.set(i64::try_from(count).unwrap_or(i64::MAX));
    }
}
