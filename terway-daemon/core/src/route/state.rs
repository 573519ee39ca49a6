//! What one network namespace holds, as far as plans speak of it; and what operations do to it.

use std::collections::{BTreeMap, BTreeSet};

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use super::{ALIAS_PREFIX, LINK_GROUP, LINK_GROUP_DELETE, Neighbour, Route, Rule};
use crate::ident::Mac;

/// One interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// Ethernet address, if the link has one.
    pub mac: Option<Mac>,
    /// Bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// `IFLA_GROUP`.
    pub group: u32,
    /// `IFLA_IFALIAS`.
    pub alias: Option<String>,
    /// `IFLA_INFO_KIND`, such as `veth`; none for a NIC.
    pub kind: Option<String>,
    /// Interface index of a veth's other end, in its own namespace.
    pub peer: Option<u32>,
}

impl Link {
    /// Whether we made it: it is a veth, with our group or, should someone have changed that, our alias.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.kind.as_deref() == Some("veth")
            && (matches!(self.group, LINK_GROUP | LINK_GROUP_DELETE)
                || self.alias.as_deref().is_some_and(|alias| alias.starts_with(ALIAS_PREFIX)))
    }
}

/// The tables of one network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelState {
    /// Interfaces by name.
    pub links: BTreeMap<String, Link>,
    /// Addresses with the name of their interface.
    pub addresses: BTreeSet<(String, IpNetwork)>,
    /// Unicast routes of the main table and of the tables from 1000 on.
    pub routes: BTreeSet<Route>,
    /// Rules of exactly the shape that plans use, at their priorities.
    pub rules: BTreeSet<Rule>,
    /// Permanent neighbour entries.
    pub neighbours: BTreeSet<Neighbour>,
    /// Values of the sysctls that were asked for.
    pub sysctls: BTreeMap<String, String>,
}

#[cfg(test)]
pub(super) mod model {
    //! A model of two namespaces, for the properties that plans must have.

    use super::super::{NetOp, Step, StepNetns};
    use super::{KernelState, Link};

    /// A node and one pod.
    #[derive(Clone, Debug, Default, PartialEq, Eq)]
    pub(crate) struct World {
        pub(crate) host: KernelState,
        pub(crate) pod: KernelState,
        next_index: u32,
    }

    impl World {
        fn side(&mut self, netns: StepNetns) -> &mut KernelState {
            match netns {
                StepNetns::Host => &mut self.host,
                StepNetns::Pod => &mut self.pod,
            }
        }

        fn drop_link(&mut self, netns: StepNetns, dev: &str) {
            let side = self.side(netns);
            side.links.remove(dev);
            side.addresses.retain(|(on, _)| on != dev);
            side.routes.retain(|route| route.dev != dev);
            side.neighbours.retain(|neighbour| neighbour.dev != dev);
            side.sysctls.retain(|path, _| !path.split('/').any(|part| part == dev));
        }

        /// Does what the kernel would do; panics where the kernel would refuse.
        pub(crate) fn apply(&mut self, step: &Step) {
            let netns = step.netns;
            match &step.op {
                NetOp::AddVeth { host, pod, mtu, owner } => {
                    let group = super::LINK_GROUP;
                    let (at_host, at_pod) = (self.next_index + 1, self.next_index + 2);
                    self.next_index += 2;
                    let link = |index, peer, mac, alias| Link {
                        index,
                        mac: Some(mac),
                        mtu: *mtu,
                        up: false,
                        group,
                        alias,
                        kind: Some("veth".into()),
                        peer: Some(peer),
                    };
                    let old =
                        self.host.links.insert(host.name.clone(), link(at_host, at_pod, host.mac, Some(owner.clone())));
                    assert!(old.is_none(), "EEXIST {}", host.name);
                    let old = self.pod.links.insert(pod.name.clone(), link(at_pod, at_host, pod.mac, None));
                    assert!(old.is_none(), "EEXIST {}", pod.name);
                }
                NetOp::DelLink { dev, owner } => {
                    let Some(link) = self.side(netns).links.get(dev).cloned() else { return };
                    if link.alias.as_ref() != Some(owner) {
                        return;
                    }
                    self.drop_link(netns, dev);
                    let peer =
                        self.pod.links.iter().find(|(_, l)| Some(l.index) == link.peer).map(|(name, _)| name.clone());
                    if let Some(peer) = peer {
                        self.drop_link(StepNetns::Pod, &peer);
                    }
                }
                NetOp::SetUp { dev } | NetOp::SetDown { dev } => {
                    let up = matches!(step.op, NetOp::SetUp { .. });
                    self.side(netns).links.get_mut(dev).expect("ENODEV").up = up;
                    if !up {
                        self.side(netns).routes.retain(|route| route.dev != *dev);
                    }
                }
                NetOp::SetMac { dev, mac } => self.side(netns).links.get_mut(dev).expect("ENODEV").mac = Some(*mac),
                NetOp::SetMtu { dev, mtu } => self.side(netns).links.get_mut(dev).expect("ENODEV").mtu = *mtu,
                NetOp::NoAddrGen { dev } => assert!(self.side(netns).links.contains_key(dev), "ENODEV {dev}"),
                NetOp::Sysctl { path, value } => {
                    self.side(netns).sysctls.insert(path.clone(), value.clone());
                }
                NetOp::AddAddress { dev, address } => {
                    assert!(self.side(netns).links.contains_key(dev), "ENODEV {dev}");
                    self.side(netns).addresses.insert((dev.clone(), *address));
                }
                NetOp::DelAddress { dev, address } => {
                    self.side(netns).addresses.remove(&(dev.clone(), *address));
                }
                NetOp::AddRoute(route) => {
                    let side = self.side(netns);
                    assert!(side.links.get(&route.dev).expect("ENODEV").up, "ENETDOWN {}", route.dev);
                    side.routes.retain(|old| (old.dst, old.table) != (route.dst, route.table));
                    side.routes.insert(route.clone());
                }
                NetOp::DelRoute(route) => {
                    self.side(netns).routes.remove(route);
                }
                NetOp::AddRule(rule) => {
                    let side = self.side(netns);
                    side.rules.retain(|old| (old.priority, old.selector) != (rule.priority, rule.selector));
                    side.rules.insert(rule.clone());
                }
                NetOp::DelRule(rule) => {
                    self.side(netns).rules.remove(rule);
                }
                NetOp::AddNeighbour(neighbour) => {
                    let side = self.side(netns);
                    assert!(side.links.contains_key(&neighbour.dev), "ENODEV {}", neighbour.dev);
                    side.neighbours.retain(|old| (old.address, &old.dev) != (neighbour.address, &neighbour.dev));
                    side.neighbours.insert(neighbour.clone());
                }
                NetOp::DelNeighbour(neighbour) => {
                    self.side(netns).neighbours.remove(neighbour);
                }
            }
        }
    }
}
