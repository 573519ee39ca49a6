//! Worlds made by dice, what a compiler is told of a world, and the packets that are tried in it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnetwork::IpNetwork;
use terway_core::ident::{Addresses, PodRef};
use terway_core::objects::{
    Action, ClusterEgressPeer, ClusterIngressPeer, ClusterNetworkPolicy, ClusterPort, ClusterProtocol, ClusterRule,
    IntOrString, IpBlock, LabelSelector, Labels, Namespace, NamespacedPod, NetworkPolicy, ObjectMeta, ObjectName,
    Operator, Peer, Phase, Pod, PodPort, PolicyPort, PolicyRule, PortMatch, Protocol, Requirement, Subject, Tier,
};
use terway_core::policy::{Event, Packet};
use terway_oracle::cluster_state::{ClusterState, LocalEndpoint};

use crate::dice::Dice;

pub(crate) const NAMESPACES: [&str; 3] = ["x", "y", "z"];
const NAMES: [&str; 3] = ["a", "b", "c"];
/// Addresses that pods can have, one of each family.
pub(crate) const HOMES: usize = 9;

pub(crate) fn home(n: usize) -> [IpAddr; 2] {
    let last = n as u8 + 1;
    [Ipv4Addr::new(10, 0, 0, last).into(), Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, u16::from(last)).into()]
}

/// Addresses that are nobody's, those of this node first.
pub(crate) fn elsewhere() -> Vec<IpAddr> {
    ["10.0.0.100", "fd00::100", "10.0.0.101", "10.9.9.9", "192.0.2.1", "2001:db8::1"]
        .map(|a| a.parse().unwrap())
        .to_vec()
}

/// What the tests feed to a compiler, and the packets that they try.
pub(crate) trait ClusterInputs {
    /// All that a compiler must be told, in one of the orders it may come in.
    fn events(&self) -> Vec<Event>;

    /// Packets between all addresses, of every protocol, on the ports that some policy names and on some that none does.
    fn packets(&self) -> Vec<Packet>;
}

impl ClusterInputs for ClusterState {
    fn events(&self) -> Vec<Event> {
        let mut all = vec![Event::NodeAddresses(self.node.iter().copied().collect()), Event::Enforce(self.enforce)];
        all.extend(
            self.namespaces.iter().map(|(name, n)| Event::Namespace(Arc::clone(name), Some(Arc::new(n.clone())))),
        );
        all.extend(self.policies.iter().map(|(name, p)| Event::NetworkPolicy(name.clone(), Some(Arc::new(p.clone())))));
        all.extend(
            self.cluster.iter().map(|(name, p)| Event::ClusterNetworkPolicy(name.clone(), Some(Arc::new(p.clone())))),
        );
        all.extend(self.pods.iter().map(|(name, pod)| Event::Pod(name.clone(), Some(Arc::new(pod.clone())))));
        all.extend(self.locals.iter().map(|(slot, local)| attach(*slot, local)));
        all
    }

    fn packets(&self) -> Vec<Packet> {
        let mut addresses: Vec<IpAddr> = (0..HOMES).flat_map(home).chain(elsewhere()).collect();
        addresses.sort_unstable();
        let mut all = Vec::new();
        for source in &addresses {
            for destination in &addresses {
                let local = |address: &IpAddr| self.locals.values().any(|l| l.addresses.contains(address));
                if source.is_ipv4() != destination.is_ipv4() || !(local(source) || local(destination)) {
                    continue;
                }
                let (source, destination) = (*source, *destination);
                for protocol in [6, 17, 132] {
                    all.extend([79, 80, 81, 90].map(|port| Packet { source, destination, protocol, port }));
                }
                all.push(Packet { source, destination, protocol: 1, port: 0 });
            }
        }
        all
    }
}

pub(crate) fn attach(slot: u32, local: &LocalEndpoint) -> Event {
    let mut addresses = Addresses::default();
    for address in &local.addresses {
        match address {
            IpAddr::V4(v4) => addresses.v4 = Some(*v4),
            IpAddr::V6(v6) => addresses.v6 = Some(*v6),
        }
    }
    let pod =
        PodRef { namespace: local.pod.namespace.to_string(), name: local.pod.name.to_string(), uid: local.uid.clone() };
    Event::Attach { slot, pod, addresses }
}

fn meta(namespace: &str, name: &str, labels: Labels, uid: String) -> ObjectMeta {
    ObjectMeta { object: ObjectName::new(namespace, name), uid: uid.into(), labels, ..ObjectMeta::default() }
}

pub(crate) fn labels(dice: &mut Dice) -> Labels {
    let mut pairs: Vec<(&str, &str)> = Vec::new();
    for key in ["app", "role"] {
        if dice.chance(65) {
            pairs.push((key, dice.word(&["1", "2"])));
        }
    }
    pairs.into_iter().collect()
}

