//! Maglev hashing: a table that every node fills alike, and that changes little when a backend comes or goes.
//!
//! "Maglev: A Fast and Reliable Software Network Load Balancer" (NSDI 2016), section 3.4, with weights: in each round a backend takes its next
//! preferred slot only if its share so far allows it.

use std::net::IpAddr;

use super::model::BackendKey;

/// Primes that a table may have as its size.
pub const MAGLEV_SIZES: [u32; 10] = [251, 509, 1021, 2039, 4093, 8191, 16_381, 32_749, 65_521, 131_071];

/// Below this many slots for each backend the shares of a Maglev table get uneven by tens of percent.
const SLOTS_PER_BACKEND: usize = 8;

/// The size for so many backends: the desired one, or the next that is large enough.
pub(super) fn size(desired: u32, backends: usize) -> u32 {
    let least = u32::try_from(backends.saturating_mul(SLOTS_PER_BACKEND)).unwrap_or(u32::MAX);
    if least <= desired {
        return desired;
    }
    MAGLEV_SIZES.into_iter().find(|prime| *prime >= least).unwrap_or(MAGLEV_SIZES[MAGLEV_SIZES.len() - 1]).max(desired)
}

/// Fills a table of `size` slots, a prime, with indices into `backends`, whose second part are weights.
///
/// The result depends on addresses, ports, protocols and weights alone, not on the order of `backends`. Backends of weight 0 get nothing.
#[must_use]
pub fn maglev(size: u32, backends: &[(BackendKey, u16)]) -> Vec<u32> {
    struct Turn {
        backend: u32,
        position: u64,
        skip: u64,
        weight: u64,
        /// What `round * weight` must reach before the next turn.
        due: u64,
    }
    let size = u64::from(size.max(1));
    let mut order: Vec<usize> = (0..backends.len()).filter(|i| backends[*i].1 > 0).collect();
    order.sort_unstable_by_key(|i| backends[*i].0);
    let Some(heaviest) = order.iter().map(|i| u64::from(backends[*i].1)).max() else { return Vec::new() };
    let mut turns: Vec<Turn> = order
        .into_iter()
        .map(|i| {
            let (key, weight) = backends[i];
            Turn {
                backend: i as u32,
                position: hash(&key, 0x7465_7277_6179_0001) % size,
                skip: hash(&key, 0x7465_7277_6179_0002) % (size - 1).max(1) + 1,
                weight: u64::from(weight),
                due: heaviest,
            }
        })
        .collect();
    const FREE: u32 = u32::MAX;
    let mut slots = vec![FREE; size as usize];
    let mut left = slots.len();
    let mut round = 0;
    while left > 0 {
        round += 1;
        for turn in &mut turns {
            if round * turn.weight < turn.due {
                continue;
            }
            turn.due += heaviest;
            // `skip` and the prime size have no common divisor, so the walk meets every slot.
            while slots[turn.position as usize] != FREE {
                turn.position = (turn.position + turn.skip) % size;
            }
            slots[turn.position as usize] = turn.backend;
            left -= 1;
            if left == 0 {
                break;
            }
        }
    }
    slots
}

/// FNV-1a over the backend's bytes, finished with the mixer of SplitMix64. It must never change: nodes of different versions share a table.
fn hash(key: &BackendKey, seed: u64) -> u64 {
    let mut state = 0xcbf2_9ce4_8422_2325 ^ seed;
    let mut eat = |byte: u8| state = (state ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    match key.address {
        IpAddr::V4(address) => address.octets().into_iter().for_each(&mut eat),
        IpAddr::V6(address) => address.octets().into_iter().for_each(&mut eat),
    }
    key.port.to_be_bytes().into_iter().for_each(&mut eat);
    eat(key.protocol.number());
    state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}
