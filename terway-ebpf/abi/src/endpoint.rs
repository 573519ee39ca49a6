//! Endpoints (pods of this node) and the epochs by which flow entries are invalidated.

use core::fmt;
use core::mem::offset_of;

use crate::pod;

/// Destination and source MAC address of an Ethernet header, as three words: compared and written with three instructions.
#[repr(C)]
#[derive(Clone, Copy, Default, Eq)]
pub struct MacPair(pub [u32; 3]);

impl MacPair {
    /// Makes a pair from two addresses in transmission order.
    #[must_use]
    pub const fn new(destination: [u8; 6], source: [u8; 6]) -> Self {
        let ([a, b, c, d, e, f], [g, h, i, j, k, l]) = (destination, source);
        Self([u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]), u32::from_ne_bytes([i, j, k, l])])
    }

    /// The destination MAC address.
    #[must_use]
    pub const fn destination(self) -> [u8; 6] {
        let Self([first, second, _]) = self;
        let ([a, b, c, d], [e, f, _, _]) = (first.to_ne_bytes(), second.to_ne_bytes());
        [a, b, c, d, e, f]
    }

    /// The source MAC address.
    #[must_use]
    pub const fn source(self) -> [u8; 6] {
        let Self([_, second, third]) = self;
        let ([_, _, g, h], [i, j, k, l]) = (second.to_ne_bytes(), third.to_ne_bytes());
        [g, h, i, j, k, l]
    }
}

impl PartialEq for MacPair {
    /// Word by word: the derived comparison becomes a comparison of bytes.
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        let (Self([a, b, c]), Self([d, e, f])) = (*self, *other);
        (a ^ d) | (b ^ e) | (c ^ f) == 0
    }
}

impl fmt::Debug for MacPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MacPair(to {:02x?}, from {:02x?})", self.destination(), self.source())
    }
}

/// A pod's interface. The endpoint maps hold the same value by interface index and by each address, so that each question takes one
/// lookup.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    /// The host end of the pod's veth.
    pub host_ifindex: u32,
    /// The ENI that owns the pod's addresses.
    pub eni_ifindex: u32,
    /// Index of the endpoint's epoch in the epoch map, never [`NO_SLOT`].
    pub slot: u32,
    /// The route epoch: while the endpoint is valid, the epoch map holds it at `slot` (apart from the bits of [`POLICY_EPOCH_MASK`]).
    pub epoch: u32,
    /// Zero; reserved for per-pod options.
    pub flags: u32,
    /// IPv4 address; 0 if it has none.
    pub v4: u32,
    /// IPv6 address; all 0 if it has none.
    pub v6: [u32; 4],
    /// The ENI's IPv4 gateway; 0 if it has none.
    pub gateway_v4: u32,
    /// The ENI's IPv6 gateway; all 0 if it has none.
    pub gateway_v6: [u32; 4],
    /// The MAC addresses in frames that the pod sends: destination is the host end, source is the pod.
    pub from_pod_macs: MacPair,
    /// The MAC addresses written into frames to the pod: destination is the pod, source is the host end.
    pub to_pod_macs: MacPair,
    /// The first epoch of this pod: flow entries with an older one belong to an earlier pod in the same slot.
    pub first_epoch: u32,
    /// Zero.
    pub spare: [u32; 2],
}

pod!(MacPair: 12, Endpoint: 96);
const _: () = assert!(offset_of!(Endpoint, v6) == 24 && offset_of!(Endpoint, from_pod_macs) == 60);

/// Maximum number of endpoints of a node, and of their epoch slots. ECS instance types end at a few hundred pods.
pub const MAX_ENDPOINTS: u32 = 4096;

/// The slot that no endpoint has. Its epoch is always 0.
pub const NO_SLOT: u32 = 0;

/// Entries of the epoch map: the endpoints' slots, then the slots shared by remote addresses (hash buckets).
pub const EPOCH_SLOTS: u32 = 2 * MAX_ENDPOINTS;

