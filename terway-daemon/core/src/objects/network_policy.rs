//! `networking.k8s.io/v1 NetworkPolicy`.

use ipnetwork::IpNetwork;
use serde::Deserialize;

use super::decode::{cidr, cidrs, null_is_default};
use super::meta::{Interner, ObjectMeta};
use super::selector::LabelSelector;
use super::{IntOrString, Protocol};

/// The direction of traffic, seen from the pod that a policy selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
pub enum Direction {
    /// To the pod.
    Ingress,
    /// From the pod.
    Egress,
}

/// A block of addresses with holes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
pub struct IpBlock {
    /// The block.
    #[serde(deserialize_with = "cidr")]
    pub cidr: IpNetwork,
    /// The holes.
    #[serde(default, deserialize_with = "cidrs")]
    pub except: Vec<IpNetwork>,
}

/// Whom a rule speaks of. The API allows either a block or one or two selectors.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Peer {
    /// Pods with these labels, in the namespaces selected beside it, or else in the policy's own.
    pub pod_selector: Option<LabelSelector>,
    /// Namespaces with these labels.
    pub namespace_selector: Option<LabelSelector>,
    /// Addresses.
    pub ip_block: Option<IpBlock>,
}

/// A port, a range of ports, or all ports of a protocol.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyPort {
    /// Protocol.
    #[serde(deserialize_with = "null_is_default")]
    pub protocol: Protocol,
    /// The port, or the name a container gives it; none = all.
    pub port: Option<IntOrString>,
    /// The last port of the range that begins at `port`.
    pub end_port: Option<u16>,
}

/// One rule: traffic with one of the peers on one of the ports is allowed. An empty list means all.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(default)]
pub struct PolicyRule {
    /// `from` of an ingress rule, `to` of an egress rule.
    #[serde(alias = "from", alias = "to", deserialize_with = "null_is_default")]
    pub peers: Vec<Peer>,
    /// Ports, always of the receiver.
    #[serde(deserialize_with = "null_is_default")]
    pub ports: Vec<PolicyPort>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawSpec {
    #[serde(deserialize_with = "null_is_default")]
    pod_selector: LabelSelector,
    #[serde(deserialize_with = "null_is_default")]
    policy_types: Vec<Direction>,
    #[serde(deserialize_with = "null_is_default")]
    ingress: Vec<PolicyRule>,
    #[serde(deserialize_with = "null_is_default")]
    egress: Vec<PolicyRule>,
}

#[derive(Deserialize)]
struct RawPolicy {
    #[serde(default)]
    metadata: ObjectMeta,
    #[serde(default)]
    spec: RawSpec,
}

/// A NetworkPolicy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(from = "RawPolicy")]
pub struct NetworkPolicy {
    /// Metadata.
    pub meta: ObjectMeta,
    /// The pods of its namespace that it selects.
    pub pod_selector: LabelSelector,
    /// Whether it isolates its pods from traffic to them.
    pub isolates_ingress: bool,
    /// Whether it isolates its pods from traffic by them.
    pub isolates_egress: bool,
    /// What may come in, if it isolates that way.
    pub ingress: Vec<PolicyRule>,
    /// What may go out, if it isolates that way.
    pub egress: Vec<PolicyRule>,
}

impl NetworkPolicy {
    /// Whether it isolates its pods in a direction.
    #[must_use]
    pub const fn isolates(&self, direction: Direction) -> bool {
        match direction {
            Direction::Ingress => self.isolates_ingress,
            Direction::Egress => self.isolates_egress,
        }
    }

    /// Its rules of a direction.
    #[must_use]
    pub fn rules(&self, direction: Direction) -> &[PolicyRule] {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }

    pub(super) fn intern(&mut self, interner: &mut Interner) {
        self.meta.intern(interner);
    }
}

impl From<RawPolicy> for NetworkPolicy {
    fn from(RawPolicy { metadata, spec }: RawPolicy) -> Self {
        // The API server's default (networking/v1 `SetDefaults_NetworkPolicy`): ingress always, egress if there are rules for it.
        let named = |direction| spec.policy_types.contains(&direction);
        let told = !spec.policy_types.is_empty();
        Self {
            meta: metadata,
            isolates_ingress: if told { named(Direction::Ingress) } else { true },
            isolates_egress: if told { named(Direction::Egress) } else { !spec.egress.is_empty() },
            pod_selector: spec.pod_selector,
            ingress: spec.ingress,
            egress: spec.egress,
        }
    }
}
