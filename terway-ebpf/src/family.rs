//! The address families: what differs between IPv4 and IPv6.

use terway_abi::{Drop, Endpoint, Nexthop, remote_slot_v4, remote_slot_v6};

use crate::csum;
use crate::flow::{self, copy_words};
use crate::frame::{ETH_LEN, Frame};
use crate::nat;
use crate::parse::{self, Packet};

/// An address family.
pub trait Family: Sized + 'static {
    /// An address in network byte order.
    type Addr: Copy + 'static;
    /// The IP version: 4 or 6.
    const VERSION: u8;
    /// The unspecified address; in an [`Endpoint`] it means that there is none.
    const UNSPECIFIED: Self::Addr;
    /// The protocol number of ICMP in this family.
    const ICMP: u8;
    /// Offset of the transport header behind a plain IP header.
    const TRANSPORT_OFFSET: u32;
    /// Offset of the source address in the IP header.
    const SRC_OFFSET: u32;
    /// Offset of the destination address in the IP header.
    const DST_OFFSET: u32;

    /// The headers of a common packet: TCP or UDP without options, extension headers or fragmentation. `None` if the packet needs
    /// [`Family::parse`].
    fn fast_headers<P: Frame>(frame: &P) -> Option<FastHeaders<Self>>;

    /// The L3 header: addresses and protocol, and ports if they follow a plain header. For drop events and source checks.
    fn l3_header<P: Frame>(frame: &P) -> Option<FastHeaders<Self>>;

    /// Parses any packet.
    ///
    /// # Errors
    /// The drop reason.
    fn parse<P: Frame>(frame: &P, packet: &mut Packet<Self>) -> Result<(), Drop>;

    /// Whether two addresses are equal.
    ///
    /// Not `==`: LLVM 22 turns a comparison of four words into a 16-byte one, aligns the variable to 16 bytes, and then crashes on a copy
    /// with that alignment (`BPFInstrInfo::expandMEMCPY`).
    fn same(a: &Self::Addr, b: &Self::Addr) -> bool;

    /// Writes an address, word by word; see [`copy_words`].
    fn assign(to: &mut Self::Addr, from: &Self::Addr);

    /// The borrow of `a - b - borrow`, of addresses as numbers in the order of [`terway_abi::FlowKey`]: 0 or 1.
    fn borrow(a: &Self::Addr, b: &Self::Addr, borrow: u32) -> u32;

    /// The two addresses, swapped if `mask` has all bits, unchanged if it is 0.
    fn swap_if(a: &Self::Addr, b: &Self::Addr, mask: u32) -> (Self::Addr, Self::Addr);

    /// The change of a ones' complement sum by a change of address; see [`nat::checksum_delta`].
    fn checksum_delta(old: &Self::Addr, new: &Self::Addr, sum: u32) -> u32;

    /// Writes both addresses into the IP header, and updates its checksum by `sum`.
    fn rewrite_addresses<P: Frame>(frame: &mut P, src: &Self::Addr, dst: &Self::Addr, sum: u32) -> Option<()>;

    /// The address from four words, as events hold it.
    fn from_words(address: &[u32; 4]) -> Self::Addr;

    /// Decrements the TTL or hop limit; `None` if it expires.
    fn decrement_ttl<P: Frame>(frame: &mut P) -> Option<()>;

    /// The endpoint's address of this family, [`Family::UNSPECIFIED`] if it has none.
    fn address(endpoint: &Endpoint) -> Self::Addr;

    /// Whether the endpoint's ENI has a gateway of this family.
    fn has_gateway(endpoint: &Endpoint) -> bool;

    /// Writes the gateway of the endpoint's ENI into a next hop.
    fn gateway(endpoint: &Endpoint, nexthop: &mut Nexthop);

    /// The epoch slot of a remote address.
    fn remote_slot(address: &Self::Addr) -> u32;

    /// The drop reason for addresses that are never routed from a pod.
    fn unroutable(src: &Self::Addr, dst: &Self::Addr) -> Option<Drop>;

    /// The address as four words, as events hold it.
    fn to_words(address: &Self::Addr) -> [u32; 4];
}

