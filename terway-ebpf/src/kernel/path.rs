//! The fast path: a packet whose flow is known is sent by it.

use aya_ebpf::bindings::bpf_redir_neigh;
use aya_ebpf::helpers::{bpf_redirect_neigh, bpf_redirect_peer};
use terway_abi::{Action, Drop, FlowKey, HOOK_IN, HOOK_TO_POD, Kind, MARK_CHECKED, Nexthop, Program, Side};

use super::exit::{Verdict, count, now};
use super::first::{Checks, Neighbourly, first, unusual};
use super::maps::{Kernel, Maps};
use super::skb::{Skb, Window};
use crate::decide::{self, Tables};
use crate::flow;
use crate::frame::Frame;
use crate::icmp;

/// What a family needs to go this way.
pub trait Way: Kernel + icmp::Inner {}
impl<F: Kernel + icmp::Inner> Way for F {}

/// Programs as constants, so that each is compiled for what it is.
pub const FROM_POD: u8 = Program::FromPod as u8;
/// See [`FROM_POD`].
pub const TO_POD: u8 = Program::ToPod as u8;
/// See [`FROM_POD`].
pub const FROM_VPC: u8 = Program::FromVpc as u8;

#[inline(always)]
pub(super) const fn hook<const PROGRAM: u8>() -> u8 {
    if PROGRAM == TO_POD { HOOK_TO_POD } else { HOOK_IN }
}

/// The way of every IP packet. A packet of common shape whose flow is known is on its way with one lookup; all others take the
/// slow path.
#[inline(always)]
pub fn forward<F: Way, const PROGRAM: u8>(skb: Skb, window: Window) -> Verdict
where
    Maps: Tables<F>,
    Checks: Neighbourly<F>,
{
    let Some(glance) = F::glance(&window) else { return unusual::<F, PROGRAM>(skb) };
    let (key, from_high) = flow::key::<F>(&glance.src, &glance.dst, glance.ports, glance.protocol);
    if let Some(side) = lookup::<F, PROGRAM>(skb, &window, &key, from_high) {
        if glance.tcp_flags & flow::NOTABLE == 0 {
            return use_side::<F, PROGRAM>(skb, window, side);
        }
        if flow::continues(side.flags, glance.tcp_flags) {
            side.flags |= flow::remembered(glance.tcp_flags);
            return use_side::<F, PROGRAM>(skb, window, side);
        }
    }
    first::<F, PROGRAM>(skb, &glance)
}

/// The sender's side of the entry of this key, if the entry still holds, and the packet is met where it was made for and comes
/// from whom it was made for.
#[inline(always)]
pub(super) fn lookup<F: Way, const PROGRAM: u8>(
    skb: Skb,
    window: &Window,
    key: &FlowKey<F::Addr>,
    from_high: u32,
) -> Option<&'static mut Side>
where
    Maps: Tables<F>,
{
    let entry = F::flows().get_ptr_mut(key)?;
    // SAFETY: the value stays mapped for the program's run. Other CPUs may count in it at the same time, which `Flow` allows for; an
    // entry that is evicted and reused meanwhile is a race that every preallocated map has.
    let entry = unsafe { &mut *entry };
    let holds = decide::holds::<F, _>(&Maps, entry.slots, entry.epochs);
    let side = flow::side(entry, from_high);
    if side.ifindex != skb.ifindex() || side.hook != u32::from(hook::<PROGRAM>()) {
        return None;
    }
    if PROGRAM == FROM_POD && window.macs()? != side.expect {
        return None;
    }
    if !holds {
        count(Kind::FlowStale as u32, skb.len());
        return None;
    }
    Some(side)
}

#[inline(always)]
pub(super) fn use_side<F: Way, const PROGRAM: u8>(skb: Skb, window: Window, side: &'static mut Side) -> Verdict {
    side.packets += 1;
    side.bytes += u64::from(skb.len());
    // In the same cache line as the counters, so writing it each time costs nothing.
    side.last_seen = now();
    send::<F, PROGRAM>(skb, window, side)
}

/// Does with a packet what its side of the flow says.
#[inline(always)]
pub(super) fn send<F: Way, const PROGRAM: u8>(skb: Skb, mut window: Window, side: &Side) -> Verdict {
    let kinds = const { kinds::<PROGRAM>() };
    if PROGRAM == TO_POD || side.action == Action::Stack as u32 {
        return Verdict::next(kinds.stack);
    }
    if F::hop(&mut window).is_none() {
        // The stack finds the same and answers with an ICMP error; the source has been checked.
        return Verdict::next(Kind::TtlExpired);
    }
    if PROGRAM == FROM_VPC && F::VERSION == 6 {
        skb.hop_limit_fell();
    }
    if PROGRAM == FROM_POD && side.action == Action::Vpc as u32 {
        skb.set_mark(MARK_CHECKED);
        let nexthop: *const Nexthop = &side.way;
        // SAFETY: `Nexthop` has the layout of `bpf_redir_neigh` (asserted below), and the helper only reads it.
        let action = unsafe { bpf_redirect_neigh(side.oif, nexthop.cast_mut().cast(), size_of::<Nexthop>() as i32, 0) };
        return Verdict::with_action(action as i32, kinds.vpc);
    }
    // The pod's kernel does not look at the addresses any more, but a bridge or a packet capture in the pod does.
    if window.write(0, flow::written(side)).is_none() {
        return Verdict::drop(Drop::Truncated);
    }
    // SAFETY: the helper has no preconditions; an interface that is gone makes it a drop.
    let action = unsafe { bpf_redirect_peer(side.oif, 0) };
    Verdict::with_action(action as i32, kinds.local)
}

const _: () = assert!(size_of::<Nexthop>() == size_of::<bpf_redir_neigh>());

pub(super) struct Kinds {
    pub(super) stack: Kind,
    pub(super) local: Kind,
    pub(super) vpc: Kind,
}

pub(super) const fn kinds<const PROGRAM: u8>() -> Kinds {
    match PROGRAM {
        FROM_POD => Kinds { stack: Kind::PodToHost, local: Kind::PodToPod, vpc: Kind::PodToVpc },
        TO_POD => Kinds { stack: Kind::HostToPod, local: Kind::HostToPod, vpc: Kind::HostToPod },
        _ => Kinds { stack: Kind::VpcToHost, local: Kind::VpcToPod, vpc: Kind::VpcToPod },
    }
}
