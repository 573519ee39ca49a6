//! Translation: what a flow of a Service writes into its packets, and what that does to their checksums.

use terway_abi::{Flow, flow_flags};

use crate::family::Family;

/// The ones' complement sum that is added when `old` becomes `new` (RFC 1624): of words as they stand in the packet.
#[inline(always)]
#[must_use]
pub fn difference(old: u32, new: u32, sum: u32) -> u32 {
    let total = u64::from(!old) + u64::from(new) + u64::from(sum);
    // Twice at most: the first fold leaves a carry of one.
    let total = (total & 0xffff_ffff) + (total >> 32);
    ((total & 0xffff_ffff) + (total >> 32)) as u32
}

/// A checksum field after its data grew by this sum.
#[inline(always)]
#[must_use]
pub fn adjust(check: u16, sum: u32) -> u16 {
    let total = u32::from(!check) + (sum & 0xffff) + (sum >> 16);
    let total = (total & 0xffff) + (total >> 16);
    !(((total & 0xffff) + (total >> 16)) as u16)
}

/// A field that holds a sum, not its complement, after its data grew by this sum. Never 0 if it was not.
#[inline(always)]
#[must_use]
pub fn grow(field: u16, sum: u32) -> u16 {
    match !adjust(!field, sum) {
        // Zero's other form: as itself it would say in UDP that there is no checksum (RFC 768).
        0 => u16::MAX,
        sum => sum,
    }
}

/// Two ones' complement sums in one.
#[inline(always)]
#[must_use]
pub const fn total(a: u32, b: u32) -> u32 {
    let (sum, carry) = a.overflowing_add(b);
    // After a carry there is room for it.
    sum + carry as u32
}

/// Whether a ones' complement sum changes nothing; zero has two forms.
#[inline(always)]
#[must_use]
pub const fn is_nothing(sum: u32) -> bool {
    let folded = (sum & 0xffff) + (sum >> 16);
    folded == 0 || folded == 0xffff || folded == 0x1_fffe
}

/// Addresses and ports of a packet, as in the packet. By reference: the kernel's stack is small.
#[derive(Clone, Copy)]
pub struct Tuple<'a, A> {
    /// Source address.
    pub src: &'a A,
    /// Destination address.
    pub dst: &'a A,
    /// Source port, then destination port.
    pub ports: u32,
}

/// Writes into a flow that the packets of its maker, which look like `old`, become `new`.
#[inline(always)]
pub fn translate<F: Family>(flow: &mut Flow<F::Addr>, old: Tuple<'_, F::Addr>, new: Tuple<'_, F::Addr>) {
    F::assign(&mut flow.nat_src, new.src);
    F::assign(&mut flow.nat_dst, new.dst);
    flow.nat_ports = new.ports;
    flow.address_delta = F::difference(old.dst, new.dst, F::difference(old.src, new.src, 0));
    flow.port_delta = difference(old.ports, new.ports, 0);
    let [side, _] = &mut flow.directions;
    side.flags |= flow_flags::NAT;
}

/// Source ports to draw from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// The first one, as a number.
    pub first: u32,
    /// How many.
    pub count: u32,
}

impl Ports {
    /// What Linux gives to clients by default (`ip_local_port_range`), and so no NodePort: for clients that keep their address.
    pub const CLIENTS: Self = Self { first: 32_768, count: 28_232 };

    /// One of them, as in the packet.
    #[inline(always)]
    #[must_use]
    pub const fn draw(self, chance: u32) -> u16 {
        // The top bits of a product fall evenly, without the division that a remainder takes.
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
        fn checksums_stay_right(rest in any::<u32>(), old in any::<[u32; 3]>(), new in any::<[u32; 3]>()) {
            let check = !sum(&[rest, old[0], old[1], old[2]]);
            let grown = (0..3).fold(0, |sum, i| difference(old[i], new[i], sum));
            let adjusted = adjust(check, grown);
            // Both zeros of ones' complement are right.
            let total = sum(&[rest, new[0], new[1], new[2], u32::from(adjusted)]);
            prop_assert!(total == 0xffff || total == 0, "{total:x}");
        }

        /// Telling of everything at once shows in every field but where there is nothing to tell.
        #[test]
        fn a_whole_checksum_changes_or_there_is_nothing_to_tell(
            field in any::<u16>(),
            a in any::<u32>(),
            b in prop_oneof![any::<u32>().boxed(), Just(0).boxed(), Just(u32::MAX).boxed()],
            opposite in any::<bool>(),
        ) {
            let b = if opposite { !a } else { b };
            let both = total(a, b);
            prop_assert_eq!(u64::from(both) % 0xffff, (u64::from(a) + u64::from(b)) % 0xffff);
            prop_assert_eq!(is_nothing(both), both.is_multiple_of(0xffff));
            prop_assert!(adjust(field, both) != field || is_nothing(both));
            let grown = grow(field, a);
            prop_assert_eq!(u64::from(grown) % 0xffff, (u64::from(field) + u64::from(a)) % 0xffff);
            prop_assert!(grown != 0);
        }

        #[test]
        fn ports_are_of_the_range(chance in any::<u32>(), first in 1_u32..65_536, count in 1_u32..65_536) {
            prop_assert!((32_768..61_000).contains(&u16::from_be(Ports::CLIENTS.draw(chance))));
            let count = count.min(65_536 - first);
            let ports = Ports { first, count };
            prop_assert!((first..first + count).contains(&u16::from_be(ports.draw(chance)).into()));
        }
    }
}
