//! Pods in the kernel's maps, written in an order in which no packet ever meets half of one.
//!
//! An endpoint stands under its interface and under each address, each time whole. A flow is valid while the epoch map holds, at the
//! endpoint's slot, the epoch that stands in the endpoint. So:
//!
//! * **Adding**: endpoint values with a new epoch first, then that epoch into the slot. A flow decided in between is void until the
//!   slot is written, and is decided again.
//! * **Removing**: addresses, then the interface, then the slot gets an epoch that no endpoint has. A flow decided in between
//!   carries the old epoch and dies with it.
//! * Flows decided while an address was nobody's die by the address's bucket, which is raised last in both cases.
//! * **Policies** stand under the slot, so it is reserved before the endpoint is written, and given to another only when nothing of the
//!   pod's policies is left ([`Table::release`]).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use aya::Ebpf;
use aya::maps::{Array, HashMap, IterableMap, MapData, MapError};
use terway_abi::{
    MAX_ENDPOINTS, MacPair, NO_SLOT, SLOTS, bucket_v4, bucket_v6, names, next_epoch, next_policy_epoch, same_way,
};
use terway_core::ident::{Addresses, Mac};

use super::elements::Elements;
use super::error::BpfError;
use super::object::take;

/// A pod's interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The host end of its veth.
    pub host_ifindex: u32,
    /// The host end's Ethernet address: what the pod sends to.
    pub host_mac: Mac,
    /// The pod end's Ethernet address.
    pub pod_mac: Mac,
    /// Its addresses.
    pub addresses: Addresses,
    /// The ENI that owns the addresses.
    pub eni_ifindex: u32,
    /// That ENI's IPv4 gateway.
    pub gateway_v4: Option<Ipv4Addr>,
    /// That ENI's IPv6 gateway.
    pub gateway_v6: Option<Ipv6Addr>,
}

pub(super) fn word(address: Ipv4Addr) -> u32 {
    u32::from_ne_bytes(address.octets())
}

pub(super) fn words(address: Ipv6Addr) -> [u32; 4] {
    let bytes = address.octets();
    std::array::from_fn(|i| u32::from_ne_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]]))
}

pub(super) fn address_v4(word: u32) -> Ipv4Addr {
    Ipv4Addr::from(word.to_ne_bytes())
}

pub(super) fn address_v6(words: [u32; 4]) -> Ipv6Addr {
    let mut bytes = [0; 16];
    for (chunk, word) in bytes.chunks_exact_mut(4).zip(words) {
        chunk.copy_from_slice(&word.to_ne_bytes());
    }
    Ipv6Addr::from(bytes)
}

impl Endpoint {
    fn to_abi(self, slot: u32, epoch: u32, since: u32) -> terway_abi::Endpoint {
        terway_abi::Endpoint {
            host_ifindex: self.host_ifindex,
            eni_ifindex: self.eni_ifindex,
            slot,
            epoch,
            flags: 0,
            v4: self.addresses.v4.map_or(0, word),
            v6: self.addresses.v6.map_or([0; 4], words),
            gateway_v4: self.gateway_v4.map_or(0, word),
            gateway_v6: self.gateway_v6.map_or([0; 4], words),
            sent: MacPair::new(self.host_mac.0, self.pod_mac.0),
            received: MacPair::new(self.pod_mac.0, self.host_mac.0),
            since,
            spare: [0; 2],
        }
    }

    fn from_abi(abi: &terway_abi::Endpoint) -> Self {
        Self {
            host_ifindex: abi.host_ifindex,
            host_mac: Mac(abi.sent.destination()),
            pod_mac: Mac(abi.sent.source()),
            addresses: Addresses {
                v4: (abi.v4 != 0).then(|| address_v4(abi.v4)),
                v6: (abi.v6 != [0; 4]).then(|| address_v6(abi.v6)),
            },
            eni_ifindex: abi.eni_ifindex,
            gateway_v4: (abi.gateway_v4 != 0).then(|| address_v4(abi.gateway_v4)),
            gateway_v6: (abi.gateway_v6 != [0; 4]).then(|| address_v6(abi.gateway_v6)),
        }
    }
}

