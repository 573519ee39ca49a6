//! What the compiler keeps of pods, addresses and local endpoints.

use std::net::IpAddr;

use super::ids::{Identity, PodId, ProfileId, SetId};
use super::op::EndpointPolicy;
use crate::ident::Addresses;
use crate::objects::{ObjectKey, ObjectName};

/// The state of a pod of the cluster; there may be a hundred thousand of them.
#[derive(Debug)]
pub(super) struct PodState {
    pub(super) name: ObjectName,
    pub(super) uid: Box<str>,
    pub(super) profile: ProfileId,
    /// In its node's network namespace: no policy selects it, no peer matches it.
    pub(super) host_network: bool,
    pub(super) finished: bool,
    /// The addresses in its status.
    pub(super) ips: Box<[IpAddr]>,
    /// Its addresses: those in its status and those of its endpoints.
    pub(super) claims: Box<[IpAddr]>,
}

impl PodState {
    /// Its addresses.
    pub(super) fn claims(&self) -> &[IpAddr] {
        &self.claims
    }

    /// Whether it may be the pod with this UID; an empty one matches.
    pub(super) fn is(&self, uid: &str) -> bool {
        uid.is_empty() || self.uid.is_empty() || *self.uid == *uid
    }
}

/// An address with an identity of its own.
#[derive(Debug, Default)]
pub(super) struct Claim {
    /// Pods with this address; the last one counts.
    pub(super) pods: Vec<PodId>,
    pub(super) identity: Identity,
}

/// A local endpoint: an interface of a pod of this node.
#[derive(Debug)]
pub(super) struct Endpoint {
    pub(super) pod: ObjectName,
    pub(super) uid: String,
    pub(super) addresses: Addresses,
    /// Ingress, egress; of each that of the admin tier, then that of the others.
    pub(super) sets: [[SetId; 2]; 2],
    pub(super) value: EndpointPolicy,
    /// The policies that select it.
    pub(super) policies: Vec<ObjectKey>,
}
