//! Replies that reject a packet to a Service without backends: a TCP reset, or ICMP port unreachable for other protocols, as from a closed
//! port. The packet itself is rewritten into the reply.

use terway_abi::MacPair;

use crate::family::{Family, V4, V6};
use crate::frame::{ETH_LEN, Frame};
use crate::nat::checksum_delta;
use crate::parse::{ICMP, ICMPV6, TCP, tcp_flags};

/// Words of a TCP header without options.
const TCP_WORDS: usize = 5;

/// The fields of a TCP reset.
#[derive(Clone, Copy)]
pub struct ResetFields {
    /// Ports as in the packet.
    ports: u32,
    /// Sequence number of the reset.
    seq: u32,
    /// Acknowledgement number of the reset.
    ack: u32,
    /// Flags of the reset.
    flags: u8,
}

/// The rejecting replies, by family.
pub trait Reject: Family {
    /// Frame length of a reset.
    const RESET_LEN: u32;
    /// Frame length of an ICMP error.
    const ERROR_LEN: u32;
    /// The words that an ICMP error quotes.
    type Quote;

    /// Reads what a reset needs from a TCP segment in a frame of common shape.
    fn read_segment<P: Frame>(frame: &P) -> Option<ResetFields>;
    /// Writes the reset from `src` to `dst` behind the Ethernet header.
    fn write_reset<P: Frame>(frame: &mut P, src: &Self::Addr, dst: &Self::Addr, segment: &ResetFields) -> Option<()>;
    /// Reads what an error quotes of a frame of common shape.
    fn read_quote<P: Frame>(frame: &P) -> Option<Self::Quote>;
    /// Writes the error from `src` to `dst` behind the Ethernet header.
    fn write_error<P: Frame>(frame: &mut P, src: &Self::Addr, dst: &Self::Addr, quote: &Self::Quote) -> Option<()>;
}

/// Swaps the MAC addresses of a frame.
#[inline(always)]
pub fn swap_macs<P: Frame>(frame: &mut P) -> Option<()> {
    let macs: MacPair = frame.macs()?;
    frame.write(0, MacPair::new(macs.source(), macs.destination()))
}

/// The fields of the reset to a segment of `length` bytes, TCP header included (RFC 9293 section 3.10.7.1).
#[inline(always)]
fn reset_fields<P: Frame>(frame: &P, at: usize, length: u32) -> Option<ResetFields> {
    let (seq, ack) = (u32::from_be(frame.read(at + 4)?), u32::from_be(frame.read(at + 8)?));
    let (offset, flags) = (frame.read::<u8>(at + 12)?, frame.read::<u8>(at + 13)?);
    let ports = frame.read::<u32>(at)?.rotate_left(16);
    if flags & tcp_flags::ACK != 0 {
        return Some(ResetFields { ports, seq: ack, ack: 0, flags: tcp_flags::RST });
    }
    let payload = length.wrapping_sub(u32::from(offset >> 4) * 4);
    let extent = payload + u32::from(flags & tcp_flags::SYN != 0) + u32::from(flags & tcp_flags::FIN != 0);
    Some(ResetFields { ports, seq: 0, ack: seq.wrapping_add(extent), flags: tcp_flags::RST | tcp_flags::ACK })
}

/// Writes the checksum of `sum` into the last two bytes of a word that ends in zeros.
#[inline(always)]
fn with_check(word: u32, sum: u32) -> u32 {
    let folded = (sum & 0xffff) + (sum >> 16);
    let check = !(((folded & 0xffff) + (folded >> 16)) as u16);
    let ([a, b, _, _], [c, d]) = (word.to_ne_bytes(), check.to_ne_bytes());
    u32::from_ne_bytes([a, b, c, d])
}

#[inline(always)]
fn sum<const N: usize>(words: &[u32; N], start: u32) -> u32 {
    // The delta from all ones, whose complement is 0, is the sum itself.
    words.iter().fold(start, |sum, word| checksum_delta(u32::MAX, *word, sum))
}

