//! Services in the kernel's maps: the planner's operations as writes, and what the maps hold as the planner's starting point.
//!
//! The planner (`terway_core::service`) has put the operations in an order in which no packet meets half a Service; they are run one by one in that order.
//! Writes of what is there already are left out, so that after a restart only what differs is touched.

pub(super) mod frontends;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{HashMap, Map, MapData, MapError};
use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use terway_abi::{
    Frontend as AbiFrontend, FrontendKeyV4, FrontendKeyV6, Member as AbiMember, Run, SourceRangeV4, SourceRangeV6,
    backend_flags, frontend_flags, names,
};
use terway_core::objects::Protocol;
use terway_core::service::{
    Algorithm, Backend, BackendId, BackendKey, BackendRef, BackendState, Frontend, FrontendKey, FrontendKind,
    MapContents, Op, PortId, RangeAllocator, Selection, Table, TableId,
};

pub use self::frontends::FrontendAt;
use super::elements::Elements;
use super::endpoints::{absent_is_fine, address_v4, address_v6, word, words};
use super::error::BpfError;
use super::policy_maps::fence;

/// How long after the last operation of a plan its operations for later are run. A program runs for microseconds; a second leaves no doubt.
pub const RETIRE_AFTER: Duration = Duration::from_secs(1);

/// After so many entries without a generation no backend follows: numbers are given from 1 up, and those that were used keep a generation.
const NEVER_USED: u32 = 4096;

/// The maps, and what is in them.
pub(super) struct Tables {
    maps: Maps,
    /// Mirrors of the maps.
    known_frontends: BTreeMap<FrontendKey, AbiFrontend>,
    known_backends: Backends,
    known_ranges: BTreeSet<(PortId, IpNetwork)>,
    runs: RangeAllocator,
    placed: BTreeMap<TableId, (Run, Algorithm)>,
    /// Writes to maps so far.
    writes: u64,
}

/// Backends by their ids, which are dense: what was given back is handed out first.
#[derive(Default)]
struct Backends {
    /// Without a generation: none.
    all: Vec<terway_abi::Backend>,
    count: usize,
}

impl Backends {
    fn get(&self, id: u32) -> Option<terway_abi::Backend> {
        self.all.get(id as usize).copied().filter(|backend| backend.generation != 0)
    }

    fn insert(&mut self, id: u32, backend: terway_abi::Backend) {
        let at = id as usize;
        if self.all.len() <= at {
            self.all.resize(at + 1, terway_abi::Backend::default());
        }
        if let Some(place) = self.all.get_mut(at) {
            self.count += usize::from(place.generation == 0);
            *place = backend;
        }
    }

    fn remove(&mut self, id: u32) {
        if let Some(place) = self.all.get_mut(id as usize) {
            self.count -= usize::from(place.generation != 0);
            *place = terway_abi::Backend::default();
        }
    }
}

/// The maps themselves.
struct Maps {
    frontends_v4: HashMap<MapData, FrontendKeyV4, AbiFrontend>,
    frontends_v6: HashMap<MapData, FrontendKeyV6, AbiFrontend>,
    members: Elements<u32, AbiMember>,
    backends: Elements<u32, terway_abi::Backend>,
    loads: Elements<u32, u64>,
    ranges_v4: LpmTrie<MapData, SourceRangeV4, u32>,
    ranges_v6: LpmTrie<MapData, SourceRangeV6, u32>,
}

impl Tables {
    /// Opens the maps under their pins, beside those that write frontends and run programs.
    pub(super) fn open(pins: &Path) -> Result<Self, BpfError> {
        let open = |name| MapData::from_pin(pins.join(name)).map_err(BpfError::map(name));
        Ok(Self::over(Maps {
            frontends_v4: typed(names::FRONTENDS_V4, Map::HashMap(open(names::FRONTENDS_V4)?))?,
            frontends_v6: typed(names::FRONTENDS_V6, Map::HashMap(open(names::FRONTENDS_V6)?))?,
            members: Elements::open(pins, names::MEMBERS)?,
            backends: Elements::open(pins, names::BACKENDS)?,
            loads: Elements::open(pins, names::LOADS)?,
            ranges_v4: typed(names::RANGES_V4, Map::LpmTrie(open(names::RANGES_V4)?))?,
            ranges_v6: typed(names::RANGES_V6, Map::LpmTrie(open(names::RANGES_V6)?))?,
        }))
    }

