//! What the cloud says, as data: the vocabulary shared by the address pool (which decides) and the OpenAPI client (which asks).

mod error;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::{Ipv4Network, Ipv6Network};
use serde::{Deserialize, Serialize};

pub use self::error::{CloudError, ErrorClass};
use crate::ident::{EniId, InstanceId, Mac, SecurityGroupId, VSwitchId};

/// The state of an ENI as `DescribeNetworkInterfaces` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EniStatus {
    /// Exists, not attached.
    Available,
    /// Being attached.
    Attaching,
    /// Attached.
    InUse,
    /// Being detached.
    Detaching,
    /// Being deleted.
    Deleting,
}

/// The role of an ENI on its instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EniKind {
    /// The instance's own interface; never touched.
    Primary,
    /// An additional interface; carries pods.
    Secondary,
    /// A trunk for member interfaces; not used yet.
    Trunk,
    /// A member of a trunk; not used yet.
    Member,
}

/// One elastic network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Eni {
    /// Its id.
    pub id: EniId,
    /// Its Ethernet address: how the NIC is recognised in the node.
    pub mac: Mac,
    /// The vSwitch its addresses come from.
    pub vswitch: VSwitchId,
    /// State.
    pub status: EniStatus,
    /// Role.
    pub kind: EniKind,
    /// The instance it is attached to.
    pub instance: Option<InstanceId>,
    /// The address it was created with; it cannot be unassigned while the ENI lives.
    pub primary_v4: Ipv4Addr,
    /// All IPv4 addresses, the primary one included.
    pub v4: Vec<Ipv4Addr>,
    /// All IPv6 addresses.
    pub v6: Vec<Ipv6Addr>,
    /// IPv4 prefixes, /28 each; their addresses are not in `v4`.
    #[serde(default)]
    pub v4_prefixes: Vec<Ipv4Network>,
    /// IPv6 prefixes, /80 each; their addresses are not in `v6`.
    #[serde(default)]
    pub v6_prefixes: Vec<Ipv6Network>,
    /// Security groups.
    pub security_groups: Vec<SecurityGroupId>,
    /// Tags.
    pub tags: BTreeMap<String, String>,
}

/// The subnet of an ENI as the metadata service tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subnet {
    /// The vSwitch's IPv4 block.
    pub cidr_v4: Ipv4Network,
    /// Its IPv4 gateway.
    pub gateway_v4: Ipv4Addr,
    /// The vSwitch's IPv6 block, if it has one.
    pub cidr_v6: Option<Ipv6Network>,
    /// Its IPv6 gateway, if it has one.
    pub gateway_v6: Option<Ipv6Addr>,
}

/// One vSwitch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VSwitch {
    /// Its id.
    pub id: VSwitchId,
    /// Its zone.
    pub zone: String,
    /// IPv4 addresses not yet handed out (`AvailableIpAddressCount`).
    pub available: u32,
    /// Its IPv4 block.
    pub cidr_v4: Ipv4Network,
    /// Its IPv6 block.
    pub cidr_v6: Option<Ipv6Network>,
}

/// What an instance type can carry (`DescribeInstanceTypes`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceLimits {
    /// ENIs, the primary one included (`EniQuantity`).
    pub adapters: u32,
    /// IPv4 addresses per ENI, its primary one included (`EniPrivateIpAddressQuantity`).
    pub v4_per_adapter: u32,
    /// IPv6 addresses per ENI (`EniIpv6AddressQuantity`).
    pub v6_per_adapter: u32,
}

/// Who this node is (metadata service).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeIdentity {
    /// Instance id.
    pub instance: InstanceId,
    /// Instance type, such as `ecs.g7.large`.
    pub instance_type: String,
    /// Region.
    pub region: String,
    /// Zone.
    pub zone: String,
    /// MAC of the primary ENI.
    pub primary_mac: Mac,
}

/// Addresses that an assign call returned.
pub type Assigned = Vec<IpAddr>;
