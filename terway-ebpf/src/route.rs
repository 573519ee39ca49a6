//! What is done with the first packet of a flow. The tables are asked through a trait, so that the same code runs on the kernel's
//! maps and, in tests, on ordinary ones.

use terway_abi::{Drop, Endpoint, MacPair, NO_SLOT, POLICY_EPOCH_MASK, Uplink};

use crate::family::Family;
use crate::flow::{Basis, Place, Route};
use crate::parse::Packet;

/// What the daemon has told the kernel.
pub trait Tables<F: Family> {
    /// The pod whose host end this is.
    fn by_ifindex(&self, ifindex: u32) -> Option<&Endpoint>;
    /// The pod of this node that has this address.
    fn by_address(&self, address: &F::Addr) -> Option<&Endpoint>;
    /// The ENI whose interface this is, if clients outside are served by it.
    fn uplink(&self, ifindex: u32) -> Option<&Uplink>;
    /// Whether the host stack serves this address.
    fn is_host(&self, address: &F::Addr) -> bool;
    /// The epoch of a slot.
    fn epoch(&self, slot: u32) -> u32;
}

/// What a decision comes to.
#[derive(Clone, Copy)]
pub enum Decision<'a> {
    /// This way, and so do the packets that follow.
    Way(Route<'a>),
    /// To the host stack, without a memory: it is no pod's packet.
    NotOurs,
}

/// Of an address that is nobody's here.
///
/// The epoch is read *before* the tables are asked whether it is somebody's: if it becomes somebody's in between, the flow made
/// from this is void at once.
#[inline(always)]
fn nobody<F: Family, T: Tables<F>>(tables: &T, address: &F::Addr) -> Basis {
    let slot = F::bucket(address);
    let epoch = tables.epoch(slot);
    Basis { slot, epoch, since: epoch }
}

/// Of an address that is this pod's. The epoch stands in the endpoint itself, so it is as old as what is decided from it; that of
/// policies is read here, before they are asked.
#[inline(always)]
fn pods<F: Family, T: Tables<F>>(tables: &T, pod: &Endpoint) -> Basis {
    let epoch = pod.epoch & !POLICY_EPOCH_MASK | tables.epoch(pod.slot) & POLICY_EPOCH_MASK;
    Basis { slot: pod.slot, epoch, since: pod.first_epoch }
}

/// Whether a pod may send this packet at all.
///
/// # Errors
/// The reason to drop it.
#[inline(always)]
pub fn sender<F: Family>(pod: &Endpoint, packet: &Packet<F>, macs: MacPair) -> Result<(), Drop> {
    if macs.source() != pod.from_pod_macs.source() {
        return Err(Drop::SpoofedMac);
    }
    if let Some(drop) = F::unroutable(&packet.src, &packet.dst) {
        return Err(drop);
    }
    if F::same(&packet.src, &F::NONE) || !F::same(&packet.src, &F::address(pod)) {
        return Err(Drop::SpoofedSource);
    }
    if macs != pod.from_pod_macs {
        return Err(Drop::NotForGateway);
    }
    Ok(())
}

/// A packet that a pod sent, and that goes to `to`: its destination, or the backend that a Service chose.
///
/// # Errors
/// The reason to drop it.
#[inline(always)]
pub fn from_pod<'a, F: Family, T: Tables<F>>(
    tables: &'a T,
    pod: &'a Endpoint,
    packet: &Packet<F>,
    to: &F::Addr,
    macs: MacPair,
) -> Result<Decision<'a>, Drop> {
    sender(pod, packet, macs)?;
    let unowned = nobody(tables, to);
    let (target, destination) = match tables.by_address(to) {
        Some(peer) => (Place::Pod(peer), pods(tables, peer)),
        None if tables.is_host(to) => (Place::Host(pod), unowned),
        None if F::has_gateway(pod) => (Place::Vpc(pod), unowned),
        None => return Err(Drop::NoGateway),
    };
    Ok(Decision::Way(Route { origin: Place::Pod(pod), target, source: pods(tables, pod), destination }))
}

/// A packet that came in by the ENI `ifindex`.
///
/// # Errors
/// The reason to drop it.
#[inline(always)]
pub fn from_vpc<'a, F: Family, T: Tables<F>>(
    tables: &'a T,
    packet: &Packet<F>,
    ifindex: u32,
) -> Result<Decision<'a>, Drop> {
    let source = nobody(tables, &packet.src);
    let Some(pod) = tables.by_address(&packet.dst) else { return Ok(Decision::NotOurs) };
    if pod.eni_ifindex != ifindex {
        return Err(Drop::WrongEni);
    }
    // A pod of this node reaches another one without the VPC, so from there such a source is a lie.
    if tables.by_address(&packet.src).is_some() {
        return Err(Drop::SpoofedSource);
    }
    Ok(Decision::Way(Route {
        origin: Place::Vpc(pod),
        target: Place::Pod(pod),
        source,
        destination: pods(tables, pod),
    }))
}

