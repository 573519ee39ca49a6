//! What the datapath's maps hold for Services, and the operations that change it.

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
    /// A backend, for as long as it lives. Never 0.
    BackendId,
    /// A table. Its contents never change; a change is a new table. Never 0.
    TableId,
    /// A port of a Service, or a host port of a pod, with all its frontends: what session affinity and source ranges are kept by. Never 0.
    PortId,
}

/// Where a backend is.
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

/// What a backend is good for, worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BackendState {
    /// It does not answer, by its own word: connections go on, exchanges of datagrams must choose anew.
    Unready,
    /// It is on its way out and still answers: what goes on, goes on.
    Draining,
    /// New clients are welcome.
    Ready,
}

/// A backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Where it is.
    pub key: BackendKey,
    /// What it is good for.
    pub state: BackendState,
    /// Whether it is on this node.
    pub local: bool,
    /// A flow to this backend lives only as long as the generation that it was made in.
    ///
    /// It changes when the id gets another owner, and when a UDP backend stops answering: datagrams have no reset that would tell the client.
    pub generation: u32,
}

/// How a slot of a table is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Algorithm {
    /// Any slot, each time another.
    #[default]
    Random,
    /// Of two slots the backend with fewer connections of this node.
    LeastConnections,
    /// The slot that the client's addresses and ports hash to; the same on every node.
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

/// What a backend is drawn from. Never empty.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Table {
    /// How a slot is chosen.
    pub algorithm: Algorithm,
    /// The slots. Weights are in how often a backend stands node.
    pub slots: Vec<BackendRef>,
}

/// A backend in one of its lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackendRef {
    /// Which.
    pub backend: BackendId,
    /// [`Backend::generation`].
    pub generation: u32,
}

/// What clients talk to.
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

/// Why an address is served. Where two Services claim the same frontend, the kind that stands first wins.
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

/// What happens to a new client of a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Selection {
    /// It gets a backend from this table.
    Table(TableId),
    /// It is told at once that nobody listens: TCP reset, ICMP port unreachable.
    Reject,
    /// It hears nothing, and tries again: for load balancers that are about to notice that this node has no backend.
    Drop,
    /// The frontend is not for it: the packet goes on as if the frontend were not there.
    Pass,
}

/// A frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frontend {
    /// The port of the Service that it belongs to.
    pub port: PortId,
    /// Why it is served.
    pub kind: FrontendKind,
    /// For clients on this node: its pods and its own processes.
    pub inside: Selection,
    /// For clients whose packets come in by the node's interfaces.
    pub outside: Selection,
    /// Whether clients from outside appear to a backend on another node with this node's address, so that the reply comes back node.
    pub masquerade: bool,
    /// Whether clients from outside must be in one of the port's source ranges; the others are dropped.
    pub check_source: bool,
    /// How long a client stays with its backend, in seconds; 0 = no affinity.
    pub affinity_seconds: u32,
}

/// One operation on the maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Writes a backend.
    PutBackend(BackendId, Backend),
    /// Waits until no program runs that may have read what stood there before.
    RcuBarrier,
    /// Voids whatever leads to a backend, whose id stays taken until it is removed.
    InvalidateBackend(BackendId, Backend),
    /// Takes a backend away. The last value tells whose sockets are to be destroyed.
    RemoveBackend(BackendId, Backend),
    /// Writes a table.
    PutTable(TableId, Arc<Table>),
    /// Takes a table away.
    RemoveTable(TableId),
    /// Allows clients of a block.
    PutRange(PortId, IpNetwork),
    /// Takes that back.
    RemoveRange(PortId, IpNetwork),
    /// Writes a frontend.
    PutFrontend(FrontendKey, Frontend),
    /// Takes a frontend away.
    RemoveFrontend(FrontendKey),
    /// The port is gone, and its id will be another's: nothing in the maps, but a chance to forget what is kept by it.
    ReleasePort(PortId),
}

/// What is to be done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Operations, to be run in this order.
    pub ops: Vec<Op>,
    /// Operations for when no program that started before the last of `ops` runs any more: it may have read a frontend that leads there.
    /// [`super::Planner::execute_retired`] runs them: only then are ids used again.
    pub retire: Vec<Op>,
    /// The entries that `ops` and `retire` replace or remove, as they were planned before; source ranges are left out.
    pub replaced: MapContents,
    /// What is wrong with objects, one sentence each, for those objects where that has changed; none = nothing is wrong any more.
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

/// Who a frontend belongs to.
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

/// What the maps hold. Kept by the planner as what it has planned so far; read from the kernel when the daemon starts.
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
    /// Does what the operation says.
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
