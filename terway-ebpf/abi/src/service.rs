//! Services: frontends, backends, session affinity and socket translations.
//!
//! A frontend is replaced whole, by one atomic map update, and refers to a range of [`BackendRef`]s. Write order when a Service is added:
//! backends, backend range (at unused indices), frontend. Order of removal: frontend; one second later the range; then the backend, with
//! its generation raised. A range is never written while a frontend refers to it, nor within one second after: a running program may
//! still read it.

use core::mem::offset_of;

use crate::pod;

/// The key of a frontend: address (or any address of the node), port and protocol of a Service.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FrontendKey<A> {
    /// The address in network byte order; all 0 with [`SCOPE_NODE`].
    pub address: A,
    /// The port as in the packet, in the first two bytes; the IP protocol number; the scope ([`SCOPE_ADDRESS`] …).
    ///
    /// Port and protocol 0 mark the address as a Service's: packets to a port that none of its Services has are rejected, not
    /// forwarded. The backend range of such a frontend is empty.
    pub class: u32,
}

/// A frontend key of IPv4.
pub type FrontendKeyV4 = FrontendKey<u32>;
/// A frontend key of IPv6.
pub type FrontendKeyV6 = FrontendKey<[u32; 4]>;

/// Scope of frontends with an address: ClusterIP, ExternalIP, LoadBalancer IP, or a hostPort with an address.
pub const SCOPE_ADDRESS: u8 = 0;
/// Scope of frontends at a port of every node address: NodePort, or a hostPort without an address.
pub const SCOPE_NODE: u8 = 1;

/// The class word of a frontend key; `port` is in network byte order.
#[must_use]
pub const fn frontend_class(port: u16, protocol: u8, scope: u8) -> u32 {
    let [high, low] = port.to_ne_bytes();
    u32::from_ne_bytes([high, low, protocol, scope])
}

/// A range of backend references: entries `first .. first + count` of the map [`crate::names::BACKEND_REFS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendRange {
    /// Index of the first entry.
    pub first: u32,
    /// Number of entries; 0 rejects the connection. With [`frontend_flags::MAGLEV`] the size of the Maglev table; else a backend of
    /// weight n has n entries.
    pub count: u32,
}

/// A frontend: a port of a Service at one address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frontend {
    /// Number of the Service port, unique while the port exists; key of session affinity and counters.
    pub service: u32,
    /// Bits of [`frontend_flags`].
    pub flags: u32,
    /// Backends for clients in the cluster: pods and the node itself (internalTrafficPolicy).
    pub internal: BackendRange,
    /// Backends for external clients (externalTrafficPolicy).
    pub external: BackendRange,
    /// Session affinity timeout in seconds, counted from the client's last new connection; 0 without session affinity.
    pub affinity: u32,
    /// Zero.
    pub spare: u32,
}

/// Bits of [`Frontend::flags`].
pub mod frontend_flags {
    /// The backend is selected by a hash of source address and ports (with session affinity, without the source port), not at random.
    pub const MAGLEV: u32 = 1;
    /// Of two random backends the one with fewer active connections is selected (power of two choices).
    pub const LEAST_CONNECTIONS: u32 = 1 << 1;
    /// External clients must be in the Service's loadBalancerSourceRanges.
    pub const SOURCE_RANGES: u32 = 1 << 2;
    /// Only for clients in the cluster (a ClusterIP): packets of external clients go to the host stack.
    pub const IN_CLUSTER_ONLY: u32 = 1 << 3;
    /// externalTrafficPolicy is Local: the client's address is kept, and all external backends are local to this node.
    pub const EXTERNAL_LOCAL: u32 = 1 << 4;
    /// Packets without a backend are dropped (externalTrafficPolicy Local without a local backend), not rejected.
    pub const DROP_WITHOUT_REPLY: u32 = 1 << 5;
    /// Only for external clients (`in_cluster_loadbalance` is off): packets of clients in the cluster go on to the load balancer.
    pub const EXTERNAL_ONLY: u32 = 1 << 6;
}

/// A reference to a backend in one generation. Zeros refer to no backend.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendRef {
    /// Index into the backend map; [`NO_BACKEND`] for none.
    pub backend: u32,
    /// [`Backend::generation`].
    pub generation: u32,
}

/// A backend: address, port and protocol of a Service's endpoint.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backend {
    /// Address; IPv4 in the first word.
    pub address: [u32; 4],
    /// Port in network byte order.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Bits of [`backend_flags`].
    pub flags: u8,
    /// Raised when the backend is removed, and never 0 while it exists: flow, affinity and socket entries of another generation are
    /// invalid.
    pub generation: u32,
    /// Zero.
    pub spare: [u32; 2],
}

/// Bits of [`Backend::flags`].
pub mod backend_flags {
    /// The address is an IPv6 address.
    pub const V6: u8 = 1;
    /// The backend is a pod of this node, or the node itself.
    pub const LOCAL: u8 = 1 << 1;
    /// The backend is terminating or not ready: existing flows continue; it gets new connections only if a backend range contains it.
    pub const TERMINATING: u8 = 1 << 2;
}