    fn over(maps: Maps) -> Self {
        Self {
            runs: RangeAllocator::new(maps.members.capacity()),
            maps,
            known_frontends: BTreeMap::new(),
            known_backends: Backends::default(),
            known_ranges: BTreeSet::new(),
            placed: BTreeMap::new(),
            writes: 0,
        }
    }

    /// Reads what an earlier daemon wrote.
    pub(super) fn recover(&mut self) -> Result<MapContents, BpfError> {
        self.read_frontends()?;
        self.read_ranges()?;
        self.known_backends = Backends::default();
        let mut kernel = MapContents { ranges: self.known_ranges.clone(), ..MapContents::default() };
        let mut unused = 0;
        let known = &mut self.known_backends;
        self.maps.backends.each(|index, found| {
            unused = if found.generation == 0 { unused + 1 } else { 0 };
            if unused > NEVER_USED {
                return ControlFlow::Break(());
            }
            kernel.generation = kernel.generation.max(found.generation);
            if let Some(backend) = backend_from(found) {
                known.insert(*index, *found);
                kernel.backends.insert(BackendId(*index), backend);
            }
            ControlFlow::Continue(())
        })?;
        self.runs = RangeAllocator::new(self.maps.members.capacity());
        self.placed.clear();
        let mut tables: BTreeMap<(u32, u32, Algorithm), Selection> = BTreeMap::new();
        let frontends: Vec<_> = self.known_frontends.iter().map(|(key, found)| (*key, *found)).collect();
        for (key, found) in frontends {
            let algorithm = algorithm_of(found.flags);
            let mut side = |run: Run, pass: u32, silent: bool| -> Result<Selection, BpfError> {
                if found.flags & pass != 0 {
                    return Ok(Selection::Pass);
                }
                if run.count == 0 {
                    return Ok(if silent { Selection::Drop } else { Selection::Reject });
                }
                if let Some(known) = tables.get(&(run.first, run.count, algorithm)) {
                    return Ok(*known);
                }
                let selection = self.adopt(run, algorithm, &mut kernel)?;
                tables.insert((run.first, run.count, algorithm), selection);
                Ok(selection)
            };
            let inside = side(found.internal, frontend_flags::EXTERNAL, false)?;
            let silent = found.flags & frontend_flags::SILENT != 0;
            let outside = side(found.external, frontend_flags::INTERNAL, silent)?;
            kernel.frontends.insert(key, frontend_from(key, &found, inside, outside));
        }
        Ok(kernel)
    }

    /// Whether a frontend chooses by load.
    pub(super) fn wants_loads(&self) -> bool {
        self.known_frontends.values().any(|frontend| frontend.flags & frontend_flags::LEAST != 0)
    }

