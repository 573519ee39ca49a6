//! The addresses of one family on one ENI, and the one call about them that may be under way.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::event::{OpId, Token};
use crate::clock::Moment;
use crate::cloud::CloudError;

/// What an address is doing. `Absent` is not being in the table, `Creating` is being part of an [`Call::Assign`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SlotState {
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
pub(super) struct Slot {
    pub(super) state: SlotState,
    /// When its last use ended, as a count of such ends on this node; 0 is never in this run.
    pub(super) used: u64,
    /// The cloud's list lacks it although a pod has it.
    pub(super) missing: bool,
}

/// A cloud call about these addresses.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) kind: CallKind,
    /// The attempt under way; `None` while it waits to be repeated.
    pub(super) op: Option<OpId>,
    pub(super) failures: u32,
    pub(super) error: Option<CloudError>,
    /// An attempt ended without an outcome.
    pub(super) uncertain: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum CallKind {
    Assign { token: Token, count: u32 },
    Unassign { addresses: Vec<IpAddr> },
}

/// How many slots are in which state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) idle: u32,
    pub(super) bound: u32,
    pub(super) cooling: u32,
    pub(super) releasing: u32,
}

#[derive(Debug, Default)]
pub(super) struct Slots {
    map: BTreeMap<IpAddr, Slot>,
    /// Least recently used first.
    idle: BTreeSet<(u64, IpAddr)>,
    releasing: BTreeSet<IpAddr>,
    counts: Counts,
    missing: u32,
    pub(super) call: Option<Call>,
    /// Given back so lately that the cloud's lists may still show them.
    pub(super) ghosts: BTreeMap<IpAddr, Moment>,
    /// No assign call until then, and why.
    pub(super) blocked: Option<(Moment, CloudError)>,
    /// When the last call ended: lists taken before, or shortly after, say nothing about this table.
    pub(super) changed: Option<Moment>,
    /// A give-back of several failed because one of them was gone already: go one by one.
    pub(super) one_by_one: bool,
}

impl Slots {
    pub(super) const fn counts(&self) -> Counts {
        self.counts
    }

    pub(super) const fn missing(&self) -> u32 {
        self.missing
    }

    pub(super) fn len(&self) -> u32 {
        let Counts { idle, bound, cooling, releasing } = self.counts;
        idle + bound + cooling + releasing
    }

    /// Whether a pod has, or had a moment ago, one of these.
    pub(super) const fn in_use(&self) -> bool {
        self.counts.bound + self.counts.cooling > 0
    }

    pub(super) fn get(&self, address: IpAddr) -> Option<Slot> {
        self.map.get(&address).copied()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (IpAddr, Slot)> {
        self.map.iter().map(|(address, slot)| (*address, *slot))
    }

    pub(super) const fn releasing(&self) -> &BTreeSet<IpAddr> {
        &self.releasing
    }

    /// The idle address that was used longest ago.
    pub(super) fn coldest(&self) -> Option<(u64, IpAddr)> {
        self.idle.first().copied()
    }

    /// Idle addresses, coldest first.
    pub(super) fn idle(&self) -> impl Iterator<Item = IpAddr> {
        self.idle.iter().map(|(_, address)| *address)
    }

    /// Enters a new address; one that is here already stays as it is, except that it is known not to be missing.
    /// Says whether it is new.
    pub(super) fn enter(&mut self, address: IpAddr, state: SlotState) -> bool {
        if self.map.contains_key(&address) {
            self.set_missing(address, false);
            return false;
        }
        self.map.insert(address, Slot { state, used: 0, missing: false });
        self.count(address, 0, state, true);
        true
    }

    /// Changes the state of an address that is here; `used` marks the end of a use.
    pub(super) fn set(&mut self, address: IpAddr, state: SlotState, used: Option<u64>) {
        let Some(slot) = self.map.get_mut(&address) else { return };
        let before = *slot;
        slot.state = state;
        slot.used = used.unwrap_or(before.used);
        let after = *slot;
        self.count(address, before.used, before.state, false);
        self.count(address, after.used, after.state, true);
    }

    pub(super) fn set_missing(&mut self, address: IpAddr, missing: bool) {
        let Some(slot) = self.map.get_mut(&address) else { return };
        if slot.missing != missing {
            slot.missing = missing;
            self.missing = if missing { self.missing + 1 } else { self.missing - 1 };
        }
    }

    pub(super) fn remove(&mut self, address: IpAddr) {
        self.set_missing(address, false);
        if let Some(slot) = self.map.remove(&address) {
            self.count(address, slot.used, slot.state, false);
        }
    }

    /// Addresses that the call under way will add.
    pub(super) fn incoming(&self) -> u32 {
        match &self.call {
            Some(Call { kind: CallKind::Assign { count, .. }, .. }) => *count,
            _ => 0,
        }
    }

    fn count(&mut self, address: IpAddr, used: u64, state: SlotState, add: bool) {
        match (state, add) {
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
        *counter = if add { *counter + 1 } else { *counter - 1 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(n: u8) -> IpAddr {
        [10, 0, 0, n].into()
    }

    #[test]
    fn never_used_addresses_go_first_then_the_least_recently_used() {
        let mut slots = Slots::default();
        for n in [3, 1, 2] {
            assert!(slots.enter(ip(n), SlotState::Idle));
        }
        for (n, used) in [(1, 7), (2, 5)] {
            slots.set(ip(n), SlotState::Bound, Some(used));
            slots.set(ip(n), SlotState::Idle, None);
        }
        assert_eq!(slots.idle().collect::<Vec<_>>(), [ip(3), ip(2), ip(1)]);
        assert_eq!(slots.coldest(), Some((0, ip(3))));
    }

    #[test]
    fn counts_follow_every_change() {
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
}
