//! Figures: `cargo test --release -p terway-core --test service -- --ignored --nocapture scale`.

use std::time::Duration;

use terway_core::objects::{Change, Object, Objects, Protocol};
use terway_core::service::{Planner, Settings};

use crate::world::{ME, endpoint, facts, service, slice};

const SERVICES: usize = 30_000;
const PORTS: &[(&str, u16, Protocol)] = &[("", 8080, Protocol::Tcp)];

fn change(i: usize, endpoints: usize) -> Change {
    let at = |e: usize| endpoint(&format!("10.{}.{}.{}", e + i / 62_500, i / 250 % 250, i % 250 + 1), ME);
    let slice = slice(&format!("e{i}"), &format!("s{i}"), PORTS, (0..endpoints).map(at).collect());
    Change::Upsert(Box::new(Object::EndpointSlice(slice)))
}

/// Time that this thread has had a CPU: the machine may have others to serve (`/proc/[pid]/schedstat`, the first number, in nanoseconds).
#[expect(clippy::disallowed_methods, reason = "a measurement needs a clock")]
fn clock() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(stat.split_whitespace().next().unwrap().parse().unwrap())
}

#[test]
#[ignore = "a measurement, for release builds"]
fn scale() {
    let mut objects = Objects::default();
    for i in 0..SERVICES {
        let vip = format!("10.{}.{}.{}", 96 + i / 62_500, i / 250 % 250, i % 250 + 1);
        let object = Object::Service(service(&format!("s{i}"), &vip, &[("", 80, Protocol::Tcp)]));
        objects.apply(Change::Upsert(Box::new(object)));
        objects.apply(change(i, 4));
    }
    let mut planner = Planner::new(facts(), Settings::default());
    let start = clock();
    let plan = planner.sync(&objects);
    let full = clock() - start;
    assert_eq!(plan.ops.len(), SERVICES * (4 + 1 + 2));
    let kernel = planner.map_contents();
    let start = clock();
    let mut again = Planner::restore(facts(), Settings::default(), kernel);
    assert!(again.sync(&objects).is_empty());
    let restart = clock() - start;
    let mut times: Vec<_> = (0..2000)
        .map(|n| {
            let change = change(n * 13 % SERVICES, 3 + n % 3);
            let start = clock();
            let applied: Vec<_> = objects.apply(change).into_iter().collect();
            let plan = planner.update(&objects, &applied);
            let took = clock() - start;
            assert!(plan.ops.len() <= 5);
            took
        })
        .collect();
    times.sort();
    println!(
        "CPU time, {SERVICES} Services x 4 endpoints: full plan {full:.1?}, restart without changes {restart:.1?}; one endpoint: median {:.1?}, p99 {:.1?}",
        times[1000], times[1980]
    );
}