/// The maps, and what is in them.
pub(super) struct Table {
    by_ifindex: HashMap<MapData, u32, terway_abi::Endpoint>,
    by_v4: HashMap<MapData, u32, terway_abi::Endpoint>,
    by_v6: HashMap<MapData, [u32; 4], terway_abi::Endpoint>,
    epochs: Array<MapData, u32>,
    /// The same map, for many at once.
    many: Elements<u32, u32>,
    /// Mirror of `by_ifindex`.
    known: BTreeMap<u32, terway_abi::Endpoint>,
    /// Free slots; the last one is taken next.
    free: Vec<u32>,
    /// Slots of endpoints to come, by interface.
    reserved: BTreeMap<u32, u32>,
    /// Slots that policies stand under, whether or not there is an endpoint.
    held: BTreeSet<u32>,
}

impl Table {
    pub(super) fn new(loaded: &mut Ebpf) -> Result<Self, BpfError> {
        let epochs: Array<MapData, u32> = take(loaded, names::EPOCHS)?;
        Ok(Self {
            by_ifindex: take(loaded, names::ENDPOINTS)?,
            by_v4: take(loaded, names::OWNERS_V4)?,
            by_v6: take(loaded, names::OWNERS_V6)?,
            many: Elements::of(IterableMap::map(&epochs), names::EPOCHS)?,
            epochs,
            known: BTreeMap::new(),
            free: Vec::new(),
            reserved: BTreeMap::new(),
            held: BTreeSet::new(),
        })
    }

    /// Reads back what an earlier daemon wrote, and undoes what it left half-done.
    pub(super) fn recover(&mut self) -> Result<(), BpfError> {
        self.known = self.by_ifindex.iter().collect::<Result<_, _>>().map_err(BpfError::map(names::ENDPOINTS))?;
        let mut taken: BTreeSet<u32> = self.known.values().map(|e| e.slot).collect();
        taken.extend(&self.held);
        self.free = (NO_SLOT + 1..MAX_ENDPOINTS).rev().filter(|slot| !taken.contains(slot)).collect();

        // An address without its interface: the daemon died within a removal, or within a change of address.
        let v4: Vec<_> = self.by_v4.iter().collect::<Result<_, _>>().map_err(BpfError::map(names::OWNERS_V4))?;
        for (address, owner) in v4 {
            if self.known.get(&owner.host_ifindex).is_none_or(|known| known.v4 != address) {
                self.forget_v4(address)?;
                self.void(owner.slot)?;
            }
        }
        let v6: Vec<_> = self.by_v6.iter().collect::<Result<_, _>>().map_err(BpfError::map(names::OWNERS_V6))?;
        for (address, owner) in v6 {
            if self.known.get(&owner.host_ifindex).is_none_or(|known| known.v6 != address) {
                self.forget_v6(address)?;
                self.void(owner.slot)?;
            }
        }
        // An interface whose addresses or epoch are missing: the daemon died while adding or removing it. All others keep their
        // epoch, and with it their flows.
        for known in self.known.clone().into_values() {
            if !self.is_whole(&known)? {
                self.write(&terway_abi::Endpoint { epoch: next_epoch(self.epoch(known.slot)?), ..known })?;
            }
        }
        Ok(())
    }

    fn is_whole(&self, known: &terway_abi::Endpoint) -> Result<bool, BpfError> {
        let owns_v4 = known.v4 == 0
            || absent(self.by_v4.get(&known.v4, 0)).map_err(BpfError::map(names::OWNERS_V4))? == Some(*known);
        let owns_v6 = known.v6 == [0; 4]
            || absent(self.by_v6.get(&known.v6, 0)).map_err(BpfError::map(names::OWNERS_V6))? == Some(*known);
        Ok(owns_v4 && owns_v6 && same_way(self.epoch(known.slot)?, known.epoch))
    }

    /// What is in the maps, as far as it is whole.
    pub(super) fn stored(&self) -> Result<Vec<Endpoint>, BpfError> {
        let mut all = Vec::new();
        for entry in self.by_ifindex.iter() {
            let (_, entry) = entry.map_err(BpfError::map(names::ENDPOINTS))?;
            if self.is_whole(&entry)? {
                all.push(Endpoint::from_abi(&entry));
            }
        }
        all.sort_by_key(|endpoint| endpoint.host_ifindex);
        Ok(all)
    }

    pub(super) fn list(&self) -> Vec<Endpoint> {
        self.known.values().map(Endpoint::from_abi).collect()
    }

