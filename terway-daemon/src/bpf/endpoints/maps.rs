//! Endpoint maps, written in an order in which no packet ever finds half an endpoint.
//!
//! An endpoint is stored under its interface and under each address, each time whole. A flow is valid while the epoch map holds, at the
//! endpoint's slot, the epoch that the endpoint's value holds. So:
//!
//! * **Adding**: endpoint values with a new epoch first, then that epoch into the slot. A flow decided in between is invalid until the
//!   slot is written, and is decided again.
//! * **Removing**: addresses, then the interface, then the slot gets an epoch that no endpoint has. A flow decided in between
//!   carries the old epoch and becomes invalid with it.
//! * Flows decided while an address was no endpoint's become invalid by the address's bucket of the epoch map, which is raised last in
//!   both cases.
//! * **Policies** are written under the slot, so it is reserved before the endpoint is written, and reused only when the maps hold
//!   nothing of the endpoint's policies ([`Maps::release_slot`]).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use aya::Ebpf;
use aya::maps::{HashMap, MapData, MapError};
use terway_abi::{
    EPOCH_SLOTS, MAX_ENDPOINTS, NO_SLOT, names, next_policy_epoch, next_route_epoch, remote_slot_v4, remote_slot_v6,
    same_route_epoch,
};

use super::Endpoint;
use crate::bpf::address::{word, words};
use crate::bpf::elements::Elements;
use crate::bpf::error::{BpfError, ignore_absent};
use crate::bpf::object::{take, take_elements};

/// The endpoint maps with a mirror of their contents.
///
/// A map is written first and the mirror after it. So a panic in between leaves a mirror that lacks the last write, which is written
/// again; [`Maps::recover`] reads everything anew.
pub(super) struct Maps {
    by_ifindex: HashMap<MapData, u32, terway_abi::Endpoint>,
    by_v4: HashMap<MapData, u32, terway_abi::Endpoint>,
    by_v6: HashMap<MapData, [u32; 4], terway_abi::Endpoint>,
    epochs: Elements<u32, u32>,
    /// Mirror of `by_ifindex`.
    mirror: BTreeMap<u32, terway_abi::Endpoint>,
    /// Free slots; the last one is taken next.
    free: Vec<u32>,
    /// Slots of endpoints to come, by interface.
    reserved: BTreeMap<u32, u32>,
    /// Slots under which policies are written, whether or not there is an endpoint.
    policy_slots: BTreeSet<u32>,
}

impl Maps {
    pub(super) fn open(loaded: &mut Ebpf) -> Result<Self, BpfError> {
        Ok(Self {
            by_ifindex: take(loaded, names::ENDPOINTS)?,
            by_v4: take(loaded, names::ENDPOINTS_V4)?,
            by_v6: take(loaded, names::ENDPOINTS_V6)?,
            epochs: take_elements(loaded, names::EPOCHS)?,
            mirror: BTreeMap::new(),
            free: Vec::new(),
            reserved: BTreeMap::new(),
            policy_slots: BTreeSet::new(),
        })
    }

    /// Reads back what an earlier daemon wrote, and undoes what it left half-done.
    pub(super) fn recover(&mut self) -> Result<(), BpfError> {
        self.mirror = self.by_ifindex.iter().collect::<Result<_, _>>().map_err(BpfError::map(names::ENDPOINTS))?;
        let mut taken: BTreeSet<u32> = self.mirror.values().map(|e| e.slot).collect();
        taken.extend(&self.policy_slots);
        self.free = (NO_SLOT + 1..MAX_ENDPOINTS).rev().filter(|slot| !taken.contains(slot)).collect();

        // An address without its interface: the daemon died within a removal, or within a change of address.
        let v4: Vec<_> = self.by_v4.iter().collect::<Result<_, _>>().map_err(BpfError::map(names::ENDPOINTS_V4))?;
        for (address, owner) in v4 {
            if self.mirror.get(&owner.host_ifindex).is_none_or(|stored| stored.v4 != address) {
                self.forget_v4(address)?;
                self.invalidate_slot(owner.slot)?;
            }
        }
        let v6: Vec<_> = self.by_v6.iter().collect::<Result<_, _>>().map_err(BpfError::map(names::ENDPOINTS_V6))?;
        for (address, owner) in v6 {
            if self.mirror.get(&owner.host_ifindex).is_none_or(|stored| stored.v6 != address) {
                self.forget_v6(address)?;
                self.invalidate_slot(owner.slot)?;
            }
        }
        // An interface whose addresses or epoch are missing: the daemon died while adding or removing it. All others keep their
        // epoch, and with it their flows.
        for stored in self.mirror.clone().into_values() {
            if !self.is_complete(&stored)? {
                self.write(&terway_abi::Endpoint { epoch: next_route_epoch(self.epoch(stored.slot)?), ..stored })?;
            }
        }
        Ok(())
    }

