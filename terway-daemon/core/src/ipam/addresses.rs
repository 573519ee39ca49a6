//! Addresses and prefixes come to an ENI and go back to the cloud: one call at a time per ENI and family.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::config::addresses_per_prefix;
use super::effect::Effect;
use super::ids::OpId;
use super::pool::Pool;
use super::record::{AddressRecord, AssignmentRecord, PrefixRecord, Quarantine, Record, RecordKey};
use super::state::{Assigned, Call, CallKind, SlotState, Timer};
use crate::cidr::Cidr as _;
use crate::clock::Moment;
use crate::cloud::{CloudError, ErrorClass};
use crate::ident::{EniId, Family};

impl Pool {
    /// Asks for `count` more addresses.
    pub(super) fn assign(&mut self, id: &EniId, family: Family, count: u32) {
        let token = self.token();
        let record = AssignmentRecord { token: token.clone(), eni: id.clone(), family, count, prefixes: false };
        self.out.put(Record::Assignment(record));
        self.note_use(id, family, count);
        self.call(id, family, CallKind::Assign { token, count });
    }

    /// Asks for `count` more prefixes.
    pub(super) fn assign_prefixes(&mut self, id: &EniId, family: Family, count: u32) {
        let token = self.token();
        let record = AssignmentRecord { token: token.clone(), eni: id.clone(), family, count, prefixes: true };
        self.out.put(Record::Assignment(record));
        let each = addresses_per_prefix(family);
        self.note_use(id, family, count * each);
        self.call(id, family, CallKind::AssignPrefixes { token, count, each });
    }

    fn note_use(&mut self, id: &EniId, family: Family, count: u32) {
        if let Some(state) = self.enis.get(id).filter(|_| family == Family::V4) {
            self.vswitches.used(&state.vswitch, count);
        }
    }

    pub(super) fn call(&mut self, id: &EniId, family: Family, kind: CallKind) {
        let Some(state) = self.enis.get_mut(id) else { return };
        state.slots_mut(family).call = Some(Call { kind, op: None, failures: 0, error: None, uncertain: false });
        self.retry_call(id, family);
    }

