//! Allocation of ids.

use std::collections::{BTreeSet, VecDeque};

/// An id allocator, from 1 up. A released id is used again, the longest unused first: what may still refer to it in the kernel is as old as possible.
#[derive(Debug)]
pub(super) struct Ids {
    next: u32,
    free: VecDeque<u32>,
}

impl Ids {
    /// An allocator with these ids in use already.
    pub(super) fn new(used: impl Iterator<Item = u32>) -> Self {
        let used: BTreeSet<u32> = used.collect();
        let next = used.last().map_or(1, |last| last.saturating_add(1));
        Self { next, free: (1..next).filter(|id| !used.contains(id)).collect() }
    }

    pub(super) fn take(&mut self) -> u32 {
        if let Some(id) = self.free.pop_front() {
            return id;
        }
        let id = self.next;
        self.next += 1;
        id
    }

    pub(super) fn give_back(&mut self, id: u32) {
        self.free.push_back(id);
    }
}
