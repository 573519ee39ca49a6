//! When demand arose, so that one call serves a burst of ADDs.

use std::time::Duration;

use crate::clock::Moment;

/// The times of demand.
#[derive(Debug)]
pub(crate) struct DemandClock {
    /// Since when more is wanted than is there or on its way.
    since: Option<Moment>,
    last_add: Moment,
    is_warming_up: bool,
}

impl DemandClock {
    pub(crate) const fn new(is_warming_up: bool) -> Self {
        Self { since: None, last_add: Moment::ZERO, is_warming_up }
    }

    /// An ADD was queued.
    pub(crate) const fn add_queued(&mut self, now: Moment) {
        self.last_add = now;
    }

    /// Nothing is wanted that is neither there nor on its way.
    pub(crate) const fn satisfied(&mut self) {
        self.since = None;
    }

    /// When the cloud is to be asked: a window after the last ADD, at most five windows after demand arose.
    pub(crate) fn ask_at(&mut self, now: Moment, window: Duration) -> Moment {
        let since = *self.since.get_or_insert(now);
        self.last_add.after(window).min(since.after(window * 5))
    }

    /// Whether the warm-up of a new node is still to be done.
    pub(crate) const fn is_warming_up(&self) -> bool {
        self.is_warming_up
    }

    pub(crate) const fn end_warm_up(&mut self) {
        self.is_warming_up = false;
    }
}
