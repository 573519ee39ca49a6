//! Maglev: fair, the same everywhere, and calm.

use std::collections::BTreeMap;

use proptest::prelude::*;
use terway_core::objects::Protocol;
use terway_core::service::{BackendKey, maglev};

fn key(i: u32) -> BackendKey {
    BackendKey { address: std::net::Ipv4Addr::from(0x0a00_0000 + i * 7919).into(), port: 8080, protocol: Protocol::Tcp }
}

fn shares(table: &[u32]) -> BTreeMap<u32, u32> {
    let mut shares = BTreeMap::new();
    table.iter().for_each(|slot| *shares.entry(*slot).or_default() += 1);
    shares
}

#[test]
fn maglev_shares_of_equal_backends() {
    for count in [1, 2, 3, 7, 50, 100] {
        let backends: Vec<_> = (0..count).map(|i| (key(i), 1)).collect();
        let shares = shares(&maglev(1021, &backends));
        assert_eq!(shares.len(), count as usize);
        let (least, most) = (shares.values().min().unwrap(), shares.values().max().unwrap());
        assert!(most - least <= 1, "{count} backends: {least} to {most}");
    }
}

#[test]
fn maglev_shares_follow_weights() {
    let weights = [1u16, 2, 5, 10, 0];
    let backends: Vec<_> = (0..).zip(weights).map(|(i, w)| (key(i), w)).collect();
    let shares = shares(&maglev(16_381, &backends));
    assert!(!shares.contains_key(&4), "weight 0 gets nothing");
    for (i, weight) in (0..4).zip(weights) {
        let (got, due) = (f64::from(shares[&i]), 16_381.0 * f64::from(weight) / 18.0);
        assert!((got - due).abs() <= due * 0.01 + 2.0, "weight {weight}: {got} slots, {due:.1} are due");
    }
}

#[test]
fn maglev_disruption_of_one_backend() {
    // Losing one of n must move its own 1/n of the slots; the paper (figure 12) allows some others, which shrink as M/N grows.
    for (size, count) in [(1021, 10), (16_381, 100)] {
        let all: Vec<_> = (0..count).map(|i| (key(i), 1)).collect();
        let before = maglev(size, &all);
        let left: Vec<_> = all.iter().copied().filter(|(k, _)| *k != key(3)).collect();
        let after = maglev(size, &left);
        let moved = before
            .iter()
            .zip(&after)
            .filter(|(old, new)| **old != 3 && all[**old as usize].0 != left[**new as usize].0)
            .count();
        let limit = before.len() * 3 / 100;
        assert!(moved <= limit, "{moved} of {} slots moved without need", before.len());
    }
}

#[test]
fn maglev_table_is_stable() {
    // Nodes of different versions must agree: this table may never change.
    let backends: Vec<_> = (0..5).map(|i| (key(i), 1)).collect();
    let table = maglev(251, &backends);
    assert_eq!(table[..16], PINNED, "{:?}", &table[..16]);
}

const PINNED: [u32; 16] = [3, 1, 4, 1, 1, 4, 0, 1, 2, 4, 1, 3, 3, 1, 2, 4];

proptest! {
    #[test]
    fn maglev_is_order_independent(
        order in Just((0..12u32).collect::<Vec<_>>()).prop_shuffle(),
        weights in prop::collection::vec(0..20u16, 12),
    ) {
        let sorted: Vec<_> = (0..12).map(|i| (key(i), weights[i as usize])).collect();
        let shuffled: Vec<_> = order.iter().map(|i| (key(*i), weights[*i as usize])).collect();
        let resolve = |table: Vec<u32>, list: &[(BackendKey, u16)]| -> Vec<BackendKey> { table.iter().map(|s| list[*s as usize].0).collect() };
        prop_assert_eq!(resolve(maglev(251, &sorted), &sorted), resolve(maglev(251, &shuffled), &shuffled));
    }
}
