//! The checked configuration of the pool: every value explicit, every default in one place.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::cloud::InstanceLimits;
use crate::ident::{Family, InstanceId, IpStack, SecurityGroupId, VSwitchId};

/// Addresses handed out of one IPv4 prefix: all of a /28 (ECS API reference, `AssignPrivateIpAddresses`: `Ipv4Prefix.N`).
pub const ADDRESSES_PER_V4_PREFIX: u32 = 16;

/// Addresses handed out of one IPv6 prefix: `::1` to `::100` of a /80. That is more than an ENI's IPv4 prefixes hold, so that one /80 per ENI
/// pairs with all of them, and few enough to keep a table of.
pub const ADDRESSES_PER_V6_PREFIX: u32 = 256;

/// Tags that exclude an ENI from the pool, whatever the configuration says.
pub const ALWAYS_BLOCKED: [(&str, &str); 2] =
    [("creator", "alibabacloud-erdma-controller"), ("terway.alibabacloud.com/excluded", "true")];

/// Everything the pool must know. All of it may change while it runs ([`Event::Configure`](super::Event::Configure)), except what is
/// marked as fixed, which keeps its first value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolConfig {
    /// This instance: ENIs attached to it are ours to use. Fixed.
    pub instance: InstanceId,
    /// What the instance type carries.
    pub limits: InstanceLimits,
    /// Whether pods share ENIs.
    pub mode: PoolMode,
    /// ENIs for pods at least (`min_eni`).
    pub min_enis: u32,
    /// ENIs for pods at most, whatever the instance could take (`max_eni`).
    pub max_enis: Option<u32>,
    /// Thousandths of the instance's adapters that may be used (`eni_cap_ratio`).
    pub eni_cap_permille: u32,
    /// Added to that (`eni_cap_shift`).
    pub eni_cap_shift: i32,
    /// The families pods get addresses of. One unit of the pool is one address of each. Fixed.
    pub stack: IpStack,
    /// Ask for prefixes (/28 and /80) instead of single addresses (`enable_ip_prefix`). Single ones are asked for where the vSwitch has no
    /// whole prefix left. What is there of the other kind stays in use.
    pub prefixes: bool,
    /// IPv4 prefixes that the node has at least (`ipv4_prefix_count`), bound or idle.
    pub min_prefixes: u32,
    /// vSwitches in the node's zone, in the order of preference.
    pub vswitches: Vec<VSwitchId>,
    /// How to choose among them.
    pub vswitch_selection: VSwitchSelection,
    /// How long the counts of free addresses are believed that [`VSwitchSelection::Most`] asks for.
    pub vswitch_ttl: Duration,
    /// Which ENI serves a pod, and which one grows.
    pub eni_selection: EniSelection,
    /// Security groups of new ENIs. An ENI with others takes no new pods; if empty, any will do.
    pub security_groups: Vec<SecurityGroupId>,
    /// Resource group of new ENIs.
    pub resource_group: Option<String>,
    /// Tags of new ENIs. They also get those of `tag_filter`, which they would not pass otherwise.
    pub tags: BTreeMap<String, String>,
    /// Only ENIs with all these tags are ours (`eni_tag_filter`).
    pub tag_filter: BTreeMap<String, String>,
    /// ENIs with one of these tags are excluded from the pool (`eni_tag_block_list`); [`ALWAYS_BLOCKED`] is added.
    pub tag_block_list: Vec<(String, String)>,
    /// Idle units to keep ready (`min_pool_size`).
    pub min_idle: u32,
    /// Idle units beyond which addresses go back to the cloud (`max_pool_size`); never taken below `min_idle`.
    pub max_idle: u32,
    /// Units to have once at the start of a node that has none yet (`ip_warm_up_size`). From then on the watermarks rule.
    pub warm_up: u32,
    /// Release of addresses that have been idle for long, down to `min_idle`; off by default.
    pub reclaim: Option<Reclaim>,
    /// What is not asked of the cloud for the time being.
    pub degradation: Degradation,
    /// How long ADDs are collected before one call asks the cloud for their addresses. At most five times as long while they keep coming.
    pub batch_window: Duration,
    /// Cool-down of an address between two pods: neighbour caches and connections of peers still refer to the first one.
    pub cooling: Duration,
    /// Addresses, or prefixes, per assign or unassign call at most.
    pub batch: u32,
    /// IPv4 addresses at the creation of an ENI at most, the primary one included.
    pub create_v4: u32,
    /// IPv6 addresses at the creation of an ENI at most.
    pub create_v6: u32,
    /// How often the NIC of a new ENI may fail to show up until the ENI is replaced.
    pub nic_attempts: u32,
    /// How long an ADD waits while cloud calls fail. A retry that is due later than this is not waited for.
    pub max_wait: Duration,
    /// How long there must be too many idle units before some go.
    pub shrink_after: Duration,
    /// How long the cloud's lists may lag behind its actions (eventual consistency).
    pub consistency_window: Duration,
    /// The longest time between two inventories.
    pub resync: Duration,
    /// Back-off between attempts of one call.
    pub retry: Backoff,
    /// Back-off of a vSwitch without free addresses.
    pub vswitch_backoff: Duration,
    /// Back-off of a kind of call that was refused (quota, permission, bad request).
    pub refusal_backoff: Duration,
    /// Makes tokens of this node unlike those of any other, and of any earlier state file: instance id and something random. Fixed.
    pub token_seed: String,
}

