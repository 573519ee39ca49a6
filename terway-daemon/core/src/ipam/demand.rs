//! Planning, which ends every step: who gets which address, what to ask of the cloud, whom to refuse, what to give back.
//!
//! Every pass is over ENIs, of which there are a dozen, never over addresses or pods.

use std::collections::BTreeSet;

use super::effect::Grant;
use super::eni::{EniState, Stage};
use super::lifecycle::explain;
use super::pool::{Pool, Timer};
use super::slot::{CallKind, SlotState};
use crate::clock::Moment;
use crate::cloud::{CloudError, EniKind};
use crate::errors::{self, Error};
use crate::ident::{Addresses, EniId, Family, IpStack};

/// Units of the pool by how near they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Supply {
    /// Idle on usable ENIs.
    pub(super) ready: u32,
    /// On their way: calls, creations, ENIs that start.
    pub(super) pending: u32,
    /// Of these, the ones whose calls have not failed so far.
    sound: u32,
    /// What ENIs that start, or are being created, can take beyond what they come with.
    later: u32,
    pub(super) cooling: u32,
}

impl Pool {
    pub(super) fn plan(&mut self) {
        self.bind_waiting();
        if self.inventory.known {
            self.grow();
        }
        self.refuse_hopeless();
        self.shrink();
        let giving: Vec<_> = self
            .enis
            .values()
            .flat_map(|eni| [(eni, Family::V4), (eni, Family::V6)])
            .filter(|(eni, family)| !eni.slots(*family).releasing().is_empty())
            .map(|(eni, family)| (eni.id.clone(), family))
            .collect();
        for (eni, family) in giving {
            self.give_back(&eni, family);
        }
    }

    fn bind_waiting(&mut self) {
        loop {
            let servable = self.waiting.heads().filter_map(|(seq, want)| Some((seq, self.pick(want)?)));
            let Some((seq, grant)) = servable.min_by_key(|(seq, _)| *seq) else { return };
            let Some(request) = self.waiting.remove(seq) else { return };
            self.set_up(request, grant);
        }
    }

    /// The least recently used addresses: one of each wanted family, on one ENI.
    fn pick(&self, want: IpStack) -> Option<Grant> {
        let coldest = |eni: &EniState, family: Family, wanted: bool| {
            if wanted { eni.slots(family).coldest().map(Some) } else { Some(None) }
        };
        let candidates = self.enis.values().filter(|eni| eni.usable()).filter_map(|eni| {
            let v4 = coldest(eni, Family::V4, want.v4())?;
            let v6 = coldest(eni, Family::V6, want.v6())?;
            Some((v4.max(v6).map(|(used, _)| used), eni, v4, v6))
        });
        let (_, eni, v4, v6) = candidates.min_by_key(|(used, ..)| *used)?;
        let mut addresses = Addresses::default();
        for (_, address) in v4.into_iter().chain(v6) {
            match address {
                std::net::IpAddr::V4(a) => addresses.v4 = Some(a),
                std::net::IpAddr::V6(a) => addresses.v6 = Some(a),
            }
        }
        Some(Grant { eni: eni.id.clone(), mac: eni.mac, nic: eni.nic.clone()?, addresses })
    }

    pub(super) fn supply(&self) -> Supply {
        let mut supply = Supply::default();
        let per_eni = self.config.units_per_eni();
        for eni in self.enis.values() {
            let units = eni.units(&self.config);
            let sound = [&eni.v4, &eni.v6].iter().all(|s| s.call.as_ref().is_none_or(|call| call.failures == 0));
            if eni.usable() {
                supply.ready += units.ready;
                supply.pending += units.pending;
                supply.sound += if sound { units.pending } else { 0 };
                supply.cooling += units.cooling;
            } else if eni.starting() {
                supply.pending += units.ready + units.pending;
                supply.sound += if sound && eni.failures == 0 { units.ready + units.pending } else { 0 };
                supply.later += units.growth;
                supply.cooling += units.cooling;
            }
        }
        for creation in self.creations.values() {
            let units = creation.units(&self.config);
            supply.pending += units;
            supply.sound += if creation.failures == 0 { units } else { 0 };
            supply.later += per_eni.saturating_sub(units);
        }
        supply
    }

