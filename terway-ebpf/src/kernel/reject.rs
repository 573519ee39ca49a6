//! Answers to what nobody serves, on the spot.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::{bpf_redirect, bpf_redirect_peer, bpf_skb_change_tail};
use terway_abi::{Drop, MARK_CHECKED, PathCounter};

use super::exit::Verdict;
use super::fast_path::FROM_VPC;
use super::skb::Skb;
use crate::parse::{Fragment, Packet, TCP, tcp_flags};
use crate::reject::{Refusal, turn_back};

/// Makes the packet of a client into its answer and sends that back to where it came from. What is not to be answered, or is of a
/// shape that would take too long to answer, is dropped ([`Drop::NoBackend`]).
#[inline(never)]
pub(super) fn refuse<F: Refusal, const PROGRAM: u8>(ctx: *mut __sk_buff, packet: &Packet<F>) -> Verdict {
    answered::<F, PROGRAM>(Skb(ctx), packet).unwrap_or(Verdict::drop(Drop::NoBackend))
}

#[inline(always)]
fn answered<F: Refusal, const PROGRAM: u8>(skb: Skb, packet: &Packet<F>) -> Option<Verdict> {
    if packet.transport != F::TRANSPORT || packet.fragment != Fragment::Whole {
        return None;
    }
    let window = skb.pull();
    if packet.protocol == TCP {
        // RFC 9293: a reset is never answered with one.
        if packet.tcp_flags & tcp_flags::RST != 0 {
            return None;
        }
        let segment = F::segment(&window)?;
        cut(skb, F::RESET)?;
        let mut window = skb.pull();
        F::reset(&mut window, &packet.dst, &packet.src, &segment)?;
    } else {
        let quote = F::quote(&window)?;
        cut(skb, F::ERROR)?;
        let mut window = skb.pull();
        F::error(&mut window, &packet.dst, &packet.src, &quote)?;
    }
    let mut window = skb.window();
    turn_back(&mut window)?;
    if PROGRAM == FROM_VPC {
        skb.set_mark(MARK_CHECKED);
        // SAFETY: the helper has no preconditions.
        let action = unsafe { bpf_redirect(skb.ifindex(), 0) };
        return Some(Verdict::with_action(action as i32, PathCounter::Rejected));
    }
    // Into the pod's end of the veth: out of the host's end the packet would meet `to_pod`.
    // SAFETY: the helper has no preconditions.
    let action = unsafe { bpf_redirect_peer(skb.ifindex(), 0) };
    Some(Verdict::with_action(action as i32, PathCounter::Rejected))
}

/// Gives the packet another length.
#[inline(always)]
fn cut(skb: Skb, length: u32) -> Option<()> {
    // SAFETY: valid context; the windows taken so far are not used any more.
    (unsafe { bpf_skb_change_tail(skb.0, length, 0) } == 0).then_some(())
}