    pub(super) fn upsert(&mut self, endpoint: &Endpoint) -> Result<(), BpfError> {
        let old = self.known.get(&endpoint.host_ifindex).copied();
        let (v4, v6) = (endpoint.addresses.v4.map(word), endpoint.addresses.v6.map(words));
        let rivals: Vec<u32> = self
            .known
            .values()
            .filter(|other| other.host_ifindex != endpoint.host_ifindex)
            .filter(|other| Some(other.v4) == v4 || Some(other.v6) == v6)
            .map(|other| other.host_ifindex)
            .collect();
        for rival in rivals {
            tracing::warn!(rival, ifindex = endpoint.host_ifindex, "an address moves from one endpoint to another");
            self.remove(rival)?;
        }
        if let Some(old) = old {
            if endpoint.to_abi(old.slot, old.epoch, old.since) == old {
                return Ok(());
            }
            if old.v4 != 0 && Some(old.v4) != v4 {
                self.forget_v4(old.v4)?;
            }
            if old.v6 != [0; 4] && Some(old.v6) != v6 {
                self.forget_v6(old.v6)?;
            }
        }
        let slot = match (old, self.reserved.get(&endpoint.host_ifindex)) {
            (Some(old), _) => old.slot,
            (None, Some(reserved)) => *reserved,
            (None, None) => self.free.pop().ok_or(BpfError::Full(MAX_ENDPOINTS - 1))?,
        };
        let epoch = next_epoch(self.epoch(slot)?);
        // With other addresses it is another pod to everybody else.
        let same = |old: &terway_abi::Endpoint| Some(old.v4) == v4.or(Some(0)) && Some(old.v6) == v6.or(Some([0; 4]));
        let entry = endpoint.to_abi(slot, epoch, old.filter(same).map_or(epoch, |old| old.since));
        self.write(&entry)?;
        self.reserved.remove(&endpoint.host_ifindex);
        Ok(())
    }

    /// The slot that an interface's endpoint has, or will have, for policies to stand under before there is an endpoint; and whether it
    /// has one already. It is nobody else's until [`Table::release`].
    pub(super) fn reserve(&mut self, host_ifindex: u32) -> Result<(u32, bool), BpfError> {
        let (slot, there) = match (self.known.get(&host_ifindex), self.reserved.get(&host_ifindex)) {
            (Some(known), _) => (known.slot, true),
            (None, Some(reserved)) => (*reserved, false),
            (None, None) => {
                let slot = self.free.pop().ok_or(BpfError::Full(MAX_ENDPOINTS - 1))?;
                self.reserved.insert(host_ifindex, slot);
                (slot, false)
            }
        };
        self.held.insert(slot);
        Ok((slot, there))
    }

    /// The endpoint that the slot was reserved for does not come.
    pub(super) fn unreserve(&mut self, host_ifindex: u32) {
        self.reserved.remove(&host_ifindex);
    }

    /// No policy stands under the slot any more.
    pub(super) fn release(&mut self, slot: u32) {
        if self.held.remove(&slot) {
            self.reserved.retain(|_, reserved| *reserved != slot);
            if !self.known.values().any(|known| known.slot == slot) {
                self.free.push(slot);
            }
        }
    }

    /// Slots of endpoints that are there or to come.
    pub(super) fn slots(&self) -> BTreeSet<u32> {
        self.known.values().map(|known| known.slot).chain(self.reserved.values().copied()).collect()
    }

    /// The slot of the endpoint that has an address.
    fn slot_of_address(&self, address: IpAddr) -> Option<u32> {
        let has = |known: &&terway_abi::Endpoint| match address {
            IpAddr::V4(v4) => known.v4 == word(v4),
            IpAddr::V6(v6) => known.v6 == words(v6),
        };
        self.known.values().find(has).map(|known| known.slot)
    }

    /// Has the flows that depend on a slot judged again.
    pub(super) fn judge_slot(&mut self, slot: u32) -> Result<(), BpfError> {
        let epoch = next_policy_epoch(self.epoch(slot)?);
        self.set_epoch(slot, epoch)
    }

    /// Has the flows with an address judged again, whosever it is.
    pub(super) fn judge_address(&mut self, address: IpAddr) -> Result<(), BpfError> {
        if let Some(slot) = self.slot_of_address(address) {
            self.judge_slot(slot)?;
        }
        self.judge_slot(bucket(address))
    }

