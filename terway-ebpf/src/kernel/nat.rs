//! Translation of packets: what a flow of a Service writes into them.

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::{bpf_csum_update, bpf_l4_csum_replace, bpf_skb_store_bytes};
use terway_abi::Flow;

use super::icmp_nat;
use super::fast_path::Layout;
use super::skb::{Skb, Window};
use crate::family::Family;
use crate::frame::Frame as _;
use crate::nat;
use crate::parse::{SCTP, TCP, UDP};

/// Writes the flow's addresses and ports into a packet; `false` if it is of a shape that cannot be.
///
/// With `away` the packet leaves the node by an ENI. What was known of its bytes is void afterwards.
#[inline(always)]
pub(super) fn rewrite<F: Family>(
    skb: Skb,
    mut window: Window,
    flow: *const Flow<F::Addr>,
    layout: Layout,
    away: bool,
) -> bool {
    // SAFETY: the caller's entry, which stays mapped for the program's run.
    let flow = unsafe { &*flow };
    if let Some(quote) = layout.quote {
        return icmp_nat::rewrite::<F>(skb, flow, quote, away);
    }
    if F::readdress(&mut window, &flow.nat_src, &flow.nat_dst, flow.address_delta).is_none() {
        return false;
    }
    if layout.transport == 0 {
        return true;
    }
    match layout.protocol {
        TCP => transport::<F, TCP_CHECK>(skb, window, flow, layout.transport, 0),
        // A checksum of 0 stands for none (RFC 768).
        UDP => transport::<F, UDP_CHECK>(skb, window, flow, layout.transport, BPF_F_MARK_MANGLED_0),
        // Its checksum covers no addresses, and the ports of a translated flow are the same.
        SCTP => flow.port_delta == 0 || flow.port_delta == u32::MAX,
        _ => false,
    }
}

/// Where the checksum stands in a transport header.
const TCP_CHECK: u32 = 16;
const UDP_CHECK: u32 = 6;

/// Writes ports and checksum; the addresses are written. Where they usually stand plain stores do what they can: a helper takes 30 ns.
#[inline(always)]
fn transport<F: Family, const CHECK: u32>(
    skb: Skb,
    mut window: Window,
    flow: &Flow<F::Addr>,
    at: u32,
    flags: u32,
) -> bool {
    if at != F::TRANSPORT {
        return tell_addresses::<F>(skb, flow, at + CHECK, flags)
            && tell(skb, flow.port_delta, at + CHECK, flags)
            // SAFETY: valid context; the helper checks the offset, and the pointer is to four readable bytes.
            && unsafe { bpf_skb_store_bytes(skb.0, at, (&raw const flow.nat_ports).cast(), 4, 0) } >= 0;
    }
    let check = F::TRANSPORT + CHECK;
    let Some(before) = window.read::<u16>(check as usize) else { return false };
    if window.write(F::TRANSPORT as usize, flow.nat_ports).is_none() {
        return false;
    }
    if CHECK == UDP_CHECK && before == 0 {
        return true;
    }
    // Told like this of addresses and ports at once, the kernel alters a whole checksum, and leaves alone what the NIC is to complete.
    let grown = nat::total(flow.address_delta, flow.port_delta);
    if !tell(skb, grown, check, flags) {
        return false;
    }
    // The helper has made the old one void.
    let mut window = skb.window();
    let Some(after) = window.read::<u16>(check as usize) else { return false };
    if after != before {
        if F::VERSION == 4 {
            // The NIC's sum over the packet (`CHECKSUM_COMPLETE`): the IP header adds up to nothing, and the change of ports to that of the
            // checksum. The addresses are left over, which in an IPv6 header make up for each other with the checksum.
            // SAFETY: valid context.
            unsafe { bpf_csum_update(skb.0, !flow.address_delta) };
        }
        return true;
    }
    if nat::is_nothing(grown) {
        return tell_addresses::<F>(skb, flow, check, flags) && tell(skb, flow.port_delta, check, flags);
    }
    // `CHECKSUM_PARTIAL`: the sum of the pseudo header, in which the ports are not.
    window.write(check as usize, nat::grow(before, flow.address_delta)).is_some()
}

/// Has the kernel bring addresses into a checksum, and into what the NIC has summed up.
#[inline(always)]
fn tell_addresses<F: Family>(skb: Skb, flow: &Flow<F::Addr>, check: u32, flags: u32) -> bool {
    let grown = u64::from(flow.address_delta);
    // SAFETY: valid context; the helper checks the offset.
    if unsafe { bpf_l4_csum_replace(skb.0, check, 0, grown, u64::from(BPF_F_PSEUDO_HDR | flags)) } < 0 {
        return false;
    }
    if F::VERSION == 6 {
        // The helper takes the NIC's sum over the packet to change with the addresses (`inet_proto_csum_replace_by_diff`), as it
        // does where the IP header has a checksum of its own. Here the change of address and of checksum make up for each other.
        // SAFETY: valid context.
        unsafe { bpf_csum_update(skb.0, flow.address_delta) };
    }
    true
}

/// Has the kernel bring into a checksum that what it is about has grown by this sum.
#[inline(always)]
fn tell(skb: Skb, grown: u32, check: u32, flags: u32) -> bool {
    // SAFETY: valid context; the helper checks the offset.
    unsafe { bpf_l4_csum_replace(skb.0, check, 0, u64::from(grown), u64::from(flags)) >= 0 }
}