/// Bits of an epoch that count policy changes (the policy epoch). The other bits count route changes (the route epoch): a flow entry
/// with an old route epoch is invalid, one with an old policy epoch has to be checked against the policies again.
pub const POLICY_EPOCH_MASK: u32 = 0xffff;

/// The next epoch after a route change; its policy epoch is 0.
#[must_use]
pub const fn next_route_epoch(epoch: u32) -> u32 {
    (epoch | POLICY_EPOCH_MASK).wrapping_add(1)
}

/// The next epoch after a policy change; its route epoch stays.
#[must_use]
pub const fn next_policy_epoch(epoch: u32) -> u32 {
    epoch & !POLICY_EPOCH_MASK | epoch.wrapping_add(1) & POLICY_EPOCH_MASK
}

/// Whether two epochs have the same route epoch.
#[must_use]
pub const fn same_route_epoch(one: u32, other: u32) -> bool {
    (one ^ other) & !POLICY_EPOCH_MASK == 0
}

/// Whether the route epoch of `epoch` lies between those of `first` and `last`, both included.
#[must_use]
pub const fn is_epoch_between(first: u32, epoch: u32, last: u32) -> bool {
    let first = first & !POLICY_EPOCH_MASK;
    (epoch & !POLICY_EPOCH_MASK).wrapping_sub(first) <= (last & !POLICY_EPOCH_MASK).wrapping_sub(first)
}

/// The epoch slot of a remote IPv4 address: one that is no local endpoint's.
///
/// When an endpoint with this address appears, flow entries that were created for the remote address must be invalidated. Raising the
/// epoch of the slot does that, and invalidates one unrelated flow in 4096.
#[must_use]
pub const fn remote_slot_v4(address: u32) -> u32 {
    // Fibonacci hashing: the top bits of a product with 2^32/φ depend on every bit of the address.
    MAX_ENDPOINTS + (address.wrapping_mul(0x9e37_79b9) >> (32 - MAX_ENDPOINTS.trailing_zeros()))
}

/// The epoch slot of a remote IPv6 address; see [`remote_slot_v4`].
#[must_use]
pub const fn remote_slot_v6(address: [u32; 4]) -> u32 {
    let [a, b, c, d] = address;
    remote_slot_v4((a ^ b.rotate_left(8)).wrapping_mul(0x85eb_ca6b) ^ (c ^ d.rotate_left(16)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_pair_keeps_transmission_order() {
        let pair = MacPair::new([1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]);
        assert_eq!((pair.destination(), pair.source()), ([1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]));
    }

    #[test]
    fn policy_epoch_changes_keep_the_route_epoch() {
        for epoch in [0, 1, 0xffff, 0x1_0000, 0x1_fffe, 0xffff_fffe, u32::MAX] {
            let (route, policy) = (next_route_epoch(epoch), next_policy_epoch(epoch));
            assert!(!same_route_epoch(epoch, route) && route & POLICY_EPOCH_MASK == 0, "{epoch:x}");
            assert!(same_route_epoch(epoch, policy) && policy != epoch, "{epoch:x}");
            assert!(
                is_epoch_between(epoch, policy, epoch)
                    && is_epoch_between(epoch, epoch, route)
                    && !is_epoch_between(route, epoch, route)
            );
        }
    }

    #[test]
    fn remote_slots_follow_the_endpoint_slots_and_spread() {
        let mut seen = [false; EPOCH_SLOTS as usize];
        for host in 0..4096_u32 {
            let v4 = remote_slot_v4(u32::from_ne_bytes([10, 0, (host >> 8) as u8, host as u8]));
            let v6 = remote_slot_v6([0x1234, 0, 0, host.to_be()]);
            assert!((MAX_ENDPOINTS..EPOCH_SLOTS).contains(&v4) && (MAX_ENDPOINTS..EPOCH_SLOTS).contains(&v6));
            seen[v4 as usize] = true;
        }
        // A random function would hit 63 % of the buckets.
        assert!(seen.iter().filter(|s| **s).count() > 1800);
    }
}
