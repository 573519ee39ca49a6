//! Frontend maps, and the filter that tells the programs which addresses are worth a lookup in them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::ControlFlow;

use aya::Ebpf;
use terway_abi::{
    Frontend as AbiFrontend, FrontendKeyV4, FrontendKeyV6, frontend_filter_v4, frontend_filter_v6, names,
};
use terway_core::service::FrontendKey;

use super::convert::{self, AbiKey};
use crate::bpf::address::{address_v4, address_v6, word, words};
use crate::bpf::elements::Elements;
use crate::bpf::error::BpfError;
use crate::bpf::object::take_elements;

/// The frontend maps and the filter.
///
/// A bucket of the filter counts the addresses of frontends, and the node's addresses that have NodePorts, that hash to it.
pub(super) struct FrontendMaps {
    pub(super) v4: Elements<FrontendKeyV4, AbiFrontend>,
    pub(super) v6: Elements<FrontendKeyV6, AbiFrontend>,
    filter: Elements<u32, u32>,
    /// Mirror of the frontend maps.
    mirror: BTreeMap<FrontendKey, AbiFrontend>,
    /// The filter as it follows from the mirror and from the node's addresses.
    filter_counts: BTreeMap<u32, u32>,
    /// Buckets of the filter that are to be written.
    dirty_buckets: BTreeSet<u32>,
    /// The node's addresses that have NodePorts.
    node_addresses: BTreeSet<IpAddr>,
}

/// Result of writing frontends.
pub(super) struct FrontendWrites {
    /// Addresses of frontends that are new.
    pub(super) new: Vec<IpAddr>,
    /// Indices of frontends that the kernel refused.
    pub(super) refused: Vec<(usize, BpfError)>,
}

fn bucket(address: IpAddr) -> u32 {
    match address {
        IpAddr::V4(v4) => frontend_filter_v4(word(v4)),
        IpAddr::V6(v6) => frontend_filter_v6(words(v6)),
    }
}

/// The address that the filter counts for a frontend; none for a port of the node.
fn filtered_address(key: &FrontendKey) -> Option<IpAddr> {
    (!key.is_node()).then_some(key.address)
}

impl FrontendMaps {
    /// Takes the maps and reads which frontends an earlier daemon wrote.
    ///
    /// The filter is left as it is until [`Self::set_node_addresses`] has told what else it has to count.
    pub(super) fn open(loaded: &mut Ebpf) -> Result<Self, BpfError> {
        let mut this = Self::new(
            take_elements(loaded, names::FRONTENDS_V4)?,
            take_elements(loaded, names::FRONTENDS_V6)?,
            take_elements(loaded, names::FRONTEND_FILTER)?,
        );
        this.recover()?;
        Ok(this)
    }

    pub(super) const fn new(
        v4: Elements<FrontendKeyV4, AbiFrontend>,
        v6: Elements<FrontendKeyV6, AbiFrontend>,
        filter: Elements<u32, u32>,
    ) -> Self {
        Self {
            v4,
            v6,
            filter,
            mirror: BTreeMap::new(),
            filter_counts: BTreeMap::new(),
            dirty_buckets: BTreeSet::new(),
            node_addresses: BTreeSet::new(),
        }
    }

    /// Reads the frontends, and counts what the filter has to hold.
    pub(super) fn recover(&mut self) -> Result<(), BpfError> {
        let mirror = &mut self.mirror;
        mirror.clear();
        self.v4.each(|key, value| {
            let address = IpAddr::V4(address_v4(key.address));
            mirror.extend(convert::key_from_abi(address, key.class).map(|key| (key, *value)));
            ControlFlow::Continue(())
        })?;
        self.v6.each(|key, value| {
            let address = IpAddr::V6(address_v6(key.address));
            mirror.extend(convert::key_from_abi(address, key.class).map(|key| (key, *value)));
            ControlFlow::Continue(())
        })?;
        self.filter_counts.clear();
        let addresses = self.mirror.keys().filter_map(filtered_address).chain(self.node_addresses.iter().copied());
        for address in addresses {
            *self.filter_counts.entry(bucket(address)).or_default() += 1;
        }
        Ok(())
    }

    pub(super) fn len(&self) -> usize {
        self.mirror.len()
    }

    pub(super) fn get(&self, key: &FrontendKey) -> Option<&AbiFrontend> {
        self.mirror.get(key)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&FrontendKey, &AbiFrontend)> {
        self.mirror.iter()
    }

