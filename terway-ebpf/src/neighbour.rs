//! Spoofing checks of ARP and neighbour discovery from pods: messages may name the pod's own addresses only.
//!
//! The host end of the veth answers for the pod's gateway, so these messages go to the host stack only.

use terway_abi::{Drop, Endpoint};

use crate::family::{Family as _, V6, is_link_local};
use crate::frame::{ETH_LEN, Frame, Plain};
use crate::parse::Packet;

/// An ARP message for IPv4 over Ethernet (RFC 826), in halves because its addresses are not aligned.
#[repr(C)]
#[derive(Clone, Copy)]
struct Arp {
    hardware: u16,
    protocol: u16,
    lengths: u16,
    operation: u16,
    sender_mac: [u16; 3],
    sender: [u16; 2],
}

// SAFETY: integers of two bytes only, so there is no padding.
unsafe impl Plain for Arp {}

/// An Ethernet address behind the two bytes that say what it is for (RFC 4861 section 4.6.1), in halves.
#[repr(C)]
#[derive(Clone, Copy)]
struct LinkOption {
    kind: u8,
    units: u8,
    mac: [u16; 3],
}

// SAFETY: two bytes and three halves: no padding.
unsafe impl Plain for LinkOption {}

#[inline(always)]
fn halves(mac: [u8; 6]) -> [u16; 3] {
    let [a, b, c, d, e, f] = mac;
    [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]), u16::from_ne_bytes([e, f])]
}

/// Whether an ARP message of this pod names the pod's own addresses as its sender's.
///
/// # Errors
/// [`Drop::SpoofedArp`] if not.
#[inline(always)]
pub fn check_arp<P: Frame>(frame: &P, pod: &Endpoint) -> Result<(), Drop> {
    let arp = frame.read::<Arp>(ETH_LEN).ok_or(Drop::Truncated)?;
    let [a, b] = arp.sender.map(u16::to_ne_bytes);
    let ethernet =
        arp.hardware == 1_u16.to_be() && arp.protocol == 0x0800_u16.to_be() && arp.lengths == 0x0604_u16.to_be();
    let own = arp.sender_mac == halves(pod.from_pod_macs.source())
        && pod.v4 != 0
        && u32::from_ne_bytes([a[0], a[1], b[0], b[1]]) == pod.v4;
    if ethernet && own { Ok(()) } else { Err(Drop::SpoofedArp) }
}

const ROUTER_SOLICITATION: u8 = 133;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// Options that carry a link-layer address: the source's and the target's.
const SOURCE_LINK: u8 = 1;
const TARGET_LINK: u8 = 2;
/// Options that are looked at. Linux sends at most a link-layer address and a nonce (RFC 7527).
const OPTIONS: usize = 4;

/// Whether a neighbour discovery message of this pod (RFC 4861 section 4) speaks of the pod's own addresses only.
///
/// Solicitations may come from the unspecified address: that is how an address is checked for being free (RFC 4862 section 5.4).
///
/// # Errors
/// [`Drop::SpoofedNeighbour`] if not; router advertisements and redirects, which no pod has business sending, count as that too.
#[inline(always)]
pub fn check_neighbour<P: Frame>(frame: &P, packet: &Packet<V6>, pod: &Endpoint) -> Result<(), Drop> {
    let at = frame.hide_from_verifier(packet.transport as usize);
    let own = |address: &[u32; 4]| {
        is_link_local(address) || (!V6::same(&pod.v6, &V6::UNSPECIFIED) && V6::same(address, &pod.v6))
    };
    let options = match frame.read_dynamic::<u8>(at).ok_or(Drop::Truncated)? {
        ROUTER_SOLICITATION if own(&packet.src) || V6::same(&packet.src, &V6::UNSPECIFIED) => at + 8,
        NEIGHBOUR_SOLICITATION if own(&packet.src) || V6::same(&packet.src, &V6::UNSPECIFIED) => at + 24,
        NEIGHBOUR_ADVERTISEMENT if own(&packet.src) && own(&target(frame, at)?) => at + 24,
        _ => return Err(Drop::SpoofedNeighbour),
    };
    let mut at = options;
    for _ in 0..OPTIONS {
        at = frame.hide_from_verifier(at);
        let Some(option) = frame.read_dynamic::<LinkOption>(at) else { break };
        let link = option.kind == SOURCE_LINK || option.kind == TARGET_LINK;
        if option.units == 0 || (link && option.mac != halves(pod.from_pod_macs.source())) {
            return Err(Drop::SpoofedNeighbour);
        }
        at += usize::from(option.units) * 8;
    }
    Ok(())
}

#[inline(always)]
fn target<P: Frame>(frame: &P, at: usize) -> Result<[u32; 4], Drop> {
    let word = |i: usize| frame.read_dynamic::<u32>(at + 8 + 4 * i).ok_or(Drop::Truncated);
    Ok([word(0)?, word(1)?, word(2)?, word(3)?])
}
