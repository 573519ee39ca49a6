//! Entries of the Service maps as values, and the operations that change them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::sync::Arc;

use ipnetwork::IpNetwork;

use crate::ident::Family;
use crate::objects::{Kind, ObjectKey, ObjectName, Protocol};

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => { $(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u32);
    )* };
}

ids! {
    /// Id of a backend: its index in the map of backends. Never 0.
    BackendId,
    /// Id of a backend table. A table is never changed: other contents are a new table. Never 0.
    TableId,
    /// Id of a Service port or host port: the key of its session affinity and source ranges. Never 0.
    PortId,
}

/// Address, port and protocol of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackendKey {
    /// Address.
    pub address: IpAddr,
    /// Port.
    pub port: u16,
    /// Protocol.
    pub protocol: Protocol,
}

impl fmt::Display for BackendKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", std::net::SocketAddr::new(self.address, self.port), self.protocol)
    }
}

/// The state of a backend, from its endpoint's conditions; worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BackendState {
    /// Neither ready nor serving: TCP connections go on, UDP flows select another backend.
    Unready,
    /// Terminating and serving: existing flows go on.
    Draining,
    /// Ready: it gets new connections.
    Ready,
}

/// An entry of the map of backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Its address, port and protocol.
    pub key: BackendKey,
    /// Its state.
    pub state: BackendState,
    /// Whether it is on this node.
    pub local: bool,
    /// The generation that flows, tables and affinity entries name; those of another generation are invalid.
    ///
    /// It changes when the id is used for another backend, and when a UDP backend becomes unready: UDP has no reset that would tell the client.
    pub generation: u32,
}

/// The load-balancing algorithm: how a slot of a table is selected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Algorithm {
    /// A random slot.
    #[default]
    Random,
    /// Of two random slots the backend with fewer active connections of this node.
    LeastConnections,
    /// Consistent hashing of the client's addresses and ports, the same on every node.
    Maglev,
}

impl Algorithm {
    /// Its name in the annotation.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::LeastConnections => "least-connections",
            Self::Maglev => "maglev",
        }
    }
}

/// Not the name of an algorithm.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is none of random, least-connections and maglev")]
pub struct UnknownAlgorithm(String);

impl FromStr for Algorithm {
    type Err = UnknownAlgorithm;

    fn from_str(text: &str) -> Result<Self, UnknownAlgorithm> {
        [Self::Random, Self::LeastConnections, Self::Maglev]
            .into_iter()
            .find(|algorithm| algorithm.name() == text)
            .ok_or_else(|| UnknownAlgorithm(text.to_owned()))
    }
}

/// A backend table: the slots that a backend is selected from. Never empty.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Table {
    /// How a slot is chosen.
    pub algorithm: Algorithm,
    /// The slots. A backend's weight is the number of its slots.
    pub slots: Vec<BackendRef>,
}

/// A reference to a backend in one generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackendRef {
    /// The backend.
    pub backend: BackendId,
    /// [`Backend::generation`].
    pub generation: u32,
}

/// The address, port and protocol of a frontend, which clients connect to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontendKey {
    /// Address; the unspecified one stands for all addresses that the node has.
    pub address: IpAddr,
    /// Port; 0 for the entry that stands for all ports of an address that have no entry of their own.
    pub port: u16,
    /// Protocol; none for that same entry.
    pub protocol: Option<Protocol>,
}

impl FrontendKey {
    /// One port of an address.
    #[must_use]
    pub const fn new(address: IpAddr, port: u16, protocol: Protocol) -> Self {
        Self { address, port, protocol: Some(protocol) }
    }

    /// A port of whatever address of a family the node has, the loopback address included.
    #[must_use]
    pub const fn node(family: Family, port: u16, protocol: Protocol) -> Self {
        let address = match family {
            Family::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            Family::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        Self::new(address, port, protocol)
    }

    /// Whether it is a port of all of the node's addresses.
    #[must_use]
    pub const fn is_node(&self) -> bool {
        self.address.is_unspecified()
    }

    /// All ports of an address that have no entry of their own.
    #[must_use]
    pub const fn rest(address: IpAddr) -> Self {
        Self { address, port: 0, protocol: None }
    }
}

impl fmt::Display for FrontendKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.protocol {
            Some(protocol) => write!(f, "{}/{protocol}", std::net::SocketAddr::new(self.address, self.port)),
            None => write!(f, "{} (all other ports)", self.address),
        }
    }
}

/// The kind of a frontend. Of two owners of the same frontend the one whose kind is listed first wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FrontendKind {
    /// A Service's address inside the cluster.
    ClusterIp,
    /// A port of the node.
    NodePort,
    /// An address of a load balancer.
    LoadBalancer,
    /// An address that the Service lists.
    ExternalIp,
    /// A port of the node that belongs to one pod.
    HostPort,
}

