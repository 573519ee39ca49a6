//! The flow table: what an established packet needs, found with one lookup.
//!
//! A connection is one entry, which serves both directions: half the insertions, evictions and memory of an entry for each.

use core::mem::offset_of;

use crate::{MacPair, pod};

/// Hook of a flow's side: the packet came in through the interface (from the pod, or from the VPC).
pub const HOOK_IN: u8 = 0;
/// Hook of a flow's side: the packet goes out through the host end of a pod's veth.
pub const HOOK_TO_POD: u8 = 1;
/// Hook of a flow's side: the packet goes out through an ENI, from the host stack.
pub const HOOK_TO_VPC: u8 = 2;

/// Bit of [`FlowKey::class`]: the entry of a connection whose place the answers of another one have taken, which look the same.
/// Only the slow path looks here.
pub const MOVED: u32 = 1 << 8;

/// What identifies a connection: its two ends, in an order that does not depend on which of them sends.
///
/// The low end is the lesser one as a number whose digits are the native words of its address, the last word counting most, and
/// then its port as a native number. 16 and 40 bytes: the kernel hashes words and compares eight bytes at a time
/// (`htab_map_hash`, `lookup_nulls_elem_raw`, kernel/bpf/hashtab.c).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey<A> {
    /// Address of the low end.
    pub low: A,
    /// Address of the high end.
    pub high: A,
    /// Port of the low end, then port of the high end, as in the packet. Echo requests and replies have their identifier in place
    /// of the port of the end that asks. 0 where there are no ports.
    pub ports: u32,
    /// The IP protocol number; [`MOVED`]; the other bits are zero, and room for a network id.
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

    /// The ports of the low and the high end as numbers.
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

/// One direction of a flow: the packets that one end sends.
///
/// Counters are plain additions: two CPUs that handle one direction at once may lose some, which saves a locked instruction for
/// each packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Side {
    /// Packets seen.
    pub packets: u64,
    /// Bytes seen, Ethernet headers included.
    pub bytes: u64,
    /// Jiffies of the last packet.
    pub last_seen: u32,
    /// Bits of [`flow_flags`].
    pub flags: u32,
    /// The interface at which such packets are met. It is compared, so an entry that was made after the source check vouches for
    /// the source of every packet that uses it.
    pub ifindex: u32,
    /// The hook there ([`HOOK_IN`] …). Compared too.
    pub hook: u32,
    /// What must stand in the frame's Ethernet header. Compared for packets from pods only.
    pub expect: MacPair,
    /// An [`Action`].
    pub action: u32,
    /// The interface of [`Action::Local`] and [`Action::Vpc`]; without meaning for the other.
    pub oif: u32,
    /// Where [`Action::Vpc`] sends it. For [`Action::Local`] the first three words are the [`MacPair`] that is written into the
    /// frame's Ethernet header. Without meaning for the other.
    pub way: Nexthop,
}

/// What is known of a flow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow<A> {
    /// What the end sends whose packet made the entry, and what the other end sends.
    pub sides: [Side; 2],
    /// Slots of what decided its two ends, that of the maker first.
    pub slots: [u32; 2],
    /// What the epoch map held at those slots: the entry is void as soon as it holds something else, or to be judged again if only
    /// [`crate::POLICY_EPOCH`] differs.
    pub epochs: [u32; 2],
    /// Jiffies of the first packet.
    pub created: u32,
    /// Which end made the entry: 0 for the low one, 1 for the high one.
    pub maker: u32,
    /// The backend of a Service that it goes to or comes from; [`crate::NO_BACKEND`] if it has none.
    pub backend: u32,
    /// What [`crate::Backend::generation`] was: the entry is void as soon as it is something else.
    pub generation: u32,
    /// [`crate::Frontend::service`]; without meaning if there is no backend.
    pub service: u32,
    /// With [`flow_flags::TRANSLATE`]: the ports that the packet gets.
    pub ports: u32,
    /// The source address that it gets.
    pub src: A,
    /// The destination address that it gets.
    pub dst: A,
    /// What that adds to the ones' complement sum of the addresses.
    pub sum_addresses: u32,
    /// And to that of the ports.
    pub sum_ports: u32,
}

/// A flow of IPv4.
pub type FlowV4 = Flow<u32>;
/// A flow of IPv6.
pub type FlowV6 = Flow<[u32; 4]>;

pod!(FlowKeyV4: 16, FlowKeyV6: 40, Nexthop: 20, Side: 72, FlowV4: 200, FlowV6: 224);
const _: () = assert!(offset_of!(Side, way) == 52 && offset_of!(FlowV4, slots) == 144);

/// Bits of [`Side::flags`].
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
    /// Packets of this direction get other addresses and ports. Their answers have an entry of their own.
    pub const TRANSLATE: u32 = 1 << 5;
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
        let key = FlowKeyV4 { low: 0, high: 0, ports: u32::from_ne_bytes([0x01, 0xbb, 0x80, 0x00]), class: 6 };
        assert_eq!((key.port_numbers(), key.protocol()), ((443, 32768), 6));
    }
}