/// Writes a TCP header; `pseudo` is the sum of its pseudo header.
#[inline(always)]
fn write_tcp<P: Frame>(frame: &mut P, at: usize, segment: &ResetFields, pseudo: u32) -> Option<()> {
    let ResetFields { ports, seq, ack, flags } = *segment;
    let words: [u32; TCP_WORDS] =
        [ports, seq.to_be(), ack.to_be(), (0x5000_0000 | (u32::from(flags) << 16)).to_be(), 0];
    // The checksum is in the first half of the last word.
    let check = with_check(0, sum(&words, pseudo)).rotate_left(16);
    let [a, b, c, d, _] = words;
    write_words(frame, at, &[a, b, c, d, check])
}

#[inline(always)]
fn write_words<P: Frame, const N: usize>(frame: &mut P, at: usize, words: &[u32; N]) -> Option<()> {
    for (index, word) in words.iter().enumerate() {
        frame.write(at + 4 * index, *word)?;
    }
    Some(())
}

#[inline(always)]
fn read_words<P: Frame, const N: usize>(frame: &P, at: usize) -> Option<[u32; N]> {
    let mut words = [0; N];
    for (index, word) in words.iter_mut().enumerate() {
        *word = frame.read(at + 4 * index)?;
    }
    Some(words)
}

const V4_LEN: usize = 20;
const V6_LEN: usize = 40;
/// The TTL or hop limit of a reply.
const TTL: u32 = 64;

#[inline(always)]
fn write_v4<P: Frame>(frame: &mut P, src: u32, dst: u32, protocol: u8, length: u32) -> Option<()> {
    let third = ((TTL << 24) | (u32::from(protocol) << 16)).to_be();
    let words = [(0x4500_0000 | length).to_be(), 0x4000_u32.to_be(), third, src, dst];
    let [a, b, _, d, e] = words;
    write_words(frame, ETH_LEN, &[a, b, with_check(third, sum(&words, 0)), d, e])
}

#[inline(always)]
fn write_v6<P: Frame>(frame: &mut P, src: &[u32; 4], dst: &[u32; 4], next: u8, length: u32) -> Option<()> {
    let second = ((length << 16) | (u32::from(next) << 8) | TTL).to_be();
    write_words(frame, ETH_LEN, &[0x6000_0000_u32.to_be(), second])?;
    write_words(frame, ETH_LEN + 8, src)?;
    write_words(frame, ETH_LEN + 24, dst)
}

impl Reject for V4 {
    const RESET_LEN: u32 = (ETH_LEN + V4_LEN + 4 * TCP_WORDS) as u32;
    const ERROR_LEN: u32 = (ETH_LEN + V4_LEN + 8 + V4_LEN + 8) as u32;
    /// RFC 792: the header and eight bytes.
    type Quote = [u32; 7];

    #[inline(always)]
    fn read_segment<P: Frame>(frame: &P) -> Option<ResetFields> {
        let length = u32::from(u16::from_be(frame.read(ETH_LEN + 2)?));
        reset_fields(frame, ETH_LEN + V4_LEN, length.wrapping_sub(V4_LEN as u32))
    }

    #[inline(always)]
    fn write_reset<P: Frame>(frame: &mut P, src: &u32, dst: &u32, segment: &ResetFields) -> Option<()> {
        write_v4(frame, *src, *dst, TCP, (V4_LEN + 4 * TCP_WORDS) as u32)?;
        let pseudo = sum(&[*src, *dst, ((u32::from(TCP) << 16) | (4 * TCP_WORDS as u32)).to_be()], 0);
        write_tcp(frame, ETH_LEN + V4_LEN, segment, pseudo)
    }

    #[inline(always)]
    fn read_quote<P: Frame>(frame: &P) -> Option<[u32; 7]> {
        read_words(frame, ETH_LEN)
    }

