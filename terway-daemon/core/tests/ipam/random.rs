//! Random histories.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use proptest::prelude::*;
use terway_core::cloud::ErrorClass;
use terway_core::ident::{Family, IpStack};
use terway_core::ipam::{Answer, Event, Phase, Record};

use crate::world::{Outcome, World, config, key};

const KEYS: usize = 9;

/// One thing that happens. Numbers are taken modulo what there is.
#[derive(Clone, Debug)]
enum Action {
    Add(usize),
    Del(usize),
    Gc(u16),
    Cancel(usize),
    /// The netns of a pod disappears, and with it the links in it; `true` tells the pool.
    Vanish(usize, bool),
    Flush(usize),
    Run(usize, Outcome),
    Repeat(usize),
    Advance(u64),
    /// Somebody else gives an ENI an address.
    Meddle(usize),
    /// A call of a dead process arrives.
    Land(usize),
    Crash {
        flushed: usize,
        ran: u64,
        outcome: Outcome,
        cloud: bool,
        choice: usize,
    },
}

fn outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        12 => Just(Outcome::Fine),
        2 => Just(Outcome::Lost),
        1 => Just(Outcome::Fails(ErrorClass::Throttled)),
        1 => Just(Outcome::Fails(ErrorClass::Unknown)),
        1 => Just(Outcome::Fails(ErrorClass::Forbidden)),
        1 => Just(Outcome::Fails(ErrorClass::InvalidState)),
    ]
}

fn action() -> impl Strategy<Value = Action> {
    let any_index = 0..1000usize;
    prop_oneof![
        12 => (0..KEYS).prop_map(Action::Add),
        9 => (0..KEYS).prop_map(Action::Del),
        1 => any::<u16>().prop_map(Action::Gc),
        1 => any_index.clone().prop_map(Action::Cancel),
        1 => (0..KEYS, any::<bool>()).prop_map(|(k, told)| Action::Vanish(k, told)),
        20 => (1..4usize).prop_map(Action::Flush),
        45 => (any_index.clone(), outcome()).prop_map(|(i, o)| Action::Run(i, o)),
        3 => any_index.clone().prop_map(Action::Repeat),
        8 => prop_oneof![0..50u64, 50..3_000u64, 3_000..40_000u64].prop_map(Action::Advance),
        1 => any_index.clone().prop_map(Action::Meddle),
        3 => any_index.clone().prop_map(Action::Land),
        3 => (0..4usize, any::<u64>(), outcome(), prop::bool::weighted(0.8), any_index)
            .prop_map(|(flushed, ran, outcome, cloud, choice)| Action::Crash { flushed, ran, outcome, cloud, choice }),
    ]
}

fn perform(world: &mut World, action: &Action) {
    match action {
        Action::Add(n) => {
            world.add(&key(*n));
        }
        Action::Del(n) => {
            world.del(&key(*n));
        }
        Action::Gc(mask) => {
            let valid = (0..KEYS).filter(|n| mask >> n & 1 == 1).map(key).collect();
            world.gc(valid);
        }
        Action::Cancel(n) => {
            let open: Vec<_> = world.open.keys().copied().collect();
            if !open.is_empty() {
                world.step(Event::Cancel { ticket: open[n % open.len()] });
            }
        }
        Action::Vanish(n, told) => {
            let key = key(*n);
            if world.pool.get(&key).is_some_and(|view| view.phase == Phase::Ready) {
                if let Some(wired) = world.kernel.get_mut(&key) {
                    wired.links = false;
                }
                world.vanished.insert(key.clone());
                if *told {
                    world.step(Event::Gone { key });
                }
            }
        }
        Action::Flush(count) => world.flush(*count),
        Action::Run(n, outcome) => {
            let runnable = world.runnable();
            if !runnable.is_empty() {
                world.run(runnable[n % runnable.len()], *outcome, *n);
            }
        }
        Action::Repeat(n) => {
            if !world.reports.is_empty() {
                let event = world.reports[n % world.reports.len()].clone();
                world.step(event);
            }
        }
        Action::Advance(ms) => world.advance(Duration::from_millis(*ms)),
        Action::Meddle(n) => {
            let enis: Vec<_> = world.cloud.enis.keys().cloned().collect();
            if !enis.is_empty() {
                let family = if n % 2 == 0 { Family::V4 } else { Family::V6 };
                let _full = world.cloud.add(&enis[n % enis.len()], family, 1);
                world.cloud.note(world.now);
            }
        }
        Action::Land(n) => world.land(*n),
        Action::Crash { flushed, ran, outcome, cloud, choice } => {
            world.crash(*flushed, *ran, *outcome, *cloud, *choice);
        }
    }
}

