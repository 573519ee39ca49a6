//! How long a step takes on a big node. Prints, asserts only what must not depend on the machine: that the cost does not grow with the pods.
//!
//! `cargo test --release -p terway-core --test ipam timing -- --nocapture`

use std::time::{Duration, Instant};

use terway_core::clock::Moment;
use terway_core::ident::{IpStack, PodRef};
use terway_core::ipam::{Add, Effect, Event, Pool, Ticket};

use crate::world::{World, config, key};

/// A node with as many idle addresses as its 20 ENIs take.
fn full(per_eni: u32) -> (Pool, Moment, usize) {
    let mut config = config(IpStack::Ipv4, 21, per_eni);
    config.min_idle = config.capacity();
    config.max_idle = config.capacity();
    let pods = config.capacity() as usize;
    let mut world = World::new(config, &[2_000]);
    world.settle(Duration::from_secs(600));
    assert_eq!(world.pool.stats().idle as usize, pods);
    (world.pool, world.now, pods)
}

#[derive(Default)]
struct Times(Vec<Duration>);

impl Times {
    #[allow(clippy::disallowed_methods, reason = "this is the stopwatch, not a decision")]
    fn step(&mut self, pool: &mut Pool, event: Event, now: Moment) -> Vec<Effect> {
        let begun = Instant::now();
        let effects = pool.step(event, now);
        self.0.push(begun.elapsed());
        effects
    }

    fn median(&mut self, name: &str, pods: usize) -> Duration {
        self.0.sort();
        let (median, high) = (self.0[self.0.len() / 2], self.0[self.0.len() * 99 / 100]);
        println!("{name:12} {pods:5} slots: median {median:?}, p99 {high:?}, worst {:?}", self.0[self.0.len() - 1]);
        median
    }
}

/// Adds every pod, then takes every pod away; returns the medians of Add, Connected, Del and Disconnected.
fn measure(per_eni: u32) -> [Duration; 4] {
    let (mut pool, now, pods) = full(per_eni);
    let (mut adds, mut connects, mut dels, mut gone) = <(Times, Times, Times, Times)>::default();
    for n in 0..pods {
        let add = Add {
            ticket: Ticket(n as u64 + 1_000_000),
            key: key(n),
            pod: PodRef::default(),
            netns: format!("/run/netns/{n}"),
            ip_stack: IpStack::Ipv4,
            options: String::new(),
        };
        let effects = adds.step(&mut pool, Event::Add(add), now);
        let op = effects.iter().find_map(|e| if let Effect::Connect { op, .. } = e { Some(*op) } else { None });
        connects.step(&mut pool, Event::Connected { op: op.expect("it is warm"), key: key(n) }, now);
    }
    for n in 0..pods {
        let del = Event::Del { ticket: Ticket(n as u64 + 2_000_000), key: key(n) };
        let effects = dels.step(&mut pool, del, now);
        let op = effects.iter().find_map(|e| if let Effect::Disconnect { op, .. } = e { Some(*op) } else { None });
        let op = op.expect("it is ready");
        pool.step(Event::DatapathRemoved { op, key: key(n) }, now);
        gone.step(&mut pool, Event::Disconnected { op, key: key(n) }, now);
    }
    let named = [("Add", adds), ("Connected", connects), ("Del", dels), ("Disconnected", gone)];
    named.map(|(name, mut times)| times.median(name, pods))
}

#[test]
fn pool_step_cost_is_constant() {
    let few = measure(5);
    let many = measure(50);
    for (few, many) in few.into_iter().zip(many) {
        // Ten times the pods: a quadratic step would be ten times slower; a busy machine is not that unlucky at the median.
        assert!(many < few * 5 + Duration::from_micros(20), "{few:?} with 100 slots, {many:?} with 1000");
    }
}
