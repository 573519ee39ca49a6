//! The cloud's list of ENIs against the pool's own idea of them.
//!
//! A list adds what is new and flags what is missing. It never takes anything from a pod, and it is not believed about what changed
//! around the time it was made, since the cloud's lists lag behind its actions.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use super::effect::Effect;
use super::eni::Stage;
use super::event::OpId;
use super::lifecycle::addresses;
use super::pool::{Pool, Timer};
use super::record::{Record, RecordKey};
use super::slot::SlotState;
use crate::clock::Moment;
use crate::cloud::{CloudError, Eni, EniKind, EniStatus};
use crate::ident::{EniId, Family};

/// What is known about the cloud's list.
#[derive(Debug)]
pub(super) struct InventoryState {
    /// The pool has seen a list, or started on a node that has nothing. Before that it makes nothing new.
    pub(super) known: bool,
    op: Option<OpId>,
    asked: Moment,
    due: Option<Moment>,
    pub(super) failures: u32,
    pub(super) error: Option<CloudError>,
    /// ENIs that went away lately; a late list may still show them.
    pub(super) forgotten: BTreeMap<EniId, Moment>,
}

impl Default for InventoryState {
    fn default() -> Self {
        Self {
            known: true,
            op: None,
            asked: Moment::ZERO,
            due: None,
            failures: 0,
            error: None,
            forgotten: BTreeMap::new(),
        }
    }
}

impl Pool {
    pub(super) fn take_inventory(&mut self) {
        if self.inventory.op.is_none() {
            let op = self.op();
            self.inventory.op = Some(op);
            self.inventory.asked = self.now;
            self.out.effect(Effect::TakeInventory { op });
        }
    }

    pub(super) fn inventory_at(&mut self, due: Moment) {
        self.inventory.due = Some(due);
        self.wake(due, Timer::Inventory);
    }

    pub(super) fn inventory_due(&mut self) {
        if self.inventory.due.is_some_and(|due| due <= self.now) {
            self.inventory.due = None;
            self.take_inventory();
        }
    }

    pub(super) fn inventory(&mut self, op: OpId, result: Result<Vec<Eni>, CloudError>) {
        if self.inventory.op != Some(op) {
            return;
        }
        self.inventory.op = None;
        match result {
            Ok(enis) => {
                self.inventory.known = true;
                self.inventory.failures = 0;
                self.inventory.error = None;
                self.inventory_at(self.now.after(self.config.resync));
                self.reconcile(&enis, Some(self.inventory.asked));
            }
            Err(error) => {
                self.inventory.failures += 1;
                self.inventory.error = Some(error);
                let at = self.retry_at(self.inventory.failures);
                self.inventory_at(at);
            }
        }
    }

    /// Takes in a list that was asked for at `asked`; `None` at the start, when it is not known how late the list is. What is missing from
    /// that first one is believed only when a second one says the same; what it has more cannot be wrong, for what was given back is on disk.
    pub(super) fn reconcile(&mut self, list: &[Eni], asked: Option<Moment>) {
        let settle = self.config.settle;
        self.inventory.forgotten.retain(|_, at| asked.is_some_and(|asked| at.after(settle) > asked));
        self.foreign.clear();
        let mut seen = BTreeSet::new();
        for eni in list.iter().filter(|eni| eni.kind != EniKind::Primary) {
            if self.enis.contains_key(&eni.id) {
                if self.reconcile_stage(eni) {
                    seen.insert(eni.id.clone());
                    self.reconcile_slots(eni, asked);
                }
            } else if self.inventory.forgotten.contains_key(&eni.id) {
                // It was there when the list was made, or rather a while before.
            } else if eni.kind == EniKind::Secondary && self.is_ours(eni) && self.vswitches.configured(&eni.vswitch) {
                seen.insert(eni.id.clone());
                self.enter(eni, Stage::Configuring);
                self.retry_eni(&eni.id);
            } else {
                self.foreign.push(eni.clone());
            }
        }
        let unseen: Vec<_> = self
            .enis
            .values()
            .filter(|state| state.attached() && !seen.contains(&state.id))
            .filter(|state| believed(state.changed, settle, asked))
            .map(|state| state.id.clone())
            .collect();
        for id in unseen {
            self.missed(&id, asked.is_some());
        }
    }

