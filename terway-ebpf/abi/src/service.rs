//! Services: frontends, the backends behind them, and what is remembered of choices.
//!
//! A frontend's value is replaced whole, by one atomic map update, and names a run of [`Member`]s; so the order of writes in which
//! no packet meets half a Service is: backends, run (in a place that nobody reads), frontend; and back for removal: frontend, then,
//! a second later, run, then the backend with its generation raised. A run is never written while a frontend names it, nor within
//! a second after: a program that is running may still read it.

use core::mem::offset_of;

use crate::pod;

/// What a packet is looked up by to find whether it is for a Service.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FrontendKey<A> {
    /// The address as in the packet; all 0 with [`SCOPE_NODE`].
    pub address: A,
    /// The port as in the packet, in the first two bytes; the IP protocol number; the scope ([`SCOPE_ADDRESS`] …).
    ///
    /// With port and protocol 0 the entry stands for the address itself: that it is a Service's, so that a port which none of its
    /// Services has is refused and not sent on. Its value has a count of 0.
    pub class: u32,
}

/// A frontend key of IPv4.
pub type FrontendKeyV4 = FrontendKey<u32>;
/// A frontend key of IPv6.
pub type FrontendKeyV6 = FrontendKey<[u32; 4]>;

/// The frontend is an address: ClusterIP, ExternalIP, LoadBalancer IP, or a hostPort with an address.
pub const SCOPE_ADDRESS: u8 = 0;
/// The frontend is a port of whatever address the node has: NodePort, or a hostPort without an address.
pub const SCOPE_NODE: u8 = 1;

/// The class of a frontend key: `port` as in the packet.
#[must_use]
pub const fn frontend_class(port: u16, protocol: u8, scope: u8) -> u32 {
    let [high, low] = port.to_ne_bytes();
    u32::from_ne_bytes([high, low, protocol, scope])
}

/// A run of [`Member`]s: entries `first .. first + count` of the member map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Run {
    /// Index of the first.
    pub first: u32,
    /// How many; 0 refuses the connection. For [`frontend_flags::MAGLEV`] the size of the table, else a backend of weight n stands
    /// n times in it.
    pub count: u32,
}

/// A port of a Service at one address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frontend {
    /// A number that no other Service port has as long as this one lives: affinity and counters go by it.
    pub service: u32,
    /// Bits of [`frontend_flags`].
    pub flags: u32,
    /// For clients in the cluster: pods and the node itself (internalTrafficPolicy).
    pub internal: Run,
    /// For clients outside (externalTrafficPolicy).
    pub external: Run,
    /// Seconds that a client stays with its backend after its last new connection; 0 without session affinity.
    pub affinity: u32,
    /// Zero.
    pub spare: u32,
}

/// Bits of [`Frontend::flags`].
pub mod frontend_flags {
    /// Members are chosen by a hash of the packet's addresses and ports (of the address only with affinity), not at random.
    pub const MAGLEV: u32 = 1;
    /// Of two random members the one with fewer connections is taken.
    pub const LEAST: u32 = 1 << 1;
    /// Clients outside must be in the source ranges of `service`.
    pub const RANGES: u32 = 1 << 2;
    /// Not served to clients outside (a ClusterIP): their packets are left to the host stack.
    pub const INTERNAL: u32 = 1 << 3;
    /// externalTrafficPolicy is Local: the client's address is kept, and all external backends are of this node.
    pub const LOCAL: u32 = 1 << 4;
    /// Refused packets are dropped in silence (externalTrafficPolicy Local without a local backend), not answered.
    pub const SILENT: u32 = 1 << 5;
    /// Not served to clients in the cluster (`in_cluster_loadbalance` is off): their packets go on to the load balancer.
    pub const EXTERNAL: u32 = 1 << 6;
}

/// A place in a run: which backend, and in which of its lives. 0 and 0 is nobody.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Member {
    /// Index into the backend map.
    pub backend: u32,
    /// [`Backend::generation`].
    pub generation: u32,
}

/// Where connections are sent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backend {
    /// Address; IPv4 in the first word.
    pub address: [u32; 4],
    /// Port as in the packet.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Bits of [`backend_flags`].
    pub flags: u8,
    /// Raised when the backend goes, and never 0 while there is one: every flow, affinity and socket that names another is void.
    pub generation: u32,
    /// Zero.
    pub spare: [u32; 2],
}

