//! `eni-config`: what an administrator writes ([`ConfigDocuments`]) becomes what the node does ([`Config`]), with every default explicit.
//!
//! A wrong value is refused with its key, the value and the reason, all of them at once; nothing of a refused configuration takes effect.
//! [`KEYS`] is the one table of what can be written.

#[cfg(test)]
mod arbitrary;
mod check;
mod config_maps;
mod conntrack;
mod diff;
mod documents;
mod keys;
mod live;
mod merge;
mod outcome;
mod raw;
mod secret;
mod units;

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use ipnetwork::IpNetwork;

use crate::ident::{IpStack, SecurityGroupId, VSwitchId};
use crate::ipam::{Degradation, EniSelection, VSwitchSelection};

pub use self::check::POOL_OPERATIONS;
pub use self::config_maps::{ConfigMaps, ConfigView, Watched};
pub use self::conntrack::Conntrack;
pub use self::diff::{KeyChange, Setting};
pub use self::documents::{ConfigDocuments, ConfigMapData};
pub use self::keys::{KEYS, Key, KeyDefault, KeyLocation, Kind, REMOVED, TakesEffect, by_name, nearest};
pub use self::live::LiveConfig;
pub use self::merge::merge;
pub use self::outcome::{ConfigOrigin, NODE_LABEL, Outcome};
pub use self::secret::Secret;
pub use self::units::Ratio;

/// An access key of the cloud account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessKey {
    /// Its id.
    pub id: Secret,
    /// Its secret.
    pub secret: Secret,
}

/// A tag of an ENI.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tag {
    /// Its name.
    pub key: String,
    /// Its value.
    pub value: String,
}

/// How idle addresses are given back when nothing happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reclaim {
    /// After this long without an address bound or freed; `None` never.
    pub after: Option<Duration>,
    /// Pause between two batches.
    pub interval: Duration,
    /// Addresses a batch, 1 at least.
    pub batch: u32,
    /// The pause is longer by a random part of itself up to this, 0 to 1.
    pub jitter: Ratio,
}

/// Addresses by /28 prefixes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefixes {
    /// Whether addresses are fetched as prefixes.
    pub enabled: bool,
    /// IPv4 prefixes of the node at least; 0 leaves it to demand.
    pub v4_count: u32,
    /// IPv6 prefixes of each ENI, 0 or 1.
    pub v6_count: u32,
}

/// Waiting times of one operation, where they differ from the built-in ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackoffOverride {
    /// Before the first attempt (`InitialDelay`).
    pub initial_delay: Option<Duration>,
    /// After the first attempt (`Duration`).
    pub duration: Option<Duration>,
    /// Each wait is the last one times this, at least 1 (`Factor`).
    pub factor: Option<Ratio>,
    /// Each wait is longer by a random part of itself up to this (`Jitter`).
    pub jitter: Option<Ratio>,
    /// Attempts at most, at least 1 (`Steps`).
    pub steps: Option<u32>,
    /// No wait is longer (`Cap`).
    pub cap: Option<Duration>,
}

