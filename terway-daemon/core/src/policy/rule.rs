//! Policies as the compiler reads them: both kinds brought into one form, with everything that cannot hold already failed closed.

use std::sync::Arc;

use ipnetwork::IpNetwork;

use super::ids::{PeerId, PolicyVersion};
use super::peer_match::{Match, Namespaces, Pods, canonical};
use super::peers::Peers;
use crate::objects::{
    Action, ClusterEgressPeer, ClusterIngressPeer, ClusterNetworkPolicy, ClusterProtocol, ClusterRule, Direction,
    IntOrString, IpBlock, Kind, LabelSelector, NamespacedPod, NetworkPolicy, ObjectKey, Peer, PolicyPort, PolicyRule,
    PortMatch, Protocol, Subject, Tier,
};

/// When a policy is asked: by tier, then priority, then name, so that equal priorities have one outcome everywhere.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Rank {
    pub(super) stage: Stage,
    priority: u16,
    key: ObjectKey,
}

/// The tiers in the order of evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Stage {
    Admin,
    Network,
    Baseline,
}

/// What of the transport a rule matches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ports {
    /// Protocol number, first and last port.
    Range(u8, u16, u16),
    /// A container port's name, in one protocol or in any.
    Named(Option<Protocol>, Arc<str>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) name: Arc<str>,
    pub(super) action: Action,
    /// None = every address.
    pub(super) peers: Option<Vec<PeerId>>,
    /// None = all traffic, protocols without ports included.
    pub(super) ports: Option<Vec<Ports>>,
}

/// One policy.
#[derive(Debug)]
pub(super) struct Policy {
    pub(super) key: ObjectKey,
    pub(super) version: PolicyVersion,
    pub(super) rank: Rank,
    pub(super) subject: Pods,
    /// Isolates: what no rule allows is denied. Only NetworkPolicies do.
    isolates: [bool; 2],
    rules: [Vec<Rule>; 2],
}

const fn side(direction: Direction) -> usize {
    match direction {
        Direction::Ingress => 0,
        Direction::Egress => 1,
    }
}

impl Policy {
    pub(super) fn isolates(&self, direction: Direction) -> bool {
        self.isolates[side(direction)]
    }

    pub(super) fn rules(&self, direction: Direction) -> &[Rule] {
        &self.rules[side(direction)]
    }

    /// Whether it says anything about a direction.
    pub(super) fn concerns(&self, direction: Direction) -> bool {
        self.isolates(direction) || !self.rules(direction).is_empty()
    }

    fn all_rules(&self) -> impl Iterator<Item = &Rule> {
        self.rules.iter().flatten()
    }

    /// Everybody its rules mean, once for each time.
    pub(super) fn peers(&self) -> impl Iterator<Item = PeerId> {
        self.all_rules().flat_map(|rule| rule.peers.iter().flatten()).copied()
    }

    /// Label keys by which peers are told apart.
    pub(super) fn keys<'a>(&self, peers: &'a Peers) -> impl Iterator<Item = &'a Arc<str>> {
        self.peers()
            .filter_map(|peer| match peers.get(peer) {
                Match::Pods(pods) => Some(&pods.pods),
                Match::Block(_) => None,
            })
            .flat_map(|s| s.match_labels.iter().map(|(k, _)| k).chain(s.match_expressions.iter().map(|r| &r.key)))
    }

    /// Names of ports that are looked up in the peer.
    pub(super) fn port_names(&self) -> impl Iterator<Item = &Arc<str>> {
        self.rules(Direction::Egress).iter().flat_map(|rule| rule.ports.iter().flatten()).filter_map(|p| match p {
            Ports::Named(_, name) => Some(name),
            Ports::Range(..) => None,
        })
    }

    /// Blocks and their holes.
    pub(super) fn nets(&self, peers: &Peers) -> impl Iterator<Item = IpNetwork> {
        self.peers()
            .filter_map(|peer| match peers.get(peer) {
                Match::Block(block) => Some(block),
                Match::Pods(_) => None,
            })
            .flat_map(|block| std::iter::once(block.cidr).chain(block.except.iter().copied()))
            .map(canonical)
    }

    pub(super) fn network(version: PolicyVersion, from: &NetworkPolicy, peers: &mut Peers) -> Self {
        let own = &from.meta.object.namespace;
        let mut rules = |direction: Direction| {
            if !from.isolates(direction) {
                return Vec::new();
            }
            from.rules(direction).iter().map(|rule| network_rule(own, rule, peers)).collect()
        };
        let key = ObjectKey { kind: Kind::NetworkPolicy, name: from.meta.object.clone() };
        Self {
            rank: Rank { stage: Stage::Network, priority: 0, key: key.clone() },
            key,
            version,
            subject: Pods { namespaces: Namespaces::Own(Arc::clone(own)), pods: from.pod_selector.clone() },
            isolates: [from.isolates_ingress, from.isolates_egress],
            rules: [rules(Direction::Ingress), rules(Direction::Egress)],
        }
    }

    pub(super) fn cluster(version: PolicyVersion, from: &ClusterNetworkPolicy, peers: &mut Peers) -> Self {
        let key = ObjectKey { kind: Kind::ClusterNetworkPolicy, name: from.meta.object.clone() };
        let stage = match from.tier {
            Tier::Admin => Stage::Admin,
            Tier::Baseline => Stage::Baseline,
        };
        Self {
            rank: Rank { stage, priority: from.priority, key: key.clone() },
            key,
            version,
            subject: match &from.subject {
                Subject::Namespaces(selector) => all_pods(selector),
                Subject::Pods(pods) => pods_of(pods),
            },
            isolates: [false, false],
            rules: [
                from.ingress.iter().map(|r| cluster_rule(r, ingress_peer, peers)).collect(),
                from.egress.iter().map(|r| cluster_rule(r, egress_peer, peers)).collect(),
            ],
        }
    }
}

