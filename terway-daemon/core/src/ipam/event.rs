//! What the pool is told: requests of the runtime, reports on effects, facts about the cloud, and time.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::config::PoolConfig;
use super::ids::{OpId, Ticket};
use crate::cloud::{CloudError, Eni, Subnet, VSwitch};
use crate::errors::Error;
use crate::ident::{AttachmentKey, EniId, Family, IpStack, PodRef};

/// Something happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The runtime wants a pod attached. Answered with [`Reply::Attached`](super::Reply::Attached).
    Add(Add),
    /// The runtime wants an attachment gone. Answered with [`Reply::Detached`](super::Reply::Detached), for unknown keys too.
    Del {
        /// Who waits.
        ticket: Ticket,
        /// What goes.
        key: AttachmentKey,
    },
    /// The runtime lists what is still valid in a network; everything else of that network goes.
    /// Answered with [`Reply::GarbageCollected`](super::Reply::GarbageCollected).
    Gc {
        /// Who waits.
        ticket: Ticket,
        /// The network the list speaks of.
        network: String,
        /// The attachments that stay.
        valid: BTreeSet<AttachmentKey>,
    },
    /// The deadline of a request has passed: it is answered now, with the best error known. Work that is under way goes on.
    Cancel {
        /// Whose deadline it was.
        ticket: Ticket,
    },
    /// Evidence that the pod of an attachment is gone for good (its netns does not exist any more). Like a `Del` that nobody waits for.
    NetnsGone {
        /// The attachment.
        key: AttachmentKey,
    },

    /// [`Effect::Connect`](super::Effect::Connect) is done: links, routes and datapath are in place.
    Connected {
        /// The effect's number.
        op: OpId,
        /// The attachment.
        key: AttachmentKey,
    },
    /// [`Effect::Connect`](super::Effect::Connect) failed.
    ConnectFailed {
        /// The effect's number.
        op: OpId,
        /// The attachment.
        key: AttachmentKey,
        /// What the runtime is told.
        error: Error,
        /// Whether everything that had been done is undone. If not, the pool orders a [`Disconnect`](super::Effect::Disconnect).
        undone: bool,
    },
    /// First report of [`Effect::Disconnect`](super::Effect::Disconnect): the datapath forgot the pod; its links may still be there.
    DatapathRemoved {
        /// The effect's number.
        op: OpId,
        /// The attachment.
        key: AttachmentKey,
    },
    /// Last report of [`Effect::Disconnect`](super::Effect::Disconnect): nothing of the attachment is left in the kernel.
    Disconnected {
        /// The effect's number.
        op: OpId,
        /// The attachment.
        key: AttachmentKey,
    },
    /// [`Effect::Disconnect`](super::Effect::Disconnect) failed part-way; the pool orders it again after a while.
    DisconnectFailed {
        /// The effect's number.
        op: OpId,
        /// The attachment.
        key: AttachmentKey,
        /// Why, for the list of problems.
        error: Error,
    },

    /// Report of [`Effect::CreateEni`](super::Effect::CreateEni).
    EniCreated {
        /// The effect's number.
        op: OpId,
        /// The new ENI with its addresses.
        result: Result<Eni, CloudError>,
    },
    /// Report of [`Effect::AttachEni`](super::Effect::AttachEni). `Ok` once the cloud calls the ENI `InUse`.
    EniAttached {
        /// The effect's number.
        op: OpId,
        /// The ENI.
        eni: EniId,
        /// How it went.
        result: Result<(), CloudError>,
    },
    /// Report of [`Effect::ConfigureNic`](super::Effect::ConfigureNic): the NIC is there, up and has its table.
    NicReady {
        /// The effect's number.
        op: OpId,
        /// The ENI.
        eni: EniId,
        /// The kernel's index of the NIC in the node's netns.
        ifindex: u32,
        /// The subnet as the metadata service tells it.
        subnet: Subnet,
    },
    /// Report of [`Effect::ConfigureNic`](super::Effect::ConfigureNic): no NIC with that MAC, or the kernel refused.
    NicFailed {
        /// The effect's number.
        op: OpId,
        /// The ENI.
        eni: EniId,
        /// Why.
        error: Error,
    },
    /// Report of [`Effect::Assign`](super::Effect::Assign).
    Assigned {
        /// The effect's number.
        op: OpId,
        /// The ENI.
        eni: EniId,
        /// The family asked for.
        family: Family,
        /// The addresses this call (or an earlier one with the same token) added.
        result: Result<Vec<IpAddr>, CloudError>,
    },
    /// Report of [`Effect::Unassign`](super::Effect::Unassign).
    Unassigned {
        /// The effect's number.
        op: OpId,
        /// The ENI.
        eni: EniId,
        /// The family.
        family: Family,
        /// How it went.
        result: Result<(), CloudError>,
    },
    /// Report of [`Effect::AssignPrefixes`](super::Effect::AssignPrefixes).
    PrefixesAssigned {
        /// The effect's number.
        op: OpId,
        /// The ENI.
        eni: EniId,
        /// The family asked for.
        family: Family,
        /// The prefixes this call (or an earlier one with the same token) added.
        result: Result<Vec<IpNetwork>, CloudError>,
    },
    /// Report of [`Effect::UnassignPrefixes`](super::Effect::UnassignPrefixes).
    PrefixesUnassigned {
        /// The effect's number.
        op: OpId,
        /// The ENI.
        eni: EniId,
        /// The family.
        family: Family,
        /// How it went.
        result: Result<(), CloudError>,
    },
    /// Report of [`Effect::Detach`](super::Effect::Detach). `Ok` once the cloud calls the ENI `Available`.
    Detached {
        /// The effect's number.
        op: OpId,
        /// The ENI.
        eni: EniId,
        /// How it went.
        result: Result<(), CloudError>,
    },
    /// Report of [`Effect::Delete`](super::Effect::Delete).
    Deleted {
        /// The effect's number.
        op: OpId,
        /// The ENI.
        eni: EniId,
        /// How it went.
        result: Result<(), CloudError>,
    },
    /// Report of [`Effect::TakeInventory`](super::Effect::TakeInventory).
    Inventory {
        /// The effect's number.
        op: OpId,
        /// Every ENI of this instance, its primary one included.
        result: Result<Vec<Eni>, CloudError>,
    },
    /// Report of [`Effect::DescribeVSwitches`](super::Effect::DescribeVSwitches).
    VSwitches {
        /// The effect's number.
        op: OpId,
        /// Those that exist.
        result: Result<Vec<VSwitch>, CloudError>,
    },
    /// The configuration has changed. Applies at once: watermarks, limits and blocks (all of which are lifted) to this very step, vSwitches, security
    /// groups and tags to the next ENI and to the judgement of those that are there. Fixed fields are ignored.
    Configure(Box<PoolConfig>),
    /// Time has passed. Always harmless; due at the moment of the last [`Effect::WakeAt`](super::Effect::WakeAt).
    Tick,
}

/// What the runtime says when it wants a pod attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Add {
    /// Who waits.
    pub ticket: Ticket,
    /// The attachment.
    pub key: AttachmentKey,
    /// Whose it is.
    pub pod: PodRef,
    /// Path of the pod's network namespace.
    pub netns: String,
    /// Families the pod gets addresses of.
    pub ip_stack: IpStack,
    /// What else the engine needs to wire this pod, again after a restart if need be (MTU, bandwidth, …). The pool keeps it and
    /// hands it back in [`Effect::Connect`](super::Effect::Connect) without looking at it.
    pub options: String,
}
