//! Services in the kernel's maps. What is written when is the caller's plan (`terway_abi`: backends, members, frontend; back for
//! removal); here each write is one atomic step, and the filter follows the frontends.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::ControlFlow;

use aya::Ebpf;
use aya::maps::{Array, HashMap, IterableMap, MapData};
use terway_abi::{
    Backend, Frontend, FrontendKey, FrontendKeyV4, FrontendKeyV6, Member, SCOPE_ADDRESS, SCOPE_NODE, filter_v4,
    filter_v6, frontend_class, names,
};

use crate::bpf::elements::Elements;
use crate::bpf::endpoints::{absent_is_fine, address_v4, address_v6, word, words};
use crate::bpf::error::BpfError;
use crate::bpf::object::take;

/// Where a Service is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FrontendAt {
    /// A port of an address.
    Address {
        /// The address.
        address: IpAddr,
        /// The port.
        port: u16,
        /// IP protocol number.
        protocol: u8,
    },
    /// All other ports of an address, which are refused.
    Rest(IpAddr),
    /// A port of every address of the node, of one family.
    Node {
        /// IPv6, not IPv4.
        v6: bool,
        /// The port.
        port: u16,
        /// IP protocol number.
        protocol: u8,
    },
}

impl FrontendAt {
    /// The address, if it has one.
    #[must_use]
    pub const fn address(&self) -> Option<IpAddr> {
        match self {
            Self::Address { address, .. } | Self::Rest(address) => Some(*address),
            Self::Node { .. } => None,
        }
    }

    fn key(&self) -> Key {
        let (address, class) = match *self {
            Self::Address { address, port, protocol } => {
                (address, frontend_class(port.to_be(), protocol, SCOPE_ADDRESS))
            }
            Self::Rest(address) => (address, 0),
            Self::Node { v6, port, protocol } => {
                let class = frontend_class(port.to_be(), protocol, SCOPE_NODE);
                return if v6 {
                    Key::V6(FrontendKey { address: [0; 4], class })
                } else {
                    Key::V4(FrontendKey { address: 0, class })
                };
            }
        };
        match address {
            IpAddr::V4(v4) => Key::V4(FrontendKey { address: word(v4), class }),
            IpAddr::V6(v6) => Key::V6(FrontendKey { address: words(v6), class }),
        }
    }

    fn from_class(address: IpAddr, class: u32) -> Self {
        let [high, low, protocol, scope] = class.to_ne_bytes();
        let port = u16::from_be_bytes([high, low]);
        if scope == SCOPE_NODE {
            Self::Node { v6: address.is_ipv6(), port, protocol }
        } else if class == 0 {
            Self::Rest(address)
        } else {
            Self::Address { address, port, protocol }
        }
    }
}

enum Key {
    V4(FrontendKeyV4),
    V6(FrontendKeyV6),
}

/// The maps, and which frontends and addresses the filter counts.
pub(in crate::bpf) struct Services {
    v4: HashMap<MapData, FrontendKeyV4, Frontend>,
    v6: HashMap<MapData, FrontendKeyV6, Frontend>,
    filters: Elements<u32, u32>,
    /// The programs are loaded with the number of this very descriptor in their code.
    _filters: Array<MapData, u32>,
    /// The frontends' maps, for many at once.
    many_v4: Elements<FrontendKeyV4, Frontend>,
    many_v6: Elements<FrontendKeyV6, Frontend>,
    members: Array<MapData, Member>,
    backends: Array<MapData, Backend>,
    frontends: BTreeSet<FrontendAt>,
    node: BTreeSet<IpAddr>,
    counts: BTreeMap<u32, u32>,
}

fn bucket(address: IpAddr) -> u32 {
    match address {
        IpAddr::V4(v4) => filter_v4(word(v4)),
        IpAddr::V6(v6) => filter_v6(words(v6)),
    }
}

impl Services {
    /// Takes the maps and reads which frontends an earlier daemon wrote.
    ///
    /// The filter is left as it is until [`Services::set_node_addresses`] has told what else belongs into it.
    pub(in crate::bpf) fn new(loaded: &mut Ebpf) -> Result<Self, BpfError> {
        let v4: HashMap<MapData, FrontendKeyV4, Frontend> = take(loaded, names::FRONTENDS_V4)?;
        let v6: HashMap<MapData, FrontendKeyV6, Frontend> = take(loaded, names::FRONTENDS_V6)?;
        let filters: Array<MapData, u32> = take(loaded, names::FILTERS)?;
        let mut services = Self {
            many_v4: Elements::of(IterableMap::map(&v4), names::FRONTENDS_V4)?,
            many_v6: Elements::of(IterableMap::map(&v6), names::FRONTENDS_V6)?,
            v4,
            v6,
            filters: Elements::of(IterableMap::map(&filters), names::FILTERS)?,
            _filters: filters,
            members: take(loaded, names::MEMBERS)?,
            backends: take(loaded, names::BACKENDS)?,
            frontends: BTreeSet::new(),
            node: BTreeSet::new(),
            counts: BTreeMap::new(),
        };
        for key in services.v4.keys() {
            let key = key.map_err(BpfError::map(names::FRONTENDS_V4))?;
            services.frontends.insert(FrontendAt::from_class(address_v4(key.address).into(), key.class));
        }
        for key in services.v6.keys() {
            let key = key.map_err(BpfError::map(names::FRONTENDS_V6))?;
            services.frontends.insert(FrontendAt::from_class(address_v6(key.address).into(), key.class));
        }
        for address in services.frontends.iter().filter_map(FrontendAt::address) {
            *services.counts.entry(bucket(address)).or_default() += 1;
        }
        Ok(services)
    }

