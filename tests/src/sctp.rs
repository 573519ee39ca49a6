//! SCTP by hand, for kernels without it: raw sockets that open an association and answer one, as far as the first two packets.
//!
//! RFC 9260: common header (3.1), INIT (3.3.2), INIT ACK (3.3.3), and the checksum (appendix A), which unlike those of TCP and UDP does not
//! cover the addresses.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd as _, RawFd};

use socket2::{Domain, Protocol, Socket, Type};

/// The number of the protocol.
pub const SCTP: u8 = 132;

/// A packet with one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source and destination port.
    pub ports: (u16, u16),
    /// The verification tag: of an INIT 0, of an INIT ACK that which the INIT told.
    pub tag: u32,
    /// The chunk.
    pub chunk: Chunk,
}

/// What a packet says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// Opens an association: the tag that answers are to have, not 0.
    Init(u32),
    /// Answers that.
    InitAck(u32),
}

/// CRC32c (Castagnoli), bit by bit.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 0 { crc >> 1 } else { crc >> 1 ^ 0x82f6_3b78 };
        }
    }
    !crc
}

impl Packet {
    /// Opens an association.
    #[must_use]
    pub const fn init(ports: (u16, u16), own_tag: u32) -> Self {
        Self { ports, tag: 0, chunk: Chunk::Init(own_tag) }
    }

    /// Its bytes, with the checksum.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let (kind, own, cookie): (u8, u32, &[u8]) = match self.chunk {
            Chunk::Init(own) => (1, own, &[]),
            // A State Cookie of one word.
            Chunk::InitAck(own) => (2, own, &[0, 7, 0, 8, 1, 2, 3, 4]),
        };
        let mut bytes = Vec::new();
        bytes.extend(self.ports.0.to_be_bytes());
        bytes.extend(self.ports.1.to_be_bytes());
        bytes.extend(self.tag.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend([kind, 0, 0, 20 + cookie.len() as u8]);
        bytes.extend(own.to_be_bytes());
        // Receiver window, streams out and in, first TSN.
        bytes.extend([0, 1, 0, 0, 0, 1, 0, 1]);
        bytes.extend(own.to_be_bytes());
        bytes.extend(cookie);
        let sum = crc32c(&bytes);
        // The appendix's order of bits and bytes is the little-endian one.
        bytes[8..12].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Reads one; nothing if it is another kind of packet, or its checksum is wrong.
    #[must_use]
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let half = |at: usize| Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        let word = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let mut blank = bytes.to_vec();
        blank.get_mut(8..12)?.fill(0);
        if crc32c(&blank).to_le_bytes() != bytes.get(8..12)? {
            return None;
        }
        let own = word(16)?;
        let chunk = match bytes.get(12)? {
            1 => Chunk::Init(own),
            2 => Chunk::InitAck(own),
            _ => return None,
        };
        Some(Self { ports: (half(0)?, half(2)?), tag: word(4)?, chunk })
    }
}

/// Raw sockets of both families, in the namespace in which they were opened.
#[derive(Debug)]
pub struct Raw {
    v4: UdpSocket,
    v6: UdpSocket,
}

impl Raw {
    /// Opens them; what arrives is theirs from now on.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn open() -> io::Result<Self> {
        // Of what the standard library does with a socket of its own, sending and receiving is the same for a raw one.
        let raw = |domain| -> io::Result<UdpSocket> {
            let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(i32::from(SCTP))))?;
            socket.set_nonblocking(true)?;
            Ok(socket.into())
        };
        Ok(Self { v4: raw(Domain::IPV4)?, v6: raw(Domain::IPV6)? })
    }

    /// What to wait for.
    #[must_use]
    pub fn fds(&self) -> [RawFd; 2] {
        [self.v4.as_raw_fd(), self.v6.as_raw_fd()]
    }

    /// Sends a packet.
    ///
    /// # Errors
    /// When there is no way there.
    pub fn send(&self, to: IpAddr, packet: &Packet) -> io::Result<()> {
        let socket = if to.is_ipv4() { &self.v4 } else { &self.v6 };
        socket.send_to(&packet.bytes(), SocketAddr::new(to, 0)).map(drop)
    }

    /// The packets that have arrived, with who sent them; nothing in place of one that is damaged or of another kind.
    pub fn received(&self) -> Vec<(IpAddr, Option<Packet>)> {
        let mut all = Vec::new();
        let mut buffer = [0; 256];
        for (socket, v4) in [(&self.v4, true), (&self.v6, false)] {
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                // raw(7): with the header; ipv6(7): without.
                let header = if v4 { usize::from(buffer[0] & 15) * 4 } else { 0 };
                all.push((from.ip(), buffer.get(header..length).and_then(Packet::read)));
            }
        }
        all
    }

    /// Answers everybody who wants to open an association, at every port; gives back whom, and what else was wrong.
    pub fn answer(&self) -> Vec<(IpAddr, Option<Packet>)> {
        let mut asked = self.received();
        asked.retain(|(from, packet)| match packet {
            Some(Packet { ports: (source, destination), chunk: Chunk::Init(tag), .. }) => {
                let answer = Packet { ports: (*destination, *source), tag: *tag, chunk: Chunk::InitAck(!tag) };
                // Who cannot be answered will not be.
                let _ = self.send(*from, &answer);
                true
            }
            Some(_) => false,
            None => true,
        });
        asked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_specification() {
        // The check value of CRC-32C, and a test vector of RFC 3720, B.4.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn packets_are_read_as_they_were_written_and_damage_is_seen() {
        for chunk in [Chunk::Init(7), Chunk::InitAck(9)] {
            let packet = Packet { ports: (40_000, 80), tag: 5, chunk };
            let bytes = packet.bytes();
            assert_eq!(Packet::read(&bytes), Some(packet));
            for at in 0..bytes.len() {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1;
                assert_eq!(Packet::read(&damaged), None, "byte {at}");
            }
            assert_eq!(Packet::read(&bytes[..20]), None);
        }
    }
}
