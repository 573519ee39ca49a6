//! Flow entries: how they are made, for both directions at once, and what an established packet asks of them.

use terway_abi::{
    Action, Endpoint, Flow, FlowDirection, FlowKey, HOOK_INGRESS, HOOK_TO_POD, HOOK_TO_VPC, MacPair, Nexthop,
    flow_flags,
};

use crate::family::Family;
use crate::parse::tcp_flags;

/// One end of a way through the node.
#[derive(Clone, Copy)]
pub enum Place<'a> {
    /// A pod of this node.
    Pod(&'a Endpoint),
    /// Beyond the ENI of this endpoint, which is the pod at the other end of the way, or the node for those whom it serves.
    Vpc(&'a Endpoint),
    /// The host stack, and this pod is the other end.
    Host(&'a Endpoint),
    /// The host stack, and the other end is beyond the ENI of this endpoint.
    Node(&'a Endpoint),
}

/// What an address was decided by, and the epoch at which that was true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Basis {
    /// Index into the epoch map.
    pub slot: u32,
    /// Its value.
    pub epoch: u32,
    /// The first value that means the same pod.
    pub since: u32,
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
            Place::Pod(pod) => (pod.host_ifindex, HOOK_INGRESS),
            Place::Vpc(pod) => (pod.eni_ifindex, HOOK_INGRESS),
            Place::Host(pod) => (pod.host_ifindex, HOOK_TO_POD),
            Place::Node(node) => (node.eni_ifindex, HOOK_TO_VPC),
        }
    }

    /// Fills one side of a flow entry for this way: what its action needs, and nothing else of it.
    #[inline(always)]
    pub fn fill<F: Family>(&self, side: &mut FlowDirection) {
        if let Place::Pod(pod) = self.origin {
            copy(&mut side.expected_macs.0, &pod.from_pod_macs.0);
        }
        let (ifindex, hook) = self.hook();
        (side.ifindex, side.hook) = (ifindex, u32::from(hook));
        match (self.origin, self.target) {
            // The host stack routed it here; all that is left is to let it pass.
            (Place::Host(_) | Place::Node(_), _) | (_, Place::Host(_) | Place::Node(_)) => {
                side.action = Action::Stack as u32;
            }
            (_, Place::Pod(pod)) => {
                let MacPair([a, b, c]) = &pod.to_pod_macs;
                let Nexthop { family, address: [d, e, ..] } = &mut side.nexthop;
                (*family, *d, *e) = (*a, *b, *c);
                (side.action, side.oif) = (Action::Local as u32, pod.host_ifindex);
            }
            (_, Place::Vpc(pod)) => {
                F::gateway(pod, &mut side.nexthop);
                (side.action, side.oif) = (Action::Vpc as u32, pod.eni_ifindex);
            }
        }
    }
}

/// What a side with [`Action::Local`] writes into the frame.
#[inline(always)]
#[must_use]
pub const fn written(side: &FlowDirection) -> MacPair {
    let Nexthop { family, address: [d, e, ..] } = side.nexthop;
    MacPair([family, d, e])
}

/// Copies words one by one. An assignment becomes `memmove`, which on the BPF target is a loop over bytes.
#[inline(always)]
pub(crate) fn copy<const N: usize>(to: &mut [u32; N], from: &[u32; N]) {
    for (to, from) in to.iter_mut().zip(from) {
        // SAFETY: a reference is readable. Volatile, so that the loop is not made into a `memcpy` again.
        *to = unsafe { core::ptr::read_volatile(from) };
    }
}

/// The key of a packet's flow, and which end sends it: 0 for the low one, 1 for the high one.
///
/// Without a branch: the verifier would follow what comes after once for each way through here.
#[inline(always)]
#[must_use]
pub fn key<F: Family>(src: &F::Addr, dst: &F::Addr, ports: u32, protocol: u8) -> (FlowKey<F::Addr>, u32) {
    let [source, destination] = [ports & 0xffff, ports >> 16];
    let from_high = F::borrow(dst, src, borrow(destination, source, 0));
    let mask = 0_u32.wrapping_sub(from_high);
    let (low, high) = F::exchange(src, dst, mask);
    let ports = ports ^ ((ports ^ ports.rotate_left(16)) & mask);
    (FlowKey { low, high, ports, class: u32::from(protocol) }, from_high)
}

/// The borrow of `a - b - borrow`, 0 or 1.
#[inline(always)]
pub(crate) fn borrow(a: u32, b: u32, borrow: u32) -> u32 {
    let difference = u64::from(a).wrapping_sub(u64::from(b)).wrapping_sub(u64::from(borrow));
    (opaque(difference) >> 63) as u32
}

/// The same value, of which the compiler knows nothing: it would make branches of arithmetic that avoids them.
#[inline(always)]
#[cfg_attr(not(target_arch = "bpf"), expect(unused_mut, reason = "the kernel's half changes it"))]
pub(crate) fn opaque(mut value: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    // SAFETY: a move of a register to itself.
    unsafe {
        core::arch::asm!("{0} = {0}", inout(reg) value, options(nostack, preserves_flags, nomem, pure));
    }
    value
}

