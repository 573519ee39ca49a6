//! The addresses of one family on one ENI, and the one call about them that may be under way.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::cidr::Cidr as _;
use crate::clock::Moment;
use crate::cloud::CloudError;
use crate::ipam::ids::{ClientToken, OpId};

/// What an address is doing. `Absent` is not being in the table, `Creating` is being part of an [`Call::Assign`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlotState {
    /// Free to hand out.
    Idle,
    /// A pod's.
    Bound,
    /// A pod's until a moment ago.
    Cooling { until: Moment },
    /// Being given back to the cloud; never again handed out from here.
    Releasing,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) state: SlotState,
    /// When its last use ended, as a count of such ends on this node; 0 is never in this run.
    pub(crate) used: u64,
    /// The cloud's list lacks it although a pod has it.
    pub(crate) missing: bool,
}

/// A cloud call about these addresses.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) kind: CallKind,
    /// The attempt under way; `None` while it waits to be repeated.
    pub(crate) op: Option<OpId>,
    pub(crate) failures: u32,
    pub(crate) error: Option<CloudError>,
    /// An attempt ended without an outcome.
    pub(crate) uncertain: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum CallKind {
    Assign {
        token: ClientToken,
        count: u32,
    },
    Unassign {
        addresses: Vec<IpAddr>,
    },
    /// `each` is how many addresses one of them brings.
    AssignPrefixes {
        token: ClientToken,
        count: u32,
        each: u32,
    },
    UnassignPrefixes {
        prefixes: Vec<IpNetwork>,
    },
}

/// What an assign call brought.
#[derive(Debug)]
pub(crate) enum Assigned {
    Addresses(Vec<IpAddr>),
    Prefixes(Vec<IpNetwork>),
}

impl CallKind {
    /// The token, if it is a call that makes something.
    pub(crate) const fn token(&self) -> Option<&ClientToken> {
        match self {
            Self::Assign { token, .. } | Self::AssignPrefixes { token, .. } => Some(token),
            Self::Unassign { .. } | Self::UnassignPrefixes { .. } => None,
        }
    }
}

/// A block of addresses that comes and goes as one. Its addresses are slots like any others.
#[derive(Debug, Default)]
pub(crate) struct Prefix {
    /// Fullest prefix first, then least recently used.
    idle: BTreeSet<(u64, IpAddr)>,
    /// Slots that a pod has, or had a moment ago.
    pub(crate) in_use: u32,
    pub(crate) slots: u32,
    /// Being given back to the cloud.
    pub(crate) releasing: bool,
    /// The cloud's list lacks it; it goes with its last pod.
    pub(crate) missing: bool,
}

/// How many slots are in which state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) idle: u32,
    pub(crate) bound: u32,
    pub(crate) cooling: u32,
    pub(crate) releasing: u32,
}

#[derive(Debug, Default)]
pub(crate) struct Slots {
    map: BTreeMap<IpAddr, Slot>,
    prefixes: BTreeMap<IpNetwork, Prefix>,
    /// Single ones, least recently used first.
    idle: BTreeSet<(u64, IpAddr)>,
    /// Single ones.
    releasing: BTreeSet<IpAddr>,
    counts: Counts,
    missing: u32,
    pub(crate) call: Option<Call>,
    /// Given back so lately that the cloud's lists may still show them.
    pub(crate) stale_listings: BTreeMap<IpAddr, Moment>,
    /// The same for prefixes.
    pub(crate) stale_prefix_listings: BTreeMap<IpNetwork, Moment>,
    /// What the cloud lists and nobody here asked for, since when. Only what stays on the list is real.
    pub(crate) unconfirmed: BTreeMap<IpNetwork, Moment>,
    /// No assign call until then, and why.
    pub(crate) blocked: Option<(Moment, CloudError)>,
    /// When the last call ended: lists taken before, or shortly after, say nothing about this table.
    pub(crate) changed: Option<Moment>,
    /// A give-back of several failed because one of them was gone already: go one by one.
    pub(crate) one_by_one: bool,
}

impl Slots {
    pub(crate) const fn counts(&self) -> Counts {
        self.counts
    }

    pub(crate) const fn missing(&self) -> u32 {
        self.missing
    }

    pub(crate) fn len(&self) -> u32 {
        let Counts { idle, bound, cooling, releasing } = self.counts;
        idle + bound + cooling + releasing
    }

    /// Whether a pod has, or had a moment ago, one of these.
    pub(crate) const fn in_use(&self) -> bool {
        self.counts.bound + self.counts.cooling > 0
    }

