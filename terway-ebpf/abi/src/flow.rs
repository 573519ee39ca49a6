//! The flow table: conntrack entries with the forwarding decision of both directions, found with one lookup.
//!
//! A connection without NAT has one entry for both directions: half the insertions, evictions and memory of one entry for each. A
//! connection with NAT has two entries, because the tuples of original and reply packets differ.

use core::mem::offset_of;

use crate::{MacPair, pod};

/// Hook of a direction: ingress of the interface (packets from the pod, or from the VPC).
pub const HOOK_INGRESS: u8 = 0;
/// Hook of a direction: egress of the host end of a pod's veth (packets to the pod).
pub const HOOK_TO_POD: u8 = 1;
/// Hook of a direction: egress of an ENI (packets of the host stack).
pub const HOOK_TO_VPC: u8 = 2;

/// Bit of [`FlowKey::class`]: the key of a connection whose own tuple collides with the reply tuple of a NAT connection. Such a connection
/// has another source port on the wire. Looked up in the slow path only.
pub const PORT_REMAPPED: u32 = 1 << 8;

/// The key of a flow entry: the tuple, with the two ends in an order that does not depend on the direction of the packet.
///
/// The low end is the one with the smaller address and port, compared as numbers: the native words of the address, the last word most
/// significant, then the port. 16 and 40 bytes: the kernel hashes words and compares eight bytes at a time (`htab_map_hash`,
/// `lookup_nulls_elem_raw`, kernel/bpf/hashtab.c).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey<A> {
    /// Address of the low end.
    pub low: A,
    /// Address of the high end.
    pub high: A,
    /// Port of the low end, then port of the high end, as in the packet. ICMP echo has its identifier in place of the requester's port.
    /// 0 for protocols without ports.
    pub ports: u32,
    /// The IP protocol number; [`PORT_REMAPPED`]; the other bits are zero, reserved for a network id.
    pub class: u32,
}

/// A flow key of IPv4.
pub type FlowKeyV4 = FlowKey<u32>;
/// A flow key of IPv6.
pub type FlowKeyV6 = FlowKey<[u32; 4]>;

impl<A> FlowKey<A> {
    /// The IP protocol number.
    pub const fn protocol(&self) -> u8 {
        self.class as u8
    }

    /// The ports of the low and the high end in host byte order.
    pub const fn port_numbers(&self) -> (u16, u16) {
        let [a, b, c, d] = self.ports.to_ne_bytes();
        (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
    }
}

/// The forwarding action for a flow's packets.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Pass to the host stack.
    Stack = 0,
    /// Redirect into the local pod whose host end is `oif`.
    Local = 1,
    /// Redirect to the next hop through the ENI `oif`.
    Vpc = 2,
}

/// A next hop in the layout of `struct bpf_redir_neigh` (include/uapi/linux/bpf.h): the helper reads it in place.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nexthop {
    /// `AF_INET` or `AF_INET6`; 0 if there is no next hop.
    pub family: u32,
    /// The address of the next hop; IPv4 uses the first word only.
    pub address: [u32; 4],
}

/// One direction of a flow: counters and forwarding decision for the packets of one end.
///
/// Counters are plain additions: if two CPUs handle one direction at once, some counts may be lost. This saves an atomic instruction for
/// each packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowDirection {
    /// Packets seen.
    pub packets: u64,
    /// Bytes seen, Ethernet headers included.
    pub bytes: u64,
    /// Jiffies of the last packet.
    pub last_seen: u32,
    /// Bits of [`flow_flags`].
    pub flags: u32,
    /// Interface at which packets of this direction arrive. Compared for each packet: the source check at creation of the entry then holds
    /// for every packet that matches it.
    pub ifindex: u32,
    /// Hook at that interface ([`HOOK_INGRESS`] …). Compared for each packet.
    pub hook: u32,
    /// Expected MAC addresses of the frame. Compared for packets from pods only.
    pub expected_macs: MacPair,
    /// The [`Action`] by number.
    pub action: u32,
    /// Output interface of [`Action::Local`] and [`Action::Vpc`]; unused otherwise.
    pub oif: u32,
    /// Next hop of [`Action::Vpc`]. For [`Action::Local`] the first three words are the [`MacPair`] written into the frame. Unused otherwise.
    pub nexthop: Nexthop,
}

