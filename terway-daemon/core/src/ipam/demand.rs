//! Planning, which ends every step: who gets which address, what to ask of the cloud, whom to refuse. What to give back is next door.
//!
//! Every pass is over ENIs, of which there are a dozen, never over addresses or pods.

use super::config::{EniSelection, PoolMode, addresses_per_prefix};
use super::lease::Lease;
use super::pool::Pool;
use super::problem;
use super::state::{Creation, EniContents, EniState, SlotState, Stage, Timer};
use crate::clock::Moment;
use crate::cloud::CloudError;
use crate::errors::{self, Error};
use crate::ident::{Addresses, EniId, Family, IpStack, VSwitchId};

/// Units of the pool by how near they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Supply {
    /// Idle on usable ENIs.
    pub(super) ready: u32,
    /// On their way: calls, creations, ENIs that start.
    pub(super) pending: u32,
    /// Of these, the ones whose calls have not failed so far.
    reliable: u32,
    /// What ENIs that start, or are being created, can take beyond what they come with.
    growth: u32,
    pub(super) cooling: u32,
}

impl Pool {
    pub(super) fn plan(&mut self) {
        self.bind_waiting();
        let mut short = 0;
        if self.inventory.is_known() && self.may_ask() {
            short = self.grow();
        }
        if self.may_release() {
            self.replace(short);
        }
        self.refuse_unservable();
        if self.may_release() {
            self.shrink();
            self.unassign_all();
        }
    }

    fn bind_waiting(&mut self) {
        loop {
            let servable =
                self.requests.oldest_by_stack().filter_map(|(seq, ip_stack)| Some((seq, self.pick(ip_stack)?)));
            let Some((seq, lease)) = servable.min_by_key(|(seq, _)| *seq) else { return };
            let Some(request) = self.requests.take(seq) else { return };
            self.set_up(request, lease);
        }
    }

    /// One address of each wanted family, on one ENI: the ENI by the configured order, of its addresses the least recently used.
    fn pick(&self, ip_stack: IpStack) -> Option<Lease> {
        let offer = |eni: &EniState, family: Family, wanted: bool| {
            if wanted { eni.offer(&self.config, family).map(Some) } else { Some(None) }
        };
        let candidates = self.enis.values().filter(|eni| eni.usable()).filter_map(|eni| {
            let v4 = offer(eni, Family::V4, ip_stack.v4())?;
            let v6 = offer(eni, Family::V6, ip_stack.v6())?;
            Some((self.rank(eni), eni, v4, v6))
        });
        let (_, eni, v4, v6) = candidates.min_by_key(|(rank, ..)| *rank)?;
        let mut addresses = Addresses::default();
        for (_, address) in v4.into_iter().chain(v6) {
            match address {
                std::net::IpAddr::V4(a) => addresses.v4 = Some(a),
                std::net::IpAddr::V6(a) => addresses.v6 = Some(a),
            }
        }
        Some(Lease { eni: eni.id.clone(), mac: eni.mac, nic: eni.nic.clone()?, addresses })
    }

