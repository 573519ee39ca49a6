//! What the node knows of Kubernetes: the kinds it uses, and of each kind only the fields it uses.
//!
//! Every type reads the API's JSON (and YAML) directly; unknown fields are skipped, the API server's defaults are applied, because a file has
//! passed no API server. Nested documents are flattened, and strings that repeat (labels, namespaces, node names) are shared by
//! [`Objects`], so that a hundred thousand pods fit into some tens of megabytes.

mod cluster_policy;
mod decode;
mod meta;
mod network_policy;
mod node;
mod pod;
mod pod_demand;
mod selector;
mod service;
mod slice;
mod store;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

use serde::Deserialize;

pub use cluster_policy::{
    Action, ClusterEgressPeer, ClusterIngressPeer, ClusterNetworkPolicy, ClusterPort, ClusterProtocol, ClusterRule,
    NamespacedPod, PortMatch, Subject, Tier,
};
pub use meta::{Interner, Labels, ObjectMeta};
pub use network_policy::{Direction, IpBlock, NetworkPolicy, Peer, PolicyPort, PolicyRule};
pub use node::{AddressKind, Namespace, Node, NodeCondition, Taint};
pub use pod::{Phase, Pod, PodPort};
pub use pod_demand::{PodDemand, needs_all_pods};
pub use selector::{BadSelector, LabelSelector, Operator, Requirement};
pub use service::{IpMode, LoadBalancerIngress, Service, ServicePort, ServiceType, TrafficDistribution, TrafficPolicy};
pub use slice::{AddressType, Endpoint, EndpointPort, EndpointSlice, Hints, TargetRef};
pub use store::{Applied, Change, Delta, Objects, Table};

/// A transport protocol of Services and policies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP, the API's default.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// Its number in the IP header (`IPPROTO_*`).
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// A port by number, or by the name a container gives it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(untagged)]
pub enum IntOrString {
    /// A port number.
    Number(u16),
    /// The name of a container's port.
    Name(Arc<str>),
}

/// The kinds that are watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `v1 Node`.
    Node,
    /// `v1 Namespace`.
    Namespace,
    /// `v1 Pod`.
    Pod,
    /// `v1 Service`.
    Service,
    /// `discovery.k8s.io/v1 EndpointSlice`.
    EndpointSlice,
    /// `networking.k8s.io/v1 NetworkPolicy`.
    NetworkPolicy,
    /// `policy.networking.k8s.io/v1alpha2 ClusterNetworkPolicy`.
    ClusterNetworkPolicy,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Node,
        Self::Namespace,
        Self::Pod,
        Self::Service,
        Self::EndpointSlice,
        Self::NetworkPolicy,
        Self::ClusterNetworkPolicy,
    ];

    /// Its name in `kind:`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Node => "Node",
            Self::Namespace => "Namespace",
            Self::Pod => "Pod",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::NetworkPolicy => "NetworkPolicy",
            Self::ClusterNetworkPolicy => "ClusterNetworkPolicy",
        }
    }

    /// The API version that is read.
    #[must_use]
    pub const fn api_version(self) -> &'static str {
        match self {
            Self::Node | Self::Namespace | Self::Pod | Self::Service => "v1",
            Self::EndpointSlice => "discovery.k8s.io/v1",
            Self::NetworkPolicy => "networking.k8s.io/v1",
            Self::ClusterNetworkPolicy => "policy.networking.k8s.io/v1alpha2",
        }
    }

    /// Older API versions that are read as well; their documents have the same fields or are converted.
    #[must_use]
    pub const fn older_api_versions(self) -> &'static [&'static str] {
        match self {
            // All that Kubernetes before 1.21 has.
            Self::EndpointSlice => &["discovery.k8s.io/v1beta1"],
            _ => &[],
        }
    }

    /// The kind of a document with these two fields, if it is one of ours.
    #[must_use]
    pub fn find(api_version: &str, kind: &str) -> Option<Self> {
        let reads = |kind: &Self| kind.api_version() == api_version || kind.older_api_versions().contains(&api_version);
        Self::ALL.into_iter().find(|k| k.name() == kind && reads(k))
    }

    /// Whether its objects live in a namespace.
    #[must_use]
    pub const fn namespaced(self) -> bool {
        !matches!(self, Self::Node | Self::Namespace | Self::ClusterNetworkPolicy)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Namespace and name; the namespace of a cluster-wide object is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// The namespace, empty for cluster-wide kinds.
    pub namespace: Arc<str>,
    /// The name.
    pub name: Arc<str>,
}

