//! Edits of the configuration while pods run, and what the cloud takes away.

use std::time::Duration;

use terway_core::cloud::ErrorClass;
use terway_core::errors;
use terway_core::ident::IpStack;
use terway_core::ipam::{AddressState, Degradation, Effect, EniPhase, PoolMode, Reclaim, VSwitchSelection};

use crate::world::{Outcome, World, config, key};

const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn busy(pods: usize) -> World {
    let mut world = World::new(config(IpStack::Ipv4, 3, 4), &[100, 100]);
    for n in 0..pods {
        world.leased(n);
    }
    world.settle(secs(1));
    world
}

#[test]
fn removed_vswitch_drains_its_enis() {
    let mut world = busy(2);
    let old = world.pool.enis()[0].id.clone().unwrap();
    let mut new = world.config.clone();
    new.vswitches = vec!["vsw-b".into()];
    world.configure(new);
    assert_eq!(world.pool.enis()[0].phase, EniPhase::Mismatched);
    assert_eq!(world.pool.enis()[0].reason.as_ref().unwrap().code, errors::ENI_MISMATCH);
    let lease = world.leased(5);
    assert_eq!(world.cloud.enis[&lease.eni].vswitch, "vsw-b".into());
    world.del(&key(1));
    world.settle(secs(100));
    assert!(world.cloud.enis[&old].v4.len() <= 2, "what is idle goes back, but for the primary address");
    world.del(&key(0));
    world.settle(secs(100));
    assert!(!world.cloud.enis.contains_key(&old));
    assert_eq!(world.pool.problems(), []);
}

#[test]
fn reverted_config_edit() {
    let mut world = busy(2);
    world.del(&key(1));
    let (good, calls) = (world.config.clone(), world.cloud.calls.clone());
    let mut bad = good.clone();
    bad.security_groups = vec!["sg-typo".into()];
    world.configure(bad);
    world.settle(secs(10));
    assert_eq!(world.pool.stats().mismatched, 1);
    world.configure(good);
    world.settle(secs(5));
    assert_eq!((world.pool.stats().mismatched, &world.cloud.calls), (0, &calls));
}

#[test]
fn full_node_replaces_enis_one_by_one() {
    let mut world = busy(8);
    assert_eq!(world.cloud.enis.len(), 2);
    let mut new = world.config.clone();
    new.vswitches = vec!["vsw-b".into()];
    world.configure(new);
    let emptied = world.pool.get(&key(0)).unwrap().lease.eni;
    for n in 0..8 {
        if world.pool.get(&key(n)).unwrap().lease.eni == emptied {
            world.del(&key(n));
        }
    }
    world.settle(secs(6));
    let lease = world.leased(9);
    assert_eq!(world.cloud.enis[&lease.eni].vswitch, "vsw-b".into());
}

#[test]
fn degradation_l0_and_l1() {
    let mut world = busy(1);
    let good = world.config.clone();
    let mut bad = good.clone();
    bad.degradation = Degradation::L0;
    world.configure(bad.clone());
    world.drive();
    let calls = world.cloud.calls.clone();
    let add = world.add(&key(1));
    assert_eq!(world.answer(add).unwrap().unwrap_err().code, errors::DEGRADED);
    world.settle(secs(2_000));
    assert_eq!(world.cloud.calls, calls);
    bad.degradation = Degradation::L1;
    world.configure(bad);
    for n in 1..8 {
        world.leased(n);
    }
    for n in 0..8 {
        world.del(&key(n));
    }
    world.settle(secs(2_000));
    let released = |world: &World| world.cloud.calls.keys().any(|call| ["unassign", "detach", "delete"].contains(call));
    assert!(!released(&world) && world.pool.stats().idle == 8);
    world.configure(good);
    world.settle(secs(200));
    assert!(released(&world) && world.pool.stats().idle <= 4);
}

#[test]
fn pods_of_deleted_eni_are_reported() {
    let mut world = busy(2);
    world.settle(secs(60));
    let eni = world.pool.get(&key(0)).unwrap().lease.eni;
    world.cloud.tamper(&eni, None);
    world.settle(world.config.resync);
    assert_eq!(world.reported_loss.keys().cloned().collect::<Vec<_>>(), [key(0), key(1)]);
    let told = world.pool.problems();
    let reported_loss: Vec<_> = told.iter().filter(|e| e.code == errors::ENI_VANISHED).collect();
    assert!(reported_loss.len() == 2 && reported_loss.iter().all(|e| e.detail.contains(eni.as_str())), "{told:?}");
    assert_eq!(world.pool.addresses().iter().filter(|a| a.state == AddressState::Missing).count(), 2);
    assert_ne!(world.leased(5).eni, eni);
    for n in 0..2 {
        world.del(&key(n));
    }
    world.settle(world.config.resync * 3);
    assert_eq!(world.pool.problems(), []);
}

