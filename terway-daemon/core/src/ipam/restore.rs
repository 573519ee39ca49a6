//! The way back after a restart: store, cloud and node put together, and everything that was cut off ordered again.
//!
//! The store says what was promised, the cloud what there is, the node what is certainly gone. Where the cloud does not answer, or does not
//! list an address, pods keep what the store says they have.

use std::collections::BTreeSet;

use super::TOKEN_TAG;
use super::config::{PoolConfig, addresses_per_prefix};
use super::effect::Effect;
use super::pool::Pool;
use super::record::{
    AddressRecord, AssignmentRecord, AttachmentRecord, CreationRecord, EniRecord, EniStage, Phase, PrefixRecord,
    Quarantine, Record, RecordKey,
};
use super::state::{Attachment, CallKind, Creation, EniState, SlotState, Stage, Timer};
use crate::clock::Moment;
use crate::cloud::{Eni, EniKind, EniStatus};
use crate::ident::{AttachmentKey, EniId, Family};

/// What is known at the start.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Everything in the store.
    pub records: Vec<Record>,
    /// Every ENI of this instance, and those with the node's tags that are not attached if they can be had.
    /// `None` if the cloud does not answer.
    pub enis: Option<Vec<Eni>>,
    /// What the node knows.
    pub facts: NodeFacts,
}

/// What the node knows about the attachments in the store.
#[derive(Clone, Debug, Default)]
pub struct NodeFacts {
    /// Attachments whose network namespace does certainly not exist any more.
    pub netns_gone: BTreeSet<AttachmentKey>,
}

/// The store contradicts itself. Nothing that this daemon writes can do that, so somebody must look.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// Two attachments hold one address.
    #[error("{address} on {eni} is stored as bound to {key} and to another attachment")]
    BoundTwice {
        /// The address.
        address: std::net::IpAddr,
        /// Its ENI.
        eni: EniId,
        /// One of the two.
        key: AttachmentKey,
    },
    /// An attachment's ENI is not in the store.
    #[error("{key} is stored as bound to {eni}, which is not in the store")]
    UnknownEni {
        /// The attachment.
        key: AttachmentKey,
        /// The ENI.
        eni: EniId,
    },
}

#[derive(Default)]
struct Sorted {
    attachments: Vec<AttachmentRecord>,
    quarantined: Vec<AddressRecord>,
    prefixes: Vec<PrefixRecord>,
    creations: Vec<CreationRecord>,
    assignments: Vec<AssignmentRecord>,
}

impl Pool {
    /// The pool as it was, and the effects that finish or undo what was under way. Moments start anew, so cooling does too.
    ///
    /// # Errors
    /// [`RestoreError`] if the store contradicts itself.
    pub fn restore(config: PoolConfig, snapshot: Snapshot, now: Moment) -> Result<(Self, Vec<Effect>), RestoreError> {
        let mut pool = Self::new(config);
        pool.now = now;
        let mut sorted = Sorted::default();
        for record in snapshot.records {
            match record {
                Record::Attachment(record) => sorted.attachments.push(record),
                Record::Eni(record) => pool.restore_eni(record),
                Record::Address(record) => sorted.quarantined.push(record),
                Record::Prefix(record) => sorted.prefixes.push(record),
                Record::Creation(record) => sorted.creations.push(record),
                Record::Assignment(record) => sorted.assignments.push(record),
                Record::Counter { next } => pool.sequence.restore_next_token(next),
            }
        }
        for record in sorted.attachments {
            pool.restore_attachment(record)?;
        }
        for record in sorted.quarantined {
            pool.restore_quarantine(record);
        }
        for record in sorted.prefixes {
            pool.restore_prefix(&record);
        }
        // Warming up is for a node that has nothing yet.
        if !pool.enis.is_empty() {
            pool.demand.end_warm_up();
        }
        let list = snapshot.enis;
        for record in sorted.creations {
            pool.restore_creation(record, list.as_deref().unwrap_or_default());
        }
        match list {
            Some(list) => {
                pool.schedule_inventory(now.after(pool.config.resync));
                pool.reconcile(&list, None);
            }
            None => {
                pool.inventory.set_unknown();
                pool.schedule_inventory(now.after(pool.config.retry.initial));
            }
        }
        for record in sorted.assignments {
            pool.restore_assignment(record);
        }
        let tokens: Vec<_> = pool.creations.iter().map(|creation| creation.record().token.clone()).collect();
        for token in tokens {
            pool.retry_creation(&token);
        }
        pool.resume_attachments(&snapshot.facts);
        let enis: Vec<_> = pool.enis.keys().cloned().collect();
        for eni in enis {
            pool.advance_drain(&eni);
            pool.retry_eni(&eni);
        }
        let effects = pool.finish();
        Ok((pool, effects))
    }