    /// ENIs that could still be created.
    pub(super) fn free_adapters(&self) -> u32 {
        let foreign = self
            .foreign
            .iter()
            .filter(|eni| eni.kind != EniKind::Primary && eni.instance.as_ref() == Some(&self.config.instance));
        let ours = self.enis.values().filter(|eni| eni.stage != Stage::Deleting);
        let taken = foreign.count() + ours.count() + self.creations.len();
        self.config.eni_limit().saturating_sub(u32::try_from(taken).unwrap_or(u32::MAX))
    }

    fn creation_blocked(&self) -> Option<(Moment, &CloudError)> {
        self.creation_blocked.as_ref().filter(|(until, _)| *until > self.now).map(|(until, error)| (*until, error))
    }

    /// Whether the cloud may be asked at that moment for addresses of this family on this ENI.
    fn open(&self, eni: &EniState, family: Family, at: Moment) -> bool {
        let refused = eni.slots(family).blocked.as_ref().is_some_and(|(until, _)| *until > at);
        // Only IPv4 addresses can run out.
        !refused && (family == Family::V6 || self.vswitches.cap(&eni.vswitch, at) > 0)
    }

    /// Units that calls on this ENI could add, as things stand at that moment.
    fn growth(&self, eni: &EniState, at: Moment) -> u32 {
        eni.growth(&self.config, &|family| if self.open(eni, family, at) { u32::MAX } else { 0 })
    }

    /// Why an ENI cannot grow.
    fn obstacle<'a>(&'a self, eni: &'a EniState) -> Option<&'a CloudError> {
        let slots = self.config.families().iter().filter_map(|family| eni.slots(*family).blocked.as_ref());
        let slots = slots.filter(|(until, _)| *until > self.now).map(|(_, error)| error);
        let vswitch = self.vswitches.blocked(self.now).filter(|(id, ..)| **id == eni.vswitch);
        slots.chain(vswitch.map(|(_, _, error)| error)).next()
    }

    fn grow(&mut self) {
        let supply = self.supply();
        let (waiting, coming) = (self.waiting.len(), supply.ready + supply.pending);
        // A pod must not wait for an address to cool if there can be another; the reserve may.
        let reserve = (waiting + self.config.min_idle).saturating_sub(coming + supply.cooling);
        let mut need = waiting.saturating_sub(coming).max(reserve);
        if need == 0 {
            return;
        }
        let mut later = supply.later;
        // Fullest first, so that the emptiest can be given back one day.
        let mut order: Vec<_> = self
            .enis
            .values()
            .filter(|eni| eni.usable() && self.growth(eni, self.now) > 0)
            .map(|eni| (std::cmp::Reverse(eni.v4.len() + eni.v6.len()), eni.id.clone()))
            .collect();
        order.sort();
        for (_, id) in order {
            let (taken, left) = self.grow_eni(&id, need);
            need -= taken;
            later += left;
            if need == 0 {
                return;
            }
        }
        self.grow_by_enis(need.saturating_sub(later));
    }

    /// Asks for up to `need` units on this ENI. Returns how many, and how many more it could take later.
    fn grow_eni(&mut self, id: &EniId, need: u32) -> (u32, u32) {
        let Some(eni) = self.enis.get(id) else { return (0, 0) };
        let growth = self.growth(eni, self.now);
        let cap = |family: Family| match family {
            Family::V4 => self.vswitches.cap(&eni.vswitch, self.now).min(self.config.batch),
            Family::V6 => self.config.batch,
        };
        let open = |family: Family| if self.open(eni, family, self.now) { cap(family) } else { 0 };
        let take = need.min(eni.growth(&self.config, &open));
        let units = eni.units(&self.config);
        let wanted = units.ready + units.pending + take;
        let calls: Vec<_> = self
            .config
            .families()
            .iter()
            .map(|family| {
                let slots = eni.slots(*family);
                (*family, wanted.saturating_sub(slots.counts().idle + slots.incoming()), slots.call.is_some())
            })
            .filter(|(_, count, _)| *count > 0)
            .collect();
        if take == 0 || calls.iter().any(|(_, _, busy)| *busy) {
            return (0, growth);
        }
        for (family, count, _) in calls {
            self.assign(id, family, count);
        }
        (take, growth - take)
    }

