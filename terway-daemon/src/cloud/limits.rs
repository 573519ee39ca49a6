//! Client-side rate limits, so that one node's burst does not eat the account's quota.

use std::collections::BTreeMap;
use std::num::NonZeroU32;

use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};

/// Calls a minute by action, which users know as `rate_limit`; a whole minute's worth may go at once.
const PER_MINUTE: &[(&str, u32)] = &[
    ("", 500),
    ("AssignIpv6Addresses", 400),
    ("AssignPrivateIpAddresses", 400),
    ("AttachNetworkInterface", 500),
    ("CreateNetworkInterface", 500),
    ("DeleteNetworkInterface", 500),
    ("DescribeInstanceTypes", 400),
    ("DescribeNetworkInterfaces", 800),
    ("DescribeVSwitches", 300),
    ("DetachNetworkInterface", 400),
    ("UnassignIpv6Addresses", 400),
    ("UnassignPrivateIpAddresses", 400),
];

pub(super) struct Limits {
    by_action: BTreeMap<String, DefaultDirectRateLimiter>,
    others: DefaultDirectRateLimiter,
}

impl Limits {
    pub(super) fn new(overrides: &BTreeMap<String, u32>) -> Self {
        let mut per_minute: BTreeMap<String, u32> =
            PER_MINUTE.iter().map(|(action, n)| ((*action).to_owned(), *n)).collect();
        per_minute.extend(overrides.iter().map(|(action, n)| (action.clone(), *n)));
        // A limit of 0 would block for ever; one call a minute is the nearest thing that works.
        let limiter = |n: u32| RateLimiter::direct(Quota::per_minute(NonZeroU32::new(n).unwrap_or(NonZeroU32::MIN)));
        let others = limiter(per_minute.remove("").unwrap_or(500));
        Self { by_action: per_minute.into_iter().map(|(action, n)| (action, limiter(n))).collect(), others }
    }

    /// Waits for the action's turn.
    pub(super) async fn turn(&self, action: &str) {
        self.by_action.get(action).unwrap_or(&self.others).until_ready().await;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn an_override_binds_its_own_action_only() {
        let limits = Limits::new(&BTreeMap::from([("DescribeVSwitches".to_owned(), 2)]));
        let soon = Duration::from_millis(50);
        for _ in 0..2 {
            tokio::time::timeout(soon, limits.turn("DescribeVSwitches")).await.unwrap();
        }
        assert!(tokio::time::timeout(soon, limits.turn("DescribeVSwitches")).await.is_err());
        for _ in 0..100 {
            tokio::time::timeout(soon, limits.turn("AttachNetworkInterface")).await.unwrap();
            tokio::time::timeout(soon, limits.turn("SomethingNew")).await.unwrap();
        }
    }
}
