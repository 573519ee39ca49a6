//! The cloud as the daemon asks it: ECS and VPC by OpenAPI, the node itself by the metadata service.
//!
//! [`Cloud`] is the border. Its calls are *make it so* operations: every one can be repeated after a crash or a lost reply without a
//! second effect, either because it carries a caller's token or because the wanted state is checked.

mod aliyun;
mod config;
mod credentials;
mod limits;
mod metadata;
mod rpc;
mod sign;
pub mod tls;
mod wire;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ipnetwork::{Ipv4Network, Ipv6Network};
use terway_core::cloud::{CloudError, Eni, EniKind, EniStatus, InstanceLimits, NodeIdentity, Subnet, VSwitch};
use terway_core::ident::{EniId, InstanceId, Mac, SecurityGroupId, VSwitchId};

pub use self::aliyun::Aliyun;
pub use self::config::{
    BadEndpoint, CredentialSource, EcsConfig, EndpointNetwork, KEY_FOLDER, METADATA, Retry, Scheme, SignatureMethod,
    endpoint,
};
pub use self::metadata::{Metadata, Nic};
#[cfg(feature = "test-api")]
pub(crate) use self::wire::fuzz_reply;
pub use terway_core::config::Secret;

/// Addresses that one assign or unassign call may name (ECS API reference, `AssignPrivateIpAddresses`: `PrivateIpAddress.N`, N up to 10).
pub const MAX_ADDRESSES_PER_CALL: u32 = 10;

/// Addresses, the primary one included, that an ENI may be created with (ECS API reference, `CreateNetworkInterface`: 49 secondary ones).
pub const MAX_V4_AT_CREATION: u32 = 50;

/// Prefixes that one call may ask for or name (ECS API reference, `AssignPrivateIpAddresses`: `Ipv4PrefixCount`, 1 to 10).
pub const MAX_PREFIXES_PER_CALL: u32 = 10;

/// A result of the cloud.
pub type Result<T> = std::result::Result<T, CloudError>;

/// An ENI to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateEni {
    /// `ClientToken`: at most 64 ASCII characters. The same token with the same parameters makes one ENI, however often it is sent.
    pub token: String,
    /// Where its addresses come from.
    pub vswitch: VSwitchId,
    /// Its security groups, 1 to 10.
    pub security_groups: Vec<SecurityGroupId>,
    /// IPv4 addresses in all, the primary one included: 1 to [`MAX_V4_AT_CREATION`].
    pub v4_count: u32,
    /// IPv6 addresses, 0 to [`MAX_ADDRESSES_PER_CALL`].
    pub v6_count: u32,
    /// IPv4 prefixes besides the primary address, 0 to [`MAX_PREFIXES_PER_CALL`]. The cloud gives an ENI secondary addresses or
    /// prefixes at its creation, not both.
    pub v4_prefixes: u32,
    /// IPv6 prefixes, 0 to [`MAX_PREFIXES_PER_CALL`]; not together with `v6_count`.
    pub v6_prefixes: u32,
    /// Tags; how the ENIs of this cluster are recognised later.
    pub tags: BTreeMap<String, String>,
    /// The resource group it belongs to; the account's default one if empty.
    pub resource_group: Option<String>,
}

/// Which ENIs to list; all conditions must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EniFilter {
    /// Attached to (or attaching to, or detaching from) this instance.
    pub instance: Option<InstanceId>,
    /// One of these; any if empty.
    pub ids: Vec<EniId>,
    /// In this state.
    pub status: Option<EniStatus>,
    /// Of this role.
    pub kind: Option<EniKind>,
    /// Having all these tags. At most 20.
    pub tags: BTreeMap<String, String>,
}

impl EniFilter {
    /// All ENIs of an instance.
    #[must_use]
    pub fn of_instance(instance: &InstanceId) -> Self {
        Self { instance: Some(instance.clone()), ..Self::default() }
    }

    /// The ENIs with these ids.
    #[must_use]
    pub fn ids(ids: &[EniId]) -> Self {
        Self { ids: ids.to_vec(), ..Self::default() }
    }
}

/// What the daemon asks of the cloud.
///
/// Throttled calls and calls without an answer are repeated inside, a bounded number of times; an error that comes out is final for
/// the caller's attempt, and [`CloudError::class`] says what to do about it. Dropping a future gives up waiting, not the effect.
#[async_trait]
pub trait Cloud: Send + Sync {
    /// What calls met that are being repeated at this moment, one for each action: their callers do not know of it yet.
    fn delayed(&self) -> Vec<CloudError>;

    /// Who this node is.
    async fn node_identity(&self) -> Result<NodeIdentity>;

    /// What an instance type can carry.
    async fn instance_limits(&self, instance_type: &str) -> Result<InstanceLimits>;

    /// The vSwitches with these ids, in the order asked. One that does not exist is left out.
    async fn vswitches(&self, ids: &[VSwitchId]) -> Result<Vec<VSwitch>>;

