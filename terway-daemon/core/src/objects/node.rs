//! Nodes and namespaces.

use std::net::IpAddr;

use serde::Deserialize;

use super::decode::null_is_default;
use super::meta::{Interner, ObjectMeta};

/// The label that names a node's zone.
const ZONE: &str = "topology.kubernetes.io/zone";

/// What an address of a node is for (`NodeAddressType`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
pub enum AddressKind {
    /// Reachable inside the cluster's network.
    #[serde(rename = "InternalIP")]
    Internal,
    /// Reachable from outside.
    #[serde(rename = "ExternalIP")]
    External,
    /// A name, not an address.
    #[serde(other)]
    Name,
}

#[derive(Deserialize)]
struct RawAddress {
    #[serde(rename = "type")]
    kind: AddressKind,
    address: String,
}

#[derive(Deserialize)]
struct RawNode {
    #[serde(default)]
    metadata: ObjectMeta,
    #[serde(default, deserialize_with = "null_is_default")]
    status: RawStatus,
}

#[derive(Deserialize, Default)]
struct RawStatus {
    #[serde(default, deserialize_with = "null_is_default")]
    addresses: Vec<RawAddress>,
}

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(try_from = "RawNode")]
pub struct Node {
    /// Metadata.
    pub meta: ObjectMeta,
    /// Its addresses, names left out, in the order the node gave: the first of a family is the primary one.
    pub addresses: Vec<(AddressKind, IpAddr)>,
}

impl Node {
    /// The zone it is in, if labelled.
    #[must_use]
    pub fn zone(&self) -> Option<&str> {
        self.meta.labels.get(ZONE)
    }

    pub(super) fn intern(&mut self, interner: &mut Interner) {
        self.meta.intern(interner);
    }
}

impl TryFrom<RawNode> for Node {
    type Error = String;

    fn try_from(raw: RawNode) -> Result<Self, String> {
        let numeric = raw.status.addresses.into_iter().filter(|a| a.kind != AddressKind::Name);
        let parse = |a: RawAddress| {
            let address = a.address.parse().ok().ok_or_else(|| format!("`{}` is not an IP address", a.address))?;
            Ok((a.kind, address))
        };
        Ok(Self { meta: raw.metadata, addresses: numeric.map(parse).collect::<Result<_, String>>()? })
    }
}

/// A namespace: policies select by its labels. The API server labels each with `kubernetes.io/metadata.name`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
pub struct Namespace {
    /// Metadata.
    #[serde(rename = "metadata", default)]
    pub meta: ObjectMeta,
}

impl Namespace {
    pub(super) fn intern(&mut self, interner: &mut Interner) {
        self.meta.intern(interner);
    }
}