    #[inline(always)]
    fn write_error<P: Frame>(frame: &mut P, src: &u32, dst: &u32, quote: &[u32; 7]) -> Option<()> {
        write_v4(frame, *src, *dst, ICMP, Self::ERROR_LEN - ETH_LEN as u32)?;
        // Destination unreachable, port unreachable.
        let first = 0x0303_0000_u32.to_be();
        let words = [with_check(first, sum(quote, first)), 0];
        write_words(frame, ETH_LEN + V4_LEN, &words)?;
        write_words(frame, ETH_LEN + V4_LEN + 8, quote)
    }
}

impl Reject for V6 {
    const RESET_LEN: u32 = (ETH_LEN + V6_LEN + 4 * TCP_WORDS) as u32;
    const ERROR_LEN: u32 = (ETH_LEN + V6_LEN + 8 + V6_LEN + 8) as u32;
    /// RFC 4443 wants as much as fits; receivers need the header and the ports.
    type Quote = [u32; 12];

    #[inline(always)]
    fn read_segment<P: Frame>(frame: &P) -> Option<ResetFields> {
        reset_fields(frame, ETH_LEN + V6_LEN, u32::from(u16::from_be(frame.read(ETH_LEN + 4)?)))
    }

    #[inline(always)]
    fn write_reset<P: Frame>(frame: &mut P, src: &[u32; 4], dst: &[u32; 4], segment: &ResetFields) -> Option<()> {
        let length = 4 * TCP_WORDS as u32;
        write_v6(frame, src, dst, TCP, length)?;
        let pseudo = sum(dst, sum(src, sum(&[length.to_be(), u32::from(TCP).to_be()], 0)));
        write_tcp(frame, ETH_LEN + V6_LEN, segment, pseudo)
    }

    #[inline(always)]
    fn read_quote<P: Frame>(frame: &P) -> Option<[u32; 12]> {
        read_words(frame, ETH_LEN)
    }

