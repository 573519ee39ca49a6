//! Per-CPU scratch memory of the slow path.
//!
//! The stack is too small for it (512 bytes for a whole call chain). Map memory also keeps the verifier's work low: it tracks the content
//! of every stack slot and explores each combination, but knows nothing about the content of a map value.

use terway_abi::{BackendRef, Flow, NO_BACKEND};

use crate::family::Family;
use crate::parse::Packet;
use crate::policy::{PolicyQuery, PolicyVerdict};

/// The scratch memory of one packet in the slow path. Stages pass their results to later stages here. Not pinned; zeros are valid.
#[repr(C)]
pub struct Scratch<F: Family> {
    /// The parsed packet.
    pub packet: Packet<F>,
    /// The packet that an ICMP error quotes.
    pub quoted: Packet<F>,
    /// The flow entry to insert for this packet's direction.
    pub flow: Flow<F::Addr>,
    /// The flow entry of the reply direction with NAT: the one to insert, or ([`Destination::keeps_reply_nat`]) the one that is replaced.
    pub reply_flow: Flow<F::Addr>,
    /// Snapshot of the entry that is replaced.
    pub previous: PreviousEntry,
    /// The destination of the packet.
    pub destination: Destination<F::Addr>,
    /// The query of the policy check.
    pub policy_query: PolicyQuery<F::Addr>,
    /// The verdicts of the policy check, egress first.
    pub verdicts: [PolicyVerdict; 2],
}

impl<F: Family> Scratch<F> {
    /// [`terway_abi::Frontend::service`] of the Service whose backend was selected for the packet; 0 if there is none.
    #[inline(always)]
    pub const fn service(&self) -> u32 {
        if self.destination.has_backend() { self.destination.service } else { 0 }
    }
}

/// Snapshot of the flow entry under the packet's tuple, taken before the entry is replaced or evicted. All false without an entry.
#[repr(C, align(8))]
pub struct PreviousEntry {
    /// The entry is the valid reply entry of another connection with NAT: the tuple collides.
    pub collides: bool,
    /// The packet's direction is the reply direction of the entry.
    pub is_reply: bool,
    /// The entry translates replies.
    pub is_reply_nat: bool,
    /// Zero.
    pub pad: [u8; 5],
    /// Epoch slots of the packet's sender and of the other end.
    pub slots: [u32; 2],
    /// Epochs of these slots in the entry.
    pub epochs: [u32; 2],
}

/// The destination of a packet: its own destination address, or the selected backend.
#[repr(C, align(8))]
pub struct Destination<A> {
    /// Address.
    pub address: A,
    /// Port as in the packet, in the first two bytes.
    pub port: u32,
    /// The selected backend; [`NO_BACKEND`] if the packet is for no Service.
    pub backend_ref: BackendRef,
    /// [`terway_abi::Frontend::service`] of the backend.
    pub service: u32,
    /// Source port after SNAT, as in the packet; 0 if it is not yet chosen.
    pub nat_source_port: u32,
    /// The uplink whose node address masquerades the client (SNAT to the node); 0 without SNAT.
    pub snat_uplink: u32,
    /// The backend is the sender itself.
    pub is_hairpin: bool,
    /// Only backends of this node are allowed (externalTrafficPolicy Local).
    pub is_local_only: bool,
    /// The packet is a reply with NAT whose entry is invalid. The NAT of the old entry, in [`Scratch::reply_flow`], stays in force.
    pub keeps_reply_nat: bool,
    /// Zero.
    pub pad: [u8; 5],
}

impl<A> Destination<A> {
    /// Resets to the packet's own destination, without a backend.
    #[inline(always)]
    pub(super) fn set_original<F: Family<Addr = A>>(&mut self, packet: &Packet<F>) {
        F::assign(&mut self.address, &packet.dst);
        (self.port, self.nat_source_port) = (packet.ports >> 16, 0);
        self.backend_ref.backend = NO_BACKEND;
    }

    /// Whether a backend was selected.
    #[inline(always)]
    pub const fn has_backend(&self) -> bool {
        self.backend_ref.backend != NO_BACKEND
    }
}