fn network_rule(own: &Arc<str>, rule: &PolicyRule, peers: &mut Peers) -> Rule {
    let meant = rule.peers.iter().filter_map(|peer| network_peer(own, peer));
    let peers = (!rule.peers.is_empty()).then(|| meant.map(|peer| peers.enlist(peer)).collect());
    let ports = (!rule.ports.is_empty()).then(|| rule.ports.iter().filter_map(network_port).collect());
    Rule { name: Arc::from(""), action: Action::Accept, peers, ports }
}

/// A peer that the API server would have refused matches nothing.
fn network_peer(own: &Arc<str>, peer: &Peer) -> Option<Match> {
    let sound = |selector: &LabelSelector| selector.check().is_ok();
    match (&peer.ip_block, &peer.namespace_selector, &peer.pod_selector) {
        (Some(block), None, None) => Some(Match::Block(block.clone())),
        (None, None, Some(pods)) if sound(pods) => {
            Some(Match::Pods(Pods { namespaces: Namespaces::Own(Arc::clone(own)), pods: pods.clone() }))
        }
        (None, Some(namespaces), pods) if sound(namespaces) && pods.as_ref().is_none_or(sound) => {
            Some(Match::Pods(Pods {
                namespaces: Namespaces::Selected(namespaces.clone()),
                pods: pods.clone().unwrap_or_default(),
            }))
        }
        _ => None,
    }
}

/// A port that the API server would have refused matches nothing.
fn network_port(port: &PolicyPort) -> Option<Ports> {
    let protocol = port.protocol.number();
    match (&port.port, port.end_port) {
        (None, None) => Some(Ports::Range(protocol, 0, u16::MAX)),
        (Some(IntOrString::Number(first)), None) => Some(Ports::Range(protocol, *first, *first)),
        (Some(IntOrString::Number(first)), Some(last)) if *first <= last => Some(Ports::Range(protocol, *first, last)),
        (Some(IntOrString::Name(name)), None) => Some(Ports::Named(Some(port.protocol), Arc::clone(name))),
        _ => None,
    }
}

fn all_pods(namespaces: &LabelSelector) -> Pods {
    Pods { namespaces: Namespaces::Selected(namespaces.clone()), pods: LabelSelector::default() }
}

fn pods_of(pods: &NamespacedPod) -> Pods {
    Pods { namespaces: Namespaces::Selected(pods.namespace_selector.clone()), pods: pods.pod_selector.clone() }
}

fn sound(pods: Pods) -> Option<Vec<Match>> {
    let Namespaces::Selected(namespaces) = &pods.namespaces else { return None };
    (namespaces.check().is_ok() && pods.pods.check().is_ok()).then(|| vec![Match::Pods(pods)])
}

/// None: the peer is of a kind that is not known, or not supported.
fn ingress_peer(peer: &ClusterIngressPeer) -> Option<Vec<Match>> {
    match peer {
        ClusterIngressPeer::Namespaces(selector) => sound(all_pods(selector)),
        ClusterIngressPeer::Pods(pods) => sound(pods_of(pods)),
        ClusterIngressPeer::Unknown => None,
    }
}

fn egress_peer(peer: &ClusterEgressPeer) -> Option<Vec<Match>> {
    match peer {
        ClusterEgressPeer::Namespaces(selector) => sound(all_pods(selector)),
        ClusterEgressPeer::Pods(pods) => sound(pods_of(pods)),
        ClusterEgressPeer::Networks(nets) => {
            Some(nets.iter().map(|cidr| Match::Block(IpBlock { cidr: *cidr, except: Vec::new() })).collect())
        }
        ClusterEgressPeer::Nodes(_) | ClusterEgressPeer::DomainNames(_) | ClusterEgressPeer::Unknown => None,
    }
}

/// What the API says to do with a rule that is not fully understood: `Accept` matches nothing, `Deny` and `Pass` deny everything
/// (apis/v1alpha2/clusternetworkpolicy_types.go, "fail closed").
fn cluster_rule<P>(rule: &ClusterRule<P>, peer: fn(&P) -> Option<Vec<Match>>, peers: &mut Peers) -> Rule {
    let meant: Option<Vec<Vec<Match>>> = rule.peers.iter().map(peer).collect();
    let ports: Option<Vec<Ports>> = rule.protocols.iter().map(cluster_port).collect();
    let name = Arc::clone(&rule.name);
    match (meant, ports) {
        (Some(meant), Some(ports)) if !meant.is_empty() => Rule {
            name,
            action: rule.action,
            peers: Some(meant.into_iter().flatten().map(|peer| peers.enlist(peer)).collect()),
            ports: (!ports.is_empty()).then_some(ports),
        },
        _ if rule.action == Action::Accept => {
            Rule { name, action: Action::Accept, peers: Some(Vec::new()), ports: None }
        }
        _ => Rule { name, action: Action::Deny, peers: None, ports: None },
    }
}

fn cluster_port(protocol: &ClusterProtocol) -> Option<Ports> {
    match protocol {
        ClusterProtocol::Port(port) => {
            let (first, last) = match port.ports {
                PortMatch::Any => (0, u16::MAX),
                PortMatch::One(port) => (port, port),
                PortMatch::Range(first, last) => (first, last),
            };
            Some(Ports::Range(port.protocol.number(), first, last))
        }
        ClusterProtocol::NamedPort(name) => Some(Ports::Named(None, Arc::clone(name))),
        ClusterProtocol::Unknown => None,
    }
}