/// A packet from `src`, outside, that came in by the ENI `ifindex` for a Service, and that goes to `to`, the backend that was chosen.
/// With `local` only this node will do.
///
/// # Errors
/// The reason to drop it.
#[inline(always)]
pub fn from_client<'a, F: Family, T: Tables<F>>(
    tables: &'a T,
    src: &F::Addr,
    to: &F::Addr,
    local: bool,
    ifindex: u32,
) -> Result<Decision<'a>, Drop> {
    let (source, unowned) = (nobody(tables, src), nobody(tables, to));
    if tables.by_address(src).is_some() {
        return Err(Drop::SpoofedSource);
    }
    let Uplink { node, .. } = tables.uplink(ifindex).ok_or(Drop::NoUplink)?;
    if !F::has_gateway(node) {
        return Err(Drop::NoUplink);
    }
    let (target, destination) = match tables.by_address(to) {
        Some(pod) => (Place::Pod(pod), pods(tables, pod)),
        None if tables.is_host(to) => (Place::Node(node), unowned),
        None if local => return Err(Drop::NoBackend),
        // The backend's answers must come back here, so it gets to see the node.
        None if F::same(&F::address(node), &F::NONE) => return Err(Drop::NoUplink),
        None => (Place::Vpc(node), unowned),
    };
    Ok(Decision::Way(Route { origin: Place::Vpc(node), target, source, destination }))
}

/// A packet that the host stack sends to the pod behind `ifindex`.
///
/// # Errors
/// The reason to drop it.
#[inline(always)]
pub fn to_pod<'a, F: Family, T: Tables<F>>(
    tables: &'a T,
    packet: &Packet<F>,
    ifindex: u32,
) -> Result<Decision<'a>, Drop> {
    let source = nobody(tables, &packet.src);
    let pod = tables.by_ifindex(ifindex).ok_or(Drop::UnknownEndpoint)?;
    // Neighbour discovery and the like: it is not sent to the pod's address, and no flow comes of it.
    if F::same(&packet.dst, &F::NONE) || !F::same(&packet.dst, &F::address(pod)) {
        return Ok(Decision::NotOurs);
    }
    // A pod's packet that the host stack forwarded (to the backend of a Service, say) depends on that pod too.
    let source = tables.by_address(&packet.src).map_or(source, |pod| pods(tables, pod));
    Ok(Decision::Way(Route {
        origin: Place::Host(pod),
        target: Place::Pod(pod),
        source,
        destination: pods(tables, pod),
    }))
}

/// A packet with this source that leaves by the ENI `ifindex` and that [`from_pod`] has not seen.
///
/// # Errors
/// [`Drop::WrongEni`]: the address is a pod's, and another ENI owns it.
#[inline(always)]
pub fn to_vpc<F: Family, T: Tables<F>>(tables: &T, src: &F::Addr, ifindex: u32) -> Result<(), Drop> {
    match tables.by_address(src) {
        Some(pod) if pod.eni_ifindex != ifindex => Err(Drop::WrongEni),
        _ => Ok(()),
    }
}

/// What has changed about the ends of an entry since it was made, as bits of epochs: none, only some of [`POLICY_EPOCH_MASK`], or others,
/// which make it void.
#[inline(always)]
pub fn drift<F: Family, T: Tables<F>>(tables: &T, slots: [u32; 2], epochs: [u32; 2]) -> u32 {
    let ([source, destination], [at_source, at_destination]) = (slots, epochs);
    // An entry that was never filled has slot 0 twice.
    if source == NO_SLOT {
        return u32::MAX;
    }
    (tables.epoch(source) ^ at_source) | (tables.epoch(destination) ^ at_destination)
}

