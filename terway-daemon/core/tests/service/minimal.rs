//! A small change costs few operations.

use terway_core::objects::Protocol;
use terway_core::service::{BackendState, Op};

use crate::world::{ME, World, endpoint, service, slice};

const TCP: &[(&str, u16, Protocol)] = &[("", 8080, Protocol::Tcp)];
const UDP: &[(&str, u16, Protocol)] = &[("", 5353, Protocol::Udp)];

fn world(services: usize) -> World {
    let mut world = World::new();
    for i in 0..services {
        let name = format!("s{i}");
        world.put(service(&name, &format!("10.96.{}.{}", i / 250, i % 250 + 1), &[("", 80, Protocol::Tcp)]));
        let endpoints = (0..4).map(|e| endpoint(&format!("10.{e}.{}.{}", i / 250, i % 250 + 1), ME)).collect();
        world.put(slice(&format!("e{i}"), &name, TCP, endpoints));
    }
    world
}

#[test]
fn endpoint_added_writes_minimal_operations() {
    let mut world = world(20);
    let endpoints = (0..5).map(|e| endpoint(&format!("10.{e}.0.8"), ME)).collect();
    let plan = world.put(slice("e7", "s7", TCP, endpoints));
    assert!(matches!(&plan.ops[..], [Op::PutBackend(..), Op::PutTable(..), Op::PutFrontend(..)]), "{:?}", plan.ops);
    assert!(matches!(&plan.retire[..], [Op::RemoveTable(_)]), "{:?}", plan.retire);
    world.check();
}

#[test]
fn endpoint_removed_after_grace_period() {
    let mut world = world(3);
    let endpoints = (0..3).map(|e| endpoint(&format!("10.{e}.0.2"), ME)).collect();
    let plan = world.put(slice("e1", "s1", TCP, endpoints));
    assert!(matches!(&plan.ops[..], [Op::PutTable(..), Op::PutFrontend(..)]), "{:?}", plan.ops);
    assert!(matches!(&plan.retire[..], [Op::RemoveTable(_), Op::RemoveBackend(..)]), "{:?}", plan.retire);
}

#[test]
fn udp_flows_end_after_table_update() {
    let mut world = World::new();
    world.put(service("dns", "10.96.0.10", &[("", 53, Protocol::Udp)]));
    world.put(slice("e", "dns", UDP, vec![endpoint("10.0.0.1", ME), endpoint("10.0.0.2", ME)]));
    let plan = world.put(slice("e", "dns", UDP, vec![endpoint("10.0.0.2", ME)]));
    let ops = &plan.ops[..];
    assert!(
        matches!(ops, [Op::PutTable(..), Op::PutFrontend(..), Op::RcuBarrier, Op::InvalidateBackend(..)]),
        "{ops:?}"
    );
    assert!(matches!(&plan.retire[..], [Op::RemoveTable(_), Op::RemoveBackend(..)]), "{:?}", plan.retire);
    world.check();
}

#[test]
fn unready_udp_backend_gets_new_generation() {
    for (ports, protocol, new_generation) in [(UDP, Protocol::Udp, true), (TCP, Protocol::Tcp, false)] {
        let mut world = World::new();
        world.put(service("dns", "10.96.0.10", &[("", 53, protocol)]));
        world.put(slice("e", "dns", ports, vec![endpoint("10.0.0.1", ME), endpoint("10.0.0.2", ME)]));
        let before = *world.kernel.backends.values().find(|b| b.key.address.to_string() == "10.0.0.1").unwrap();
        let mut draining = endpoint("10.0.0.1", ME);
        (draining.ready, draining.terminating) = (false, true);
        world.put(slice("e", "dns", ports, vec![draining.clone(), endpoint("10.0.0.2", ME)]));
        let now = *world.kernel.backends.values().find(|b| b.key == before.key).unwrap();
        assert_eq!((now.state, now.generation), (BackendState::Draining, before.generation), "it still answers");
        draining.serving = false;
        world.put(slice("e", "dns", ports, vec![draining, endpoint("10.0.0.2", ME)]));
        let now = *world.kernel.backends.values().find(|b| b.key == before.key).unwrap();
        assert_eq!(now.state, BackendState::Unready);
        assert_eq!(now.generation != before.generation, new_generation, "{protocol}");
    }
}

#[test]
fn irrelevant_change_writes_nothing() {
    let mut world = world(2);
    let mut same = service("s1", "10.96.0.2", &[("", 80, Protocol::Tcp)]);
    same.meta.resource_version = "99".into();
    assert!(world.put(same).is_empty());
    let reordered = (0..4).rev().map(|e| endpoint(&format!("10.{e}.0.2"), ME)).collect();
    assert!(world.put(slice("e1", "s1", TCP, reordered)).is_empty());
}

#[test]
fn equal_backend_tables_are_shared() {
    let mut world = World::new();
    for i in 0..10 {
        let name = format!("s{i}");
        world.put(service(&name, &format!("10.96.0.{}", i + 1), &[("", 80, Protocol::Tcp)]));
        world.put(slice(&format!("e{i}"), &name, TCP, vec![endpoint("10.0.0.1", ME), endpoint("10.0.0.2", ME)]));
    }
    assert_eq!((world.kernel.tables.len(), world.kernel.backends.len()), (1, 2));
}

#[test]
fn returning_backend_has_new_generation() {
    let mut world = world(1);
    let gone = *world.kernel.backends.values().next().unwrap();
    let others = |world: &World| -> Vec<_> {
        let left = world.kernel.backends.values().filter(|b| b.key != gone.key);
        left.map(|b| endpoint(&b.key.address.to_string(), ME)).collect()
    };
    let rest = others(&world);
    world.put(slice("e0", "s0", TCP, rest.clone()));
    let back = rest.into_iter().chain([endpoint(&gone.key.address.to_string(), ME)]).collect();
    world.put(slice("e0", "s0", TCP, back));
    let new = world.kernel.backends.values().find(|b| b.key == gone.key).unwrap();
    assert_ne!(new.generation, gone.generation);
}