/// Bits of [`Backend::flags`].
pub mod backend_flags {
    /// The address is of IPv6.
    pub const V6: u8 = 1;
    /// The backend is a pod of this node, or the node itself.
    pub const LOCAL: u8 = 1 << 1;
    /// The backend is ending, or not ready: its flows go on, and nothing new comes to it, affinity or not, unless a run says so.
    pub const ENDING: u8 = 1 << 2;
}

/// The backend that is none.
pub const NO_BACKEND: u32 = 0;

/// Who is held to a backend.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AffinityKey {
    /// The client's address (IPv4 in the first word), or, for sockets, the cookie of its network namespace in the first two.
    pub client: [u32; 4],
    /// [`Frontend::service`].
    pub service: u32,
    /// 4 or 6, or 0 for a cookie.
    pub kind: u32,
}

/// To which, and since when.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Affinity {
    /// The backend and its life.
    pub member: Member,
    /// Jiffies of the client's last new connection.
    pub last_used: u32,
    /// Zero.
    pub spare: u32,
}

/// A socket and whom it really talks to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SocketKey {
    /// The socket's cookie, low word first.
    pub cookie: [u32; 2],
    /// The backend's address; IPv4 in the first word.
    pub address: [u32; 4],
    /// The backend's port as in the packet, in the first two bytes; 4 or 6; the IP protocol number.
    pub class: u32,
    /// [`TO_BACKEND`] or [`TO_FRONTEND`].
    pub kind: u32,
}

/// The key names a backend, the value the frontend that the application believes to talk to.
pub const TO_BACKEND: u32 = 0;
/// The key names a frontend to which a socket has sent a datagram without being connected, the value the backend that it got: the next
/// datagram goes there, too, as long as the backend lives.
pub const TO_FRONTEND: u32 = 1;

/// The other name of the peer in a [`SocketKey`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketValue {
    /// The frontend's address, or with [`TO_FRONTEND`] the backend's; IPv4 in the first word.
    pub address: [u32; 4],
    /// Its port as in the packet, in the first two bytes.
    pub port: u32,
    /// [`Frontend::service`].
    pub service: u32,
    /// The backend and its life.
    pub member: Member,
    /// The cookie of the socket's network namespace, low word first.
    pub netns: [u32; 2],
}

/// Where the data of the source-range tries begins: the service, then the address. A prefix of n bits has a length of 32 + n.
pub type SourceRangeV4 = [u32; 2];
/// As [`SourceRangeV4`].
pub type SourceRangeV6 = [u32; 5];

pod!(FrontendKeyV4: 8, FrontendKeyV6: 20, Run: 8, Frontend: 32, Member: 8, Backend: 32);
pod!(AffinityKey: 24, Affinity: 16, SocketKey: 32, SocketValue: 40);
const _: () = assert!(offset_of!(Backend, generation) == 20 && offset_of!(Frontend, external) == 16);

/// Entries of the filter: how many frontends have an address of this bucket. Most packets are for no Service, and learn that here.
pub const FILTER: u32 = 65_536;

/// The bucket of an IPv4 address in the filter.
#[must_use]
pub const fn filter_v4(address: u32) -> u32 {
    address.wrapping_mul(0x9e37_79b9) >> (32 - FILTER.trailing_zeros())
}

/// The bucket of an IPv6 address in the filter.
#[must_use]
pub const fn filter_v6(address: [u32; 4]) -> u32 {
    let [a, b, c, d] = address;
    filter_v4((a ^ b.rotate_left(8)).wrapping_mul(0x85eb_ca6b) ^ (c ^ d.rotate_left(16)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_class_keeps_the_port_as_it_stands_in_the_packet() {
        let class = frontend_class(u16::from_ne_bytes([0x01, 0xbb]), 6, SCOPE_NODE);
        assert_eq!(class.to_ne_bytes(), [0x01, 0xbb, 6, 1]);
    }

    #[test]
    fn addresses_spread_over_the_filter() {
        // Consecutive ClusterIPs, and consecutive IPv6 ones, share no more buckets than chance would have them share.
        let (mut v4, mut v6) = ([false; FILTER as usize], [false; FILTER as usize]);
        for n in 0..30_000_u32 {
            v4[filter_v4((0x0a60_0000 + n).to_be()) as usize] = true;
            v6[filter_v6([0xfd00_u32.to_be(), 0, 0, n.to_be()]) as usize] = true;
        }
        for seen in [v4, v6] {
            // 65 536 · (1 - e^(-30000/65536)) = 24 100.
            assert!(seen.iter().filter(|s| **s).count() > 20_000);
        }
    }
}
