//! Status of the configuration: the last edits and their result, for status and metrics.

use std::collections::VecDeque;
use std::time::SystemTime;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use terway_core::config::{ConfigOrigin, KeyChange, LiveConfig, Outcome, Warning};
use terway_core::errors::Error;

/// How many edits are remembered.
const REMEMBERED: usize = 16;

/// The state of the configuration.
#[derive(Clone, Debug)]
pub struct ConfigStatus {
    /// 1 at the start, one more with every edit that changes something.
    pub generation: u64,
    /// When the present one was taken.
    pub applied_at: SystemTime,
    /// Why the files as they are now are not taken; `None` if they are.
    pub failure: Option<Failure>,
    /// What waits for a restart.
    pub pending_restart: Vec<KeyChange>,
    /// The latest edits, the newest last. Displayed, they hold no secret.
    pub recent: VecDeque<Edit>,
    /// What the present configuration is warned of.
    pub warnings: Vec<Warning>,
}

/// A configuration that was not taken.
#[derive(Clone, Debug)]
pub struct Failure {
    /// When it was read.
    pub at: SystemTime,
    /// `unreadable` or `refused`.
    pub result: &'static str,
    /// Every refused value, without secrets.
    pub error: Error,
}

/// One edit that was taken.
#[derive(Clone, Debug)]
pub struct Edit {
    /// Its number.
    pub generation: u64,
    /// When it was taken.
    pub at: SystemTime,
    /// What it changed, and when each change takes effect.
    pub changed: Vec<KeyChange>,
}

impl ConfigStatus {
    pub(super) fn start(live: &LiveConfig, warnings: Vec<Warning>, failure: Option<Failure>) -> Self {
        Self {
            generation: live.generation(),
            applied_at: SystemTime::now(),
            failure,
            pending_restart: Vec::new(),
            recent: VecDeque::new(),
            warnings,
        }
    }

    /// What the cluster is told.
    pub(super) fn outcome(&self, origin: ConfigOrigin) -> Outcome {
        Outcome {
            origin,
            generation: self.generation,
            refusal: self.failure.as_ref().map(|failure| failure.error.clone()),
            warnings: self.warnings.clone(),
        }
    }

    pub(super) fn record_change(
        &mut self,
        live: &LiveConfig,
        changed: Vec<KeyChange>,
        warnings: Vec<Warning>,
        at: SystemTime,
    ) {
        self.failure = None;
        self.warnings = warnings;
        self.pending_restart = live.pending();
        if !changed.is_empty() {
            self.generation = live.generation();
            self.applied_at = at;
            if self.recent.len() == REMEMBERED {
                self.recent.pop_front();
            }
            self.recent.push_back(Edit { generation: self.generation, at, changed });
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    result: &'static str,
}

/// Counters of reloads.
#[derive(Clone, Debug, Default)]
pub struct ConfigMetrics {
    reloads: Family<ResultLabels, Counter>,
    successful: Gauge,
}

impl ConfigMetrics {
    /// Makes the counters and registers them.
    #[must_use]
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        // All results from the start, or the first failure would not show as an increase.
        for result in ["applied", "refused", "unreadable"] {
            let _zero = metrics.reloads.get_or_create(&ResultLabels { result });
        }
        registry.register("terway_config_reload", "Readings of a new configuration by result", metrics.reloads.clone());
        registry.register(
            "terway_config_last_reload_successful",
            "Whether the configuration as it is now was taken",
            metrics.successful.clone(),
        );
        metrics
    }

    pub(super) fn reloaded(&self, result: &'static str) {
        self.reloads.get_or_create(&ResultLabels { result }).inc();
        self.successful.set(i64::from(result == "applied"));
    }
}