    /// How many frontends and backends the maps hold.
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.known_frontends.len(), self.known_backends.count)
    }

    /// A run that a frontend names becomes a table. One that cannot be right is not adopted: its frontend gets a new one.
    fn adopt(&mut self, run: Run, algorithm: Algorithm, kernel: &mut MapContents) -> Result<Selection, BpfError> {
        if !self.runs.reserve(run.first, run.count) {
            return Ok(Selection::Reject);
        }
        let mut slots = Vec::with_capacity(run.count as usize);
        for index in run.first..run.first + run.count {
            let member = self.maps.members.get(&index)?.unwrap_or_default();
            slots.push(BackendRef { backend: BackendId(member.backend), generation: member.generation });
        }
        let id = TableId(self.placed.len() as u32 + 1);
        self.placed.insert(id, (run, algorithm));
        kernel.tables.insert(id, Arc::new(Table { algorithm, slots }));
        Ok(Selection::Table(id))
    }

    fn read_frontends(&mut self) -> Result<(), BpfError> {
        self.known_frontends.clear();
        for entry in self.maps.frontends_v4.iter() {
            let (key, value) = entry.map_err(BpfError::map(names::FRONTENDS_V4))?;
            let address = IpAddr::V4(address_v4(key.address));
            self.known_frontends.extend(key_from(address, key.class).map(|key| (key, value)));
        }
        for entry in self.maps.frontends_v6.iter() {
            let (key, value) = entry.map_err(BpfError::map(names::FRONTENDS_V6))?;
            let address = IpAddr::V6(address_v6(key.address));
            self.known_frontends.extend(key_from(address, key.class).map(|key| (key, value)));
        }
        Ok(())
    }

    fn read_ranges(&mut self) -> Result<(), BpfError> {
        self.known_ranges.clear();
        for key in self.maps.ranges_v4.keys() {
            let key = key.map_err(BpfError::map(names::RANGES_V4))?;
            let ([service, address], bits) = (key.data(), key.prefix_len().saturating_sub(32));
            let net = Ipv4Network::new(address_v4(address), bits as u8).map(IpNetwork::V4);
            self.known_ranges.extend(net.map(|net| (PortId(service), net)));
        }
        for key in self.maps.ranges_v6.keys() {
            let key = key.map_err(BpfError::map(names::RANGES_V6))?;
            let ([service, a, b, c, d], bits) = (key.data(), key.prefix_len().saturating_sub(32));
            let net = Ipv6Network::new(address_v6([a, b, c, d]), bits as u8).map(IpNetwork::V6);
            self.known_ranges.extend(net.map(|net| (PortId(service), net)));
        }
        Ok(())
    }

    /// RangeAllocator operations in their order, up to the first that fails. Then the maps are to be recovered and the planner to be made anew.
    ///
    /// Operations of one kind that follow each other are one batch, which changes nothing about what a packet can meet: those of one kind
    /// do not depend on each other. Frontends are written by `write`, or removed if there is no value: the filter and the flows of their
    /// addresses go with them.
    pub(super) fn run(&mut self, ops: &[Op], write: &mut WriteFrontends<'_>) -> Result<(), BpfError> {
        for batch in ops.chunk_by(|a, b| std::mem::discriminant(a) == std::mem::discriminant(b)) {
            match batch.first() {
                Some(Op::PutBackend(..)) => self.put_backends(batch)?,
                Some(Op::PutTable(..)) => self.put_tables(batch)?,
                Some(Op::PutFrontend(..)) => self.put_frontends(batch, write)?,
                _ => batch.iter().try_for_each(|op| self.step(op, write))?,
            }
        }
        Ok(())
    }

    fn step(&mut self, op: &Op, write: &mut WriteFrontends<'_>) -> Result<(), BpfError> {
        match op {
            Op::PutBackend(..) | Op::PutTable(..) | Op::PutFrontend(..) | Op::ReleasePort(_) => Ok(()),
            Op::RcuBarrier => {
                fence();
                Ok(())
            }
            Op::InvalidateBackend(id, backend) | Op::RemoveBackend(id, backend) => {
                // Whatever still names this life finds another one.
                let grave =
                    terway_abi::Backend { generation: backend.generation.wrapping_add(1).max(1), ..Default::default() };
                self.known_backends.remove(id.0);
                self.maps.backends.put(&id.0, &grave, 0).map(drop)
            }
            Op::RemoveTable(id) => {
                if let Some((run, _)) = self.placed.remove(id) {
                    self.runs.give_back(run.first, run.count);
                }
                Ok(())
            }
            Op::PutRange(port, net) => self.put_range(*port, *net),
            Op::RemoveRange(port, net) => self.remove_range(*port, *net),
            Op::RemoveFrontend(key) => self.remove_frontend(*key, write),
        }
    }

    fn put_backends(&mut self, batch: &[Op]) -> Result<(), BpfError> {
        let limit = self.maps.backends.capacity();
        let (mut fresh, mut ids, mut entries) = (Vec::new(), Vec::new(), Vec::new());
        for op in batch {
            let Op::PutBackend(id, backend) = op else { continue };
            if id.0 >= limit {
                return Err(BpfError::NoRoom { what: "backends", limit: limit.saturating_sub(1) });
            }
            let (entry, old) = (backend_to(backend), self.known_backends.get(id.0));
            if old == Some(entry) {
                continue;
            }
            if old.is_none() {
                fresh.push(id.0);
            }
            ids.push(id.0);
            entries.push(entry);
        }
        // Nobody counts for a backend before it is written.
        self.maps.loads.put_all(&fresh, &vec![0; fresh.len()])?;
        self.writes += ids.len() as u64;
        self.maps.backends.put_all(&ids, &entries)?;
        ids.into_iter().zip(entries).for_each(|(id, entry)| self.known_backends.insert(id, entry));
        Ok(())
    }

    fn put_tables(&mut self, batch: &[Op]) -> Result<(), BpfError> {
        let (mut places, mut members) = (Vec::new(), Vec::new());
        for op in batch {
            let Op::PutTable(id, table) = op else { continue };
            let count = table.slots.len() as u32;
            let limit = self.maps.members.capacity();
            let first = self.runs.take(count).ok_or(BpfError::NoRoom { what: "slots of backend tables", limit })?;
            self.placed.insert(*id, (Run { first, count }, table.algorithm));
            places.extend(first..first + count);
            let member = |slot: &BackendRef| AbiMember { backend: slot.backend.0, generation: slot.generation };
            members.extend(table.slots.iter().map(member));
        }
        self.writes += places.len() as u64;
        self.maps.members.put_all(&places, &members)
    }

    fn put_range(&mut self, port: PortId, net: IpNetwork) -> Result<(), BpfError> {
        self.writes += 1;
        match net {
            IpNetwork::V4(net) => {
                self.maps.ranges_v4.insert(&range_v4(port, net), 1, 0).map_err(BpfError::map(names::RANGES_V4))
            }
            IpNetwork::V6(net) => {
                self.maps.ranges_v6.insert(&range_v6(port, net), 1, 0).map_err(BpfError::map(names::RANGES_V6))
            }
        }?;
        self.known_ranges.insert((port, net));
        Ok(())
    }

    fn remove_range(&mut self, port: PortId, net: IpNetwork) -> Result<(), BpfError> {
        match net {
            IpNetwork::V4(net) => absent_is_fine(self.maps.ranges_v4.remove(&range_v4(port, net)))
                .map_err(BpfError::map(names::RANGES_V4)),
            IpNetwork::V6(net) => absent_is_fine(self.maps.ranges_v6.remove(&range_v6(port, net)))
                .map_err(BpfError::map(names::RANGES_V6)),
        }?;
        self.known_ranges.remove(&(port, net));
        Ok(())
    }

    fn put_frontends(&mut self, batch: &[Op], write: &mut WriteFrontends<'_>) -> Result<(), BpfError> {
        let (mut keys, mut changes) = (Vec::new(), Vec::new());
        for op in batch {
            let Op::PutFrontend(key, frontend) = op else { continue };
            let entry = frontend_to(frontend, |id| self.placed.get(&id).copied());
            if self.known_frontends.get(key) != Some(&entry) {
                keys.push((*key, entry));
                changes.push((place_of(key), Some(entry)));
            }
        }
        if changes.is_empty() {
            return Ok(());
        }
        self.writes += changes.len() as u64;
        write(&changes)?;
        self.known_frontends.extend(keys);
        Ok(())
    }

    fn remove_frontend(&mut self, key: FrontendKey, write: &mut WriteFrontends<'_>) -> Result<(), BpfError> {
        write(&[(place_of(&key), None)])?;
        self.known_frontends.remove(&key);
        Ok(())
    }
}

