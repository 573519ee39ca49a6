//! How long and how much: the cluster of the bar, in one thread.
//!
//! `cargo test --release -p terway-core --test policy -- --ignored --nocapture scale`. The bars are in `cargo xtask bench policy`.

use std::time::{Duration, Instant};

use terway_core::policy::{Compiler, Op};
use terway_oracle::large_cluster::Cluster;

#[allow(clippy::disallowed_methods, reason = "a measurement takes time")]
fn timed<T>(what: impl FnOnce() -> T) -> (Duration, T) {
    let start = Instant::now();
    let result = what();
    (start.elapsed(), result)
}

#[test]
#[ignore = "a measurement: in release, alone on the machine"]
fn scale() {
    let cluster = Cluster { spaces: 1000 };
    let (mut compiler, _) = Compiler::new();
    let mut spent = Duration::ZERO;
    let pods = (0..cluster.spaces).map(|space| cluster.pods(space));
    for events in [cluster.rules()].into_iter().chain(pods).chain([cluster.interfaces()]) {
        let (took, ()) = timed(|| events.into_iter().for_each(|event| drop(compiler.step(event))));
        spent += took;
    }
    println!("first compile {spent:?}, {:?}", compiler.stats());
    for changes in cluster.changes() {
        let mut times = Vec::new();
        let (mut operations, before) = (0, compiler.effort());
        for event in changes.events {
            let (took, ops) = timed(|| compiler.step(event));
            operations += ops.iter().filter(|op| !matches!(op, Op::Revalidate(_))).count();
            times.push(took);
            compiler.run_deferred();
        }
        let (after, count) = (compiler.effort(), times.len());
        times.sort_unstable();
        println!(
            "{:<28} median {:>9.1?}  most {:>9.1?}  operations {:>7}  selectors {:>7}  answers {:>7}",
            changes.kind,
            times[count / 2],
            times[count - 1],
            operations / count,
            (after.selector_evaluations - before.selector_evaluations) / count as u64,
            (after.set_evaluations - before.set_evaluations) / count as u64,
        );
    }
}
