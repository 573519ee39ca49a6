//! The packet parser: addresses, ports, protocol, fragmentation and payload type.
//!
//! Two levels. [`Family::fast_headers`] reads common packets with few instructions. [`Family::parse`] walks options and extension headers
//! within fixed bounds, and gives a drop reason for what it does not accept.

use terway_abi::Drop;

use crate::family::{Family, FastHeaders, V4, V6};
use crate::flow::copy_words;
use crate::frame::{ETH_LEN, Frame, Plain, zero};

/// Protocol numbers (IANA "Assigned Internet Protocol Numbers").
pub const ICMP: u8 = 1;
/// TCP.
pub const TCP: u8 = 6;
/// UDP.
pub const UDP: u8 = 17;
/// ICMP for IPv6.
pub const ICMPV6: u8 = 58;
/// SCTP.
pub const SCTP: u8 = 132;
/// UDP-Lite.
pub const UDPLITE: u8 = 136;

/// TCP flags (RFC 9293 section 3.1).
pub mod tcp_flags {
    /// No more data.
    pub const FIN: u8 = 1;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 2;
    /// Reset.
    pub const RST: u8 = 4;
    /// The acknowledgement field counts.
    pub const ACK: u8 = 16;
}

/// Ethernet types in network byte order.
pub mod ethertype {
    /// IPv4.
    pub const IPV4: u16 = 0x0800_u16.to_be();
    /// IPv6.
    pub const IPV6: u16 = 0x86dd_u16.to_be();
    /// ARP.
    pub const ARP: u16 = 0x0806_u16.to_be();
}

/// The payload type of a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Payload {
    /// Any other payload.
    #[default]
    Plain,
    /// An ICMP error; the quoted packet begins at [`Packet::inner`].
    IcmpError,
    /// An ICMPv6 neighbour or router message (types 133 to 137).
    Neighbour,
}

/// The fragmentation state of a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Fragment {
    /// Not a fragment.
    #[default]
    Whole,
    /// The first fragment: it has the ports.
    First,
    /// A later fragment: it has no ports.
    Later,
}

/// A parsed packet.
#[repr(C, align(8))]
pub struct Packet<F: Family> {
    /// Source address.
    pub src: F::Addr,
    /// Destination address.
    pub dst: F::Addr,
    /// Source port, then destination port, as in the packet; see [`terway_abi::FlowKey::ports`].
    pub ports: u32,
    /// Protocol number of the transport header.
    pub protocol: u8,
    /// TCP flags; 0 for other protocols.
    pub tcp_flags: u8,
    /// Payload type.
    pub payload: Payload,
    /// Fragmentation state.
    pub fragment: Fragment,
    /// The IP identification, as in the packet.
    pub fragment_id: u32,
    /// Offset of the transport header in the frame.
    pub transport: u32,
    /// Offset, in the frame, of the packet that an ICMP error quotes.
    pub inner: u32,
}

impl<F: Family> Packet<F> {
    /// An empty packet, to be filled by [`Family::parse`].
    #[inline(always)]
    #[must_use]
    pub fn new() -> Self {
        Self {
            src: F::UNSPECIFIED,
            dst: F::UNSPECIFIED,
            ports: 0,
            protocol: 0,
            tcp_flags: 0,
            payload: Payload::Plain,
            fragment: Fragment::Whole,
            fragment_id: 0,
            transport: 0,
            inner: 0,
        }
    }

    /// Resets to [`Packet::new`].
    #[inline(always)]
    pub fn clear(&mut self) {
        // SAFETY: it consists of integers, and of enums that have a variant 0.
        unsafe { zero(self) };
    }
}

impl<F: Family> Default for Packet<F> {
    fn default() -> Self {
        Self::new()
    }
}

/// An IPv4 header without options (RFC 791 section 3.1), every field as in the packet.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ipv4Header {
    /// Version and header length in words.
    pub version_ihl: u8,
    /// Type of service.
    pub tos: u8,
    /// Bytes of the packet.
    pub length: u16,
    /// Identification.
    pub id: u16,
    /// Flags and fragment offset.
    pub fragment: u16,
    /// Time to live.
    pub ttl: u8,
    /// Protocol number.
    pub protocol: u8,
    /// Header checksum.
    pub checksum: u16,
    /// Source address.
    pub src: u32,
    /// Destination address.
    pub dst: u32,
}