/// The side of a flow that an end uses.
#[inline(always)]
#[must_use]
pub fn side<A>(flow: &mut Flow<A>, from_high: u32) -> &mut FlowDirection {
    let index = opaque(u64::from(from_high ^ flow.initiator)) & 1;
    // SAFETY: the index is 0 or 1. Without `get`, whose branch would be one more thing to verify.
    unsafe { flow.directions.get_unchecked_mut(index as usize) }
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
    use proptest::prelude::*;
    use terway_abi::FlowV4;

    use super::*;
    use crate::family::{V4, V6};

    fn pod(number: u32) -> Endpoint {
        Endpoint {
            host_ifindex: number,
            eni_ifindex: 100 + number,
            slot: number,
            epoch: 7,
            gateway_v4: 0xfd,
            from_pod_macs: MacPair([number, 1, 1]),
            to_pod_macs: MacPair([number, 2, 2]),
            ..Endpoint::default()
        }
    }

    fn filled(route: &Route<'_>) -> FlowDirection {
        let mut side = FlowDirection::default();
        route.fill::<V4>(&mut side);
        side
    }

    #[test]
    fn the_sides_of_both_directions_are_each_others_mirror() {
        let (a, b) = (pod(1), pod(2));
        let (source, destination) = (Basis { slot: 1, epoch: 7, since: 7 }, Basis { slot: 2, epoch: 7, since: 7 });
        let local = Route { origin: Place::Pod(&a), target: Place::Pod(&b), source, destination };
        assert_eq!((local.hook(), local.back().hook()), ((1, HOOK_INGRESS), (2, HOOK_INGRESS)));
        let (there, back) = (filled(&local), filled(&local.back()));
        assert_eq!((there.action, there.oif, back.oif), (Action::Local as u32, 2, 1));
        assert_eq!((there.ifindex, back.ifindex), (1, 2));
        assert_eq!((there.expected_macs, written(&there)), (a.from_pod_macs, b.to_pod_macs));
        assert_eq!((back.expected_macs, written(&back)), (b.from_pod_macs, a.to_pod_macs));

        let out = Route { target: Place::Vpc(&a), ..local };
        assert_eq!((out.hook(), out.back().hook()), ((1, HOOK_INGRESS), (101, HOOK_INGRESS)));
        let (there, back) = (filled(&out), filled(&out.back()));
        assert_eq!((there.action, there.oif, there.nexthop.address[0]), (Action::Vpc as u32, 101, 0xfd));
        assert_eq!((back.action, back.oif, written(&back)), (Action::Local as u32, 1, a.to_pod_macs));

        let host = Route { target: Place::Host(&a), ..local };
        assert_eq!(host.back().hook(), (1, HOOK_TO_POD));
        let (there, back) = (filled(&host), filled(&host.back()));
        assert_eq!(
            (there.action, there.expected_macs, back.action),
            (Action::Stack as u32, a.from_pod_macs, Action::Stack as u32)
        );
        assert_eq!((there.hook, back.hook), (HOOK_INGRESS.into(), HOOK_TO_POD.into()));
    }

    #[test]
    fn what_comes_from_outside_goes_back_by_the_same_interface() {
        let (pod, uplink) = (pod(1), Endpoint { eni_ifindex: 200, gateway_v4: 0xfe, ..Endpoint::default() });
        let (source, destination) = (Basis { slot: 1, epoch: 7, since: 0 }, Basis { slot: 2, epoch: 7, since: 0 });
        let local = Route { origin: Place::Vpc(&uplink), target: Place::Pod(&pod), source, destination };
        let (there, back) = (filled(&local), filled(&local.back()));
        assert_eq!((there.ifindex, there.action, there.oif), (200, Action::Local as u32, 1));
        // Not by the pod's own ENI, which is 101.
        assert_eq!((back.ifindex, back.action, back.oif, back.nexthop.address[0]), (1, Action::Vpc as u32, 200, 0xfe));
        let remote = Route { target: Place::Vpc(&uplink), ..local };
        for side in [filled(&remote), filled(&remote.back())] {
            assert_eq!((side.ifindex, side.hook, side.action, side.oif), (200, 0, Action::Vpc as u32, 200));
        }
        let host = Route { target: Place::Node(&uplink), ..local };
        let (there, back) = (filled(&host), filled(&host.back()));
        assert_eq!((there.hook, there.action), (HOOK_INGRESS.into(), Action::Stack as u32));
        assert_eq!((back.ifindex, back.hook, back.action), (200, HOOK_TO_VPC.into(), Action::Stack as u32));
    }

    /// Both directions find one entry, and different directions of it; and the key keeps what the packet said.
    fn meets<F: Family>(src: F::Addr, dst: F::Addr, ports: u32)
    where
        F::Addr: PartialEq + core::fmt::Debug,
    {
        let (there, high) = key::<F>(&src, &dst, ports, 6);
        let (back, answers) = key::<F>(&dst, &src, ports.rotate_left(16), 6);
        assert_eq!(there, back);
        let to_itself = src == dst && ports.rotate_left(16) == ports;
        assert_eq!(high == answers, to_itself);
        let said = match high {
            0 => (there.low, there.high, there.ports),
            _ => (there.high, there.low, there.ports.rotate_left(16)),
        };
        assert_eq!(said, (src, dst, ports));
        let mut flow = FlowV4 { initiator: high, ..FlowV4::default() };
        side(&mut flow, high).packets = 1;
        side(&mut flow, answers).bytes = 2;
        let [made, other] = flow.directions;
        assert_eq!((made.packets, if to_itself { made } else { other }.bytes), (1, 2));
    }

    proptest! {
        #[test]
        fn both_directions_meet_in_one_entry(src in 0_u32..4, dst in 0_u32..4, ports in any::<u32>(), at in 0_usize..4, same in any::<bool>()) {
            let ports = if same { ports & 0xffff | ports << 16 } else { ports };
            meets::<V4>(src, dst, ports);
            let (mut from, mut to) = ([7; 4], [7; 4]);
            (from[at], to[3 - at]) = (src, dst);
            meets::<V6>(from, to, ports);
        }
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