/// Writes frontends, or removes those without a value.
pub(super) type WriteFrontends<'a> = dyn FnMut(&[(FrontendAt, Option<AbiFrontend>)]) -> Result<(), BpfError> + 'a;

fn typed<M: TryFrom<Map, Error = MapError>>(name: &'static str, map: Map) -> Result<M, BpfError> {
    M::try_from(map).map_err(BpfError::map(name))
}

fn place_of(key: &FrontendKey) -> FrontendAt {
    let Some(protocol) = key.protocol.map(Protocol::number) else { return FrontendAt::Rest(key.address) };
    if key.is_node() {
        FrontendAt::Node { v6: key.address.is_ipv6(), port: key.port, protocol }
    } else {
        FrontendAt::Address { address: key.address, port: key.port, protocol }
    }
}

fn protocol_of(number: u8) -> Option<Protocol> {
    [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|p| p.number() == number)
}

fn key_from(address: IpAddr, class: u32) -> Option<FrontendKey> {
    let [high, low, protocol, _] = class.to_ne_bytes();
    let port = u16::from_be_bytes([high, low]);
    match protocol {
        0 => Some(FrontendKey::rest(address)),
        number => Some(FrontendKey::new(address, port, protocol_of(number)?)),
    }
}

fn algorithm_of(flags: u32) -> Algorithm {
    match flags {
        _ if flags & frontend_flags::MAGLEV != 0 => Algorithm::Maglev,
        _ if flags & frontend_flags::LEAST != 0 => Algorithm::LeastConnections,
        _ => Algorithm::Random,
    }
}

