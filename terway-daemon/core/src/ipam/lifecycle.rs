//! The life of an ENI: created, attached, configured, and the way back.

use ipnetwork::IpNetwork;

use super::TOKEN_TAG;
use super::config::{PoolConfig, addresses_per_prefix};
use super::effect::{Effect, Nic};
use super::eni::{EniState, Stage};
use super::event::{ClientToken, OpId};
use super::pool::{Pool, Timer};
use super::record::{CreationRecord, Record, RecordKey};
use super::slot::SlotState;
use crate::clock::Moment;
use crate::cloud::{CloudError, Eni, EniStatus, ErrorClass, Subnet};
use crate::errors::Error;
use crate::ident::{EniId, Family, VSwitchId};

/// An ENI that may have been asked for.
#[derive(Debug)]
pub(super) struct Creation {
    pub(super) record: CreationRecord,
    /// The attempt under way; `None` while it waits to be repeated.
    pub(super) op: Option<OpId>,
    pub(super) failures: u32,
    pub(super) error: Option<CloudError>,
    /// An attempt ended without an outcome: only the cloud's word about this very token may end it.
    uncertain: bool,
    /// Refused, and only kept because an attempt without an outcome may still arrive there: asked again at that moment.
    pub(super) doomed: Option<Moment>,
}

/// What an ENI is created with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct EniContents {
    /// The primary address included.
    pub(super) v4: u32,
    pub(super) v6: u32,
    pub(super) v4_prefixes: u32,
    pub(super) v6_prefixes: u32,
}

impl Creation {
    pub(super) const fn restored(record: CreationRecord) -> Self {
        Self { record, op: None, failures: 0, error: None, uncertain: true, doomed: None }
    }

    /// Units it brings.
    pub(super) fn units(&self, config: &PoolConfig) -> u32 {
        let brings = |family: Family| match family {
            Family::V4 => self.record.v4 + self.record.v4_prefixes * addresses_per_prefix(family),
            Family::V6 => self.record.v6 + self.record.v6_prefixes * addresses_per_prefix(family),
        };
        config.families().iter().map(|family| brings(*family)).min().unwrap_or(0).min(config.units_per_eni())
    }
}

/// What the user is told about a failed call.
pub(super) fn explain(error: &CloudError) -> Error {
    error.explain()
}

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
        let creation = Creation { record, op: None, failures: 0, error: None, uncertain: false, doomed: None };
        self.creations.insert(token.clone(), creation);
        self.retry_creation(&token);
    }

    pub(super) fn retry_creation(&mut self, token: &ClientToken) {
        if !self.may_ask() {
            return;
        }
        let op = self.op();
        let Some(Creation { record, op: running @ None, .. }) = self.creations.get_mut(token) else { return };
        *running = Some(op);
        let record = record.clone();
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
        let Some((token, creation)) = self.creations.iter_mut().find(|(_, c)| c.op == Some(report)) else { return };
        let token = token.clone();
        let error = match result {
            Ok(eni) => {
                self.creations.remove(&token);
                self.out.delete(RecordKey::Creation(token));
                self.welcome(&eni);
                return self.retry_eni(&eni.id);
            }
            Err(error) => error,
        };
        creation.uncertain |= error.class == ErrorClass::Unknown;
        let repeat = match error.class {
            ErrorClass::Throttled | ErrorClass::Unknown | ErrorClass::InvalidState => true,
            // The cloud turned us away at the door, so this says nothing about an earlier attempt.
            ErrorClass::Forbidden => creation.uncertain,
            ErrorClass::VSwitchExhausted | ErrorClass::Quota | ErrorClass::NotFound | ErrorClass::Invalid => false,
        };
        if repeat {
            creation.op = None;
            creation.doomed = None;
            creation.failures += 1;
            let failures = creation.failures;
            creation.error = Some(error.clone());
            let at = self.retry_at(failures);
            if error.class == ErrorClass::Throttled {
                self.creation_blocked = Some((at, explain(&error)));
            }
            return self.wake(at, Timer::Creation(token));
        }
        let record = creation.record.clone();
        if creation.uncertain && creation.doomed.is_none() {
            // An earlier attempt may be on its way yet, and make an ENI that nobody knows. The same token asked again when it must have
            // arrived brings that ENI, or this refusal once more.
            let at = self.now.after(self.config.consistency_window);
            (creation.op, creation.doomed) = (None, Some(at));
            self.wake(at, Timer::Creation(token));
            return self.creation_refused(record, error);
        }
        self.creations.remove(&token);
        // Lost in a crash, the call is repeated: at worst there is an ENI more, which is used or given back.
        self.out.delete_lazily(RecordKey::Creation(token));
        self.creation_refused(record, error);
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
            self.block_creation(explain(&error), until);
        }
    }

    fn block_creation(&mut self, error: Error, until: Moment) {
        self.creation_blocked = Some((until, error));
        self.wake(until, Timer::Plan);
    }

    /// Takes in an ENI that was created for this pool.
    pub(super) fn welcome(&mut self, eni: &Eni) {
        if !self.enis.contains_key(&eni.id) {
            let attached = self.is_ours(eni);
            self.enter(eni, if attached { Stage::Configuring } else { Stage::Attaching });
        }
    }

    /// Enters an ENI with its addresses, all of them idle.
    pub(super) fn enter(&mut self, eni: &Eni, stage: Stage) {
        let mut state = EniState::from_cloud(eni, stage);
        for address in addresses(eni) {
            state.slots_mut(Family::of(address)).enter(address, SlotState::Idle);
        }
        for prefix in prefixes(eni) {
            let family = Family::of(prefix.ip());
            state.slots_mut(family).enter_prefix(prefix, addresses_per_prefix(family));
        }
        state.changed = Some(self.now);
        state.mismatch = self.mismatch(&state).map(|mismatch| (mismatch, self.now));
        self.out.put(Record::Eni(state.record()));
        self.foreign.retain(|other| other.id != eni.id);
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
        self.fail(id, explain(error));
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
                    self.block_creation(explain(&error), until);
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
        self.lost_nics = 0;
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
        self.lost_nics += 1;
        let until = self.retry_at(self.lost_nics * 2);
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
        self.inventory.forgotten.insert(id.clone(), self.now);
    }
}

/// All single addresses of an ENI.
pub(super) fn addresses(eni: &Eni) -> impl Iterator<Item = std::net::IpAddr> {
    // The primary address is in the list of the real cloud; it is entered once in any case.
    let v4 = std::iter::once(eni.primary_v4).chain(eni.v4.iter().copied());
    v4.map(std::net::IpAddr::V4).chain(eni.v6.iter().copied().map(std::net::IpAddr::V6))
}

/// All prefixes of an ENI.
pub(super) fn prefixes(eni: &Eni) -> impl Iterator<Item = IpNetwork> {
    let v4 = eni.v4_prefixes.iter().copied().map(IpNetwork::V4);
    v4.chain(eni.v6_prefixes.iter().copied().map(IpNetwork::V6))
}
