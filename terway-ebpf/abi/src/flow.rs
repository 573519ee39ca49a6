//! The flow table: what an established packet needs, found with one lookup.

use core::mem::offset_of;

use crate::{MacPair, pod};

/// Hook of a flow key: the packet came in through the interface (from the pod, or from the VPC).
pub const HOOK_IN: u8 = 0;
/// Hook of a flow key: the packet goes out through the host end of a pod's veth.
pub const HOOK_TO_POD: u8 = 1;

/// What identifies a flow, at one hook of one interface.
///
/// The interface is part of the key, so an entry that was made after the source check vouches for the source of every packet
/// that finds it. 24 and 48 bytes: the kernel hashes words and compares eight bytes at a time (`htab_map_hash`,
/// `lookup_nulls_elem_raw`, kernel/bpf/hashtab.c).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey<A> {
    /// Source address.
    pub src: A,
    /// Destination address.
    pub dst: A,
    /// Source port, then destination port, as in the packet. Echo requests have their identifier in place of the source port,
    /// echo replies in place of the destination port. 0 where there are no ports.
    pub ports: u32,
    /// The interface of the hook.
    pub ifindex: u32,
    /// The IP protocol number, and the hook ([`HOOK_IN`] …) in the second byte.
    pub class: u32,
    /// Zero; room for a network id.
    pub spare: u32,
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

    /// The hook.
    pub const fn hook(&self) -> u8 {
        (self.class >> 8) as u8
    }

    /// Source and destination port as numbers.
    pub const fn port_numbers(&self) -> (u16, u16) {
        let [a, b, c, d] = self.ports.to_ne_bytes();
        (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
    }
}

/// What is done with a flow's packets.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Handed to the host stack.
    Stack = 0,
    /// Delivered into the pod whose host end is `oif`.
    Local = 1,
    /// Sent by the ENI `oif` to the next hop.
    Vpc = 2,
}

/// A next hop as `struct bpf_redir_neigh` (include/uapi/linux/bpf.h) wants it, so that the helper reads it in place.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nexthop {
    /// `AF_INET` or `AF_INET6`; 0 if there is none.
    pub family: u32,
    /// The address; of an IPv4 address only the first word is used.
    pub address: [u32; 4],
}

/// What is known of a flow, in one direction.
///
/// Entries of the two directions of a connection are made together. Counters are plain additions: two CPUs that handle one
/// flow at once may lose some, which saves a locked instruction for each packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow<A> {
    /// Packets seen.
    pub packets: u64,
    /// Bytes seen, Ethernet headers included.
    pub bytes: u64,
    /// What must stand in the frame's Ethernet header. Compared for packets from pods only.
    pub expect: MacPair,
    /// What is written into the frame's Ethernet header before [`Action::Local`]; without meaning for the others.
    pub write: MacPair,
    /// An [`Action`].
    pub action: u32,
    /// The interface of [`Action::Local`] and [`Action::Vpc`]; without meaning for the other.
    pub oif: u32,
    /// Slots of what decided the source and the destination.
    pub slots: [u32; 2],
    /// What the epoch map held at those slots: the entry is void as soon as it holds something else.
    pub epochs: [u32; 2],
    /// Bits of [`flow_flags`].
    pub flags: u32,
    /// Jiffies of the last packet, at most a second old while packets flow.
    pub last_seen: u32,
    /// Jiffies of the first packet.
    pub created: u32,
    /// Zero; room for the backend of a Service.
    pub spare: u32,
    /// Where [`Action::Vpc`] sends it; without meaning for the others.
    pub nexthop: Nexthop,
    /// Zero; room for the ports that a Service rewrites to, as in the packet.
    pub rewrite_ports: u32,
    /// Zero; room for the source address that a Service rewrites to.
    pub rewrite_src: A,
    /// Zero; room for the destination address that a Service rewrites to.
    pub rewrite_dst: A,
}

/// A flow of IPv4.
pub type FlowV4 = Flow<u32>;
/// A flow of IPv6.
pub type FlowV6 = Flow<[u32; 4]>;

pod!(FlowKeyV4: 24, FlowKeyV6: 48, Nexthop: 20, FlowV4: 112, FlowV6: 136);
const _: () = assert!(offset_of!(FlowV4, nexthop) == 80 && offset_of!(FlowV6, nexthop) == 80);

/// Bits of [`Flow::flags`].
pub mod flow_flags {
    /// This direction answers: the first packet went the other way.
    pub const REVERSE: u32 = 1;
    /// TCP: a SYN was seen in this direction.
    pub const SYN: u32 = 1 << 1;
    /// TCP: a FIN was seen in this direction.
    pub const FIN: u32 = 1 << 2;
    /// TCP: an RST was seen in this direction.
    pub const RST: u32 = 1 << 3;
    /// A packet was seen in this direction, so the entry is not only the other one's shadow.
    pub const SEEN: u32 = 1 << 4;
}

/// What fragments of one packet have in common (RFC 791 section 3.2, RFC 8200 section 4.5), and where they came in.
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

/// What the later fragments of a packet lack.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FragmentValue {
    /// The ports of the first fragment, as in the packet.
    pub ports: u32,
    /// Jiffies when it was seen.
    pub seen: u32,
}

pod!(FragmentKeyV4: 24, FragmentKeyV6: 48, FragmentValue: 8);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_and_class_unpack() {
        let key = FlowKeyV4 {
            src: 0,
            dst: 0,
            ports: u32::from_ne_bytes([0x01, 0xbb, 0x80, 0x00]),
            ifindex: 3,
            class: 6 | (HOOK_TO_POD as u32) << 8,
            spare: 0,
        };
        assert_eq!((key.port_numbers(), key.protocol(), key.hook()), ((443, 32768), 6, HOOK_TO_POD));
    }
}
