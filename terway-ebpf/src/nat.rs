//! NAT: tuples, checksum updates and source ports.

use terway_abi::{Flow, flow_flags};

use crate::family::Family;

/// The change of a ones' complement sum when `old` becomes `new` (RFC 1624), added to `sum`. Words in network byte order.
#[inline(always)]
#[must_use]
pub fn checksum_delta(old: u32, new: u32, sum: u32) -> u32 {
    let total = u64::from(!old) + u64::from(new) + u64::from(sum);
    // The first fold leaves a carry of one at most.
    let total = (total & 0xffff_ffff) + (total >> 32);
    ((total & 0xffff_ffff) + (total >> 32)) as u32
}

/// A checksum field after a change of its data by `sum`.
#[inline(always)]
#[must_use]
pub fn update_checksum(check: u16, sum: u32) -> u16 {
    let total = u32::from(!check) + (sum & 0xffff) + (sum >> 16);
    let total = (total & 0xffff) + (total >> 16);
    !(((total & 0xffff) + (total >> 16)) as u16)
}

/// A field that holds a sum, not its complement, after a change of its data by `sum`. Never 0.
#[inline(always)]
#[must_use]
pub fn update_sum(field: u16, sum: u32) -> u16 {
    match !update_checksum(!field, sum) {
        // The other representation of zero: 0 means "no checksum" in UDP (RFC 768).
        0 => u16::MAX,
        sum => sum,
    }
}

/// The sum of two ones' complement sums.
#[inline(always)]
#[must_use]
pub const fn add_sums(a: u32, b: u32) -> u32 {
    let (sum, carry) = a.overflowing_add(b);
    // After a carry the addition cannot overflow.
    sum + carry as u32
}

/// Whether a ones' complement sum is zero, in either representation.
#[inline(always)]
#[must_use]
pub const fn is_zero_sum(sum: u32) -> bool {
    let folded = (sum & 0xffff) + (sum >> 16);
    folded == 0 || folded == 0xffff || folded == 0x1_fffe
}

/// The tuple of a packet, in network byte order. Addresses by reference: the kernel's stack is small.
#[derive(Clone, Copy)]
pub struct Tuple<'a, A> {
    /// Source address.
    pub src: &'a A,
    /// Destination address.
    pub dst: &'a A,
    /// Source port, then destination port.
    pub ports: u32,
}

/// Sets the NAT of a flow entry: packets of the initiator with the tuple `old` get the tuple `new`.
#[inline(always)]
pub fn set_nat<F: Family>(flow: &mut Flow<F::Addr>, old: Tuple<'_, F::Addr>, new: Tuple<'_, F::Addr>) {
    F::assign(&mut flow.nat_src, new.src);
    F::assign(&mut flow.nat_dst, new.dst);
    flow.nat_ports = new.ports;
    flow.address_delta = F::checksum_delta(old.dst, new.dst, F::checksum_delta(old.src, new.src, 0));
    flow.port_delta = checksum_delta(old.ports, new.ports, 0);
    let [side, _] = &mut flow.directions;
    side.flags |= flow_flags::NAT;
}

/// A range of source ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    /// The first port, in host byte order.
    pub first: u32,
    /// Number of ports.
    pub count: u32,
}

impl PortRange {
    /// The default `ip_local_port_range` of Linux, which contains no NodePort: for connections without SNAT to the node.
    pub const EPHEMERAL: Self = Self { first: 32_768, count: 28_232 };

    /// The port for a random number, as in the packet.
    #[inline(always)]
    #[must_use]
    pub const fn pick(self, chance: u32) -> u16 {
        // The high word of the product is uniform over the range, without a division.
        let place = (chance as u64 * self.count as u64) >> 32;
        (self.first.wrapping_add(place as u32) as u16).to_be()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sum(words: &[u32]) -> u16 {
        let mut total: u64 = words.iter().flat_map(|w| [u64::from(w & 0xffff), u64::from(w >> 16)]).sum();
        while total > 0xffff {
            total = (total & 0xffff) + (total >> 16);
        }
        total as u16
    }

    proptest! {
        /// Changing any words by their difference leaves a right checksum right.
        #[test]
        fn checksum_update_keeps_checksums_valid(rest in any::<u32>(), old in any::<[u32; 3]>(), new in any::<[u32; 3]>()) {
            let check = !sum(&[rest, old[0], old[1], old[2]]);
            let updated = (0..3).fold(0, |sum, i| checksum_delta(old[i], new[i], sum));
            let adjusted = update_checksum(check, updated);
            // Both zeros of ones' complement are right.
            let total = sum(&[rest, new[0], new[1], new[2], u32::from(adjusted)]);
            prop_assert!(total == 0xffff || total == 0, "{total:x}");
        }

        /// A combined delta of addresses and ports changes every full checksum, unless it is zero.
        #[test]
        fn combined_delta_changes_a_full_checksum_unless_zero(
            field in any::<u16>(),
            a in any::<u32>(),
            b in prop_oneof![any::<u32>().boxed(), Just(0).boxed(), Just(u32::MAX).boxed()],
            opposite in any::<bool>(),
        ) {
            let b = if opposite { !a } else { b };
            let both = add_sums(a, b);
            prop_assert_eq!(u64::from(both) % 0xffff, (u64::from(a) + u64::from(b)) % 0xffff);
            prop_assert_eq!(is_zero_sum(both), both.is_multiple_of(0xffff));
            prop_assert!(update_checksum(field, both) != field || is_zero_sum(both));
            let updated = update_sum(field, a);
            prop_assert_eq!(u64::from(updated) % 0xffff, (u64::from(field) + u64::from(a)) % 0xffff);
            prop_assert!(updated != 0);
        }

        #[test]
        fn picked_ports_are_in_range(chance in any::<u32>(), first in 1_u32..65_536, count in 1_u32..65_536) {
            prop_assert!((32_768..61_000).contains(&u16::from_be(PortRange::EPHEMERAL.pick(chance))));
            let count = count.min(65_536 - first);
            let ports = PortRange { first, count };
            prop_assert!((first..first + count).contains(&u16::from_be(ports.pick(chance)).into()));
        }
    }
}
