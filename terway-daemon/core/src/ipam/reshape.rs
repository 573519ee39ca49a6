//! A changed configuration: ENIs that do not match it are emptied and replaced. And reports about addresses that the cloud no longer lists.
//!
//! An ENI that does not match takes no new pods from that moment on. While pods are on it, its other addresses go back; when the last one is
//! gone, so does it. Both happen after a while, so that a bad edit of the configuration that is soon taken back costs nothing, or at once
//! when its adapter is wanted.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::config::PoolConfig;
use super::effect::Effect;
use super::pool::Pool;
use super::problem;
use super::state::{EniState, Mismatch, Stage, Timer};
use crate::clock::Moment;
use crate::ident::{EniId, Family};

impl Pool {
    /// Takes over a new configuration. Everything that was refused is tried again: the change may be the cure.
    pub(super) fn configure(&mut self, new: PoolConfig) {
        let old = std::mem::replace(&mut self.config, new);
        (self.config.instance, self.config.stack, self.config.token_seed) = (old.instance, old.stack, old.token_seed);
        self.vswitches.configure(&self.config.vswitches);
        self.creations.unblock();
        self.assign_block.clear();
        self.idle.restart();
        let ids: Vec<_> = self.enis.keys().cloned().collect();
        for id in &ids {
            self.update_mismatch(id);
            if let Some(state) = self.enis.get_mut(id) {
                (state.v4.blocked, state.v6.blocked) = (None, None);
            }
            self.retry_eni(id);
            self.retry_call(id, Family::V4);
            self.retry_call(id, Family::V6);
        }
        // A refused one asks again when a stray request must have arrived, no earlier.
        let tokens = self.creations.iter().filter(|creation| creation.may_retry(self.now));
        let tokens: Vec<_> = tokens.map(|creation| creation.record().token.clone()).collect();
        for token in tokens {
            self.retry_creation(&token);
        }
        // Filters are compared with the tags that the cloud lists now.
        self.take_inventory();
    }

    /// Whether new pods may be put on an ENI, by what is known of it.
    pub(super) fn mismatch(&self, eni: &EniState) -> Option<Mismatch> {
        if let Some(tags) = &eni.tags {
            if let Some((key, value)) = self.config.blocked_by(tags) {
                return Some(Mismatch::Blocked(key.to_owned(), value.to_owned()));
            }
            if !self.config.passes_filter(tags) {
                return Some(Mismatch::TagFilter);
            }
        }
        if !self.config.vswitches.is_empty() && !self.vswitches.configured(&eni.vswitch) {
            return Some(Mismatch::VSwitch);
        }
        let wanted: BTreeSet<_> = self.config.security_groups.iter().collect();
        let differ = |groups: &Vec<_>| groups.iter().collect::<BTreeSet<_>>() != wanted;
        if !wanted.is_empty() && eni.security_groups.as_ref().is_some_and(differ) {
            return Some(Mismatch::SecurityGroups);
        }
        None
    }

    /// Updates whether an ENI matches the configuration.
    pub(super) fn update_mismatch(&mut self, id: &EniId) {
        let now = self.now;
        let Some(mismatch) = self.enis.get(id).map(|state| self.mismatch(state)) else { return };
        let Some(state) = self.enis.get_mut(id) else { return };
        let was_blocked = state.blocked();
        state.mismatch = match (mismatch, state.mismatch.take()) {
            // The time runs from the first reason on, whichever it was.
            (Some(reason), Some((_, since))) => Some((reason, since)),
            (Some(reason), None) => Some((reason, now)),
            (None, _) => None,
        };
        if was_blocked && !state.blocked() {
            // Ours again: what was left lying goes on.
            self.retry_call(id, Family::V4);
            self.retry_call(id, Family::V6);
            self.advance_drain(id);
        }
    }

    /// Empties what does not match, gives back what is empty, and makes room for `short` units that no call can bring as things stand.
    pub(super) fn replace(&mut self, short: u32) {
        let grace = self.config.shrink_after;
        let mut due = Vec::new();
        for (id, state) in &self.enis {
            let Some((_, since)) = &state.mismatch else { continue };
            if state.draining || !matches!(state.stage, Stage::InUse | Stage::Configuring) {
                continue;
            }
            if state.blocked() || since.after(grace) <= self.now || (short > 0 && state.empty()) {
                due.push(id.clone());
            }
        }
        let now = self.now;
        let graces =
            self.enis.values().filter_map(|state| state.mismatch.as_ref().map(|(_, since)| since.after(grace)));
        if let Some(next) = graces.filter(|at| *at > now).min() {
            self.wake(next, Timer::Plan);
        }
        for id in due {
            self.replace_eni(&id);
        }
        if short > 0 {
            self.make_room(short);
        }
    }