impl ObjectName {
    /// A name from its two parts.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: Arc::from(namespace), name: Arc::from(name) }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() { f.write_str(&self.name) } else { write!(f, "{}/{}", self.namespace, self.name) }
    }
}

/// What tells one object from all others.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// Its kind.
    pub kind: Kind,
    /// Its name.
    pub name: ObjectName,
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

/// An object of one of the kinds.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "each variant is the type of its name")]
pub enum Object {
    Node(Node),
    Namespace(Namespace),
    Pod(Pod),
    Service(Service),
    EndpointSlice(EndpointSlice),
    NetworkPolicy(NetworkPolicy),
    ClusterNetworkPolicy(ClusterNetworkPolicy),
}

impl Object {
    /// Reads an object of a known kind. An object of a namespaced kind that names no namespace is put into `default`.
    ///
    /// # Errors
    /// What the format's reader finds wrong.
    pub fn read<'de, D: serde::Deserializer<'de>>(kind: Kind, from: D) -> Result<Self, D::Error> {
        let mut object = match kind {
            Kind::Node => Self::Node(Node::deserialize(from)?),
            Kind::Namespace => Self::Namespace(Namespace::deserialize(from)?),
            Kind::Pod => Self::Pod(Pod::deserialize(from)?),
            Kind::Service => Self::Service(Service::deserialize(from)?),
            Kind::EndpointSlice => Self::EndpointSlice(EndpointSlice::deserialize(from)?),
            Kind::NetworkPolicy => Self::NetworkPolicy(NetworkPolicy::deserialize(from)?),
            Kind::ClusterNetworkPolicy => Self::ClusterNetworkPolicy(ClusterNetworkPolicy::deserialize(from)?),
        };
        let meta = object.meta_mut();
        if meta.object.name.is_empty() {
            return Err(serde::de::Error::custom("metadata.name is missing"));
        }
        if !kind.namespaced() {
            meta.object.namespace = Arc::from("");
        } else if meta.object.namespace.is_empty() {
            meta.object.namespace = Arc::from("default");
        }
        Ok(object)
    }

    /// Its kind.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Node(_) => Kind::Node,
            Self::Namespace(_) => Kind::Namespace,
            Self::Pod(_) => Kind::Pod,
            Self::Service(_) => Kind::Service,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
            Self::NetworkPolicy(_) => Kind::NetworkPolicy,
            Self::ClusterNetworkPolicy(_) => Kind::ClusterNetworkPolicy,
        }
    }

    /// Its metadata.
    #[must_use]
    pub const fn meta(&self) -> &ObjectMeta {
        match self {
            Self::Node(o) => &o.meta,
            Self::Namespace(o) => &o.meta,
            Self::Pod(o) => &o.meta,
            Self::Service(o) => &o.meta,
            Self::EndpointSlice(o) => &o.meta,
            Self::NetworkPolicy(o) => &o.meta,
            Self::ClusterNetworkPolicy(o) => &o.meta,
        }
    }

    const fn meta_mut(&mut self) -> &mut ObjectMeta {
        match self {
            Self::Node(o) => &mut o.meta,
            Self::Namespace(o) => &mut o.meta,
            Self::Pod(o) => &mut o.meta,
            Self::Service(o) => &mut o.meta,
            Self::EndpointSlice(o) => &mut o.meta,
            Self::NetworkPolicy(o) => &mut o.meta,
            Self::ClusterNetworkPolicy(o) => &mut o.meta,
        }
    }

    /// Gives up its own copies of strings that others have too.
    pub fn intern(&mut self, interner: &mut Interner) {
        match self {
            Self::Node(o) => o.intern(interner),
            Self::Namespace(o) => o.intern(interner),
            Self::Pod(o) => o.intern(interner),
            Self::Service(o) => o.intern(interner),
            Self::EndpointSlice(o) => o.intern(interner),
            Self::NetworkPolicy(o) => o.intern(interner),
            Self::ClusterNetworkPolicy(o) => o.intern(interner),
        }
    }

    /// What tells it from all others.
    #[must_use]
    pub fn key(&self) -> ObjectKey {
        ObjectKey { kind: self.kind(), name: self.meta().object.clone() }
    }
}
