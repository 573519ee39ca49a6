//! One operation on the kernel's tables, its opposite, and its message.

use std::fmt;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use super::{RULE_FROM_POD, RULE_TO_POD, TABLE_MAIN};
use crate::ident::{Family, Mac};

/// The network namespace that a step happens in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StepNetns {
    /// The pod's.
    Pod,
    /// The node's.
    Host,
}

/// An operation and where it happens.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Step {
    /// Where.
    pub netns: StepNetns,
    /// What.
    pub op: NetOp,
}

impl Step {
    /// A step in the node's namespace.
    #[must_use]
    pub const fn host(op: NetOp) -> Self {
        Self { netns: StepNetns::Host, op }
    }

    /// A step in the pod's namespace.
    #[must_use]
    pub const fn pod(op: NetOp) -> Self {
        Self { netns: StepNetns::Pod, op }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.netns {
            StepNetns::Pod => write!(f, "pod: {}", self.op),
            StepNetns::Host => write!(f, "host: {}", self.op),
        }
    }
}

/// One end of a veth pair.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct VethEnd {
    /// Interface name.
    pub name: String,
    /// Ethernet address, always given: one that the kernel drew would be rewritten by udev.
    pub mac: Mac,
}

/// How far a route's destination is (`rtm_scope`). IPv6 has no such thing and the kernel ignores it there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Behind a gateway.
    #[default]
    Global,
    /// On the link.
    Link,
}

/// A unicast route through one interface.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Route {
    /// Destination; a prefix of length 0 is the default route.
    pub dst: IpNetwork,
    /// The next hop, if it is not the destination itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub via: Option<IpAddr>,
    /// Name of the outgoing interface.
    pub dev: String,
    /// Table number.
    pub table: u32,
    /// The next hop is on the link although no address of the interface says so.
    #[serde(default)]
    pub onlink: bool,
    /// Scope.
    #[serde(default)]
    pub scope: Scope,
    /// Source address for packets of the host itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefsrc: Option<IpAddr>,
}

impl Route {
    /// `dst dev … scope link` in the main table.
    #[must_use]
    pub fn link(dst: IpNetwork, dev: &str) -> Self {
        Self {
            dst,
            via: None,
            dev: dev.to_owned(),
            table: TABLE_MAIN,
            onlink: false,
            scope: Scope::Link,
            prefsrc: None,
        }
    }

    /// `dst via … dev … onlink`.
    #[must_use]
    pub fn via(dst: IpNetwork, via: IpAddr, dev: &str, table: u32) -> Self {
        Self { dst, via: Some(via), dev: dev.to_owned(), table, onlink: true, scope: Scope::Global, prefsrc: None }
    }

    /// Whether packets go the same way by both routes, whatever flags each was written with.
    #[must_use]
    pub fn is_equivalent(&self, other: &Self) -> bool {
        (self.dst, self.via, self.table, &self.dev) == (other.dst, other.via, other.table, &other.dev)
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "route {}", self.dst)?;
        if let Some(via) = self.via {
            write!(f, " via {via}")?;
        }
        write!(f, " dev {}", self.dev)?;
        if self.table != TABLE_MAIN {
            write!(f, " table {}", self.table)?;
        }
        if self.onlink {
            f.write_str(" onlink")?;
        }
        if self.scope == Scope::Link {
            f.write_str(" scope link")?;
        }
        self.prefsrc.map_or(Ok(()), |src| write!(f, " src {src}"))
    }
}

/// Which packets a rule is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Selector {
    /// Packets to these addresses.
    To(IpNetwork),
    /// Packets from these addresses.
    From(IpNetwork),
}

impl Selector {
    /// The addresses, on whichever side.
    #[must_use]
    pub const fn net(self) -> IpNetwork {
        match self {
            Self::To(net) | Self::From(net) => net,
        }
    }
}

/// A routing rule: packets of the selector look in this table.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Rule {
    /// Lower numbers are asked first.
    pub priority: u32,
    /// Which packets.
    pub selector: Selector,
    /// Which table.
    pub table: u32,
}

impl Rule {
    /// `to <address> lookup main`.
    #[must_use]
    pub fn to_pod(address: IpAddr) -> Self {
        Self { priority: RULE_TO_POD, selector: Selector::To(IpNetwork::from(address)), table: TABLE_MAIN }
    }

    /// `from <address> lookup <table>`.
    #[must_use]
    pub fn from_pod(address: IpAddr, table: u32) -> Self {
        Self { priority: RULE_FROM_POD, selector: Selector::From(IpNetwork::from(address)), table }
    }

    /// The family of packets it is for.
    #[must_use]
    pub fn family(&self) -> Family {
        Family::of(self.selector.net().ip())
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, net) = match self.selector {
            Selector::To(net) => ("to", net),
            Selector::From(net) => ("from", net),
        };
        write!(f, "rule {}: {word} {net} lookup ", self.priority)?;
        if self.table == TABLE_MAIN { f.write_str("main") } else { write!(f, "{}", self.table) }
    }
}

/// A permanent neighbour entry.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Neighbour {
    /// Address on the link.
    pub address: IpAddr,
    /// Its Ethernet address.
    pub mac: Mac,
    /// Name of the interface.
    pub dev: String,
}

