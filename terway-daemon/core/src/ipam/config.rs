//! The checked configuration of the pool: every value explicit, every default in one place.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::cloud::InstanceLimits;
use crate::ident::{Family, InstanceId, IpStack, SecurityGroupId, VSwitchId};

/// Everything the pool must know beforehand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolConfig {
    /// This instance: ENIs attached to it are ours to use.
    pub instance: InstanceId,
    /// What the instance type carries.
    pub limits: InstanceLimits,
    /// ENIs for pods at most, whatever the instance could take (`max_eni`).
    pub max_enis: Option<u32>,
    /// The families pods get addresses of. One unit of the pool is one address of each.
    pub stack: IpStack,
    /// vSwitches in the node's zone, in the order of preference.
    pub vswitches: Vec<VSwitchId>,
    /// How to choose among them.
    pub selection: VSwitchSelection,
    /// Security groups of new ENIs.
    pub security_groups: Vec<SecurityGroupId>,
    /// Tags of new ENIs.
    pub tags: BTreeMap<String, String>,
    /// Idle units to keep ready (`min_pool_size`).
    pub min_idle: u32,
    /// Idle units beyond which addresses go back to the cloud (`max_pool_size`); never taken below `min_idle`.
    pub max_idle: u32,
    /// Rest of an address between two pods: caches and connections elsewhere still know the first one.
    pub cooling: Duration,
    /// Addresses per assign or unassign call at most.
    pub batch: u32,
    /// How long an Add waits for a cloud that fails, and how far ahead a cure may lie to be worth waiting for.
    pub patience: Duration,
    /// How long there must be too many idle units before some go.
    pub shrink_after: Duration,
    /// How long the cloud's lists may lag behind its own actions.
    pub settle: Duration,
    /// The longest time between two inventories.
    pub resync: Duration,
    /// Waiting times between attempts.
    pub retry: Backoff,
    /// How long a vSwitch without addresses is left alone.
    pub vswitch_rest: Duration,
    /// How long a refused kind of call (quota, permission, bad request) is left alone.
    pub refusal_rest: Duration,
    /// Makes tokens of this node unlike those of any other, and of any earlier state file: instance id and something random.
    pub token_seed: String,
}

/// How to choose a vSwitch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum VSwitchSelection {
    /// The first of the list that is not exhausted.
    #[default]
    Ordered,
}

/// Exponential waiting times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// After the first failure.
    pub first: Duration,
    /// At most.
    pub most: Duration,
}

impl Backoff {
    /// The wait after `failures` failures in a row, up to a quarter longer by `salt` so that nodes that failed together do not come back together.
    #[must_use]
    pub fn delay(self, failures: u32, salt: u64) -> Duration {
        let doubled = self.first.saturating_mul(1 << failures.saturating_sub(1).min(16));
        let base = doubled.min(self.most);
        // Fibonacci hashing spreads consecutive salts over the whole range.
        let spread = u32::try_from(salt.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40).unwrap_or(0) % 256;
        base + base * spread / 1024
    }
}

impl PoolConfig {
    /// A configuration with the defaults that do not depend on the node.
    #[must_use]
    pub fn new(instance: InstanceId, limits: InstanceLimits, token_seed: impl Into<String>) -> Self {
        Self {
            instance,
            limits,
            max_enis: None,
            stack: IpStack::Ipv4,
            vswitches: Vec::new(),
            selection: VSwitchSelection::Ordered,
            security_groups: Vec::new(),
            tags: BTreeMap::new(),
            min_idle: 0,
            max_idle: 5,
            cooling: Duration::from_secs(30),
            batch: 10,
            patience: Duration::from_secs(15),
            shrink_after: Duration::from_secs(120),
            settle: Duration::from_secs(30),
            resync: Duration::from_secs(600),
            retry: Backoff { first: Duration::from_millis(500), most: Duration::from_secs(60) },
            vswitch_rest: Duration::from_secs(600),
            refusal_rest: Duration::from_secs(60),
            token_seed: token_seed.into(),
        }
    }

    /// The families of one unit.
    #[must_use]
    pub const fn families(&self) -> &'static [Family] {
        match self.stack {
            IpStack::Ipv4 => &[Family::V4],
            IpStack::Ipv6 => &[Family::V6],
            IpStack::Dual => &[Family::V4, Family::V6],
        }
    }

    /// ENIs for pods at most: one adapter is the instance's own.
    #[must_use]
    pub fn eni_limit(&self) -> u32 {
        let adapters = self.limits.adapters.saturating_sub(1);
        self.max_enis.map_or(adapters, |max| max.min(adapters))
    }

    /// Addresses of one family per ENI at most.
    #[must_use]
    pub const fn per_eni(&self, family: Family) -> u32 {
        match family {
            Family::V4 => self.limits.v4_per_adapter,
            Family::V6 => self.limits.v6_per_adapter,
        }
    }

    /// Units per ENI at most.
    #[must_use]
    pub fn units_per_eni(&self) -> u32 {
        self.families().iter().map(|f| self.per_eni(*f)).min().unwrap_or(0)
    }

    /// Pods this node can carry.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.eni_limit().saturating_mul(self.units_per_eni())
    }

    /// The upper watermark, which never undercuts the lower one.
    #[must_use]
    pub fn ceiling(&self) -> u32 {
        self.max_idle.max(self.min_idle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_most_and_differ_by_salt() {
        let backoff = Backoff { first: Duration::from_secs(1), most: Duration::from_secs(10) };
        let base: Vec<_> = (1..7).map(|n| backoff.delay(n, 0).as_secs()).collect();
        assert_eq!(base, [1, 2, 4, 8, 10, 10]);
        assert_eq!(backoff.delay(u32::MAX, 0), Duration::from_secs(10));
        let salted: std::collections::BTreeSet<_> = (0..50).map(|salt| backoff.delay(5, salt)).collect();
        assert!(salted.len() > 25);
        assert!(salted.iter().all(|d| *d >= Duration::from_secs(10) && *d < Duration::from_millis(12_500)));
    }

    #[test]
    fn capacity_leaves_the_primary_adapter_alone_and_counts_pairs() {
        let limits = InstanceLimits { adapters: 4, v4_per_adapter: 10, v6_per_adapter: 6 };
        let mut config = PoolConfig::new("i-1".into(), limits, "s");
        assert_eq!(config.capacity(), 30);
        config.stack = IpStack::Dual;
        assert_eq!(config.capacity(), 18);
        config.max_enis = Some(2);
        assert_eq!(config.capacity(), 12);
    }
}