    #[inline(always)]
    fn write_error<P: Frame>(frame: &mut P, src: &[u32; 4], dst: &[u32; 4], quote: &[u32; 12]) -> Option<()> {
        let length = Self::ERROR_LEN - (ETH_LEN + V6_LEN) as u32;
        write_v6(frame, src, dst, ICMPV6, length)?;
        // Destination unreachable, port unreachable.
        let first = 0x0104_0000_u32.to_be();
        let pseudo = sum(dst, sum(src, sum(&[length.to_be(), u32::from(ICMPV6).to_be()], first)));
        let words = [with_check(first, sum(quote, pseudo)), 0];
        write_words(frame, ETH_LEN + V6_LEN, &words)?;
        write_words(frame, ETH_LEN + V6_LEN + 8, quote)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 1071, over bytes; 0xffff means that the checksum among them is right.
    fn total(bytes: &[u8]) -> u16 {
        let mut total: u32 =
            bytes.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c.get(1).copied().unwrap_or(0)]))).sum();
        while total > 0xffff {
            total = (total & 0xffff) + (total >> 16);
        }
        total as u16
    }

    /// The payload of a frame with its pseudo header (RFC 9293 section 3.1, RFC 8200 section 8.1).
    fn covered(frame: &[u8]) -> Vec<u8> {
        let (addresses, protocol, at) = match frame[14] >> 4 {
            4 => (&frame[26..34], frame[23], 34),
            _ => (&frame[22..54], frame[20], 54),
        };
        let mut bytes = addresses.to_vec();
        bytes.extend([0, protocol]);
        bytes.extend(((frame.len() - at) as u16).to_be_bytes());
        bytes.extend(&frame[at..]);
        bytes
    }

    const SYN: [u8; 24] = [0x9c, 0x40, 0, 80, 0, 0, 1, 0, 0, 0, 0, 0, 0x60, 2, 1, 1, 0, 0, 0, 0, 2, 4, 5, 0xb4];

    fn frame(header: &[u8], rest: &[u8]) -> Vec<u8> {
        [
            &[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2][..],
            if header[0] == 0x45 { &[8, 0] } else { &[0x86, 0xdd] },
            header,
            rest,
        ]
        .concat()
    }

    fn v4(protocol: u8, rest: &[u8]) -> Vec<u8> {
        let length = (20 + rest.len()) as u8;
        frame(&[0x45, 0, 0, length, 1, 2, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 96, 0, 1], rest)
    }

    fn v6(next: u8, rest: &[u8]) -> Vec<u8> {
        let mut header = vec![0x60, 0, 0, 0, 0, rest.len() as u8, next, 64];
        header.extend(1..=32);
        frame(&header, rest)
    }

    fn words<const N: usize>(bytes: &[u8]) -> [u32; N] {
        core::array::from_fn(|i| u32::from_ne_bytes(bytes[4 * i..4 * i + 4].try_into().unwrap()))
    }

    #[test]
    fn syn_is_rejected_with_reset() {
        let mut bytes = v4(TCP, &SYN);
        let segment = V4::read_segment(&bytes).unwrap();
        let [src, dst] = words::<2>(&bytes[26..34]);
        bytes.resize(V4::RESET_LEN as usize, 0);
        swap_macs(&mut bytes).unwrap();
        V4::write_reset(&mut bytes, &dst, &src, &segment).unwrap();
        assert_eq!(bytes[..12], [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1]);
        assert_eq!((total(&bytes[14..34]), total(&covered(&bytes))), (0xffff, 0xffff));
        assert_eq!(bytes[26..34], [10, 96, 0, 1, 10, 0, 0, 1]);
        // Ports turned; sequence 0; acknowledges the SYN; RST and ACK.
        assert_eq!(bytes[34..48], [0, 80, 0x9c, 0x40, 0, 0, 0, 0, 0, 0, 1, 1, 0x50, 0x14]);

        let mut bytes = v6(TCP, &SYN);
        let segment = V6::read_segment(&bytes).unwrap();
        let (src, dst) = (words::<4>(&bytes[22..38]), words::<4>(&bytes[38..54]));
        bytes.resize(V6::RESET_LEN as usize, 0);
        V6::write_reset(&mut bytes, &dst, &src, &segment).unwrap();
        assert_eq!(total(&covered(&bytes)), 0xffff);
        assert_eq!(bytes[54..68], [0, 80, 0x9c, 0x40, 0, 0, 0, 0, 0, 0, 1, 1, 0x50, 0x14]);
    }

    #[test]
    fn ack_is_rejected_with_reset_at_its_sequence() {
        let mut bytes = v4(TCP, &SYN);
        bytes[34 + 8..34 + 12].copy_from_slice(&[0, 0, 0, 9]);
        bytes[34 + 13] = 0x10;
        let segment = V4::read_segment(&bytes).unwrap();
        assert_eq!((segment.seq, segment.ack, segment.flags), (9, 0, tcp_flags::RST));
    }

    #[test]
    fn datagram_is_rejected_with_port_unreachable() {
        let datagram = [0, 1, 0, 53, 0, 8, 0xab, 0xcd];
        let mut bytes = v4(17, &datagram);
        let quoted = bytes[14..].to_vec();
        let quote = V4::read_quote(&bytes).unwrap();
        let [src, dst] = words::<2>(&bytes[26..34]);
        bytes.resize(V4::ERROR_LEN as usize, 0);
        V4::write_error(&mut bytes, &dst, &src, &quote).unwrap();
        assert_eq!((total(&bytes[14..34]), total(&bytes[34..])), (0xffff, 0xffff));
        assert_eq!((&bytes[34..36], &bytes[42..]), (&[3, 3][..], &quoted[..]));

        let mut bytes = v6(17, &datagram);
        let quoted = bytes[14..].to_vec();
        let quote = V6::read_quote(&bytes).unwrap();
        let (src, dst) = (words::<4>(&bytes[22..38]), words::<4>(&bytes[38..54]));
        bytes.resize(V6::ERROR_LEN as usize, 0);
        V6::write_error(&mut bytes, &dst, &src, &quote).unwrap();
        assert_eq!(total(&covered(&bytes)), 0xffff);
        assert_eq!((&bytes[54..56], &bytes[62..]), (&[1, 4][..], &quoted[..]));
    }
}
