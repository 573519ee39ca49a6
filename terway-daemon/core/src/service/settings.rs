//! What the node is, and what its administrator set.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use super::model::Algorithm;
use crate::ident::Family;
use crate::objects::{AddressKind, Node};

/// Switches for all Services of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Whether pods that talk to an external address of a Service get a backend at once, rather than a detour over the load balancer
    /// (`in_cluster_loadbalance`).
    pub in_cluster_loadbalance: bool,
    /// Whether node ports answer on the loopback address too, for the node's own processes.
    pub loopback: bool,
    /// How a backend is chosen where a Service says nothing.
    pub algorithm: Algorithm,
    /// Slots of a Maglev table; a prime. Grows for Services with so many backends that the shares would be uneven.
    pub maglev_size: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self { in_cluster_loadbalance: true, loopback: true, algorithm: Algorithm::Random, maglev_size: 1021 }
    }
}

/// What the daemon knows of its node without asking Kubernetes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// The node's name in Kubernetes.
    pub name: Arc<str>,
    /// Its zone, for as long as no Node object tells.
    pub zone: Option<Arc<str>>,
    /// Addresses of its own interfaces on which node ports are served.
    pub addresses: Vec<IpAddr>,
}

/// The node as the rules see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Here {
    pub(super) name: Arc<str>,
    pub(super) zone: Option<Arc<str>>,
    /// Where node ports are served.
    pub(super) addresses: Vec<IpAddr>,
}

impl Here {
    pub(super) fn new(facts: &NodeFacts, node: Option<&Node>, settings: &Settings) -> Self {
        let told = node.into_iter().flat_map(|n| &n.addresses);
        let told = told.filter(|(kind, _)| *kind != AddressKind::Name).map(|(_, address)| *address);
        let mut addresses: BTreeSet<IpAddr> = facts.addresses.iter().copied().chain(told).collect();
        addresses.retain(|address| !address.is_unspecified() && !address.is_multicast());
        if settings.loopback {
            let has = |family| addresses.iter().any(|a| Family::of(*a) == family);
            let loopbacks =
                [(Family::V4, IpAddr::V4(Ipv4Addr::LOCALHOST)), (Family::V6, IpAddr::V6(Ipv6Addr::LOCALHOST))];
            let own: Vec<_> =
                loopbacks.into_iter().filter(|(family, _)| has(*family)).map(|(_, address)| address).collect();
            addresses.extend(own);
        }
        Self {
            name: Arc::clone(&facts.name),
            zone: node.and_then(Node::zone).map(Arc::from).or_else(|| facts.zone.clone()),
            addresses: addresses.into_iter().collect(),
        }
    }
}