/// How to choose a vSwitch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum VSwitchSelection {
    /// The first of the list that is not exhausted.
    #[default]
    Ordered,
    /// The one with the most free addresses by the cloud's count; in the order of the list while that is not known.
    Most,
    /// Any that is not exhausted.
    Random,
}

/// Whether pods share ENIs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PoolMode {
    /// Many pods on one ENI, each with an address of its own.
    #[default]
    Shared,
    /// One pod per ENI: it gets the ENI's primary address, and the NIC itself.
    Exclusive,
}

/// Which ENI comes first (`eni_selection_policy`). Within an ENI the address that was used longest ago does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EniSelection {
    /// The one with the most addresses, so that the others can be given back one day.
    #[default]
    MostIps,
    /// The one with the fewest, so that traffic spreads.
    LeastIps,
}

/// Which cloud calls are switched off (`degradation`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Degradation {
    /// None.
    #[default]
    None,
    /// All: pods get the idle addresses of the node. Calls under way are repeated afterwards.
    L0,
    /// Releasing calls: nothing is unassigned, detached or deleted.
    L1,
}

/// Release of addresses that have been idle for long (`idle_ip_reclaim_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reclaim {
    /// How long no pod came or went until it begins.
    pub after: Duration,
    /// Time between two batches.
    pub interval: Duration,
    /// Units per batch.
    pub batch: u32,
    /// Thousandths of `interval` by which the time varies to both sides.
    pub jitter_permille: u32,
}

/// Exponential back-off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// After the first failure.
    pub initial: Duration,
    /// At most.
    pub max: Duration,
}

impl Backoff {
    /// The wait after `failures` failures in a row, up to a quarter longer by `salt` so that nodes that failed together do not come back together.
    #[must_use]
    pub fn delay(self, failures: u32, salt: u64) -> Duration {
        let doubled = self.initial.saturating_mul(1 << failures.saturating_sub(1).min(16));
        let base = doubled.min(self.max);
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
            mode: PoolMode::Shared,
            min_enis: 0,
            max_enis: None,
            eni_cap_permille: 1000,
            eni_cap_shift: 0,
            prefixes: false,
            min_prefixes: 0,
            stack: IpStack::Ipv4,
            vswitches: Vec::new(),
            vswitch_selection: VSwitchSelection::Ordered,
            vswitch_ttl: Duration::from_secs(1200),
            eni_selection: EniSelection::MostIps,
            security_groups: Vec::new(),
            resource_group: None,
            tags: BTreeMap::new(),
            tag_filter: BTreeMap::new(),
            tag_block_list: Vec::new(),
            min_idle: 0,
            max_idle: 5,
            warm_up: 0,
            reclaim: None,
            degradation: Degradation::None,
            batch_window: Duration::from_millis(20),
            cooling: Duration::from_secs(30),
            batch: 10,
            create_v4: 50,
            create_v6: 10,
            nic_attempts: 3,
            max_wait: Duration::from_secs(15),
            shrink_after: Duration::from_secs(120),
            consistency_window: Duration::from_secs(30),
            resync: Duration::from_secs(600),
            retry: Backoff { initial: Duration::from_millis(500), max: Duration::from_secs(60) },
            vswitch_backoff: Duration::from_secs(600),
            refusal_backoff: Duration::from_secs(60),
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
        let scaled = u64::from(self.limits.adapters) * u64::from(self.eni_cap_permille) / 1000;
        let wanted = u32::try_from(scaled).unwrap_or(u32::MAX).saturating_add_signed(self.eni_cap_shift);
        // The instance takes no more than it takes, whatever the ratio.
        let adapters = wanted.min(self.limits.adapters).saturating_sub(1);
        self.max_enis.map_or(adapters, |max| max.min(adapters))
    }

    /// Addresses or prefixes of one family per ENI at most: a prefix takes the place of one address.
    #[must_use]
    pub const fn per_eni(&self, family: Family) -> u32 {
        let most = match family {
            Family::V4 => self.limits.v4_per_adapter,
            Family::V6 => self.limits.v6_per_adapter,
        };
        match self.mode {
            PoolMode::Exclusive if most > 1 => 1,
            _ => most,
        }
    }

