//! From what one event changed to operations in an order in which every packet meets the state before the event or the state after it.
//!
//! Three kinds of writes. *Fresh*: things with numbers that nothing refers to yet. *Neutral*: addresses that change their identity but not what
//! any set says about them. *Visible*: all else. Visible changes that one packet could meet two of are written for the version that does not count,
//! and one write makes that version count. The version that counted is brought up to date later, after a fence: before the next such change, or by
//! [`Compiler::run_deferred`]. What nothing refers to any more is removed after a fence, too, because a running program may still refer to it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::compiler::Compiler;
use super::ids::{Identity, RuleId, SetId, VerdictOrTable};
use super::op::{EndpointPolicy, FlowScope, Op, Versioned};

/// What one event has changed so far.
#[derive(Debug, Default)]
pub(super) struct Change {
    pub(super) fresh: Vec<Op>,
    pub(super) neutral: Vec<Op>,
    pub(super) addresses: BTreeMap<IpAddr, (Identity, Identity)>,
    pub(super) peers: BTreeMap<(SetId, Identity), (VerdictOrTable, VerdictOrTable)>,
    pub(super) endpoints: BTreeMap<u32, EndpointPolicy>,
    pub(super) enforce: Option<bool>,
    pub(super) stale: BTreeSet<FlowScope>,
    /// Removals of what nothing refers to any more.
    pub(super) garbage: Vec<Op>,
    /// Sets that are gone, with their entries.
    pub(super) sets: Vec<GoneSet>,
}

/// A set's number, and what it spoke of.
pub(super) type GoneSet = (SetId, Vec<(Identity, VerdictOrTable)>);

impl Change {
    /// An address has another identity, and with it perhaps another answer.
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

/// What waits for a fence.
#[derive(Debug, Default)]
pub(super) struct Deferred {
    /// Entries whose other version is out of date.
    unsettled: BTreeMap<Item, Value>,
    /// Entries that nothing refers to any more.
    garbage: Vec<Op>,
    /// Sets that are gone. Their entries become operations when it is their turn: a change has enough of its own.
    sets: Vec<GoneSet>,
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
    fn flush(&mut self, version: usize, ops: &mut Vec<Op>) {
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
fn write(item: Item, now: Value, next: Value, version: usize) -> Op {
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

impl Compiler {
    /// The operations for what has changed.
    pub(super) fn commit(&mut self) -> Vec<Op> {
        let change = std::mem::take(&mut self.change);
        let mut ops = Vec::new();
        let mut visible: Vec<(Item, Value, Value)> = Vec::new();
        for (address, (old, new)) in &change.addresses {
            visible.push((Item::Address(*address), Value::Address(*old), Value::Address(*new)));
        }
        for ((set, identity), (old, new)) in &change.peers {
            visible.push((Item::Peer(*set, *identity), Value::Peer(*old), Value::Peer(*new)));
        }
        for (slot, new) in &change.endpoints {
            visible.push((Item::Endpoint(*slot), Value::Endpoint(*new), Value::Endpoint(*new)));
        }
        // A packet meets at most one remote address, and the addresses of one event are one pod's or one node's.
        let single = change.endpoints.is_empty()
            && change.enforce.is_none()
            && (change.peers.is_empty() || change.peers.len() == 1 && change.addresses.is_empty());
        let again = visible.iter().any(|(item, ..)| self.deferred.unsettled.contains_key(item));
        if !single || !change.neutral.is_empty() || again {
            self.deferred.flush(self.version, &mut ops);
        }
        append(&mut ops, change.fresh);
        append(&mut ops, change.neutral);
        if single {
            ops.extend(visible.into_iter().map(|(item, _, new)| write(item, new, new, self.version)));
        } else {
            for (item, old, new) in visible {
                ops.push(write(item, old, new, self.version));
                self.deferred.unsettled.insert(item, new);
            }
            self.version = 1 - self.version;
            self.enforce = change.enforce.unwrap_or(self.enforce);
            ops.push(Op::SetControlWord { version: self.version, enforce: self.enforce });
        }
        ops.extend(change.stale.into_iter().map(Op::Revalidate));
        append(&mut self.deferred.garbage, change.garbage);
        self.deferred.sets.extend(change.sets);
        ops
    }

    /// Does what was left for deferred: brings the other version up to date, removes what nothing refers to any more. Decides nothing anew; to be
    /// called when there is time, and not at all is no harm but memory.
    pub fn run_deferred(&mut self) -> Vec<Op> {
        let mut ops = Vec::new();
        self.deferred.flush(self.version, &mut ops);
        for reason in std::mem::take(&mut self.deferred.reasons) {
            self.reasons.release(reason);
        }
        let blocks = std::mem::take(&mut self.deferred.blocks);
        if !blocks.is_empty() && ops.is_empty() {
            ops.push(Op::RcuBarrier);
        }
        for net in blocks {
            self.remove_block(net);
        }
        self.refresh_identities();
        let change = std::mem::take(&mut self.change);
        ops.extend(change.fresh);
        ops.extend(change.neutral);
        self.deferred.garbage.extend(change.garbage);
        self.deferred.sets.extend(change.sets);
        ops
    }

    /// Whether [`Compiler::run_deferred`] has anything to do.
    #[must_use]
    pub fn has_deferred(&self) -> bool {
        !(self.deferred.unsettled.is_empty()
            && self.deferred.garbage.is_empty()
            && self.deferred.sets.is_empty()
            && self.deferred.blocks.is_empty()
            && self.deferred.reasons.is_empty())
    }
}
