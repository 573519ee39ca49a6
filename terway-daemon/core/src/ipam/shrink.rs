//! The release of addresses to the cloud: idle units above the high watermark, units idle for long, and addresses that are no part of a unit.
//!
//! Only idle addresses are ever looked at, and never the primary ones, which live and die with their ENIs.

use std::collections::BTreeSet;

use super::config::addresses_per_prefix;
use super::pool::Pool;
use super::state::{EniState, SlotState, Timer};
use crate::ident::{EniId, Family};

impl Pool {
    /// Orders the calls for all that is marked as going back.
    pub(super) fn unassign_all(&mut self) {
        let giving: Vec<_> = self
            .enis
            .values()
            .filter(|eni| !eni.blocked())
            .flat_map(|eni| [(eni, Family::V4), (eni, Family::V6)])
            .filter(|(eni, family)| eni.slots(*family).call.is_none() && eni.slots(*family).has_releasing())
            .map(|(eni, family)| (eni.id.clone(), family))
            .collect();
        for (eni, family) in giving {
            self.unassign_batch(&eni, family);
        }
    }

    /// Releases a batch of addresses that have been idle for long, down to the low watermark.
    fn reclaim(&mut self) {
        let Some(reclaim) = self.config.reclaim else { return };
        let usable = self.enis.values().filter(|eni| eni.usable());
        let ready: u32 = usable.map(|eni| eni.units(&self.config).ready).sum();
        let excess = ready.saturating_sub(self.config.min_idle).min(reclaim.batch);
        if self.requests.waiting() > 0 || self.demand.is_warming_up() || excess == 0 {
            return;
        }
        let due = self.idle.reclaim_at(reclaim.after);
        if due > self.now {
            return self.wake(due, Timer::Plan);
        }
        let drained = self.drain_idle_enis(excess);
        let freed = drained + self.release_prefixes(excess - drained);
        let marked = freed + self.release_units(excess - freed);
        // If nothing can be released (all idle addresses are primary), looking again at every step is useless.
        let spread = u64::from(reclaim.jitter_permille) * 2 + 1;
        let permille = 1000 + self.sequence.jitter(self.idle.uses() + u64::from(ready)) % spread;
        let permille = u32::try_from(permille).unwrap_or(1000).saturating_sub(reclaim.jitter_permille.min(999));
        let next = self.now.after(reclaim.interval * permille / 1000);
        self.idle.reclaim_next(next);
        if marked > 0 {
            self.wake(next, Timer::Plan);
        }
    }

    /// Gives back whole prefixes that no pod uses, as far as that costs no more than `excess` units. Those that are no part of a unit cost nothing.
    fn release_prefixes(&mut self, excess: u32) -> u32 {
        let families = self.config.families();
        let mut marked = 0;
        let ids: Vec<_> = self
            .enis
            .values()
            .filter(|eni| eni.usable() && !(eni.v4.prefixes().is_empty() && eni.v6.prefixes().is_empty()))
            .map(|eni| (eni.v4.counts().bound + eni.v6.counts().bound, eni.id.clone()))
            .collect::<BTreeSet<_>>()
            .into_iter()
            .map(|(_, id)| id)
            .collect();
        for (id, family) in ids.iter().flat_map(|id| [(id, Family::V4), (id, Family::V6)]) {
            let free: Vec<_> = self
                .enis
                .get(id)
                .filter(|eni| eni.slots(family).call.is_none())
                .into_iter()
                .flat_map(|eni| eni.slots(family).prefixes())
                .filter(|(_, prefix)| prefix.in_use == 0 && !prefix.releasing)
                .map(|(prefix, state)| (*prefix, state.slots))
                .take(usize::try_from(self.config.batch).unwrap_or(0))
                .collect();
            for (prefix, slots) in free.into_iter().rev() {
                let Some(eni) = self.enis.get(id) else { continue };
                let ready = eni.units(&self.config).ready;
                let idle = |f: Family| eni.slots(f).counts().idle - if f == family { slots } else { 0 };
                let cost = ready - families.iter().map(|f| idle(*f)).min().unwrap_or(0).min(ready);
                // A /80 that pairs with IPv4 addresses to come is worth keeping: there is only one.
                let useful = family == Family::V6 && families.contains(&family) && eni.in_use();
                if marked + cost <= excess && !useful {
                    marked += cost;
                    self.mark_prefix_releasing(id, family, prefix);
                }
            }
        }
        marked
    }

