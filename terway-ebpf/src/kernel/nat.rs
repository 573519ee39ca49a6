//! Translation of packets: what a flow of a Service writes into them.

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::{bpf_csum_update, bpf_l4_csum_replace, bpf_skb_store_bytes};
use terway_abi::Flow;

use super::icmp;
use super::path::Layout;
use super::skb::{Skb, Window};
use crate::family::Family;
use crate::frame::Frame as _;
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
        return icmp::rewrite::<F>(skb, flow, quote, away);
    }
    if F::readdress(&mut window, &flow.src, &flow.dst, flow.sum_addresses).is_none() {
        return false;
    }
    if layout.transport == 0 {
        return true;
    }
    let (check, flags) = match layout.protocol {
        TCP => (layout.transport + 16, 0),
        // A checksum of 0 stands for none (RFC 768).
        UDP => (layout.transport + 6, BPF_F_MARK_MANGLED_0),
        // Its checksum covers no addresses, and the ports of a translated flow are the same.
        SCTP => return flow.sum_ports == 0 || flow.sum_ports == u32::MAX,
        _ => return false,
    };
    // Where it usually is, a plain store does, while the window is still good.
    let usual = layout.transport == F::TRANSPORT;
    if usual && window.write(F::TRANSPORT as usize, flow.ports).is_none() {
        return false;
    }
    let (addresses, ports) = (u64::from(flow.sum_addresses), u64::from(flow.sum_ports));
    // SAFETY: valid context; the helpers check the offsets, and the pointer is to four readable bytes.
    unsafe {
        if bpf_l4_csum_replace(skb.0, check, 0, addresses, u64::from(BPF_F_PSEUDO_HDR | flags)) < 0 {
            return false;
        }
        if F::VERSION == 6 {
            // The helper takes the NIC's sum over the packet to change with the addresses (`inet_proto_csum_replace_by_diff`), as it
            // does where the IP header has a checksum of its own. Here the change of address and of checksum make up for each other.
            bpf_csum_update(skb.0, flow.sum_addresses);
        }
        bpf_l4_csum_replace(skb.0, check, 0, ports, u64::from(flags)) >= 0
            && (usual || bpf_skb_store_bytes(skb.0, layout.transport, (&raw const flow.ports).cast(), 4, 0) >= 0)
    }
}