pub(crate) fn namespace(dice: &mut Dice, name: &str) -> Namespace {
    Namespace { meta: meta("", name, labels(dice), String::new()) }
}

pub(crate) fn protocol(dice: &mut Dice) -> Protocol {
    *dice.pick(&[Protocol::Tcp, Protocol::Tcp, Protocol::Udp, Protocol::Sctp])
}

pub(crate) fn pod(dice: &mut Dice, name: &ObjectName, uid: usize, homes: &[usize]) -> Pod {
    let host_network = dice.chance(8);
    let ips: Vec<IpAddr> =
        if host_network { elsewhere()[..2].to_vec() } else { homes.iter().flat_map(|n| home(*n)).collect() };
    let ports = dice.some(0, 3, |dice| PodPort {
        name: Arc::from(dice.word(&["", "web", "web", "api"])),
        protocol: protocol(dice),
        port: *dice.pick(&[80, 80, 81]),
        host_port: 0,
        host_ip: None,
    });
    Pod {
        meta: meta(&name.namespace, &name.name, labels(dice), uid.to_string()),
        node: None,
        host_network,
        phase: *dice.pick(&[
            Phase::Running,
            Phase::Running,
            Phase::Running,
            Phase::Pending,
            Phase::Succeeded,
            Phase::Failed,
        ]),
        ips: ips.into(),
        ports: ports.into(),
    }
}

pub(crate) fn pod_name(dice: &mut Dice) -> ObjectName {
    let (namespace, name) = (dice.word(&NAMESPACES), dice.word(&NAMES));
    ObjectName::new(namespace, name)
}

fn selector(dice: &mut Dice) -> LabelSelector {
    let mut selector = LabelSelector::default();
    match dice.below(10) {
        0..=2 => {}
        3..=6 => {
            selector.match_labels = [(dice.word(&["app", "role"]), dice.word(&["1", "2"]))].into_iter().collect();
        }
        _ => {
            let operator = *dice.pick(&[Operator::In, Operator::NotIn, Operator::Exists, Operator::DoesNotExist]);
            let values = match operator {
                Operator::In | Operator::NotIn => dice.some(1, 2, |dice| Arc::from(dice.word(&["1", "2"]))),
                Operator::Exists | Operator::DoesNotExist => Vec::new(),
            };
            let key = Arc::from(dice.word(&["app", "role", "tier"]));
            selector.match_expressions.push(Requirement { key, operator, values });
        }
    }
    selector
}

fn namespace_selector(dice: &mut Dice) -> LabelSelector {
    if dice.chance(20) {
        let name = dice.word(&NAMESPACES);
        return LabelSelector {
            match_labels: [("kubernetes.io/metadata.name", name)].into_iter().collect(),
            ..LabelSelector::default()
        };
    }
    selector(dice)
}

fn net(dice: &mut Dice) -> IpNetwork {
    let fixed =
        ["0.0.0.0/0", "::/0", "10.0.0.0/8", "10.0.0.0/28", "10.0.0.4/30", "fd00::/64", "fd00::4/126", "192.0.2.0/24"];
    if dice.chance(25) {
        let address = home(dice.below(HOMES))[dice.below(2)];
        return IpNetwork::from(address);
    }
    dice.pick(&fixed).parse().unwrap()
}

fn peer(dice: &mut Dice) -> Peer {
    match dice.below(10) {
        0..=2 => Peer { pod_selector: Some(selector(dice)), ..Peer::default() },
        3..=4 => Peer { namespace_selector: Some(namespace_selector(dice)), ..Peer::default() },
        5..=6 => Peer {
            namespace_selector: Some(namespace_selector(dice)),
            pod_selector: Some(selector(dice)),
            ip_block: None,
        },
        // Holes need not lie in their block, nor apart from each other.
        _ => Peer { ip_block: Some(IpBlock { cidr: net(dice), except: dice.some(0, 2, net) }), ..Peer::default() },
    }
}

fn port(dice: &mut Dice) -> PolicyPort {
    let protocol = protocol(dice);
    let (port, end_port) = match dice.below(10) {
        0 => (None, None),
        1..=4 => (Some(IntOrString::Number(*dice.pick(&[80, 81, 90]))), None),
        5 | 6 => (Some(IntOrString::Number(*dice.pick(&[1, 80, 81]))), Some(*dice.pick(&[81, 90, 65535]))),
        _ => (Some(IntOrString::Name(Arc::from(dice.word(&["web", "web", "api", "none"])))), None),
    };
    PolicyPort { protocol, port, end_port }
}

