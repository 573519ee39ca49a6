//! How often the tables are gone through.
//!
//! The rule is Cilium's (pkg/maps/ctmap/gc, `GetInterval`): where a quarter of the table was dead the next pass comes sooner, where
//! next to nothing was it comes later.

use std::time::Duration;

/// The first interval.
pub const START: Duration = Duration::from_secs(300);
/// The shortest.
pub const FLOOR: Duration = Duration::from_secs(10);

/// A part of a table, above which passes come sooner, and below which they come later.
const MUCH: f64 = 0.25;
const LITTLE: f64 = 0.05;
/// A table is tight from here on: whatever is dead in it is taken away at once.
const TIGHT: f64 = 0.85;

/// The pace of collecting.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GcInterval {
    pinned: Option<Duration>,
    longest: Duration,
    interval: Duration,
}

impl GcInterval {
    /// A pace that adapts itself up to `longest`, or is always `pinned`.
    #[must_use]
    pub fn new(pinned: Option<Duration>, longest: Duration) -> Self {
        let longest = longest.max(FLOOR);
        Self { pinned, longest, interval: START.min(longest) }
    }

    /// Takes other bounds; what it has learned stays.
    pub fn configure(&mut self, pinned: Option<Duration>, longest: Duration) {
        self.pinned = pinned;
        self.longest = longest.max(FLOOR);
        self.interval = self.interval.min(self.longest);
    }

    /// Time from one pass to the next.
    #[must_use]
    pub fn interval(&self) -> Duration {
        self.pinned.unwrap_or(self.interval)
    }

    /// Takes in that a pass, `since` after the one before, has deleted so many entries of the fullest table, which has room for `capacity`.
    pub fn passed(&mut self, deleted: u64, capacity: u64, since: Duration) {
        let mut part = deleted as f64 / capacity.max(1) as f64;
        // A pass that came early has found less than it would have.
        if since < self.interval && !since.is_zero() {
            part *= self.interval.as_secs_f64() / since.as_secs_f64();
        }
        if part > MUCH {
            self.interval = self.interval.mul_f64(1.0 - part.min(0.9)).max(FLOOR);
        } else if part > 0.0 && part < LITTLE {
            self.interval = self.interval.mul_f64(1.5).min(self.longest);
        }
    }

    /// Whether a table of `capacity` with `used` entries, `dead` of them, should not wait for the next pass.
    #[must_use]
    pub fn is_urgent(used: u64, dead: u64, capacity: u64) -> bool {
        let capacity = capacity.max(1) as f64;
        dead > 0 && (dead as f64 > MUCH * capacity || used as f64 > TIGHT * capacity)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LONGEST: Duration = Duration::from_secs(1800);

    proptest! {
        #[test]
        fn gc_interval_is_bounded_and_adapts(passes in prop::collection::vec((0..2000_u64, 1..4000_u64), 1..60)) {
            let mut pace = GcInterval::new(None, LONGEST);
            for (deleted, since) in passes {
                let before = pace.interval();
                let since = Duration::from_secs(since);
                pace.passed(deleted, 1000, since);
                prop_assert!((FLOOR..=LONGEST).contains(&pace.interval()));
                let early = before.as_secs_f64() / since.as_secs_f64().min(before.as_secs_f64());
                match deleted as f64 / 1000.0 * early {
                    part if part > 0.25 => prop_assert!(pace.interval() < before || before == FLOOR),
                    part if part > 0.0 && part < 0.05 => prop_assert!(pace.interval() > before || before == LONGEST),
                    _ => prop_assert_eq!(pace.interval(), before),
                }
            }
        }
    }

    #[test]
    fn gc_interval_under_flood() {
        let mut pace = GcInterval::new(None, LONGEST);
        (0..3).for_each(|_| pace.passed(900, 1000, pace.interval()));
        assert_eq!(pace.interval(), FLOOR);
        (0..20).for_each(|_| pace.passed(1, 1000, pace.interval()));
        assert_eq!(pace.interval(), LONGEST);
        // An idle node's table says nothing.
        let mut idle = GcInterval::new(None, LONGEST);
        idle.passed(0, 1000, START);
        assert_eq!(idle.interval(), START);
        let mut pinned = GcInterval::new(Some(Duration::from_secs(7)), LONGEST);
        pinned.passed(900, 1000, START);
        assert_eq!(pinned.interval(), Duration::from_secs(7));
    }

    #[test]
    fn gc_interval_of_full_table() {
        assert!(!GcInterval::is_urgent(1000, 0, 1000), "nothing is to be had");
        assert!(GcInterval::is_urgent(900, 1, 1000) && !GcInterval::is_urgent(500, 100, 1000));
        assert!(GcInterval::is_urgent(500, 300, 1000));
    }
}
