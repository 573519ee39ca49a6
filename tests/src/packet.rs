//! Builds frames with right lengths and checksums, and takes them apart again.
//!
//! ```
//! use terway_tests::packet::{Frame, flags};
//! let frame = Frame::new([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2])
//!     .ip("10.0.0.1", "10.0.0.2").ttl(9).tcp(40000, 80, flags::SYN).build();
//! assert_eq!(frame.len(), 54);
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// TCP flags (RFC 9293 section 3.1).
pub mod flags {
    /// No more data.
    pub const FIN: u8 = 1;
    /// Synchronise.
    pub const SYN: u8 = 2;
    /// Reset.
    pub const RST: u8 = 4;
    /// Acknowledge.
    pub const ACK: u8 = 16;
}

/// An Ethernet address.
pub type Mac = [u8; 6];

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;

/// A frame in the making.
#[derive(Clone, Debug)]
pub struct Frame {
    destination: Mac,
    source: Mac,
    addresses: Option<(IpAddr, IpAddr)>,
    ttl: u8,
    /// IPv4 options, padded to words by `build`.
    options: Vec<u8>,
    /// IPv6 extension headers: kind and bytes, whose first byte `build` fills in.
    extensions: Vec<(u8, Vec<u8>)>,
    /// Identification, offset in bytes, more to come.
    fragment: Option<(u32, u16, bool)>,
    protocol: u8,
    transport: Vec<u8>,
    /// Where the transport checksum stands, if there is one.
    checksum_at: Option<usize>,
    ethertype: Option<u16>,
}

fn address(text: &str) -> IpAddr {
    match text.parse() {
        Ok(address) => address,
        Err(_) => panic!("`{text}` is no address"),
    }
}

impl Frame {
    /// A frame between two Ethernet addresses.
    #[must_use]
    pub fn new(destination: Mac, source: Mac) -> Self {
        Self {
            destination,
            source,
            addresses: None,
            ttl: 64,
            options: Vec::new(),
            extensions: Vec::new(),
            fragment: None,
            protocol: 59,
            transport: Vec::new(),
            checksum_at: None,
            ethertype: None,
        }
    }

    /// Source and destination address, of one family.
    #[must_use]
    pub fn ip(mut self, source: &str, destination: &str) -> Self {
        self.addresses = Some((address(source), address(destination)));
        self
    }

    /// TTL or hop limit.
    #[must_use]
    pub fn ttl(mut self, ttl: u8) -> Self {
        self.ttl = ttl;
        self
    }

    /// IPv4 options.
    #[must_use]
    pub fn options(mut self, options: &[u8]) -> Self {
        self.options = options.to_vec();
        self
    }

    /// An IPv6 extension header: its kind, and its bytes, the first of which is filled in.
    #[must_use]
    pub fn extension(mut self, kind: u8, bytes: &[u8]) -> Self {
        self.extensions.push((kind, bytes.to_vec()));
        self
    }

    /// Makes it a fragment: identification, offset in bytes (a multiple of eight), whether more follow.
    #[must_use]
    pub fn fragment(mut self, id: u32, offset: u16, more: bool) -> Self {
        self.fragment = Some((id, offset, more));
        self
    }

    /// A TCP header.
    #[must_use]
    pub fn tcp(mut self, source: u16, destination: u16, flags: u8) -> Self {
        self.protocol = TCP;
        self.transport = [&source.to_be_bytes()[..], &destination.to_be_bytes()].concat();
        self.transport.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
        self.checksum_at = Some(16);
        self
    }

    /// A UDP header.
    #[must_use]
    pub fn udp(mut self, source: u16, destination: u16) -> Self {
        self.protocol = UDP;
        self.transport = [&source.to_be_bytes()[..], &destination.to_be_bytes(), &[0; 4]].concat();
        self.checksum_at = Some(6);
        self
    }

