//! The entry of the other direction: packets of a translated connection look different in each, so each has an entry of its own.

use terway_abi::{Flow, FlowKey, MOVED, flow_flags};

use super::translates;

/// An address in the order in which a flow key's ends stand: the last word counts most.
pub(super) trait Order: Copy + PartialEq {
    /// Whether it is the lesser one, or equal and `ports` says so.
    fn before(&self, other: &Self, ports: bool) -> bool;
}

impl Order for u32 {
    fn before(&self, other: &Self, ports: bool) -> bool {
        if self == other { ports } else { self < other }
    }
}

impl Order for [u32; 4] {
    fn before(&self, other: &Self, ports: bool) -> bool {
        let words = self.iter().rev().zip(other.iter().rev());
        words.into_iter().find(|(a, b)| a != b).map_or(ports, |(a, b)| a < b)
    }
}

/// The key of the packets that go from `src` to `dst`, and back (`terway_ebpf::flow::key`).
pub(super) fn key<A: Order>(src: A, dst: A, ports: u32, class: u32) -> FlowKey<A> {
    let (source, destination) = (ports & 0xffff, ports >> 16);
    if dst.before(&src, destination < source) {
        FlowKey { low: dst, high: src, ports: ports.rotate_left(16), class }
    } else {
        FlowKey { low: src, high: dst, ports, class }
    }
}

/// Keys under which the entry of the other direction may stand, of an entry that translates. Two for answers: what they answer has its
/// own key, or, where that was another connection's already, the one with [`MOVED`].
pub(super) fn keys<A: Order>(own: &FlowKey<A>, flow: &Flow<A>) -> impl Iterator<Item = FlowKey<A>> + use<A> {
    let plain = key(flow.src, flow.dst, flow.ports, own.class & !MOVED);
    let answers = flow.sides[0].flags & flow_flags::REVERSE != 0;
    std::iter::once(plain).chain(answers.then_some(FlowKey { class: plain.class | MOVED, ..plain }))
}

/// Whether two entries are the two directions of one connection.
pub(super) fn joined<A: Order>((one, its): (&FlowKey<A>, &Flow<A>), (other, others): (&FlowKey<A>, &Flow<A>)) -> bool {
    translates(its)
        && translates(others)
        && keys(one, its).any(|k| k == *other)
        && keys(other, others).any(|k| k == *one)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which end is which does not depend on who sends, and the words count from the last.
    #[test]
    fn ends_have_one_order() {
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
