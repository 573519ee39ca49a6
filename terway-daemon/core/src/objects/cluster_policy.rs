//! `policy.networking.k8s.io/v1alpha2 ClusterNetworkPolicy` (kubernetes-sigs/network-policy-api, apis/v1alpha2).

use std::sync::Arc;

use ipnetwork::IpNetwork;
use serde::Deserialize;

use super::Protocol;
use super::decode::{cidrs, null_is_default};
use super::meta::{Interner, ObjectMeta};
use super::selector::LabelSelector;

/// Where a policy stands: all of `Admin` comes before NetworkPolicies, all of `Baseline` after them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
pub enum Tier {
    /// Before NetworkPolicies: cannot be overridden by them.
    Admin,
    /// After NetworkPolicies: holds for pods that none of them selects.
    Baseline,
}

/// What a rule does with the traffic it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
pub enum Action {
    /// Lets it through; nothing further is asked.
    Accept,
    /// Drops it; nothing further is asked.
    Deny,
    /// Leaves the decision to the next tier.
    Pass,
}

/// Pods by their labels and those of their namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NamespacedPod {
    /// Namespaces; without parts, all.
    #[serde(deserialize_with = "null_is_default")]
    pub namespace_selector: LabelSelector,
    /// Pods in them; without parts, all.
    #[serde(deserialize_with = "null_is_default")]
    pub pod_selector: LabelSelector,
}

/// The pods that a policy is about; pods of the host's network are never among them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Subject {
    /// All pods of the selected namespaces.
    Namespaces(LabelSelector),
    /// The selected pods of the selected namespaces.
    Pods(NamespacedPod),
}

/// Who sends, in an ingress rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ClusterIngressPeer {
    /// All pods of the selected namespaces.
    Namespaces(LabelSelector),
    /// The selected pods of the selected namespaces.
    Pods(NamespacedPod),
    /// A form that this code does not know, or none: fail closed, so `Accept` matches nothing and `Deny` and `Pass` deny everything.
    Unknown,
}

/// Who receives, in an egress rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ClusterEgressPeer {
    /// All pods of the selected namespaces.
    Namespaces(LabelSelector),
    /// The selected pods of the selected namespaces.
    Pods(NamespacedPod),
    /// Addresses of the selected nodes.
    Nodes(LabelSelector),
    /// Addresses, inside the cluster or out.
    Networks(Vec<IpNetwork>),
    /// Names, of `Accept` rules only.
    DomainNames(Vec<Arc<str>>),
    /// A form that this code does not know, or none: fail closed, so `Accept` matches nothing and `Deny` and `Pass` deny everything.
    Unknown,
}

/// Ports by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PortMatch {
    /// All.
    Any,
    /// One.
    One(u16),
    /// From the first to the last, both included.
    Range(u16, u16),
}

/// A protocol with its destination ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterPort {
    /// Protocol.
    pub protocol: Protocol,
    /// Destination ports.
    pub ports: PortMatch,
}

/// What of the transport a rule matches.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ClusterProtocol {
    /// A protocol and ports.
    Port(ClusterPort),
    /// The port that containers of the receiver give this name, in whatever protocol they say.
    NamedPort(Arc<str>),
    /// A form that this code does not know, or none: to be treated as [`ClusterIngressPeer::Unknown`] is.
    Unknown,
}

/// One rule; the first that matches counts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterRule<P> {
    /// Its name, for the reader of a drop; may be empty.
    pub name: Arc<str>,
    /// What it does.
    pub action: Action,
    /// Any of these peers.
    pub peers: Vec<P>,
    /// Any of these protocols; none = all traffic. `null` and absent are the same.
    pub protocols: Vec<ClusterProtocol>,
}

/// A policy for the whole cluster.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(try_from = "RawPolicy")]
pub struct ClusterNetworkPolicy {
    /// Metadata.
    pub meta: ObjectMeta,
    /// Where it stands.
    pub tier: Tier,
    /// 0 to 1000; the lower number is asked first.
    pub priority: u16,
    /// The pods it is about.
    pub subject: Subject,
    /// Rules for traffic to them, in order.
    pub ingress: Vec<ClusterRule<ClusterIngressPeer>>,
    /// Rules for traffic by them, in order.
    pub egress: Vec<ClusterRule<ClusterEgressPeer>>,
}