/// The headers that the fast path needs.
#[derive(Clone, Copy)]
pub struct FastHeaders<F: Family> {
    /// Source address.
    pub src: F::Addr,
    /// Destination address.
    pub dst: F::Addr,
    /// Ports as in the packet.
    pub ports: u32,
    /// Protocol number.
    pub protocol: u8,
    /// TCP's flags; 0 for UDP.
    pub tcp_flags: u8,
}

/// `AF_INET` (include/linux/socket.h).
const AF_INET: u32 = 2;
/// `AF_INET6`.
const AF_INET6: u32 = 10;

/// IPv4.
pub struct V4;

impl Family for V4 {
    type Addr = u32;
    const VERSION: u8 = 4;
    const UNSPECIFIED: u32 = 0;
    const ICMP: u8 = parse::ICMP;
    const TRANSPORT_OFFSET: u32 = ETH_LEN as u32 + 20;
    const SRC_OFFSET: u32 = 12;
    const DST_OFFSET: u32 = 16;

    #[inline(always)]
    fn fast_headers<P: Frame>(frame: &P) -> Option<FastHeaders<Self>> {
        parse::fast_headers_v4(frame)
    }

    #[inline(always)]
    fn l3_header<P: Frame>(frame: &P) -> Option<FastHeaders<Self>> {
        parse::l3_header_v4(frame)
    }

    #[inline(always)]
    fn parse<P: Frame>(frame: &P, packet: &mut Packet<Self>) -> Result<(), Drop> {
        parse::parse_v4(frame, packet)
    }

    #[inline(always)]
    fn same(a: &u32, b: &u32) -> bool {
        a == b
    }

    #[inline(always)]
    fn assign(to: &mut u32, from: &u32) {
        *to = *from;
    }

    #[inline(always)]
    fn borrow(a: &u32, b: &u32, borrow: u32) -> u32 {
        flow::borrow(*a, *b, borrow)
    }

    #[inline(always)]
    fn checksum_delta(old: &u32, new: &u32, sum: u32) -> u32 {
        nat::checksum_delta(*old, *new, sum)
    }

    #[inline(always)]
    fn rewrite_addresses<P: Frame>(frame: &mut P, src: &u32, dst: &u32, sum: u32) -> Option<()> {
        let check = frame.read::<u16>(ETH_LEN + 10)?;
        frame.write(ETH_LEN + 10, nat::update_checksum(check, sum))?;
        frame.write(ETH_LEN + 12, *src)?;
        frame.write(ETH_LEN + 16, *dst)
    }

    #[inline(always)]
    fn from_words(address: &[u32; 4]) -> u32 {
        let [first, ..] = *address;
        first
    }

    #[inline(always)]
    fn swap_if(a: &u32, b: &u32, mask: u32) -> (u32, u32) {
        let changed = (a ^ b) & mask;
        (a ^ changed, b ^ changed)
    }

    #[inline(always)]
    fn decrement_ttl<P: Frame>(frame: &mut P) -> Option<()> {
        let word = frame.read::<u32>(ETH_LEN + 8)?;
        frame.write(ETH_LEN + 8, csum::decrement_ttl(word)?)
    }

    #[inline(always)]
    fn address(endpoint: &Endpoint) -> u32 {
        endpoint.v4
    }

    #[inline(always)]
    fn has_gateway(endpoint: &Endpoint) -> bool {
        endpoint.gateway_v4 != 0
    }

    #[inline(always)]
    fn gateway(endpoint: &Endpoint, nexthop: &mut Nexthop) {
        let Nexthop { family, address: [first, ..] } = nexthop;
        (*family, *first) = (AF_INET, endpoint.gateway_v4);
    }

    #[inline(always)]
    fn remote_slot(address: &u32) -> u32 {
        remote_slot_v4(*address)
    }

