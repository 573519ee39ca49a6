//! Time as a value. Nothing in this crate asks what time it is; the daemon passes it in.

use std::time::Duration;

/// A point on the daemon's monotonic clock, in nanoseconds since an origin that only the daemon knows.
///
/// Moments of different runs of the daemon do not compare: state that is written to disk holds durations, never moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(u64);

impl Moment {
    /// The origin of the clock.
    pub const ZERO: Self = Self(0);

    /// `ns` nanoseconds after the origin.
    #[must_use]
    pub const fn from_nanos(ns: u64) -> Self {
        Self(ns)
    }

    /// Nanoseconds since the origin.
    #[must_use]
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// The moment `by` later; stays at the end of time rather than wrapping.
    #[must_use]
    pub const fn after(self, by: Duration) -> Self {
        let ns = by.as_nanos();
        if ns > u64::MAX as u128 { Self(u64::MAX) } else { Self(self.0.saturating_add(ns as u64)) }
    }

    /// How long ago `earlier` was; zero if it lies ahead.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moment_arithmetic_saturates() {
        let m = Moment::from_nanos(5);
        assert_eq!(m.after(Duration::MAX), Moment::from_nanos(u64::MAX));
        assert_eq!(m.since(Moment::from_nanos(9)), Duration::ZERO);
        assert_eq!(Moment::from_nanos(9).since(m), Duration::from_nanos(4));
    }
}