    fn grow_by_enis(&mut self, mut need: u32) {
        let per_eni = self.config.units_per_eni();
        let mut adapters = self.free_adapters();
        while need > 0 && per_eni > 0 && adapters > 0 && self.creation_blocked().is_none() {
            let Some(vswitch) = self.vswitches.choose(self.now).cloned() else { return };
            let cap = self.vswitches.cap(&vswitch, self.now).min(self.config.batch).max(1);
            let units = need.min(per_eni).min(cap);
            let v4 = if self.config.stack.v4() { units } else { 1 };
            let v6 = if self.config.stack.v6() { units } else { 0 };
            self.create_eni(vswitch, v4, v6);
            need = need.saturating_sub(per_eni);
            adapters -= 1;
        }
    }

    /// Answers those for whom nothing is under way and nothing will change soon, the last to come first.
    fn refuse_hopeless(&mut self) {
        if self.waiting.len() == 0 {
            return;
        }
        let soon = self.now.after(self.config.patience);
        if self.inventory.known {
            let hope = self.hope(soon);
            while self.waiting.len() > hope {
                let Some(request) = self.waiting.last().and_then(|seq| self.waiting.remove(seq)) else { break };
                let error = self.trouble().unwrap_or_else(|| self.full());
                self.refuse(request, error);
            }
        }
        let expired = |since: Moment| since.after(self.config.patience) <= self.now;
        if !self.waiting.first().is_some_and(|(_, request)| expired(request.since)) || self.supply().sound > 0 {
            return;
        }
        let Some(trouble) = self.trouble() else { return };
        while let Some((seq, request)) = self.waiting.first()
            && request.since.after(self.config.patience) <= self.now
            && let Some(request) = self.waiting.remove(seq)
        {
            self.refuse(request, trouble.clone());
        }
    }

    /// How many units can be there by `soon`, if all goes well.
    fn hope(&self, soon: Moment) -> u32 {
        let supply = self.supply();
        let mut hope = supply.ready + supply.pending + supply.later;
        hope += self.enis.values().filter(|eni| eni.usable()).map(|eni| self.growth(eni, soon)).sum::<u32>();
        let vswitch = self.vswitches.choose(soon).is_some();
        if vswitch && self.creation_blocked().is_none_or(|(until, _)| until <= soon) {
            hope = hope.saturating_add(self.free_adapters().saturating_mul(self.config.units_per_eni()));
        }
        if self.waiting.len() > hope && supply.cooling > 0 {
            hope += self.enis.values().filter(|eni| eni.usable()).map(|eni| self.cooled_by(eni, soon)).sum::<u32>();
        }
        hope
    }

    fn cooled_by(&self, eni: &EniState, soon: Moment) -> u32 {
        let cooled = |family: Family| {
            let cool = eni.slots(family).iter().filter(|(_, slot)| {
                slot.state == SlotState::Idle || matches!(slot.state, SlotState::Cooling { until } if until <= soon)
            });
            u32::try_from(cool.count()).unwrap_or(u32::MAX)
        };
        let all = self.config.families().iter().map(|family| cooled(*family)).min().unwrap_or(0);
        all - eni.units(&self.config).ready
    }

    fn full(&self) -> Error {
        let stats = self.stats();
        Error::new(
            errors::NO_ADDRESS,
            format!("Of {} addresses {} are bound and {} cooling.", stats.capacity, stats.bound, stats.cooling),
        )
    }

    /// Why the pool cannot grow, if it cannot: the most telling of the current failures.
    pub(super) fn trouble(&self) -> Option<Error> {
        if let Some(error) = self.inventory.error.as_ref().filter(|_| !self.inventory.known) {
            return Some(explain(error));
        }
        if self.free_adapters() > 0 {
            if let Some((_, error)) = self.creation_blocked() {
                return Some(explain(error));
            }
            if self.vswitches.choose(self.now).is_none() {
                let last = self.vswitches.blocked(self.now).last();
                let unconfigured = || Error::new(errors::CONFIG_INVALID, "No vSwitch is configured for this zone.");
                return Some(last.map_or_else(unconfigured, |(_, _, error)| explain(error)));
            }
        }
        if let Some(error) = self.creations.values().find_map(|creation| creation.error.as_ref()) {
            return Some(explain(error));
        }
        let enis = || self.enis.values().filter(|eni| !eni.draining);
        let calls = enis().flat_map(|eni| [&eni.v4, &eni.v6]).filter_map(|slots| slots.call.as_ref());
        let mut assigns = calls.filter(|call| matches!(call.kind, CallKind::Assign { .. }));
        if let Some(error) = assigns.find_map(|call| call.error.as_ref()) {
            return Some(explain(error));
        }
        if let Some(error) = enis().filter(|eni| eni.stage != Stage::Deleting).find_map(|eni| eni.error.clone()) {
            return Some(error);
        }
        let mut growing = enis().filter(|eni| eni.usable() && eni.units(&self.config).growth > 0);
        growing.find_map(|eni| self.obstacle(eni)).map(explain)
    }

