//! Flow entries: how they are made, in pairs, and what an established packet asks of them.

use terway_abi::{Action, Endpoint, Flow, FlowKey, HOOK_IN, HOOK_TO_POD, flow_flags};

use crate::family::Family;
use crate::parse::tcp_flags;

/// One end of a way through the node.
#[derive(Clone, Copy)]
pub enum Place<'a> {
    /// A pod of this node.
    Pod(&'a Endpoint),
    /// Beyond the ENI of this pod of this node, the other end of the way.
    Vpc(&'a Endpoint),
    /// The host stack, and this pod is the other end.
    Host(&'a Endpoint),
}

/// What an address was decided by, and the epoch at which that was true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Basis {
    /// Index into the epoch map.
    pub slot: u32,
    /// Its value.
    pub epoch: u32,
}

/// A decided way: from where to where, and how long that holds.
#[derive(Clone, Copy)]
pub struct Route<'a> {
    /// Where the packet comes from.
    pub origin: Place<'a>,
    /// Where it goes.
    pub target: Place<'a>,
    /// What the source address was decided by.
    pub source: Basis,
    /// What the destination address was decided by.
    pub destination: Basis,
}

impl<'a> Route<'a> {
    /// The way back.
    #[inline(always)]
    #[must_use]
    pub const fn back(&self) -> Self {
        Self { origin: self.target, target: self.origin, source: self.destination, destination: self.source }
    }

    /// The interface and hook that packets on this way meet first.
    #[inline(always)]
    #[must_use]
    pub const fn hook(&self) -> (u32, u8) {
        match self.origin {
            Place::Pod(pod) => (pod.host_ifindex, HOOK_IN),
            Place::Vpc(pod) => (pod.eni_ifindex, HOOK_IN),
            Place::Host(pod) => (pod.host_ifindex, HOOK_TO_POD),
        }
    }

    /// Fills a flow entry for this way: what its action needs, and nothing else of it.
    #[inline(always)]
    pub fn fill<F: Family>(&self, flow: &mut Flow<F::Addr>) {
        if let Place::Pod(pod) = self.origin {
            copy(&mut flow.expect.0, &pod.sent.0);
        }
        flow.slots = [self.source.slot, self.destination.slot];
        flow.epochs = [self.source.epoch, self.destination.epoch];
        match (self.origin, self.target) {
            // The host stack routed it here; all that is left is to let it pass.
            (Place::Host(_), _) | (_, Place::Host(_)) => flow.action = Action::Stack as u32,
            (_, Place::Pod(pod)) => {
                copy(&mut flow.write.0, &pod.received.0);
                (flow.action, flow.oif) = (Action::Local as u32, pod.host_ifindex);
            }
            (_, Place::Vpc(pod)) => {
                F::gateway(pod, &mut flow.nexthop);
                (flow.action, flow.oif) = (Action::Vpc as u32, pod.eni_ifindex);
            }
        }
    }
}

/// Copies words one by one. An assignment becomes `memmove`, which on the BPF target is a loop over bytes.
#[inline(always)]
pub(crate) fn copy<const N: usize>(to: &mut [u32; N], from: &[u32; N]) {
    for (to, from) in to.iter_mut().zip(from) {
        // SAFETY: a reference is readable. Volatile, so that the loop is not made into a `memcpy` again.
        *to = unsafe { core::ptr::read_volatile(from) };
    }
}

/// The key of a flow at a hook.
#[inline(always)]
#[must_use]
pub const fn key<A: Copy>(src: A, dst: A, ports: u32, protocol: u8, (ifindex, hook): (u32, u8)) -> FlowKey<A> {
    FlowKey { src, dst, ports, ifindex, class: protocol as u32 | (hook as u32) << 8, spare: 0 }
}

/// Adds protocol, interface and hook to a key that has addresses and ports.
#[inline(always)]
pub fn complete<A>(key: &mut FlowKey<A>, protocol: u8, (ifindex, hook): (u32, u8)) {
    key.ifindex = ifindex;
    key.class = u32::from(protocol) | u32::from(hook) << 8;
}

/// Turns a key into that of the answers, at a hook.
#[inline(always)]
pub fn turn<A: Copy>(key: &mut FlowKey<A>, (ifindex, hook): (u32, u8)) {
    (key.src, key.dst) = (key.dst, key.src);
    key.ports = key.ports.rotate_left(16);
    key.ifindex = ifindex;
    key.class = u32::from(key.protocol()) | u32::from(hook) << 8;
}