    /// An ICMP message of either family: type, code, the four bytes after the checksum.
    #[must_use]
    pub fn icmp(mut self, kind: u8, code: u8, rest: [u8; 4]) -> Self {
        let v6 = self.addresses.is_some_and(|(source, _)| source.is_ipv6());
        self.protocol = if v6 { ICMPV6 } else { ICMP };
        self.transport = [&[kind, code, 0, 0][..], &rest].concat();
        self.checksum_at = Some(2);
        self
    }

    /// Any other protocol.
    #[must_use]
    pub fn protocol(mut self, protocol: u8) -> Self {
        self.protocol = protocol;
        self
    }

    /// More bytes.
    #[must_use]
    pub fn payload(mut self, bytes: &[u8]) -> Self {
        self.transport.extend(bytes);
        self
    }

    /// A frame that is not IP: Ethernet type and what follows.
    #[must_use]
    pub fn raw(mut self, ethertype: u16, bytes: &[u8]) -> Self {
        self.ethertype = Some(ethertype);
        self.transport = bytes.to_vec();
        self
    }

    /// An ARP message: operation, sender, target.
    #[must_use]
    pub fn arp(self, operation: u16, sender: (Mac, &str), target: (Mac, &str)) -> Self {
        let octets = |text: &str| match address(text) {
            IpAddr::V4(v4) => v4.octets(),
            IpAddr::V6(_) => panic!("ARP is for IPv4"),
        };
        let mut bytes = vec![0, 1, 8, 0, 6, 4];
        bytes.extend(operation.to_be_bytes());
        bytes.extend(sender.0);
        bytes.extend(octets(sender.1));
        bytes.extend(target.0);
        bytes.extend(octets(target.1));
        self.raw(0x0806, &bytes)
    }

    /// A neighbour solicitation (135) or advertisement (136) for `target`, with a link-layer address option of `kind`.
    #[must_use]
    pub fn neighbour(self, message: u8, target: &str, option: Option<(u8, Mac)>) -> Self {
        let IpAddr::V6(target) = address(target) else { panic!("neighbour discovery is for IPv6") };
        let mut frame = self.ttl(255).icmp(message, 0, [0; 4]).payload(&target.octets());
        if let Some((kind, mac)) = option {
            frame = frame.payload(&[kind, 1]).payload(&mac);
        }
        frame
    }

