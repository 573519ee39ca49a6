//! What reading actions show while writes are not visible yet.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use terway_core::ident::EniId;

use super::vpc::EniRecord;

/// All ENIs at a moment.
pub(super) type Enis = BTreeMap<EniId, EniRecord>;

/// The states that a reader may still see.
#[derive(Default)]
pub(super) struct History(VecDeque<(Instant, Arc<Enis>)>);

impl History {
    /// Writes down the state after a change; what is older than `keep` and not the newest such is dropped.
    pub(super) fn record(&mut self, now: Instant, enis: &Enis, keep: Duration) {
        self.0.push_back((now, Arc::new(enis.clone())));
        while self.0.get(1).is_some_and(|(at, _)| now.duration_since(*at) >= keep) {
            self.0.pop_front();
        }
    }

    /// The state `lag` ago, or the oldest that is known.
    pub(super) fn seen(&self, now: Instant, lag: Duration) -> Option<Arc<Enis>> {
        let old = self.0.iter().rev().find(|(at, _)| now.duration_since(*at) >= lag);
        old.or_else(|| self.0.front()).map(|(_, enis)| Arc::clone(enis))
    }
}