/// The backend index that refers to no backend.
pub const NO_BACKEND: u32 = 0;

/// The key of a session affinity entry: client and Service.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AffinityKey {
    /// The client's address (IPv4 in the first word), or, for sockets, the cookie of its network namespace in the first two.
    pub client: [u32; 4],
    /// [`Frontend::service`].
    pub service: u32,
    /// Kind of `client`: 4 or 6 for an address, 0 for a cookie.
    pub kind: u32,
}

/// A session affinity entry: the client's backend.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Affinity {
    /// The backend.
    pub backend_ref: BackendRef,
    /// Jiffies of the client's last new connection.
    pub last_used: u32,
    /// Zero.
    pub spare: u32,
}

/// The key of a socket translation: a socket and one address of its peer.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SocketKey {
    /// The socket's cookie, low word first.
    pub cookie: [u32; 2],
    /// The backend's address, or with [`SOCKET_DATAGRAM_BACKEND`] the frontend's; IPv4 in the first word.
    pub address: [u32; 4],
    /// Its port as in the packet, in the first two bytes; the address family (4 or 6); the IP protocol number.
    pub class: u32,
    /// Kind of the entry: [`SOCKET_REVERSE_NAT`] or [`SOCKET_DATAGRAM_BACKEND`].
    pub kind: u32,
}

/// Kind of reverse-NAT entries: the key holds the backend, the value the frontend that the application connected to.
pub const SOCKET_REVERSE_NAT: u32 = 0;
/// Kind of entries of unconnected datagram sockets: the key holds the frontend, the value the backend of the last datagram. The next
/// datagram is sent to the same backend while it exists.
pub const SOCKET_DATAGRAM_BACKEND: u32 = 1;

/// A socket translation: the other address of the peer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketValue {
    /// The frontend's address, or with [`SOCKET_DATAGRAM_BACKEND`] the backend's; IPv4 in the first word.
    pub address: [u32; 4],
    /// Its port as in the packet, in the first two bytes.
    pub port: u32,
    /// [`Frontend::service`].
    pub service: u32,
    /// The backend.
    pub backend_ref: BackendRef,
    /// The cookie of the socket's network namespace, low word first.
    pub netns: [u32; 2],
}

/// The data of a source range in its trie: the Service number, then the address. A prefix of n bits has a length of 32 + n.
pub type SourceRangeV4 = [u32; 2];
/// As [`SourceRangeV4`].
pub type SourceRangeV6 = [u32; 5];

pod!(FrontendKeyV4: 8, FrontendKeyV6: 20, BackendRange: 8, Frontend: 32, BackendRef: 8, Backend: 32);
pod!(AffinityKey: 24, Affinity: 16, SocketKey: 32, SocketValue: 40);
const _: () = assert!(offset_of!(Backend, generation) == 20 && offset_of!(Frontend, external) == 16);

/// Entries of the frontend filter, which holds the number of frontends per hash bucket of their address. A packet whose bucket is 0 is for
/// no Service.
pub const FRONTEND_FILTER_BUCKETS: u32 = 65_536;

/// The bucket of an IPv4 address in the frontend filter.
#[must_use]
pub const fn frontend_filter_v4(address: u32) -> u32 {
    address.wrapping_mul(0x9e37_79b9) >> (32 - FRONTEND_FILTER_BUCKETS.trailing_zeros())
}

/// The bucket of an IPv6 address in the frontend filter.
#[must_use]
pub const fn frontend_filter_v6(address: [u32; 4]) -> u32 {
    let [a, b, c, d] = address;
    frontend_filter_v4((a ^ b.rotate_left(8)).wrapping_mul(0x85eb_ca6b) ^ (c ^ d.rotate_left(16)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frontend_class_keeps_network_byte_order() {
        let class = frontend_class(u16::from_ne_bytes([0x01, 0xbb]), 6, SCOPE_NODE);
        assert_eq!(class.to_ne_bytes(), [0x01, 0xbb, 6, 1]);
    }

    #[test]
    fn frontend_filter_spreads_consecutive_addresses() {
        // Consecutive ClusterIPs, and consecutive IPv6 ones, share no more buckets than chance would have them share.
        let (mut v4, mut v6) = ([false; FRONTEND_FILTER_BUCKETS as usize], [false; FRONTEND_FILTER_BUCKETS as usize]);
        for n in 0..30_000_u32 {
            v4[frontend_filter_v4((0x0a60_0000 + n).to_be()) as usize] = true;
            v6[frontend_filter_v6([0xfd00_u32.to_be(), 0, 0, n.to_be()]) as usize] = true;
        }
        for seen in [v4, v6] {
            // 65 536 · (1 - e^(-30000/65536)) = 24 100.
            assert!(seen.iter().filter(|s| **s).count() > 20_000);
        }
    }
}
