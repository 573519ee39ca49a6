//! Addresses come to an ENI and go back to the cloud: one call at a time per ENI and family.

use std::net::IpAddr;

use super::effect::Effect;
use super::event::OpId;
use super::pool::{Pool, Timer};
use super::record::{AddressRecord, AssignmentRecord, Hold, Record, RecordKey};
use super::slot::{Call, CallKind, SlotState};
use crate::cloud::{CloudError, ErrorClass};
use crate::ident::{EniId, Family};

impl Pool {
    /// Asks for `count` more addresses.
    pub(super) fn assign(&mut self, id: &EniId, family: Family, count: u32) {
        let token = self.token();
        let record = AssignmentRecord { token: token.clone(), eni: id.clone(), family, count };
        self.out.put(Record::Assignment(record));
        self.call(id, family, CallKind::Assign { token, count });
    }

    pub(super) fn call(&mut self, id: &EniId, family: Family, kind: CallKind) {
        let Some(state) = self.enis.get_mut(id) else { return };
        state.slots_mut(family).call = Some(Call { kind, op: None, failures: 0, error: None, uncertain: false });
        self.retry_call(id, family);
    }

    pub(super) fn retry_call(&mut self, id: &EniId, family: Family) {
        let fresh = self.op();
        let Some(state) = self.enis.get_mut(id) else { return };
        let Some(Call { kind, op: op @ None, .. }) = &mut state.slots_mut(family).call else { return };
        *op = Some(fresh);
        let (op, eni) = (fresh, id.clone());
        self.out.effect(match kind.clone() {
            CallKind::Assign { token, count } => Effect::Assign { op, token, eni, family, count },
            CallKind::Unassign { addresses } => Effect::Unassign { op, eni, family, addresses },
        });
    }

    /// Ends the call that waits for this very report, for the time being: a repetition puts it back.
    fn call_reported(&mut self, op: OpId, id: &EniId, family: Family) -> Option<Call> {
        let now = self.now;
        let slots = self.enis.get_mut(id)?.slots_mut(family);
        let call = slots.call.take_if(|call| call.op == Some(op))?;
        slots.changed = Some(now);
        Some(call)
    }

    fn repeat_call(&mut self, id: &EniId, family: Family, mut call: Call, error: CloudError) {
        call.op = None;
        call.failures += 1;
        call.uncertain |= error.class == ErrorClass::Unknown;
        call.error = Some(error);
        let at = self.retry_at(call.failures);
        if let Some(state) = self.enis.get_mut(id) {
            state.slots_mut(family).call = Some(call);
        }
        self.wake(at, Timer::Call(id.clone(), family));
    }

    fn write_eni_lazily(&mut self, id: &EniId) {
        if let Some(state) = self.enis.get(id) {
            self.out.put_lazily(Record::Eni(state.record()));
        }
    }

    pub(super) fn assigned(&mut self, op: OpId, id: &EniId, family: Family, result: Result<Vec<IpAddr>, CloudError>) {
        let Some(call) = self.call_reported(op, id, family) else { return };
        let CallKind::Assign { token, count } = &call.kind else {
            // A report of the wrong kind: the call goes on.
            return self.put_back(id, family, call);
        };
        let (token, count) = (token.clone(), *count);
        let error = match result {
            Ok(addresses) => {
                self.out.delete_lazily(RecordKey::Assignment(token));
                for address in addresses.into_iter().filter(|address| Family::of(*address) == family) {
                    self.received(id, address);
                }
                self.write_eni_lazily(id);
                return self.advance_drain(id);
            }
            Err(error) => error,
        };
        match error.class {
            ErrorClass::Throttled | ErrorClass::Unknown | ErrorClass::InvalidState => {
                return self.repeat_call(id, family, call, error);
            }
            // The cloud turned us away at the door, so this says nothing about an earlier attempt.
            ErrorClass::Forbidden if call.uncertain => return self.repeat_call(id, family, call, error),
            _ => {}
        }
        // Lost in a crash, the call is repeated: at worst there are addresses more, which are used or given back.
        self.out.delete_lazily(RecordKey::Assignment(token));
        let Some(state) = self.enis.get_mut(id) else { return };
        let until = if error.class == ErrorClass::VSwitchExhausted && family == Family::V4 {
            let vswitch = state.vswitch.clone();
            self.vswitches.exhausted(&vswitch, count, error, self.now)
        } else {
            let until = self.now.after(self.config.refusal_rest);
            let doubtful = matches!(error.class, ErrorClass::Quota | ErrorClass::NotFound);
            state.slots_mut(family).blocked = Some((until, error));
            if doubtful {
                // The ENI is not what we take it for.
                self.take_inventory();
            }
            until
        };
        self.wake(until, Timer::Plan);
        self.advance_drain(id);
    }

