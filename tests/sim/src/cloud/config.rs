//! What the simulated cloud consists of and how it behaves.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use ipnetwork::{Ipv4Network, Ipv6Network};
use serde::{Deserialize, Serialize};
use terway_core::cidr;

use super::faults::Fault;

/// A region with one VPC. All durations are milliseconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CloudConfig {
    /// The region's id.
    pub region: String,
    /// The VPC's id.
    pub vpc: String,
    /// The VPC's block.
    pub vpc_cidr: Ipv4Network,
    /// Its vSwitches.
    pub vswitches: Vec<VSwitchConfig>,
    /// The security groups that exist. They filter nothing.
    pub security_groups: Vec<String>,
    /// The instance types that exist.
    pub instance_types: Vec<InstanceTypeConfig>,
    /// The instances.
    pub instances: Vec<InstanceConfig>,
    /// Access key id → secret.
    pub access_keys: BTreeMap<String, String>,
    /// How long a call takes, by action; the empty name stands for all others. The effect happens at the end.
    pub latency_ms: BTreeMap<String, u64>,
    /// From the call until the ENI is `InUse`.
    pub attach_ms: u64,
    /// From `InUse` until the NIC is in the node and in its metadata.
    pub nic_delay_ms: u64,
    /// From the call until the ENI is `Available`, its NIC gone.
    pub detach_ms: u64,
    /// From the call until the ENI is gone.
    pub delete_ms: u64,
    /// How far `DescribeNetworkInterfaces` is behind what was written.
    pub describe_lag_ms: u64,
    /// How far the metadata service's tree of ENIs is behind.
    pub metadata_lag_ms: u64,
    /// ENIs that the account may have, primary ones included; without limit if not given.
    pub max_enis: Option<u32>,
    /// Private IPv4 addresses (a prefix counts as one) that a security group holds; those not named hold any number.
    pub security_group_capacity: BTreeMap<String, u32>,
    /// Server-side limits in calls a minute, by action; the empty name stands for all others; none if not given. A bucket holds a
    /// minute's worth.
    pub rate_limits: BTreeMap<String, u32>,
    /// The longest page, whatever a caller asks for, so that few ENIs make several pages.
    pub page_limit: usize,
    /// Whether `CreateNetworkInterface` answers with the id only, as its older form does.
    pub terse_create: bool,
    /// Whether metadata is given only to a caller with a token (the hardened mode).
    pub require_metadata_token: bool,
    /// The lifetime of the keys of RAM roles. New ones are given out from half of it on.
    pub role_keys_ms: u64,
    /// Seconds by which the cloud's clock is ahead of this machine's.
    pub clock_offset: i64,
    /// The same seed and the same calls give the same names, addresses and faults.
    pub seed: u64,
    /// Faults to begin with; a [`Scenario`](super::Scenario) brings its own.
    pub faults: Vec<Fault>,
}

impl Default for CloudConfig {
    fn default() -> Self {
        Self {
            region: "cn-sim".to_owned(),
            vpc: "vpc-sim".to_owned(),
            vpc_cidr: cidr::v4(Ipv4Addr::new(10, 0, 0, 0), 8),
            vswitches: Vec::new(),
            security_groups: Vec::new(),
            instance_types: Vec::new(),
            instances: Vec::new(),
            access_keys: BTreeMap::new(),
            latency_ms: BTreeMap::new(),
            attach_ms: 0,
            nic_delay_ms: 0,
            detach_ms: 0,
            delete_ms: 0,
            describe_lag_ms: 0,
            metadata_lag_ms: 0,
            max_enis: None,
            security_group_capacity: BTreeMap::new(),
            rate_limits: BTreeMap::new(),
            page_limit: 500,
            terse_create: false,
            require_metadata_token: true,
            role_keys_ms: 6 * 3_600_000,
            clock_offset: 0,
            seed: 1,
            faults: Vec::new(),
        }
    }
}

/// A vSwitch.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VSwitchConfig {
    /// Its id.
    pub id: String,
    /// Its zone.
    pub zone: String,
    /// Its IPv4 block, /16 to /29. The first and the last three addresses are the cloud's own; the gateway is the last but two.
    pub cidr_v4: Ipv4Network,
    /// Its IPv6 block, a /64, if IPv6 is turned on. The first and the last nine addresses are the cloud's own.
    #[serde(default)]
    pub cidr_v6: Option<Ipv6Network>,
}

/// An instance type.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstanceTypeConfig {
    /// Its id, such as `ecs.g7.large`.
    pub id: String,
    /// ENIs, the primary one included.
    pub adapters: u32,
    /// IPv4 addresses per ENI, the primary one included.
    pub v4_per_adapter: u32,
    /// IPv6 addresses per ENI.
    #[serde(default)]
    pub v6_per_adapter: u32,
}

/// An instance with its primary ENI.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstanceConfig {
    /// The node it is, as the fabric names it.
    pub node: String,
    /// Its id.
    pub id: String,
    /// Its type.
    pub instance_type: String,
    /// The vSwitch of its primary ENI; its zone is the instance's.
    pub vswitch: String,
    /// The primary ENI's address; the next free one if not given. It has an IPv6 address as well if the vSwitch has IPv6.
    #[serde(default)]
    pub primary_v4: Option<Ipv4Addr>,
    /// The RAM role it has.
    #[serde(default)]
    pub role: Option<String>,
}
