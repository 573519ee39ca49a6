//! How long addresses have been idle, for giving them back.

use std::time::Duration;

use crate::clock::Moment;

/// The times of use of the pool's addresses.
#[derive(Debug, Default)]
pub(crate) struct IdleClock {
    /// When an address was last bound or freed.
    last_use: Moment,
    /// Uses ended so far: the clock of least-recently-used.
    uses: u64,
    /// When the next batch may be reclaimed.
    reclaim_at: Option<Moment>,
    /// Since when there are too many idle units.
    excess_since: Option<Moment>,
}

impl IdleClock {
    /// An address was bound or freed.
    pub(crate) const fn used(&mut self, now: Moment) {
        self.last_use = now;
        self.reclaim_at = None;
    }

    /// Counts the end of a use.
    pub(crate) const fn use_ended(&mut self) -> u64 {
        self.uses += 1;
        self.uses
    }

    pub(crate) const fn uses(&self) -> u64 {
        self.uses
    }

    /// When the next batch may be reclaimed, if reclaim begins `after` the last use.
    pub(crate) fn reclaim_at(&self, after: Duration) -> Moment {
        let due = self.last_use.after(after);
        self.reclaim_at.map_or(due, |next| next.max(due))
    }

    pub(crate) const fn reclaim_next(&mut self, at: Moment) {
        self.reclaim_at = Some(at);
    }

    /// Since when there has been an excess; `None` if this is the first time it is seen.
    pub(crate) const fn excess_since(&mut self, now: Moment) -> Option<Moment> {
        if self.excess_since.is_none() {
            self.excess_since = Some(now);
            return None;
        }
        self.excess_since
    }

    pub(crate) const fn no_excess(&mut self) {
        self.excess_since = None;
    }

    /// The watermarks have changed: all waiting begins anew.
    pub(crate) const fn restart(&mut self) {
        (self.excess_since, self.reclaim_at) = (None, None);
    }
}
