//! The task that keeps the own Node as it should be.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use terway_core::errors;
use terway_core::kube_writes::{
    AddressSupply, FIELD_MANAGER, NodeFacts, NodeWrite, Reason, SupplyMonitor, node_problems, node_writes,
};
use terway_core::objects::{Kind, ObjectName};

use super::api::Outcome;
use super::events::time;
use super::{DEBOUNCE, KubeWrites, NodeState};
use crate::actor::sleep_until;
use crate::objects::{ApiClient, PatchType};

/// The time for which addresses are there before a shortage is over: that for which a released address is not used again.
const SHORTAGE_HOLD: Duration = Duration::from_secs(30);

impl KubeWrites {
    /// Compares the Node with what it should be, at every change of either, as long as the daemon runs.
    pub(super) async fn write_node(self: Arc<Self>, api: Arc<ApiClient>, state: Arc<dyn NodeState>) {
        let (mut pool, mut objects) = (state.changed(), self.delivered.subscribe());
        let mut monitor = SupplyMonitor::new(self.scaled(SHORTAGE_HOLD));
        let mut told = AddressSupply::Sufficient;
        let mut limiter = self.limiter::<NodeWrite>();
        let mut pauses = self.pauses();
        loop {
            pool.borrow_and_update();
            objects.borrow_and_update();
            let (stats, problems) = state.pool();
            let (supply, mut due) = monitor.observe(&stats, &problems, self.now());
            if std::mem::discriminant(&supply) != std::mem::discriminant(&told) {
                self.tell_supply(&supply);
                told.clone_from(&supply);
            }
            let facts = NodeFacts { supply, capacity: stats.capacity, is_ready: state.is_ready() };
            // A taint is not ready to go while the pool is not: looked at again with the pool's next change.
            for write in self.examine_node(&facts) {
                if let Err(moment) = limiter.check(&write, self.now()) {
                    due = Some(due.map_or(moment, |due| due.min(moment)));
                    continue;
                }
                match self.write_to_node(&api, &write).await {
                    Outcome::Written => {
                        if let NodeWrite::RemoveTaint { taint, .. } = &write {
                            self.record_on_node(Reason::TaintRemoved, format!("removed the taint {}", taint.key));
                        }
                        limiter.written(write, self.now());
                        pauses = self.pauses();
                    }
                    // The feed shows in a moment what has changed.
                    Outcome::Missing | Outcome::Conflict => limiter.written(write, self.now()),
                    Outcome::Refused | Outcome::Failed => {
                        // Not sooner, whatever changes meanwhile.
                        tokio::time::sleep(pauses.next().unwrap_or_default()).await;
                        due = Some(self.now());
                        break;
                    }
                }
            }
            tokio::select! {
                changed = pool.changed() => if changed.is_err() { return },
                changed = objects.changed() => if changed.is_err() { return },
                () = sleep_until(due.map(|moment| self.instant(moment))) => {}
            }
            tokio::time::sleep(self.scaled(DEBOUNCE)).await;
        }
    }

    fn tell_supply(&self, supply: &AddressSupply) {
        match supply {
            AddressSupply::Sufficient => self.record_on_node(Reason::SufficientIp, supply.message()),
            AddressSupply::Insufficient(message) => self.record_on_node(Reason::AllocIpFailed, message.as_str()),
        }
    }

    /// The writes that the Node needs; notes and tells what is wrong with it.
    fn examine_node(&self, facts: &NodeFacts) -> Vec<NodeWrite> {
        let objects = self.objects.read();
        let Some(node) = objects.nodes().get(&ObjectName::new("", &self.node)) else { return Vec::new() };
        // Before the pods are listed it is not known how many of them need no address.
        let capacity = if objects.has_synced(&[Kind::Pod]) { facts.capacity } else { u32::MAX };
        let on_this_node = objects.pods().values().filter(|pod| pod.node.as_deref() == Some(&*self.node));
        let host_network = on_this_node.filter(|pod| pod.host_network).count();
        let problems = node_problems(node, capacity, host_network);
        let writes = node_writes(node, facts, &self.settings);
        drop(objects);
        let before = std::mem::replace(&mut *self.node_problems.lock(), problems.clone());
        for problem in problems.iter().filter(|problem| !before.contains(problem)) {
            let reason = match problem.code {
                errors::NETWORK_UNAVAILABLE => Reason::NetworkUnavailable,
                _ => Reason::MaxPodsExceedCapacity,
            };
            self.record_on_node(reason, format!("{problem} {}", problem.code.remedy));
        }
        writes
    }

    async fn write_to_node(&self, api: &ApiClient, write: &NodeWrite) -> Outcome {
        let path = format!("/api/v1/nodes/{}", self.node);
        let manager = format!("?fieldManager={FIELD_MANAGER}");
        let (path, kind, patch) = match write {
            NodeWrite::Condition { condition, is_transition } => {
                let now = time(SystemTime::now());
                let mut entry = json!({
                    "type": condition.kind, "status": condition.status, "reason": condition.reason,
                    "message": condition.message, "lastHeartbeatTime": now,
                });
                if *is_transition {
                    entry["lastTransitionTime"] = now.into();
                }
                // Merged by type: conditions of others stay.
                let patch = json!({ "status": { "conditions": [entry] } });
                (format!("{path}/status{manager}"), PatchType::Strategic, patch)
            }
            NodeWrite::Annotation { key, value } => {
                (path + &manager, PatchType::Merge, json!({ "metadata": { "annotations": { *key: value } } }))
            }
            NodeWrite::RemoveTaint { index, taint } => {
                let at = format!("/spec/taints/{index}");
                let test =
                    |field: &str, value: &str| json!({ "op": "test", "path": format!("{at}/{field}"), "value": value });
                // Removed only if it still is what stands there.
                let patch: Value =
                    [test("key", &taint.key), test("effect", &taint.effect), json!({ "op": "remove", "path": at })]
                        .into_iter()
                        .collect();
                (path + &manager, PatchType::Json, patch)
            }
        };
        self.write(write.what(), api.patch(&path, kind, &patch)).await
    }
}
