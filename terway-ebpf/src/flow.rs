//! Flow entries: keys, directions, and their content from a route.

use terway_abi::{
    Action, Endpoint, Flow, FlowDirection, FlowKey, HOOK_INGRESS, HOOK_TO_POD, HOOK_TO_VPC, MacPair, Nexthop,
    flow_flags,
};

use crate::family::Family;
use crate::parse::tcp_flags;

/// One end of a route through the node.
#[derive(Clone, Copy)]
pub enum RouteEnd<'a> {
    /// A local pod.
    Pod(&'a Endpoint),
    /// The VPC, through the ENI of this endpoint: the pod at the other end of the route, or the node's endpoint of an uplink.
    Vpc(&'a Endpoint),
    /// The host stack; the other end is this pod.
    Host(&'a Endpoint),
    /// The host stack; the other end is in the VPC, through the ENI of this uplink endpoint.
    Node(&'a Endpoint),
}

/// The epoch slot of an address, and the epoch at which the route was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpochRef {
    /// Index into the epoch map.
    pub slot: u32,
    /// The epoch at that time.
    pub epoch: u32,
    /// The first epoch of the same endpoint.
    pub first_epoch: u32,
}

/// A route through the node, with the epochs that it depends on.
#[derive(Clone, Copy)]
pub struct Route<'a> {
    /// Where packets come from.
    pub origin: RouteEnd<'a>,
    /// Where packets go.
    pub target: RouteEnd<'a>,
    /// Epoch of the source address.
    pub source: EpochRef,
    /// Epoch of the destination address.
    pub destination: EpochRef,
}

impl<'a> Route<'a> {
    /// The route of the opposite direction.
    #[inline(always)]
    #[must_use]
    pub const fn reversed(&self) -> Self {
        Self { origin: self.target, target: self.origin, source: self.destination, destination: self.source }
    }

    /// The interface and hook at which packets of this route arrive.
    #[inline(always)]
    #[must_use]
    pub const fn hook(&self) -> (u32, u8) {
        match self.origin {
            RouteEnd::Pod(pod) => (pod.host_ifindex, HOOK_INGRESS),
            RouteEnd::Vpc(pod) => (pod.eni_ifindex, HOOK_INGRESS),
            RouteEnd::Host(pod) => (pod.host_ifindex, HOOK_TO_POD),
            RouteEnd::Node(node) => (node.eni_ifindex, HOOK_TO_VPC),
        }
    }

    /// Fills one direction of a zeroed flow entry: interface, hook, and what the forwarding action needs.
    #[inline(always)]
    pub fn fill_direction<F: Family>(&self, side: &mut FlowDirection) {
        if let RouteEnd::Pod(pod) = self.origin {
            copy_words(&mut side.expected_macs.0, &pod.from_pod_macs.0);
        }
        let (ifindex, hook) = self.hook();
        (side.ifindex, side.hook) = (ifindex, u32::from(hook));
        match (self.origin, self.target) {
            // The host stack routes the packet.
            (RouteEnd::Host(_) | RouteEnd::Node(_), _) | (_, RouteEnd::Host(_) | RouteEnd::Node(_)) => {
                side.action = Action::Stack as u32;
            }
            (_, RouteEnd::Pod(pod)) => {
                let MacPair([a, b, c]) = &pod.to_pod_macs;
                let Nexthop { family, address: [d, e, ..] } = &mut side.nexthop;
                (*family, *d, *e) = (*a, *b, *c);
                (side.action, side.oif) = (Action::Local as u32, pod.host_ifindex);
            }
            (_, RouteEnd::Vpc(pod)) => {
                F::gateway(pod, &mut side.nexthop);
                (side.action, side.oif) = (Action::Vpc as u32, pod.eni_ifindex);
            }
        }
    }
}

/// The MAC addresses that a direction with [`Action::Local`] writes into the frame.
#[inline(always)]
#[must_use]
pub const fn to_pod_macs_of(side: &FlowDirection) -> MacPair {
    let Nexthop { family, address: [d, e, ..] } = side.nexthop;
    MacPair([family, d, e])
}

/// Copies word by word. An assignment would become `memmove`, a loop over bytes on the BPF target.
#[inline(always)]
pub(crate) fn copy_words<const N: usize>(to: &mut [u32; N], from: &[u32; N]) {
    for (to, from) in to.iter_mut().zip(from) {
        // SAFETY: a reference is readable. Volatile, so that LLVM does not turn the loop into `memcpy`.
        *to = unsafe { core::ptr::read_volatile(from) };
    }
}

/// The key of a packet's flow, and the sending end: 0 for the low end, 1 for the high end.
///
/// Branch-free: the verifier would explore all later code once per branch.
#[inline(always)]
#[must_use]
pub fn flow_key<F: Family>(src: &F::Addr, dst: &F::Addr, ports: u32, protocol: u8) -> (FlowKey<F::Addr>, u32) {
    let [source, destination] = [ports & 0xffff, ports >> 16];
    let from_high = F::borrow(dst, src, borrow(destination, source, 0));
    let mask = 0_u32.wrapping_sub(from_high);
    let (low, high) = F::swap_if(src, dst, mask);
    let ports = ports ^ ((ports ^ ports.rotate_left(16)) & mask);
    (FlowKey { low, high, ports, class: u32::from(protocol) }, from_high)
}

/// The borrow of `a - b - borrow`, 0 or 1.
#[inline(always)]
pub(crate) fn borrow(a: u32, b: u32, borrow: u32) -> u32 {
    let difference = u64::from(a).wrapping_sub(u64::from(b)).wrapping_sub(u64::from(borrow));
    (opaque(difference) >> 63) as u32
}

/// The same value, opaque to the compiler, which would turn branch-free arithmetic into branches.
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

/// The direction of a flow in which an end sends.
#[inline(always)]
#[must_use]
pub fn direction<A>(flow: &mut Flow<A>, from_high: u32) -> &mut FlowDirection {
    let index = opaque(u64::from(from_high ^ flow.initiator)) & 1;
    // SAFETY: the index is 0 or 1. `get` would add a branch to verify.
    unsafe { flow.directions.get_unchecked_mut(index as usize) }
}

/// Whether a packet with these TCP flags belongs to the connection of an entry with these flags: a SYN without ACK after a FIN or RST opens
/// a new one.
#[inline(always)]
#[must_use]
pub const fn is_same_connection(flags: u32, tcp: u8) -> bool {
    let opens = tcp & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN;
    !(opens && flags & (flow_flags::FIN | flow_flags::RST) != 0)
}

/// The [`flow_flags`] of a packet's TCP flags.
#[inline(always)]
#[must_use]
pub const fn tracked_tcp_flags(tcp: u8) -> u32 {
    // The bits of SYN, FIN and RST differ from those in the header.
    ((tcp & tcp_flags::FIN) as u32) << 2 | (tcp & tcp_flags::SYN) as u32 | ((tcp & tcp_flags::RST) as u32) << 1
}

/// The TCP flags that are tracked in flow entries.
pub const TRACKED_TCP_FLAGS: u8 = tcp_flags::SYN | tcp_flags::FIN | tcp_flags::RST;

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
        route.fill_direction::<V4>(&mut side);
        side
    }

    #[test]
    fn reversed_route_fills_the_opposite_direction() {
        let (a, b) = (pod(1), pod(2));
        let (source, destination) =
            (EpochRef { slot: 1, epoch: 7, first_epoch: 7 }, EpochRef { slot: 2, epoch: 7, first_epoch: 7 });
        let local = Route { origin: RouteEnd::Pod(&a), target: RouteEnd::Pod(&b), source, destination };
        assert_eq!((local.hook(), local.reversed().hook()), ((1, HOOK_INGRESS), (2, HOOK_INGRESS)));
        let (there, back) = (filled(&local), filled(&local.reversed()));
        assert_eq!((there.action, there.oif, back.oif), (Action::Local as u32, 2, 1));
        assert_eq!((there.ifindex, back.ifindex), (1, 2));
        assert_eq!((there.expected_macs, to_pod_macs_of(&there)), (a.from_pod_macs, b.to_pod_macs));
        assert_eq!((back.expected_macs, to_pod_macs_of(&back)), (b.from_pod_macs, a.to_pod_macs));

        let out = Route { target: RouteEnd::Vpc(&a), ..local };
        assert_eq!((out.hook(), out.reversed().hook()), ((1, HOOK_INGRESS), (101, HOOK_INGRESS)));
        let (there, back) = (filled(&out), filled(&out.reversed()));
        assert_eq!((there.action, there.oif, there.nexthop.address[0]), (Action::Vpc as u32, 101, 0xfd));
        assert_eq!((back.action, back.oif, to_pod_macs_of(&back)), (Action::Local as u32, 1, a.to_pod_macs));

        let host = Route { target: RouteEnd::Host(&a), ..local };
        assert_eq!(host.reversed().hook(), (1, HOOK_TO_POD));
        let (there, back) = (filled(&host), filled(&host.reversed()));
        assert_eq!(
            (there.action, there.expected_macs, back.action),
            (Action::Stack as u32, a.from_pod_macs, Action::Stack as u32)
        );
        assert_eq!((there.hook, back.hook), (HOOK_INGRESS.into(), HOOK_TO_POD.into()));
    }

    #[test]
    fn replies_to_external_clients_use_the_same_uplink() {
        let (pod, uplink) = (pod(1), Endpoint { eni_ifindex: 200, gateway_v4: 0xfe, ..Endpoint::default() });
        let (source, destination) =
            (EpochRef { slot: 1, epoch: 7, first_epoch: 0 }, EpochRef { slot: 2, epoch: 7, first_epoch: 0 });
        let local = Route { origin: RouteEnd::Vpc(&uplink), target: RouteEnd::Pod(&pod), source, destination };
        let (there, back) = (filled(&local), filled(&local.reversed()));
        assert_eq!((there.ifindex, there.action, there.oif), (200, Action::Local as u32, 1));
        // Through the uplink, not through the pod's own ENI 101.
        assert_eq!((back.ifindex, back.action, back.oif, back.nexthop.address[0]), (1, Action::Vpc as u32, 200, 0xfe));
        let remote = Route { target: RouteEnd::Vpc(&uplink), ..local };
        for side in [filled(&remote), filled(&remote.reversed())] {
            assert_eq!((side.ifindex, side.hook, side.action, side.oif), (200, 0, Action::Vpc as u32, 200));
        }
        let host = Route { target: RouteEnd::Node(&uplink), ..local };
        let (there, back) = (filled(&host), filled(&host.reversed()));
        assert_eq!((there.hook, there.action), (HOOK_INGRESS.into(), Action::Stack as u32));
        assert_eq!((back.ifindex, back.hook, back.action), (200, HOOK_TO_VPC.into(), Action::Stack as u32));
    }

    /// Packets of both ends have the same key and use different directions; the key keeps addresses and ports.
    fn meets<F: Family>(src: F::Addr, dst: F::Addr, ports: u32)
    where
        F::Addr: PartialEq + core::fmt::Debug,
    {
        let (there, high) = flow_key::<F>(&src, &dst, ports, 6);
        let (back, other_end) = flow_key::<F>(&dst, &src, ports.rotate_left(16), 6);
        assert_eq!(there, back);
        let to_itself = src == dst && ports.rotate_left(16) == ports;
        assert_eq!(high == other_end, to_itself);
        let said = match high {
            0 => (there.low, there.high, there.ports),
            _ => (there.high, there.low, there.ports.rotate_left(16)),
        };
        assert_eq!(said, (src, dst, ports));
        let mut flow = FlowV4 { initiator: high, ..FlowV4::default() };
        direction(&mut flow, high).packets = 1;
        direction(&mut flow, other_end).bytes = 2;
        let [made, other] = flow.directions;
        assert_eq!((made.packets, if to_itself { made } else { other }.bytes), (1, 2));
    }

    proptest! {
        #[test]
        fn flow_key_is_the_same_in_both_directions(src in 0_u32..4, dst in 0_u32..4, ports in any::<u32>(), at in 0_usize..4, same in any::<bool>()) {
            let ports = if same { ports & 0xffff | ports << 16 } else { ports };
            meets::<V4>(src, dst, ports);
            let (mut from, mut to) = ([7; 4], [7; 4]);
            (from[at], to[3 - at]) = (src, dst);
            meets::<V6>(from, to, ports);
        }
    }

    #[test]
    fn tcp_flags_are_tracked_and_end_a_connection() {
        for tcp in 0..=255_u8 {
            let flags = tracked_tcp_flags(tcp);
            assert_eq!(flags & flow_flags::SYN != 0, tcp & tcp_flags::SYN != 0);
            assert_eq!(flags & flow_flags::FIN != 0, tcp & tcp_flags::FIN != 0);
            assert_eq!(flags & flow_flags::RST != 0, tcp & tcp_flags::RST != 0);
            assert_eq!(flags & !(flow_flags::SYN | flow_flags::FIN | flow_flags::RST), 0);
            assert_eq!(flags == 0, tcp & TRACKED_TCP_FLAGS == 0);
        }
        assert!(is_same_connection(flow_flags::SYN, tcp_flags::SYN), "a repeated SYN");
        assert!(!is_same_connection(flow_flags::SYN | flow_flags::FIN, tcp_flags::SYN));
        assert!(!is_same_connection(flow_flags::RST, tcp_flags::SYN));
        assert!(is_same_connection(flow_flags::FIN, tcp_flags::SYN | tcp_flags::ACK));
        assert!(is_same_connection(flow_flags::FIN, tcp_flags::ACK));
    }
}
