//! A token bucket that is told the time.

use std::time::Duration;

use crate::clock::Moment;

/// A token bucket: `burst` tokens at first, one more each `interval`, up to `burst`.
#[derive(Clone, Copy, Debug)]
pub(super) struct TokenBucket {
    interval: Duration,
    burst: u32,
    tokens: u32,
    /// Up to this moment tokens have been added.
    filled: Moment,
}

impl TokenBucket {
    pub(super) const fn new(burst: u32, interval: Duration, now: Moment) -> Self {
        Self { interval, burst, tokens: burst, filled: now }
    }

    /// Takes a token; without one, says when there will be one.
    pub(super) fn take(&mut self, now: Moment) -> Result<(), Moment> {
        let interval = self.interval.as_nanos().max(1);
        let gained = now.since(self.filled).as_nanos() / interval;
        if gained >= u128::from(self.burst - self.tokens) {
            (self.tokens, self.filled) = (self.burst, now);
        } else {
            let gained = u32::try_from(gained).unwrap_or(u32::MAX);
            self.tokens += gained;
            self.filled = self.filled.after(self.interval.saturating_mul(gained));
        }
        match self.tokens.checked_sub(1) {
            Some(left) => {
                self.tokens = left;
                Ok(())
            }
            None => Err(self.filled.after(self.interval)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_bucket_gives_its_burst_and_then_one_per_interval() {
        let at = |seconds| Moment::ZERO.after(Duration::from_secs(seconds));
        let mut bucket = TokenBucket::new(2, Duration::from_secs(10), at(0));
        assert_eq!([bucket.take(at(0)), bucket.take(at(1))], [Ok(()), Ok(())]);
        // Full until the first take, so the interval begins with it.
        assert_eq!(bucket.take(at(2)), Err(at(10)));
        assert_eq!(bucket.take(at(10)), Ok(()));
        assert_eq!(bucket.take(at(19)), Err(at(20)));
        assert_eq!([bucket.take(at(1000)), bucket.take(at(1000))], [Ok(()), Ok(())]);
        assert!(bucket.take(at(1000)).is_err(), "no more than the burst");
    }
}
