//! The task that writes events (core/v1, which every server from 1.20 on takes and `kubectl describe` of every version shows).

use std::sync::Arc;
use std::time::SystemTime;

use serde_json::{Value, json};
use terway_core::kube_writes::{EventTarget, EventWrite, FIELD_MANAGER, Next, WriteOutcome};

use super::KubeWrites;
use super::api::Outcome;
use crate::actor::sleep_until;
use crate::objects::{ApiClient, PatchType};

impl KubeWrites {
    /// Writes what the recorder has, one object after the other, as long as the daemon runs.
    pub(super) async fn write_events(self: Arc<Self>, api: Arc<ApiClient>) {
        let mut pauses = self.pauses();
        loop {
            let next = self.recorder.lock().next(self.now());
            match next {
                Next::Idle => self.recorded.notified().await,
                Next::NotBefore(moment) => sleep_until(Some(self.instant(moment))).await,
                Next::Write(event) => {
                    let outcome = self.write_event(&api, &event).await;
                    let waiting = {
                        let mut recorder = self.recorder.lock();
                        recorder.written(&event, outcome);
                        recorder.waiting()
                    };
                    self.metrics.waiting(waiting);
                    if matches!(outcome, WriteOutcome::Failed | WriteOutcome::Refused) {
                        tokio::time::sleep(pauses.next().unwrap_or_default()).await;
                    } else {
                        pauses = self.pauses();
                    }
                }
            }
        }
    }

    async fn write_event(&self, api: &ApiClient, event: &EventWrite) -> WriteOutcome {
        let collection = format!("/api/v1/namespaces/{}/events", namespace(&event.target));
        let outcome = if event.is_new {
            self.write("event-create", api.create(&collection, &self.event(event))).await
        } else {
            let path = format!("{collection}/{}", event.name);
            self.write("event-update", api.patch(&path, PatchType::Merge, &update(event))).await
        };
        match (outcome, event.is_new) {
            (Outcome::Written, _) => WriteOutcome::Written,
            // Expired, or the name is taken.
            (Outcome::Missing, false) | (Outcome::Conflict, true) => WriteOutcome::Recreate,
            // The namespace is gone.
            (Outcome::Missing, true) => WriteOutcome::Obsolete,
            (Outcome::Conflict, false) | (Outcome::Refused, _) => WriteOutcome::Refused,
            (Outcome::Failed, _) => WriteOutcome::Failed,
        }
    }

    fn event(&self, event: &EventWrite) -> Value {
        let mut object = json!({ "kind": event.target.kind(), "name": event.target.name(), "apiVersion": "v1" });
        for (key, value) in [("namespace", event.target.namespace()), ("uid", Some(event.target.uid()))] {
            if let Some(value) = value.filter(|value| !value.is_empty()) {
                object[key] = value.into();
            }
        }
        json!({
            "apiVersion": "v1", "kind": "Event",
            "metadata": { "name": event.name, "namespace": namespace(&event.target) },
            "involvedObject": object,
            "reason": event.reason.as_str(),
            "type": event.reason.event_type().as_str(),
            "message": event.message,
            "count": event.count,
            "firstTimestamp": time(event.first),
            "lastTimestamp": time(event.last),
            "source": { "component": FIELD_MANAGER, "host": &*self.node },
        })
    }
}

fn update(event: &EventWrite) -> Value {
    json!({ "count": event.count, "message": event.message, "lastTimestamp": time(event.last) })
}

/// The namespace of an event. Those about cluster-scoped objects are in `default`.
fn namespace(target: &EventTarget) -> &str {
    target.namespace().unwrap_or("default")
}

/// A time as the API writes it: RFC 3339 in seconds.
pub(super) fn time(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}
