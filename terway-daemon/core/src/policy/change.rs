//! A pending change, written in an order in which every packet meets the state before the event or the state after it.
//!
//! Three kinds of writes. *Fresh*: things with numbers that nothing refers to yet. *Neutral*: addresses that change their identity but not what
//! any set says about them. *Visible*: all else. Visible changes that one packet could meet two of are written for the version that does not count,
//! and one write makes that version count. The version that counted is brought up to date later, after a fence: before the next such change, or by
//! [`Compiler::run_deferred`]. What nothing refers to any more is removed after a fence, too, because a running program may still refer to it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::ids::{Identity, RuleId, SetId, VerdictOrTable};
use super::op::{EndpointPolicy, FlowScope, Op, Versioned};

/// The changes of one event so far.
#[derive(Debug, Default)]
pub(super) struct Change {
    pub(super) fresh: Vec<Op>,
    pub(super) neutral: Vec<Op>,
    pub(super) addresses: BTreeMap<IpAddr, (Identity, Identity)>,
    pub(super) peers: BTreeMap<(SetId, Identity), (VerdictOrTable, VerdictOrTable)>,
    pub(super) endpoints: BTreeMap<u32, EndpointPolicy>,
    pub(super) enforce: Option<bool>,
    pub(super) stale: BTreeSet<FlowScope>,
    /// Removals of entries that nothing refers to any more.
    pub(super) garbage: Vec<Op>,
    /// Removed sets, with their entries.
    pub(super) sets: Vec<GoneSet>,
}

/// The id of a removed set, and its entries.
pub(super) type GoneSet = (SetId, Vec<(Identity, VerdictOrTable)>);

impl Change {
    /// An address gets another identity, and with it perhaps another verdict.
    pub(super) fn address(&mut self, address: IpAddr, old: Identity, new: Identity) {
        let first = self.addresses.get(&address).map_or(old, |(first, _)| *first);
        if first == new {
            self.addresses.remove(&address);
        } else {
            self.addresses.insert(address, (first, new));
        }
        self.stale.insert(FlowScope::Address(address));
    }
}

/// A map entry with a value for each version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Item {
    Address(IpAddr),
    Peer(SetId, Identity),
    Endpoint(u32),
}

/// What an entry holds in the version that counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Value {
    Address(Identity),
    Peer(VerdictOrTable),
    Endpoint(EndpointPolicy),
}

/// Deferred work: what waits for an RCU grace period.
#[derive(Debug, Default)]
pub(super) struct Deferred {
    /// Entries whose other version is out of date.
    pub(super) unsettled: BTreeMap<Item, Value>,
    /// Entries that nothing refers to any more.
    pub(super) garbage: Vec<Op>,
    /// Removed sets. Their entries become operations later, so that a change does not get longer.
    pub(super) sets: Vec<GoneSet>,
    /// RuleIds of sets that are gone: events that name them may still be on their way.
    pub(super) reasons: Vec<RuleId>,
    /// Blocks that no policy names any more.
    pub(super) blocks: BTreeSet<IpNetwork>,
}

impl Deferred {
    /// The entry is gone or was written for both versions.
    pub(super) fn settled(&mut self, item: Item) {
        self.unsettled.remove(&item);
    }

    /// As [`Deferred::settled`], for the entries that a set still has. One that it had in a version only is not among these, and is removed when the
    /// other version is brought up to date.
    pub(super) fn settled_entries(&mut self, set: SetId, has: impl Fn(Identity) -> bool) {
        let all = self.unsettled.range(Item::Peer(set, Identity(0))..=Item::Peer(set, Identity(u32::MAX)));
        let items = all.map(|(item, _)| *item).filter(|item| matches!(item, Item::Peer(_, of) if has(*of)));
        for item in items.collect::<Vec<_>>() {
            self.unsettled.remove(&item);
        }
    }

    /// Brings the other version up to date and removes what is not needed, all behind a fence.
    pub(super) fn flush(&mut self, version: usize, ops: &mut Vec<Op>) {
        if self.unsettled.is_empty() && self.garbage.is_empty() && self.sets.is_empty() {
            return;
        }
        ops.push(Op::RcuBarrier);
        for (item, value) in std::mem::take(&mut self.unsettled) {
            ops.push(write(item, value, value, version));
        }
        ops.append(&mut self.garbage);
        ops.reserve(self.sets.iter().map(|(_, entries)| entries.len()).sum());
        for (set, entries) in std::mem::take(&mut self.sets) {
            ops.extend(entries.into_iter().map(|(identity, _)| Op::RemovePeer { set, identity }));
        }
    }
}

fn pair<T: Copy>(now: T, next: T, version: usize) -> Versioned<T> {
    if version == 0 { [now, next] } else { [next, now] }
}

/// Writes an entry: `now` in the version that counts, `next` in the other one. An entry that says nothing in either is removed.
pub(super) fn write(item: Item, now: Value, next: Value, version: usize) -> Op {
    match (item, now, next) {
        (Item::Address(address), Value::Address(Identity::NONE), Value::Address(Identity::NONE)) => {
            Op::RemoveAddress(address)
        }
        (Item::Address(address), Value::Address(now), Value::Address(next)) => {
            Op::PutAddress { address, identities: pair(now, next, version) }
        }
        (Item::Peer(set, identity), Value::Peer(VerdictOrTable::NONE), Value::Peer(VerdictOrTable::NONE)) => {
            Op::RemovePeer { set, identity }
        }
        (Item::Peer(set, identity), Value::Peer(now), Value::Peer(next)) => {
            Op::PutPeer { set, identity, verdicts: pair(now, next, version) }
        }
        // Endpoints have an entry for each version: only the one that does not count is ever written.
        (Item::Endpoint(slot), _, Value::Endpoint(value)) => {
            Op::PutEndpoint { slot, version: 1 - version, value: Box::new(value) }
        }
        _ => Op::RcuBarrier,
    }
}

/// As `extend`, but what is the first of its kind, and may be a great many, is not copied.
pub(super) fn append(all: &mut Vec<Op>, more: Vec<Op>) {
    if all.is_empty() {
        *all = more;
    } else {
        all.extend(more);
    }
}