#[test]
fn unknown_address_needs_two_listings() {
    let mut world = busy(1);
    world.settle(secs(60));
    let eni = world.pool.enis()[0].id.clone().unwrap();
    world.cloud.add(&eni, terway_core::ident::Family::V4, 1).unwrap();
    world.settle(world.config.resync - secs(55));
    assert_eq!(world.pool.enis()[0].addresses.len(), 1, "seen once");
    world.settle(secs(6));
    assert_eq!((world.pool.enis()[0].addresses.len(), world.pool.stats().cooling), (2, 1));
}

#[test]
fn prefix_fallback_in_fragmented_vswitch() {
    let mut config = config(IpStack::Ipv4, 3, 10);
    config.prefixes = true;
    config.vswitches.truncate(1);
    // .1 to .40: one whole block of sixteen.
    let mut world = World::new(config, &[40]);
    for n in 0..25 {
        world.leased(n);
    }
    let enis = world.pool.enis();
    assert_eq!(enis.iter().map(|eni| eni.prefixes.len()).sum::<usize>(), 1);
    assert!(world.pool.vswitches()[0].fragmented_until.is_some());
    for n in 0..25 {
        world.del(&key(n));
    }
    world.settle(secs(300));
    assert!(world.pool.stats().idle <= 5, "{:?}", world.pool.stats());
}

#[test]
fn exclusive_eni_carries_one_pod() {
    let mut config = config(IpStack::Dual, 4, 10);
    config.mode = PoolMode::Exclusive;
    let mut world = World::new(config, &[100]);
    let enis: std::collections::BTreeSet<_> = (0..3).map(|n| world.leased(n).eni).collect();
    assert_eq!(enis.len(), 3);
    let add = world.add(&key(3));
    assert_eq!(world.answer(add).unwrap().unwrap_err().code, errors::NO_ADDRESS);
    world.del(&key(0));
    world.settle(secs(6));
    assert!(enis.contains(&world.leased(4).eni), "the ENI is used again");
}

#[test]
fn idle_reclaim_in_batches() {
    let mut config = config(IpStack::Ipv4, 3, 10);
    config.max_idle = 20;
    config.reclaim = Some(Reclaim { after: secs(100), interval: secs(50), batch: 2, jitter_permille: 100 });
    let mut world = World::new(config, &[100]);
    for n in 0..9 {
        world.leased(n);
    }
    for n in 1..9 {
        world.del(&key(n));
    }
    let mut idle = Vec::new();
    for _ in 0..8 {
        world.settle(secs(50));
        idle.push(world.pool.stats().idle);
    }
    assert_eq!(idle[0], 8);
    assert!(idle.windows(2).all(|w| w[0] - w[1] <= 2 && w[1] <= w[0]) && idle[7] <= 1, "{idle:?}");
}

#[test]
fn vswitch_with_most_addresses() {
    let mut config = config(IpStack::Ipv4, 4, 10);
    config.vswitch_selection = VSwitchSelection::Most;
    let mut world = World::new(config, &[30, 60]);
    let lease = world.leased(1);
    assert_eq!(world.cloud.enis[&lease.eni].vswitch, "vsw-b".into());
    assert_eq!(world.cloud.calls["count"], 1);
    assert_eq!(world.pool.vswitches()[1].available, Some(59));
}

#[test]
fn refused_vswitch_count_is_reported() {
    let mut config = config(IpStack::Ipv4, 4, 10);
    config.vswitch_selection = VSwitchSelection::Most;
    let mut world = World::new(config, &[30, 60]);
    world.add(&key(1));
    world.run_one(Outcome::Fails(ErrorClass::Throttled), |e| matches!(e, Effect::DescribeVSwitches { .. }));
    assert!(world.pool.problems().iter().any(|e| e.code == errors::CLOUD_THROTTLED), "{:?}", world.pool.problems());
    // Nobody needs another count, so nobody asks for one; the old refusal says nothing about now.
    world.settle(secs(60));
    assert_eq!(world.cloud.calls.get("count"), None);
    assert_eq!(world.pool.problems(), []);
}

#[test]
fn eni_without_nic_is_replaced() {
    let mut world = World::new(config(IpStack::Ipv4, 2, 4), &[100]);
    world.add(&key(1));
    world.run_one(Outcome::Fine, |e| matches!(e, Effect::CreateEni { .. }));
    world.run_one(Outcome::Fine, |e| matches!(e, Effect::AttachEni { .. }));
    let first = world.pool.enis()[0].id.clone().unwrap();
    for _ in 0..3 {
        world.run_one(Outcome::Fails(ErrorClass::Unknown), |e| matches!(e, Effect::ConfigureNic { .. }));
        world.advance(secs(3));
    }
    assert!(world.pool.problems().iter().any(|e| e.code == errors::NIC_MISSING));
    world.settle(secs(60));
    assert!(!world.cloud.enis.contains_key(&first));
    assert_ne!(world.leased(2).eni, first);
}
