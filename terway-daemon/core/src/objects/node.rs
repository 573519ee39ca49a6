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
    spec: RawSpec,
    #[serde(default, deserialize_with = "null_is_default")]
    status: RawStatus,
}

#[derive(Deserialize, Default)]
struct RawSpec {
    #[serde(default, deserialize_with = "null_is_default")]
    taints: Vec<Taint>,
}

#[derive(Deserialize, Default)]
struct RawStatus {
    #[serde(default, deserialize_with = "null_is_default")]
    addresses: Vec<RawAddress>,
    #[serde(default, deserialize_with = "null_is_default")]
    conditions: Vec<NodeCondition>,
    #[serde(default, deserialize_with = "null_is_default")]
    allocatable: RawAllocatable,
}

#[derive(Deserialize, Default)]
struct RawAllocatable {
    #[serde(default)]
    pods: serde_json::Value,
}

/// A taint of a node (`spec.taints`).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize)]
pub struct Taint {
    /// Its key.
    #[serde(default, deserialize_with = "null_is_default")]
    pub key: String,
    /// What it does to pods that do not tolerate it, such as `NoSchedule`.
    #[serde(default, deserialize_with = "null_is_default")]
    pub effect: String,
}

/// A condition of a node (`status.conditions`) without its times: heartbeats are no changes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize)]
pub struct NodeCondition {
    /// Its type.
    #[serde(rename = "type", default, deserialize_with = "null_is_default")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    #[serde(default, deserialize_with = "null_is_default")]
    pub status: String,
    /// The reason in one word.
    #[serde(default, deserialize_with = "null_is_default")]
    pub reason: String,
    /// The reason in words.
    #[serde(default, deserialize_with = "null_is_default")]
    pub message: String,
}

impl NodeCondition {
    /// Whether addresses for pods can be had on this node; written by terway.
    pub const SUFFICIENT_IP: &str = "SufficientIP";
    /// Whether the node's network is not set up; written by cloud controllers and network plugins.
    pub const NETWORK_UNAVAILABLE: &str = "NetworkUnavailable";
}

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(try_from = "RawNode")]
pub struct Node {
    /// Metadata.
    pub meta: ObjectMeta,
    /// Its addresses, names left out, in the order the node gave: the first of a family is the primary one.
    pub addresses: Vec<(AddressKind, IpAddr)>,
    /// Its taints, in the order of the object.
    pub taints: Vec<Taint>,
    /// Its conditions of the types that terway uses.
    pub conditions: Vec<NodeCondition>,
    /// Pods that kubelet takes at most (`status.allocatable.pods`).
    pub max_pods: Option<u32>,
}

impl Node {
    /// The zone it is in, if labelled.
    #[must_use]
    pub fn zone(&self) -> Option<&str> {
        self.meta.labels.get(ZONE)
    }

    /// Its condition of a type.
    #[must_use]
    pub fn condition(&self, kind: &str) -> Option<&NodeCondition> {
        self.conditions.iter().find(|condition| condition.kind == kind)
    }

    pub(super) fn intern(&mut self, interner: &mut Interner) {
        self.meta.intern(interner);
    }
}

/// A count as the API writes quantities: a number, or digits in a string. Other forms of quantities are not used for pods.
fn count(quantity: &serde_json::Value) -> Option<u32> {
    match quantity {
        serde_json::Value::String(text) => text.parse().ok(),
        number => number.as_u64()?.try_into().ok(),
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
        let mut conditions = raw.status.conditions;
        conditions.retain(|condition| {
            [NodeCondition::SUFFICIENT_IP, NodeCondition::NETWORK_UNAVAILABLE].contains(&condition.kind.as_str())
        });
        Ok(Self {
            meta: raw.metadata,
            addresses: numeric.map(parse).collect::<Result<_, String>>()?,
            taints: raw.spec.taints,
            conditions,
            max_pods: count(&raw.status.allocatable.pods),
        })
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