/// Whether both ends of an entry are as they were when it was made.
#[inline(always)]
pub fn holds<F: Family, T: Tables<F>>(tables: &T, slots: [u32; 2], epochs: [u32; 2]) -> bool {
    drift(tables, slots, epochs) == 0
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::family::{V4, V6};

    /// The tables as ordinary maps.
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
            self.pods.values().find(|pod| F::widen(&F::address(pod)) == F::widen(address))
        }

        fn uplink(&self, ifindex: u32) -> Option<&Uplink> {
            (ifindex == self.uplink.node.eni_ifindex).then_some(&self.uplink)
        }

        fn is_host(&self, address: &F::Addr) -> bool {
            self.host.contains(&F::widen(address))
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

    fn place(place: Place<'_>) -> (&'static str, u32) {
        match place {
            Place::Pod(pod) => ("pod", pod.host_ifindex),
            Place::Vpc(pod) => ("vpc", pod.host_ifindex),
            Place::Host(pod) => ("host", pod.host_ifindex),
            Place::Node(node) => ("node", node.eni_ifindex),
        }
    }

    /// What is decided, in a word.
    fn said(decision: Result<Decision<'_>, Drop>) -> Result<Option<(&'static str, u32)>, Drop> {
        decision.map(|decision| match decision {
            Decision::Way(route) => Some(place(route.target)),
            Decision::NotOurs => None,
        })
    }

    #[test]
    fn where_a_pods_packets_go() {
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
        // Having no address of a family is not having the unspecified one.
        let none = packet::<V6>([0; 4], v6(2));
        assert_eq!(said(from_pod(&node, pod(3), &none, &none.dst, pod(3).from_pod_macs)), Err(Drop::SpoofedSource));
    }

    #[test]
    fn where_clients_outside_are_sent() {
        let node = node();
        for (src, to, local, ifindex, want) in [
            (9, 1, false, 49, Ok(Some(("pod", 1)))),
            // The pod's own ENI is another one than the client came by.
            (9, 3, true, 49, Ok(Some(("pod", 3)))),
            (9, 100, true, 49, Ok(Some(("node", 49)))),
            (9, 20, false, 49, Ok(Some(("vpc", 0)))),
            (9, 20, true, 49, Err(Drop::NoBackend)),
            (2, 1, false, 49, Err(Drop::SpoofedSource)),
            (9, 1, false, 50, Err(Drop::NoUplink)),
        ] {
            let decision = from_client::<V4, _>(&node, &v4(src), &v4(to), local, ifindex);
            if let Ok(Decision::Way(route)) = decision {
                let Place::Vpc(origin) = route.origin else { panic!("from somewhere else") };
                assert_eq!(origin.eni_ifindex, 49);
            }
            assert_eq!(said(decision), want, "{src} to {to}");
        }
        // There is no IPv6 address to send it on with.
        assert_eq!(said(from_client::<V6, _>(&node, &v6(9), &v6(1), false, 49)), Ok(Some(("pod", 1))));
        assert_eq!(said(from_client::<V6, _>(&node, &v6(9), &v6(20), false, 49)), Err(Drop::NoUplink));
    }

    #[test]
    fn entries_hold_until_an_end_changes() {
        let mut node = node();
        let pod = *node.pods.get(&1).unwrap();
        let sent = packet::<V4>(v4(1), v4(9));
        let Ok(Decision::Way(route)) = from_pod(&node, &pod, &sent, &sent.dst, pod.from_pod_macs) else {
            panic!("not sent")
        };
        let (slots, epochs) =
            ([route.source.slot, route.destination.slot], [route.source.epoch, route.destination.epoch]);
        assert!(holds::<V4, _>(&node, slots, epochs));
        for slot in slots {
            let before = node.epochs.insert(slot, 99 << 16);
            assert!(drift::<V4, _>(&node, slots, epochs) > POLICY_EPOCH_MASK);
            let policies = terway_abi::next_policy_epoch(before.unwrap_or(0));
            node.epochs.insert(slot, policies);
            assert!((1..=POLICY_EPOCH_MASK).contains(&drift::<V4, _>(&node, slots, epochs)));
            node.epochs.insert(slot, before.unwrap_or(0));
        }
        assert!(holds::<V4, _>(&node, slots, epochs));
        assert!(!holds::<V4, _>(&node, [0, 0], [0, 0]), "an entry that was never filled");
        // An endpoint that is being changed: its new epoch is in its value, and not yet in the map.
        let changing = Endpoint { epoch: 2 << 16, ..pod };
        let Ok(Decision::Way(route)) = from_pod(&node, &changing, &sent, &sent.dst, pod.from_pod_macs) else {
            panic!("not sent")
        };
        assert!(!holds::<V4, _>(
            &node,
            [route.source.slot, route.destination.slot],
            [route.source.epoch, route.destination.epoch]
        ));
    }

    proptest! {
        /// Invariant 2, and its like: whatever the addresses, a packet leaves a pod only as that pod, and enters one only by its ENI.
        #[test]
        fn nobody_sends_as_somebody_else(n in 1_u32..4, src in 0_u8..12, dst in 0_u8..12, mac in 1_u8..4, eni in 50_u32..52) {
            let node = node();
            let pod = node.pods.get(&n).unwrap();
            let sent = packet::<V4>(v4(src), v4(dst));
            if let Ok(Decision::Way(route)) = from_pod(&node, pod, &sent, &sent.dst, MacPair::new([0xaa; 6], [mac; 6])) {
                prop_assert_eq!(u32::from(src), n);
                prop_assert_eq!(u32::from(mac), n);
                prop_assert_eq!(place(route.origin), ("pod", n));
                if let Place::Vpc(by) = route.target {
                    prop_assert_eq!(by.eni_ifindex, pod.eni_ifindex);
                    prop_assert!(!(1..4).contains(&dst), "a pod's address went to the VPC");
                }
            }
            if let Ok(Decision::Way(route)) = from_vpc(&node, &sent, eni) {
                prop_assert_eq!(place(route.target), ("pod", u32::from(dst)));
                prop_assert!(!(1..4).contains(&src));
                prop_assert_eq!(node.pods.get(&u32::from(dst)).unwrap().eni_ifindex, eni);
            }
            let allowed = to_vpc::<V4, _>(&node, &v4(src), eni).is_ok();
            prop_assert_eq!(allowed, node.pods.get(&u32::from(src)).is_none_or(|pod| pod.eni_ifindex == eni));
        }
    }
}
