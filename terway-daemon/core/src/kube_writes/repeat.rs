//! A limit for writes that are repeated: another writer that undoes each of them must not be answered without end.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::Duration;

use crate::clock::Moment;

/// After this time without a write it begins anew.
const FORGET_AFTER: Duration = Duration::from_secs(600);

/// Remembers what was written when. The same write is allowed again after a pause that doubles each time.
///
/// The first pause is also the time for the object source to show what was written.
#[derive(Debug)]
pub struct RepeatLimiter<W> {
    written: HashMap<W, (Moment, Duration)>,
    first: Duration,
    longest: Duration,
}

impl<W: Hash + Eq> RepeatLimiter<W> {
    /// A limiter with the first and the longest pause.
    #[must_use]
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self { written: HashMap::new(), first, longest }
    }

    /// Whether the write is allowed now.
    ///
    /// # Errors
    /// From when on it is.
    pub fn check(&self, write: &W, now: Moment) -> Result<(), Moment> {
        let due = self.written.get(write).map(|(at, pause)| at.after(*pause));
        due.filter(|due| *due > now).map_or(Ok(()), Err)
    }

    /// Notes that it was written.
    pub fn written(&mut self, write: W, now: Moment) {
        self.written.retain(|_, (at, _)| now.since(*at) < FORGET_AFTER);
        let pause = self.written.get(&write).map_or(self.first, |(_, pause)| (*pause * 2).min(self.longest));
        self.written.insert(write, (now, pause));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_write_is_slowed_down_and_another_is_not() {
        let at = |seconds| Moment::ZERO.after(Duration::from_secs(seconds));
        let mut limiter = RepeatLimiter::new(Duration::from_secs(5), Duration::from_secs(15));
        assert_eq!(limiter.check(&"a", at(0)), Ok(()));
        for (written, due) in [(0, 5), (5, 15), (15, 30), (30, 45)] {
            limiter.written("a", at(written));
            assert_eq!(limiter.check(&"a", at(written + 1)), Err(at(due)));
            assert_eq!(limiter.check(&"a", at(due)), Ok(()));
            assert_eq!(limiter.check(&"b", at(written + 1)), Ok(()));
        }
        limiter.written("b", at(1000));
        limiter.written("a", at(1000));
        assert_eq!(limiter.check(&"a", at(1000)), Err(at(1005)), "forgotten after ten minutes");
    }
}