    fn is_complete(&self, stored: &terway_abi::Endpoint) -> Result<bool, BpfError> {
        let owns_v4 = stored.v4 == 0
            || absent(self.by_v4.get(&stored.v4, 0)).map_err(BpfError::map(names::ENDPOINTS_V4))? == Some(*stored);
        let owns_v6 = stored.v6 == [0; 4]
            || absent(self.by_v6.get(&stored.v6, 0)).map_err(BpfError::map(names::ENDPOINTS_V6))? == Some(*stored);
        Ok(owns_v4 && owns_v6 && same_route_epoch(self.epoch(stored.slot)?, stored.epoch))
    }

    /// Complete endpoints as the maps hold them.
    pub(super) fn read(&self) -> Result<Vec<Endpoint>, BpfError> {
        let mut all = Vec::new();
        for entry in self.by_ifindex.iter() {
            let (_, entry) = entry.map_err(BpfError::map(names::ENDPOINTS))?;
            if self.is_complete(&entry)? {
                all.push(Endpoint::from_abi(&entry));
            }
        }
        all.sort_by_key(|endpoint| endpoint.host_ifindex);
        Ok(all)
    }

    pub(super) fn list(&self) -> Vec<Endpoint> {
        self.mirror.values().map(Endpoint::from_abi).collect()
    }

