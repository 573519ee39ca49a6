//! Forwarding of a packet by its flow entry: TTL, MAC addresses, NAT, redirect.

use aya_ebpf::bindings::bpf_redir_neigh;
use aya_ebpf::helpers::{bpf_redirect_neigh, bpf_redirect_peer};
use terway_abi::{Action, Drop, Flow, FlowDirection, MARK_CHECKED, Nexthop, PathCounter, flow_flags};

use super::counters::jiffies;
use super::flow_table::FlowHit;
use super::hook::{FROM_VPC, TO_POD, TO_VPC, path_counters};
use super::maps::DatapathFamily;
use super::nat::{self, PacketLayout};
use super::skb::{Skb, Window};
use super::verdict::Verdict;
use crate::flow;
use crate::frame::Frame;

/// Counts a packet in its flow entry, and forwards it.
#[inline(always)]
pub(super) fn forward_hit<F: DatapathFamily, const PROGRAM: u8>(
    skb: Skb,
    window: Window,
    hit: FlowHit<F>,
    layout: PacketLayout,
) -> Verdict {
    let FlowHit { direction, flow, .. } = hit;
    direction.packets += 1;
    direction.bytes += u64::from(skb.len());
    // In the same cache line as the counters.
    direction.last_seen = jiffies();
    emit::<F, PROGRAM>(skb, window, direction, flow, layout)
}

/// Forwards a packet as its direction of the flow says. `flow` is the entry of `direction`; it is read for NAT only.
#[inline(always)]
pub(super) fn emit<F: DatapathFamily, const PROGRAM: u8>(
    skb: Skb,
    mut window: Window,
    direction: &FlowDirection,
    flow: *const Flow<F::Addr>,
    layout: PacketLayout,
) -> Verdict {
    let counters = const { path_counters::<PROGRAM>() };
    let has_nat = direction.flags & flow_flags::NAT != 0;
    if PROGRAM == TO_POD || PROGRAM == TO_VPC || direction.action == Action::Stack as u32 {
        if has_nat && !nat::rewrite::<F>(skb, window, flow, layout, PROGRAM == TO_VPC) {
            return Verdict::drop(Drop::NotTranslatable);
        }
        return Verdict::pass(counters.stack);
    }
    if F::decrement_ttl(&mut window).is_none() {
        // The destination is an address of the node: the host stack would deliver the packet locally.
        if PROGRAM == FROM_VPC && has_nat {
            return Verdict::drop(Drop::HopLimit);
        }
        // The host stack finds the expired TTL too, and sends the ICMP error. The source has been checked.
        return Verdict::pass(PathCounter::TtlExpired);
    }
    if PROGRAM == FROM_VPC && F::VERSION == 6 {
        skb.update_csum_for_hop_limit();
    }
    let (action, oif) = (direction.action, direction.oif);
    // `bpf_redirect_peer` skips the receive path that checks MAC addresses, but a bridge or a capture in the pod needs them.
    if action == Action::Local as u32 && window.write(0, flow::to_pod_macs_of(direction)).is_none() {
        return Verdict::drop(Drop::Truncated);
    }
    if has_nat && !nat::rewrite::<F>(skb, window, flow, layout, action == Action::Vpc as u32) {
        return Verdict::drop(Drop::NotTranslatable);
    }
    if action == Action::Vpc as u32 {
        skb.set_mark(MARK_CHECKED);
        let nexthop: *const Nexthop = &direction.nexthop;
        // SAFETY: `Nexthop` has the layout of `bpf_redir_neigh` (asserted below), and the helper only reads it.
        let action = unsafe { bpf_redirect_neigh(oif, nexthop.cast_mut().cast(), size_of::<Nexthop>() as i32, 0) };
        return Verdict::with_action(action as i32, counters.vpc);
    }
    // SAFETY: the helper has no preconditions; if the interface does not exist, the packet is dropped.
    let action = unsafe { bpf_redirect_peer(oif, 0) };
    Verdict::with_action(action as i32, counters.local)
}

const _: () = assert!(size_of::<Nexthop>() == size_of::<bpf_redir_neigh>());
