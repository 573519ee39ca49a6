//! Flow events: drops and sampled new connections, reported through the ring buffer.

use core::mem::offset_of;

use crate::pod;

/// A traffic-control program, by the hook that it is attached to.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Program {
    /// Ingress of the host end of a pod's veth.
    FromPod = 1,
    /// Egress of the host end of a pod's veth.
    ToPod = 2,
    /// Ingress of an ENI.
    FromVpc = 3,
    /// Egress of an ENI.
    ToVpc = 4,
}

impl Program {
    /// The program with this number.
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::FromPod),
            2 => Some(Self::ToPod),
            3 => Some(Self::FromVpc),
            4 => Some(Self::ToVpc),
            _ => None,
        }
    }

    /// The program's name in the object file.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::FromPod => crate::names::FROM_POD,
            Self::ToPod => crate::names::TO_POD,
            Self::FromVpc => crate::names::FROM_VPC,
            Self::ToVpc => crate::names::TO_VPC,
        }
    }
}

/// An event about a dropped packet, or about the first packet of a sampled connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowEvent {
    /// The [`crate::Drop`] reason by number; 0 if the packet passed.
    pub reason: u16,
    /// The [`Program`] by number.
    pub program: u8,
    /// Address family: 4, 6, or 0 when the packet was dropped before it was known.
    pub family: u8,
    /// The IP protocol number; 0 when unknown.
    pub protocol: u8,
    /// Zero.
    pub pad: [u8; 3],
    /// The interface of the hook.
    pub ifindex: u32,
    /// Bytes of the packet, Ethernet header included.
    pub length: u32,
    /// Ports as in the packet, source first; 0 when unknown.
    pub ports: u32,
    /// Number of drops that this CPU has not reported since its last drop event; 0 if the packet passed.
    pub lost: u32,
    /// Source address; IPv4 in the first word.
    pub src: [u32; 4],
    /// Destination address; IPv4 in the first word.
    pub dst: [u32; 4],
    /// Destination and source MAC address; zeros if the packet passed.
    pub mac: crate::MacPair,
    /// The Ethernet type as in the packet, in the first two bytes.
    pub ethertype: u32,
    /// Policy verdicts, egress first: [`crate::VERDICT_ALLOW`] and the rule id. Zeros if policies were not checked.
    pub verdicts: [u32; 2],
    /// Destination address of the policy check, in the original direction of the connection, after DNAT. Zeros as above.
    pub policy_destination: [u32; 4],
    /// Destination port of the policy check as in the packet, in the first two bytes.
    pub policy_port: u32,
    /// [`crate::Frontend::service`] if a backend was selected for this packet; else 0.
    pub service: u32,
}

/// Rate limit of events: what one CPU has reported in the current second.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventBudget {
    /// Jiffies at which the current second began.
    pub second_start: u32,
    /// Events reported in the current second.
    pub spent: u32,
    /// Drops not reported since the last drop event.
    pub lost: u32,
    /// Zero.
    pub pad: u32,
}

pod!(FlowEvent: 104, EventBudget: 16);
const _: () = assert!(offset_of!(FlowEvent, src) == 24 && offset_of!(FlowEvent, ethertype) == 68);
const _: () = assert!(offset_of!(FlowEvent, policy_destination) == 80);
