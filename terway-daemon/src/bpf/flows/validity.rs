//! Whether what an entry was decided by still holds.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;
use std::time::Duration;

use terway_abi::{Flow, MAX_ENDPOINTS, NO_BACKEND, NO_SLOT, flow_flags, same_way};
use terway_core::conntrack::Validity;

use super::{Tables, idle, now, translates};
use crate::bpf::error::BpfError;

/// For so long after its last one, a backend that has gone from its Service may still have an answer on its way: as long as a resolver waits.
const OWED: Duration = Duration::from_secs(5);

/// Epochs, pods and generations as they were when somebody began to look; those of backends are read when they are first asked for.
///
/// An entry that was made since may look void by them. Whoever deletes asks [`Facts::standing_now`].
pub(super) struct Facts<'a> {
    tables: &'a Tables,
    epochs: Vec<u32>,
    /// Slots that pods have.
    pods: HashSet<u32>,
    generations: RefCell<HashMap<u32, u32>>,
}

impl<'a> Facts<'a> {
    pub(super) fn read(tables: &'a Tables) -> Result<Self, BpfError> {
        let mut epochs = vec![0; tables.epochs.capacity() as usize];
        tables.epochs.each(|slot, epoch| {
            if let Some(place) = epochs.get_mut(*slot as usize) {
                *place = *epoch;
            }
            ControlFlow::Continue(())
        })?;
        let mut pods = HashSet::new();
        tables.endpoints.each(|_, endpoint| {
            pods.insert(endpoint.slot);
            ControlFlow::Continue(())
        })?;
        Ok(Self { tables, epochs, pods, generations: RefCell::default() })
    }

    /// By what was read at the beginning.
    pub(super) fn standing<A>(&self, flow: &Flow<A>) -> Result<Validity, BpfError> {
        let epoch = |slot: u32| Ok(self.epochs.get(slot as usize).copied());
        self.judge(flow, epoch, |backend| {
            let known = self.generations.borrow().get(&backend).copied();
            if let Some(generation) = known {
                return Ok(generation);
            }
            let generation = self.generation(backend)?;
            self.generations.borrow_mut().insert(backend, generation);
            Ok(generation)
        })
    }

    /// By what the maps hold at this moment: epochs and generations only ever move on, so an entry, read before, that does not carry
    /// them never will again.
    pub(super) fn standing_now<A>(&self, flow: &Flow<A>) -> Result<Validity, BpfError> {
        self.judge(flow, |slot| self.tables.epochs.get(&slot), |backend| self.generation(backend))
    }

    fn generation(&self, backend: u32) -> Result<u32, BpfError> {
        Ok(self.tables.backends.get(&backend)?.map_or(0, |backend| backend.generation))
    }

    fn judge<A>(
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
            let [side, _] = &flow.sides;
            let answers = translates(flow) && side.flags & flow_flags::REVERSE != 0;
            let owes = answers && idle(side.last_seen, now(self.tables.hz), self.tables.hz) < OWED;
            return Ok(if owes { Validity::Rerouted } else { Validity::Dead });
        }
        for (slot, at) in flow.slots.iter().zip(flow.epochs) {
            // One whose policies have changed is judged again by its next packet, and may go on.
            if epoch(*slot)?.is_some_and(|epoch| same_way(epoch, at)) {
                continue;
            }
            // A slot that no pod has was a pod's that is gone.
            let pod_is_gone = *slot < MAX_ENDPOINTS && !self.pods.contains(slot);
            return Ok(if pod_is_gone { Validity::Dead } else { Validity::Rerouted });
        }
        Ok(Validity::Current)
    }
}
