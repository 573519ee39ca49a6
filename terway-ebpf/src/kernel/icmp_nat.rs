//! NAT of ICMP errors about flows with NAT: the quoted packet has the translated tuple, and must get the tuple that the receiver knows.

use aya_ebpf::bindings::BPF_F_PSEUDO_HDR;
use aya_ebpf::helpers::{bpf_csum_update, bpf_l4_csum_replace, bpf_skb_load_bytes, bpf_skb_store_bytes};
use terway_abi::Flow;

use super::skb::Skb;
use crate::family::Family;
use crate::nat::{add_sums, checksum_delta, update_checksum};
use crate::parse::{TCP, UDP};

/// The location of the packet that an ICMP error quotes.
#[derive(Clone, Copy)]
pub(super) struct QuotedPacket {
    /// Offset of the ICMP header in the frame.
    pub(super) icmp: u32,
    /// Offset of the quoted packet.
    pub(super) packet: u32,
    /// Offset of its transport header.
    pub(super) transport: u32,
    /// Its protocol.
    pub(super) protocol: u8,
}

/// Translates an ICMP error in the direction of `flow`. `false` if the packet is too short.
///
/// With `to_vpc` the error leaves the node through an ENI, and gets the flow's source address, which the VPC accepts from this node. Else
/// only an error of the flow's other end gets that source; an error of a router keeps its own.
///
/// Windows taken before are invalid afterwards.
#[inline(always)]
pub(super) fn rewrite<F: Family>(skb: Skb, flow: &Flow<F::Addr>, quote: QuotedPacket, to_vpc: bool) -> bool {
    try_rewrite::<F>(skb, flow, quote, to_vpc).is_some()
}

#[inline(always)]
fn try_rewrite<F: Family>(skb: Skb, flow: &Flow<F::Addr>, quote: QuotedPacket, to_vpc: bool) -> Option<()> {
    let QuotedPacket { icmp, packet, transport, protocol } = quote;
    let mut window = skb.window();
    let outer = F::l3_header(&window)?;
    let mut other_end = F::UNSPECIFIED;
    load(skb, packet + F::DST_OFFSET, &mut other_end)?;
    let mut src = outer.src;
    if to_vpc || F::same(&outer.src, &other_end) {
        F::assign(&mut src, &flow.nat_src);
    }
    let sum = F::checksum_delta(&outer.src, &src, F::checksum_delta(&outer.dst, &flow.nat_dst, 0));
    F::rewrite_addresses(&mut window, &src, &flow.nat_dst, sum)?;

    // The quoted packet went in the opposite direction.
    store(skb, packet + F::SRC_OFFSET, &flow.nat_dst)?;
    store(skb, packet + F::DST_OFFSET, &flow.nat_src)?;
    store(skb, transport, &flow.nat_ports.rotate_left(16))?;
    let mut body = flow.port_delta;
    if F::VERSION == 4 {
        let mut check = 0_u16;
        load(skb, packet + 10, &mut check)?;
        store(skb, packet + 10, &update_checksum(check, flow.address_delta))?;
        // The changes of the addresses and of this checksum cancel each other in the ICMP checksum.
    } else {
        body = add_sums(body, flow.address_delta);
    }
    let check_at = match protocol {
        TCP => transport + 16,
        UDP => transport + 6,
        _ => 0,
    };
    let mut check = 0_u16;
    // Most errors end before the TCP checksum.
    if check_at != 0 && load(skb, check_at, &mut check).is_some() && !(protocol == UDP && check == 0) {
        let new = update_checksum(update_checksum(check, flow.address_delta), flow.port_delta);
        let new = if protocol == UDP && new == 0 { u16::MAX } else { new };
        store(skb, check_at, &new)?;
        body = checksum_delta(u32::from(check), u32::from(new), body);
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