pub(crate) fn policy(dice: &mut Dice, name: &ObjectName) -> NetworkPolicy {
    let rule = |dice: &mut Dice| PolicyRule { peers: dice.some(0, 2, peer), ports: dice.some(0, 2, port) };
    let (isolates_ingress, isolates_egress) = *dice.pick(&[(true, false), (false, true), (true, true)]);
    NetworkPolicy {
        meta: meta(&name.namespace, &name.name, Labels::default(), String::new()),
        pod_selector: selector(dice),
        isolates_ingress,
        isolates_egress,
        ingress: dice.some(0, 2, rule),
        egress: dice.some(0, 2, rule),
    }
}

fn cluster_rule<P>(dice: &mut Dice, peer: impl Fn(&mut Dice) -> P) -> ClusterRule<P> {
    let protocols = dice.some(0, 2, |dice| match dice.below(20) {
        0..=4 => ClusterProtocol::NamedPort(Arc::from(dice.word(&["web", "api", "none"]))),
        5 => ClusterProtocol::Unknown,
        _ => ClusterProtocol::Port(ClusterPort {
            protocol: protocol(dice),
            ports: *dice.pick(&[PortMatch::Any, PortMatch::One(80), PortMatch::One(81), PortMatch::Range(80, 90)]),
        }),
    });
    ClusterRule {
        name: Arc::from(""),
        action: *dice.pick(&[Action::Accept, Action::Deny, Action::Pass]),
        peers: dice.some(1, 2, peer),
        protocols,
    }
}

fn pods(dice: &mut Dice) -> NamespacedPod {
    NamespacedPod { namespace_selector: namespace_selector(dice), pod_selector: selector(dice) }
}

pub(crate) fn cluster_policy(dice: &mut Dice, name: &ObjectName) -> ClusterNetworkPolicy {
    ClusterNetworkPolicy {
        meta: meta("", &name.name, Labels::default(), String::new()),
        tier: *dice.pick(&[Tier::Admin, Tier::Baseline]),
        priority: dice.below(3) as u16,
        subject: if dice.chance(50) {
            Subject::Namespaces(namespace_selector(dice))
        } else {
            Subject::Pods(pods(dice))
        },
        ingress: dice.some(0, 2, |dice| {
            cluster_rule(dice, |dice| match dice.below(20) {
                0..=9 => ClusterIngressPeer::Namespaces(namespace_selector(dice)),
                10..=18 => ClusterIngressPeer::Pods(pods(dice)),
                _ => ClusterIngressPeer::Unknown,
            })
        }),
        egress: dice.some(0, 2, |dice| {
            cluster_rule(dice, |dice| match dice.below(20) {
                0..=5 => ClusterEgressPeer::Namespaces(namespace_selector(dice)),
                6..=11 => ClusterEgressPeer::Pods(pods(dice)),
                12..=17 => ClusterEgressPeer::Networks(dice.some(1, 2, net)),
                18 => ClusterEgressPeer::Nodes(selector(dice)),
                _ => ClusterEgressPeer::Unknown,
            })
        }),
    }
}

/// A world without history.
pub(crate) fn random(dice: &mut Dice) -> ClusterState {
    let mut world = ClusterState { enforce: !dice.chance(3), ..ClusterState::default() };
    world.node.extend(elsewhere().into_iter().take(2));
    for name in NAMESPACES {
        if !dice.chance(8) {
            world.namespaces.insert(Arc::from(name), namespace(dice, name));
        }
    }
    let mut free: Vec<usize> = (0..HOMES).collect();
    for uid in 0..2 + dice.below(5) {
        let name = pod_name(dice);
        if world.pods.contains_key(&name) {
            continue;
        }
        let mine = free.swap_remove(dice.below(free.len()));
        let mut object = pod(dice, &name, uid, &[mine]);
        if dice.chance(55) && !object.host_network {
            let addresses = home(mine).to_vec();
            world.locals.insert(uid as u32 + 1, LocalEndpoint { pod: name.clone(), uid: uid.to_string(), addresses });
            // The node knows the addresses before the status does; now and then it does not know the object at all.
            if dice.chance(30) {
                object.ips = Box::default();
            }
            if dice.chance(5) {
                continue;
            }
        }
        // The address of a pod that has ended is another's already.
        if matches!(object.phase, Phase::Succeeded | Phase::Failed) && !world.locals.contains_key(&(uid as u32 + 1)) {
            free.push(mine);
        }
        world.pods.insert(name, object);
    }
    for n in 0..dice.below(4) {
        let namespace = dice.word(&NAMESPACES);
        let name = ObjectName::new(namespace, &format!("p{n}"));
        world.policies.insert(name.clone(), policy(dice, &name));
    }
    if dice.chance(50) {
        for n in 0..1 + dice.below(3) {
            let name = ObjectName::new("", &format!("c{n}"));
            world.cluster.insert(name.clone(), cluster_policy(dice, &name));
        }
    }
    world
}