    fn shrink(&mut self) {
        let ceiling = self.config.ceiling();
        let usable = || self.enis.values().filter(|eni| eni.usable());
        let ready: u32 = usable().map(|eni| eni.units(&self.config).ready).sum();
        let spare = |family: Family| -> u32 {
            let keep = if self.config.families().contains(&family) { ceiling } else { 0 };
            usable().map(|eni| retirable(eni, family)).sum::<u32>().saturating_sub(keep)
        };
        let spares = [(Family::V4, spare(Family::V4)), (Family::V6, spare(Family::V6))];
        let excess = ready.saturating_sub(ceiling);
        if self.waiting.len() > 0 || (excess == 0 && spares.iter().all(|(_, n)| *n == 0)) {
            self.excess_since = None;
            return;
        }
        let Some(since) = self.excess_since else {
            self.excess_since = Some(self.now);
            return self.wake(self.now.after(self.config.shrink_after), Timer::Plan);
        };
        if since.after(self.config.shrink_after) <= self.now {
            let drained = self.drain_idle_enis(excess);
            let paired = self.retire_units(excess - drained);
            for (family, spare) in spares {
                self.retire_spares(family, spare.saturating_sub(drained + paired));
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
        for (units, id) in idle {
            if drained + units <= excess {
                drained += units;
                self.begin_drain(&id);
            }
        }
        drained
    }

    /// Gives back single units, from the ENIs with the fewest pods first.
    fn retire_units(&mut self, excess: u32) -> u32 {
        let families = self.config.families();
        let mut order: Vec<_> = self
            .enis
            .values()
            .filter(|eni| eni.usable() && families.iter().all(|family| eni.slots(*family).call.is_none()))
            .map(|eni| (eni.v4.counts().bound + eni.v6.counts().bound, eni.id.clone()))
            .collect();
        order.sort();
        let mut retired = 0;
        for (_, id) in order {
            let Some(eni) = self.enis.get(&id) else { continue };
            let most = families.iter().map(|family| retirable(eni, *family)).min().unwrap_or(0);
            let take = most.min(self.config.batch).min(excess - retired);
            retired += take;
            for family in families {
                self.retire_coldest(&id, *family, take);
            }
        }
        retired
    }

    /// Gives back addresses that are no part of a unit.
    fn retire_spares(&mut self, family: Family, mut spare: u32) {
        let in_stack = self.config.families().contains(&family);
        let enis: BTreeSet<_> = self.enis.values().filter(|eni| eni.usable()).map(|eni| eni.id.clone()).collect();
        for id in enis {
            let Some(eni) = self.enis.get(&id).filter(|eni| eni.slots(family).call.is_none()) else { continue };
            let paired = if in_stack { eni.units(&self.config).ready } else { 0 };
            let single = eni.slots(family).counts().idle.saturating_sub(paired);
            let take = single.min(retirable(eni, family)).min(self.config.batch).min(spare);
            spare -= take;
            self.retire_coldest(&id, family, take);
        }
    }

    fn retire_coldest(&mut self, id: &EniId, family: Family, count: u32) {
        let Some(eni) = self.enis.get(id) else { return };
        let count = usize::try_from(count).unwrap_or(0);
        let coldest: Vec<_> =
            eni.slots(family).idle().filter(|address| !eni.is_primary(*address)).take(count).collect();
        self.retire(id, family, &coldest);
    }
}

/// Idle addresses that could be given back while the ENI stays.
fn retirable(eni: &EniState, family: Family) -> u32 {
    let idle = eni.slots(family).counts().idle;
    let primary = eni.slots(family).get(eni.primary_v4.into()).is_some_and(|slot| slot.state == SlotState::Idle);
    idle - u32::from(primary)
}
