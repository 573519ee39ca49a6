//! Timers of the pool, and the wake-up that the engine was told of.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::clock::Moment;
use crate::ident::{AttachmentKey, EniId, Family};
use crate::ipam::ids::ClientToken;

/// A timer: what is looked at when its moment has come. A timer that fires too early, or for what is gone, does nothing.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Timer {
    Cooled(EniId, IpAddr),
    StaleListing(EniId, IpNetwork),
    Creation(ClientToken),
    Call(EniId, Family),
    Eni(EniId),
    Disconnect(AttachmentKey),
    Inventory,
    /// A block has ended, or an excess is old enough: planning, which ends every step, sees it.
    Plan,
}

/// The pending timers.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    pending: BTreeSet<(Moment, Timer)>,
    /// The moment of the last `WakeAt`, while it lies ahead.
    announced: Option<Moment>,
}

impl Timers {
    pub(crate) fn set(&mut self, at: Moment, timer: Timer) {
        self.pending.insert((at, timer));
    }

    /// The next timer whose moment has come.
    pub(crate) fn pop_due(&mut self, now: Moment) -> Option<Timer> {
        self.pending.first().filter(|(at, _)| *at <= now)?;
        self.pending.pop_first().map(|(_, timer)| timer)
    }

    /// The wake-up that the engine must be told of, if it does not know it already.
    pub(crate) fn next_wakeup(&mut self, now: Moment) -> Option<Moment> {
        if self.announced.is_some_and(|at| at <= now) {
            self.announced = None;
        }
        // A wake-up whose timer has gone costs one empty step, less than cancelling would.
        let next = self.pending.first().map(|(at, _)| *at)?;
        if self.announced.is_some_and(|at| at <= next) {
            return None;
        }
        self.announced = Some(next);
        Some(next)
    }
}
