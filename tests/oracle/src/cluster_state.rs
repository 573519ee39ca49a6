//! A small cluster: the objects of a cluster and the pods of one node, as plain data.
//!
//! This file and the oracle are also in the netns suite, which compares with packets what the compiler's tests compare with its words.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use terway_core::objects::{ClusterNetworkPolicy, Labels, Namespace, NetworkPolicy, ObjectName, Pod};

/// A pod's interface on this node.
#[derive(Clone, Debug)]
pub struct LocalEndpoint {
    /// The pod by the runtime's word.
    pub pod: ObjectName,
    /// Its UID by the runtime's word.
    pub uid: String,
    /// Its addresses, one of a family at most.
    pub addresses: Vec<IpAddr>,
}

/// The objects of a cluster, and what one node knows besides.
#[derive(Clone, Debug, Default)]
pub struct ClusterState {
    /// Namespaces by name.
    pub namespaces: BTreeMap<Arc<str>, Namespace>,
    /// Pods of all nodes.
    pub pods: BTreeMap<ObjectName, Pod>,
    /// NetworkPolicies.
    pub policies: BTreeMap<ObjectName, NetworkPolicy>,
    /// ClusterNetworkPolicies.
    pub cluster: BTreeMap<ObjectName, ClusterNetworkPolicy>,
    /// Interfaces of this node's pods, by slot.
    pub locals: BTreeMap<u32, LocalEndpoint>,
    /// Addresses of this node.
    pub node: BTreeSet<IpAddr>,
    /// Whether policies are enforced.
    pub enforce: bool,
}

impl ClusterState {
    /// The labels of a namespace, with the one that every namespace has.
    #[must_use]
    pub fn namespace_labels(&self, name: &Arc<str>) -> Labels {
        let own = self.namespaces.get(name).map(|n| n.meta.labels.clone()).unwrap_or_default();
        let pairs = own.iter().map(|(k, v)| (Arc::clone(k), Arc::clone(v)));
        pairs.chain([(Arc::from("kubernetes.io/metadata.name"), Arc::clone(name))]).collect()
    }

    /// The object of a local pod, if it is that of this very pod.
    #[must_use]
    pub fn object_of(&self, local: &LocalEndpoint) -> Option<&Pod> {
        let pod = self.pods.get(&local.pod)?;
        (*pod.meta.uid == *local.uid && !pod.host_network).then_some(pod)
    }
}