    #[inline(always)]
    fn unroutable(_src: &u32, dst: &u32) -> Option<Drop> {
        let [first, ..] = dst.to_ne_bytes();
        match first {
            // RFC 1112 and 919: 224.0.0.0/4 and 255.255.255.255.
            224..=239 => Some(Drop::Multicast),
            _ if *dst == u32::MAX => Some(Drop::Multicast),
            // RFC 6890: 0.0.0.0/8, 127.0.0.0/8, 240.0.0.0/4.
            0 | 127 | 240..=255 => Some(Drop::BadDestination),
            _ => None,
        }
    }

    #[inline(always)]
    fn to_words(address: &u32) -> [u32; 4] {
        [*address, 0, 0, 0]
    }
}

/// IPv6.
pub struct V6;

/// Whether the address lies in fe80::/10.
#[inline(always)]
#[must_use]
pub fn is_link_local(address: &[u32; 4]) -> bool {
    let [first, ..] = *address;
    first & u32::from_ne_bytes([0xff, 0xc0, 0, 0]) == u32::from_ne_bytes([0xfe, 0x80, 0, 0])
}

impl Family for V6 {
    type Addr = [u32; 4];
    const VERSION: u8 = 6;
    const UNSPECIFIED: [u32; 4] = [0; 4];
    const ICMP: u8 = parse::ICMPV6;
    const TRANSPORT_OFFSET: u32 = ETH_LEN as u32 + 40;
    const SRC_OFFSET: u32 = 8;
    const DST_OFFSET: u32 = 24;

    #[inline(always)]
    fn fast_headers<P: Frame>(frame: &P) -> Option<FastHeaders<Self>> {
        parse::fast_headers_v6(frame)
    }

    #[inline(always)]
    fn l3_header<P: Frame>(frame: &P) -> Option<FastHeaders<Self>> {
        parse::l3_header_v6(frame)
    }

    #[inline(always)]
    fn parse<P: Frame>(frame: &P, packet: &mut Packet<Self>) -> Result<(), Drop> {
        parse::parse_v6(frame, packet)
    }

    #[inline(always)]
    fn same(a: &[u32; 4], b: &[u32; 4]) -> bool {
        let ([a, b, c, d], [e, f, g, h]) = (*a, *b);
        (a ^ e) | (b ^ f) | (c ^ g) | (d ^ h) == 0
    }

    #[inline(always)]
    fn assign(to: &mut [u32; 4], from: &[u32; 4]) {
        copy_words(to, from);
    }

    #[inline(always)]
    fn borrow(a: &[u32; 4], b: &[u32; 4], borrow: u32) -> u32 {
        let ([a, b, c, d], [e, f, g, h]) = (*a, *b);
        let borrow = flow::borrow(b, f, flow::borrow(a, e, borrow));
        flow::borrow(d, h, flow::borrow(c, g, borrow))
    }

    #[inline(always)]
    fn checksum_delta(old: &[u32; 4], new: &[u32; 4], sum: u32) -> u32 {
        let ([a, b, c, d], [e, f, g, h]) = (*old, *new);
        nat::checksum_delta(d, h, nat::checksum_delta(c, g, nat::checksum_delta(b, f, nat::checksum_delta(a, e, sum))))
    }

    #[inline(always)]
    fn rewrite_addresses<P: Frame>(frame: &mut P, src: &[u32; 4], dst: &[u32; 4], _sum: u32) -> Option<()> {
        let ([a, b, c, d], [e, f, g, h]) = (*src, *dst);
        // The last word first: if it is in the frame, all are.
        frame.write(ETH_LEN + 36, h)?;
        for (word, value) in [a, b, c, d, e, f, g].into_iter().enumerate() {
            frame.write(ETH_LEN + 8 + 4 * word, value)?;
        }
        Some(())
    }

    #[inline(always)]
    fn from_words(address: &[u32; 4]) -> [u32; 4] {
        *address
    }

