//! ICMP errors of translated flows: what they quote is the packet as it was on the other side of the translation, and whoever gets
//! the error must recognise it as his own.

use aya_ebpf::bindings::BPF_F_PSEUDO_HDR;
use aya_ebpf::helpers::{bpf_csum_update, bpf_l4_csum_replace, bpf_skb_load_bytes, bpf_skb_store_bytes};
use terway_abi::Flow;

use super::skb::Skb;
use crate::family::Family;
use crate::nat::{adjust, difference};
use crate::parse::{TCP, UDP};

/// Where an ICMP error quotes the packet that it speaks of.
#[derive(Clone, Copy)]
pub(super) struct Quote {
    /// Offset of the ICMP header in the frame.
    pub(super) icmp: u32,
    /// Offset of the quoted packet.
    pub(super) packet: u32,
    /// Offset of its transport header.
    pub(super) transport: u32,
    /// Its protocol.
    pub(super) protocol: u8,
}

/// Rewrites an ICMP error that goes the way of `flow`. With `away` it leaves the node as the flow's own packets do, from an address
/// that the VPC takes from this node; else only an error of the flow's far end gets another source, and a router keeps its name.
///
/// What was known of the packet's bytes is void afterwards.
#[inline(always)]
pub(super) fn rewrite<F: Family>(skb: Skb, flow: &Flow<F::Addr>, quote: Quote, away: bool) -> bool {
    rewritten::<F>(skb, flow, quote, away).is_some()
}

#[inline(always)]
fn rewritten<F: Family>(skb: Skb, flow: &Flow<F::Addr>, quote: Quote, away: bool) -> Option<()> {
    let Quote { icmp, packet, transport, protocol } = quote;
    let mut window = skb.window();
    let outer = F::outline(&window)?;
    let mut far = F::NONE;
    load(skb, packet + F::DST, &mut far)?;
    let mut src = outer.src;
    if away || F::same(&outer.src, &far) {
        F::assign(&mut src, &flow.nat_src);
    }
    let sum = F::difference(&outer.src, &src, F::difference(&outer.dst, &flow.nat_dst, 0));
    F::readdress(&mut window, &src, &flow.nat_dst, sum)?;

    // The quoted packet went the other way.
    store(skb, packet + F::SRC, &flow.nat_dst)?;
    store(skb, packet + F::DST, &flow.nat_src)?;
    store(skb, transport, &flow.nat_ports.rotate_left(16))?;
    let mut body = flow.port_delta;
    if F::VERSION == 4 {
        let mut check = 0_u16;
        load(skb, packet + 10, &mut check)?;
        store(skb, packet + 10, &adjust(check, flow.address_delta))?;
        // What the addresses add to the ICMP checksum, this checksum takes off again.
    } else {
        body = plus(body, flow.address_delta);
    }
    let check_at = match protocol {
        TCP => transport + 16,
        UDP => transport + 6,
        _ => 0,
    };
    let mut check = 0_u16;
    // Most errors end before TCP's.
    if check_at != 0 && load(skb, check_at, &mut check).is_some() && !(protocol == UDP && check == 0) {
        let new = adjust(adjust(check, flow.address_delta), flow.port_delta);
        let new = if protocol == UDP && new == 0 { u16::MAX } else { new };
        store(skb, check_at, &new)?;
        body = difference(u32::from(check), u32::from(new), body);
    }
    let check = icmp + 2;
    // SAFETY: valid context; the helpers check the offsets.
    unsafe {
        if F::VERSION == 6 {
            if bpf_l4_csum_replace(skb.0, check, 0, u64::from(sum), u64::from(BPF_F_PSEUDO_HDR)) < 0 {
                return None;
            }
            // As for the flow's own packets: see `nat::rewrite`.
            bpf_csum_update(skb.0, sum);
        }
        (bpf_l4_csum_replace(skb.0, check, 0, u64::from(body), 0) >= 0).then_some(())
    }
}

/// The sum of two ones' complement sums.
#[inline(always)]
fn plus(a: u32, b: u32) -> u32 {
    difference(u32::MAX, b, a)
}

#[inline(always)]
fn load<T: Copy>(skb: Skb, at: u32, to: &mut T) -> Option<()> {
    // SAFETY: valid context; the pointer is to as many writable bytes; the helper checks the offset.
    let failed = unsafe { bpf_skb_load_bytes(skb.0.cast(), at, core::ptr::from_mut(to).cast(), size_of::<T>() as u32) };
    (failed == 0).then_some(())
}

#[inline(always)]
fn store<T: Copy>(skb: Skb, at: u32, value: &T) -> Option<()> {
    // SAFETY: valid context; the pointer is to as many readable bytes; the helper checks the offset.
    let failed = unsafe { bpf_skb_store_bytes(skb.0, at, core::ptr::from_ref(value).cast(), size_of::<T>() as u32, 0) };
    (failed == 0).then_some(())
}
