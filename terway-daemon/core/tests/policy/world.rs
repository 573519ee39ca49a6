//! A small world: the objects of a cluster and the pods of one node, as plain data.
//!
//! This file and the oracle are also in the netns suite, which compares with packets what the compiler's tests compare with its words.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use terway_core::objects::{ClusterNetworkPolicy, Labels, Namespace, NetworkPolicy, ObjectName, Pod};

/// A pod's interface on this node.
#[derive(Clone, Debug)]
pub(crate) struct Local {
    pub(crate) pod: ObjectName,
    pub(crate) uid: String,
    pub(crate) addresses: Vec<IpAddr>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct World {
    pub(crate) namespaces: BTreeMap<Arc<str>, Namespace>,
    pub(crate) pods: BTreeMap<ObjectName, Pod>,
    pub(crate) policies: BTreeMap<ObjectName, NetworkPolicy>,
    pub(crate) cluster: BTreeMap<ObjectName, ClusterNetworkPolicy>,
    pub(crate) locals: BTreeMap<u32, Local>,
    pub(crate) node: BTreeSet<IpAddr>,
    pub(crate) enforce: bool,
}

impl World {
    pub(crate) fn namespace_labels(&self, name: &Arc<str>) -> Labels {
        let own = self.namespaces.get(name).map(|n| n.meta.labels.clone()).unwrap_or_default();
        let pairs = own.iter().map(|(k, v)| (Arc::clone(k), Arc::clone(v)));
        pairs.chain([(Arc::from("kubernetes.io/metadata.name"), Arc::clone(name))]).collect()
    }

    /// The object of a local pod, if it is that of this very pod.
    pub(crate) fn object_of(&self, local: &Local) -> Option<&Pod> {
        let pod = self.pods.get(&local.pod)?;
        (*pod.meta.uid == *local.uid && !pod.host_network).then_some(pod)
    }
}
