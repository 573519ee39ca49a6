//! ARP and neighbour discovery from pods: checked against spoofing, then passed to the host stack.

use aya_ebpf::bindings::__sk_buff;
use terway_abi::{Drop, Endpoint, PathCounter};

use super::maps::sending_endpoint;
use super::skb::{Skb, Window};
use super::verdict::Verdict;
use crate::family::{Family, V4, V6};
use crate::frame::Frame as _;
use crate::neighbour;
use crate::parse::{Packet, ethertype};

/// The check of ICMPv6 neighbour messages, by family: IPv4 has none.
pub trait NeighbourCheck<F: Family> {
    /// See [`neighbour::check_neighbour`].
    ///
    /// # Errors
    /// The drop reason.
    fn check_neighbour(window: &Window, packet: &Packet<F>, pod: &Endpoint) -> Result<(), Drop>;
}

/// The implementation of [`NeighbourCheck`] for both families.
pub struct Checks;

impl NeighbourCheck<V4> for Checks {
    #[inline(always)]
    fn check_neighbour(_: &Window, _: &Packet<V4>, _: &Endpoint) -> Result<(), Drop> {
        Ok(())
    }
}

impl NeighbourCheck<V6> for Checks {
    #[inline(always)]
    fn check_neighbour(window: &Window, packet: &Packet<V6>, pod: &Endpoint) -> Result<(), Drop> {
        neighbour::check_neighbour(window, packet, pod)
    }
}

/// The verdict of a frame from a pod that is not IP: ARP is checked and passed, everything else is dropped.
#[inline(never)]
pub fn non_ip_from_pod(ctx: *mut __sk_buff) -> Verdict {
    let skb = Skb(ctx);
    let window = skb.pull();
    let checked = match window.ethertype() {
        Some(ethertype::ARP) => sending_endpoint::<V4>(skb)
            .and_then(|pod| neighbour::check_arp(&window, pod))
            .map(|()| Verdict::pass(PathCounter::Neighbour)),
        Some(_) => Err(Drop::UnknownEthertype),
        None => Err(Drop::Truncated),
    };
    checked.into()
}