    fn put_back(&mut self, id: &EniId, family: Family, call: Call) {
        if let Some(state) = self.enis.get_mut(id) {
            state.slots_mut(family).call = Some(call);
        }
    }

    fn received(&mut self, id: &EniId, address: IpAddr) {
        let Some(state) = self.enis.get_mut(id) else { return };
        let slots = state.slots_mut(Family::of(address));
        if slots.enter(address, SlotState::Idle) && slots.ghosts.remove(&address).is_some() {
            // It went and came back at once. A slow copy of the request that gave it away might still arrive.
            // The record that held it back is replaced by the one of its rest.
            self.cool(id, address);
        }
    }

    /// Marks idle addresses as going back; the calls are made by [`Pool::give_back`].
    pub(super) fn retire(&mut self, id: &EniId, family: Family, addresses: &[IpAddr]) {
        let Some(state) = self.enis.get_mut(id) else { return };
        for address in addresses {
            let idle = state.slots(family).get(*address).is_some_and(|slot| slot.state == SlotState::Idle);
            if !idle || state.is_primary(*address) {
                continue;
            }
            state.slots_mut(family).set(*address, SlotState::Releasing, None);
            let record = AddressRecord { eni: id.clone(), address: *address, hold: Hold::Releasing };
            self.out.put(Record::Address(record));
        }
    }

    /// Starts giving back what is marked for it, where no call is under way.
    pub(super) fn give_back(&mut self, id: &EniId, family: Family) {
        let batch = usize::try_from(self.config.batch.max(1)).unwrap_or(1);
        let Some(state) = self.enis.get(id) else { return };
        let slots = state.slots(family);
        if slots.call.is_some() || slots.releasing().is_empty() || !state.attached() {
            return;
        }
        let addresses = slots.releasing().iter().copied().take(if slots.one_by_one { 1 } else { batch }).collect();
        self.call(id, family, CallKind::Unassign { addresses });
    }

    pub(super) fn unassigned(&mut self, op: OpId, id: &EniId, family: Family, result: Result<(), CloudError>) {
        let Some(call) = self.call_reported(op, id, family) else { return };
        let CallKind::Unassign { addresses } = &call.kind else { return self.put_back(id, family, call) };
        let gone = match result {
            Ok(()) => true,
            Err(error) if error.class == ErrorClass::NotFound => {
                if addresses.len() > 1
                    && let Some(state) = self.enis.get_mut(id)
                {
                    // One of them is not there, and the cloud does not say which.
                    state.slots_mut(family).one_by_one = true;
                }
                addresses.len() == 1
            }
            Err(error) => return self.repeat_call(id, family, call, error),
        };
        if gone {
            for address in addresses {
                self.gave_back(id, *address);
            }
            self.write_eni_lazily(id);
        }
        self.advance_drain(id);
    }

    /// An address is gone. Its record stays a while, so that neither a late list nor a restart takes it for ours.
    pub(super) fn gave_back(&mut self, id: &EniId, address: IpAddr) {
        let until = self.now.after(self.config.settle);
        let Some(state) = self.enis.get_mut(id) else { return };
        let slots = state.slots_mut(Family::of(address));
        slots.remove(address);
        slots.ghosts.insert(address, until);
        slots.one_by_one &= !slots.releasing().is_empty();
        self.wake(until, Timer::Ghost(id.clone(), address));
    }

    pub(super) fn ghost_faded(&mut self, id: &EniId, address: IpAddr) {
        let Some(state) = self.enis.get_mut(id) else { return };
        let ghosts = &mut state.slots_mut(Family::of(address)).ghosts;
        if ghosts.get(&address).is_some_and(|until| *until <= self.now) {
            ghosts.remove(&address);
            self.out.delete_lazily(RecordKey::Address(id.clone(), address));
        }
    }
}
