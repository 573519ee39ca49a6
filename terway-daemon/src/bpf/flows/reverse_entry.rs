//! Reverse entries: a connection with NAT has one entry for each direction, because its packets have different tuples in each.

use terway_abi::{Flow, FlowKey, PORT_REMAPPED, flow_flags};

use super::has_nat;

/// The order of addresses in a flow key: the last word is the most significant.
pub(super) trait KeyOrder: Copy + PartialEq {
    /// Whether this address is less than the other one; `ports_are_less` decides where both are equal.
    fn is_before(&self, other: &Self, ports_are_less: bool) -> bool;
}

impl KeyOrder for u32 {
    fn is_before(&self, other: &Self, ports_are_less: bool) -> bool {
        if self == other { ports_are_less } else { self < other }
    }
}

impl KeyOrder for [u32; 4] {
    fn is_before(&self, other: &Self, ports_are_less: bool) -> bool {
        let words = self.iter().rev().zip(other.iter().rev());
        words.into_iter().find(|(a, b)| a != b).map_or(ports_are_less, |(a, b)| a < b)
    }
}

/// The key of the packets that go from `src` to `dst`, and back (`terway_ebpf::flow::flow_key`).
pub(super) fn key<A: KeyOrder>(src: A, dst: A, ports: u32, class: u32) -> FlowKey<A> {
    let (source, destination) = (ports & 0xffff, ports >> 16);
    if dst.is_before(&src, destination < source) {
        FlowKey { low: dst, high: src, ports: ports.rotate_left(16), class }
    } else {
        FlowKey { low: src, high: dst, ports, class }
    }
}

/// The keys under which the reverse entry of an entry with NAT may be stored. Two for an entry of replies: that of the original direction,
/// and, where another connection had that key already, the one with [`PORT_REMAPPED`].
pub(super) fn keys<A: KeyOrder>(own: &FlowKey<A>, flow: &Flow<A>) -> impl Iterator<Item = FlowKey<A>> + use<A> {
    let plain = key(flow.nat_src, flow.nat_dst, flow.nat_ports, own.class & !PORT_REMAPPED);
    let is_reply = flow.directions[0].flags & flow_flags::REPLY != 0;
    std::iter::once(plain).chain(is_reply.then_some(FlowKey { class: plain.class | PORT_REMAPPED, ..plain }))
}

/// Whether two entries are the two directions of one connection with NAT.
pub(super) fn are_paired<A: KeyOrder>(
    (key, flow): (&FlowKey<A>, &Flow<A>),
    (other_key, other): (&FlowKey<A>, &Flow<A>),
) -> bool {
    has_nat(flow)
        && has_nat(other)
        && keys(key, flow).any(|reverse| reverse == *other_key)
        && keys(other_key, other).any(|reverse| reverse == *key)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both directions have one key: the order of the ends does not depend on which one is the source.
    #[test]
    fn both_directions_have_one_key() {
        let (low, high) = (0x0100_000a_u32, 0x0200_000a_u32);
        assert_eq!(key(low, high, 0x5000_9c40, 6), FlowKey { low, high, ports: 0x5000_9c40, class: 6 });
        assert_eq!(key(high, low, 0x9c40_5000, 6), FlowKey { low, high, ports: 0x5000_9c40, class: 6 });
        let (near, far) = ([9, 9, 9, 1], [0, 0, 0, 2]);
        assert_eq!(key(far, near, 0x0001_0002, 17).low, near);
        // One address: the ports decide.
        assert_eq!(key(7_u32, 7, 0x0001_0002, 6).ports, 0x0002_0001);
        assert_eq!(key(7_u32, 7, 0x0002_0001, 6).ports, 0x0002_0001);
    }
}