/// When all is well again and a while has passed, store, cloud, kernel and pool agree and nothing is left over.
fn check_at_rest(world: &World, scarce: bool) {
    assert!(world.open.is_empty(), "never answered: {:?}", world.open);
    assert!(world.pending.is_empty());
    let stats = world.pool.stats();
    assert_eq!((stats.waiting, stats.cooling, stats.pending, stats.releasing), (0, 0, 0, 0), "{stats:?}");
    let bound: BTreeSet<_> = world.pool.list().into_iter().map(|view| (view.key, view.phase)).collect();
    let wired: BTreeSet<_> = world.kernel.keys().map(|key| (key.clone(), Phase::Ready)).collect();
    assert_eq!(bound, wired);
    for wired in world.kernel.values() {
        assert!(wired.datapath);
    }
    for record in world.records() {
        match record {
            Record::Attachment(a) => assert!(world.kernel.contains_key(&a.key), "{a:?}"),
            Record::Eni(eni) => assert!(world.cloud.enis.contains_key(&eni.id), "{eni:?}"),
            Record::Counter { .. } => {}
            left => panic!("left over in the store: {left:?}"),
        }
    }
    let mut ours = BTreeSet::new();
    for eni in world.pool.enis() {
        let id = eni.id.expect("nothing is being created");
        ours.extend(eni.addresses.iter().map(|address| (id.clone(), *address)));
        assert_eq!(eni.phase, terway_core::ipam::EniPhase::InUse, "{id}");
    }
    let mut theirs = BTreeSet::new();
    for eni in world.cloud.enis.values() {
        theirs.extend(eni.v4.iter().map(|a| (eni.id.clone(), IpAddr::V4(*a))));
        theirs.extend(eni.v6.iter().map(|a| (eni.id.clone(), IpAddr::V6(*a))));
    }
    assert_eq!(ours, theirs, "the pool's addresses and the cloud's");
    if !scarce {
        let least = world.config.min_idle.min(world.config.capacity() - stats.bound);
        assert!(stats.idle >= least, "{stats:?}");
    }
    // The primary address of an ENI stays as long as the ENI does.
    let primaries = u32::try_from(world.pool.enis().len()).unwrap_or(0);
    assert!(stats.idle <= world.config.ceiling() + primaries, "{stats:?}");
}

#[allow(clippy::disallowed_methods, reason = "whoever debugs a failure says where its trace goes")]
fn history(stack: IpStack, min_idle: u32, scarce: bool, actions: &[Action]) {
    let mut config = config(stack, 3, 4);
    config.min_idle = min_idle;
    config.max_idle = 1;
    config.shrink_after = Duration::from_secs(2);
    let mut world = World::new(config, if scarce { &[5, 40] } else { &[40, 40] });
    let result = catch_unwind(AssertUnwindSafe(|| {
        for action in actions {
            perform(&mut world, action);
        }
        world.settle(Duration::from_secs(3_000));
        check_at_rest(&world, scarce);
        // Whatever has happened, a pod that comes now is served.
        let room = if scarce { 5 } else { world.config.capacity() as usize };
        let mut tickets = Vec::new();
        for n in 100.. {
            if world.pool.list().len() + tickets.len() >= room {
                break;
            }
            tickets.push(world.add(&key(n)));
        }
        world.settle(Duration::from_secs(60));
        for ticket in tickets {
            let answer = world.answers.get(&ticket);
            assert!(matches!(answer, Some(Ok(Answer::Attached(_)))), "{ticket:?}: {answer:?}");
        }
        let problems: Vec<_> =
            world.pool.problems().into_iter().filter(|e| e.code != terway_core::errors::NO_ADDRESS).collect();
        assert!(scarce || problems.is_empty(), "{problems:?}");
        for n in (0..KEYS).chain(100..200) {
            world.del(&key(n));
        }
        world.settle(Duration::from_secs(3_000));
        check_at_rest(&world, scarce);
        assert_eq!(world.pool.list().len(), 0);
    }));
    if let Err(panic) = result {
        if let Ok(path) = std::env::var("TERWAY_TRACE") {
            std::fs::write(path, world.trace.join("\n")).unwrap();
        }
        resume_unwind(panic);
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        max_shrink_iters: 20_000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn no_history_breaks_a_promise(
        stack in prop_oneof![Just(IpStack::Ipv4), Just(IpStack::Ipv6), Just(IpStack::Dual)],
        min_idle in 0..3u32,
        scarce in any::<bool>(),
        actions in prop::collection::vec(action(), 1..150),
    ) {
        history(stack, min_idle, scarce, &actions);
    }
}
