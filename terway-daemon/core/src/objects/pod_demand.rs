//! The demand for the pods of other nodes: the objects that cannot be applied without them.
//!
//! A node always knows its own pods. It needs those of the whole cluster for policies that select peers by labels, or receivers by the names of their ports,
//! and for Services whose backends are chosen by the weights of pods.

use std::collections::BTreeSet;

use super::{
    Change, ClusterEgressPeer, ClusterIngressPeer, ClusterNetworkPolicy, ClusterProtocol, ClusterRule, IntOrString,
    NetworkPolicy, Object, ObjectKey, Peer, PolicyRule,
};
use crate::service::ALGORITHM;

/// The objects that need the pods of other nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodDemand {
    objects: BTreeSet<ObjectKey>,
}

impl PodDemand {
    /// Takes one change of an object into account.
    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::Upsert(object) if needs_all_pods(object) => drop(self.objects.insert(object.key())),
            Change::Upsert(object) => drop(self.objects.remove(&object.key())),
            Change::Delete(key) => drop(self.objects.remove(key)),
        }
    }

    /// Whether some object needs the pods of other nodes.
    #[must_use]
    pub fn needs_all(&self) -> bool {
        !self.objects.is_empty()
    }

    /// Removes the objects of which a complete list says that they are gone.
    pub fn retain(&mut self, keep: impl FnMut(&ObjectKey) -> bool) {
        self.objects.retain(keep);
    }
}

/// Whether an object cannot be applied without the pods of other nodes.
#[must_use]
pub fn needs_all_pods(object: &Object) -> bool {
    match object {
        Object::NetworkPolicy(policy) => network_policy(policy),
        Object::ClusterNetworkPolicy(policy) => cluster_network_policy(policy),
        Object::Service(service) => service.meta.annotations.get(ALGORITHM).is_some(),
        Object::Node(_) | Object::Namespace(_) | Object::Pod(_) | Object::EndpointSlice(_) => false,
    }
}

fn network_policy(policy: &NetworkPolicy) -> bool {
    let selects = |peer: &Peer| peer.pod_selector.is_some() || peer.namespace_selector.is_some();
    let by_peer = |rule: &PolicyRule| rule.peers.iter().any(selects);
    // A named port is the receiver's: of a pod of this node for ingress, of any pod for egress.
    let by_name = |rule: &PolicyRule| rule.ports.iter().any(|port| matches!(port.port, Some(IntOrString::Name(_))));
    policy.ingress.iter().any(by_peer) || policy.egress.iter().any(|rule| by_peer(rule) || by_name(rule))
}

fn cluster_network_policy(policy: &ClusterNetworkPolicy) -> bool {
    let by_name = |rule: &ClusterRule<ClusterEgressPeer>| {
        rule.protocols.iter().any(|protocol| matches!(protocol, ClusterProtocol::NamedPort(_)))
    };
    let from_pods =
        |peer: &ClusterIngressPeer| matches!(peer, ClusterIngressPeer::Namespaces(_) | ClusterIngressPeer::Pods(_));
    let to_pods =
        |peer: &ClusterEgressPeer| matches!(peer, ClusterEgressPeer::Namespaces(_) | ClusterEgressPeer::Pods(_));
    policy.ingress.iter().any(|rule| rule.peers.iter().any(from_pods))
        || policy.egress.iter().any(|rule| by_name(rule) || rule.peers.iter().any(to_pods))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::Kind;
    use super::*;

    fn policy(spec: Value) -> Object {
        let text = json!({ "metadata": { "name": "p", "namespace": "n" }, "spec": spec });
        Object::read(Kind::NetworkPolicy, text).unwrap()
    }

    #[test]
    fn policies_that_select_peers_or_name_egress_ports_need_all_pods() {
        for (spec, needed) in [
            (json!({ "podSelector": {} }), false),
            (json!({ "podSelector": {}, "ingress": [{}], "egress": [{ "ports": [{ "port": 53 }] }] }), false),
            (json!({ "podSelector": {}, "ingress": [{ "from": [{ "ipBlock": { "cidr": "10.0.0.0/8" } }] }] }), false),
            (json!({ "podSelector": {}, "ingress": [{ "ports": [{ "port": "http" }] }] }), false),
            (
                json!({ "podSelector": {}, "policyTypes": ["Egress"], "egress": [{ "ports": [{ "port": "http" }] }] }),
                true,
            ),
            (json!({ "podSelector": {}, "ingress": [{ "from": [{ "podSelector": {} }] }] }), true),
            (json!({ "podSelector": {}, "ingress": [{ "from": [{ "namespaceSelector": {} }] }] }), true),
            (
                json!({ "podSelector": {}, "policyTypes": ["Egress"], "egress": [{ "to": [{ "podSelector": {} }] }] }),
                true,
            ),
        ] {
            assert_eq!(needs_all_pods(&policy(spec.clone())), needed, "{spec}");
        }
    }

    #[test]
    fn demand_ends_with_the_last_object_that_needs_it() {
        let selecting = policy(json!({ "podSelector": {}, "ingress": [{ "from": [{ "podSelector": {} }] }] }));
        let key = selecting.key();
        let mut demand = PodDemand::default();
        demand.apply(&Change::Upsert(Box::new(selecting.clone())));
        assert!(demand.needs_all());
        demand.apply(&Change::Upsert(Box::new(policy(json!({ "podSelector": {} })))));
        assert!(!demand.needs_all());
        demand.apply(&Change::Upsert(Box::new(selecting)));
        demand.apply(&Change::Delete(key));
        assert!(!demand.needs_all());
    }
}