    /// Has all flows of pods judged again.
    pub(super) fn judge_all(&mut self) -> Result<(), BpfError> {
        self.slots().into_iter().try_for_each(|slot| self.judge_slot(slot))
    }

    pub(super) fn remove(&mut self, host_ifindex: u32) -> Result<bool, BpfError> {
        self.reserved.remove(&host_ifindex);
        let Some(old) = self.known.get(&host_ifindex).copied() else { return Ok(false) };
        if old.v4 != 0 {
            self.forget_v4(old.v4)?;
        }
        if old.v6 != [0; 4] {
            self.forget_v6(old.v6)?;
        }
        absent_is_fine(self.by_ifindex.remove(&host_ifindex)).map_err(BpfError::map(names::ENDPOINTS))?;
        self.void(old.slot)?;
        self.known.remove(&host_ifindex);
        if !self.held.contains(&old.slot) {
            self.free.push(old.slot);
        }
        Ok(true)
    }

    /// Writes an endpoint under all its keys, and makes it valid.
    fn write(&mut self, entry: &terway_abi::Endpoint) -> Result<(), BpfError> {
        self.by_ifindex.insert(entry.host_ifindex, entry, 0).map_err(BpfError::map(names::ENDPOINTS))?;
        self.known.insert(entry.host_ifindex, *entry);
        if entry.v4 != 0 {
            self.by_v4.insert(entry.v4, entry, 0).map_err(BpfError::map(names::OWNERS_V4))?;
        }
        if entry.v6 != [0; 4] {
            self.by_v6.insert(entry.v6, entry, 0).map_err(BpfError::map(names::OWNERS_V6))?;
        }
        self.set_epoch(entry.slot, entry.epoch)?;
        if entry.v4 != 0 {
            self.void(bucket_v4(entry.v4))?;
        }
        if entry.v6 != [0; 4] {
            self.void(bucket_v6(entry.v6))?;
        }
        Ok(())
    }

    fn forget_v4(&mut self, address: u32) -> Result<(), BpfError> {
        absent_is_fine(self.by_v4.remove(&address)).map_err(BpfError::map(names::OWNERS_V4))?;
        self.void(bucket_v4(address))
    }

    fn forget_v6(&mut self, address: [u32; 4]) -> Result<(), BpfError> {
        absent_is_fine(self.by_v6.remove(&address)).map_err(BpfError::map(names::OWNERS_V6))?;
        self.void(bucket_v6(address))
    }

    /// Voids every flow that was decided while its address was nobody's.
    pub(super) fn void_unowned(&mut self) -> Result<(), BpfError> {
        (MAX_ENDPOINTS..SLOTS).try_for_each(|slot| self.void(slot))
    }

    /// Voids every flow that was decided while this address was nobody's.
    pub(super) fn void_address(&mut self, address: IpAddr) -> Result<(), BpfError> {
        self.void(bucket(address))
    }

    /// The same of many addresses.
    pub(super) fn void_addresses(&mut self, addresses: &[IpAddr]) -> Result<(), BpfError> {
        let slots: BTreeSet<u32> = addresses.iter().map(|address| bucket(*address)).collect();
        let next = |slot: &u32| Ok(next_epoch(self.epoch(*slot)?));
        let epochs: Vec<u32> = slots.iter().map(next).collect::<Result<_, BpfError>>()?;
        self.many.put_all(&slots.into_iter().collect::<Vec<_>>(), &epochs)
    }

    /// Voids every flow that depends on the slot.
    fn void(&mut self, slot: u32) -> Result<(), BpfError> {
        let epoch = next_epoch(self.epoch(slot)?);
        self.set_epoch(slot, epoch)
    }

    pub(super) fn epoch(&self, slot: u32) -> Result<u32, BpfError> {
        self.epochs.get(&slot, 0).map_err(BpfError::map(names::EPOCHS))
    }

    fn set_epoch(&mut self, slot: u32, epoch: u32) -> Result<(), BpfError> {
        self.epochs.set(slot, epoch, 0).map_err(BpfError::map(names::EPOCHS))
    }
}

fn bucket(address: IpAddr) -> u32 {
    match address {
        IpAddr::V4(v4) => bucket_v4(word(v4)),
        IpAddr::V6(v6) => bucket_v6(words(v6)),
    }
}

fn absent<T>(result: Result<T, MapError>) -> Result<Option<T>, MapError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Deleting what is not there is what was wanted.
pub(super) fn absent_is_fine(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}