/// Whether a packet with these TCP flags may use an entry with these flags.
///
/// A new connection (SYN without ACK) on ports whose last connection has ended is decided anew.
#[inline(always)]
#[must_use]
pub const fn continues(flags: u32, tcp: u8) -> bool {
    let opens = tcp & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN;
    !(opens && flags & (flow_flags::FIN | flow_flags::RST) != 0)
}

/// What an entry remembers of a packet's TCP flags.
#[inline(always)]
#[must_use]
pub const fn remembered(tcp: u8) -> u32 {
    // SYN, FIN and RST stand in other places here than in the header.
    ((tcp & tcp_flags::FIN) as u32) << 2 | (tcp & tcp_flags::SYN) as u32 | ((tcp & tcp_flags::RST) as u32) << 1
}

/// The TCP flags that change what an entry remembers.
pub const NOTABLE: u8 = tcp_flags::SYN | tcp_flags::FIN | tcp_flags::RST;

#[cfg(test)]
mod tests {
    use terway_abi::{FlowV4, MacPair};

    use super::*;
    use crate::family::V4;

    fn pod(number: u32) -> Endpoint {
        Endpoint {
            host_ifindex: number,
            eni_ifindex: 100 + number,
            slot: number,
            epoch: 7,
            gateway_v4: 0xfd,
            sent: MacPair([number, 1, 1]),
            received: MacPair([number, 2, 2]),
            ..Endpoint::default()
        }
    }

    fn filled(route: &Route<'_>) -> FlowV4 {
        let mut flow = FlowV4::default();
        route.fill::<V4>(&mut flow);
        flow
    }

    #[test]
    fn the_entries_of_both_directions_are_each_others_mirror() {
        let (a, b) = (pod(1), pod(2));
        let (source, destination) = (Basis { slot: 1, epoch: 7 }, Basis { slot: 2, epoch: 7 });
        let local = Route { origin: Place::Pod(&a), target: Place::Pod(&b), source, destination };
        assert_eq!((local.hook(), local.back().hook()), ((1, HOOK_IN), (2, HOOK_IN)));
        let (there, back) = (filled(&local), filled(&local.back()));
        assert_eq!((there.action, there.oif, back.oif), (Action::Local as u32, 2, 1));
        assert_eq!((there.expect, there.write), (a.sent, b.received));
        assert_eq!((back.expect, back.write), (b.sent, a.received));
        assert_eq!((there.slots, back.slots), ([1, 2], [2, 1]));

        let out = Route { target: Place::Vpc(&a), ..local };
        assert_eq!((out.hook(), out.back().hook()), ((1, HOOK_IN), (101, HOOK_IN)));
        let (there, back) = (filled(&out), filled(&out.back()));
        assert_eq!((there.action, there.oif, there.nexthop.address[0]), (Action::Vpc as u32, 101, 0xfd));
        assert_eq!((back.action, back.oif, back.write), (Action::Local as u32, 1, a.received));

        let host = Route { target: Place::Host(&a), ..local };
        assert_eq!(host.back().hook(), (1, HOOK_TO_POD));
        let (there, back) = (filled(&host), filled(&host.back()));
        assert_eq!((there.action, there.expect, back.action), (Action::Stack as u32, a.sent, Action::Stack as u32));
    }

    #[test]
    fn turning_a_key_twice_gives_it_back() {
        let mut turned = key(1_u32, 2, 0x1234_5678, 6, (9, HOOK_IN));
        let original = turned;
        turn(&mut turned, (5, HOOK_TO_POD));
        assert_eq!(turned, key(2, 1, 0x5678_1234, 6, (5, HOOK_TO_POD)));
        turn(&mut turned, (9, HOOK_IN));
        assert_eq!(turned, original);
    }

    #[test]
    fn flags_are_remembered_and_end_a_connection() {
        for tcp in 0..=255_u8 {
            let flags = remembered(tcp);
            assert_eq!(flags & flow_flags::SYN != 0, tcp & tcp_flags::SYN != 0);
            assert_eq!(flags & flow_flags::FIN != 0, tcp & tcp_flags::FIN != 0);
            assert_eq!(flags & flow_flags::RST != 0, tcp & tcp_flags::RST != 0);
            assert_eq!(flags & !(flow_flags::SYN | flow_flags::FIN | flow_flags::RST), 0);
            assert_eq!(flags == 0, tcp & NOTABLE == 0);
        }
        assert!(continues(flow_flags::SYN, tcp_flags::SYN), "a repeated SYN");
        assert!(!continues(flow_flags::SYN | flow_flags::FIN, tcp_flags::SYN));
        assert!(!continues(flow_flags::RST, tcp_flags::SYN));
        assert!(continues(flow_flags::FIN, tcp_flags::SYN | tcp_flags::ACK));
        assert!(continues(flow_flags::FIN, tcp_flags::ACK));
    }
}
