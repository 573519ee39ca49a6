//! Validity of flow entries: whether the epochs and the backend generation that an entry was decided by are still current.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;
use std::time::Duration;

use terway_abi::{Flow, MAX_ENDPOINTS, NO_BACKEND, NO_SLOT, flow_flags, same_route_epoch};
use terway_core::conntrack::Validity;

use super::{FlowTables, has_nat, idle, now};
use crate::bpf::error::BpfError;

/// Replies may still be in flight after a backend is removed: so long after the last reply its entry is kept. DNS resolvers wait as long
/// (`timeout` of resolv.conf(5)).
const REPLY_GRACE_PERIOD: Duration = Duration::from_secs(5);

/// Snapshot of the epochs and of the endpoints' slots, taken before a flow table is read. Backend generations are read on first use.
///
/// An entry that was created after the snapshot may look invalid by it. Before a deletion, ask [`ValiditySnapshot::validity_now`].
pub(super) struct ValiditySnapshot<'a> {
    tables: &'a FlowTables,
    epochs: Vec<u32>,
    /// Slots of endpoints.
    endpoint_slots: HashSet<u32>,
    generations: RefCell<HashMap<u32, u32>>,
}

impl<'a> ValiditySnapshot<'a> {
    pub(super) fn read(tables: &'a FlowTables) -> Result<Self, BpfError> {
        let mut epochs = vec![0; tables.epochs.capacity() as usize];
        tables.epochs.each(|slot, epoch| {
            if let Some(place) = epochs.get_mut(*slot as usize) {
                *place = *epoch;
            }
            ControlFlow::Continue(())
        })?;
        let mut endpoint_slots = HashSet::new();
        tables.endpoints.each(|_, endpoint| {
            endpoint_slots.insert(endpoint.slot);
            ControlFlow::Continue(())
        })?;
        Ok(Self { tables, epochs, endpoint_slots, generations: RefCell::default() })
    }

    /// The validity of an entry by this snapshot.
    pub(super) fn validity<A>(&self, flow: &Flow<A>) -> Result<Validity, BpfError> {
        let epoch = |slot: u32| Ok(self.epochs.get(slot as usize).copied());
        self.check(flow, epoch, |backend| {
            let known = self.generations.borrow().get(&backend).copied();
            if let Some(generation) = known {
                return Ok(generation);
            }
            let generation = self.generation(backend)?;
            self.generations.borrow_mut().insert(backend, generation);
            Ok(generation)
        })
    }

    /// The validity of an entry by what the maps hold now. Epochs and generations only ever increase, so an entry that is found invalid
    /// never becomes valid again.
    pub(super) fn validity_now<A>(&self, flow: &Flow<A>) -> Result<Validity, BpfError> {
        self.check(flow, |slot| self.tables.epochs.get(&slot), |backend| self.generation(backend))
    }

    fn generation(&self, backend: u32) -> Result<u32, BpfError> {
        Ok(self.tables.backends.get(&backend)?.map_or(0, |backend| backend.generation))
    }

    fn check<A>(
        &self,
        flow: &Flow<A>,
        epoch: impl Fn(u32) -> Result<Option<u32>, BpfError>,
        generation: impl Fn(u32) -> Result<u32, BpfError>,
    ) -> Result<Validity, BpfError> {
        let [source, _] = flow.slots;
        if source == NO_SLOT {
            return Ok(Validity::Dead);
        }
        if flow.backend != NO_BACKEND && generation(flow.backend)? != flow.generation {
            let [side, _] = &flow.directions;
            let is_reply = has_nat(flow) && side.flags & flow_flags::REPLY != 0;
            let in_flight = is_reply && idle(side.last_seen, now(self.tables.hz), self.tables.hz) < REPLY_GRACE_PERIOD;
            return Ok(if in_flight { Validity::Rerouted } else { Validity::Dead });
        }
        for (slot, at) in flow.slots.iter().zip(flow.epochs) {
            // Where only policies have changed, the next packet is checked again and may pass: the entry is not invalid.
            if epoch(*slot)?.is_some_and(|epoch| same_route_epoch(epoch, at)) {
                continue;
            }
            // A slot without an endpoint was that of an endpoint that is removed.
            let endpoint_is_removed = *slot < MAX_ENDPOINTS && !self.endpoint_slots.contains(slot);
            return Ok(if endpoint_is_removed { Validity::Dead } else { Validity::Rerouted });
        }
        Ok(Validity::Current)
    }
}
