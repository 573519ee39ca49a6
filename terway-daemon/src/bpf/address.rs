//! Addresses as the maps hold them: one native-endian word for each four octets in network byte order.

use std::net::{Ipv4Addr, Ipv6Addr};

/// The word of an IPv4 address.
pub(super) fn word(address: Ipv4Addr) -> u32 {
    u32::from_ne_bytes(address.octets())
}

/// The four words of an IPv6 address.
pub(super) fn words(address: Ipv6Addr) -> [u32; 4] {
    let bytes = address.octets();
    std::array::from_fn(|i| u32::from_ne_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]]))
}

/// The IPv4 address of a word.
pub(super) fn address_v4(word: u32) -> Ipv4Addr {
    Ipv4Addr::from(word.to_ne_bytes())
}

/// The IPv6 address of four words.
pub(super) fn address_v6(words: [u32; 4]) -> Ipv6Addr {
    let mut bytes = [0; 16];
    for (chunk, word) in bytes.chunks_exact_mut(4).zip(words) {
        chunk.copy_from_slice(&word.to_ne_bytes());
    }
    Ipv6Addr::from(bytes)
}
