//! The life of an ENI: created, attached, configured, and the way back.

use super::TOKEN_TAG;
use super::config::addresses_per_prefix;
use super::effect::Effect;
use super::ids::{ClientToken, OpId};
use super::lease::Nic;
use super::pool::Pool;
use super::record::{CreationRecord, Record, RecordKey};
use super::state::{
    Creation, CreationFailure, EniContents, EniState, SlotState, Stage, Timer, listed_addresses, listed_prefixes,
};
use crate::clock::Moment;
use crate::cloud::{CloudError, Eni, EniStatus, ErrorClass, Subnet};
use crate::errors::Error;
use crate::ident::{EniId, Family, VSwitchId};

impl Pool {
    /// Whether an ENI is attached to this instance and working, by the cloud's word.
    pub(super) fn is_ours(&self, eni: &Eni) -> bool {
        eni.status == EniStatus::InUse && eni.instance.as_ref() == Some(&self.config.instance)
    }

    /// Asks for an ENI with so much on it.
    pub(super) fn create_eni(&mut self, vswitch: VSwitchId, with: EniContents) {
        let EniContents { v4, v6, v4_prefixes, v6_prefixes } = with;
        let token = self.token();
        self.vswitches.used(&vswitch, v4 + v4_prefixes * addresses_per_prefix(Family::V4));
        let mut tags = self.config.new_tags();
        tags.insert(TOKEN_TAG.to_owned(), token.0.clone());
        let record = CreationRecord {
            token: token.clone(),
            vswitch,
            security_groups: self.config.security_groups.clone(),
            v4,
            v6,
            v4_prefixes,
            v6_prefixes,
            resource_group: self.config.resource_group.clone(),
            tags,
        };
        self.out.put(Record::Creation(record.clone()));
        self.creations.insert(Creation::new(record));
        self.retry_creation(&token);
    }

    pub(super) fn retry_creation(&mut self, token: &ClientToken) {
        if !self.may_ask() {
            return;
        }
        let op = self.op();
        let Some(record) = self.creations.get_mut(token).and_then(|creation| creation.begin(op)) else { return };
        let CreationRecord { token, vswitch, security_groups, v4, v6, v4_prefixes, v6_prefixes, .. } = record;
        let CreationRecord { resource_group, tags, .. } = record;
        self.out.effect(Effect::CreateEni {
            op,
            token,
            vswitch,
            security_groups,
            v4,
            v6,
            v4_prefixes,
            v6_prefixes,
            resource_group,
            tags,
        });
    }

    pub(super) fn eni_created(&mut self, report: OpId, result: Result<Eni, CloudError>) {
        let recheck_at = self.now.after(self.config.consistency_window);
        let Some(creation) = self.creations.by_op(report) else { return };
        let record = creation.record().clone();
        let token = record.token.clone();
        let error = match result {
            Ok(eni) => {
                self.creations.remove(&token);
                self.out.delete(RecordKey::Creation(token));
                self.enter_created(&eni);
                return self.retry_eni(&eni.id);
            }
            Err(error) => error,
        };
        match creation.failed(&error, recheck_at) {
            CreationFailure::Retry(failures) => {
                let at = self.retry_at(failures);
                if error.class == ErrorClass::Throttled {
                    self.creations.block(at, error.explain());
                }
                self.wake(at, Timer::Creation(token));
            }
            CreationFailure::Recheck => {
                self.wake(recheck_at, Timer::Creation(token));
                self.creation_refused(record, error);
            }
            CreationFailure::Refused => {
                self.creations.remove(&token);
                // Lost in a crash, the call is repeated: at worst there is one more ENI, which is used or given back.
                self.out.delete_lazily(RecordKey::Creation(token));
                self.creation_refused(record, error);
            }
        }
    }

    fn creation_refused(&mut self, record: CreationRecord, error: CloudError) {
        if error.class == ErrorClass::VSwitchExhausted {
            let until = self.now.after(self.config.vswitch_backoff);
            let CreationRecord { vswitch, v4, v4_prefixes, .. } = record;
            if v4_prefixes > 0 {
                // Even the primary address may be what is missing; then the next attempt without prefixes says so.
                self.vswitches.fragmented(&vswitch, v4_prefixes, until);
            } else {
                self.vswitches.exhausted(&vswitch, v4, error, until);
            }
            self.wake(until, Timer::Plan);
        } else {
            let until = self.now.after(self.config.refusal_backoff);
            self.block_creation(error.explain(), until);
        }
    }

