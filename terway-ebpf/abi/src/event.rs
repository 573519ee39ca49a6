//! What the programs report through the ring buffer.

use core::mem::offset_of;

use crate::pod;

/// The program an event comes from.
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

    /// Its name in the object file.
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

/// A packet that was dropped, or one that began a connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowEvent {
    /// A [`crate::Drop`] by number; 0 if the packet passed.
    pub reason: u16,
    /// A [`Program`] by number.
    pub program: u8,
    /// 4, 6, or 0 when the packet was dropped before its family was known.
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
    /// Drops that this CPU did not report since the last one that it did; 0 if the packet passed.
    pub lost: u32,
    /// Source address; IPv4 in the first word.
    pub src: [u32; 4],
    /// Destination address; IPv4 in the first word.
    pub dst: [u32; 4],
    /// Destination and source MAC address; zeros if the packet passed.
    pub mac: crate::MacPair,
    /// The Ethernet type as in the packet, in the first two bytes.
    pub ethertype: u32,
    /// What policies decided, egress first: [`crate::DECISION_ALLOW`] and the number of the reason. Zeros if they were not asked.
    pub decisions: [u32; 2],
    /// The destination that they were asked about, in the direction in which the connection began: after translation of a Service.
    /// Zeros as above.
    pub target: [u32; 4],
    /// Its port as in the packet, in the first two bytes.
    pub port: u32,
    /// [`crate::Frontend::service`], if a backend was chosen for this packet; else 0.
    pub service: u32,
}

/// How many events a CPU may still report in the running second.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    /// Jiffies at which the running second began.
    pub since: u32,
    /// Events reported in it.
    pub spent: u32,
    /// Drops not reported since the last one that was.
    pub lost: u32,
    /// Zero.
    pub pad: u32,
}

pod!(FlowEvent: 104, Budget: 16);
const _: () = assert!(offset_of!(FlowEvent, src) == 24 && offset_of!(FlowEvent, ethertype) == 68);
const _: () = assert!(offset_of!(FlowEvent, target) == 80);