    /// The place of an ENI in the configured order: the lowest comes first.
    fn rank(&self, eni: &EniState) -> u32 {
        let held = eni.v4.len() + eni.v6.len();
        match self.config.eni_selection {
            EniSelection::MostIps => u32::MAX - held,
            EniSelection::LeastIps => held,
        }
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
                supply.reliable += if sound { units.pending } else { 0 };
                supply.cooling += units.cooling;
            } else if eni.starting() {
                supply.pending += units.ready + units.pending;
                supply.reliable += if sound && eni.failures == 0 { units.ready + units.pending } else { 0 };
                supply.growth += units.growth;
                supply.cooling += units.cooling;
            }
        }
        for creation in self.creations.iter().filter(|creation| !creation.is_refused()) {
            let units = creation.units(&self.config);
            supply.pending += units;
            supply.reliable += if creation.has_failed() { 0 } else { units };
            supply.growth += per_eni.saturating_sub(units);
        }
        supply
    }

    /// ENIs that pods can have on this instance, with what others have taken of its adapters.
    pub(super) fn eni_limit(&self) -> u32 {
        let foreign = self.inventory.foreign_on(&self.config.instance);
        let adapters = self.config.limits.adapters.saturating_sub(1).saturating_sub(foreign);
        self.config.eni_limit().min(adapters)
    }

    /// ENIs that could still be created.
    pub(super) fn free_adapters(&self) -> u32 {
        let taken = self.enis.values().filter(|eni| eni.stage != Stage::Deleting).count() + self.creations.count();
        self.eni_limit().saturating_sub(u32::try_from(taken).unwrap_or(u32::MAX))
    }

    /// Whether the cloud may be asked at that moment for addresses of this family on this ENI.
    fn may_assign(&self, eni: &EniState, family: Family, at: Moment) -> bool {
        let refused = eni.slots(family).blocked.as_ref().is_some_and(|(until, _)| *until > at);
        // Only IPv4 addresses can run out.
        !refused && (family == Family::V6 || self.vswitches.cap(&eni.vswitch, at) > 0)
    }

    /// Whether prefixes of this family are to be asked for in this vSwitch.
    fn by_prefix(&self, vswitch: &VSwitchId, family: Family, at: Moment) -> bool {
        // Only IPv4 can be fragmented: a /80 is nothing in a /64.
        self.config.uses_prefixes() && (family == Family::V6 || self.vswitches.prefix_cap(vswitch, at) > 0)
    }

    /// Addresses of one family that this ENI could still take, as things stand at that moment.
    fn room(&self, eni: &EniState, family: Family, at: Moment) -> u32 {
        if self.may_assign(eni, family, at) {
            eni.room(&self.config, family, self.by_prefix(&eni.vswitch, family, at))
        } else {
            0
        }
    }

    /// Units that calls on this ENI could add, as things stand at that moment.
    pub(super) fn growth(&self, eni: &EniState, at: Moment) -> u32 {
        eni.growth(&self.config, &|family| self.room(eni, family, at))
    }

    /// Why an ENI cannot grow.
    fn obstacle<'a>(&'a self, eni: &'a EniState) -> Option<&'a CloudError> {
        let slots = self.config.families().iter().filter_map(|family| eni.slots(*family).blocked.as_ref());
        let slots = slots.filter(|(until, _)| *until > self.now).map(|(_, error)| error);
        let vswitch = self.vswitches.blocked(self.now).filter(|(id, ..)| **id == eni.vswitch);
        slots.chain(vswitch.map(|(_, _, error)| error)).next()
    }

    /// Units to ask for now.
    fn need(&mut self, supply: Supply) -> u32 {
        let (waiting, coming) = (self.requests.waiting(), supply.ready + supply.pending);
        // A pod must not wait for an address to cool if there can be another; the reserve may.
        let coming_or_cooling = coming + supply.cooling;
        let reserve = (waiting + self.config.min_idle).saturating_sub(coming_or_cooling);
        let mut floor = self.config.min_prefixes.saturating_mul(addresses_per_prefix(Family::V4));
        if self.demand.is_warming_up() {
            floor = floor.max(self.config.warm_up);
        }
        let mut need = waiting.saturating_sub(coming).max(reserve);
        if floor > 0 {
            let bound = u32::try_from(self.attachments.len()).unwrap_or(u32::MAX);
            let lacking = floor.min(self.capacity()).saturating_sub(coming_or_cooling + bound);
            if lacking == 0 {
                self.demand.end_warm_up();
            }
            need = need.max(lacking);
        }
        need
    }

    /// Asks for what is wanted and neither there nor coming. Returns how much of it no call can bring as things stand.
    fn grow(&mut self) -> u32 {
        let supply = self.supply();
        let mut need = self.need(supply);
        if need == 0 {
            self.demand.satisfied();
            self.keep_min_enis();
            return 0;
        }
        let ask_at = self.demand.ask_at(self.now, self.config.batch_window);
        if ask_at > self.now {
            self.wake(ask_at, Timer::Plan);
            return 0;
        }
        let mut later = supply.growth;
        let mut order: Vec<_> = self
            .enis
            .values()
            .filter(|eni| eni.usable() && self.growth(eni, self.now) > 0)
            .map(|eni| (self.rank(eni), eni.id.clone()))
            .collect();
        order.sort();
        let pause = self.assign_block.get(self.now).map(|(until, _)| until);
        for (_, id) in order {
            let (taken, left) = match pause {
                None => self.grow_eni(&id, need),
                // A pause is no reason to make more ENIs; a prohibition is.
                Some(until) if until <= self.now.after(self.config.max_wait) => {
                    (0, self.enis.get(&id).map_or(0, |eni| self.growth(eni, self.now)))
                }
                Some(_) => (0, 0),
            };
            need -= taken;
            later += left;
            if need == 0 {
                return 0;
            }
        }
        self.grow_by_enis(need.saturating_sub(later))
    }

    /// Asks for up to `need` units on this ENI. Returns how many of these, and how many more it could take later.
    fn grow_eni(&mut self, id: &EniId, need: u32) -> (u32, u32) {
        let Some(eni) = self.enis.get(id) else { return (0, 0) };
        let growth = self.growth(eni, self.now);
        let batch = self.config.batch;
        // What one call may bring.
        let cap = |family: Family| {
            let room = self.room(eni, family, self.now);
            match (self.by_prefix(&eni.vswitch, family, self.now), family) {
                (true, Family::V4) => {
                    let prefixes = self.vswitches.prefix_cap(&eni.vswitch, self.now).min(batch);
                    room.min(prefixes.saturating_mul(addresses_per_prefix(family)))
                }
                (true, Family::V6) => room,
                (false, Family::V4) => room.min(self.vswitches.cap(&eni.vswitch, self.now)).min(batch),
                (false, Family::V6) => room.min(batch),
            }
        };
        let take = need.min(eni.growth(&self.config, &cap));
        let units = eni.units(&self.config);
        let wanted = units.ready + units.pending + take;
        let calls: Vec<_> = self
            .config
            .families()
            .iter()
            .map(|family| {
                let slots = eni.slots(*family);
                let count = wanted.saturating_sub(slots.counts().idle + slots.incoming());
                (*family, count, self.by_prefix(&eni.vswitch, *family, self.now), slots.call.is_some())
            })
            .filter(|(_, count, ..)| *count > 0)
            .collect();
        if take == 0 || calls.iter().any(|(.., busy)| *busy) {
            return (0, growth);
        }
        for (family, count, prefixes, _) in calls {
            if prefixes {
                self.assign_prefixes(id, family, count.div_ceil(addresses_per_prefix(family)));
            } else {
                self.assign(id, family, count);
            }
        }
        (take, growth - take)
    }

    /// Asks for ENIs with up to `need` units on them. Returns what they cannot bring, then or later.
    fn grow_by_enis(&mut self, mut need: u32) -> u32 {
        let per_eni = self.config.units_per_eni();
        let mut adapters = self.free_adapters();
        if need == 0 || per_eni == 0 || (adapters > 0 && self.count_vswitches()) {
            return 0;
        }
        while need > 0 && adapters > 0 && self.creations.blocked(self.now).is_none() {
            let Some(vswitch) = self.choose_vswitch(self.now).cloned() else { break };
            let contents = self.contents(&vswitch, need.min(per_eni));
            self.create_eni(vswitch, contents);
            need = need.saturating_sub(per_eni);
            adapters -= 1;
        }
        need
    }

    /// What to create an ENI with, so that it brings `units` if one call can.
    fn contents(&self, vswitch: &VSwitchId, units: u32) -> EniContents {
        let mut contents = EniContents { v4: 1, ..EniContents::default() };
        if self.config.stack.v4() {
            if units > 1 && self.by_prefix(vswitch, Family::V4, self.now) {
                let most = self.config.prefixes_per_eni(Family::V4).min(self.config.batch);
                let wanted = (units - 1).div_ceil(addresses_per_prefix(Family::V4)).max(1);
                contents.v4_prefixes = wanted.min(most).min(self.vswitches.prefix_cap(vswitch, self.now));
            } else {
                let cap = self.vswitches.cap(vswitch, self.now).min(self.config.create_v4);
                contents.v4 = units.min(self.config.per_eni(Family::V4)).min(cap).max(1);
            }
        }
        if self.config.stack.v6() {
            if self.config.prefixes_per_eni(Family::V6) > 0 {
                contents.v6_prefixes = 1;
            } else {
                contents.v6 = units.min(self.config.per_eni(Family::V6)).min(self.config.create_v6);
            }
        }
        contents
    }

    /// Asks for ENIs up to the configured minimum, with one unit each.
    fn keep_min_enis(&mut self) {
        if self.config.min_enis == 0 {
            return;
        }
        let have = self.enis.values().filter(|eni| !eni.leaving() && eni.mismatch.is_none()).count();
        let have = u32::try_from(have + self.creations.count()).unwrap_or(u32::MAX);
        let lacking = self.config.min_enis.saturating_sub(have).min(self.free_adapters());
        if lacking == 0 || self.config.units_per_eni() == 0 || self.count_vswitches() {
            return;
        }
        for _ in 0..lacking {
            if self.creations.blocked(self.now).is_some() {
                return;
            }
            let Some(vswitch) = self.choose_vswitch(self.now).cloned() else { return };
            let contents = self.contents(&vswitch, 1);
            self.create_eni(vswitch, contents);
        }
    }

    /// Answers those for whom nothing is under way and nothing will change soon, the last to come first.
    fn refuse_unservable(&mut self) {
        if self.requests.waiting() == 0 {
            return;
        }
        let soon = self.now.after(self.config.max_wait);
        if self.inventory.is_known() {
            let reachable = self.reachable_units(soon);
            while self.requests.waiting() > reachable {
                let Some(request) = self.requests.take_newest() else { break };
                let error = self.growth_error().unwrap_or_else(|| self.full());
                self.refuse(request, error);
            }
        }
        let (now, max_wait) = (self.now, self.config.max_wait);
        let is_expired = |since: Moment| since.after(max_wait) <= now;
        if !self.requests.oldest_since().is_some_and(is_expired) || self.supply().reliable > 0 {
            return;
        }
        let Some(error) = self.growth_error() else { return };
        while let Some(request) = self.requests.take_older_than(is_expired) {
            self.refuse(request, error.clone());
        }
    }

    /// How many units can be there by `soon`, if all goes well.
    fn reachable_units(&self, soon: Moment) -> u32 {
        let supply = self.supply();
        let mut reachable = supply.ready + supply.pending + supply.growth;
        reachable += self.enis.values().filter(|eni| eni.usable()).map(|eni| self.growth(eni, soon)).sum::<u32>();
        if !self.may_ask() {
            return supply.ready + supply.reliable;
        }
        let vswitch = self.choose_vswitch(soon).is_some();
        if vswitch && self.creations.blocked(self.now).is_none_or(|(until, _)| until <= soon) {
            let adapters = self.free_adapters() + self.adapters_coming_free();
            reachable = reachable.saturating_add(adapters.saturating_mul(self.config.units_per_eni()));
        }
        if self.requests.waiting() > reachable && supply.cooling > 0 {
            reachable +=
                self.enis.values().filter(|eni| eni.usable()).map(|eni| self.cooled_by(eni, soon)).sum::<u32>();
        }
        if self.requests.waiting() > reachable {
            reachable = reachable.saturating_add(self.freed_by(soon));
        }
        reachable
    }

    /// Units of pods that are being removed, if their addresses will have cooled by `soon`.
    fn freed_by(&self, soon: Moment) -> u32 {
        if self.now.after(self.config.cooling) > soon {
            return 0;
        }
        let usable = |eni: &EniId| self.enis.get(eni).is_some_and(EniState::usable);
        let leaving = self.attachments.values().filter(|a| a.leaves() && usable(&a.lease().eni)).count();
        u32::try_from(leaving).unwrap_or(u32::MAX)
    }

    fn cooled_by(&self, eni: &EniState, soon: Moment) -> u32 {
        let cooled = |family: Family| {
            let cool = eni.slots(family).iter().filter(|(_, slot)| {
                slot.state == SlotState::Idle || matches!(slot.state, SlotState::Cooling { until } if until <= soon)
            });
            u32::try_from(cool.count()).unwrap_or(u32::MAX)
        };
        let all = self.config.families().iter().map(|family| cooled(*family)).min().unwrap_or(0);
        all.min(if self.config.mode == PoolMode::Exclusive { eni.units(&self.config).cooling } else { u32::MAX })
            .saturating_sub(eni.units(&self.config).ready)
    }

    fn full(&self) -> Error {
        let stats = self.stats();
        // Without numbers that change from one attempt to the next: kubelet merges events of the same text.
        Error::new(errors::NO_ADDRESS, format!("All {} addresses are bound or cooling.", stats.capacity))
    }

    /// Units the node can have at most.
    pub(super) fn capacity(&self) -> u32 {
        self.eni_limit().saturating_mul(self.config.units_per_eni())
    }

    /// Why the pool cannot grow, if it cannot: the most telling of the current failures.
    pub(super) fn growth_error(&self) -> Option<Error> {
        if !self.may_ask() {
            return Some(problem::degraded());
        }
        if let Some(error) = self.inventory.error().filter(|_| !self.inventory.is_known()) {
            return Some(error.explain());
        }
        if self.free_adapters() > 0 {
            if let Some((_, error)) = self.creations.blocked(self.now) {
                return Some(error.clone());
            }
            if self.choose_vswitch(self.now).is_none() {
                let last = self.vswitches.blocked(self.now).last();
                let unconfigured = || Error::new(errors::VSWITCH_NONE, "");
                return Some(last.map_or_else(unconfigured, |(_, _, error)| error.explain()));
            }
        }
        if let Some(error) = self.creations.iter().find_map(Creation::error) {
            return Some(error.explain());
        }
        let enis = || self.enis.values().filter(|eni| !eni.draining);
        let calls = enis().flat_map(|eni| [&eni.v4, &eni.v6]).filter_map(|slots| slots.call.as_ref());
        let mut assigns = calls.filter(|call| call.kind.token().is_some());
        if let Some(error) = assigns.find_map(|call| call.error.as_ref()) {
            return Some(error.explain());
        }
        if let Some(error) = enis().filter(|eni| eni.stage != Stage::Deleting).find_map(|eni| eni.error.clone()) {
            return Some(error);
        }
        if let Some((_, error)) = self.assign_block.get(self.now) {
            return Some(error.clone());
        }
        let mut growing = enis().filter(|eni| eni.usable() && eni.units(&self.config).growth > 0);
        growing.find_map(|eni| self.obstacle(eni)).map(CloudError::explain)
    }
}
