//! Facts of the node, and settings for all its Services.

use std::sync::Arc;

use super::model::Algorithm;
use crate::objects::Node;

/// Settings for all Services of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Whether pods that talk to an external address of a Service get a backend at once, rather than a detour over the load balancer
    /// (`in_cluster_loadbalance`).
    pub in_cluster_loadbalance: bool,
    /// How a backend is chosen where a Service says nothing.
    pub algorithm: Algorithm,
    /// Slots of a Maglev table; a prime. Grows for Services with so many backends that the shares would be uneven.
    pub maglev_size: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self { in_cluster_loadbalance: true, algorithm: Algorithm::Random, maglev_size: 1021 }
    }
}

/// Facts of the node that do not come from Kubernetes objects.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// The node's name in Kubernetes.
    pub name: Arc<str>,
    /// Its zone, for as long as no Node object tells.
    pub zone: Option<Arc<str>>,
}

/// The local node: its name and zone, as the traffic policies use them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LocalNode {
    pub(super) name: Arc<str>,
    pub(super) zone: Option<Arc<str>>,
}

impl LocalNode {
    pub(super) fn new(facts: &NodeFacts, node: Option<&Node>) -> Self {
        let zone = node.and_then(Node::zone).map(Arc::from).or_else(|| facts.zone.clone());
        Self { name: Arc::clone(&facts.name), zone }
    }
}