impl ClusterNetworkPolicy {
    pub(super) fn intern(&mut self, interner: &mut Interner) {
        self.meta.intern(interner);
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawPeer {
    namespaces: Option<LabelSelector>,
    pods: Option<NamespacedPod>,
    nodes: Option<LabelSelector>,
    #[serde(deserialize_with = "cidrs")]
    networks: Vec<IpNetwork>,
    #[serde(deserialize_with = "null_is_default")]
    domain_names: Vec<Arc<str>>,
}

#[derive(Deserialize)]
struct RawRange {
    start: u16,
    end: u16,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawPort {
    number: Option<u16>,
    range: Option<RawRange>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawTransport {
    destination_port: Option<RawPort>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawProtocol {
    tcp: Option<RawTransport>,
    udp: Option<RawTransport>,
    sctp: Option<RawTransport>,
    destination_named_port: Option<Arc<str>>,
}

#[derive(Deserialize)]
struct RawRule {
    name: Option<Arc<str>>,
    action: Action,
    #[serde(alias = "from", alias = "to", default, deserialize_with = "null_is_default")]
    peers: Vec<RawPeer>,
    #[serde(default, deserialize_with = "null_is_default")]
    protocols: Vec<RawProtocol>,
}

#[derive(Deserialize)]
struct RawSpec {
    tier: Tier,
    priority: u16,
    subject: RawPeer,
    #[serde(default, deserialize_with = "null_is_default")]
    ingress: Vec<RawRule>,
    #[serde(default, deserialize_with = "null_is_default")]
    egress: Vec<RawRule>,
}

#[derive(Deserialize)]
struct RawPolicy {
    metadata: ObjectMeta,
    spec: RawSpec,
}

fn ingress_peer(raw: RawPeer) -> ClusterIngressPeer {
    match (raw.namespaces, raw.pods) {
        (Some(namespaces), None) => ClusterIngressPeer::Namespaces(namespaces),
        (None, Some(pods)) => ClusterIngressPeer::Pods(pods),
        _ => ClusterIngressPeer::Unknown,
    }
}

fn egress_peer(raw: RawPeer) -> ClusterEgressPeer {
    let (networks, names) = (raw.networks, raw.domain_names);
    match (raw.namespaces, raw.pods, raw.nodes, networks.is_empty(), names.is_empty()) {
        (Some(namespaces), None, None, true, true) => ClusterEgressPeer::Namespaces(namespaces),
        (None, Some(pods), None, true, true) => ClusterEgressPeer::Pods(pods),
        (None, None, Some(nodes), true, true) => ClusterEgressPeer::Nodes(nodes),
        (None, None, None, false, true) => ClusterEgressPeer::Networks(networks),
        (None, None, None, true, false) => ClusterEgressPeer::DomainNames(names),
        _ => ClusterEgressPeer::Unknown,
    }
}

fn transport(protocol: Protocol, raw: &RawTransport) -> ClusterProtocol {
    let ports = match &raw.destination_port {
        None => PortMatch::Any,
        Some(RawPort { number: Some(port @ 1..), range: None }) => PortMatch::One(*port),
        Some(RawPort { number: None | Some(0), range: Some(range) }) if range.start <= range.end => {
            PortMatch::Range(range.start, range.end)
        }
        Some(_) => return ClusterProtocol::Unknown,
    };
    ClusterProtocol::Port(ClusterPort { protocol, ports })
}

fn protocol(raw: RawProtocol) -> ClusterProtocol {
    match (raw.tcp, raw.udp, raw.sctp, raw.destination_named_port.filter(|name| !name.is_empty())) {
        (Some(t), None, None, None) => transport(Protocol::Tcp, &t),
        (None, Some(t), None, None) => transport(Protocol::Udp, &t),
        (None, None, Some(t), None) => transport(Protocol::Sctp, &t),
        (None, None, None, Some(name)) => ClusterProtocol::NamedPort(name),
        _ => ClusterProtocol::Unknown,
    }
}

fn rule<P>(raw: RawRule, peer: fn(RawPeer) -> P) -> ClusterRule<P> {
    ClusterRule {
        name: raw.name.unwrap_or_else(|| Arc::from("")),
        action: raw.action,
        peers: raw.peers.into_iter().map(peer).collect(),
        protocols: raw.protocols.into_iter().map(protocol).collect(),
    }
}

impl TryFrom<RawPolicy> for ClusterNetworkPolicy {
    type Error = &'static str;

    fn try_from(RawPolicy { metadata, spec }: RawPolicy) -> Result<Self, &'static str> {
        if spec.priority > 1000 {
            return Err("spec.priority must be 0 to 1000");
        }
        let subject = match (spec.subject.namespaces, spec.subject.pods) {
            (Some(namespaces), None) => Subject::Namespaces(namespaces),
            (None, Some(pods)) => Subject::Pods(pods),
            _ => return Err("spec.subject must have exactly one of namespaces and pods"),
        };
        Ok(Self {
            meta: metadata,
            tier: spec.tier,
            priority: spec.priority,
            subject,
            ingress: spec.ingress.into_iter().map(|r| rule(r, ingress_peer)).collect(),
            egress: spec.egress.into_iter().map(|r| rule(r, egress_peer)).collect(),
        })
    }
}
