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
        Algorithm::Random | Algorithm::LeastConnections => {
            let shares = shares(backends.iter().map(|(_, w)| u64::from(weight(*w))).collect());
            (0..).zip(shares).flat_map(|(i, share)| std::iter::repeat_n(i, share as usize)).collect()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::Protocol;

    fn backends(weights: &[u16]) -> Vec<(BackendKey, u16)> {
        let key = |i: usize| BackendKey { address: [10, 0, 0, i as u8].into(), port: 80, protocol: Protocol::Tcp };
        weights.iter().enumerate().map(|(i, w)| (key(i), *w)).collect()
    }

    #[test]
    fn weights_in_lowest_terms() {
        assert_eq!(slots(Algorithm::Random, 251, &backends(&[10, 20, 0])), [0, 1, 1]);
        assert_eq!(slots(Algorithm::Random, 251, &backends(&[0, 0])), [0, 1], "all zero is all equal");
        assert_eq!(slots(Algorithm::Random, 251, &backends(&[])), [0u32; 0]);
        assert_eq!(slots(Algorithm::LeastConnections, 251, &backends(&[2, 0, 1])), [0, 0, 2]);
    }

    #[test]
    fn many_weights_are_scaled() {
        let mut weights = vec![100; 40];
        weights.push(1);
        let slots = slots(Algorithm::Random, 251, &backends(&weights));
        assert!(slots.len() <= 1100, "{}", slots.len());
        assert_eq!(slots.iter().filter(|i| **i == 40).count(), 1);
    }
}
