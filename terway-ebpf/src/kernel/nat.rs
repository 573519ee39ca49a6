//! NAT of packets: addresses, ports and checksums as the flow entry says.

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::{bpf_csum_update, bpf_l4_csum_replace, bpf_skb_store_bytes};
use terway_abi::Flow;

use super::icmp_nat::{self, QuotedPacket};
use super::skb::{Skb, Window};
use crate::family::Family;
use crate::frame::Frame as _;
use crate::nat;
use crate::parse::{Fragment, Packet, SCTP, TCP, UDP};

/// The location of the transport header in a packet.
#[derive(Clone, Copy)]
pub(super) struct PacketLayout {
    /// IP protocol number.
    pub(super) protocol: u8,
    /// Offset of the transport header; 0 if there is none (later fragments).
    pub(super) transport: u32,
    /// The quoted packet, if this is an ICMP error related to the flow.
    pub(super) quote: Option<QuotedPacket>,
}

impl PacketLayout {
    /// The layout of a parsed packet.
    #[inline(always)]
    pub(super) fn of<F: Family>(packet: &Packet<F>) -> Self {
        let transport = if packet.fragment == Fragment::Later { 0 } else { packet.transport };
        Self { protocol: packet.protocol, transport, quote: None }
    }
}

/// Translates a packet as its flow entry says; `false` if its protocol or shape cannot be translated. `to_vpc`: the packet leaves the node
/// through an ENI.
///
/// Windows taken before are invalid afterwards.
#[inline(always)]
pub(super) fn rewrite<F: Family>(
    skb: Skb,
    mut window: Window,
    flow: *const Flow<F::Addr>,
    layout: PacketLayout,
    to_vpc: bool,
) -> bool {
    // SAFETY: the caller's entry, which stays mapped for the program's run.
    let flow = unsafe { &*flow };
    if let Some(quote) = layout.quote {
        return icmp_nat::rewrite::<F>(skb, flow, quote, to_vpc);
    }
    if F::rewrite_addresses(&mut window, &flow.nat_src, &flow.nat_dst, flow.address_delta).is_none() {
        return false;
    }
    if layout.transport == 0 {
        return true;
    }
    match layout.protocol {
        TCP => transport::<F, TCP_CHECK>(skb, window, flow, layout.transport, 0),
        // A checksum of 0 means that there is none (RFC 768).
        UDP => transport::<F, UDP_CHECK>(skb, window, flow, layout.transport, BPF_F_MARK_MANGLED_0),
        // The SCTP checksum does not cover addresses; ports cannot be translated.
        SCTP => flow.port_delta == 0 || flow.port_delta == u32::MAX,
        _ => false,
    }
}

/// Offset of the checksum in the transport header.
const TCP_CHECK: u32 = 16;
const UDP_CHECK: u32 = 6;

/// Translates ports and checksum; the addresses are translated already. At the common offset plain stores replace helper calls, which take
/// 30 ns each.
#[inline(always)]
fn transport<F: Family, const CHECK: u32>(
    skb: Skb,
    mut window: Window,
    flow: &Flow<F::Addr>,
    at: u32,
    flags: u32,
) -> bool {
    if at != F::TRANSPORT_OFFSET {
        return update_csum_for_addresses::<F>(skb, flow, at + CHECK, flags)
            && update_csum(skb, flow.port_delta, at + CHECK, flags)
            // SAFETY: valid context; the helper checks the offset, and the pointer is to four readable bytes.
            && unsafe { bpf_skb_store_bytes(skb.0, at, (&raw const flow.nat_ports).cast(), 4, 0) } >= 0;
    }
    let check = F::TRANSPORT_OFFSET + CHECK;
    let Some(before) = window.read::<u16>(check as usize) else { return false };
    if window.write(F::TRANSPORT_OFFSET as usize, flow.nat_ports).is_none() {
        return false;
    }
    if CHECK == UDP_CHECK && before == 0 {
        return true;
    }
    // Without BPF_F_PSEUDO_HDR the helper updates a full checksum, and leaves a partial one (`CHECKSUM_PARTIAL`) alone.
    let delta = nat::add_sums(flow.address_delta, flow.port_delta);
    if !update_csum(skb, delta, check, flags) {
        return false;
    }
    // The helper has invalidated the window.
    let mut window = skb.window();
    let Some(after) = window.read::<u16>(check as usize) else { return false };
    if after != before {
        if F::VERSION == 4 {
            // `CHECKSUM_COMPLETE`, the NIC's sum over the packet: the IPv4 header sums up to zero, and the changes of ports and checksum
            // cancel each other, so the change of the addresses remains. With IPv6 addresses and checksum cancel each other.
            // SAFETY: valid context.
            unsafe { bpf_csum_update(skb.0, !flow.address_delta) };
        }
        return true;
    }
    if nat::is_zero_sum(delta) {
        return update_csum_for_addresses::<F>(skb, flow, check, flags)
            && update_csum(skb, flow.port_delta, check, flags);
    }
    // `CHECKSUM_PARTIAL`: the field holds the sum of the pseudo header, which does not contain the ports.
    window.write(check as usize, nat::update_sum(before, flow.address_delta)).is_some()
}

/// Updates the checksum at `check`, and the NIC's sum over the packet, for the change of the addresses.
#[inline(always)]
fn update_csum_for_addresses<F: Family>(skb: Skb, flow: &Flow<F::Addr>, check: u32, flags: u32) -> bool {
    let delta = u64::from(flow.address_delta);
    // SAFETY: valid context; the helper checks the offset.
    if unsafe { bpf_l4_csum_replace(skb.0, check, 0, delta, u64::from(BPF_F_PSEUDO_HDR | flags)) } < 0 {
        return false;
    }
    if F::VERSION == 6 {
        // The helper changes the NIC's sum by the addresses (`inet_proto_csum_replace_by_diff`), which is right with an IP header
        // checksum only. IPv6 has none: the changes of addresses and of the transport checksum cancel each other.
        // SAFETY: valid context.
        unsafe { bpf_csum_update(skb.0, flow.address_delta) };
    }
    true
}

/// Has the kernel bring into a checksum that what it is about has delta by this sum.
#[inline(always)]
fn update_csum(skb: Skb, delta: u32, check: u32, flags: u32) -> bool {
    // SAFETY: valid context; the helper checks the offset.
    unsafe { bpf_l4_csum_replace(skb.0, check, 0, u64::from(delta), u64::from(flags)) >= 0 }
}