    /// All ENIs that pass a filter, ordered by id.
    async fn enis(&self, filter: &EniFilter) -> Result<Vec<Eni>>;

    /// Makes an ENI. It is `Available` when the first call with its token returns; a repeated one may return that moment's state.
    async fn create_eni(&self, request: &CreateEni) -> Result<Eni>;

    /// Begins to attach an ENI; see [`Cloud::wait_eni`] for the end. Succeeds at once if it is attached or attaching there already.
    async fn attach_eni(&self, eni: &EniId, instance: &InstanceId) -> Result<()>;

    /// Begins to detach an ENI. Succeeds at once if it is detached or detaching already, or gone.
    async fn detach_eni(&self, eni: &EniId, instance: &InstanceId) -> Result<()>;

    /// Deletes a detached ENI with its addresses. Succeeds if it is gone already.
    async fn delete_eni(&self, eni: &EniId) -> Result<()>;

    /// Adds IPv4 addresses (1 to [`MAX_ADDRESSES_PER_CALL`]) to an ENI and returns the new ones: all or none.
    ///
    /// The same token returns the same addresses again.
    async fn assign_v4(&self, eni: &EniId, count: u32, token: &str) -> Result<Vec<Ipv4Addr>>;

    /// Adds IPv6 addresses; as [`Cloud::assign_v4`].
    async fn assign_v6(&self, eni: &EniId, count: u32, token: &str) -> Result<Vec<Ipv6Addr>>;

    /// Takes IPv4 addresses (at most [`MAX_ADDRESSES_PER_CALL`], never the primary one) away from an ENI. Those it does not have are
    /// passed over, as is an ENI that is gone.
    async fn unassign_v4(&self, eni: &EniId, addresses: &[Ipv4Addr]) -> Result<()>;

    /// Takes IPv6 addresses away; as [`Cloud::unassign_v4`].
    async fn unassign_v6(&self, eni: &EniId, addresses: &[Ipv6Addr]) -> Result<()>;

    /// Adds IPv4 prefixes (1 to [`MAX_PREFIXES_PER_CALL`], /28 each) to an ENI and returns the new ones; otherwise as
    /// [`Cloud::assign_v4`]. A prefix takes the place of one address in the instance type's limit.
    ///
    /// A vSwitch without a whole free block refuses with `VSwitchExhausted`, although it may have single addresses left.
    async fn assign_v4_prefixes(&self, eni: &EniId, count: u32, token: &str) -> Result<Vec<Ipv4Network>>;

    /// Adds IPv6 prefixes, /80 each; as [`Cloud::assign_v4_prefixes`].
    async fn assign_v6_prefixes(&self, eni: &EniId, count: u32, token: &str) -> Result<Vec<Ipv6Network>>;

    /// Takes IPv4 prefixes (at most [`MAX_PREFIXES_PER_CALL`]) away from an ENI. Those it does not have are passed over.
    async fn unassign_v4_prefixes(&self, eni: &EniId, prefixes: &[Ipv4Network]) -> Result<()>;

    /// Takes IPv6 prefixes away; as [`Cloud::unassign_v4_prefixes`].
    async fn unassign_v6_prefixes(&self, eni: &EniId, prefixes: &[Ipv6Network]) -> Result<()>;

    /// The subnet of the attached ENI with this MAC, from the metadata service. `NotFound` until the NIC has arrived.
    async fn subnet(&self, mac: Mac) -> Result<Subnet>;

    /// The attached ENIs whose NIC has arrived, the primary one included, by the word of the metadata service.
    async fn nics(&self) -> Result<Vec<Nic>>;

    /// One ENI. `NotFound` if it does not exist.
    async fn describe_eni(&self, eni: &EniId) -> Result<Eni>;

    /// Asks until the ENI is in `status`, and returns it so.
    ///
    /// Ends early with `NotFound` when it is gone, and with `InvalidState` after `within`, naming the state it is in.
    async fn wait_eni(&self, eni: &EniId, status: EniStatus, within: Duration) -> Result<Eni>;
}

/// One HTTP exchange with the cloud, after it ended. Repeated calls are observed each.
#[derive(Clone, Copy, Debug)]
pub struct ObservedCall<'a> {
    /// The action, such as `AssignPrivateIpAddresses`; `metadata` for the metadata service.
    pub api: &'a str,
    /// How it failed, if it did.
    pub error: Option<&'a CloudError>,
    /// From the request's first byte to the reply's last; waiting for the rate limit is not in it.
    pub duration: Duration,
}

impl ObservedCall<'_> {
    /// The value of a metric label `error`: the cloud's code, or the class if there was no answer, or empty on success.
    #[must_use]
    pub fn error_label(&self) -> String {
        match self.error {
            None => String::new(),
            Some(error) if error.code.is_empty() => format!("{:?}", error.class),
            Some(error) => error.code.clone(),
        }
    }
}

/// Is told of every exchange. Must be quick: it runs on the caller's task.
pub type CallObserver = Arc<dyn Fn(&ObservedCall<'_>) + Send + Sync>;
