//! A small script of what happens to the cloud: faults, and orders at their time.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use tracing::{error, info};

use super::Inner;
use super::admin_actions::AdminAction;
use super::faults::Fault;

/// A script. As a file it is JSON, such as
/// `{"faults": [{"action": "*", "probability": 0.2, "kind": "lose_reply"}],
///   "steps": [{"at_ms": 500, "do": [{"occupy": {"vswitch": "vsw-a", "leave": 0}}]},
///             {"when": {"action": "AttachNetworkInterface", "calls": 2}, "do": ["expire_keys"]}]}`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Scenario {
    /// Faults from the beginning.
    pub faults: Vec<Fault>,
    /// Steps; each is taken once.
    pub steps: Vec<Step>,
}

/// What happens when.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// Milliseconds after the beginning, or after `when`.
    #[serde(default)]
    pub at_ms: u64,
    /// What it waits for.
    #[serde(default)]
    pub when: Option<Trigger>,
    /// What is done, in this order.
    #[serde(rename = "do")]
    pub orders: Vec<AdminAction>,
}

/// A number of calls.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trigger {
    /// Of this action, or of `metadata`.
    pub action: String,
    /// As many answered since the scenario began, failed ones included.
    pub calls: u64,
}

impl Scenario {
    /// Reads a file.
    ///
    /// # Errors
    /// When there is no such file or it is no scenario.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is no scenario", path.display()))
    }
}

/// The scenario that runs.
#[derive(Default)]
pub(super) struct RunningScenario {
    /// Counts scenarios: a timer of an earlier one is void.
    run: u64,
    waiting: Vec<Step>,
    calls: BTreeMap<String, u64>,
    /// Steps not yet taken.
    open: usize,
}

/// Begins a scenario in place of the present one.
pub(super) fn begin(inner: &Arc<Inner>, scenario: Scenario) {
    inner.faults.lock().set(scenario.faults);
    let (now, later): (Vec<Step>, Vec<Step>) = scenario.steps.into_iter().partition(|step| step.when.is_none());
    let run = {
        let mut stage = inner.stage.lock();
        *stage = RunningScenario {
            run: stage.run + 1,
            open: now.len() + later.len(),
            waiting: later,
            calls: BTreeMap::new(),
        };
        stage.run
    };
    for step in now {
        start(inner, run, step);
    }
}

/// Steps of the present scenario that are still to come.
pub(super) fn open(inner: &Inner) -> usize {
    inner.stage.lock().open
}

/// Takes the steps that waited for this call.
pub(super) fn called(inner: &Arc<Inner>, action: &str) {
    let (run, due) = {
        let mut stage = inner.stage.lock();
        if stage.waiting.is_empty() {
            return;
        }
        let calls = stage.calls.entry(action.to_owned()).or_default();
        *calls += 1;
        let calls = *calls;
        let is_due =
            |step: &mut Step| step.when.as_ref().is_some_and(|when| when.action == action && when.calls == calls);
        (stage.run, stage.waiting.extract_if(.., is_due).collect::<Vec<_>>())
    };
    for step in due {
        start(inner, run, step);
    }
}

fn start(inner: &Arc<Inner>, run: u64, step: Step) {
    if step.at_ms == 0 {
        return take(inner, run, step);
    }
    let inner = Arc::clone(inner);
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(step.at_ms)).await;
        take(&inner, run, step);
    });
}

fn take(inner: &Arc<Inner>, run: u64, step: Step) {
    if inner.stage.lock().run != run {
        return;
    }
    for order in step.orders {
        info!(?order, "scenario");
        if let Err(error) = inner.apply_action(order) {
            error!(error = format!("{error:#}"), "a step of the scenario failed");
        }
    }
    inner.stage.lock().open -= 1;
}

#[cfg(test)]
mod tests {
    use super::super::faults::FaultKind;
    use super::*;

    #[test]
    fn the_documented_example_is_one() {
        let text = r#"{"faults": [{"action": "*", "probability": 0.2, "kind": "lose_reply"}],
            "steps": [{"at_ms": 500, "do": [{"occupy": {"vswitch": "vsw-a", "leave": 0}}]},
                      {"when": {"action": "AttachNetworkInterface", "calls": 2}, "do": ["expire_keys"]}]}"#;
        let scenario: Scenario = serde_json::from_str(text).unwrap();
        assert_eq!(scenario.faults[0].kind, FaultKind::LoseReply);
        assert_eq!(scenario.steps[0].orders, [AdminAction::Occupy { vswitch: "vsw-a".into(), leave: 0 }]);
        assert_eq!(scenario.steps[1].orders, [AdminAction::ExpireKeys]);
        for bad in [r#"{"steps": [{"at": 1, "do": []}]}"#, r#"{"steps": [{"do": ["nonsense"]}]}"#, "3"] {
            assert!(serde_json::from_str::<Scenario>(bad).is_err(), "{bad}");
        }
    }
}
