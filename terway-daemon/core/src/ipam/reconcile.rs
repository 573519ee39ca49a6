//! The cloud's list of ENIs against the pool's own idea of them.
//!
//! A list adds what is new, once a second one confirms it, and flags what is missing. It never takes anything from a pod, and it is not believed about what changed
//! around the time it was made, since the cloud's lists lag behind its actions.

use std::collections::BTreeSet;
use std::time::Duration;

use ipnetwork::IpNetwork;

use super::config::addresses_per_prefix;
use super::effect::Effect;
use super::ids::OpId;
use super::pool::Pool;
use super::record::{Record, RecordKey};
use super::state::{SlotState, Stage, Timer, listed_addresses, listed_prefixes};
use crate::cidr::Cidr as _;
use crate::clock::Moment;
use crate::cloud::{CloudError, Eni, EniKind, EniStatus};
use crate::ident::{EniId, Family};

impl Pool {
    pub(super) fn take_inventory(&mut self) {
        if !self.inventory.is_under_way() && self.may_ask() {
            let op = self.op();
            self.inventory.begin(op, self.now);
            self.out.effect(Effect::TakeInventory { op });
        }
    }

    pub(super) fn schedule_inventory(&mut self, due: Moment) {
        self.inventory.schedule(due);
        self.wake(due, Timer::Inventory);
    }

    pub(super) fn inventory_due(&mut self) {
        if self.inventory.take_due(self.now) {
            self.take_inventory();
        }
    }

    pub(super) fn inventory(&mut self, op: OpId, result: Result<Vec<Eni>, CloudError>) {
        let Some(asked) = self.inventory.reported(op) else { return };
        match result {
            Ok(enis) => {
                self.inventory.succeeded();
                self.schedule_inventory(self.now.after(self.config.resync));
                self.reconcile(&enis, Some(asked));
            }
            Err(error) => {
                let failures = self.inventory.failed(error);
                let at = self.retry_at(failures);
                self.schedule_inventory(at);
            }
        }
    }

    /// Takes in a list that was asked for at `asked`; `None` at the start, when it is not known how late the list is. What is missing from
    /// that first one is believed only when a second one says the same; what it has more cannot be wrong, for what was given back is on disk.
    pub(super) fn reconcile(&mut self, list: &[Eni], asked: Option<Moment>) {
        let consistency_window = self.config.consistency_window;
        self.inventory.begin_list(asked, consistency_window);
        let mut seen = BTreeSet::new();
        for eni in list.iter().filter(|eni| eni.kind != EniKind::Primary) {
            if self.enis.contains_key(&eni.id) {
                if self.reconcile_stage(eni) {
                    seen.insert(eni.id.clone());
                    self.reconcile_slots(eni, asked);
                }
            } else if self.inventory.was_removed(&eni.id) {
                // It was there when the list was made, or rather a while before.
            } else if self.manages(eni) {
                seen.insert(eni.id.clone());
                self.enter(eni, Stage::Configuring);
                self.retry_eni(&eni.id);
            } else {
                self.inventory.add_foreign(eni.clone());
            }
        }
        let unseen: Vec<_> = self
            .enis
            .values()
            .filter(|state| state.attached() && !seen.contains(&state.id))
            .filter(|state| believed(state.changed, consistency_window, asked))
            .map(|state| state.id.clone())
            .collect();
        for id in unseen {
            self.missed(&id, asked.is_some());
        }
    }

    /// Whether an ENI that nobody here knows is for this pool: attached here, of the right kind, and of nobody else by its tags. One that does
    /// not match the configuration otherwise is taken in too, to be given back: the node was somebody's before, and its adapters are few.
    fn manages(&self, eni: &Eni) -> bool {
        eni.kind == EniKind::Secondary
            && self.is_ours(eni)
            && self.config.blocked_by(&eni.tags).is_none()
            && self.config.passes_filter(&eni.tags)
    }

    /// Notes that the list lacks an ENI; strikes it when it was missing for a while and nothing on it is in use.
    fn missed(&mut self, id: &EniId, certain: bool) {
        let Some(state) = self.enis.get_mut(id) else { return };
        if !certain {
            return self.advance_inventory(self.now.after(self.config.consistency_window));
        }
        let known = state.missing.is_some();
        let since = *state.missing.get_or_insert(self.now);
        if !known {
            self.report_loss(id, None);
        }
        let Some(state) = self.enis.get(id) else { return };
        if since.after(self.config.consistency_window) <= self.now && !state.in_use() && !state.calling() {
            self.forget(id);
        } else {
            self.advance_inventory(self.now.after(self.config.consistency_window));
        }
    }

    /// Looks again sooner than planned.
    fn advance_inventory(&mut self, at: Moment) {
        if self.inventory.is_due_after(at) {
            self.schedule_inventory(at);
        }
    }