    pub(crate) fn get(&self, address: IpAddr) -> Option<Slot> {
        self.map.get(&address).copied()
    }

    pub(crate) const fn prefixes(&self) -> &BTreeMap<IpNetwork, Prefix> {
        &self.prefixes
    }

    /// The prefix that an address belongs to.
    pub(crate) fn prefix_of(&self, address: IpAddr) -> Option<IpNetwork> {
        self.prefixes.keys().find(|prefix| prefix.contains(address)).copied()
    }

    /// Addresses that came one by one.
    pub(crate) fn singles(&self) -> impl Iterator<Item = (IpAddr, Slot)> {
        self.iter().filter(|(address, _)| self.prefix_of(*address).is_none())
    }

    /// How many of the ENI's places for addresses are taken: a prefix takes one.
    pub(crate) fn places(&self) -> u32 {
        let blocks = u32::try_from(self.prefixes.len()).unwrap_or(u32::MAX);
        self.len() - self.prefixes.values().map(|prefix| prefix.slots).sum::<u32>() + blocks
    }

    /// Single idle addresses.
    pub(crate) fn idle_singles(&self) -> u32 {
        u32::try_from(self.idle.len()).unwrap_or(u32::MAX)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (IpAddr, Slot)> {
        self.map.iter().map(|(address, slot)| (*address, *slot))
    }

    pub(crate) const fn releasing(&self) -> &BTreeSet<IpAddr> {
        &self.releasing
    }

    /// The idle address for the next pod: of the single ones, which cost a place each, the one that was used longest ago; then that of the
    /// fullest prefix, so that the others can be given back one day.
    pub(crate) fn least_recently_used(&self) -> Option<(u64, IpAddr)> {
        self.idle.first().copied().or_else(|| {
            let open = self.prefixes.values().filter(|prefix| !prefix.idle.is_empty());
            open.min_by_key(|prefix| std::cmp::Reverse(prefix.in_use)).and_then(|prefix| prefix.idle.first().copied())
        })
    }

    /// Single idle addresses, least_recently_used first.
    pub(crate) fn idle(&self) -> impl Iterator<Item = IpAddr> {
        self.idle.iter().map(|(_, address)| *address)
    }

    /// Enters a new address; one that is here already stays as it is, except that it is known not to be missing.
    /// Says whether it is new.
    pub(crate) fn enter(&mut self, address: IpAddr, state: SlotState) -> bool {
        if self.map.contains_key(&address) {
            self.set_missing(address, false);
            return false;
        }
        self.map.insert(address, Slot { state, used: 0, missing: false });
        self.count(address, 0, state, true);
        true
    }

    /// Changes the state of an address that is here; `used` marks the end of a use.
    pub(crate) fn set(&mut self, address: IpAddr, state: SlotState, used: Option<u64>) {
        let Some(slot) = self.map.get_mut(&address) else { return };
        let before = *slot;
        slot.state = state;
        slot.used = used.unwrap_or(before.used);
        let after = *slot;
        self.count(address, before.used, before.state, false);
        self.count(address, after.used, after.state, true);
    }

    pub(crate) fn set_missing(&mut self, address: IpAddr, missing: bool) {
        let Some(slot) = self.map.get_mut(&address) else { return };
        if slot.missing != missing {
            slot.missing = missing;
            self.missing = if missing { self.missing + 1 } else { self.missing - 1 };
        }
    }

    pub(crate) fn remove(&mut self, address: IpAddr) {
        self.set_missing(address, false);
        if let Some(slot) = self.map.remove(&address) {
            self.count(address, slot.used, slot.state, false);
            self.prefixes.retain(|_, prefix| prefix.slots > 0 || !prefix.missing);
        }
    }

    /// Enters a prefix with the `count` addresses that are handed out of it; those that are here already stay as they are, except that they
    /// are known not to be missing. Says whether it is new.
    pub(crate) fn enter_prefix(&mut self, prefix: IpNetwork, count: u32) -> bool {
        if let Some(known) = self.prefixes.get_mut(&prefix) {
            known.missing = false;
            if known.releasing {
                return false;
            }
        }
        let new = !self.prefixes.contains_key(&prefix);
        if new {
            let inside: Vec<_> = self.map.range(prefix.network()..=prefix.broadcast()).map(|(a, s)| (*a, *s)).collect();
            for (address, slot) in &inside {
                self.count(*address, slot.used, slot.state, false);
            }
            self.prefixes.insert(prefix, Prefix::default());
            for (address, slot) in inside {
                self.count(address, slot.used, slot.state, true);
            }
        }
        for address in usable(prefix).take(usize::try_from(count).unwrap_or(0)) {
            self.enter(address, SlotState::Idle);
        }
        new
    }

    /// Whether something on the cloud's list is not here, or was thought missing. What was given back a moment ago is not lacking.
    pub(crate) fn lacks(&self, net: IpNetwork) -> bool {
        if net.is_host() {
            !self.stale_listings.contains_key(&net.ip()) && self.get(net.ip()).is_none_or(|slot| slot.missing)
        } else {
            !self.stale_prefix_listings.contains_key(&net)
                && self.prefixes.get(&net).is_none_or(|prefix| prefix.missing)
        }
    }

    /// Marks a prefix that no pod uses as going back.
    pub(crate) fn release_prefix(&mut self, prefix: IpNetwork) -> bool {
        if !self.prefixes.get(&prefix).is_some_and(|known| known.in_use == 0 && !known.releasing) {
            return false;
        }
        for address in self.inside(prefix) {
            self.set(address, SlotState::Releasing, None);
        }
        if let Some(known) = self.prefixes.get_mut(&prefix) {
            known.releasing = true;
        }
        true
    }

    /// Strikes a prefix with all its slots.
    pub(crate) fn remove_prefix(&mut self, prefix: IpNetwork) {
        for address in self.inside(prefix) {
            self.remove(address);
        }
        self.prefixes.remove(&prefix);
    }

    /// The cloud's list lacks a prefix: what no pod has of it goes, the rest is flagged. Returns what a pod has.
    pub(crate) fn lose_prefix(&mut self, prefix: IpNetwork) -> Vec<IpAddr> {
        if let Some(known) = self.prefixes.get_mut(&prefix) {
            known.missing = true;
        }
        let mut bound = Vec::new();
        for address in self.inside(prefix) {
            if self.get(address).is_some_and(|slot| slot.state == SlotState::Bound) {
                self.set_missing(address, true);
                bound.push(address);
            } else {
                self.remove(address);
            }
        }
        if bound.is_empty() {
            self.prefixes.remove(&prefix);
        }
        bound
    }

    pub(crate) fn inside(&self, prefix: IpNetwork) -> Vec<IpAddr> {
        self.map.range(prefix.network()..=prefix.broadcast()).map(|(address, _)| *address).collect()
    }

    /// Addresses that the call under way will add.
    pub(crate) fn incoming(&self) -> u32 {
        match self.call.as_ref().map(|call| &call.kind) {
            Some(CallKind::Assign { count, .. }) => *count,
            Some(CallKind::AssignPrefixes { count, each, .. }) => count * each,
            _ => 0,
        }
    }

    /// Places that the call under way will take.
    pub(crate) fn incoming_places(&self) -> u32 {
        match self.call.as_ref().map(|call| &call.kind) {
            Some(CallKind::Assign { count, .. } | CallKind::AssignPrefixes { count, .. }) => *count,
            _ => 0,
        }
    }

    /// Prefixes that the call under way will add.
    pub(crate) fn incoming_prefixes(&self) -> u32 {
        match self.call.as_ref().map(|call| &call.kind) {
            Some(CallKind::AssignPrefixes { count, .. }) => *count,
            _ => 0,
        }
    }

    /// Whether something waits for being given back.
    pub(crate) fn has_releasing(&self) -> bool {
        !self.releasing.is_empty() || self.prefixes.values().any(|prefix| prefix.releasing)
    }

    fn count(&mut self, address: IpAddr, used: u64, state: SlotState, add: bool) {
        let prefix = self.prefixes.iter_mut().find(|(prefix, _)| prefix.contains(address)).map(|(_, prefix)| prefix);
        let adjust = |n: &mut u32| *n = if add { *n + 1 } else { *n - 1 };
        match (state, add) {
            _ if prefix.is_some() => {
                if let Some(prefix) = prefix {
                    adjust(&mut prefix.slots);
                    match state {
                        SlotState::Idle if add => {
                            prefix.idle.insert((used, address));
                        }
                        SlotState::Idle => {
                            prefix.idle.remove(&(used, address));
                        }
                        SlotState::Bound | SlotState::Cooling { .. } => adjust(&mut prefix.in_use),
                        SlotState::Releasing => {}
                    }
                }
            }
            (SlotState::Idle, true) => {
                self.idle.insert((used, address));
            }
            (SlotState::Idle, false) => {
                self.idle.remove(&(used, address));
            }
            (SlotState::Releasing, true) => {
                self.releasing.insert(address);
            }
            (SlotState::Releasing, false) => {
                self.releasing.remove(&address);
            }
            _ => {}
        }
        let counter = match state {
            SlotState::Idle => &mut self.counts.idle,
            SlotState::Bound => &mut self.counts.bound,
            SlotState::Cooling { .. } => &mut self.counts.cooling,
            SlotState::Releasing => &mut self.counts.releasing,
        };
        adjust(counter);
    }
}

/// The addresses of a prefix that are handed out, in order. The first of an IPv6 prefix is the routers' anycast address (RFC 4291, 2.6.1).
fn usable(prefix: IpNetwork) -> impl Iterator<Item = IpAddr> {
    let first = prefix.network();
    (0u128..).map_while(move |n| match first {
        IpAddr::V4(first) => Some(IpAddr::V4(std::net::Ipv4Addr::from_bits(first.to_bits() + u32::try_from(n).ok()?))),
        IpAddr::V6(first) => Some(IpAddr::V6(std::net::Ipv6Addr::from_bits(first.to_bits() + n + 1))),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(n: u8) -> IpAddr {
        [10, 0, 0, n].into()
    }

    #[test]
    fn address_selection_is_least_recently_used() {
        let mut slots = Slots::default();
        for n in [3, 1, 2] {
            assert!(slots.enter(ip(n), SlotState::Idle));
        }
        for (n, used) in [(1, 7), (2, 5)] {
            slots.set(ip(n), SlotState::Bound, Some(used));
            slots.set(ip(n), SlotState::Idle, None);
        }
        assert_eq!(slots.idle().collect::<Vec<_>>(), [ip(3), ip(2), ip(1)]);
        assert_eq!(slots.least_recently_used(), Some((0, ip(3))));
    }

    #[test]
    fn slot_counts() {
        let mut slots = Slots::default();
        slots.enter(ip(1), SlotState::Idle);
        slots.enter(ip(2), SlotState::Bound);
        assert!(!slots.enter(ip(2), SlotState::Idle), "an address that is known keeps its state");
        slots.set_missing(ip(2), true);
        slots.set_missing(ip(2), true);
        assert_eq!((slots.missing(), slots.len()), (1, 2));
        slots.set(ip(2), SlotState::Releasing, None);
        slots.set(ip(9), SlotState::Bound, None);
        assert_eq!(slots.counts(), Counts { idle: 1, bound: 0, cooling: 0, releasing: 1 });
        slots.remove(ip(2));
        slots.remove(ip(2));
        assert_eq!((slots.missing(), slots.len(), slots.releasing().len()), (0, 1, 0));
    }

    #[test]
    fn prefix_is_filled_and_released_as_a_whole() {
        let mut slots = Slots::default();
        slots.enter([10, 0, 9, 9].into(), SlotState::Idle);
        let prefixes: [IpNetwork; 2] = ["10.0.0.0/28".parse().unwrap(), "10.0.0.16/28".parse().unwrap()];
        // The pod that a restart found before it knew of the prefix.
        slots.enter(ip(3), SlotState::Bound);
        assert!(prefixes.iter().all(|prefix| slots.enter_prefix(*prefix, 16)));
        assert!(!slots.enter_prefix(prefixes[0], 16));
        assert_eq!((slots.len(), slots.places(), slots.counts().idle, slots.idle_singles()), (33, 3, 32, 1));
        let mut taken = Vec::new();
        for _ in 0..3 {
            let (_, address) = slots.least_recently_used().unwrap();
            slots.set(address, SlotState::Bound, None);
            taken.push(address);
        }
        assert_eq!(
            taken,
            [[10, 0, 9, 9].into(), ip(0), ip(1)],
            "singles first, then the prefix that is in use already"
        );
        assert!(!slots.release_prefix(prefixes[0]) && slots.release_prefix(prefixes[1]));
        assert_eq!((slots.counts().releasing, slots.releasing().len(), slots.has_releasing()), (16, 0, true));
        slots.remove_prefix(prefixes[1]);
        assert_eq!((slots.len(), slots.places()), (17, 2));
        assert_eq!(slots.lose_prefix(prefixes[0]), [ip(0), ip(1), ip(3)]);
        assert_eq!((slots.missing(), slots.counts().idle, slots.least_recently_used()), (3, 0, None));
        for n in [0, 1, 3] {
            slots.remove(ip(n));
        }
        assert!(slots.prefixes().is_empty() && slots.places() == 1);
    }
}
