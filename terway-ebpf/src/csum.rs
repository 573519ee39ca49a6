//! The Internet checksum, changed in place (RFC 1624).

/// The word of an IPv4 header that holds TTL, protocol and checksum, with the TTL one lower and the checksum still right.
///
/// `None` if the TTL does not allow another hop. The sum over the whole header stays what it was, so a checksum that the NIC
/// computed over the packet (`CHECKSUM_COMPLETE`) stays right too.
#[inline(always)]
#[must_use]
pub fn decrement_ttl(word: u32) -> Option<u32> {
    let [ttl, protocol, high, low] = word.to_ne_bytes();
    if ttl <= 1 {
        return None;
    }
    // The TTL is the high byte of its 16-bit word, so the word falls by 0x0100 and the complement of the sum rises by it, with
    // end-around carry (`ip_decrease_ttl`, include/net/ip.h). The sum does not mind the byte order.
    let sum = u32::from(u16::from_ne_bytes([high, low])) + u32::from(0x0100_u16.to_be());
    let folded = (sum + u32::from(sum >= 0xffff)) as u16;
    let [high, low] = folded.to_ne_bytes();
    Some(u32::from_ne_bytes([ttl - 1, protocol, high, low]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// RFC 1071, over bytes.
    fn sum(bytes: &[u8]) -> u16 {
        let mut total: u32 = bytes.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c[1]]))).sum();
        while total > 0xffff {
            total = (total & 0xffff) + (total >> 16);
        }
        total as u16
    }

    proptest! {
        #[test]
        fn the_sum_stays_right(mut header in proptest::array::uniform20(any::<u8>())) {
            header[0] = 0x45;
            header[10] = 0;
            header[11] = 0;
            let check = !sum(&header);
            header[10..12].copy_from_slice(&check.to_be_bytes());
            let ttl = header[8];
            let word = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
            match decrement_ttl(word) {
                None => prop_assert!(ttl <= 1),
                Some(word) => {
                    header[8..12].copy_from_slice(&word.to_ne_bytes());
                    prop_assert_eq!(header[8], ttl - 1);
                    prop_assert_eq!(sum(&header), 0xffff);
                }
            }
        }
    }
}