    /// Releases idle units that have been above the high watermark for a while.
    pub(super) fn shrink(&mut self) {
        self.reclaim();
        let high_watermark = self.config.high_watermark();
        let usable = || self.enis.values().filter(|eni| eni.usable());
        let ready: u32 = usable().map(|eni| eni.units(&self.config).ready).sum();
        // What is idle because of the floor is not too much.
        let bound = u32::try_from(self.attachments.len()).unwrap_or(u32::MAX);
        let floor = self.config.min_prefixes.saturating_mul(addresses_per_prefix(Family::V4)).saturating_sub(bound);
        let high_watermark = if self.demand.is_warming_up() { u32::MAX } else { high_watermark.max(floor) };
        let spare = |family: Family| -> u32 {
            let keep = if self.config.families().contains(&family) { high_watermark } else { 0 };
            usable().map(|eni| releasable(eni, family)).sum::<u32>().saturating_sub(keep)
        };
        let spares = [(Family::V4, spare(Family::V4)), (Family::V6, spare(Family::V6))];
        let excess = ready.saturating_sub(high_watermark);
        if self.requests.waiting() > 0 || (excess == 0 && spares.iter().all(|(_, n)| *n == 0)) {
            self.idle.no_excess();
            return;
        }
        let Some(since) = self.idle.excess_since(self.now) else {
            return self.wake(self.now.after(self.config.shrink_after), Timer::Plan);
        };
        if since.after(self.config.shrink_after) <= self.now {
            let drained = self.drain_idle_enis(excess);
            let freed = drained + self.release_prefixes(excess - drained);
            let paired = self.release_units(excess - freed);
            for (family, spare) in spares {
                self.release_unpaired(family, spare.saturating_sub(freed + paired));
            }
        }
    }

    /// Gives back whole ENIs that no pod uses, as long as that does not go below the watermark.
    fn drain_idle_enis(&mut self, excess: u32) -> u32 {
        let mut idle: Vec<_> = self
            .enis
            .values()
            .filter(|eni| eni.usable() && !eni.in_use() && !eni.calling())
            .map(|eni| (eni.units(&self.config).ready, eni.id.clone()))
            .filter(|(units, _)| *units > 0)
            .collect();
        idle.sort();
        let mut drained = 0;
        let staying = self.enis.values().filter(|eni| eni.usable() || eni.starting()).count();
        let spare = staying.saturating_sub(usize::try_from(self.config.min_enis).unwrap_or(usize::MAX));
        for (units, id) in idle.into_iter().take(spare) {
            if drained + units <= excess {
                drained += units;
                self.begin_drain(&id);
            }
        }
        drained
    }

    /// Gives back single units, from the ENIs with the fewest pods first.
    fn release_units(&mut self, excess: u32) -> u32 {
        let families = self.config.families();
        let mut order: Vec<_> = self
            .enis
            .values()
            .filter(|eni| eni.usable() && families.iter().all(|family| eni.slots(*family).call.is_none()))
            .map(|eni| (eni.v4.counts().bound + eni.v6.counts().bound, eni.id.clone()))
            .collect();
        order.sort();
        let mut marked = 0;
        for (_, id) in order {
            let Some(eni) = self.enis.get(&id) else { continue };
            let most = families.iter().map(|family| releasable(eni, *family)).min().unwrap_or(0);
            let take = most.min(self.config.batch).min(excess - marked);
            marked += take;
            for family in families {
                self.mark_least_recently_used(&id, *family, take);
            }
        }
        marked
    }

    /// Gives back addresses that are no part of a unit.
    fn release_unpaired(&mut self, family: Family, mut spare: u32) {
        let in_stack = self.config.families().contains(&family);
        let enis: BTreeSet<_> = self.enis.values().filter(|eni| eni.usable()).map(|eni| eni.id.clone()).collect();
        for id in enis {
            let Some(eni) = self.enis.get(&id).filter(|eni| eni.slots(family).call.is_none()) else { continue };
            let paired = if in_stack { eni.units(&self.config).ready } else { 0 };
            let single = eni.slots(family).counts().idle.saturating_sub(paired);
            let take = single.min(releasable(eni, family)).min(self.config.batch).min(spare);
            spare -= take;
            self.mark_least_recently_used(&id, family, take);
        }
    }

    fn mark_least_recently_used(&mut self, id: &EniId, family: Family, count: u32) {
        let Some(eni) = self.enis.get(id) else { return };
        let count = usize::try_from(count).unwrap_or(0);
        let least_recently_used: Vec<_> =
            eni.slots(family).idle().filter(|address| !eni.is_primary(*address)).take(count).collect();
        self.mark_releasing(id, family, &least_recently_used);
    }
}

/// Idle single addresses that could be given back while the ENI stays.
pub(super) fn releasable(eni: &EniState, family: Family) -> u32 {
    let idle = eni.slots(family).idle_singles();
    let primary = eni.slots(family).get(eni.primary_v4.into()).is_some_and(|slot| slot.state == SlotState::Idle);
    idle - u32::from(primary)
}
