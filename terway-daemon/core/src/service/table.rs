//! From weighted backends to the slots of a table.

use super::maglev::{maglev, size};
use super::model::{Algorithm, BackendKey};

/// Slots that weights may expand to in a table of equal slots; beyond it they are scaled down.
const EXPANDED: u64 = 1024;

/// The slots for backends with weights, as indices into `backends`; empty only if there is no backend.
///
/// `backends` are in ascending order of their keys, so that equal sets give equal tables.
pub(super) fn slots(algorithm: Algorithm, maglev_size: u32, backends: &[(BackendKey, u16)]) -> Vec<u32> {
    // Nobody wants new clients: then all are as good as each other, and refusing would be worse.
    let all_zero = backends.iter().all(|(_, weight)| *weight == 0);
    let weight = |weight: u16| if all_zero { 1 } else { weight };
    match algorithm {
        Algorithm::Maglev => {
            let weighted: Vec<_> = backends.iter().map(|(key, w)| (*key, weight(*w))).collect();
            maglev(size(maglev_size, weighted.len()), &weighted)
        }
        Algorithm::LeastConnections => {
            (0..).zip(backends).filter(|(_, (_, w))| weight(*w) > 0).map(|(i, _)| i).collect()
        }
        Algorithm::Random | Algorithm::RoundRobin => {
            let shares = shares(backends.iter().map(|(_, w)| u64::from(weight(*w))).collect());
            if algorithm == Algorithm::Random {
                (0..).zip(shares).flat_map(|(i, share)| std::iter::repeat_n(i, share as usize)).collect()
            } else {
                interleaved(&shares)
            }
        }
    }
}

/// Weights in lowest terms, scaled down where their sum is more than [`EXPANDED`]; a positive weight stays positive.
fn shares(mut weights: Vec<u64>) -> Vec<u64> {
    let divisor = weights.iter().copied().fold(0, gcd).max(1);
    weights.iter_mut().for_each(|w| *w /= divisor);
    let sum: u64 = weights.iter().sum();
    let count = weights.iter().filter(|w| **w > 0).count() as u64;
    if sum > EXPANDED && sum > count {
        weights.iter_mut().filter(|w| **w > 0).for_each(|w| *w = (*w * EXPANDED / sum).max(1));
    }
    weights
}

const fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Each index as often as its share, as far apart as can be: in each step all gain their share, and who has most pays the sum and is next
/// (the "smooth" weighted round-robin of nginx).
fn interleaved(shares: &[u64]) -> Vec<u32> {
    let sum: u64 = shares.iter().sum();
    if shares.iter().all(|share| *share <= 1) {
        return (0..).zip(shares).filter(|(_, share)| **share > 0).map(|(i, _)| i).collect();
    }
    let mut credit = vec![0i64; shares.len()];
    let mut order = Vec::with_capacity(sum as usize);
    for _ in 0..sum {
        for (gained, share) in credit.iter_mut().zip(shares) {
            *gained += *share as i64;
        }
        let richest = (0..credit.len()).max_by_key(|i| (credit[*i], std::cmp::Reverse(*i))).unwrap_or(0);
        credit[richest] -= sum as i64;
        order.push(richest as u32);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::Protocol;

    fn backends(weights: &[u16]) -> Vec<(BackendKey, u16)> {
        let key = |i: usize| BackendKey { address: [10, 0, 0, i as u8].into(), port: 80, protocol: Protocol::Tcp };
        weights.iter().enumerate().map(|(i, w)| (key(i), *w)).collect()
    }

    #[test]
    fn weights_become_slots_in_lowest_terms() {
        assert_eq!(slots(Algorithm::Random, 251, &backends(&[10, 20, 0])), [0, 1, 1]);
        assert_eq!(slots(Algorithm::Random, 251, &backends(&[0, 0])), [0, 1], "all zero is all equal");
        assert_eq!(slots(Algorithm::Random, 251, &backends(&[])), [0u32; 0]);
        assert_eq!(slots(Algorithm::LeastConnections, 251, &backends(&[5, 0, 9])), [0, 2]);
    }

    #[test]
    fn round_robin_spreads_the_heavy_one() {
        assert_eq!(slots(Algorithm::RoundRobin, 251, &backends(&[5, 1, 1])), [0, 0, 1, 0, 2, 0, 0]);
        assert_eq!(slots(Algorithm::RoundRobin, 251, &backends(&[1, 1, 1])), [0, 1, 2]);
    }

    #[test]
    fn many_weights_are_scaled_and_nobody_vanishes() {
        let mut weights = vec![100; 40];
        weights.push(1);
        let slots = slots(Algorithm::Random, 251, &backends(&weights));
        assert!(slots.len() <= 1100, "{}", slots.len());
        assert_eq!(slots.iter().filter(|i| **i == 40).count(), 1);
    }
}
