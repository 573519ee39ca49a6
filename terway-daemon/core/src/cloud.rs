//! What the cloud says, as data: the vocabulary shared by the address pool (which decides) and the OpenAPI client (which asks).

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

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
    pub v4_prefixes: Vec<Ipv4Net>,
    /// IPv6 prefixes, /80 each; their addresses are not in `v6`.
    #[serde(default)]
    pub v6_prefixes: Vec<Ipv6Net>,
    /// Security groups.
    pub security_groups: Vec<SecurityGroupId>,
    /// Tags.
    pub tags: BTreeMap<String, String>,
}

/// The subnet of an ENI as the metadata service tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subnet {
    /// The vSwitch's IPv4 block.
    pub cidr_v4: Ipv4Net,
    /// Its IPv4 gateway.
    pub gateway_v4: Ipv4Addr,
    /// The vSwitch's IPv6 block, if it has one.
    pub cidr_v6: Option<Ipv6Net>,
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
    pub cidr_v4: Ipv4Net,
    /// Its IPv6 block.
    pub cidr_v6: Option<Ipv6Net>,
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

/// What a failed call means for the caller. The code alone decides, never the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ErrorClass {
    /// Too many calls: the same call will pass later.
    Throttled,
    /// The vSwitch has no address left.
    VSwitchExhausted,
    /// A quota of the ENI, the instance or the account is full.
    Quota,
    /// The thing is not there (any more).
    NotFound,
    /// The thing is in a state that does not allow the call now.
    InvalidState,
    /// The credentials do not allow the call.
    Forbidden,
    /// The request itself is wrong; repeating it cannot help.
    Invalid,
    /// The cloud failed or did not answer: the outcome is unknown, and only the same `ClientToken` may be tried again.
    Unknown,
}

/// A failed OpenAPI or metadata call. Holds no secret: neither signatures nor keys get in here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloudError {
    /// The action, such as `AssignPrivateIpAddresses`.
    pub action: String,
    /// What it means.
    pub class: ErrorClass,
    /// The cloud's own code, such as `InvalidVSwitchId.IpNotEnough`; empty when there was no answer.
    pub code: String,
    /// The cloud's own words.
    pub message: String,
    /// The cloud's request id, for its support; empty when there was no answer.
    pub request_id: String,
}

impl CloudError {
    /// The class of an OpenAPI error code.
    ///
    /// Codes: ECS API reference, "Error codes" of each action, and the user's help pages on Terway.
    #[must_use]
    pub fn classify(code: &str) -> ErrorClass {
        match code {
            "InvalidVSwitchId.IpNotEnough" => ErrorClass::VSwitchExhausted,
            "QuotaExceeded.PrivateIpAddress"
            | "EniPerInstanceLimitExceeded"
            | "SecurityGroupInstanceLimitExceed"
            | "InvalidOperation.Ipv4CountExceeded"
            | "InvalidOperation.Ipv6CountExceeded" => ErrorClass::Quota,
            "InvalidEniId.NotFound"
            | "InvalidEcsId.NotFound"
            | "InvalidIp.IpUnassigned"
            | "InvalidAllocationId.NotFound" => ErrorClass::NotFound,
            "InvalidOperation.InvalidEniState" | "Operation.Conflict" | "InvalidOperation.InvalidEcsState" => {
                ErrorClass::InvalidState
            }
            "InternalError" | "ServiceUnavailable" => ErrorClass::Unknown,
            _ if code.starts_with("Throttling") => ErrorClass::Throttled,
            _ if code.starts_with("Forbidden")
                || code.starts_with("InvalidAccessKeyId")
                || code.starts_with("InvalidSecurityToken")
                || code.starts_with("InvalidTimeStamp")
                || code == "SignatureDoesNotMatch" =>
            {
                ErrorClass::Forbidden
            }
            _ if code.starts_with("QuotaExceeded") => ErrorClass::Quota,
            "" => ErrorClass::Unknown,
            _ => ErrorClass::Invalid,
        }
    }
}

impl fmt::Display for CloudError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.code.is_empty() {
            write!(f, "{}: {}", self.action, self.message)
        } else {
            write!(f, "{}: {}: {} (request {})", self.action, self.code, self.message, self.request_id)
        }
    }
}

impl std::error::Error for CloudError {}

/// Addresses that an assign call returned.
pub type Assigned = Vec<IpAddr>;
