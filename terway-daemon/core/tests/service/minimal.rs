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
fn one_endpoint_more_is_one_backend_one_table_one_frontend() {
    let mut world = world(20);
    let endpoints = (0..5).map(|e| endpoint(&format!("10.{e}.0.8"), ME)).collect();
    let plan = world.put(slice("e7", "s7", TCP, endpoints));
    assert!(matches!(&plan.ops[..], [Op::PutBackend(..), Op::PutTable(..), Op::PutFrontend(..)]), "{:?}", plan.ops);
    assert!(matches!(&plan.retire[..], [Op::RemoveTable(_)]), "{:?}", plan.retire);
    world.check();
}

#[test]
fn one_endpoint_less_is_retired_after_nobody_can_draw_it() {
    let mut world = world(3);
    let endpoints = (0..3).map(|e| endpoint(&format!("10.{e}.0.2"), ME)).collect();
    let plan = world.put(slice("e1", "s1", TCP, endpoints));
    assert!(matches!(&plan.ops[..], [Op::PutTable(..), Op::PutFrontend(..)]), "{:?}", plan.ops);
    assert!(matches!(&plan.retire[..], [Op::RemoveTable(_), Op::RemoveBackend(..)]), "{:?}", plan.retire);
}

#[test]
fn flows_to_a_udp_endpoint_end_with_it_and_not_before_all_packets_meet_the_others() {
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
fn a_udp_backend_that_falls_silent_gets_a_new_generation_and_a_tcp_one_does_not() {
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
fn a_change_of_nothing_that_matters_writes_nothing() {
    let mut world = world(2);
    let mut same = service("s1", "10.96.0.2", &[("", 80, Protocol::Tcp)]);
    same.meta.resource_version = "99".into();
    assert!(world.put(same).is_empty());
    let reordered = (0..4).rev().map(|e| endpoint(&format!("10.{e}.0.2"), ME)).collect();
    assert!(world.put(slice("e1", "s1", TCP, reordered)).is_empty());
}

#[test]
fn equal_tables_are_one() {
    let mut world = World::new();
    for i in 0..10 {
        let name = format!("s{i}");
        world.put(service(&name, &format!("10.96.0.{}", i + 1), &[("", 80, Protocol::Tcp)]));
        world.put(slice(&format!("e{i}"), &name, TCP, vec![endpoint("10.0.0.1", ME), endpoint("10.0.0.2", ME)]));
    }
    assert_eq!((world.kernel.tables.len(), world.kernel.backends.len()), (1, 2));
}

#[test]
fn a_backend_that_comes_back_is_not_mistaken_for_the_one_that_left() {
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
