//! What the pool wants done. The rules of execution are in the [module's documentation](super).

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::ids::{ClientToken, OpId, Ticket};
use super::lease::Lease;
use super::record::Change;
use crate::clock::Moment;
use crate::errors::Error;
use crate::ident::{AttachmentKey, EniId, Family, Mac, PodRef, SecurityGroupId, VSwitchId};

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Write to the store, all or nothing, and let no later effect start before it is durable.
    Persist(Vec<Change>),
    /// Write to the store, all or nothing, in order with the others; nothing waits for it, and losing it in a crash is harmless.
    PersistLazily(Vec<Change>),

    /// Wire the pod. Idempotent: after a crash it comes again for what may be half done or done.
    /// Reports: `Connected` or `ConnectFailed`.
    Connect {
        /// Number for the report.
        op: OpId,
        /// The attachment.
        key: AttachmentKey,
        /// Whose it is.
        pod: PodRef,
        /// Path of the pod's network namespace.
        netns: String,
        /// What the engine gave with the Add.
        options: String,
        /// The addresses and the ENI they belong to.
        lease: Lease,
    },
    /// Remove all of an attachment, in whatever state it is, netns or no netns. Idempotent.
    /// Reports: `DatapathRemoved` when the datapath forgot it, then `Disconnected` when the links are gone too; or `DisconnectFailed`.
    Disconnect {
        /// Number for the reports.
        op: OpId,
        /// The attachment.
        key: AttachmentKey,
        /// Whose it was.
        pod: PodRef,
        /// Path of the pod's network namespace when it was attached; may be gone.
        netns: String,
        /// The lease it had. The interface index may be stale after a reboot.
        lease: Lease,
    },
    /// Answer a request. Every ticket gets exactly one reply, unless a crash comes first.
    Reply {
        /// Whose.
        ticket: Ticket,
        /// With what.
        result: Result<Reply, Error>,
    },

    /// `CreateNetworkInterface`. Report: `EniCreated`.
    CreateEni {
        /// Number for the report.
        op: OpId,
        /// `ClientToken`.
        token: ClientToken,
        /// In which vSwitch.
        vswitch: VSwitchId,
        /// With which security groups.
        security_groups: Vec<SecurityGroupId>,
        /// IPv4 addresses in all, the primary one included (at least 1).
        v4: u32,
        /// IPv6 addresses.
        v6: u32,
        /// IPv4 prefixes (/28), besides the primary address; `v4` is 1 then, since the API takes one or the other.
        v4_prefixes: u32,
        /// IPv6 prefixes (/80); `v6` is 0 then.
        v6_prefixes: u32,
        /// Resource group.
        resource_group: Option<String>,
        /// Tags, [`TOKEN_TAG`](super::TOKEN_TAG) included.
        tags: BTreeMap<String, String>,
    },
    /// `AttachNetworkInterface` to this instance, and wait for `InUse`. Report: `EniAttached`.
    AttachEni {
        /// Number for the report.
        op: OpId,
        /// The ENI.
        eni: EniId,
    },
    /// Find the NIC by its MAC, wait for it as long as it usually takes, bring it up, make its routing table and attach the
    /// datapath; look up its subnet. Idempotent. Report: `NicReady` or `NicFailed`.
    ConfigureNic {
        /// Number for the report.
        op: OpId,
        /// The ENI.
        eni: EniId,
        /// How to recognise it.
        mac: Mac,
    },
    /// `AssignPrivateIpAddresses` or `AssignIpv6Addresses`. Report: `Assigned`.
    Assign {
        /// Number for the report.
        op: OpId,
        /// `ClientToken`.
        token: ClientToken,
        /// To which ENI.
        eni: EniId,
        /// Which family.
        family: Family,
        /// How many; at most what one call takes.
        count: u32,
    },
    /// `UnassignPrivateIpAddresses` or `UnassignIpv6Addresses`. Report: `Unassigned`.
    Unassign {
        /// Number for the report.
        op: OpId,
        /// From which ENI.
        eni: EniId,
        /// Which family all of them are of.
        family: Family,
        /// Which.
        addresses: Vec<IpAddr>,
    },
    /// `AssignPrivateIpAddresses` or `AssignIpv6Addresses` with a count of prefixes. Report: `PrefixesAssigned`.
    AssignPrefixes {
        /// Number for the report.
        op: OpId,
        /// `ClientToken`.
        token: ClientToken,
        /// To which ENI.
        eni: EniId,
        /// Which family.
        family: Family,
        /// How many prefixes; at most what one call takes.
        count: u32,
    },
    /// `UnassignPrivateIpAddresses` or `UnassignIpv6Addresses` with prefixes. Report: `PrefixesUnassigned`.
    UnassignPrefixes {
        /// Number for the report.
        op: OpId,
        /// From which ENI.
        eni: EniId,
        /// Which family all of them are of.
        family: Family,
        /// Which.
        prefixes: Vec<IpNetwork>,
    },
    /// Undo `ConfigureNic`, `DetachNetworkInterface`, and wait for `Available`. Report: `Detached`.
    Detach {
        /// Number for the report.
        op: OpId,
        /// The ENI.
        eni: EniId,
    },
    /// `DeleteNetworkInterface`. Report: `Deleted`.
    Delete {
        /// Number for the report.
        op: OpId,
        /// The ENI.
        eni: EniId,
    },
    /// `DescribeNetworkInterfaces` of this instance. Report: `Inventory`.
    TakeInventory {
        /// Number for the report.
        op: OpId,
    },
    /// `DescribeVSwitches`. Report: `VSwitches`.
    DescribeVSwitches {
        /// Number for the report.
        op: OpId,
        /// Which.
        ids: Vec<VSwitchId>,
    },
    /// The cloud does not list these addresses of a running pod any more, so its packets are lost. Tell whoever looks after the pod; nothing
    /// else happens to it, and its addresses go to nobody until it is deleted. Comes anew after a restart. No report.
    ReportAddressLoss {
        /// The attachment.
        key: AttachmentKey,
        /// Whose it is.
        pod: PodRef,
        /// The ENI.
        eni: EniId,
        /// The addresses concerned.
        addresses: Vec<IpAddr>,
        /// In words, with code and remedy.
        reason: Error,
    },
    /// The cloud lists all addresses of the pod again. No report.
    ReportAddressRecovery {
        /// The attachment.
        key: AttachmentKey,
        /// Whose it is.
        pod: PodRef,
    },
    /// Send a `Tick` at this moment. Replaces what an earlier `WakeAt` said.
    WakeAt(Moment),
}

/// What a request is answered with when it went well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The pod is attached.
    Attached(Lease),
    /// The attachment is gone from the datapath, and its release is on disk.
    Detached,
    /// These were garbage and are gone in the same sense.
    GarbageCollected(Vec<AttachmentKey>),
}