impl fmt::Display for Neighbour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "neighbour {} lladdr {} dev {} permanent", self.address, self.mac, self.dev)
    }
}

/// One operation. Each is idempotent as executed: doing it when it is done already is success.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetOp {
    /// Creates a veth pair, both ends down, with one end in either namespace and [`super::LINK_GROUP`] on both.
    AddVeth {
        /// The end in the node's namespace.
        host: VethEnd,
        /// The end in the pod's namespace.
        pod: VethEnd,
        /// MTU of both ends in bytes.
        mtu: u32,
        /// Alias that the host end gets, see [`super::alias`].
        owner: String,
    },
    /// Deletes a link, and with it its peer, if its alias is `owner`.
    DelLink {
        /// Interface name.
        dev: String,
        /// The alias it must have.
        owner: String,
    },
    /// Sets a link's Ethernet address.
    SetMac {
        /// Interface name.
        dev: String,
        /// Ethernet address.
        mac: Mac,
    },
    /// Sets a link's MTU.
    SetMtu {
        /// Interface name.
        dev: String,
        /// Bytes.
        mtu: u32,
    },
    /// Stops the kernel from making an IPv6 link-local address (`addr_gen_mode none`) when the link comes up.
    NoAddrGen {
        /// Interface name.
        dev: String,
    },
    /// Brings a link up.
    SetUp {
        /// Interface name.
        dev: String,
    },
    /// Brings a link down.
    SetDown {
        /// Interface name.
        dev: String,
    },
    /// Writes a sysctl. There is no way back: what stood there before is not known.
    Sysctl {
        /// Below `/proc/sys`, with slashes.
        path: String,
        /// What is written.
        value: String,
    },
    /// Adds an address, without duplicate address detection: the cloud has assigned it to one owner.
    AddAddress {
        /// Interface name.
        dev: String,
        /// Address and prefix length.
        address: IpNetwork,
    },
    /// Removes an address.
    DelAddress {
        /// Interface name.
        dev: String,
        /// Address and prefix length.
        address: IpNetwork,
    },
    /// Adds a route, in place of one to the same destination in the same table.
    AddRoute(Route),
    /// Removes a route.
    DelRoute(Route),
    /// Adds a rule, in place of one with the same priority and selector.
    AddRule(Rule),
    /// Removes a rule.
    DelRule(Rule),
    /// Adds a permanent neighbour entry, in place of one for the same address.
    AddNeighbour(Neighbour),
    /// Removes a neighbour entry.
    DelNeighbour(Neighbour),
}

impl NetOp {
    /// The operation that takes this one back; `None` for what goes away with its link, or stays.
    #[must_use]
    pub fn inverse(&self) -> Option<Self> {
        Some(match self {
            Self::AddVeth { host, owner, .. } => Self::DelLink { dev: host.name.clone(), owner: owner.clone() },
            Self::SetUp { dev } => Self::SetDown { dev: dev.clone() },
            Self::AddAddress { dev, address } => Self::DelAddress { dev: dev.clone(), address: *address },
            Self::AddRoute(route) => Self::DelRoute(route.clone()),
            Self::AddRule(rule) => Self::DelRule(rule.clone()),
            Self::AddNeighbour(neighbour) => Self::DelNeighbour(neighbour.clone()),
            Self::DelLink { .. }
            | Self::SetMac { .. }
            | Self::SetMtu { .. }
            | Self::NoAddrGen { .. }
            | Self::SetDown { .. }
            | Self::Sysctl { .. }
            | Self::DelAddress { .. }
            | Self::DelRoute(_)
            | Self::DelRule(_)
            | Self::DelNeighbour(_) => return None,
        })
    }
}

impl fmt::Display for NetOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddVeth { host, pod, mtu, .. } => write!(
                f,
                "add veth {} ({}) with peer {} ({}) in the pod, mtu {mtu}",
                host.name, host.mac, pod.name, pod.mac
            ),
            Self::DelLink { dev, owner } => write!(f, "delete link {dev} of {owner}"),
            Self::SetMac { dev, mac } => write!(f, "set {dev} address {mac}"),
            Self::SetMtu { dev, mtu } => write!(f, "set {dev} mtu {mtu}"),
            Self::NoAddrGen { dev } => write!(f, "set {dev} addrgenmode none"),
            Self::SetUp { dev } => write!(f, "set {dev} up"),
            Self::SetDown { dev } => write!(f, "set {dev} down"),
            Self::Sysctl { path, value } => write!(f, "sysctl {path} = {value}"),
            Self::AddAddress { dev, address } => write!(f, "add address {address} dev {dev}"),
            Self::DelAddress { dev, address } => write!(f, "delete address {address} dev {dev}"),
            Self::AddRoute(route) => write!(f, "add {route}"),
            Self::DelRoute(route) => write!(f, "delete {route}"),
            Self::AddRule(rule) => write!(f, "add {rule}"),
            Self::DelRule(rule) => write!(f, "delete {rule}"),
            Self::AddNeighbour(neighbour) => write!(f, "add {neighbour}"),
            Self::DelNeighbour(neighbour) => write!(f, "delete {neighbour}"),
        }
    }
}
