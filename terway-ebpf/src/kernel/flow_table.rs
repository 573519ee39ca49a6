//! Lookup and validity of flow entries.

use terway_abi::{BackendRef, Flow, FlowDirection, FlowKey, NO_BACKEND, POLICY_EPOCH_MASK, PathCounter, flow_flags};

use super::counters::count;
use super::hook::{FROM_POD, TO_VPC, hook};
use super::maps::{BACKENDS, DatapathFamily, Maps};
use super::skb::{Skb, Window};
use crate::family::Family;
use crate::flow;
use crate::frame::Frame;
use crate::route::{self, Tables};

/// [`FlowDirection::flags`] of the reply direction of a flow with NAT.
pub(super) const REPLY_NAT: u32 = flow_flags::REPLY | flow_flags::NAT;

/// A usable flow entry, and the packet's direction in it.
pub(super) struct FlowHit<F: Family> {
    /// The packet's direction.
    pub(super) direction: &'static mut FlowDirection,
    /// The entry.
    pub(super) flow: *mut Flow<F::Addr>,
    /// The sender is the initiator.
    pub(super) is_initiator: bool,
    /// Policies have changed since the entry was checked; it must be checked again before use.
    pub(super) is_policy_stale: bool,
}

/// The result of a lookup by tuple, valid or not.
#[derive(Clone, Copy)]
pub(super) struct Lookup<F: Family> {
    /// The entry under the packet's key.
    pub(super) entry: Option<*mut Flow<F::Addr>>,
    /// 1 if the sender is the high end of the key, else 0.
    pub(super) is_high_end: u32,
}

/// The entry of a key.
#[inline(always)]
pub(super) fn entry<F: DatapathFamily>(key: &FlowKey<F::Addr>) -> Option<*mut Flow<F::Addr>> {
    F::flows().get_ptr_mut(key)
}

/// [`check_entry`] of the entry of this key.
#[inline(always)]
pub(super) fn lookup<F: DatapathFamily, const PROGRAM: u8>(
    skb: Skb,
    window: &Window,
    key: &FlowKey<F::Addr>,
    is_high_end: u32,
) -> Option<FlowHit<F>>
where
    Maps: Tables<F>,
{
    check_entry::<F, PROGRAM>(skb, window, entry::<F>(key)?, is_high_end)
}

/// The packet's direction in an entry, if the entry is valid, the packet arrives at the interface and hook of that direction, and a
/// packet from a pod has the expected MAC addresses.
#[inline(always)]
pub(super) fn check_entry<F: DatapathFamily, const PROGRAM: u8>(
    skb: Skb,
    window: &Window,
    entry: *mut Flow<F::Addr>,
    is_high_end: u32,
) -> Option<FlowHit<F>>
where
    Maps: Tables<F>,
{
    // SAFETY: the value stays mapped for the program run. Other CPUs may update its counters concurrently, which `Flow` allows for. An
    // entry that is evicted and reused meanwhile is a race that every preallocated map has.
    let entry = unsafe { &mut *entry };
    // Replies may still be in flight after the backend is removed, and have to be translated.
    let is_reply_nat = flow::direction(entry, is_high_end).flags & REPLY_NAT == REPLY_NAT;
    let epoch_diff = if is_reply_nat || is_backend_current::<F>(entry) {
        route::epoch_diff::<F, _>(&Maps, entry.slots, entry.epochs)
    } else {
        u32::MAX
    };
    let is_initiator = entry.initiator == is_high_end;
    let flow: *mut _ = entry;
    let direction = flow::direction(entry, is_high_end);
    if direction.ifindex != skb.ifindex() || direction.hook != u32::from(hook::<PROGRAM>()) {
        return None;
    }
    if PROGRAM == FROM_POD && window.macs()? != direction.expected_macs {
        return None;
    }
    // Replies of the node itself are routed by the host stack; the route of the entry does not matter to them.
    if epoch_diff > POLICY_EPOCH_MASK && !(PROGRAM == TO_VPC && is_reply_nat) {
        count(PathCounter::FlowStale as u32, skb.len());
        return None;
    }
    Some(FlowHit { direction, flow, is_initiator, is_policy_stale: epoch_diff != 0 })
}

/// Whether policies must be checked again before a flow is used. Packets from the host stack to the VPC have no pod at either end.
#[inline(always)]
pub(super) const fn is_policy_stale<F: Family, const PROGRAM: u8>(hit: &FlowHit<F>) -> bool {
    PROGRAM != TO_VPC && hit.is_policy_stale
}

/// [`route::epoch_diff`] of an entry; all bits if its backend was removed.
#[inline(always)]
pub(super) fn epoch_diff<F: DatapathFamily>(flow: &Flow<F::Addr>) -> u32
where
    Maps: Tables<F>,
{
    if !is_backend_current::<F>(flow) {
        return u32::MAX;
    }
    route::epoch_diff::<F, _>(&Maps, flow.slots, flow.epochs)
}

/// Whether an entry has no backend, or its backend still exists.
#[inline(always)]
fn is_backend_current<F: Family>(flow: &Flow<F::Addr>) -> bool {
    flow.backend == NO_BACKEND || is_current_backend(BackendRef { backend: flow.backend, generation: flow.generation })
}

/// Whether the backend exists in this generation.
#[inline(always)]
pub(super) fn is_current_backend(backend_ref: BackendRef) -> bool {
    BACKENDS.get(backend_ref.backend).is_some_and(|backend| backend.generation == backend_ref.generation)
}

/// Marks the connection as reset in the entry of the other direction, after an RST of a flow with NAT: its source port is free again.
/// `ports` are the packet's ports before translation.
#[inline(never)]
pub(super) fn mark_reverse_reset<F: DatapathFamily>(flow: *const Flow<F::Addr>, ports: u32, protocol: u32) -> u32 {
    // SAFETY: the caller's entry, which stays mapped for the program run.
    let flow = unsafe { &*flow };
    let (key, _) = flow::flow_key::<F>(&flow.nat_src, &flow.nat_dst, flow.nat_ports, protocol as u8);
    let Some(reverse) = F::flows().get_ptr_mut(&key) else { return 0 };
    // SAFETY: as in `check_entry`.
    let reverse = unsafe { &mut *reverse };
    let [direction, unused] = &mut reverse.directions;
    // The key may belong to another connection by now.
    if direction.flags & flow_flags::NAT != 0 && reverse.nat_ports == ports.rotate_left(16) {
        unused.flags |= flow_flags::RST;
    }
    0
}