    /// Does to a mismatched ENI what its pods allow.
    fn replace_eni(&mut self, id: &EniId) {
        let Some(state) = self.enis.get(id) else { return };
        if state.blocked() {
            if state.empty() && state.unconnected.is_empty() {
                self.forget(id);
            }
            return;
        }
        if state.empty() {
            return self.begin_drain(id);
        }
        for family in [Family::V4, Family::V6] {
            let Some(slots) = self.enis.get(id).map(|state| state.slots(family)) else { return };
            let singles: Vec<_> = slots.idle().collect();
            let free = slots.prefixes().iter().filter(|(_, prefix)| prefix.in_use == 0 && !prefix.releasing);
            let free: Vec<_> = free.map(|(prefix, _)| *prefix).collect();
            self.mark_releasing(id, family, &singles);
            for prefix in free {
                self.mark_prefix_releasing(id, family, prefix);
            }
        }
    }

    /// Adapters that will be free soon: of ENIs that are on their way out, or would be if somebody needed it.
    pub(super) fn adapters_coming_free(&self) -> u32 {
        if !self.may_release() {
            return 0;
        }
        let leaving = |eni: &&EniState| {
            let going = eni.leaving() && eni.stage != Stage::Deleting;
            going || (eni.mismatch.is_some() && eni.empty() && !eni.blocked()) || self.stuck(eni, self.now)
        };
        u32::try_from(self.enis.values().filter(leaving).count()).unwrap_or(u32::MAX)
    }

    /// Whether an ENI serves nobody and cannot be made to, since its vSwitch has nothing left.
    fn stuck(&self, eni: &EniState, now: Moment) -> bool {
        let useless = eni.usable() && eni.empty() && eni.units(&self.config).ready == 0;
        useless && self.vswitches.cap(&eni.vswitch, now) == 0 && self.growth(eni, now) == 0
    }

    /// Gives back as many empty ENIs as it takes for `short` units on new ones: those that do not match, and those whose vSwitch has nothing left.
    fn make_room(&mut self, short: u32) {
        let per_eni = self.config.units_per_eni();
        if per_eni == 0 || self.creations.blocked(self.now).is_some() || self.choose_vswitch(self.now).is_none() {
            return;
        }
        let leaving = self.enis.values().filter(|eni| eni.leaving() && eni.stage != Stage::Deleting).count();
        let wanted = usize::try_from(short.div_ceil(per_eni)).unwrap_or(usize::MAX).saturating_sub(leaving);
        // Without anybody waiting, an ENI that holds a part of the reserve may go too: a fresh one holds more.
        let idle = |eni: &EniState| {
            let units = eni.units(&self.config).ready;
            let drained = eni.usable() && eni.empty() && units > 0 && units < short && self.requests.waiting() == 0;
            drained && self.vswitches.cap(&eni.vswitch, self.now) == 0
        };
        let full = self.free_adapters() == 0;
        let stuck: Vec<_> = self
            .enis
            .values()
            .filter(|eni| full && !eni.draining && (self.stuck(eni, self.now) || idle(eni)))
            .map(|eni| eni.id.clone())
            .take(wanted)
            .collect();
        for id in stuck {
            self.begin_drain(&id);
        }
    }

    /// Tells of the pods that have these addresses of an ENI, or any if none is named, that the cloud does not list them any more.
    pub(super) fn report_loss(&mut self, id: &EniId, addresses: Option<&[IpAddr]>) {
        let addresses_of_all = addresses.is_none();
        let mut fenced = Vec::new();
        for (key, attachment) in self.attachments.iter().filter(|(_, a)| a.lease().eni == *id) {
            let hit = |address: &IpAddr| addresses.is_none_or(|all| all.contains(address));
            let hit: Vec<_> = attachment.lease().addresses.iter().filter(hit).collect();
            if !hit.is_empty() {
                fenced.push((key.clone(), attachment.pod().clone(), hit));
            }
        }
        for (key, pod, addresses) in fenced {
            let reason = problem::address_loss(&pod.to_string(), id, &addresses, addresses_of_all);
            self.out.effect(Effect::ReportAddressLoss { key, pod, eni: id.clone(), addresses, reason });
        }
    }

    /// Tells of the pods that have these addresses of an ENI, or any if none is named, that all is well again.
    pub(super) fn report_recovery(&mut self, id: &EniId, addresses: Option<&[IpAddr]>) {
        let mut free = Vec::new();
        for (key, attachment) in self.attachments.iter().filter(|(_, a)| a.lease().eni == *id) {
            let hit = |address: IpAddr| addresses.is_none_or(|all| all.contains(&address));
            let missing = || self.get(key).is_some_and(|view| !view.missing.is_empty());
            if attachment.lease().addresses.iter().any(hit) && !missing() {
                free.push((key.clone(), attachment.pod().clone()));
            }
        }
        for (key, pod) in free {
            self.out.effect(Effect::ReportAddressRecovery { key, pod });
        }
    }
}
