//! Network policies: the policy check of a new connection, by the lookups of ADR 0008.
//!
//! The lookups are a trait: the kernel's maps in the datapath, the policy compiler's maps in tests.

use terway_abi::{
    CONTROL_ENFORCE, CONTROL_VERSION, Drop, IDENTITY_KIND, IDENTITY_NODE, MAX_ENDPOINTS, NO_SLOT, PEER_VERDICT,
    PeerKey, PolicyDirection, PolicyEndpoint, PortKey, VERDICT_ALLOW, Versioned, default_index, rule_id,
};

use crate::family::Family;
use crate::flow::opaque;
use crate::parse::{SCTP, TCP, UDP};

/// Lookups of the policy maps.
pub trait Policies<F: Family> {
    /// The control word: active version and enforcement.
    fn control_word(&self) -> u32;
    /// The policies of an endpoint, by slot and version.
    fn endpoint(&self, slot: u32, version: u32) -> Option<&PolicyEndpoint>;
    /// The identity of an address; 0 means the identity of its longest CIDR.
    fn identity(&self, address: &F::Addr) -> Option<&Versioned>;
    /// The identity of the longest CIDR that contains the address.
    fn cidr_identity(&self, address: &F::Addr) -> Option<&Versioned>;
    /// The peer entry of a policy set: verdict or port table.
    fn peer(&self, key: &PeerKey) -> Option<&Versioned>;
    /// The verdict of the longest prefix of a port table.
    fn port(&self, key: &PortKey) -> Option<u32>;
}

/// The query of a policy check: a connection in its original direction, after DNAT and before SNAT.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug)]
pub struct PolicyQuery<A> {
    /// Address of the initiator.
    pub source: A,
    /// Address of the other end.
    pub destination: A,
    /// Epoch slots of source and destination; those of local endpoints are below [`MAX_ENDPOINTS`].
    pub slots: [u32; 2],
    /// Destination port as in the packet, in the first two bytes; the other bytes are ignored.
    pub port: u32,
    /// IP protocol number.
    pub protocol: u32,
}

/// A policy verdict: the rule id and [`VERDICT_ALLOW`].
pub type PolicyVerdict = u32;

/// The verdict when no policy of the tier decides.
const UNDECIDED: PolicyVerdict = VERDICT_ALLOW | rule_id::NO_POLICY;

/// The verdict of a direction that this node does not check: the pod is not local.
pub const NOT_CHECKED: PolicyVerdict = VERDICT_ALLOW;

/// Whether the slot is a local endpoint's.
#[inline(always)]
#[must_use]
pub const fn is_pod(slot: u32) -> bool {
    slot != NO_SLOT && slot < MAX_ENDPOINTS
}

/// The value of the active version.
#[inline(always)]
fn active(versions: &Versioned, version: u32) -> u32 {
    let [zero, one] = *versions;
    // Branch-free: the verifier would explore both branches.
    zero ^ ((zero ^ one) & 0_u32.wrapping_sub(version & CONTROL_VERSION))
}

/// The identity of a peer.
#[inline(always)]
fn peer_identity<F: Family, P: Policies<F>>(policies: &P, address: &F::Addr, slot: u32, version: u32) -> u32 {
    if is_pod(slot) {
        let Some(pod) = policies.endpoint(slot, version) else { return 0 };
        let [v4, v6] = pod.identities;
        return if F::VERSION == 4 { v4 } else { v6 };
    }
    if let Some(versions) = policies.identity(address) {
        let identity = active(versions, version);
        if identity != 0 {
            return identity;
        }
    }
    policies.cidr_identity(address).map_or(0, |versions| active(versions, version))
}

/// The verdict of one direction of one pod.
#[inline(always)]
fn check_direction<F: Family, P: Policies<F>>(
    policies: &P,
    [admin, others]: &[PolicyDirection; 2],
    ingress: bool,
    peer: (&F::Addr, u32),
    query: &PolicyQuery<F::Addr>,
    version: u32,
) -> PolicyVerdict {
    if admin.set | others.set == 0 {
        return UNDECIDED;
    }
    let identity = peer_identity::<F, P>(policies, peer.0, peer.1, version);
    if ingress && identity & IDENTITY_KIND == IDENTITY_NODE {
        return VERDICT_ALLOW | rule_id::LOCAL_NODE;
    }
    let verdict = evaluate_set::<F, P>(policies, admin, identity, query, version);
    if verdict != UNDECIDED {
        return verdict;
    }
    evaluate_set::<F, P>(policies, others, identity, query, version)
}

/// The verdict of one policy set.
#[inline(always)]
fn evaluate_set<F: Family, P: Policies<F>>(
    policies: &P,
    side: &PolicyDirection,
    identity: u32,
    query: &PolicyQuery<F::Addr>,
    version: u32,
) -> PolicyVerdict {
    let set = side.set;
    if set == 0 {
        return UNDECIDED;
    }
    let special = policies.peer(&PeerKey { set, identity }).map_or(0, |versions| active(versions, version));
    let target = if special != 0 {
        special
    } else {
        // Bounded in 64 bits: the verifier of 5.10 does not track 32-bit bounds.
        let index = opaque(u64::from(default_index(identity))) & 3;
        // SAFETY: the index has two bits, and the array four entries. `get` would add a branch to verify.
        unsafe { *side.defaults.get_unchecked(index as usize) }
    };
    if target & PEER_VERDICT != 0 {
        return target & !PEER_VERDICT;
    }
    let ported = matches!(query.protocol as u8, TCP | UDP | SCTP);
    let port = if ported { query.port as u16 } else { 0 };
    // A port table is written before the peer entries that refer to it: a missing entry denies.
    policies.port(&PortKey::new(target, query.protocol as u8, port)).unwrap_or(0)
}

/// Checks a connection: the verdicts of both directions, egress first.
///
/// The epochs of the flow entry are read before.
#[inline(always)]
pub fn check<F: Family, P: Policies<F>>(policies: &P, query: &PolicyQuery<F::Addr>) -> [PolicyVerdict; 2] {
    let control = policies.control_word();
    let [source, destination] = query.slots;
    let always = if control & CONTROL_ENFORCE == 0 {
        rule_id::DISABLED
    } else if source == destination {
        rule_id::LOOPBACK
    } else {
        0
    };
    if always != 0 {
        return [VERDICT_ALLOW | always; 2];
    }
    let version = control & CONTROL_VERSION;
    let mut verdicts = [NOT_CHECKED; 2];
    let [egress, ingress] = &mut verdicts;
    if is_pod(source)
        && let Some(pod) = policies.endpoint(source, version)
    {
        *egress =
            check_direction::<F, P>(policies, &pod.egress, false, (&query.destination, destination), query, version);
        // A denied packet stays denied.
        if *egress & VERDICT_ALLOW == 0 {
            return verdicts;
        }
    }
    if is_pod(destination)
        && let Some(pod) = policies.endpoint(destination, version)
    {
        *ingress = check_direction::<F, P>(policies, &pod.ingress, true, (&query.source, source), query, version);
    }
    verdicts
}

/// The drop reason and rule id of a denied connection.
#[inline(always)]
#[must_use]
pub const fn denied([egress, ingress]: [PolicyVerdict; 2]) -> Option<(Drop, u32)> {
    if egress & VERDICT_ALLOW == 0 {
        Some((Drop::PolicyEgress, egress))
    } else if ingress & VERDICT_ALLOW == 0 {
        Some((Drop::PolicyIngress, ingress))
    } else {
        None
    }
}
