//! What the compiler keeps of pods, addresses and local endpoints.

use std::net::IpAddr;

use super::ids::{Identity, PodId, ProfileId, SetId};
use super::op::EndpointPolicy;
use crate::ident::Addresses;
use crate::objects::{ObjectKey, ObjectName};

/// A pod, as little of it as a hundred thousand of them allow.
#[derive(Debug)]
pub(super) struct PodState {
    pub(super) name: ObjectName,
    pub(super) uid: Box<str>,
    pub(super) profile: ProfileId,
    /// Lives in the network of its node: no policy selects it, no peer matches it.
    pub(super) host_network: bool,
    pub(super) finished: bool,
    /// As its status says.
    pub(super) ips: Box<[IpAddr]>,
    /// What it claims: those and its endpoints' addresses.
    pub(super) claims: Box<[IpAddr]>,
}

impl PodState {
    /// The addresses that it claims.
    pub(super) fn claims(&self) -> &[IpAddr] {
        &self.claims
    }

    /// Whether it may be the pod of this UID; who does not say is taken at the name.
    pub(super) fn is(&self, uid: &str) -> bool {
        uid.is_empty() || self.uid.is_empty() || *self.uid == *uid
    }
}

/// An address that somebody has.
#[derive(Debug, Default)]
pub(super) struct Claim {
    /// Pods that say it is theirs; the last one counts.
    pub(super) pods: Vec<PodId>,
    pub(super) identity: Identity,
}

/// An interface of a pod of this node.
#[derive(Debug)]
pub(super) struct Endpoint {
    pub(super) pod: ObjectName,
    pub(super) uid: String,
    pub(super) addresses: Addresses,
    /// Ingress, egress; of each that of the admin tier, then that of the others.
    pub(super) sets: [[SetId; 2]; 2],
    pub(super) value: EndpointPolicy,
    /// Who selects it.
    pub(super) policies: Vec<ObjectKey>,
}