    pub(super) fn upsert(&mut self, endpoint: &Endpoint) -> Result<(), BpfError> {
        let old = self.mirror.get(&endpoint.host_ifindex).copied();
        let (v4, v6) = (endpoint.addresses.v4.map(word), endpoint.addresses.v6.map(words));
        let owners: Vec<u32> = self
            .mirror
            .values()
            .filter(|other| other.host_ifindex != endpoint.host_ifindex)
            .filter(|other| Some(other.v4) == v4 || Some(other.v6) == v6)
            .map(|other| other.host_ifindex)
            .collect();
        for owner in owners {
            tracing::warn!(from = owner, to = endpoint.host_ifindex, "an address moves from one endpoint to another");
            self.remove(owner)?;
        }
        if let Some(old) = old {
            if endpoint.to_abi(old.slot, old.epoch, old.first_epoch) == old {
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
        let epoch = next_route_epoch(self.epoch(slot)?);
        // With other addresses it is another pod to everybody else.
        let same = |old: &terway_abi::Endpoint| Some(old.v4) == v4.or(Some(0)) && Some(old.v6) == v6.or(Some([0; 4]));
        let entry = endpoint.to_abi(slot, epoch, old.filter(same).map_or(epoch, |old| old.first_epoch));
        self.write(&entry)?;
        self.reserved.remove(&endpoint.host_ifindex);
        Ok(())
    }

    /// The slot that an interface's endpoint has, or will have, and whether it has an endpoint already.
    pub(super) fn reserve_slot(&mut self, host_ifindex: u32) -> Result<(u32, bool), BpfError> {
        let (slot, there) = match (self.mirror.get(&host_ifindex), self.reserved.get(&host_ifindex)) {
            (Some(stored), _) => (stored.slot, true),
            (None, Some(reserved)) => (*reserved, false),
            (None, None) => {
                let slot = self.free.pop().ok_or(BpfError::Full(MAX_ENDPOINTS - 1))?;
                self.reserved.insert(host_ifindex, slot);
                (slot, false)
            }
        };
        self.policy_slots.insert(slot);
        Ok((slot, there))
    }

    pub(super) fn cancel_reservation(&mut self, host_ifindex: u32) {
        self.reserved.remove(&host_ifindex);
    }

    pub(super) fn release_slot(&mut self, slot: u32) {
        if self.policy_slots.remove(&slot) {
            self.reserved.retain(|_, reserved| *reserved != slot);
            if !self.mirror.values().any(|stored| stored.slot == slot) {
                self.free.push(slot);
            }
        }
    }

    pub(super) fn slots(&self) -> BTreeSet<u32> {
        self.mirror.values().map(|stored| stored.slot).chain(self.reserved.values().copied()).collect()
    }

    /// The slot of the endpoint that has an address.
    fn slot_of_address(&self, address: IpAddr) -> Option<u32> {
        let has = |stored: &&terway_abi::Endpoint| match address {
            IpAddr::V4(v4) => stored.v4 == word(v4),
            IpAddr::V6(v6) => stored.v6 == words(v6),
        };
        self.mirror.values().find(has).map(|stored| stored.slot)
    }

    /// Makes the policy verdicts of the flows of a slot stale.
    pub(super) fn revalidate_slot(&mut self, slot: u32) -> Result<(), BpfError> {
        let epoch = next_policy_epoch(self.epoch(slot)?);
        self.set_epoch(slot, epoch)
    }

    /// The same for the flows with an address, whether or not it is an endpoint's.
    pub(super) fn revalidate_address(&mut self, address: IpAddr) -> Result<(), BpfError> {
        if let Some(slot) = self.slot_of_address(address) {
            self.revalidate_slot(slot)?;
        }
        self.revalidate_slot(bucket(address))
    }

    /// The same for all flows of endpoints.
    pub(super) fn revalidate_all(&mut self) -> Result<(), BpfError> {
        self.slots().into_iter().try_for_each(|slot| self.revalidate_slot(slot))
    }

    pub(super) fn remove(&mut self, host_ifindex: u32) -> Result<bool, BpfError> {
        self.reserved.remove(&host_ifindex);
        let Some(old) = self.mirror.get(&host_ifindex).copied() else { return Ok(false) };
        if old.v4 != 0 {
            self.forget_v4(old.v4)?;
        }
        if old.v6 != [0; 4] {
            self.forget_v6(old.v6)?;
        }
        ignore_absent(self.by_ifindex.remove(&host_ifindex)).map_err(BpfError::map(names::ENDPOINTS))?;
        self.invalidate_slot(old.slot)?;
        self.mirror.remove(&host_ifindex);
        if !self.policy_slots.contains(&old.slot) {
            self.free.push(old.slot);
        }
        Ok(true)
    }

    /// Writes an endpoint under all its keys, and makes it valid.
    fn write(&mut self, entry: &terway_abi::Endpoint) -> Result<(), BpfError> {
        self.by_ifindex.insert(entry.host_ifindex, entry, 0).map_err(BpfError::map(names::ENDPOINTS))?;
        self.mirror.insert(entry.host_ifindex, *entry);
        if entry.v4 != 0 {
            self.by_v4.insert(entry.v4, entry, 0).map_err(BpfError::map(names::ENDPOINTS_V4))?;
        }
        if entry.v6 != [0; 4] {
            self.by_v6.insert(entry.v6, entry, 0).map_err(BpfError::map(names::ENDPOINTS_V6))?;
        }
        self.set_epoch(entry.slot, entry.epoch)?;
        if entry.v4 != 0 {
            self.invalidate_slot(remote_slot_v4(entry.v4))?;
        }
        if entry.v6 != [0; 4] {
            self.invalidate_slot(remote_slot_v6(entry.v6))?;
        }
        Ok(())
    }

    fn forget_v4(&mut self, address: u32) -> Result<(), BpfError> {
        ignore_absent(self.by_v4.remove(&address)).map_err(BpfError::map(names::ENDPOINTS_V4))?;
        self.invalidate_slot(remote_slot_v4(address))
    }

    fn forget_v6(&mut self, address: [u32; 4]) -> Result<(), BpfError> {
        ignore_absent(self.by_v6.remove(&address)).map_err(BpfError::map(names::ENDPOINTS_V6))?;
        self.invalidate_slot(remote_slot_v6(address))
    }

    /// Invalidates every flow that was decided while its address was no endpoint's.
    pub(super) fn invalidate_unowned(&mut self) -> Result<(), BpfError> {
        (MAX_ENDPOINTS..EPOCH_SLOTS).try_for_each(|slot| self.invalidate_slot(slot))
    }

    /// Invalidates every flow that was decided while one of these addresses was no endpoint's.
    pub(super) fn invalidate_addresses(&mut self, addresses: &[IpAddr]) -> Result<(), BpfError> {
        let slots: BTreeSet<u32> = addresses.iter().map(|address| bucket(*address)).collect();
        let next = |slot: &u32| Ok(next_route_epoch(self.epoch(*slot)?));
        let epochs: Vec<u32> = slots.iter().map(next).collect::<Result<_, BpfError>>()?;
        self.epochs.put_all(&slots.into_iter().collect::<Vec<_>>(), &epochs)
    }

    /// Invalidates every flow that depends on the slot.
    fn invalidate_slot(&mut self, slot: u32) -> Result<(), BpfError> {
        let epoch = next_route_epoch(self.epoch(slot)?);
        self.set_epoch(slot, epoch)
    }

    fn epoch(&self, slot: u32) -> Result<u32, BpfError> {
        Ok(self.epochs.get(&slot)?.unwrap_or_default())
    }

    fn set_epoch(&mut self, slot: u32, epoch: u32) -> Result<(), BpfError> {
        self.epochs.put(&slot, &epoch, 0).map(drop)
    }
}

fn bucket(address: IpAddr) -> u32 {
    match address {
        IpAddr::V4(v4) => remote_slot_v4(word(v4)),
        IpAddr::V6(v6) => remote_slot_v6(words(v6)),
    }
}

fn absent<T>(result: Result<T, MapError>) -> Result<Option<T>, MapError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error),
    }
}