    /// Notes that the list lacks an ENI; strikes it when it was missing for a while and nothing on it is in use.
    fn missed(&mut self, id: &EniId, certain: bool) {
        let Some(state) = self.enis.get_mut(id) else { return };
        if !certain {
            return self.inventory_again(self.now.after(self.config.settle));
        }
        let since = *state.missing.get_or_insert(self.now);
        if since.after(self.config.settle) <= self.now && !state.in_use() && !state.calling() {
            self.forget(id);
        } else {
            self.inventory_again(self.now.after(self.config.settle));
        }
    }

    /// Looks again sooner than planned.
    fn inventory_again(&mut self, at: Moment) {
        if self.inventory.due.is_none_or(|due| at < due) {
            self.inventory_at(at);
        }
    }

    /// Follows an ENI that is further than its last step told. Says whether the list shows it attached.
    fn reconcile_stage(&mut self, eni: &Eni) -> bool {
        let ours = self.is_ours(eni);
        let Some(state) = self.enis.get_mut(&eni.id) else { return false };
        if ours {
            state.missing = None;
        }
        if state.op.is_none() {
            match (state.stage, ours, eni.status) {
                (Stage::Attaching, true, _) => self.proceed(&eni.id, Stage::Configuring),
                (Stage::Detaching, _, EniStatus::Available) => self.proceed(&eni.id, Stage::Deleting),
                (Stage::Deleting, true, _) => self.proceed(&eni.id, Stage::Detaching),
                _ => {}
            }
        }
        ours
    }

    fn reconcile_slots(&mut self, eni: &Eni, asked: Option<Moment>) {
        let all: BTreeSet<_> = addresses(eni).collect();
        let settle = self.config.settle;
        let mut altered = false;
        for family in [Family::V4, Family::V6] {
            let Some(state) = self.enis.get_mut(&eni.id) else { return };
            let slots = state.slots_mut(family);
            let listed = all.iter().copied().filter(|address| Family::of(*address) == family);
            let fresh: Vec<_> = listed
                .filter(|address| !slots.ghosts.contains_key(address))
                .filter(|address| slots.get(*address).is_none_or(|slot| slot.missing))
                .collect();
            let lost: Vec<_> = slots.iter().filter(|(address, slot)| !all.contains(address) && !slot.missing).collect();
            if fresh.is_empty() && lost.is_empty() {
                continue;
            }
            if slots.call.is_some() || !believed(slots.changed, settle, asked) {
                self.inventory_again(self.now.after(settle));
                continue;
            }
            altered = true;
            for address in fresh {
                slots.enter(address, SlotState::Idle);
            }
            if asked.is_none() && !lost.is_empty() {
                self.inventory_again(self.now.after(settle));
                continue;
            }
            for (address, slot) in lost {
                self.lost(&eni.id, address, slot.state);
            }
        }
        if altered && let Some(state) = self.enis.get(&eni.id) {
            self.out.put_lazily(Record::Eni(state.record()));
        }
    }

    /// The list lacks an address.
    fn lost(&mut self, id: &EniId, address: IpAddr, state: SlotState) {
        if state == SlotState::Releasing {
            return self.gave_back(id, address);
        }
        let Some(eni) = self.enis.get_mut(id) else { return };
        let slots = eni.slots_mut(Family::of(address));
        match state {
            SlotState::Bound => return slots.set_missing(address, true),
            SlotState::Cooling { .. } => self.out.delete_lazily(RecordKey::Address(id.clone(), address)),
            SlotState::Idle | SlotState::Releasing => {}
        }
        slots.remove(address);
    }
}

/// Whether a list asked for at that moment knows of a change.
fn believed(changed: Option<Moment>, settle: Duration, asked: Option<Moment>) -> bool {
    changed.is_none_or(|changed| asked.is_none_or(|asked| changed.after(settle) <= asked))
}
