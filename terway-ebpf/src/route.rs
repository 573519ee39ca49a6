//! Routes of new flows: from where to where a packet goes, and the source checks. The lookups are a trait: the kernel's maps in the
//! datapath, ordinary maps in tests.

use terway_abi::{Drop, Endpoint, MacPair, NO_SLOT, POLICY_EPOCH_MASK, Uplink};

use crate::family::Family;
use crate::flow::{EpochRef, Route, RouteEnd};
use crate::parse::Packet;

/// Lookups of endpoints, uplinks, host prefixes and epochs, all written by the daemon.
pub trait Tables<F: Family> {
    /// The endpoint with this host interface.
    fn by_ifindex(&self, ifindex: u32) -> Option<&Endpoint>;
    /// The local endpoint with this address.
    fn by_address(&self, address: &F::Addr) -> Option<&Endpoint>;
    /// The uplink with this interface.
    fn uplink(&self, ifindex: u32) -> Option<&Uplink>;
    /// Whether the address is one of the host stack's prefixes.
    fn is_host(&self, address: &F::Addr) -> bool;
    /// The current epoch of a slot.
    fn epoch(&self, slot: u32) -> u32;
}

/// The routing decision for a packet.
#[derive(Clone, Copy)]
pub enum RouteDecision<'a> {
    /// Forward this packet and those that follow by this route.
    Forward(Route<'a>),
    /// Pass to the host stack, without a flow entry: the packet is for no pod.
    HostStack,
}

/// The epoch of a remote address.
///
/// Read *before* the lookup of the address among the endpoints: if an endpoint gets the address in between, the flow entry is invalid at
/// once.
#[inline(always)]
fn remote_epoch<F: Family, T: Tables<F>>(tables: &T, address: &F::Addr) -> EpochRef {
    let slot = F::remote_slot(address);
    let epoch = tables.epoch(slot);
    EpochRef { slot, epoch, first_epoch: epoch }
}

/// The epoch of a local endpoint. The route epoch is that in the endpoint's value, as old as the other fields that the route is made of; the
/// policy epoch is read here, before the policy check.
#[inline(always)]
fn endpoint_epoch<F: Family, T: Tables<F>>(tables: &T, pod: &Endpoint) -> EpochRef {
    let epoch = pod.epoch & !POLICY_EPOCH_MASK | tables.epoch(pod.slot) & POLICY_EPOCH_MASK;
    EpochRef { slot: pod.slot, epoch, first_epoch: pod.first_epoch }
}

/// Checks the source of a packet from a pod: MAC addresses, source address, and that the destination is unicast.
///
/// # Errors
/// The drop reason.
#[inline(always)]
pub fn check_source<F: Family>(pod: &Endpoint, packet: &Packet<F>, macs: MacPair) -> Result<(), Drop> {
    if macs.source() != pod.from_pod_macs.source() {
        return Err(Drop::SpoofedMac);
    }
    if let Some(drop) = F::unroutable(&packet.src, &packet.dst) {
        return Err(drop);
    }
    if F::same(&packet.src, &F::UNSPECIFIED) || !F::same(&packet.src, &F::address(pod)) {
        return Err(Drop::SpoofedSource);
    }
    if macs != pod.from_pod_macs {
        return Err(Drop::NotForGateway);
    }
    Ok(())
}

/// The route of a packet from a pod to `to`: the packet's destination, or the selected backend.
///
/// # Errors
/// The drop reason.
#[inline(always)]
pub fn from_pod<'a, F: Family, T: Tables<F>>(
    tables: &'a T,
    pod: &'a Endpoint,
    packet: &Packet<F>,
    to: &F::Addr,
    macs: MacPair,
) -> Result<RouteDecision<'a>, Drop> {
    check_source(pod, packet, macs)?;
    let remote = remote_epoch(tables, to);
    let (target, destination) = match tables.by_address(to) {
        Some(peer) => (RouteEnd::Pod(peer), endpoint_epoch(tables, peer)),
        None if tables.is_host(to) => (RouteEnd::Host(pod), remote),
        None if F::has_gateway(pod) => (RouteEnd::Vpc(pod), remote),
        None => return Err(Drop::NoGateway),
    };
    Ok(RouteDecision::Forward(Route {
        origin: RouteEnd::Pod(pod),
        target,
        source: endpoint_epoch(tables, pod),
        destination,
    }))
}