    #[inline(always)]
    fn swap_if(a: &[u32; 4], b: &[u32; 4], mask: u32) -> ([u32; 4], [u32; 4]) {
        let ([a, b, c, d], [e, f, g, h]) = (*a, *b);
        let [p, q, r, s] = [(a ^ e) & mask, (b ^ f) & mask, (c ^ g) & mask, (d ^ h) & mask];
        ([a ^ p, b ^ q, c ^ r, d ^ s], [e ^ p, f ^ q, g ^ r, h ^ s])
    }

    #[inline(always)]
    fn decrement_ttl<P: Frame>(frame: &mut P) -> Option<()> {
        let limit = frame.read::<u8>(ETH_LEN + 7)?;
        if limit <= 1 {
            return None;
        }
        frame.write(ETH_LEN + 7, limit - 1)
    }

    #[inline(always)]
    fn address(endpoint: &Endpoint) -> [u32; 4] {
        endpoint.v6
    }

    #[inline(always)]
    fn has_gateway(endpoint: &Endpoint) -> bool {
        !Self::same(&endpoint.gateway_v6, &Self::UNSPECIFIED)
    }

    #[inline(always)]
    fn gateway(endpoint: &Endpoint, nexthop: &mut Nexthop) {
        nexthop.family = AF_INET6;
        copy_words(&mut nexthop.address, &endpoint.gateway_v6);
    }

    #[inline(always)]
    fn remote_slot(address: &[u32; 4]) -> u32 {
        remote_slot_v6(*address)
    }

    #[inline(always)]
    fn unroutable(src: &[u32; 4], dst: &[u32; 4]) -> Option<Drop> {
        let [a, b, c, d] = *dst;
        let [first, ..] = a.to_ne_bytes();
        // RFC 4291 section 2.4: multicast ff00::/8, unspecified ::, loopback ::1.
        if first == 0xff {
            Some(Drop::Multicast)
        } else if is_link_local(src) || is_link_local(dst) {
            Some(Drop::LinkLocal)
        } else if a | b | c == 0 && (d == 0 || d == 1_u32.to_be()) {
            Some(Drop::BadDestination)
        } else {
            None
        }
    }

    #[inline(always)]
    fn to_words(address: &[u32; 4]) -> [u32; 4] {
        *address
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    fn v4(text: &str) -> u32 {
        u32::from_ne_bytes(text.parse::<Ipv4Addr>().unwrap().octets())
    }

    pub(crate) fn v6(text: &str) -> [u32; 4] {
        let octets = text.parse::<Ipv6Addr>().unwrap().octets();
        core::array::from_fn(|i| u32::from_ne_bytes(octets[4 * i..4 * i + 4].try_into().unwrap()))
    }

    #[test]
    fn unroutable_addresses_are_dropped() {
        for (dst, want) in [
            ("10.0.0.1", None),
            ("169.254.169.254", None),
            ("100.100.100.200", None),
            ("224.0.0.1", Some(Drop::Multicast)),
            ("239.255.255.255", Some(Drop::Multicast)),
            ("255.255.255.255", Some(Drop::Multicast)),
            ("0.0.0.0", Some(Drop::BadDestination)),
            ("127.0.0.1", Some(Drop::BadDestination)),
            ("240.0.0.1", Some(Drop::BadDestination)),
        ] {
            assert_eq!(V4::unroutable(&v4("10.0.0.9"), &v4(dst)), want, "{dst}");
        }
        for (src, dst, want) in [
            ("fd00::1", "fd00::2", None),
            ("fd00::1", "ff02::16", Some(Drop::Multicast)),
            ("fe80::9", "ff02::16", Some(Drop::Multicast)),
            ("fe80::9", "fd00::2", Some(Drop::LinkLocal)),
            ("fd00::1", "fe80::1", Some(Drop::LinkLocal)),
            ("fd00::1", "febf::1", Some(Drop::LinkLocal)),
            ("fd00::1", "fec0::1", None),
            ("fd00::1", "::1", Some(Drop::BadDestination)),
            ("fd00::1", "::", Some(Drop::BadDestination)),
            ("fd00::1", "::2", None),
        ] {
            assert_eq!(V6::unroutable(&v6(src), &v6(dst)), want, "{src} {dst}");
        }
    }
}