    /// Prefixes of one family per ENI at most. An IPv4 ENI keeps its primary address, and one /80 is as good as many.
    #[must_use]
    pub fn prefixes_per_eni(&self, family: Family) -> u32 {
        match (self.uses_prefixes(), family) {
            (false, _) => 0,
            (true, Family::V4) => self.per_eni(family).saturating_sub(1),
            (true, Family::V6) => self.per_eni(family).min(1),
        }
    }

    /// Whether prefixes are asked for. A pod with an ENI of its own has no use for them.
    #[must_use]
    pub fn uses_prefixes(&self) -> bool {
        self.prefixes && self.mode == PoolMode::Shared
    }

    /// Units per ENI at most.
    #[must_use]
    pub fn units_per_eni(&self) -> u32 {
        let most = |family: Family| {
            let prefixes = self.prefixes_per_eni(family);
            let singles = if prefixes > 0 { self.primaries(family) } else { self.per_eni(family) };
            singles + prefixes * addresses_per_prefix(family)
        };
        self.families().iter().map(|f| most(*f)).min().unwrap_or(0)
    }

    /// Addresses of this family that every ENI has from its creation to its end.
    pub(super) const fn primaries(&self, family: Family) -> u32 {
        match family {
            Family::V4 => 1,
            Family::V6 => 0,
        }
    }

    /// Tags of a new ENI.
    pub(super) fn new_tags(&self) -> BTreeMap<String, String> {
        self.tags.iter().chain(&self.tag_filter).map(|(key, value)| (key.clone(), value.clone())).collect()
    }

    /// The tag that excludes an ENI from the pool.
    pub(super) fn blocked_by<'a>(&'a self, tags: &BTreeMap<String, String>) -> Option<(&'a str, &'a str)> {
        let configured = self.tag_block_list.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        let mut all = ALWAYS_BLOCKED.into_iter().chain(configured);
        all.find(|(key, value)| tags.get(*key).is_some_and(|tag| tag == value))
    }

    /// Whether an ENI with these tags is managed at all.
    pub(super) fn passes_filter(&self, tags: &BTreeMap<String, String>) -> bool {
        self.tag_filter.iter().all(|(key, value)| tags.get(key) == Some(value))
    }

    /// Pods this node can carry.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.eni_limit().saturating_mul(self.units_per_eni())
    }

    /// The upper watermark, which never undercuts the lower one.
    #[must_use]
    pub fn high_watermark(&self) -> u32 {
        self.max_idle.max(self.min_idle)
    }
}

/// Addresses handed out of one prefix.
pub(super) const fn addresses_per_prefix(family: Family) -> u32 {
    match family {
        Family::V4 => ADDRESSES_PER_V4_PREFIX,
        Family::V6 => ADDRESSES_PER_V6_PREFIX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_with_jitter() {
        let backoff = Backoff { initial: Duration::from_secs(1), max: Duration::from_secs(10) };
        let base: Vec<_> = (1..7).map(|n| backoff.delay(n, 0).as_secs()).collect();
        assert_eq!(base, [1, 2, 4, 8, 10, 10]);
        assert_eq!(backoff.delay(u32::MAX, 0), Duration::from_secs(10));
        let salted: std::collections::BTreeSet<_> = (0..50).map(|salt| backoff.delay(5, salt)).collect();
        assert!(salted.len() > 25);
        assert!(salted.iter().all(|d| *d >= Duration::from_secs(10) && *d < Duration::from_millis(12_500)));
    }

    #[test]
    fn capacity_without_primary_adapter() {
        let limits = InstanceLimits { adapters: 4, v4_per_adapter: 10, v6_per_adapter: 6 };
        let mut config = PoolConfig::new("i-1".into(), limits, "s");
        assert_eq!(config.capacity(), 30);
        config.stack = IpStack::Dual;
        assert_eq!(config.capacity(), 18);
        config.max_enis = Some(2);
        assert_eq!(config.capacity(), 12);
        config.mode = PoolMode::Exclusive;
        assert_eq!(config.capacity(), 2);
        (config.mode, config.max_enis, config.prefixes) = (PoolMode::Shared, None, true);
        assert_eq!(config.capacity(), 3 * (1 + 9 * 16), "the primary address and nine prefixes, paired by one /80");
    }

    #[test]
    fn eni_cap_ratio_and_shift() {
        let limits = InstanceLimits { adapters: 8, v4_per_adapter: 10, v6_per_adapter: 10 };
        let mut config = PoolConfig::new("i-1".into(), limits, "s");
        for (permille, shift, enis) in
            [(1000, 0, 7), (500, 0, 3), (500, 2, 5), (1000, -3, 4), (2000, 0, 7), (1000, 9, 7), (0, 0, 0), (100, -9, 0)]
        {
            (config.eni_cap_permille, config.eni_cap_shift) = (permille, shift);
            assert_eq!(config.eni_limit(), enis, "{permille} {shift}");
        }
    }
}