    /// Sets the transport checksum.
    fn sum(&self, transport: &mut [u8]) {
        let (Some(at), Some((source, destination))) = (self.checksum_at, self.addresses) else { return };
        let mut summed = Vec::new();
        match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) if self.protocol != ICMP => {
                summed.extend(source.octets());
                summed.extend(destination.octets());
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                summed.extend(source.octets());
                summed.extend(destination.octets());
            }
            _ => {}
        }
        if !summed.is_empty() {
            summed.extend([0, self.protocol]);
            summed.extend((transport.len() as u16).to_be_bytes());
        }
        summed.extend(&*transport);
        transport[at..at + 2].copy_from_slice(&(!fold(&summed)).to_be_bytes());
    }

    /// The bytes.
    #[must_use]
    pub fn build(&self) -> Vec<u8> {
        let mut bytes = [self.destination, self.source].concat();
        let mut transport = self.transport.clone();
        if let Some(ethertype) = self.ethertype {
            bytes.extend(ethertype.to_be_bytes());
            bytes.extend(transport);
            return bytes;
        }
        if self.protocol == UDP && self.fragment.is_none() && self.checksum_at.is_some() {
            let length = (transport.len() as u16).to_be_bytes();
            transport[4..6].copy_from_slice(&length);
        }
        if self.fragment.is_none() {
            self.sum(&mut transport);
        }
        match self.addresses {
            Some((IpAddr::V4(source), IpAddr::V4(destination))) => {
                self.build_v4(&mut bytes, source, destination, &transport);
            }
            Some((IpAddr::V6(source), IpAddr::V6(destination))) => {
                self.build_v6(&mut bytes, source, destination, &transport);
            }
            _ => panic!("a frame needs two addresses of one family"),
        }
        bytes
    }

    fn build_v4(&self, bytes: &mut Vec<u8>, source: Ipv4Addr, destination: Ipv4Addr, transport: &[u8]) {
        bytes.extend([0x08, 0x00]);
        let mut options = self.options.clone();
        options.resize(options.len().next_multiple_of(4), 0);
        let words = 5 + options.len() / 4;
        let length = (words * 4 + transport.len()) as u16;
        let (id, offset, more) = self.fragment.unwrap_or((0x1234, 0, false));
        let fragment = (offset / 8) | if more { 0x2000 } else { 0 } | if self.fragment.is_none() { 0x4000 } else { 0 };
        let mut header = vec![0x40 | words as u8, 0];
        header.extend(length.to_be_bytes());
        header.extend((id as u16).to_be_bytes());
        header.extend(fragment.to_be_bytes());
        header.extend([self.ttl, self.protocol, 0, 0]);
        header.extend(source.octets());
        header.extend(destination.octets());
        header.extend(options);
        let sum = !fold(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        bytes.extend(header);
        bytes.extend(transport);
    }

    fn build_v6(&self, bytes: &mut Vec<u8>, source: Ipv6Addr, destination: Ipv6Addr, transport: &[u8]) {
        bytes.extend([0x86, 0xdd]);
        let mut extensions = self.extensions.clone();
        if let Some((id, offset, more)) = self.fragment {
            let field = offset | u16::from(more);
            extensions.push((44, [&[0, 0][..], &field.to_be_bytes(), &id.to_be_bytes()].concat()));
        }
        let kinds: Vec<u8> = extensions.iter().map(|(kind, _)| *kind).chain([self.protocol]).collect();
        let mut body = Vec::new();
        for (i, (_, extension)) in extensions.iter().enumerate() {
            let at = body.len();
            body.extend(extension);
            body[at] = kinds[i + 1];
        }
        body.extend(transport);
        bytes.extend([0x60, 0, 0, 0]);
        bytes.extend((body.len() as u16).to_be_bytes());
        bytes.extend([kinds[0], self.ttl]);
        bytes.extend(source.octets());
        bytes.extend(destination.octets());
        bytes.extend(body);
    }
}

/// The ones' complement sum (RFC 1071).
fn fold(bytes: &[u8]) -> u16 {
    let mut total: u32 =
        bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]))).sum();
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

/// Destination and source Ethernet address of a frame.
#[must_use]
pub fn macs(frame: &[u8]) -> (Mac, Mac) {
    let mac = |at: usize| std::array::from_fn(|i| frame[at + i]);
    (mac(0), mac(6))
}

/// TTL or hop limit of a frame.
#[must_use]
pub fn ttl(frame: &[u8]) -> u8 {
    if frame[12..14] == [0x08, 0x00] { frame[22] } else { frame[21] }
}

/// Whether the IPv4 header checksum is right; always true for IPv6.
#[must_use]
pub fn header_checksum_is_right(frame: &[u8]) -> bool {
    frame[12..14] != [0x08, 0x00] || fold(&frame[14..14 + usize::from(frame[14] & 0x0f) * 4]) == 0xffff
}

/// Whether all checksums of an unfragmented frame without options or extension headers are right.
#[must_use]
pub fn checksums_are_right(frame: &[u8]) -> bool {
    let (addresses, protocol, at) = match frame[14] >> 4 {
        4 => (&frame[26..34], frame[23], 34),
        _ => (&frame[22..54], frame[20], 54),
    };
    let mut covered = Vec::new();
    if protocol != ICMP {
        covered.extend(addresses);
        covered.extend([0, protocol]);
        covered.extend(((frame.len() - at) as u16).to_be_bytes());
    }
    covered.extend(&frame[at..]);
    header_checksum_is_right(frame) && fold(&covered) == 0xffff
}

/// What an ICMP error quotes of a frame: its IP packet.
#[must_use]
pub fn quoted(frame: &[u8]) -> &[u8] {
    &frame[14..]
}