/// The route of a packet from the VPC through the ENI `ifindex` to a local pod.
///
/// # Errors
/// The drop reason.
#[inline(always)]
pub fn from_vpc<'a, F: Family, T: Tables<F>>(
    tables: &'a T,
    packet: &Packet<F>,
    ifindex: u32,
) -> Result<RouteDecision<'a>, Drop> {
    let source = remote_epoch(tables, &packet.src);
    let Some(pod) = tables.by_address(&packet.dst) else { return Ok(RouteDecision::HostStack) };
    if pod.eni_ifindex != ifindex {
        return Err(Drop::WrongEni);
    }
    // Traffic between local pods never crosses the VPC, so this source address is spoofed.
    if tables.by_address(&packet.src).is_some() {
        return Err(Drop::SpoofedSource);
    }
    Ok(RouteDecision::Forward(Route {
        origin: RouteEnd::Vpc(pod),
        target: RouteEnd::Pod(pod),
        source,
        destination: endpoint_epoch(tables, pod),
    }))
}

/// The route of a packet from the external client `src` through the ENI `ifindex` to the backend address `to`. With `is_local_only` the
/// backend must be on this node.
///
/// # Errors
/// The drop reason.
#[inline(always)]
pub fn from_external_client<'a, F: Family, T: Tables<F>>(
    tables: &'a T,
    src: &F::Addr,
    to: &F::Addr,
    is_local_only: bool,
    ifindex: u32,
) -> Result<RouteDecision<'a>, Drop> {
    let (source, remote) = (remote_epoch(tables, src), remote_epoch(tables, to));
    if tables.by_address(src).is_some() {
        return Err(Drop::SpoofedSource);
    }
    let Uplink { node, .. } = tables.uplink(ifindex).ok_or(Drop::NoUplink)?;
    if !F::has_gateway(node) {
        return Err(Drop::NoUplink);
    }
    let (target, destination) = match tables.by_address(to) {
        Some(pod) => (RouteEnd::Pod(pod), endpoint_epoch(tables, pod)),
        None if tables.is_host(to) => (RouteEnd::Node(node), remote),
        None if is_local_only => return Err(Drop::NoBackend),
        // SNAT to the node brings the backend's replies back here.
        None if F::same(&F::address(node), &F::UNSPECIFIED) => return Err(Drop::NoUplink),
        None => (RouteEnd::Vpc(node), remote),
    };
    Ok(RouteDecision::Forward(Route { origin: RouteEnd::Vpc(node), target, source, destination }))
}

/// The route of a packet from the host stack to the pod with the host interface `ifindex`.
///
/// # Errors
/// The drop reason.
#[inline(always)]
pub fn to_pod<'a, F: Family, T: Tables<F>>(
    tables: &'a T,
    packet: &Packet<F>,
    ifindex: u32,
) -> Result<RouteDecision<'a>, Drop> {
    let source = remote_epoch(tables, &packet.src);
    let pod = tables.by_ifindex(ifindex).ok_or(Drop::UnknownEndpoint)?;
    // Neighbour discovery and other packets that are not to the pod's address create no flow entry.
    if F::same(&packet.dst, &F::UNSPECIFIED) || !F::same(&packet.dst, &F::address(pod)) {
        return Ok(RouteDecision::HostStack);
    }
    // The source may be a local pod whose packet the host stack has forwarded; then the flow depends on that endpoint too.
    let source = tables.by_address(&packet.src).map_or(source, |pod| endpoint_epoch(tables, pod));
    Ok(RouteDecision::Forward(Route {
        origin: RouteEnd::Host(pod),
        target: RouteEnd::Pod(pod),
        source,
        destination: endpoint_epoch(tables, pod),
    }))
}

