//! Committing a change: from what one event changed to operations in their order.

use super::change::{Item, Value, append, write};
use super::compiler::Compiler;
use super::op::Op;

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