fn frontend_to(frontend: &Frontend, place: impl Fn(TableId) -> Option<(Run, Algorithm)>) -> AbiFrontend {
    let mut flags = 0;
    let mut side = |selection: Selection, pass: u32, silent: u32| match selection {
        Selection::Table(id) => place(id).map_or(Run::default(), |(run, algorithm)| {
            flags |= match algorithm {
                Algorithm::Random => 0,
                Algorithm::LeastConnections => frontend_flags::LEAST,
                Algorithm::Maglev => frontend_flags::MAGLEV,
            };
            run
        }),
        Selection::Reject => Run::default(),
        Selection::Drop => {
            flags |= silent;
            Run::default()
        }
        Selection::Pass => {
            flags |= pass;
            Run::default()
        }
    };
    let internal = side(frontend.inside, frontend_flags::EXTERNAL, 0);
    let external = side(frontend.outside, frontend_flags::INTERNAL, frontend_flags::SILENT);
    if frontend.check_source {
        flags |= frontend_flags::RANGES;
    }
    if frontend.kind != FrontendKind::ClusterIp && !frontend.masquerade {
        flags |= frontend_flags::LOCAL;
    }
    AbiFrontend { service: frontend.port.0, flags, internal, external, affinity: frontend.affinity_seconds, spare: 0 }
}

/// The kind is not in the map; only whether it is a cluster address makes a difference to what is written.
fn frontend_from(key: FrontendKey, found: &AbiFrontend, inside: Selection, outside: Selection) -> Frontend {
    let local = found.flags & frontend_flags::LOCAL != 0;
    let kind = match outside {
        _ if key.is_node() => FrontendKind::NodePort,
        Selection::Pass if !local => FrontendKind::ClusterIp,
        _ => FrontendKind::LoadBalancer,
    };
    Frontend {
        port: PortId(found.service),
        kind,
        inside,
        outside,
        masquerade: kind != FrontendKind::ClusterIp && !local,
        check_source: found.flags & frontend_flags::RANGES != 0,
        affinity_seconds: found.affinity,
    }
}

fn backend_to(backend: &Backend) -> terway_abi::Backend {
    let (address, family) = match backend.key.address {
        IpAddr::V4(address) => ([word(address), 0, 0, 0], 0),
        IpAddr::V6(address) => (words(address), backend_flags::V6),
    };
    let local = if backend.local { backend_flags::LOCAL } else { 0 };
    let ending = if backend.state == BackendState::Ready { 0 } else { backend_flags::ENDING };
    terway_abi::Backend {
        address,
        port: backend.key.port.to_be(),
        protocol: backend.key.protocol.number(),
        flags: family | local | ending,
        generation: backend.generation,
        spare: [0; 2],
    }
}

/// None where no backend lives. The map does not tell a backend that has fallen silent from one that is leaving; the objects will.
fn backend_from(found: &terway_abi::Backend) -> Option<Backend> {
    let protocol = protocol_of(found.protocol)?;
    let address = if found.flags & backend_flags::V6 != 0 {
        IpAddr::V6(address_v6(found.address))
    } else {
        IpAddr::V4(address_v4(found.address[0]))
    };
    let ending = found.flags & backend_flags::ENDING != 0;
    Some(Backend {
        key: BackendKey { address, port: u16::from_be(found.port), protocol },
        state: if ending { BackendState::Draining } else { BackendState::Ready },
        local: found.flags & backend_flags::LOCAL != 0,
        generation: found.generation,
    })
}

fn range_v4(port: PortId, net: Ipv4Network) -> Key<SourceRangeV4> {
    Key::new(32 + u32::from(net.prefix()), [port.0, word(net.network())])
}

fn range_v6(port: PortId, net: Ipv6Network) -> Key<SourceRangeV6> {
    let [a, b, c, d] = words(net.network());
    Key::new(32 + u32::from(net.prefix()), [port.0, a, b, c, d])
}
