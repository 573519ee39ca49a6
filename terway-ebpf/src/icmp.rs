//! ICMP errors: which flow they belong to.
//!
//! An error speaks of a packet that was on its way the other way, so it belongs to the flow that answers that packet. It is
//! delivered like that flow's packets; the address of the router that sent it is not part of the flow.

use crate::family::{Family, V4, V6};
use crate::flow::copy;
use crate::frame::Frame;
use crate::parse::{self, Fragment, Packet, SCTP, TCP, UDP, UDPLITE};

/// What an error needs of its family.
pub trait Inner: Family {
    /// Addresses and protocol of the packet at `at`, as far as the error quotes it; returns where its transport header begins.
    fn inner<P: Frame>(frame: &P, at: usize, packet: &mut Packet<Self>) -> Option<usize>;
}

impl Inner for V4 {
    #[inline(always)]
    fn inner<P: Frame>(frame: &P, at: usize, packet: &mut Packet<Self>) -> Option<usize> {
        parse::header_v4(frame, at, packet).ok()
    }
}

impl Inner for V6 {
    #[inline(always)]
    fn inner<P: Frame>(frame: &P, at: usize, packet: &mut Packet<Self>) -> Option<usize> {
        // Quoted packets with extension headers belong to no flow: their error is a packet like any other.
        let header = frame.read_far::<parse::Ipv6Header>(at)?;
        copy(&mut packet.src, &header.src);
        copy(&mut packet.dst, &header.dst);
        packet.protocol = header.next;
        Some(at + size_of::<parse::Ipv6Header>())
    }
}

/// Reads addresses, protocol and ports of the packet at `at` that an error quotes; `None` if it does not say.
///
/// The error belongs to the flow with all of these changed over.
#[inline(always)]
pub fn answer<P: Frame, F: Inner>(frame: &P, at: usize, quoted: &mut Packet<F>) -> Option<()> {
    let transport = F::inner(frame, at, quoted)?;
    quoted.transport = transport as u32;
    if quoted.fragment == Fragment::Later {
        return None;
    }
    let ports = match quoted.protocol {
        TCP | UDP | UDPLITE | SCTP => frame.read_far::<u32>(transport)?,
        protocol if protocol == F::ICMP => {
            parse::icmp_ports::<F>(frame.read_far::<u8>(transport)?, frame.read_far::<u16>(transport + 4)?)
        }
        _ => 0,
    };
    quoted.ports = frame.blur(ports as usize) as u32;
    Some(())
}