/// The checked configuration of the node. What each key means, its default and when it takes effect stand in [`KEYS`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Families that pods get addresses of (`ip_stack`).
    pub ip_stack: IpStack,
    /// vSwitches of pods by zone, each list without repetition (`vswitches`).
    pub vswitches: BTreeMap<String, Vec<VSwitchId>>,
    /// Order of trying them (`vswitch_selection_policy`).
    pub vswitch_order: VSwitchSelection,
    /// Security groups of new ENIs, at most 10 (`security_group` and `security_groups`).
    pub security_groups: Vec<SecurityGroupId>,
    /// Resource group of new ENIs (`resource_group_id`).
    pub resource_group: Option<String>,
    /// Tags of new ENIs (`eni_tags`), at most 20 together with the filter.
    pub eni_tags: BTreeMap<String, String>,
    /// Tags an ENI must have to be used (`eni_tag_filter`).
    pub eni_tag_filter: BTreeMap<String, String>,
    /// Tags that mark ENIs of others, sorted, the built-in ones included (`eni_tag_block_list`).
    pub eni_tag_block_list: Vec<Tag>,
    /// Which ENI gets the next address (`eni_selection_policy`).
    pub eni_selection: EniSelection,
    /// ENIs that are kept even when empty (`min_eni`).
    pub min_eni: u32,
    /// Upper bound of ENIs for pods; `None` leaves it to the instance type (`max_eni`).
    pub max_eni: Option<u32>,
    /// Factor on the number of ENIs the instance type carries, above 0 (`eni_cap_ratio`).
    pub eni_cap_ratio: Ratio,
    /// Added to the number of ENIs the instance type carries (`eni_cap_shift`).
    pub eni_cap_shift: i32,
    /// Idle addresses to keep ready, not above `max_idle` (`min_pool_size`).
    pub min_idle: u32,
    /// Idle addresses above which they are given back (`max_pool_size`).
    pub max_idle: u32,
    /// Addresses fetched once at the start; 0 is off (`ip_warm_up_size`).
    pub warm_up: u32,
    /// Giving back by time (`idle_ip_reclaim_*`).
    pub reclaim: Reclaim,
    /// How often the pool is compared with the cloud at least (`ip_pool_sync_period`).
    pub sync_period: Duration,
    /// Prefix mode (`enable_ip_prefix`, `ipv4_prefix_count`, `ipv6_prefix_count`).
    pub prefixes: Prefixes,
    /// Service address ranges (`service_cidr`).
    pub service_cidrs: Vec<IpNetwork>,
    /// Destinations handed to the host stack rather than to the VPC (`host_stack_cidrs`, there and in the CNI configuration).
    pub host_stack_cidrs: Vec<IpNetwork>,
    /// Destinations that pods get routes to besides (`extra_routes`).
    pub extra_routes: Vec<IpNetwork>,
    /// MTU of pods in bytes (`mtu` of the CNI configuration).
    pub mtu: Option<u32>,
    /// Region; `None` asks the metadata service (`region_id`).
    pub region: Option<String>,
    /// Access key; `None` uses what comes next in the chain (`access_key` and `access_secret`).
    pub access_key: Option<AccessKey>,
    /// File with an encrypted temporary token (`credential_path`).
    pub credential_path: Option<String>,
    /// Calls a minute by API action where they differ from the built-in limits, each 1 at least; the empty name stands for all
    /// others (`rate_limit`).
    pub rate_limits: BTreeMap<String, u32>,
    /// Waiting times by operation where they differ from the built-in ones (`backoff_override`).
    pub backoff: BTreeMap<String, BackoffOverride>,
    /// Connection tracking (`bpf_ct_*`, `conntrack_gc_*`).
    pub conntrack: Conntrack,
    /// What is left undone (`degradation`).
    pub degradation: Degradation,
    /// Whether NetworkPolicy is enforced (`disable_network_policy`).
    pub policy_enabled: bool,
    /// One in so many new connections is told to who asks for flows; 0 none (`flow_events_one_in`).
    pub flow_events_one_in: u32,
    /// Whether pods are annotated with their addresses (`enable_patch_pod_ips`).
    pub patch_pod_ips: bool,
    /// Whether pods' connections to external addresses of Services stay in the cluster (`in_cluster_loadbalance`).
    pub in_cluster_loadbalance: bool,
}

impl Config {
    /// The vSwitches of a zone; none if the zone is not configured.
    #[must_use]
    pub fn vswitches_of(&self, zone: &str) -> &[VSwitchId] {
        self.vswitches.get(zone).map_or(&[], Vec::as_slice)
    }
}

/// Something the administrator should know that is no error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// The key.
    pub key: String,
    /// One sentence.
    pub message: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.message)
    }
}

/// A refused value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key} = {value}: {reason}")]
pub struct InvalidValue {
    /// The key.
    pub key: String,
    /// The value as it was written, shortened; `<secret>` for secret keys.
    pub value: String,
    /// Why it is refused.
    pub reason: String,
}

/// Reads `eni_conf` alone.
///
/// # Errors
/// Every refused value at once, so that one edit can mend them all.
pub fn parse(eni_conf: &str) -> Result<(Config, Vec<Warning>), Vec<InvalidValue>> {
    ConfigDocuments::of(eni_conf).check()
}

#[cfg(test)]
mod tests;
