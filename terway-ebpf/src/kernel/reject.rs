//! Rejection of packets to Services without backends: the packet is turned into a TCP reset or an ICMP error and sent back.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::{bpf_redirect, bpf_redirect_peer, bpf_skb_change_tail};
use terway_abi::{Drop, MARK_CHECKED, PathCounter};

use super::hook::FROM_VPC;
use super::skb::Skb;
use super::verdict::Verdict;
use crate::parse::{Fragment, Packet, TCP, tcp_flags};
use crate::reject::{Reject, swap_macs};

/// Turns a client's packet into the rejecting reply and sends it back to where it came from. Packets that must not be answered, and
/// packets with options, extension headers or fragments, are dropped ([`Drop::NoBackend`]).
#[inline(never)]
pub(super) fn reject<F: Reject, const PROGRAM: u8>(ctx: *mut __sk_buff, packet: &Packet<F>) -> Verdict {
    try_reject::<F, PROGRAM>(Skb(ctx), packet).unwrap_or(Verdict::drop(Drop::NoBackend))
}

#[inline(always)]
fn try_reject<F: Reject, const PROGRAM: u8>(skb: Skb, packet: &Packet<F>) -> Option<Verdict> {
    if packet.transport != F::TRANSPORT_OFFSET || packet.fragment != Fragment::Whole {
        return None;
    }
    let window = skb.pull();
    if packet.protocol == TCP {
        // RFC 9293: a reset is never answered with a reset.
        if packet.tcp_flags & tcp_flags::RST != 0 {
            return None;
        }
        let fields = F::read_segment(&window)?;
        set_length(skb, F::RESET_LEN)?;
        let mut window = skb.pull();
        F::write_reset(&mut window, &packet.dst, &packet.src, &fields)?;
    } else {
        let quote = F::read_quote(&window)?;
        set_length(skb, F::ERROR_LEN)?;
        let mut window = skb.pull();
        F::write_error(&mut window, &packet.dst, &packet.src, &quote)?;
    }
    let mut window = skb.window();
    swap_macs(&mut window)?;
    if PROGRAM == FROM_VPC {
        skb.set_mark(MARK_CHECKED);
        // SAFETY: the helper has no preconditions.
        let action = unsafe { bpf_redirect(skb.ifindex(), 0) };
        return Some(Verdict::with_action(action as i32, PathCounter::Rejected));
    }
    // Into the pod's end of the veth: a redirect to the host end would run `to_pod`.
    // SAFETY: the helper has no preconditions.
    let action = unsafe { bpf_redirect_peer(skb.ifindex(), 0) };
    Some(Verdict::with_action(action as i32, PathCounter::Rejected))
}

/// Sets the length of the packet. Windows taken before are invalid afterwards.
#[inline(always)]
fn set_length(skb: Skb, length: u32) -> Option<()> {
    // SAFETY: valid context; the windows taken so far are not used any more.
    (unsafe { bpf_skb_change_tail(skb.0, length, 0) } == 0).then_some(())
}
