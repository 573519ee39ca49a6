//! What policies mean, as the Kubernetes documentation (Network Policies) and the API of ClusterNetworkPolicy say it: slow, stateless, and
//! without a line of the compiler.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use terway_core::objects::{
    Action, ClusterEgressPeer, ClusterIngressPeer, ClusterNetworkPolicy, ClusterProtocol, ClusterRule, Direction,
    IntOrString, LabelSelector, Labels, NetworkPolicy, Operator, Peer, Phase, Pod, PolicyPort, PortMatch, Protocol,
    Subject, Tier,
};
use terway_core::policy::Packet;

use crate::cluster_state::{ClusterState, LocalEndpoint};

/// The expected verdicts of the egress and the ingress side of a packet; none where no local pod is concerned.
#[must_use]
pub fn expected_verdicts(cluster: &ClusterState, packet: &Packet) -> [Option<bool>; 2] {
    let (source, destination) = (local(cluster, packet.source), local(cluster, packet.destination));
    if let (Some(a), Some(b)) = (source, destination)
        && std::ptr::eq(a, b)
    {
        // "Pods cannot block localhost access": a pod always reaches itself.
        return [Some(true); 2];
    }
    let egress = source.map(|here| !cluster.enforce || allows(cluster, here, Direction::Egress, packet));
    let ingress = destination.map(|here| {
        // "... or access from their resident node."
        !cluster.enforce || cluster.node.contains(&packet.source) || allows(cluster, here, Direction::Ingress, packet)
    });
    [egress, ingress]
}

fn local(cluster: &ClusterState, address: IpAddr) -> Option<&LocalEndpoint> {
    cluster.locals.values().find(|local| local.addresses.contains(&address))
}

/// The pod an address belongs to, if policies can know it as a pod.
fn who(cluster: &ClusterState, address: IpAddr) -> Option<&Pod> {
    if cluster.node.contains(&address) {
        return None;
    }
    let alive = |pod: &&Pod| !pod.host_network && !matches!(pod.phase, Phase::Succeeded | Phase::Failed);
    match local(cluster, address) {
        Some(local) => cluster.object_of(local).filter(alive),
        None => cluster.pods.values().filter(alive).find(|pod| pod.ips.contains(&address)),
    }
}

fn allows(cluster: &ClusterState, here: &LocalEndpoint, direction: Direction, packet: &Packet) -> bool {
    let in_namespace = |p: &&NetworkPolicy| *p.meta.object.namespace == *here.pod.namespace;
    let Some(pod) = cluster.object_of(here) else {
        // Nobody knows what selects it: isolated as soon as something might.
        let some = cluster.policies.values().filter(in_namespace).any(|p| p.isolates(direction));
        let any = cluster.cluster.values().any(|p| match direction {
            Direction::Ingress => !p.ingress.is_empty(),
            Direction::Egress => !p.egress.is_empty(),
        });
        return !(some || any);
    };
    if let Some(verdict) = tier(cluster, pod, Tier::Admin, direction, packet) {
        return verdict;
    }
    let selecting: Vec<&NetworkPolicy> = cluster
        .policies
        .values()
        .filter(in_namespace)
        .filter(|p| p.isolates(direction) && selects(&p.pod_selector, &pod.meta.labels))
        .collect();
    if !selecting.is_empty() {
        return selecting.iter().any(|policy| {
            policy.rules(direction).iter().any(|rule| {
                (rule.peers.is_empty()
                    || rule.peers.iter().any(|p| is_peer(cluster, policy, p, far(direction, packet))))
                    && (rule.ports.is_empty() || rule.ports.iter().any(|p| is_port(cluster, direction, p, packet)))
            })
        });
    }
    tier(cluster, pod, Tier::Baseline, direction, packet).unwrap_or(true)
}

const fn far(direction: Direction, packet: &Packet) -> IpAddr {
    match direction {
        Direction::Ingress => packet.source,
        Direction::Egress => packet.destination,
    }
}

fn is_peer(cluster: &ClusterState, policy: &NetworkPolicy, peer: &Peer, address: IpAddr) -> bool {
    if let Some(block) = &peer.ip_block {
        return contains(&block.cidr, address) && !block.except.iter().any(|hole| contains(hole, address));
    }
    let Some(pod) = who(cluster, address) else { return false };
    let namespace = match &peer.namespace_selector {
        Some(selector) => selects(selector, &cluster.namespace_labels(&pod.meta.object.namespace)),
        None => pod.meta.object.namespace == policy.meta.object.namespace,
    };
    namespace && peer.pod_selector.as_ref().is_none_or(|selector| selects(selector, &pod.meta.labels))
}

fn is_port(cluster: &ClusterState, direction: Direction, port: &PolicyPort, packet: &Packet) -> bool {
    if port.protocol.number() != packet.protocol {
        return false;
    }
    match (&port.port, port.end_port) {
        (None, _) => true,
        (Some(IntOrString::Number(first)), Some(last)) => *first <= packet.port && packet.port <= last,
        (Some(IntOrString::Number(number)), None) => *number == packet.port,
        (Some(IntOrString::Name(_)), Some(_)) => false,
        (Some(IntOrString::Name(name)), None) => serves(cluster, direction, name, Some(port.protocol), packet),
    }
}

/// Whether the receiver has a container port of that name and it is this one. For traffic to a pod that is the pod itself, for traffic by
/// one it is whoever the destination is.
fn serves(
    cluster: &ClusterState,
    direction: Direction,
    name: &str,
    protocol: Option<Protocol>,
    packet: &Packet,
) -> bool {
    let receiver = match direction {
        Direction::Ingress => local(cluster, packet.destination).and_then(|here| cluster.object_of(here)),
        Direction::Egress => who(cluster, packet.destination),
    };
    receiver.is_some_and(|pod| {
        pod.ports.iter().any(|p| {
            *p.name == *name
                && protocol.is_none_or(|wanted| wanted == p.protocol)
                && p.protocol.number() == packet.protocol
                && p.port == packet.port
        })
    })
}