/// A flow entry: both directions, the epochs that it depends on, and the NAT of its initiator's direction.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow<A> {
    /// The initiator's direction, then the direction of the other end. The initiator is the end whose packet created the entry.
    pub directions: [FlowDirection; 2],
    /// Epoch slots of the initiator and of the other end.
    pub slots: [u32; 2],
    /// Epochs of these slots when the entry was created or last checked. The entry is invalid if a route epoch differs, and its policy
    /// verdict is stale if only [`crate::POLICY_EPOCH_MASK`] differs.
    pub epochs: [u32; 2],
    /// Jiffies of the first packet.
    pub created: u32,
    /// The initiator: 0 for the low end of the key, 1 for the high end.
    pub initiator: u32,
    /// Index of the Service backend that the connection was sent to; [`crate::NO_BACKEND`] if there is none.
    pub backend: u32,
    /// [`crate::Backend::generation`] when the entry was created; the entry is invalid if it differs.
    pub generation: u32,
    /// [`crate::Frontend::service`]; unused without a backend.
    pub service: u32,
    /// With [`flow_flags::NAT`]: ports after translation, as in the packet.
    pub nat_ports: u32,
    /// Source address after translation.
    pub nat_src: A,
    /// Destination address after translation.
    pub nat_dst: A,
    /// Change of the ones' complement sum by the address translation, for checksum updates.
    pub address_delta: u32,
    /// Change of the ones' complement sum by the port translation.
    pub port_delta: u32,
}

/// A flow entry of IPv4.
pub type FlowV4 = Flow<u32>;
/// A flow entry of IPv6.
pub type FlowV6 = Flow<[u32; 4]>;

pod!(FlowKeyV4: 16, FlowKeyV6: 40, Nexthop: 20, FlowDirection: 72, FlowV4: 200, FlowV6: 224);
const _: () = assert!(offset_of!(FlowDirection, nexthop) == 52 && offset_of!(FlowV4, slots) == 144);

/// Bits of [`FlowDirection::flags`].
pub mod flow_flags {
    /// This is the reply direction: the connection's first packet went the other way.
    pub const REPLY: u32 = 1;
    /// TCP: a SYN was seen in this direction.
    pub const SYN: u32 = 1 << 1;
    /// TCP: a FIN was seen in this direction.
    pub const FIN: u32 = 1 << 2;
    /// TCP: an RST was seen in this direction.
    pub const RST: u32 = 1 << 3;
    /// A packet was seen in this direction.
    pub const SEEN: u32 = 1 << 4;
    /// Packets of this direction are translated (NAT). The packets of the other direction have an entry of their own.
    pub const NAT: u32 = 1 << 5;
}

/// The key of a fragmented packet (RFC 791 section 3.2, RFC 8200 section 4.5) at one hook.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FragmentKey<A> {
    /// Source address.
    pub src: A,
    /// Destination address.
    pub dst: A,
    /// The identification field as in the packet; IPv4's 16 bits are widened with zeros.
    pub id: u32,
    /// The interface of the hook.
    pub ifindex: u32,
    /// The IP protocol number, and the hook in the second byte.
    pub class: u32,
    /// Zero.
    pub spare: u32,
}

/// A fragment key of IPv4.
pub type FragmentKeyV4 = FragmentKey<u32>;
/// A fragment key of IPv6.
pub type FragmentKeyV6 = FragmentKey<[u32; 4]>;

/// The ports of a fragmented packet, known from its first fragment.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FragmentValue {
    /// The ports of the first fragment, as in the packet.
    pub ports: u32,
    /// Jiffies when the first fragment was seen.
    pub seen: u32,
}

pod!(FragmentKeyV4: 24, FragmentKeyV6: 48, FragmentValue: 8);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flow_key_unpacks_ports_and_protocol() {
        let key = FlowKeyV4 { low: 0, high: 0, ports: u32::from_ne_bytes([0x01, 0xbb, 0x80, 0x00]), class: 6 };
        assert_eq!((key.port_numbers(), key.protocol()), ((443, 32768), 6));
    }
}
