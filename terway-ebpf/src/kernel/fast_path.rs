//! The fast path: a packet with common headers and a usable flow entry is forwarded with one lookup. All others take the slow path.

use terway_abi::{Drop, flow_flags};

use super::flow_table::{Lookup, check_entry, entry, is_policy_stale, mark_reverse_reset};
use super::forward::forward_hit;
use super::hook::{TO_VPC, path_counters};
use super::maps::{DatapathFamily, Maps};
use super::nat::PacketLayout;
use super::neighbour::{Checks, NeighbourCheck};
use super::skb::{Skb, Window};
use super::slow_path::{process_headers, process_unparsed};
use super::verdict::Verdict;
use crate::flow;
use crate::parse::tcp_flags;
use crate::policy::Policies;
use crate::route::{self, Tables};
use crate::service::Services;

/// The verdict of an IP packet.
#[inline(always)]
pub fn process<F: DatapathFamily, const PROGRAM: u8>(skb: Skb, window: Window) -> Verdict
where
    Maps: Tables<F> + Services<F> + Policies<F>,
    Checks: NeighbourCheck<F>,
{
    let Some(headers) = F::fast_headers(&window) else { return process_unparsed::<F, PROGRAM>(skb) };
    let (key, is_high_end) = flow::flow_key::<F>(&headers.src, &headers.dst, headers.ports, headers.protocol);
    let mut policy_stale = false;
    let entry = entry::<F>(&key);
    if let Some(entry) = entry
        && let Some(hit) = check_entry::<F, PROGRAM>(skb, &window, entry, is_high_end)
    {
        let layout = PacketLayout { protocol: headers.protocol, transport: F::TRANSPORT_OFFSET, quote: None };
        policy_stale = is_policy_stale::<F, PROGRAM>(&hit);
        if !policy_stale && headers.tcp_flags & flow::TRACKED_TCP_FLAGS == 0 {
            return forward_hit::<F, PROGRAM>(skb, window, hit, layout);
        }
        if !policy_stale && flow::is_same_connection(hit.direction.flags, headers.tcp_flags) {
            hit.direction.flags |= flow::tracked_tcp_flags(headers.tcp_flags);
            if headers.tcp_flags & tcp_flags::RST != 0 && hit.direction.flags & flow_flags::NAT != 0 {
                mark_reverse_reset::<F>(hit.flow, headers.ports, u32::from(headers.protocol));
            }
            return forward_hit::<F, PROGRAM>(skb, window, hit, layout);
        }
    }
    if PROGRAM == TO_VPC {
        return Verdict::pass(const { path_counters::<PROGRAM>() }.stack);
    }
    process_headers::<F, PROGRAM>(skb, &headers, policy_stale, Lookup { entry, is_high_end })
}

/// The verdict of an IP packet that the host stack sends through an ENI. Only replies of the node itself to clients of its Services have
/// flow entries here.
#[inline(always)]
pub fn process_to_vpc<F: DatapathFamily>(skb: Skb) -> Verdict
where
    Maps: Tables<F> + Services<F> + Policies<F>,
    Checks: NeighbourCheck<F>,
{
    let mut window = skb.window();
    let mut header = F::l3_header(&window);
    if header.is_none() {
        window = skb.pull();
        header = F::l3_header(&window);
    }
    let Some(header) = header else { return Verdict::drop(Drop::Truncated) };
    match route::to_vpc::<F, _>(&Maps, &header.src, skb.ifindex()) {
        Ok(()) => process::<F, TO_VPC>(skb, window),
        Err(reason) => Verdict::drop(reason),
    }
}
