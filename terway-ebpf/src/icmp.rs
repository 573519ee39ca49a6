//! ICMP errors: the flow that an error is related to.
//!
//! An error quotes a packet of the opposite direction, so it is forwarded like a packet of the quoted flow's reverse direction. The address
//! of the router that sends the error is not part of the flow.

use crate::family::{Family, V4, V6};
use crate::flow::copy_words;
use crate::frame::Frame;
use crate::parse::{self, Fragment, Packet, SCTP, TCP, UDP, UDPLITE};

/// The quoted IP header, by family.
pub trait QuotedHeader: Family {
    /// Parses addresses and protocol of the quoted packet at `at`; returns the offset of its transport header.
    fn quoted_header<P: Frame>(frame: &P, at: usize, packet: &mut Packet<Self>) -> Option<usize>;
}

impl QuotedHeader for V4 {
    #[inline(always)]
    fn quoted_header<P: Frame>(frame: &P, at: usize, packet: &mut Packet<Self>) -> Option<usize> {
        parse::header_v4(frame, at, packet).ok()
    }
}

impl QuotedHeader for V6 {
    #[inline(always)]
    fn quoted_header<P: Frame>(frame: &P, at: usize, packet: &mut Packet<Self>) -> Option<usize> {
        // Errors that quote extension headers are related to no flow.
        let header = frame.read_dynamic::<parse::Ipv6Header>(at)?;
        copy_words(&mut packet.src, &header.src);
        copy_words(&mut packet.dst, &header.dst);
        packet.protocol = header.next;
        Some(at + size_of::<parse::Ipv6Header>())
    }
}

/// Parses addresses, protocol and ports of the quoted packet at `at`; `None` if the quote is too short.
///
/// The error is related to the flow of that tuple, in the opposite direction.
#[inline(always)]
pub fn parse_quoted_packet<P: Frame, F: QuotedHeader>(frame: &P, at: usize, quoted: &mut Packet<F>) -> Option<()> {
    let transport = F::quoted_header(frame, at, quoted)?;
    quoted.transport = transport as u32;
    if quoted.fragment == Fragment::Later {
        return None;
    }
    let ports = match quoted.protocol {
        TCP | UDP | UDPLITE | SCTP => frame.read_dynamic::<u32>(transport)?,
        protocol if protocol == F::ICMP => {
            parse::icmp_ports::<F>(frame.read_dynamic::<u8>(transport)?, frame.read_dynamic::<u16>(transport + 4)?)
        }
        _ => 0,
    };
    quoted.ports = frame.hide_from_verifier(ports as usize) as u32;
    Some(())
}