/// The backend selection of a frontend: what happens to a new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Selection {
    /// A backend is selected from this table.
    Table(TableId),
    /// It is rejected: TCP reset, ICMP port unreachable.
    Reject,
    /// Its packets are dropped and sent again: for load balancers whose health check is about to fail on this node.
    Drop,
    /// The frontend does not apply: the packet is routed as if there were none.
    Pass,
}

/// A frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frontend {
    /// The port of the Service that it belongs to.
    pub port: PortId,
    /// Its kind.
    pub kind: FrontendKind,
    /// For clients on this node: pods and host processes.
    pub internal: Selection,
    /// For external clients: their packets come in by the interfaces of the node.
    pub external: Selection,
    /// Whether connections of external clients to a backend on another node are masqueraded (SNAT to this node).
    pub masquerade: bool,
    /// Whether external clients must be in one of the source ranges of the port; the others are dropped.
    pub check_source: bool,
    /// Session affinity timeout in seconds; 0 = no affinity.
    pub affinity_seconds: u32,
}

/// An operation on the Service maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Writes a backend.
    PutBackend(BackendId, Backend),
    /// Waits for an RCU grace period: no program runs any more that may have read what was replaced.
    RcuBarrier,
    /// Invalidates all flows, tables and affinity entries that name a backend. Its id stays in use until it is removed.
    InvalidateBackend(BackendId, Backend),
    /// Removes a backend. The value identifies the sockets that are to be destroyed.
    RemoveBackend(BackendId, Backend),
    /// Writes a table.
    PutTable(TableId, Arc<Table>),
    /// Removes a table.
    RemoveTable(TableId),
    /// Adds a source range: clients of a CIDR are allowed.
    PutRange(PortId, IpNetwork),
    /// Removes a source range.
    RemoveRange(PortId, IpNetwork),
    /// Writes a frontend.
    PutFrontend(FrontendKey, Frontend),
    /// Removes a frontend.
    RemoveFrontend(FrontendKey),
    /// Releases a port id, which may then be used for another port. Changes no map.
    ReleasePort(PortId),
}

/// A plan: the operations for a change, and what else follows from it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Operations, to be run in this order.
    pub ops: Vec<Op>,
    /// Operations for when no program that started before the last of `ops` runs any more: it may have read a frontend that leads there.
    /// [`super::Planner::execute_retired`] runs them: only then are ids used again.
    pub retire: Vec<Op>,
    /// The entries that `ops` and `retire` replace or remove, as they were planned before; source ranges are left out.
    pub replaced: MapContents,
    /// Errors of objects, one sentence each, for those objects where they have changed; an empty set = none any more.
    pub object_errors: BTreeMap<ObjectKey, BTreeSet<String>>,
    /// Health-check ports that changed: port → Service and its ready endpoints on this node; none = no longer served.
    pub health: BTreeMap<u16, Option<(ObjectName, u32)>>,
}

impl Plan {
    /// Whether there is nothing to write.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.ops.is_empty() && self.retire.is_empty()
    }
}

/// The owner of a frontend: the Kubernetes object that it comes from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Owner {
    /// A Service.
    Service(ObjectName),
    /// A pod with host ports.
    Pod(ObjectName),
}

impl Owner {
    /// The object.
    #[must_use]
    pub fn object(&self) -> ObjectKey {
        match self {
            Self::Service(name) => ObjectKey { kind: Kind::Service, name: name.clone() },
            Self::Pod(name) => ObjectKey { kind: Kind::Pod, name: name.clone() },
        }
    }
}

/// The contents of the Service maps: as planned so far, or as read from the kernel when the daemon starts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MapContents {
    /// Backends.
    pub backends: BTreeMap<BackendId, Backend>,
    /// Tables.
    pub tables: BTreeMap<TableId, Arc<Table>>,
    /// Source ranges.
    pub ranges: BTreeSet<(PortId, IpNetwork)>,
    /// Frontends.
    pub frontends: BTreeMap<FrontendKey, Frontend>,
    /// The highest generation that any backend has or had.
    pub generation: u32,
}

impl MapContents {
    /// Applies an operation.
    pub fn apply(&mut self, op: &Op) {
        match op {
            Op::PutBackend(id, backend) => {
                self.generation = self.generation.max(backend.generation);
                self.backends.insert(*id, *backend);
            }
            Op::InvalidateBackend(id, _) | Op::RemoveBackend(id, _) => drop(self.backends.remove(id)),
            Op::PutTable(id, table) => drop(self.tables.insert(*id, Arc::clone(table))),
            Op::RemoveTable(id) => drop(self.tables.remove(id)),
            Op::PutRange(port, net) => drop(self.ranges.insert((*port, *net))),
            Op::RemoveRange(port, net) => drop(self.ranges.remove(&(*port, *net))),
            Op::PutFrontend(key, frontend) => drop(self.frontends.insert(*key, *frontend)),
            Op::RemoveFrontend(key) => drop(self.frontends.remove(key)),
            Op::RcuBarrier | Op::ReleasePort(_) => {}
        }
    }
}
