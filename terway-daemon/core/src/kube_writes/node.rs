//! What is written to the node's own Node object, and what is wrong with it.

use super::supply::AddressSupply;
use crate::errors::{self, Error};
use crate::objects::{Node, NodeCondition, Taint};

/// The annotation with the number of addresses that the node can have at most, primary ENI not counted.
pub const MAX_AVAILABLE_IP: &str = "k8s.aliyun.com/max-available-ip";

/// What of it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSettings {
    /// The condition `SufficientIP` and the annotation [`MAX_AVAILABLE_IP`].
    pub has_status: bool,
    /// Whether the condition `NetworkUnavailable` is set to False when it is True.
    pub clears_network_unavailable: bool,
    /// Key of the taint that keeps pods away until the node is ready.
    pub startup_taint: Option<String>,
}

/// The state of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeFacts {
    /// The supply of addresses.
    pub supply: AddressSupply,
    /// Addresses that the node can have at most (pairs with dual stack).
    pub capacity: u32,
    /// Whether pods can start.
    pub is_ready: bool,
}

/// A write to the Node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum NodeWrite {
    /// Sets a condition in `status.conditions`.
    Condition {
        /// The condition.
        condition: NodeCondition,
        /// Whether its status changes, so that the time of the transition does.
        is_transition: bool,
    },
    /// Sets an annotation.
    Annotation {
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
    },
    /// Removes one taint.
    RemoveTaint {
        /// Its index in `spec.taints`.
        index: usize,
        /// The taint that is expected there.
        taint: Taint,
    },
}

impl NodeWrite {
    /// What is written, for metrics and messages.
    #[must_use]
    pub const fn what(&self) -> &'static str {
        match self {
            Self::Condition { .. } => "node-condition",
            Self::Annotation { .. } => "node-annotation",
            Self::RemoveTaint { .. } => "node-taint",
        }
    }
}

/// The condition as it should be.
fn sufficient_ip(supply: &AddressSupply) -> NodeCondition {
    let (status, reason) = match supply {
        AddressSupply::Sufficient => ("True", "SufficientIP"),
        AddressSupply::Insufficient(_) => ("False", "InsufficientIP"),
    };
    NodeCondition {
        kind: NodeCondition::SUFFICIENT_IP.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message: supply.message().to_owned(),
    }
}

/// The condition `NetworkUnavailable`, if it keeps pods away.
#[must_use]
pub fn network_unavailable(node: &Node) -> Option<&NodeCondition> {
    node.condition(NodeCondition::NETWORK_UNAVAILABLE).filter(|condition| condition.status == "True")
}

/// The writes that make the Node as it should be; none if it is.
#[must_use]
pub fn node_writes(node: &Node, facts: &NodeFacts, settings: &NodeSettings) -> Vec<NodeWrite> {
    let mut writes = Vec::new();
    let mut set = |desired: NodeCondition| {
        let present = node.condition(&desired.kind);
        if present != Some(&desired) {
            let is_transition = present.is_none_or(|present| present.status != desired.status);
            writes.push(NodeWrite::Condition { condition: desired, is_transition });
        }
    };
    if settings.has_status {
        set(sufficient_ip(&facts.supply));
    }
    if settings.clears_network_unavailable && facts.is_ready && network_unavailable(node).is_some() {
        set(NodeCondition {
            kind: NodeCondition::NETWORK_UNAVAILABLE.to_owned(),
            status: "False".to_owned(),
            reason: "TerwayIsUp".to_owned(),
            message: "terway is running on this node".to_owned(),
        });
    }
    if settings.has_status {
        let value = facts.capacity.to_string();
        if node.meta.annotations.get(MAX_AVAILABLE_IP) != Some(&value) {
            writes.push(NodeWrite::Annotation { key: MAX_AVAILABLE_IP, value });
        }
    }
    if let Some(key) = settings.startup_taint.as_deref().filter(|_| facts.is_ready) {
        // One at a time: removing one moves those behind it.
        let found = node.taints.iter().enumerate().find(|(_, taint)| taint.key == key);
        writes.extend(found.map(|(index, taint)| NodeWrite::RemoveTaint { index, taint: taint.clone() }));
    }
    writes
}

