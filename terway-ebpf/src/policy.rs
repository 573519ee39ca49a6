//! Network policies: whether the first packet of a connection passes, by the lookups of ADR 0008 in their order.
//!
//! The maps are asked through a trait, so that the same code runs in the kernel and, in tests, against the compiler's own reading of them.

use terway_abi::{
    CONTROL_ENFORCE, CONTROL_VERSION, Drop, IDENTITY_KIND, IDENTITY_NODE, MAX_ENDPOINTS, NO_SLOT, PEER_VERDICT,
    PeerKey, PolicyDirection, PolicyEndpoint, PortKey, VERDICT_ALLOW, Versioned, default_index, rule_id,
};

use crate::family::Family;
use crate::flow::opaque;
use crate::parse::{SCTP, TCP, UDP};

/// What the daemon has told the kernel of policies.
pub trait Policies<F: Family> {
    /// Which phase counts, and whether policies are enforced.
    fn gate(&self) -> u32;
    /// What holds for the pod of a slot in a phase.
    fn endpoint(&self, slot: u32, phase: u32) -> Option<&PolicyEndpoint>;
    /// The identity of an address; 0 = that of its longest block.
    fn exact(&self, address: &F::Addr) -> Option<&Versioned>;
    /// The identity of the longest block that the address is in.
    fn block(&self, address: &F::Addr) -> Option<&Versioned>;
    /// Where a set leads for an identity.
    fn peer(&self, key: &PeerKey) -> Option<&Versioned>;
    /// The decision of the longest prefix of a port table.
    fn port(&self, key: &PortKey) -> Option<u32>;
}

/// A connection, in the direction in which it began: after translation of Services, with the client's true address.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug)]
pub struct Case<A> {
    /// Who began.
    pub source: A,
    /// With whom.
    pub destination: A,
    /// What decided about the source and the destination; those of pods of this node are less than [`MAX_ENDPOINTS`].
    pub slots: [u32; 2],
    /// The destination's port as in the packet, in the first two bytes; the others are not looked at.
    pub port: u32,
    /// IP protocol number.
    pub protocol: u32,
}

/// What is decided: the number of the reason, and [`VERDICT_ALLOW`].
pub type Decision = u32;

/// Of the policies that were asked none decides.
const UNDECIDED: Decision = VERDICT_ALLOW | rule_id::NO_POLICY;

/// Neither direction of this node's business.
pub const ELSEWHERE: Decision = VERDICT_ALLOW;

/// Whether the slot is a pod's.
#[inline(always)]
#[must_use]
pub const fn is_pod(slot: u32) -> bool {
    slot != NO_SLOT && slot < MAX_ENDPOINTS
}

/// The value of the phase that counts.
#[inline(always)]
fn at(phases: &Versioned, phase: u32) -> u32 {
    let [zero, one] = *phases;
    // Without a branch, whose two ways the verifier would both follow.
    zero ^ ((zero ^ one) & 0_u32.wrapping_sub(phase & CONTROL_VERSION))
}

/// The identity by which an end is seen.
#[inline(always)]
fn seen<F: Family, P: Policies<F>>(policies: &P, address: &F::Addr, slot: u32, phase: u32) -> u32 {
    if is_pod(slot) {
        let Some(pod) = policies.endpoint(slot, phase) else { return 0 };
        let [v4, v6] = pod.identities;
        return if F::VERSION == 4 { v4 } else { v6 };
    }
    if let Some(phases) = policies.exact(address) {
        let identity = at(phases, phase);
        if identity != 0 {
            return identity;
        }
    }
    policies.block(address).map_or(0, |phases| at(phases, phase))
}

/// One direction of one pod.
#[inline(always)]
fn one_side<F: Family, P: Policies<F>>(
    policies: &P,
    [admin, others]: &[PolicyDirection; 2],
    ingress: bool,
    peer: (&F::Addr, u32),
    case: &Case<F::Addr>,
    phase: u32,
) -> Decision {
    if admin.set | others.set == 0 {
        return UNDECIDED;
    }
    let identity = seen::<F, P>(policies, peer.0, peer.1, phase);
    if ingress && identity & IDENTITY_KIND == IDENTITY_NODE {
        return VERDICT_ALLOW | rule_id::LOCAL_NODE;
    }
    let decision = ask::<F, P>(policies, admin, identity, case, phase);
    if decision != UNDECIDED {
        return decision;
    }
    ask::<F, P>(policies, others, identity, case, phase)
}

/// What the policies of one set decide.
#[inline(always)]
fn ask<F: Family, P: Policies<F>>(
    policies: &P,
    side: &PolicyDirection,
    identity: u32,
    case: &Case<F::Addr>,
    phase: u32,
) -> Decision {
    let set = side.set;
    if set == 0 {
        return UNDECIDED;
    }
    let special = policies.peer(&PeerKey { set, identity }).map_or(0, |phases| at(phases, phase));
    let target = if special != 0 {
        special
    } else {
        // Bounded in 64 bits: the verifier of 5.10 does not believe 32.
        let index = opaque(u64::from(default_index(identity))) & 3;
        // SAFETY: the index has two bits, and the array four entries. `get` would add a branch to verify.
        unsafe { *side.defaults.get_unchecked(index as usize) }
    };
    if target & PEER_VERDICT != 0 {
        return target & !PEER_VERDICT;
    }
    let ported = matches!(case.protocol as u8, TCP | UDP | SCTP);
    let port = if ported { case.port as u16 } else { 0 };
    // A table is written before anything leads to it: what is not there is denied.
    policies.port(&PortKey::new(target, case.protocol as u8, port)).unwrap_or(0)
}

/// The decisions of both directions, egress first, as far as this node takes them.
///
/// The epochs that go into the flow entry are read before.
#[inline(always)]
pub fn verdict<F: Family, P: Policies<F>>(policies: &P, case: &Case<F::Addr>) -> [Decision; 2] {
    let gate = policies.gate();
    let [source, destination] = case.slots;
    let always = if gate & CONTROL_ENFORCE == 0 {
        rule_id::DISABLED
    } else if source == destination {
        rule_id::LOOPBACK
    } else {
        0
    };
    if always != 0 {
        return [VERDICT_ALLOW | always; 2];
    }
    let phase = gate & CONTROL_VERSION;
    let mut decisions = [ELSEWHERE; 2];
    let [egress, ingress] = &mut decisions;
    if is_pod(source)
        && let Some(pod) = policies.endpoint(source, phase)
    {
        *egress = one_side::<F, P>(policies, &pod.egress, false, (&case.destination, destination), case, phase);
        // Nothing that comes after it could make it pass.
        if *egress & VERDICT_ALLOW == 0 {
            return decisions;
        }
    }
    if is_pod(destination)
        && let Some(pod) = policies.endpoint(destination, phase)
    {
        *ingress = one_side::<F, P>(policies, &pod.ingress, true, (&case.source, source), case, phase);
    }
    decisions
}

/// Why the connection is forbidden and the number of what forbids it, if it is.
#[inline(always)]
#[must_use]
pub const fn forbidden([egress, ingress]: [Decision; 2]) -> Option<(Drop, u32)> {
    if egress & VERDICT_ALLOW == 0 {
        Some((Drop::PolicyEgress, egress))
    } else if ingress & VERDICT_ALLOW == 0 {
        Some((Drop::PolicyIngress, ingress))
    } else {
        None
    }
}