    pub(super) fn retry_call(&mut self, id: &EniId, family: Family) {
        let (ask, release) = (self.may_ask(), self.may_release());
        let fresh = self.op();
        let Some(state) = self.enis.get_mut(id).filter(|state| !state.blocked()) else { return };
        let Some(Call { kind, op: op @ None, .. }) = &mut state.slots_mut(family).call else { return };
        if !(if kind.token().is_some() { ask } else { release }) {
            return;
        }
        *op = Some(fresh);
        let (op, eni) = (fresh, id.clone());
        self.out.effect(match kind.clone() {
            CallKind::Assign { token, count } => Effect::Assign { op, token, eni, family, count },
            CallKind::Unassign { addresses } => Effect::Unassign { op, eni, family, addresses },
            CallKind::AssignPrefixes { token, count, .. } => Effect::AssignPrefixes { op, token, eni, family, count },
            CallKind::UnassignPrefixes { prefixes } => Effect::UnassignPrefixes { op, eni, family, prefixes },
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
        let at = self.retry_at(call.failures);
        if error.class == ErrorClass::Throttled && call.kind.token().is_some() {
            self.assign_block.set(at, error.explain());
        }
        call.error = Some(error);
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

    pub(super) fn assigned(&mut self, op: OpId, id: &EniId, family: Family, result: Result<Assigned, CloudError>) {
        let Some(call) = self.call_reported(op, id, family) else { return };
        let (token, count, prefixes) = match &call.kind {
            CallKind::Assign { token, count } => (token.clone(), *count, false),
            CallKind::AssignPrefixes { token, count, .. } => (token.clone(), *count, true),
            // A report of the wrong kind: the call goes on.
            CallKind::Unassign { .. } | CallKind::UnassignPrefixes { .. } => return self.put_back(id, family, call),
        };
        let error = match result {
            Ok(assigned) => {
                self.out.delete_lazily(RecordKey::Assignment(token));
                self.enter_assigned(id, family, assigned);
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
        self.assign_refused(id, family, count, prefixes, error);
        self.advance_drain(id);
    }

    /// Leaves alone what the refusal speaks of: the vSwitch, the ENI, or the kind of call.
    fn assign_refused(&mut self, id: &EniId, family: Family, count: u32, prefixes: bool, error: CloudError) {
        let mut until = self.now.after(self.config.refusal_backoff);
        let Some(state) = self.enis.get_mut(id) else { return };
        match error.class {
            ErrorClass::VSwitchExhausted if family == Family::V4 => {
                until = self.now.after(self.config.vswitch_backoff);
                let vswitch = state.vswitch.clone();
                if prefixes {
                    self.vswitches.fragmented(&vswitch, count, until);
                } else {
                    self.vswitches.exhausted(&vswitch, count, error, until);
                }
            }
            ErrorClass::Forbidden => self.assign_block.set(until, error.explain()),
            class => {
                state.slots_mut(family).blocked = Some((until, error));
                if matches!(class, ErrorClass::Quota | ErrorClass::NotFound) {
                    // The ENI is not what we take it for.
                    self.take_inventory();
                }
            }
        }
        self.wake(until, Timer::Plan);
    }

    fn put_back(&mut self, id: &EniId, family: Family, call: Call) {
        if let Some(state) = self.enis.get_mut(id) {
            state.slots_mut(family).call = Some(call);
        }
    }

    fn enter_assigned(&mut self, id: &EniId, family: Family, assigned: Assigned) {
        match assigned {
            Assigned::Addresses(addresses) => {
                for address in addresses.into_iter().filter(|address| Family::of(*address) == family) {
                    self.received(id, address);
                }
            }
            Assigned::Prefixes(prefixes) => {
                for prefix in prefixes.into_iter().filter(|prefix| Family::of(prefix.ip()) == family) {
                    self.received_prefix(id, family, prefix);
                }
            }
        }
    }

    fn received(&mut self, id: &EniId, address: IpAddr) {
        let Some(state) = self.enis.get_mut(id) else { return };
        let slots = state.slots_mut(Family::of(address));
        if slots.enter(address, SlotState::Idle) && slots.stale_listings.remove(&address).is_some() {
            // It went and came back at once. A slow copy of the request that gave it away might still arrive.
            // The record that held it back is replaced by the one of its rest.
            self.cool(id, address);
        }
    }

    fn received_prefix(&mut self, id: &EniId, family: Family, prefix: IpNetwork) {
        let Some(state) = self.enis.get_mut(id) else { return };
        let slots = state.slots_mut(family);
        if slots.enter_prefix(prefix, addresses_per_prefix(family))
            && slots.stale_prefix_listings.remove(&prefix).is_some()
        {
            self.out.delete_lazily(RecordKey::Prefix(id.clone(), prefix));
            self.cool_prefix(id, family, prefix);
        }
    }

    /// Starts the rest of all addresses of a prefix: somebody may have had them a moment ago.
    pub(super) fn cool_prefix(&mut self, id: &EniId, family: Family, prefix: IpNetwork) {
        let inside = self.enis.get(id).map(|state| state.slots(family).inside(prefix)).unwrap_or_default();
        for address in inside {
            self.cool(id, address);
        }
    }

    /// Marks idle single addresses as going back; the calls are made by [`Pool::unassign_batch`].
    pub(super) fn mark_releasing(&mut self, id: &EniId, family: Family, addresses: &[IpAddr]) {
        let Some(state) = self.enis.get_mut(id) else { return };
        for address in addresses {
            let idle = state.slots(family).get(*address).is_some_and(|slot| slot.state == SlotState::Idle);
            if !idle || state.is_primary(*address) {
                continue;
            }
            state.slots_mut(family).set(*address, SlotState::Releasing, None);
            let record = AddressRecord { eni: id.clone(), address: *address, quarantine: Quarantine::Releasing };
            self.out.put(Record::Address(record));
        }
    }

    /// Marks a prefix that no pod uses as going back.
    pub(super) fn mark_prefix_releasing(&mut self, id: &EniId, family: Family, prefix: IpNetwork) {
        let Some(state) = self.enis.get_mut(id) else { return };
        if state.slots_mut(family).release_prefix(prefix) {
            let record = PrefixRecord { eni: id.clone(), prefix, quarantine: Quarantine::Releasing };
            self.out.put(Record::Prefix(record));
        }
    }

    /// Starts giving back what is marked for it, where no call is under way.
    pub(super) fn unassign_batch(&mut self, id: &EniId, family: Family) {
        let batch = usize::try_from(self.config.batch.max(1)).unwrap_or(1);
        let Some(state) = self.enis.get(id) else { return };
        let slots = state.slots(family);
        if slots.call.is_some() || !state.attached() {
            return;
        }
        let most = if slots.one_by_one { 1 } else { batch };
        let releasing = slots.prefixes().iter().filter(|(_, prefix)| prefix.releasing);
        let prefixes: Vec<_> = releasing.map(|(prefix, _)| *prefix).take(most).collect();
        if !prefixes.is_empty() {
            return self.call(id, family, CallKind::UnassignPrefixes { prefixes });
        }
        let addresses: Vec<_> = slots.releasing().iter().copied().take(most).collect();
        if !addresses.is_empty() {
            self.call(id, family, CallKind::Unassign { addresses });
        }
    }

    pub(super) fn unassigned(&mut self, op: OpId, id: &EniId, family: Family, result: Result<(), CloudError>) {
        let Some(call) = self.call_reported(op, id, family) else { return };
        let many = match &call.kind {
            CallKind::Unassign { addresses } => addresses.len() > 1,
            CallKind::UnassignPrefixes { prefixes } => prefixes.len() > 1,
            CallKind::Assign { .. } | CallKind::AssignPrefixes { .. } => return self.put_back(id, family, call),
        };
        match result {
            Ok(()) => {}
            Err(error) if error.class == ErrorClass::NotFound => {
                if let Some(state) = self.enis.get_mut(id).filter(|_| many) {
                    // One of them is not there, and the cloud does not say which.
                    state.slots_mut(family).one_by_one = true;
                    return self.advance_drain(id);
                }
            }
            Err(error) => return self.repeat_call(id, family, call, error),
        }
        match call.kind {
            CallKind::Unassign { addresses } => {
                for address in addresses {
                    self.address_unassigned(id, address);
                }
            }
            CallKind::UnassignPrefixes { prefixes } => {
                for prefix in prefixes {
                    self.prefix_unassigned(id, family, prefix);
                }
            }
            CallKind::Assign { .. } | CallKind::AssignPrefixes { .. } => {}
        }
        self.write_eni_lazily(id);
        self.advance_drain(id);
    }

    /// An address is gone. Its record stays a while, so that neither a late list nor a restart takes it for ours.
    pub(super) fn address_unassigned(&mut self, id: &EniId, address: IpAddr) {
        let until = self.now.after(self.config.consistency_window);
        let Some(state) = self.enis.get_mut(id) else { return };
        let slots = state.slots_mut(Family::of(address));
        slots.remove(address);
        slots.stale_listings.insert(address, until);
        slots.one_by_one &= slots.has_releasing();
        self.wake(until, Timer::StaleListing(id.clone(), IpNetwork::from(address)));
    }

    /// A prefix is gone; as [`Pool::address_unassigned`].
    pub(super) fn prefix_unassigned(&mut self, id: &EniId, family: Family, prefix: IpNetwork) {
        let until = self.now.after(self.config.consistency_window);
        let Some(state) = self.enis.get_mut(id) else { return };
        let slots = state.slots_mut(family);
        slots.remove_prefix(prefix);
        slots.stale_prefix_listings.insert(prefix, until);
        slots.one_by_one &= slots.has_releasing();
        self.wake(until, Timer::StaleListing(id.clone(), prefix));
    }

    pub(super) fn stale_listing_expired(&mut self, id: &EniId, what: IpNetwork) {
        let now = self.now;
        let Some(state) = self.enis.get_mut(id) else { return };
        let slots = state.slots_mut(Family::of(what.ip()));
        let expired = |until: &Moment| *until <= now;
        if slots.stale_listings.get(&what.ip()).is_some_and(expired) && what.is_host() {
            slots.stale_listings.remove(&what.ip());
            self.out.delete_lazily(RecordKey::Address(id.clone(), what.ip()));
        } else if slots.stale_prefix_listings.get(&what).is_some_and(expired) {
            slots.stale_prefix_listings.remove(&what);
            self.out.delete_lazily(RecordKey::Prefix(id.clone(), what));
        }
    }
}
