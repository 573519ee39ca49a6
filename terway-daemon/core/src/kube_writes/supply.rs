//! The supply of addresses, as the condition `SufficientIP` tells it.

use std::time::Duration;

use super::event::shortened;
use crate::clock::Moment;
use crate::errors::{self, Code, Error};
use crate::ipam::Stats;

/// Problems that keep the node from getting addresses until somebody does something about it.
const SHORTAGES: [Code; 10] = [
    errors::NO_ADDRESS,
    errors::VSWITCH_EXHAUSTED,
    errors::CLOUD_QUOTA,
    errors::ENI_SLOTS_FULL,
    errors::ENI_ADDRESSES_FULL,
    errors::ACCOUNT_ENI_QUOTA,
    errors::SECURITY_GROUP_FULL,
    errors::VSWITCH_NONE,
    errors::PREFIX_FRAGMENTED,
    errors::DEGRADED,
];

/// Whether pods can get addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AddressSupply {
    /// They can, as far as is known.
    Sufficient,
    /// They cannot, and why.
    Insufficient(String),
}

impl AddressSupply {
    /// The message of the condition.
    #[must_use]
    pub fn message(&self) -> &str {
        match self {
            Self::Sufficient => "addresses are idle or can be had",
            Self::Insufficient(message) => message,
        }
    }
}

/// Follows the pool. A shortage is told at once; its end only after it has lasted for a while, so that a node on which the last address
/// comes and goes does not write all the time.
#[derive(Debug)]
pub struct SupplyMonitor {
    supply: AddressSupply,
    good_since: Option<Moment>,
    hold: Duration,
}

impl SupplyMonitor {
    /// A monitor that tells the end of a shortage after `hold`.
    #[must_use]
    pub const fn new(hold: Duration) -> Self {
        Self { supply: AddressSupply::Sufficient, good_since: None, hold }
    }

    /// The supply now, and when to look again although nothing has changed.
    pub fn observe(&mut self, stats: &Stats, problems: &[Error], now: Moment) -> (AddressSupply, Option<Moment>) {
        let shortage = problems.iter().find(|problem| SHORTAGES.contains(&problem.code));
        let mut due = None;
        match (stats.idle, shortage) {
            (0, Some(shortage)) => {
                self.good_since = None;
                self.supply = AddressSupply::Insufficient(shortened(shortage.to_string()));
            }
            // The cloud is being asked again: not known yet whether the shortage is over.
            (0, None) if stats.pending > 0 || stats.waiting > 0 => self.good_since = None,
            _ if self.supply == AddressSupply::Sufficient => {}
            _ => {
                let since = *self.good_since.get_or_insert(now);
                if now.since(since) >= self.hold {
                    (self.supply, self.good_since) = (AddressSupply::Sufficient, None);
                } else {
                    due = Some(since.after(self.hold));
                }
            }
        }
        (self.supply.clone(), due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(idle: u32, pending: u32) -> Stats {
        Stats { idle, pending, capacity: 10, ..Stats::default() }
    }

    #[test]
    fn shortage_is_told_at_once_and_its_end_after_a_while() {
        let at = |seconds| Moment::ZERO.after(Duration::from_secs(seconds));
        let mut monitor = SupplyMonitor::new(Duration::from_secs(30));
        let empty = [Error::new(errors::VSWITCH_EXHAUSTED, "vsw-1")];
        let is_good = |(supply, _): (AddressSupply, Option<Moment>)| supply == AddressSupply::Sufficient;
        assert!(is_good(monitor.observe(&stats(3, 0), &empty, at(0))), "idle addresses are enough");
        let other = [Error::new(errors::CLOUD_UNREACHABLE, "")];
        assert!(is_good(monitor.observe(&stats(0, 0), &other, at(1))), "an outage is no shortage");
        let (supply, _) = monitor.observe(&stats(0, 0), &empty, at(2));
        assert!(supply.message().contains("TW0202") && supply.message().contains("vsw-1"), "{supply:?}");
        assert!(!is_good(monitor.observe(&stats(0, 4), &[], at(3))), "asked again, no answer yet");
        assert_eq!(monitor.observe(&stats(2, 0), &[], at(10)).1, Some(at(40)));
        assert!(!is_good(monitor.observe(&stats(0, 0), &empty, at(20))), "it was short");
        assert!(!is_good(monitor.observe(&stats(2, 0), &[], at(25))));
        assert!(!is_good(monitor.observe(&stats(2, 0), &[], at(54))));
        assert!(is_good(monitor.observe(&stats(2, 0), &[], at(55))));
    }
}