/// What is wrong with the Node.
///
/// `host_network_pods` are its pods in the host network, which need no address. The message does not name their number, because it changes.
#[must_use]
pub fn node_problems(node: &Node, capacity: u32, host_network_pods: usize) -> Vec<Error> {
    let mut problems = Vec::new();
    if let Some(condition) = network_unavailable(node) {
        let detail = format!("{}: {}", condition.reason, condition.message);
        problems.push(Error::new(errors::NETWORK_UNAVAILABLE, detail));
    }
    let without_address = u32::try_from(host_network_pods).unwrap_or(u32::MAX);
    if let Some(max_pods) = node.max_pods
        && max_pods > capacity.saturating_add(without_address)
    {
        let detail = format!("maxPods is {max_pods}, addresses are {capacity}.");
        problems.push(Error::new(errors::MAX_PODS, detail));
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(json: &serde_json::Value) -> Node {
        serde_json::from_str(&json.to_string()).unwrap()
    }

    fn condition(kind: &str, status: &str, reason: &str, message: &str) -> serde_json::Value {
        let heartbeat = "2026-01-01T00:00:00Z";
        serde_json::json!({
            "type": kind, "status": status, "reason": reason, "message": message, "lastHeartbeatTime": heartbeat,
        })
    }

    fn facts() -> NodeFacts {
        NodeFacts { supply: AddressSupply::Sufficient, capacity: 30, is_ready: true }
    }

    fn all() -> NodeSettings {
        NodeSettings {
            has_status: true,
            clears_network_unavailable: true,
            startup_taint: Some("terway/starting".into()),
        }
    }

    #[test]
    fn node_as_it_should_be_is_not_written() {
        let message = AddressSupply::Sufficient.message().to_owned();
        let node = node(&serde_json::json!({
            "metadata": { "name": "n1", "annotations": { "k8s.aliyun.com/max-available-ip": "30" } },
            "spec": { "taints": [{ "key": "other", "effect": "NoExecute" }] },
            "status": { "conditions": [
                condition("Ready", "True", "KubeletReady", ""),
                condition("SufficientIP", "True", "SufficientIP", &message),
                condition("NetworkUnavailable", "False", "RouteCreated", ""),
            ] },
        }));
        assert_eq!(node_writes(&node, &facts(), &all()), []);
        assert_eq!(node.conditions.len(), 2, "the others are not kept");
    }

    #[test]
    fn bare_node_gets_condition_and_annotation_and_loses_its_taint_when_it_is_ready() {
        let node = node(&serde_json::json!({
            "metadata": { "name": "n1" },
            "spec": { "taints": [
                { "key": "other", "effect": "NoSchedule" }, { "key": "terway/starting", "effect": "NoSchedule" },
            ] },
            "status": { "conditions": [condition("NetworkUnavailable", "True", "NoRouteCreated", "no route")] },
        }));
        let what = |facts: &NodeFacts, settings: &NodeSettings| {
            node_writes(&node, facts, settings).iter().map(NodeWrite::what).collect::<Vec<_>>()
        };
        let ready = ["node-condition", "node-condition", "node-annotation", "node-taint"];
        assert_eq!(what(&facts(), &all()), ready);
        assert_eq!(what(&NodeFacts { is_ready: false, ..facts() }, &all()), ["node-condition", "node-annotation"]);
        let none = NodeSettings { has_status: false, clears_network_unavailable: false, startup_taint: None };
        assert_eq!(what(&facts(), &none), [""; 0]);
        let taint = node_writes(&node, &facts(), &all()).pop();
        assert!(matches!(taint, Some(NodeWrite::RemoveTaint { index: 1, .. })), "{taint:?}");
    }

    #[test]
    fn message_changes_without_a_transition() {
        let node = node(&serde_json::json!({
            "metadata": { "name": "n1", "annotations": { "k8s.aliyun.com/max-available-ip": "30" } },
            "status": { "conditions": [condition("SufficientIP", "False", "InsufficientIP", "old")] },
        }));
        let short = NodeFacts { supply: AddressSupply::Insufficient("new".into()), ..facts() };
        let writes = node_writes(&node, &short, &all());
        assert!(matches!(&writes[..], [NodeWrite::Condition { is_transition: false, .. }]), "{writes:?}");
        assert!(matches!(
            &node_writes(&node, &facts(), &all())[..],
            [NodeWrite::Condition { is_transition: true, .. }]
        ));
    }

    #[test]
    fn max_pods_above_the_addresses_is_a_problem() {
        let of = |pods: serde_json::Value| {
            node(&serde_json::json!({ "metadata": { "name": "n1" }, "status": { "allocatable": { "pods": pods } } }))
        };
        let problem = |pods: serde_json::Value, host| node_problems(&of(pods), 30, host).len();
        assert_eq!(problem("31".into(), 0), 1);
        assert_eq!(problem("31".into(), 1), 0);
        assert_eq!(problem(serde_json::json!(31), 0), 1);
        assert_eq!(problem("30".into(), 0), 0);
        assert_eq!(problem("many".into(), 0), 0, "what cannot be read warns of nothing");
        assert_eq!(problem(serde_json::Value::Null, 0), 0);
    }
}