    /// Whether a frontend has a flag.
    pub(super) fn any_flag(&self, flag: u32) -> bool {
        self.mirror.values().any(|frontend| frontend.flags & flag != 0)
    }

    /// Sets which addresses of the node have NodePorts, and corrects the filter; the addresses that changed.
    pub(super) fn set_node_addresses(&mut self, addresses: &[IpAddr]) -> Result<Vec<IpAddr>, BpfError> {
        let wanted: BTreeSet<IpAddr> = addresses.iter().copied().collect();
        let added: Vec<_> = wanted.difference(&self.node_addresses).copied().collect();
        let removed: Vec<_> = self.node_addresses.difference(&wanted).copied().collect();
        added.iter().for_each(|address| self.count(*address));
        removed.iter().for_each(|address| self.uncount(*address));
        self.node_addresses = wanted;
        let (counts, dirty) = (&self.filter_counts, &mut self.dirty_buckets);
        self.filter.each(|number, present| {
            if *present != counts.get(number).copied().unwrap_or(0) {
                dirty.insert(*number);
            }
            ControlFlow::Continue(())
        })?;
        self.write_filter()?;
        Ok(added.into_iter().chain(removed).collect())
    }

    fn count(&mut self, address: IpAddr) {
        *self.filter_counts.entry(bucket(address)).or_default() += 1;
        self.dirty_buckets.insert(bucket(address));
    }

    fn uncount(&mut self, address: IpAddr) {
        self.dirty_buckets.insert(bucket(address));
        if let Some(count) = self.filter_counts.get_mut(&bucket(address)) {
            *count = count.saturating_sub(1);
        }
    }

    /// Writes the buckets of the filter that have changed.
    pub(super) fn write_filter(&mut self) -> Result<(), BpfError> {
        let buckets: Vec<u32> = self.dirty_buckets.iter().copied().collect();
        let count = |bucket| self.filter_counts.get(bucket).copied().unwrap_or(0);
        let counts: Vec<u32> = buckets.iter().map(count).collect();
        self.filter.put_all(&buckets, &counts)?;
        self.dirty_buckets.clear();
        Ok(())
    }

    /// Writes frontends. The filter of their addresses is to be written next ([`Self::write_filter`]).
    pub(super) fn put(&mut self, frontends: &[(FrontendKey, AbiFrontend)]) -> FrontendWrites {
        let (mut keys_v4, mut values_v4, mut places_v4) = (vec![], vec![], vec![]);
        let (mut keys_v6, mut values_v6, mut places_v6) = (vec![], vec![], vec![]);
        for (place, (key, value)) in frontends.iter().enumerate() {
            match convert::key_to_abi(key) {
                AbiKey::V4(key) => {
                    keys_v4.push(key);
                    values_v4.push(*value);
                    places_v4.push(place);
                }
                AbiKey::V6(key) => {
                    keys_v6.push(key);
                    values_v6.push(*value);
                    places_v6.push(place);
                }
            }
        }
        let refused_v4 = self.v4.put_each(&keys_v4, &values_v4).into_iter();
        let refused_v6 = self.v6.put_each(&keys_v6, &values_v6).into_iter();
        let refused_v4 = refused_v4.filter_map(|(index, error)| Some((*places_v4.get(index)?, error)));
        let refused_v6 = refused_v6.filter_map(|(index, error)| Some((*places_v6.get(index)?, error)));
        let refused: Vec<(usize, BpfError)> = refused_v4.chain(refused_v6).collect();
        let skipped: BTreeSet<usize> = refused.iter().map(|(place, _)| *place).collect();
        let mut new = Vec::new();
        for (_, (key, value)) in frontends.iter().enumerate().filter(|(place, _)| !skipped.contains(place)) {
            if self.mirror.insert(*key, *value).is_none()
                && let Some(address) = filtered_address(key)
            {
                self.count(address);
                new.push(address);
            }
        }
        FrontendWrites { new, refused }
    }

    /// Removes a frontend, then its address from the filter; whether there was one.
    pub(super) fn remove(&mut self, key: &FrontendKey) -> Result<bool, BpfError> {
        match convert::key_to_abi(key) {
            AbiKey::V4(key) => self.v4.delete(&key)?,
            AbiKey::V6(key) => self.v6.delete(&key)?,
        };
        let existed = self.mirror.remove(key).is_some();
        if existed && let Some(address) = filtered_address(key) {
            self.uncount(address);
            self.write_filter()?;
        }
        Ok(existed)
    }
}