    fn block_creation(&mut self, error: Error, until: Moment) {
        self.creations.block(until, error);
        self.wake(until, Timer::Plan);
    }

    /// Takes in an ENI that was created for this pool.
    pub(super) fn enter_created(&mut self, eni: &Eni) {
        if !self.enis.contains_key(&eni.id) {
            let attached = self.is_ours(eni);
            self.enter(eni, if attached { Stage::Configuring } else { Stage::Attaching });
        }
    }

    /// Enters an ENI with its addresses, all of them idle.
    pub(super) fn enter(&mut self, eni: &Eni, stage: Stage) {
        let mut state = EniState::from_cloud(eni, stage);
        for address in listed_addresses(eni) {
            state.slots_mut(Family::of(address)).enter(address, SlotState::Idle);
        }
        for prefix in listed_prefixes(eni) {
            let family = Family::of(prefix.ip());
            state.slots_mut(family).enter_prefix(prefix, addresses_per_prefix(family));
        }
        state.changed = Some(self.now);
        state.mismatch = self.mismatch(&state).map(|mismatch| (mismatch, self.now));
        self.out.put(Record::Eni(state.record()));
        self.inventory.claim(&eni.id);
        self.enis.insert(eni.id.clone(), state);
    }

    /// Orders the step of its life that an ENI is at, if none is under way.
    pub(super) fn retry_eni(&mut self, id: &EniId) {
        let (ask, release) = (self.may_ask(), self.may_release());
        let op = self.op();
        let Some(state) = self.enis.get_mut(id).filter(|state| state.op.is_none()) else { return };
        let may = match state.stage {
            Stage::Attaching => ask,
            Stage::Configuring | Stage::InUse => true,
            Stage::Detaching | Stage::Deleting => release,
        };
        if !may {
            return;
        }
        let eni = id.clone();
        let effect = match state.stage {
            Stage::Attaching => Effect::AttachEni { op, eni },
            Stage::Configuring => Effect::ConfigureNic { op, eni, mac: state.mac },
            Stage::InUse => return,
            Stage::Detaching => Effect::Detach { op, eni },
            Stage::Deleting => Effect::Delete { op, eni },
        };
        state.op = Some(op);
        self.out.effect(effect);
    }

    /// The ENI that waits for this very report.
    fn reported(&mut self, op: OpId, id: &EniId, stage: Stage) -> Option<&mut EniState> {
        let state = self.enis.get_mut(id).filter(|s| s.op == Some(op) && s.stage == stage)?;
        state.op = None;
        Some(state)
    }

    /// Moves an ENI on to the next step of its life.
    pub(super) fn proceed(&mut self, id: &EniId, stage: Stage) {
        let Some(state) = self.enis.get_mut(id) else { return };
        state.stage = stage;
        state.failures = 0;
        state.error = None;
        state.changed = Some(self.now);
        let record = Record::Eni(state.record());
        // What cannot be taken back is written first; the way up can be found again.
        if matches!(stage, Stage::Detaching | Stage::Deleting) {
            self.out.put(record);
        } else {
            self.out.put_lazily(record);
        }
        self.retry_eni(id);
    }

    fn fail(&mut self, id: &EniId, error: Error) {
        let Some(state) = self.enis.get_mut(id) else { return };
        state.failures += 1;
        state.error = Some(error);
        let failures = state.failures;
        let at = self.retry_at(failures);
        self.wake(at, Timer::Eni(id.clone()));
    }

    fn fail_by_cloud(&mut self, id: &EniId, error: &CloudError) {
        if matches!(error.class, ErrorClass::Unknown | ErrorClass::InvalidState) {
            // It may be further than we think.
            self.take_inventory();
        }
        self.fail(id, error.explain());
    }

    pub(super) fn eni_attached(&mut self, op: OpId, id: &EniId, result: Result<(), CloudError>) {
        if self.reported(op, id, Stage::Attaching).is_none() {
            return;
        }
        match result {
            Ok(()) => self.proceed(id, Stage::Configuring),
            Err(error) => match error.class {
                ErrorClass::NotFound => self.forget(id),
                ErrorClass::Quota | ErrorClass::Invalid => {
                    let until = self.now.after(self.config.refusal_backoff);
                    self.block_creation(error.explain(), until);
                    self.proceed(id, Stage::Deleting);
                }
                _ => self.fail_by_cloud(id, &error),
            },
        }
    }

