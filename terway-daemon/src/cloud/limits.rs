//! Client-side rate limits, so that one node's burst does not eat the account's quota, and the pace after a throttled call.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use parking_lot::{Mutex, MutexGuard, RwLock};
use tokio::time::{Instant, sleep_until};

/// Calls a minute by action, which users know as `rate_limit`; a whole minute's worth may go at once.
const PER_MINUTE: &[(&str, u32)] = &[
    ("", 500),
    ("AssignIpv6Addresses", 400),
    ("AssignPrivateIpAddresses", 400),
    ("AttachNetworkInterface", 500),
    ("CreateNetworkInterface", 500),
    ("DeleteNetworkInterface", 500),
    ("DescribeInstanceTypes", 400),
    ("DescribeNetworkInterfaceAttribute", 2000),
    ("DescribeNetworkInterfaces", 800),
    ("DescribeVSwitches", 300),
    ("DetachNetworkInterface", 400),
    ("UnassignIpv6Addresses", 400),
    ("UnassignPrivateIpAddresses", 400),
];

/// The distance between two calls of an action after its first throttled one; each further one doubles it, each call that passes
/// takes a quarter off.
const FIRST_DISTANCE: Duration = Duration::from_millis(100);
const LONGEST_DISTANCE: Duration = Duration::from_secs(6);

struct Buckets {
    by_action: BTreeMap<String, Arc<DefaultDirectRateLimiter>>,
    others: Arc<DefaultDirectRateLimiter>,
}

impl Buckets {
    fn new(overrides: &BTreeMap<String, u32>) -> Self {
        let mut per_minute: BTreeMap<String, u32> =
            PER_MINUTE.iter().map(|(action, n)| ((*action).to_owned(), *n)).collect();
        per_minute.extend(overrides.iter().map(|(action, n)| (action.clone(), *n)));
        // A limit of 0 would block for ever; one call a minute is the nearest thing that works.
        let limiter =
            |n: u32| Arc::new(RateLimiter::direct(Quota::per_minute(NonZeroU32::new(n).unwrap_or(NonZeroU32::MIN))));
        let others = limiter(per_minute.remove("").unwrap_or(500));
        Self { by_action: per_minute.into_iter().map(|(action, n)| (action, limiter(n))).collect(), others }
    }
}

/// How an action goes on after the cloud has throttled it.
#[derive(Clone, Copy)]
struct Pace {
    distance: Duration,
    /// When the next call may go.
    next: Instant,
}

pub(super) struct Limits {
    buckets: RwLock<Buckets>,
    paces: Mutex<BTreeMap<String, Pace>>,
}

impl Limits {
    pub(super) fn new(overrides: &BTreeMap<String, u32>) -> Self {
        Self { buckets: RwLock::new(Buckets::new(overrides)), paces: Mutex::default() }
    }

    /// Replaces the limits. Calls that wait already wait by the old ones.
    pub(super) fn set(&self, overrides: &BTreeMap<String, u32>) {
        *self.buckets.write() = Buckets::new(overrides);
    }

    /// Waits for the action's turn.
    pub(super) async fn turn(&self, action: &str) {
        let slot = self.paces().get_mut(action).map(|pace| {
            let slot = pace.next.max(Instant::now());
            pace.next = slot + pace.distance;
            slot
        });
        if let Some(slot) = slot {
            sleep_until(slot).await;
        }
        let bucket = {
            let buckets = self.buckets.read();
            Arc::clone(buckets.by_action.get(action).unwrap_or(&buckets.others))
        };
        bucket.until_ready().await;
    }

    /// The cloud throttled this action: its next calls, whoever makes them, keep their distance.
    pub(super) fn throttled(&self, action: &str) {
        let now = Instant::now();
        let mut paces = self.paces();
        let pace = paces.entry(action.to_owned()).or_insert(Pace { distance: FIRST_DISTANCE / 2, next: now });
        pace.distance = (pace.distance * 2).clamp(FIRST_DISTANCE, LONGEST_DISTANCE);
        pace.next = pace.next.max(now + pace.distance);
    }

    /// The cloud took a call of this action.
    pub(super) fn passed(&self, action: &str) {
        let mut paces = self.paces();
        let Some(pace) = paces.get_mut(action) else { return };
        pace.distance = pace.distance * 3 / 4;
        if pace.distance < FIRST_DISTANCE / 4 {
            paces.remove(action);
        }
    }

    fn paces(&self) -> MutexGuard<'_, BTreeMap<String, Pace>> {
        self.paces.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(50);

    async fn at_once(limits: &Limits, action: &str) -> bool {
        tokio::time::timeout(SOON, limits.turn(action)).await.is_ok()
    }

    #[tokio::test]
    async fn an_override_binds_its_own_action_only_and_can_be_replaced() {
        let limits = Limits::new(&BTreeMap::from([("DescribeVSwitches".to_owned(), 2)]));
        for _ in 0..2 {
            assert!(at_once(&limits, "DescribeVSwitches").await);
        }
        assert!(!at_once(&limits, "DescribeVSwitches").await);
        for _ in 0..100 {
            assert!(at_once(&limits, "AttachNetworkInterface").await);
            assert!(at_once(&limits, "SomethingNew").await);
        }
        limits.set(&BTreeMap::from([(String::new(), 1)]));
        assert!(at_once(&limits, "DescribeVSwitches").await);
        assert!(at_once(&limits, "SomethingNew").await);
        assert!(!at_once(&limits, "SomethingNew").await);
    }

    /// The reference project's numbers, which users have written down in `rate_limit`.
    #[test]
    fn defaults_have_their_burst() {
        for (action, burst) in [("DescribeNetworkInterfaces", 800), ("AssignPrivateIpAddresses", 400), ("Other", 500)] {
            let buckets = Buckets::new(&BTreeMap::new());
            let bucket = buckets.by_action.get(action).unwrap_or(&buckets.others);
            let admitted = (0..1000).filter(|_| bucket.check().is_ok()).count();
            assert!((burst..burst + 20).contains(&admitted), "{action}: {admitted}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_throttled_action_slows_down_and_recovers() {
        let limits = Limits::new(&BTreeMap::new());
        let taken = async |action: &str, calls: u32| {
            let began = Instant::now();
            for _ in 0..calls {
                limits.turn(action).await;
            }
            began.elapsed()
        };
        assert_eq!(taken("AssignPrivateIpAddresses", 5).await, Duration::ZERO);
        limits.throttled("AssignPrivateIpAddresses");
        assert_eq!(taken("AssignPrivateIpAddresses", 5).await.as_millis(), 500);
        limits.throttled("AssignPrivateIpAddresses");
        limits.throttled("AssignPrivateIpAddresses");
        assert_eq!(taken("AssignPrivateIpAddresses", 5).await.as_millis(), 2000);
        assert_eq!(taken("AttachNetworkInterface", 5).await, Duration::ZERO, "its neighbours do not notice");
        for _ in 0..50 {
            limits.throttled("AssignPrivateIpAddresses");
        }
        assert_eq!(taken("AssignPrivateIpAddresses", 2).await, LONGEST_DISTANCE * 2, "bounded");
        for _ in 0..30 {
            limits.passed("AssignPrivateIpAddresses");
        }
        assert_eq!(taken("AssignPrivateIpAddresses", 5).await, Duration::ZERO);
    }
}