/// An IPv6 header (RFC 8200 section 3), every field as in the packet.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ipv6Header {
    /// Version, traffic class and flow label.
    pub version_class_flow: u32,
    /// Bytes after this header.
    pub length: u16,
    /// Type of the next header.
    pub next: u8,
    /// Hop limit.
    pub hops: u8,
    /// Source address.
    pub src: [u32; 4],
    /// Destination address.
    pub dst: [u32; 4],
}

/// A plain IP header and the ports behind it, read at once.
#[repr(C)]
#[derive(Clone, Copy)]
struct Ipv4Common {
    header: Ipv4Header,
    ports: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Ipv6Common {
    header: Ipv6Header,
    ports: u32,
}

// SAFETY: integers only; the sizes are asserted below, so there is no padding.
unsafe impl Plain for Ipv4Header {}
// SAFETY: as above.
unsafe impl Plain for Ipv6Header {}
// SAFETY: as above.
unsafe impl Plain for Ipv4Common {}
// SAFETY: as above.
unsafe impl Plain for Ipv6Common {}
const _: () = assert!(size_of::<Ipv4Header>() == 20 && size_of::<Ipv4Common>() == 24);
const _: () = assert!(size_of::<Ipv6Header>() == 40 && size_of::<Ipv6Common>() == 44);

const IPV4_LEN: usize = size_of::<Ipv4Header>();
const IPV6_LEN: usize = size_of::<Ipv6Header>();
/// Offset of the flags in the TCP header.
const TCP_FLAGS_AT: usize = 13;
/// The more-fragments flag and the 13 bits of the fragment offset.
const FRAGMENT_MASK: u16 = 0x3fff_u16.to_be();
const OFFSET_MASK: u16 = 0x1fff_u16.to_be();

/// See [`Family::fast_headers`].
#[inline(always)]
pub(crate) fn fast_headers_v4<P: Frame>(frame: &P) -> Option<FastHeaders<V4>> {
    let Ipv4Common { header, ports } = frame.read::<Ipv4Common>(ETH_LEN)?;
    if header.version_ihl != 0x45 || header.fragment & FRAGMENT_MASK != 0 {
        return None;
    }
    let tcp_flags = fast_transport(frame, header.protocol, ETH_LEN + IPV4_LEN)?;
    Some(FastHeaders { src: header.src, dst: header.dst, ports, protocol: header.protocol, tcp_flags })
}

/// See [`Family::fast_headers`].
#[inline(always)]
pub(crate) fn fast_headers_v6<P: Frame>(frame: &P) -> Option<FastHeaders<V6>> {
    let Ipv6Common { header, ports } = frame.read::<Ipv6Common>(ETH_LEN)?;
    if header.version_class_flow.to_ne_bytes()[0] >> 4 != 6 {
        return None;
    }
    let tcp_flags = fast_transport(frame, header.next, ETH_LEN + IPV6_LEN)?;
    Some(FastHeaders { src: header.src, dst: header.dst, ports, protocol: header.next, tcp_flags })
}

/// See [`Family::l3_header`].
#[inline(always)]
pub(crate) fn l3_header_v4<P: Frame>(frame: &P) -> Option<FastHeaders<V4>> {
    let header = frame.read::<Ipv4Header>(ETH_LEN)?;
    let first = header.version_ihl == 0x45 && header.fragment & OFFSET_MASK == 0;
    let ports = if first { l3_ports(frame, header.protocol, ETH_LEN + IPV4_LEN) } else { 0 };
    Some(FastHeaders { src: header.src, dst: header.dst, ports, protocol: header.protocol, tcp_flags: 0 })
}

/// See [`Family::l3_header`].
#[inline(always)]
pub(crate) fn l3_header_v6<P: Frame>(frame: &P) -> Option<FastHeaders<V6>> {
    let header = frame.read::<Ipv6Header>(ETH_LEN)?;
    let ports = l3_ports(frame, header.next, ETH_LEN + IPV6_LEN);
    Some(FastHeaders { src: header.src, dst: header.dst, ports, protocol: header.next, tcp_flags: 0 })
}

#[inline(always)]
fn l3_ports<P: Frame>(frame: &P, protocol: u8, at: usize) -> u32 {
    match protocol {
        TCP | UDP | SCTP => frame.read::<u32>(at).unwrap_or(0),
        _ => 0,
    }
}

#[inline(always)]
fn fast_transport<P: Frame>(frame: &P, protocol: u8, at: usize) -> Option<u8> {
    match protocol {
        TCP => frame.read::<u8>(at + TCP_FLAGS_AT),
        UDP => Some(0),
        _ => None,
    }
}

/// IPv4 source-route options (RFC 791 section 3.1).
const LOOSE_SOURCE_ROUTE: u8 = 131;
const STRICT_SOURCE_ROUTE: u8 = 137;
/// Maximum number of options. `ping -R` sends two, a router alert is one; each doubles the verifier's work.
const OPTIONS: usize = 8;

/// See [`Family::parse`].
#[inline(always)]
pub(crate) fn parse_v4<P: Frame>(frame: &P, packet: &mut Packet<V4>) -> Result<(), Drop> {
    let transport = header_v4(frame, ETH_LEN, packet)?;
    if transport > ETH_LEN + IPV4_LEN {
        reject_source_route(frame, transport)?;
    }
    packet.transport = transport as u32;
    if packet.fragment == Fragment::Later { Ok(()) } else { transport_header(frame, packet) }
}

/// Parses the IPv4 header at `at`; returns the offset of the next header. Options are skipped.
#[inline(always)]
pub(crate) fn header_v4<P: Frame>(frame: &P, at: usize, packet: &mut Packet<V4>) -> Result<usize, Drop> {
    let header = frame.read_dynamic::<Ipv4Header>(at).ok_or(Drop::Truncated)?;
    let header_len = usize::from(header.version_ihl & 0x0f) * 4;
    let length = usize::from(u16::from_be(header.length));
    // A length of 0 means more than 64 KiB in packets that the kernel has merged ("BIG TCP", `iph_totlen`, include/linux/ip.h).
    if header.version_ihl >> 4 != 4 || header_len < IPV4_LEN || (length != 0 && length < header_len) {
        return Err(Drop::BadHeader);
    }
    (packet.src, packet.dst) = (header.src, header.dst);
    packet.protocol = header.protocol;
    packet.fragment_id = u32::from(header.id);
    packet.fragment = if header.fragment & OFFSET_MASK != 0 {
        Fragment::Later
    } else if header.fragment & FRAGMENT_MASK != 0 {
        Fragment::First
    } else {
        Fragment::Whole
    };
    Ok(frame.hide_from_verifier(at + header_len))
}

/// Walks the IPv4 options up to `end`, and rejects source routes.
#[inline(always)]
fn reject_source_route<P: Frame>(frame: &P, end: usize) -> Result<(), Drop> {
    let mut at = ETH_LEN + IPV4_LEN;
    for _ in 0..OPTIONS {
        at = frame.hide_from_verifier(at);
        if at >= end {
            return Ok(());
        }
        let kind = frame.read_dynamic::<u8>(at).ok_or(Drop::Truncated)?;
        match kind {
            0 => return Ok(()),
            1 => at += 1,
            LOOSE_SOURCE_ROUTE | STRICT_SOURCE_ROUTE => return Err(Drop::SourceRoute),
            _ => {
                let length = frame.read_dynamic::<u8>(at + 1).ok_or(Drop::Truncated)?;
                if length < 2 {
                    return Err(Drop::BadHeader);
                }
                at += usize::from(length);
            }
        }
    }
    if at >= end { Ok(()) } else { Err(Drop::HeaderChain) }
}

/// Extension headers (RFC 8200 section 4; RFC 4302 for AH; RFC 6275 for mobility).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;
const MOBILITY: u8 = 135;
/// Maximum number of extension headers. More than three are unheard of (RFC 9098).
const CHAIN: usize = 6;

/// See [`Family::parse`].
#[inline(always)]
pub(crate) fn parse_v6<P: Frame>(frame: &P, packet: &mut Packet<V6>) -> Result<(), Drop> {
    header_v6(frame, ETH_LEN, packet)?;
    if packet.fragment == Fragment::Later { Ok(()) } else { transport_header(frame, packet) }
}

/// Parses the IPv6 header at `at` and its extension headers.
#[inline(always)]
pub(crate) fn header_v6<P: Frame>(frame: &P, at: usize, packet: &mut Packet<V6>) -> Result<(), Drop> {
    let header = frame.read_dynamic::<Ipv6Header>(at).ok_or(Drop::Truncated)?;
    if header.version_class_flow.to_ne_bytes()[0] >> 4 != 6 {
        return Err(Drop::BadHeader);
    }
    copy_words(&mut packet.src, &header.src);
    copy_words(&mut packet.dst, &header.dst);
    let (mut next, mut at) = (header.next, at + IPV6_LEN);
    for _ in 0..CHAIN {
        (next, at) = (frame.hide_from_verifier(usize::from(next)) as u8, frame.hide_from_verifier(at));
        let length = match next {
            HOP_BY_HOP | DESTINATION | MOBILITY => (extension_length(frame, at)? + 1) * 8,
            ROUTING => {
                // Segments left: a router on the path would rewrite the destination.
                if frame.read_dynamic::<u8>(at + 3).ok_or(Drop::Truncated)? != 0 {
                    return Err(Drop::SourceRoute);
                }
                (extension_length(frame, at)? + 1) * 8
            }
            AUTHENTICATION => (extension_length(frame, at)? + 2) * 4,
            FRAGMENT => {
                let offset = u16::from_be(frame.read_dynamic::<u16>(at + 2).ok_or(Drop::Truncated)?);
                packet.fragment_id = frame.read_dynamic::<u32>(at + 4).ok_or(Drop::Truncated)?;
                packet.fragment = match (offset & 0xfff8, offset & 1) {
                    (0, 0) => Fragment::Whole, // an "atomic" fragment, RFC 6946
                    (0, _) => Fragment::First,
                    _ => Fragment::Later,
                };
                if packet.fragment == Fragment::Later {
                    packet.protocol = frame.read_dynamic::<u8>(at).ok_or(Drop::Truncated)?;
                    packet.transport = (at + 8) as u32;
                    return Ok(());
                }
                8
            }
            _ => {
                packet.protocol = next;
                packet.transport = at as u32;
                return Ok(());
            }
        };
        next = frame.read_dynamic::<u8>(at).ok_or(Drop::Truncated)?;
        at += length;
    }
    Err(Drop::HeaderChain)
}

#[inline(always)]
fn extension_length<P: Frame>(frame: &P, at: usize) -> Result<usize, Drop> {
    frame.read_dynamic::<u8>(at + 1).map(usize::from).ok_or(Drop::Truncated)
}

/// Parses ports and payload type from the transport header.
#[inline(always)]
fn transport_header<P: Frame, F: Family>(frame: &P, packet: &mut Packet<F>) -> Result<(), Drop> {
    let at = packet.transport as usize;
    match packet.protocol {
        TCP => {
            packet.ports = frame.read_dynamic::<u32>(at).ok_or(Drop::Truncated)?;
            packet.tcp_flags = frame.read_dynamic::<u8>(at + TCP_FLAGS_AT).ok_or(Drop::Truncated)?;
        }
        UDP | UDPLITE | SCTP => packet.ports = frame.read_dynamic::<u32>(at).ok_or(Drop::Truncated)?,
        protocol if protocol == F::ICMP => {
            let kind = frame.read_dynamic::<u8>(at).ok_or(Drop::Truncated)?;
            let identifier = frame.read_dynamic::<u16>(at + 4).ok_or(Drop::Truncated)?;
            packet.payload = if icmp_error::<F>(kind) {
                Payload::IcmpError
            } else if F::VERSION == 6 && (133..=137).contains(&kind) {
                Payload::Neighbour
            } else {
                Payload::Plain
            };
            packet.inner = (at + 8) as u32;
            packet.ports = icmp_ports::<F>(kind, identifier);
        }
        _ => {}
    }
    packet.ports = frame.hide_from_verifier(packet.ports as usize) as u32;
    packet.protocol = frame.hide_from_verifier(usize::from(packet.protocol)) as u8;
    packet.tcp_flags = frame.hide_from_verifier(usize::from(packet.tcp_flags)) as u8;
    Ok(())
}

/// Whether an ICMP message of this type is an error that quotes a packet (RFC 1122 section 3.2.2, RFC 4443 section 2.1).
#[inline(always)]
fn icmp_error<F: Family>(kind: u8) -> bool {
    if F::VERSION == 4 { matches!(kind, 3 | 4 | 5 | 11 | 12) } else { kind < 128 }
}

/// The ports word of an ICMP query: its identifier, in place of the requester's port.
#[inline(always)]
pub(crate) fn icmp_ports<F: Family>(kind: u8, identifier: u16) -> u32 {
    let [high, low] = identifier.to_ne_bytes();
    let (is_request, is_reply) =
        if F::VERSION == 4 { (matches!(kind, 8 | 13), matches!(kind, 0 | 14)) } else { (kind == 128, kind == 129) };
    if is_request {
        u32::from_ne_bytes([high, low, 0, 0])
    } else if is_reply {
        u32::from_ne_bytes([0, 0, high, low])
    } else {
        0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An Ethernet header and what follows.
    fn frame(kind: u16, rest: &[u8]) -> Vec<u8> {
        let mut bytes = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(rest);
        bytes
    }

    fn v4(protocol: u8, fragment: u16, options: &[u8], rest: &[u8]) -> Vec<u8> {
        let words = 5 + options.len() / 4;
        let length = (words * 4 + rest.len()) as u16;
        let mut bytes = vec![0x40 | words as u8, 0];
        bytes.extend(length.to_be_bytes());
        bytes.extend([0x12, 0x34]);
        bytes.extend(fragment.to_be_bytes());
        bytes.extend([64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        bytes.extend(options);
        bytes.extend(rest);
        frame(ethertype::IPV4, &bytes)
    }

    fn v6(next: u8, rest: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0x60, 0, 0, 0];
        bytes.extend((rest.len() as u16).to_be_bytes());
        bytes.extend([next, 64]);
        bytes.extend((1..=32).collect::<Vec<u8>>());
        bytes.extend(rest);
        frame(ethertype::IPV6, &bytes)
    }

    fn parse<F: Family>(frame: &Vec<u8>) -> Result<Packet<F>, Drop> {
        let mut packet = Packet::new();
        F::parse(frame, &mut packet).map(|()| packet)
    }

    const TCP_SYN: [u8; 20] = [0x9c, 0x40, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0, 0, 0, 0, 0, 0];

    #[test]
    fn fast_headers_accept_common_packets_only() {
        let fast_headers = V4::fast_headers(&v4(TCP, 0x4000, &[], &TCP_SYN)).unwrap();
        assert_eq!(fast_headers.src.to_ne_bytes(), [10, 0, 0, 1]);
        assert_eq!(fast_headers.ports.to_ne_bytes(), [0x9c, 0x40, 0, 80]);
        assert_eq!((fast_headers.protocol, fast_headers.tcp_flags), (TCP, tcp_flags::SYN));
        let fast_headers = V6::fast_headers(&v6(UDP, &[0, 53, 0, 54, 0, 8, 0, 0])).unwrap();
        assert_eq!(fast_headers.dst.map(u32::to_ne_bytes).concat(), (17..=32).collect::<Vec<u8>>());
        assert_eq!((fast_headers.ports.to_ne_bytes(), fast_headers.tcp_flags), ([0, 53, 0, 54], 0));
        assert!(V4::fast_headers(&v4(TCP, 0x2000, &[], &TCP_SYN)).is_none(), "a fragment");
        assert!(V4::fast_headers(&v4(TCP, 0, &[1, 1, 1, 1], &TCP_SYN)).is_none(), "options");
        assert!(V4::fast_headers(&v4(ICMP, 0, &[], &[0; 20])).is_none(), "another protocol");
        assert!(V4::fast_headers(&v4(TCP, 0, &[], &TCP_SYN[..13])).is_none(), "cut off before the flags");
        assert!(V6::fast_headers(&v6(0, &[0; 40])).is_none(), "an extension header");
    }

    #[test]
    fn icmp_identifier_replaces_the_requesters_port() {
        let request = parse::<V4>(&v4(ICMP, 0, &[], &[8, 0, 0, 0, 0xab, 0xcd, 0, 1])).ok().unwrap();
        let reply = parse::<V4>(&v4(ICMP, 0, &[], &[0, 0, 0, 0, 0xab, 0xcd, 0, 1])).ok().unwrap();
        assert_eq!(request.ports.to_ne_bytes(), [0xab, 0xcd, 0, 0]);
        assert_eq!(request.ports, reply.ports.rotate_left(16));
        let error = parse::<V6>(&v6(ICMPV6, &[1, 4, 0, 0, 0, 0, 0, 0])).ok().unwrap();
        assert_eq!((error.payload, error.inner), (Payload::IcmpError, 14 + 40 + 8));
        let solicitation = parse::<V6>(&v6(ICMPV6, &[135, 0, 0, 0, 0, 0, 0, 0])).ok().unwrap();
        assert_eq!((solicitation.payload, solicitation.transport), (Payload::Neighbour, 14 + 40));
    }

    #[test]
    fn ipv6_fragment_header_is_parsed() {
        let udp = [0, 1, 0, 2, 0, 8, 0, 0];
        let of = |field: u16| {
            let mut rest = vec![UDP, 0];
            rest.extend(field.to_be_bytes());
            rest.extend([9, 9, 9, 9]);
            rest.extend(udp);
            parse::<V6>(&v6(FRAGMENT, &rest)).ok().unwrap()
        };
        assert_eq!((of(0).fragment, of(1).fragment), (Fragment::Whole, Fragment::First));
        assert_eq!((of(8).fragment, of(9).fragment), (Fragment::Later, Fragment::Later));
        assert_eq!((of(1).ports.to_ne_bytes(), of(8).ports), ([0, 1, 0, 2], 0));
        assert_eq!((of(8).protocol, of(8).fragment_id.to_ne_bytes()), (UDP, [9, 9, 9, 9]));
    }

    /// Both levels of the parser must agree: a packet must not have one flow on the fast path and another on the slow path.
    fn agree<F: Family>(bytes: &Vec<u8>)
    where
        F::Addr: PartialEq + core::fmt::Debug,
    {
        let Some(fast_headers) = F::fast_headers(bytes) else { return };
        let Ok(packet) = parse::<F>(bytes) else { panic!("fast_headers accepted what parse rejects") };
        assert_eq!((fast_headers.src, fast_headers.dst, fast_headers.ports), (packet.src, packet.dst, packet.ports));
        assert_eq!((fast_headers.protocol, fast_headers.tcp_flags), (packet.protocol, packet.tcp_flags));
        assert_eq!((packet.fragment, packet.payload), (Fragment::Whole, Payload::Plain));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn parser_accepts_any_bytes_and_both_levels_agree(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..140),
            v6 in any::<bool>(),
            shape in prop_oneof![Just(None), Just(Some(0x45_u8)), Just(Some(0x4f)), Just(Some(0x60))],
            protocol in prop_oneof![Just(0_u8), Just(1), Just(6), Just(17), Just(43), Just(44), Just(51), Just(58), Just(60), any::<u8>()],
            cut in 0_usize..140,
        ) {
            if let (Some(shape), Some(byte)) = (shape, bytes.get_mut(14)) {
                *byte = shape;
            }
            if let Some(byte) = bytes.get_mut(if v6 { 20 } else { 23 }) {
                *byte = protocol;
            }
            if !v6 && let Some(flags) = bytes.get_mut(20..22) && protocol & 1 == 0 {
                flags.copy_from_slice(&[0x40, 0]);
            }
            bytes.truncate(cut);
            if v6 { agree::<V6>(&bytes) } else { agree_v4_with_length(&mut bytes) }
            let _parsed = (parse::<V4>(&bytes).is_ok(), parse::<V6>(&bytes).is_ok());
        }

        #[test]
        fn ipv4_options_end_at_the_header_length(options in proptest::collection::vec(any::<u8>(), 0..10)) {
            let options: Vec<u8> = options.iter().flat_map(|b| [*b, 0, 2, 1]).collect();
            let parsed = parse::<V4>(&v4(TCP, 0, &options, &TCP_SYN));
            if let Ok(packet) = parsed {
                prop_assert_eq!(packet.transport as usize, 14 + 20 + options.len());
                prop_assert_eq!(packet.ports.to_ne_bytes(), [0x9c, 0x40, 0, 80]);
            }
        }
    }

    /// The fast path ignores the length field, which does not identify a flow; the full parser checks it.
    fn agree_v4_with_length(bytes: &mut Vec<u8>) {
        if let Some(length) = bytes.get_mut(16..18) {
            length.copy_from_slice(&[0, 100]);
        }
        agree::<V4>(bytes);
    }
}