    /// Sets which addresses of the node have NodePorts, and makes the filter right; returns those that changed.
    pub(in crate::bpf) fn set_node_addresses(&mut self, addresses: &[IpAddr]) -> Result<Vec<IpAddr>, BpfError> {
        let wanted: BTreeSet<IpAddr> = addresses.iter().copied().collect();
        let (added, removed): (Vec<_>, Vec<_>) =
            (wanted.difference(&self.node).copied().collect(), self.node.difference(&wanted).copied().collect());
        for address in &added {
            *self.counts.entry(bucket(*address)).or_default() += 1;
        }
        for address in &removed {
            self.uncount(*address);
        }
        self.node = wanted;
        let mut wrong = Vec::new();
        self.filters.each(|number, present| {
            if *present != self.counts.get(number).copied().unwrap_or(0) {
                wrong.push(*number);
            }
            ControlFlow::Continue(())
        })?;
        self.write_counts(&wrong)?;
        Ok(added.into_iter().chain(removed).collect())
    }

    fn uncount(&mut self, address: IpAddr) {
        if let Some(count) = self.counts.get_mut(&bucket(address)) {
            *count = count.saturating_sub(1);
        }
    }

    fn write_counts(&self, buckets: &[u32]) -> Result<(), BpfError> {
        let counts: Vec<u32> = buckets.iter().map(|bucket| self.counts.get(bucket).copied().unwrap_or(0)).collect();
        self.filters.put_all(buckets, &counts)
    }

    /// Writes many frontends, then what the filter says of their addresses; returns the addresses that are new.
    pub(in crate::bpf) fn set_frontends(&mut self, all: &[(FrontendAt, Frontend)]) -> Result<Vec<IpAddr>, BpfError> {
        let (mut keys_v4, mut values_v4, mut keys_v6, mut values_v6) = (vec![], vec![], vec![], vec![]);
        for (at, value) in all {
            match at.key() {
                Key::V4(key) => {
                    keys_v4.push(key);
                    values_v4.push(*value);
                }
                Key::V6(key) => {
                    keys_v6.push(key);
                    values_v6.push(*value);
                }
            }
        }
        self.many_v4.put_all(&keys_v4, &values_v4)?;
        self.many_v6.put_all(&keys_v6, &values_v6)?;
        let mut new = Vec::new();
        for (at, _) in all {
            if self.frontends.insert(*at)
                && let Some(address) = at.address()
            {
                *self.counts.entry(bucket(address)).or_default() += 1;
                new.push(address);
            }
        }
        let buckets: BTreeSet<u32> = new.iter().map(|address| bucket(*address)).collect();
        self.write_counts(&buckets.into_iter().collect::<Vec<_>>())?;
        Ok(new)
    }

    /// Writes a frontend; whether it is a new one.
    pub(in crate::bpf) fn set_frontend(&mut self, at: &FrontendAt, value: &Frontend) -> Result<bool, BpfError> {
        match at.key() {
            Key::V4(key) => self.v4.insert(key, value, 0).map_err(BpfError::map(names::FRONTENDS_V4))?,
            Key::V6(key) => self.v6.insert(key, value, 0).map_err(BpfError::map(names::FRONTENDS_V6))?,
        }
        let new = self.frontends.insert(*at);
        if new && let Some(address) = at.address() {
            *self.counts.entry(bucket(address)).or_default() += 1;
            self.write_counts(&[bucket(address)])?;
        }
        Ok(new)
    }

    /// Removes a frontend; whether there was one.
    pub(in crate::bpf) fn remove_frontend(&mut self, at: &FrontendAt) -> Result<bool, BpfError> {
        match at.key() {
            Key::V4(key) => absent_is_fine(self.v4.remove(&key)).map_err(BpfError::map(names::FRONTENDS_V4))?,
            Key::V6(key) => absent_is_fine(self.v6.remove(&key)).map_err(BpfError::map(names::FRONTENDS_V6))?,
        }
        let old = self.frontends.remove(at);
        if old && let Some(address) = at.address() {
            self.uncount(address);
            self.write_counts(&[bucket(address)])?;
        }
        Ok(old)
    }

    pub(in crate::bpf) fn frontends(&self) -> Vec<FrontendAt> {
        self.frontends.iter().copied().collect()
    }

    pub(in crate::bpf) fn set_members(&mut self, first: u32, members: &[Member]) -> Result<(), BpfError> {
        (first..)
            .zip(members)
            .try_for_each(|(index, member)| self.members.set(index, *member, 0).map_err(BpfError::map(names::MEMBERS)))
    }

    pub(in crate::bpf) fn set_backend(&mut self, number: u32, backend: &Backend) -> Result<(), BpfError> {
        self.backends.set(number, *backend, 0).map_err(BpfError::map(names::BACKENDS))
    }
}
