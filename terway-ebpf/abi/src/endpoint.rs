//! Pods as the programs see them, and the keys by which they are found.

use core::fmt;
use core::mem::offset_of;

use crate::pod;

/// The twelve bytes of an Ethernet header that hold the destination and the source address, as three words: they are compared
/// and written with three instructions.
#[repr(C)]
#[derive(Clone, Copy, Default, Eq)]
pub struct MacPair(pub [u32; 3]);

impl MacPair {
    /// From the two addresses in transmission order.
    #[must_use]
    pub const fn new(destination: [u8; 6], source: [u8; 6]) -> Self {
        let ([a, b, c, d, e, f], [g, h, i, j, k, l]) = (destination, source);
        Self([u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]), u32::from_ne_bytes([i, j, k, l])])
    }

    /// The destination address.
    #[must_use]
    pub const fn destination(self) -> [u8; 6] {
        let Self([first, second, _]) = self;
        let ([a, b, c, d], [e, f, _, _]) = (first.to_ne_bytes(), second.to_ne_bytes());
        [a, b, c, d, e, f]
    }

    /// The source address.
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

/// A pod's interface. The same value stands under its interface index and under each of its addresses, so that every question is
/// one lookup.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    /// The host end of the pod's veth.
    pub host_ifindex: u32,
    /// The ENI that owns the pod's addresses.
    pub eni_ifindex: u32,
    /// Where [`Endpoint::epoch`] is compared: an index into the epoch map, never [`NO_SLOT`].
    pub slot: u32,
    /// What the epoch map holds at `slot` as long as this endpoint is valid, but for [`POLICY_EPOCH`].
    pub epoch: u32,
    /// Zero; room for options of the pod.
    pub flags: u32,
    /// IPv4 address; 0 if it has none.
    pub v4: u32,
    /// IPv6 address; all 0 if it has none.
    pub v6: [u32; 4],
    /// The ENI's IPv4 gateway; 0 if it has none.
    pub gateway_v4: u32,
    /// The ENI's IPv6 gateway; all 0 if it has none.
    pub gateway_v6: [u32; 4],
    /// What stands in frames from the pod: to the host end, from the pod.
    pub sent: MacPair,
    /// What is written into frames to the pod: to the pod, from the host end.
    pub received: MacPair,
    /// The first epoch of this pod: entries from before are of another one that had its slot.
    pub since: u32,
    /// Zero.
    pub spare: [u32; 2],
}

pod!(MacPair: 12, Endpoint: 96);
const _: () = assert!(offset_of!(Endpoint, v6) == 24 && offset_of!(Endpoint, sent) == 60);

/// Endpoints a node can have; ECS instance types end at a few hundred pods. Also the number of slots for them.
pub const MAX_ENDPOINTS: u32 = 4096;

/// The slot of nobody. Its epoch is 0 for ever.
pub const NO_SLOT: u32 = 0;

/// Entries of the epoch map: the endpoints' slots, then one slot for each bucket of other addresses.
pub const SLOTS: u32 = 2 * MAX_ENDPOINTS;

/// The bits of an epoch that count changes of policies. The others count changes of the way: a flow that was made before one of those
/// is void, while after a change of policies it only has to be judged again.
pub const POLICY_EPOCH: u32 = 0xffff;

/// The epoch after this one, when the way has changed.
#[must_use]
pub const fn next_epoch(epoch: u32) -> u32 {
    (epoch | POLICY_EPOCH).wrapping_add(1)
}

/// The epoch after this one, when policies have changed.
#[must_use]
pub const fn next_policy_epoch(epoch: u32) -> u32 {
    epoch & !POLICY_EPOCH | epoch.wrapping_add(1) & POLICY_EPOCH
}

/// Whether the way is the same in both epochs.
#[must_use]
pub const fn same_way(one: u32, other: u32) -> bool {
    (one ^ other) & !POLICY_EPOCH == 0
}

/// Whether an epoch is one of those from `first` to `last`, as far as the way goes.
#[must_use]
pub const fn is_between(first: u32, epoch: u32, last: u32) -> bool {
    let first = first & !POLICY_EPOCH;
    (epoch & !POLICY_EPOCH).wrapping_sub(first) <= (last & !POLICY_EPOCH).wrapping_sub(first)
}

/// The slot of an IPv4 address that no pod of this node has.
///
/// When a pod appears with an address, flows that were decided while the address was nobody's must be decided anew. Raising the
/// epoch of the address's bucket does that, for one flow in four thousand too many.
#[must_use]
pub const fn bucket_v4(address: u32) -> u32 {
    // Fibonacci hashing: the top bits of a product with 2^32/φ depend on every bit of the address.
    MAX_ENDPOINTS + (address.wrapping_mul(0x9e37_79b9) >> (32 - MAX_ENDPOINTS.trailing_zeros()))
}

/// The slot of an IPv6 address that no pod of this node has; see [`bucket_v4`].
#[must_use]
pub const fn bucket_v6(address: [u32; 4]) -> u32 {
    let [a, b, c, d] = address;
    bucket_v4((a ^ b.rotate_left(8)).wrapping_mul(0x85eb_ca6b) ^ (c ^ d.rotate_left(16)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_pairs_keep_transmission_order() {
        let pair = MacPair::new([1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]);
        assert_eq!((pair.destination(), pair.source()), ([1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]));
    }

    #[test]
    fn epochs_of_policies_leave_the_way_alone() {
        for epoch in [0, 1, 0xffff, 0x1_0000, 0x1_fffe, 0xffff_fffe, u32::MAX] {
            let (way, policy) = (next_epoch(epoch), next_policy_epoch(epoch));
            assert!(!same_way(epoch, way) && way & POLICY_EPOCH == 0, "{epoch:x}");
            assert!(same_way(epoch, policy) && policy != epoch, "{epoch:x}");
            assert!(is_between(epoch, policy, epoch) && is_between(epoch, epoch, way) && !is_between(way, epoch, way));
        }
    }

    #[test]
    fn buckets_stay_behind_the_endpoints_and_spread() {
        let mut seen = [false; SLOTS as usize];
        for host in 0..4096_u32 {
            let v4 = bucket_v4(u32::from_ne_bytes([10, 0, (host >> 8) as u8, host as u8]));
            let v6 = bucket_v6([0x1234, 0, 0, host.to_be()]);
            assert!((MAX_ENDPOINTS..SLOTS).contains(&v4) && (MAX_ENDPOINTS..SLOTS).contains(&v6));
            seen[v4 as usize] = true;
        }
        // A random function would hit 63 % of the buckets.
        assert!(seen.iter().filter(|s| **s).count() > 1800);
    }
}