/// Checks the source address of a packet that leaves through the ENI `ifindex` and that `from_pod` has not checked.
///
/// # Errors
/// [`Drop::WrongEni`]: the address is a local pod's, and another ENI owns it.
#[inline(always)]
pub fn to_vpc<F: Family, T: Tables<F>>(tables: &T, src: &F::Addr, ifindex: u32) -> Result<(), Drop> {
    match tables.by_address(src) {
        Some(pod) if pod.eni_ifindex != ifindex => Err(Drop::WrongEni),
        _ => Ok(()),
    }
}

/// The difference between the epochs of a flow entry and the current ones, as bits: 0 if the entry is current, bits of
/// [`POLICY_EPOCH_MASK`] only if its policy verdict is stale, other bits if its route is stale and the entry invalid.
#[inline(always)]
pub fn epoch_diff<F: Family, T: Tables<F>>(tables: &T, slots: [u32; 2], epochs: [u32; 2]) -> u32 {
    let ([source, destination], [at_source, at_destination]) = (slots, epochs);
    // An entry that was never filled has slot 0.
    if source == NO_SLOT {
        return u32::MAX;
    }
    (tables.epoch(source) ^ at_source) | (tables.epoch(destination) ^ at_destination)
}

/// Whether neither route nor policies of an entry have changed.
#[inline(always)]
pub fn is_current_entry<F: Family, T: Tables<F>>(tables: &T, slots: [u32; 2], epochs: [u32; 2]) -> bool {
    epoch_diff(tables, slots, epochs) == 0
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::family::{V4, V6};

    /// The lookups on ordinary maps.
    #[derive(Debug, Default)]
    struct Node {
        pods: BTreeMap<u32, Endpoint>,
        uplink: Uplink,
        host: Vec<[u32; 4]>,
        epochs: BTreeMap<u32, u32>,
    }

    impl<F: Family> Tables<F> for Node {
        fn by_ifindex(&self, ifindex: u32) -> Option<&Endpoint> {
            self.pods.get(&ifindex)
        }

        fn by_address(&self, address: &F::Addr) -> Option<&Endpoint> {
            self.pods.values().find(|pod| F::to_words(&F::address(pod)) == F::to_words(address))
        }

        fn uplink(&self, ifindex: u32) -> Option<&Uplink> {
            (ifindex == self.uplink.node.eni_ifindex).then_some(&self.uplink)
        }

        fn is_host(&self, address: &F::Addr) -> bool {
            self.host.contains(&F::to_words(address))
        }

        fn epoch(&self, slot: u32) -> u32 {
            self.epochs.get(&slot).copied().unwrap_or(0)
        }
    }

    /// 10.0.0.n and fd00::n.
    fn v4(n: u8) -> u32 {
        u32::from_ne_bytes([10, 0, 0, n])
    }

    fn v6(n: u8) -> [u32; 4] {
        [u32::from_ne_bytes([0xfd, 0, 0, 0]), 0, 0, u32::from_ne_bytes([0, 0, 0, n])]
    }

    /// Two pods on ENI 50 and one on ENI 51; the host is number 100. Pod 3 has no IPv6, and ENI 51 no IPv4 gateway.
    fn node() -> Node {
        let pod = |n: u8, eni: u32| Endpoint {
            host_ifindex: n.into(),
            eni_ifindex: eni,
            slot: n.into(),
            epoch: 1 << 16,
            v4: v4(n),
            v6: if n == 3 { [0; 4] } else { v6(n) },
            gateway_v4: if eni == 51 { 0 } else { v4(253) },
            gateway_v6: v6(253),
            from_pod_macs: MacPair::new([0xaa; 6], [n; 6]),
            to_pod_macs: MacPair::new([n; 6], [0xaa; 6]),
            ..Endpoint::default()
        };
        Node {
            pods: [pod(1, 50), pod(2, 50), pod(3, 51)].map(|p| (p.host_ifindex, p)).into(),
            uplink: Uplink {
                node: Endpoint {
                    eni_ifindex: 49,
                    v4: v4(100),
                    gateway_v4: v4(253),
                    gateway_v6: v6(253),
                    ..Endpoint::default()
                },
                ..Uplink::default()
            },
            host: vec![[v4(100), 0, 0, 0], v6(100)],
            epochs: (1..4).map(|slot| (slot, 1 << 16 | slot)).collect(),
        }
    }

    fn packet<F: Family>(src: F::Addr, dst: F::Addr) -> Packet<F> {
        let mut packet = Packet::new();
        (packet.src, packet.dst) = (src, dst);
        packet
    }

    fn place(place: RouteEnd<'_>) -> (&'static str, u32) {
        match place {
            RouteEnd::Pod(pod) => ("pod", pod.host_ifindex),
            RouteEnd::Vpc(pod) => ("vpc", pod.host_ifindex),
            RouteEnd::Host(pod) => ("host", pod.host_ifindex),
            RouteEnd::Node(node) => ("node", node.eni_ifindex),
        }
    }

    /// The decision in a comparable form.
    fn said(decision: Result<RouteDecision<'_>, Drop>) -> Result<Option<(&'static str, u32)>, Drop> {
        decision.map(|decision| match decision {
            RouteDecision::Forward(route) => Some(place(route.target)),
            RouteDecision::HostStack => None,
        })
    }

    #[test]
    fn route_from_pod_by_destination() {
        let node = node();
        let pod = |n: u32| node.pods.get(&n).unwrap();
        for (n, dst, want) in [
            (1, 2, Ok(Some(("pod", 2)))),
            (1, 1, Ok(Some(("pod", 1)))),
            (1, 3, Ok(Some(("pod", 3)))),
            (1, 100, Ok(Some(("host", 1)))),
            (1, 9, Ok(Some(("vpc", 1)))),
            (3, 2, Ok(Some(("pod", 2)))),
            (3, 9, Err(Drop::NoGateway)),
        ] {
            let sent = packet::<V4>(v4(n), v4(dst));
            assert_eq!(
                said(from_pod(&node, pod(n.into()), &sent, &sent.dst, pod(n.into()).from_pod_macs)),
                want,
                "{n} to {dst}"
            );
        }
        assert_eq!(
            said(from_pod(&node, pod(1), &packet::<V6>(v6(1), v6(3)), &v6(3), pod(1).from_pod_macs)),
            Ok(Some(("vpc", 1)))
        );
        // An endpoint without an address of the family must not match the unspecified address.
        let none = packet::<V6>([0; 4], v6(2));
        assert_eq!(said(from_pod(&node, pod(3), &none, &none.dst, pod(3).from_pod_macs)), Err(Drop::SpoofedSource));
    }

    #[test]
    fn route_from_external_client_by_backend() {
        let node = node();
        for (src, to, local, ifindex, want) in [
            (9, 1, false, 49, Ok(Some(("pod", 1)))),
            // The pod's own ENI differs from the client's uplink.
            (9, 3, true, 49, Ok(Some(("pod", 3)))),
            (9, 100, true, 49, Ok(Some(("node", 49)))),
            (9, 20, false, 49, Ok(Some(("vpc", 0)))),
            (9, 20, true, 49, Err(Drop::NoBackend)),
            (2, 1, false, 49, Err(Drop::SpoofedSource)),
            (9, 1, false, 50, Err(Drop::NoUplink)),
        ] {
            let decision = from_external_client::<V4, _>(&node, &v4(src), &v4(to), local, ifindex);
            if let Ok(RouteDecision::Forward(route)) = decision {
                let RouteEnd::Vpc(origin) = route.origin else { panic!("from somewhere else") };
                assert_eq!(origin.eni_ifindex, 49);
            }
            assert_eq!(said(decision), want, "{src} to {to}");
        }
        // The uplink has no IPv6 address for SNAT.
        assert_eq!(said(from_external_client::<V6, _>(&node, &v6(9), &v6(1), false, 49)), Ok(Some(("pod", 1))));
        assert_eq!(said(from_external_client::<V6, _>(&node, &v6(9), &v6(20), false, 49)), Err(Drop::NoUplink));
    }

    #[test]
    fn epoch_diff_tells_stale_route_from_stale_policy() {
        let mut node = node();
        let pod = *node.pods.get(&1).unwrap();
        let sent = packet::<V4>(v4(1), v4(9));
        let Ok(RouteDecision::Forward(route)) = from_pod(&node, &pod, &sent, &sent.dst, pod.from_pod_macs) else {
            panic!("not sent")
        };
        let (slots, epochs) =
            ([route.source.slot, route.destination.slot], [route.source.epoch, route.destination.epoch]);
        assert!(is_current_entry::<V4, _>(&node, slots, epochs));
        for slot in slots {
            let before = node.epochs.insert(slot, 99 << 16);
            assert!(epoch_diff::<V4, _>(&node, slots, epochs) > POLICY_EPOCH_MASK);
            let policies = terway_abi::next_policy_epoch(before.unwrap_or(0));
            node.epochs.insert(slot, policies);
            assert!((1..=POLICY_EPOCH_MASK).contains(&epoch_diff::<V4, _>(&node, slots, epochs)));
            node.epochs.insert(slot, before.unwrap_or(0));
        }
        assert!(is_current_entry::<V4, _>(&node, slots, epochs));
        assert!(!is_current_entry::<V4, _>(&node, [0, 0], [0, 0]), "an entry that was never filled");
        // During a change of an endpoint its new epoch is in its value, but not yet in the epoch map.
        let changing = Endpoint { epoch: 2 << 16, ..pod };
        let Ok(RouteDecision::Forward(route)) = from_pod(&node, &changing, &sent, &sent.dst, pod.from_pod_macs) else {
            panic!("not sent")
        };
        assert!(!is_current_entry::<V4, _>(
            &node,
            [route.source.slot, route.destination.slot],
            [route.source.epoch, route.destination.epoch]
        ));
    }

    proptest! {
        /// Invariant 2: whatever the addresses, a packet leaves a pod only with the pod's source, and enters it only through its ENI.
        #[test]
        fn source_checks_hold_for_all_addresses(n in 1_u32..4, src in 0_u8..12, dst in 0_u8..12, mac in 1_u8..4, eni in 50_u32..52) {
            let node = node();
            let pod = node.pods.get(&n).unwrap();
            let sent = packet::<V4>(v4(src), v4(dst));
            if let Ok(RouteDecision::Forward(route)) = from_pod(&node, pod, &sent, &sent.dst, MacPair::new([0xaa; 6], [mac; 6])) {
                prop_assert_eq!(u32::from(src), n);
                prop_assert_eq!(u32::from(mac), n);
                prop_assert_eq!(place(route.origin), ("pod", n));
                if let RouteEnd::Vpc(by) = route.target {
                    prop_assert_eq!(by.eni_ifindex, pod.eni_ifindex);
                    prop_assert!(!(1..4).contains(&dst), "a pod's address went to the VPC");
                }
            }
            if let Ok(RouteDecision::Forward(route)) = from_vpc(&node, &sent, eni) {
                prop_assert_eq!(place(route.target), ("pod", u32::from(dst)));
                prop_assert!(!(1..4).contains(&src));
                prop_assert_eq!(node.pods.get(&u32::from(dst)).unwrap().eni_ifindex, eni);
            }
            let allowed = to_vpc::<V4, _>(&node, &v4(src), eni).is_ok();
            prop_assert_eq!(allowed, node.pods.get(&u32::from(src)).is_none_or(|pod| pod.eni_ifindex == eni));
        }
    }
}