/// The first rule of a tier that decides.
fn tier(cluster: &ClusterState, pod: &Pod, tier: Tier, direction: Direction, packet: &Packet) -> Option<bool> {
    let mut all: Vec<&ClusterNetworkPolicy> = cluster.cluster.values().filter(|p| p.tier == tier).collect();
    all.sort_by(|a, b| (a.priority, &a.meta.object).cmp(&(b.priority, &b.meta.object)));
    for policy in all {
        let labels = cluster.namespace_labels(&pod.meta.object.namespace);
        let subject = match &policy.subject {
            Subject::Namespaces(selector) => selects(selector, &labels),
            Subject::Pods(p) => selects(&p.namespace_selector, &labels) && selects(&p.pod_selector, &pod.meta.labels),
        };
        if !subject {
            continue;
        }
        let decided = match direction {
            Direction::Ingress => {
                policy.ingress.iter().find_map(|r| act(cluster, r, is_cluster_ingress, direction, packet))
            }
            Direction::Egress => {
                policy.egress.iter().find_map(|r| act(cluster, r, is_cluster_egress, direction, packet))
            }
        };
        match decided {
            Some(Action::Accept) => return Some(true),
            Some(Action::Deny) => return Some(false),
            Some(Action::Pass) => return None,
            None => {}
        }
    }
    None
}

/// What a rule does with a packet. What is not understood fails closed: `Accept` matches nothing, the others deny everything.
fn act<P>(
    cluster: &ClusterState,
    rule: &ClusterRule<P>,
    is: fn(&ClusterState, &P, IpAddr) -> Option<bool>,
    direction: Direction,
    packet: &Packet,
) -> Option<Action> {
    let peers: Vec<Option<bool>> = rule.peers.iter().map(|peer| is(cluster, peer, far(direction, packet))).collect();
    let unknown = rule.protocols.contains(&ClusterProtocol::Unknown);
    if peers.is_empty() || peers.contains(&None) || unknown {
        return (rule.action != Action::Accept).then_some(Action::Deny);
    }
    let protocol = rule.protocols.is_empty()
        || rule.protocols.iter().any(|protocol| match protocol {
            ClusterProtocol::Port(p) => {
                p.protocol.number() == packet.protocol
                    && match p.ports {
                        PortMatch::Any => true,
                        PortMatch::One(number) => number == packet.port,
                        PortMatch::Range(first, last) => first <= packet.port && packet.port <= last,
                    }
            }
            ClusterProtocol::NamedPort(name) => serves(cluster, direction, name, None, packet),
            ClusterProtocol::Unknown => false,
        });
    (protocol && peers.contains(&Some(true))).then_some(rule.action)
}

fn is_pod(cluster: &ClusterState, namespaces: &LabelSelector, pods: Option<&LabelSelector>, address: IpAddr) -> bool {
    who(cluster, address).is_some_and(|pod| {
        selects(namespaces, &cluster.namespace_labels(&pod.meta.object.namespace))
            && pods.is_none_or(|selector| selects(selector, &pod.meta.labels))
    })
}

fn is_cluster_ingress(cluster: &ClusterState, peer: &ClusterIngressPeer, address: IpAddr) -> Option<bool> {
    match peer {
        ClusterIngressPeer::Namespaces(selector) => Some(is_pod(cluster, selector, None, address)),
        ClusterIngressPeer::Pods(p) => Some(is_pod(cluster, &p.namespace_selector, Some(&p.pod_selector), address)),
        ClusterIngressPeer::Unknown => None,
    }
}

fn is_cluster_egress(cluster: &ClusterState, peer: &ClusterEgressPeer, address: IpAddr) -> Option<bool> {
    match peer {
        ClusterEgressPeer::Namespaces(selector) => Some(is_pod(cluster, selector, None, address)),
        ClusterEgressPeer::Pods(p) => Some(is_pod(cluster, &p.namespace_selector, Some(&p.pod_selector), address)),
        ClusterEgressPeer::Networks(nets) => Some(nets.iter().any(|net| contains(net, address))),
        ClusterEgressPeer::Nodes(_) | ClusterEgressPeer::DomainNames(_) | ClusterEgressPeer::Unknown => None,
    }
}

fn selects(selector: &LabelSelector, labels: &Labels) -> bool {
    selector.match_labels.iter().all(|(key, value)| labels.get(key).is_some_and(|own| *own == **value))
        && selector.match_expressions.iter().all(|r| {
            let own = labels.get(&r.key);
            match r.operator {
                Operator::Exists => own.is_some(),
                Operator::DoesNotExist => own.is_none(),
                Operator::In => own.is_some_and(|own| r.values.iter().any(|value| **value == *own)),
                // "A pod without the key matches, too."
                Operator::NotIn => own.is_none_or(|own| r.values.iter().all(|value| **value != *own)),
            }
        })
}

/// By arithmetic on the addresses' bits.
fn contains(net: &IpNetwork, address: IpAddr) -> bool {
    match (net, address) {
        (IpNetwork::V4(net), IpAddr::V4(address)) => {
            let differs = u32::from(net.network()) ^ u32::from(address);
            u64::from(differs) >> (32 - net.prefix()) == 0
        }
        (IpNetwork::V6(net), IpAddr::V6(address)) => {
            let differs = u128::from(net.network()) ^ u128::from(address);
            net.prefix() == 0 || differs >> (128 - net.prefix()) == 0
        }
        _ => false,
    }
}
