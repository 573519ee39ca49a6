//! Many pods at once on a cold node: how long it takes, and how many calls.

use std::time::Duration;

use terway_core::ident::IpStack;
use terway_core::ipam::{Effect, Event, PoolConfig, Reply};

use crate::world::{World, config, key};

/// What the real API takes, as measured by others (issue 3, part 9).
const fn takes(effect: &Effect) -> Duration {
    Duration::from_millis(match effect {
        Effect::CreateEni { .. } => 800,
        Effect::AttachEni { .. } => 3_000,
        Effect::Assign { .. } | Effect::AssignPrefixes { .. } => 300,
        Effect::ConfigureNic { .. } => 50,
        Effect::DescribeVSwitches { .. } | Effect::TakeInventory { .. } => 100,
        Effect::Connect { .. } => 3,
        _ => 0,
    })
}

fn node(stack: IpStack, adapters: u32, per_eni: u32) -> PoolConfig {
    let mut config = config(stack, adapters, per_eni);
    (config.max_idle, config.batch_window) = (20, Duration::from_millis(20));
    config
}

/// All pods come within 20 ms. Returns the time to the last one and the calls that make something.
fn burst(config: &PoolConfig, pods: usize) -> (Duration, u32) {
    let mut world = World::new(config.clone(), &[2_000]);
    world.settle(Duration::from_secs(1));
    let mut tickets = Vec::new();
    for n in 0..pods {
        world.advance(Duration::from_micros(200));
        tickets.push(world.add(&key(n)));
    }
    let took = world.settle_timed(Duration::from_secs(20), takes);
    for ticket in tickets {
        assert!(matches!(world.answers.get(&ticket), Some(Ok(Reply::Attached(_)))), "{:?}", world.answers.get(&ticket));
    }
    let made = ["create", "attach", "assign"].iter().filter_map(|call| world.cloud.calls.get(call));
    (took, made.sum())
}

#[test]
fn cold_node_with_100_pods() {
    // (adapters, addresses per ENI, stack, prefixes)
    let nodes = [
        (12, 10, IpStack::Ipv4, false),
        (8, 15, IpStack::Ipv4, false),
        (5, 30, IpStack::Ipv4, false),
        (3, 50, IpStack::Ipv4, false),
        (12, 10, IpStack::Ipv6, false),
        (12, 10, IpStack::Dual, false),
        (8, 20, IpStack::Dual, false),
        (8, 10, IpStack::Ipv4, true),
        (8, 10, IpStack::Dual, true),
    ];
    for (adapters, per_eni, stack, prefixes) in nodes {
        let mut config = node(stack, adapters, per_eni);
        config.prefixes = prefixes;
        let (took, calls) = burst(&config, 100);
        let enis = 100u32.div_ceil(config.units_per_eni());
        // IPv6 addresses at creation are ten at most; the rest of an ENI's takes further calls, one after another.
        let v6 = if stack.v6() && !prefixes { per_eni.min(100).div_ceil(10) - 1 } else { 0 };
        let (least, path) = (enis * (2 + v6), 3_800 + 300 * v6);
        let name = format!(
            "{adapters} adapters of {per_eni}, {stack:?}, prefixes {prefixes}: {took:?}, {calls} calls of {least}"
        );
        println!("{name}");
        assert!(took <= Duration::from_millis(u64::from(path) * 3 / 2), "{name}");
        assert!(f64::from(calls) <= f64::from(least) * 1.3, "{name}");
    }
}

#[test]
fn warm_pool_churn_without_calls() {
    let mut config = node(IpStack::Ipv4, 6, 10);
    (config.min_idle, config.max_idle, config.cooling) = (5, 20, Duration::from_secs(1));
    config.batch_window = Duration::ZERO;
    let mut world = World::new(config, &[500]);
    for n in 0..20 {
        world.leased(n);
    }
    world.settle(Duration::from_secs(60));
    let calls = |world: &World| {
        ["create", "attach", "assign", "unassign", "detach", "delete"]
            .iter()
            .filter_map(|c| world.cloud.calls.get(c))
            .sum::<u32>()
    };
    let before = calls(&world);
    for n in 0..2_000 {
        world.del(&key(n));
        world.add(&key(n + 20));
        world.settle(Duration::from_millis(500));
    }
    let cost = calls(&world) - before;
    assert!(cost <= 6, "{cost} calls for 2000 pods");
}

#[test]
fn single_add_waits_one_batch_window() {
    let config = node(IpStack::Ipv4, 3, 10);
    let (took, calls) = burst(&config, 1);
    assert!(took <= Duration::from_millis(3_800 + 50 + 3 + 25), "{took:?}");
    assert_eq!(calls, 2);
}

#[test]
fn warm_up_runs_once() {
    let mut config = node(IpStack::Ipv4, 4, 10);
    (config.warm_up, config.max_idle) = (15, 4);
    let mut world = World::new(config, &[100]);
    world.settle(Duration::from_secs(5));
    assert_eq!(world.pool.stats().idle, 15);
    world.settle(Duration::from_secs(300));
    assert!(world.pool.stats().idle <= 5, "the watermarks rule from then on: {:?}", world.pool.stats());
    world.crash(usize::MAX, 0, crate::world::Outcome::Fine, true, usize::MAX);
    world.settle(Duration::from_secs(5));
    assert!(world.pool.stats().idle <= 5);
    world.step(Event::Tick);
}