    fn restore_eni(&mut self, record: EniRecord) {
        let stage = match record.stage {
            EniStage::Attaching => Stage::Attaching,
            // The NIC may have another index, or be gone: it is looked for anew.
            EniStage::InUse | EniStage::Draining => Stage::Configuring,
            EniStage::Detaching => Stage::Detaching,
            EniStage::Deleting => Stage::Deleting,
        };
        let mut eni = EniState::new(record.id.clone(), record.mac, record.vswitch, record.primary_v4, stage);
        eni.draining = record.stage == EniStage::Draining;
        eni.nic = record.nic;
        eni.security_groups = record.security_groups;
        eni.tags = record.tags;
        for address in record.addresses {
            eni.slots_mut(Family::of(address)).enter(address, SlotState::Idle);
        }
        for prefix in record.prefixes {
            let family = Family::of(prefix.ip());
            eni.slots_mut(family).enter_prefix(prefix, addresses_per_prefix(family));
        }
        eni.mismatch = self.mismatch(&eni).map(|mismatch| (mismatch, self.now));
        self.enis.insert(record.id, eni);
    }

    fn restore_attachment(&mut self, record: AttachmentRecord) -> Result<(), RestoreError> {
        let key = record.key.clone();
        let Some(eni) = self.enis.get_mut(&record.lease.eni) else {
            return Err(RestoreError::UnknownEni { key, eni: record.lease.eni });
        };
        for address in record.lease.addresses.iter() {
            let slots = eni.slots_mut(Family::of(address));
            if !slots.enter(address, SlotState::Bound) {
                if slots.get(address).is_some_and(|slot| slot.state == SlotState::Bound) {
                    return Err(RestoreError::BoundTwice { address, eni: record.lease.eni, key });
                }
                slots.set(address, SlotState::Bound, None);
            }
        }
        self.attachments.insert(key, Attachment::restored(record));
        Ok(())
    }

    fn restore_quarantine(&mut self, record: AddressRecord) {
        let AddressRecord { eni, address, quarantine } = record;
        let until = self.now.after(self.config.cooling);
        let state = self.enis.get_mut(&eni);
        let Some(slots) = state.map(|state| state.slots_mut(Family::of(address))) else {
            return self.out.delete_lazily(RecordKey::Address(eni, address));
        };
        slots.enter(address, SlotState::Idle);
        if slots.get(address).is_some_and(|slot| slot.state == SlotState::Bound) {
            // The later write wins, and a pod's address is never given away.
            return self.out.delete_lazily(RecordKey::Address(eni, address));
        }
        match quarantine {
            Quarantine::Cooling => {
                slots.set(address, SlotState::Cooling { until }, None);
                self.wake(until, Timer::Cooled(eni, address));
            }
            Quarantine::Releasing => slots.set(address, SlotState::Releasing, None),
        }
    }

    fn restore_prefix(&mut self, record: &PrefixRecord) {
        let family = Family::of(record.prefix.ip());
        let slots = self.enis.get_mut(&record.eni).map(|state| state.slots_mut(family));
        // A pod on it wins, as for single addresses.
        let released = slots.is_some_and(|slots| {
            slots.enter_prefix(record.prefix, addresses_per_prefix(family));
            slots.release_prefix(record.prefix)
        });
        if !released {
            self.out.delete_lazily(RecordKey::Prefix(record.eni.clone(), record.prefix));
        }
    }

    fn restore_creation(&mut self, record: CreationRecord, list: &[Eni]) {
        let made = list.iter().find(|eni| {
            let usable = eni.status == EniStatus::Available || self.is_ours(eni);
            eni.kind == EniKind::Secondary && usable && eni.tags.get(TOKEN_TAG) == Some(&record.token.0)
        });
        if let Some(eni) = made {
            self.out.delete(RecordKey::Creation(record.token));
            self.enter_created(eni);
        } else {
            self.creations.insert(Creation::restored(record));
        }
    }

    fn restore_assignment(&mut self, record: AssignmentRecord) {
        let AssignmentRecord { token, eni, family, count, prefixes } = record;
        let ready = |eni: &EniState| eni.attached() && eni.slots(family).call.is_none();
        if self.enis.get(&eni).is_some_and(ready) {
            let each = addresses_per_prefix(family);
            let kind = if prefixes {
                CallKind::AssignPrefixes { token, count, each }
            } else {
                CallKind::Assign { token, count }
            };
            self.call(&eni, family, kind);
            if let Some(call) = self.enis.get_mut(&eni).and_then(|eni| eni.slots_mut(family).call.as_mut()) {
                call.uncertain = true;
            }
        } else {
            self.out.delete_lazily(RecordKey::Assignment(token));
        }
    }

    fn resume_attachments(&mut self, facts: &NodeFacts) {
        let keys: Vec<_> =
            self.attachments.iter().map(|(key, a)| (key.clone(), a.phase(), a.lease().eni.clone())).collect();
        for (key, phase, eni) in keys {
            match phase {
                Phase::SettingUp | Phase::Ready if facts.netns_gone.contains(&key) => {
                    self.start_release(&key, Vec::new());
                }
                Phase::SettingUp => {
                    if let Some(eni) = self.enis.get_mut(&eni) {
                        eni.unconnected.push(key);
                    }
                }
                Phase::Ready => {}
                Phase::Releasing => self.retry_disconnect(&key),
            }
        }
    }
}