    /// Follows an ENI that is further than its last step told. Says whether the list shows it attached.
    fn reconcile_stage(&mut self, eni: &Eni) -> bool {
        let ours = self.is_ours(eni);
        let Some(state) = self.enis.get_mut(&eni.id) else { return false };
        let back = ours && state.missing.take().is_some();
        let known = (state.security_groups.as_ref(), state.tags.as_ref());
        if known != (Some(&eni.security_groups), Some(&eni.tags)) {
            state.security_groups = Some(eni.security_groups.clone());
            state.tags = Some(eni.tags.clone());
            self.out.put_lazily(Record::Eni(state.record()));
            self.update_mismatch(&eni.id);
        }
        if back {
            self.report_recovery(&eni.id, None);
        }
        let Some(state) = self.enis.get_mut(&eni.id) else { return false };
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
        // A single address is a prefix of full length here.
        let all: BTreeSet<_> = listed_addresses(eni).map(IpNetwork::from).chain(listed_prefixes(eni)).collect();
        let consistency_window = self.config.consistency_window;
        let mut altered = false;
        for family in [Family::V4, Family::V6] {
            let Some(state) = self.enis.get_mut(&eni.id) else { return };
            let slots = state.slots_mut(family);
            let listed: Vec<_> = all.iter().copied().filter(|net| Family::of(net.ip()) == family).collect();
            slots.unconfirmed.retain(|net, _| all.contains(net));
            let fresh: Vec<_> = listed.into_iter().filter(|net| slots.lacks(*net)).collect();
            let singles =
                slots.singles().filter(|(_, slot)| !slot.missing).map(|(address, _)| IpNetwork::from(address));
            let blocks = slots.prefixes().iter().filter(|(_, prefix)| !prefix.missing).map(|(prefix, _)| *prefix);
            let lost: Vec<_> = singles.chain(blocks).filter(|net| !all.contains(net)).collect();
            if fresh.is_empty() && lost.is_empty() {
                continue;
            }
            if slots.call.is_some() || !believed(slots.changed, consistency_window, asked) {
                self.advance_inventory(self.now.after(consistency_window));
                continue;
            }
            altered = true;
            for net in fresh {
                self.found(&eni.id, family, net, asked);
            }
            if asked.is_none() && !lost.is_empty() {
                self.advance_inventory(self.now.after(consistency_window));
                continue;
            }
            for net in lost {
                self.lost(&eni.id, family, net);
            }
        }
        if altered && let Some(state) = self.enis.get(&eni.id) {
            self.out.put_lazily(Record::Eni(state.record()));
        }
    }

    /// The list has something that the table lacks, or that had been missing from an earlier list.
    fn found(&mut self, id: &EniId, family: Family, net: IpNetwork, asked: Option<Moment>) {
        let (now, consistency_window) = (self.now, self.config.consistency_window);
        let Some(slots) = self.enis.get_mut(id).map(|eni| eni.slots_mut(family)) else { return };
        let single = net.is_host();
        if single && slots.get(net.ip()).is_some() {
            slots.enter(net.ip(), SlotState::Idle);
            return self.report_recovery(id, Some(&[net.ip()]));
        }
        if slots.prefixes().contains_key(&net) {
            slots.enter_prefix(net, addresses_per_prefix(family));
            let inside = slots.inside(net);
            return self.report_recovery(id, Some(&inside));
        }
        // Nobody here asked for it, or nobody remembers. It is ours if a second list, some time later, says the same; and somebody may have
        // had it until a moment ago.
        let since = *slots.unconfirmed.entry(net).or_insert(asked.unwrap_or(now));
        if asked.is_none_or(|asked| since.after(consistency_window) > asked) {
            return self.advance_inventory(now.after(consistency_window));
        }
        slots.unconfirmed.remove(&net);
        if single {
            slots.enter(net.ip(), SlotState::Idle);
            self.cool(id, net.ip());
        } else {
            slots.enter_prefix(net, addresses_per_prefix(family));
            self.cool_prefix(id, family, net);
        }
    }

    /// The list lacks an address or a prefix.
    fn lost(&mut self, id: &EniId, family: Family, net: IpNetwork) {
        let Some(slots) = self.enis.get_mut(id).map(|eni| eni.slots_mut(family)) else { return };
        let address = net.ip();
        if let Some(prefix) = slots.prefixes().get(&net) {
            if prefix.releasing {
                return self.prefix_unassigned(id, family, net);
            }
            let cooling = slots.inside(net).into_iter().filter(|address| {
                slots.get(*address).is_some_and(|slot| matches!(slot.state, SlotState::Cooling { .. }))
            });
            for address in cooling {
                self.out.delete_lazily(RecordKey::Address(id.clone(), address));
            }
            let bound = slots.lose_prefix(net);
            return self.report_loss(id, Some(&bound));
        }
        match slots.get(address).map(|slot| slot.state) {
            Some(SlotState::Releasing) => return self.address_unassigned(id, address),
            Some(SlotState::Bound) => {
                slots.set_missing(address, true);
                return self.report_loss(id, Some(&[address]));
            }
            Some(SlotState::Cooling { .. }) => self.out.delete_lazily(RecordKey::Address(id.clone(), address)),
            Some(SlotState::Idle) | None => {}
        }
        slots.remove(address);
    }
}

/// Whether a list asked for at that moment knows of a change.
fn believed(changed: Option<Moment>, consistency_window: Duration, asked: Option<Moment>) -> bool {
    changed.is_none_or(|changed| asked.is_none_or(|asked| changed.after(consistency_window) <= asked))
}