    pub(super) fn nic_ready(&mut self, op: OpId, id: &EniId, ifindex: u32, subnet: Subnet) {
        let Some(state) = self.reported(op, id, Stage::Configuring) else { return };
        state.nic = Some(Nic { ifindex, subnet });
        let unconnected = std::mem::take(&mut state.unconnected);
        self.creations.nic_appeared();
        self.proceed(id, Stage::InUse);
        for key in unconnected {
            self.reconnect(&key);
        }
        self.advance_drain(id);
    }

    pub(super) fn nic_failed(&mut self, op: OpId, id: &EniId, error: Error) {
        let (attempts, release) = (self.config.nic_attempts.max(1), self.may_release());
        let Some(state) = self.reported(op, id, Stage::Configuring) else { return };
        let hopeless = state.failures + 1 >= attempts && state.empty() && !state.draining && release;
        if hopeless {
            state.reason = Some(error.clone());
        } else {
            // The cloud may have detached it meanwhile.
            self.take_inventory();
            return self.fail(id, error);
        }
        // Another one may fare better. If none does, the node is at fault: ever slower, since each attempt costs four calls.
        let lost_nics = self.creations.nic_lost();
        let until = self.retry_at(lost_nics * 2);
        self.block_creation(error, until);
        self.begin_drain(id);
    }

    /// Puts no more pods on an ENI, and gives it back after its last one.
    pub(super) fn begin_drain(&mut self, id: &EniId) {
        let Some(state) = self.enis.get_mut(id).filter(|state| !state.draining) else { return };
        state.draining = true;
        self.out.put(Record::Eni(state.record()));
        self.advance_drain(id);
    }

    /// Detaches a draining ENI if nothing keeps it.
    pub(super) fn advance_drain(&mut self, id: &EniId) {
        let done = self.enis.get(id).is_some_and(|state| {
            let idle = state.stage == Stage::InUse || (state.stage == Stage::Configuring && state.op.is_none());
            state.draining && idle && state.empty() && !state.blocked()
        });
        if done {
            self.proceed(id, Stage::Detaching);
        }
    }

    pub(super) fn detached(&mut self, op: OpId, id: &EniId, result: Result<(), CloudError>) {
        if self.reported(op, id, Stage::Detaching).is_none() {
            return;
        }
        match result {
            Ok(()) => self.proceed(id, Stage::Deleting),
            Err(error) if error.class == ErrorClass::NotFound => self.forget(id),
            Err(error) => self.fail_by_cloud(id, &error),
        }
    }

    pub(super) fn deleted(&mut self, op: OpId, id: &EniId, result: Result<(), CloudError>) {
        if self.reported(op, id, Stage::Deleting).is_none() {
            return;
        }
        match result {
            Err(error) if error.class != ErrorClass::NotFound => self.fail_by_cloud(id, &error),
            Ok(()) | Err(_) => self.forget(id),
        }
    }

    /// Strikes an ENI that does not exist any more. Nothing of it may be bound.
    pub(super) fn forget(&mut self, id: &EniId) {
        let Some(state) = self.enis.remove(id) else { return };
        debug_assert!(state.v4.counts().bound + state.v6.counts().bound == 0, "{id} has pods");
        for slots in [&state.v4, &state.v6] {
            if let Some(token) = slots.call.as_ref().and_then(|call| call.kind.token()) {
                self.out.delete_lazily(RecordKey::Assignment(token.clone()));
            }
            let held =
                slots.iter().filter(|(_, s)| matches!(s.state, SlotState::Cooling { .. } | SlotState::Releasing));
            for address in held.map(|(address, _)| address).chain(slots.stale_listings.keys().copied()) {
                self.out.delete_lazily(RecordKey::Address(id.clone(), address));
            }
            let releasing = slots.prefixes().iter().filter(|(_, prefix)| prefix.releasing).map(|(prefix, _)| prefix);
            for prefix in releasing.chain(slots.stale_prefix_listings.keys()) {
                self.out.delete_lazily(RecordKey::Prefix(id.clone(), *prefix));
            }
        }
        self.out.delete_lazily(RecordKey::Eni(id.clone()));
        self.inventory.eni_removed(id.clone(), self.now);
    }
}
