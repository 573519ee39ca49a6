//! Very many short histories on small nodes, drawn from numbered seeds: the same seeds on every machine, others with `TERWAY_SEED`.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::time::Instant;

use terway_core::cloud::ErrorClass;
use terway_core::ident::IpStack;
use terway_core::ipam::Reply;

use crate::history::{Action, Edit, End, Node, live};
use crate::world::{Outcome, World};

const HISTORIES: u64 = 100_000;

/// One in so many histories comes to rest, which takes longer than the history itself.
const RESTS: u64 = 10;

/// Few pods, so that requests meet.
const PODS: u64 = 5;

/// `SplitMix64` (Steele, Lea, Flood 2014): any seed is a good one, and drawing costs nothing.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn index(&mut self, n: u64) -> usize {
        usize::try_from(self.below(n)).unwrap()
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.index(of.len() as u64)]
    }

    fn outcome(&mut self) -> Outcome {
        match self.below(18) {
            0..=10 => Outcome::Fine,
            11..=12 => Outcome::Lost,
            13 => Outcome::Fails(ErrorClass::Throttled),
            14 => Outcome::Fails(ErrorClass::Unknown),
            15 => Outcome::Fails(self.pick(&[ErrorClass::Forbidden, ErrorClass::InvalidState])),
            16 => Outcome::Fails(ErrorClass::Quota),
            _ => Outcome::Fails(ErrorClass::VSwitchExhausted),
        }
    }

    fn action(&mut self) -> Action {
        match self.below(100) {
            0..=20 => Action::Add(self.index(PODS)),
            21..=32 => Action::Del(self.index(PODS)),
            33..=60 => Action::Work(self.index(9), self.outcome()),
            61..=65 => Action::Run(self.index(1000), self.outcome()),
            66..=68 => Action::Flush(1 + self.index(3)),
            69..=76 => Action::Advance(match self.below(3) {
                0 => self.below(50),
                1 => self.below(3_000),
                _ => self.below(60_000),
            }),
            77..=78 => Action::Gc(u16::try_from(self.below(1 << PODS)).unwrap()),
            79..=80 => Action::Cancel(self.index(1000)),
            81..=82 => Action::Vanish(self.index(PODS), self.one_in(2)),
            83..=84 => Action::Repeat(self.index(1000)),
            85 => Action::Meddle(self.index(1000)),
            86 => Action::Tamper(self.index(1000), self.one_in(2)),
            87 => Action::Mark(self.index(1000)),
            88..=90 => {
                // Few bits at a time.
                let what = u16::try_from(self.next() & self.next() & 0xffff).unwrap();
                Action::Configure(Edit { what, idle: u32::try_from(self.below(3)).unwrap() })
            }
            91..=92 => Action::Land(self.index(1000)),
            _ => Action::Crash {
                flushed: self.index(4),
                ran: self.next(),
                outcome: self.outcome(),
                cloud: !self.one_in(5),
                choice: self.index(1000),
            },
        }
    }

    fn node(&mut self) -> Node {
        let (prefixes, exclusive) = match self.below(8) {
            0 | 1 => (true, false),
            2 => (false, true),
            _ => (false, false),
        };
        // A /80 is a table of 256, which takes as long as the rest of the history: seldom.
        let v4 = prefixes && !self.one_in(20);
        let stack = if v4 { IpStack::Ipv4 } else { self.pick(&[IpStack::Ipv4, IpStack::Ipv6, IpStack::Dual]) };
        Node {
            stack,
            adapters: self.pick(&[2, 3, 3, 4]),
            per_eni: self.pick(&[2, 3, 4]),
            min_idle: self.pick(&[0, 0, 1, 2]),
            scarce: self.one_in(3),
            prefixes,
            exclusive,
            quick: true,
        }
    }

    fn history(seed: u64) -> (Node, Vec<Action>) {
        let mut dice = Self(seed);
        let node = dice.node();
        let length = 6 + dice.below(20);
        (node, (0..length).map(|_| dice.action()).collect())
    }
}

/// Leaves out what the failure does not need, in ever smaller pieces, and lets effects go well where that changes nothing.
fn minimise(mut actions: Vec<Action>, fails: impl Fn(&[Action]) -> bool) -> Vec<Action> {
    let mut size = actions.len().div_ceil(2);
    loop {
        let (mut at, before) = (0, actions.len());
        while at < actions.len() {
            let mut fewer = actions.clone();
            fewer.drain(at..(at + size).min(actions.len()));
            if fails(&fewer) {
                actions = fewer;
            } else {
                at += size;
            }
        }
        if size == 1 && actions.len() == before {
            break;
        }
        size = size.div_ceil(2);
    }
    for at in 0..actions.len() {
        while let Some(simpler) = simpler(&actions[at]) {
            let before = std::mem::replace(&mut actions[at], simpler);
            if !fails(&actions) {
                actions[at] = before;
                break;
            }
        }
    }
    actions
}

fn simpler(action: &Action) -> Option<Action> {
    match action {
        Action::Work(n, outcome) if *outcome != Outcome::Fine => Some(Action::Work(*n, Outcome::Fine)),
        Action::Work(n, outcome) if *n > 0 => Some(Action::Work(n - 1, *outcome)),
        Action::Run(n, outcome) if *outcome != Outcome::Fine => Some(Action::Run(*n, Outcome::Fine)),
        Action::Crash { flushed, ran, outcome, cloud, choice } if *ran != 0 => {
            let ran = ran & (ran - 1);
            Some(Action::Crash { flushed: *flushed, ran, outcome: *outcome, cloud: *cloud, choice: *choice })
        }
        _ => None,
    }
}

#[allow(clippy::disallowed_methods, reason = "whoever runs the tests says how long")]
fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().unwrap())
}

/// What the histories came across, so that a generator that never gets anywhere does not pass for a pool that never fails.
#[derive(Default)]
struct Tally(BTreeMap<&'static str, u64>);

impl Tally {
    fn count(&mut self, world: &World) {
        for (call, times) in &world.cloud.calls {
            *self.0.entry(call).or_default() += u64::from(*times);
        }
        for answer in world.answers.values() {
            let what = match answer {
                Ok(Reply::Attached(_)) => "attached",
                Ok(Reply::Detached) => "detached",
                Ok(Reply::GarbageCollected(keys)) if keys.is_empty() => "nothing collected",
                Ok(Reply::GarbageCollected(_)) => "collected",
                Err(_) => "refused",
            };
            *self.0.entry(what).or_default() += 1;
        }
        *self.0.entry("missing").or_default() += world.reported_loss.len() as u64;
        *self.0.entry("wired at the end").or_default() += world.kernel.len() as u64;
    }
}

#[test]
#[allow(clippy::disallowed_methods, reason = "a stopwatch for whoever reads the output")]
fn short_histories_keep_invariants() {
    let (first, count) = (number("TERWAY_SEED", 0), number("TERWAY_HISTORIES", HISTORIES));
    let (begun, mut tally) = (Instant::now(), Tally::default());
    for seed in first..first + count {
        let (node, actions) = Dice::history(seed);
        let end = if seed % RESTS == 0 { End::Rest } else { End::GiveUp };
        let Err(panic) = catch_unwind(AssertUnwindSafe(|| tally.count(&live(node, &actions, end)))) else { continue };
        // Hundreds of panics are on their way, all but the last of no interest.
        let hook = take_hook();
        set_hook(Box::new(|_| {}));
        let fails = |actions: &[Action]| catch_unwind(AssertUnwindSafe(|| live(node, actions, end))).is_err();
        let least = minimise(actions, fails);
        set_hook(hook);
        let said = panic.downcast_ref::<String>().cloned();
        let said = said.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default();
        let again = format!("TERWAY_SEED={seed} TERWAY_HISTORIES=1");
        panic!("{said}\n{again} on {node:?}, {end:?}; of its history this is enough:\n{least:#?}");
    }
    let took = begun.elapsed();
    println!("{count} histories in {took:?}, {:?} each; {:?}", took / u32::try_from(count).unwrap(), tally.0);
    if count >= HISTORIES {
        for (what, times) in &tally.0 {
            assert!(*times > count / 500, "the histories hardly ever get to see this: {what} {times}");
        }
        assert_eq!(tally.0.len(), 14, "{:?}", tally.0);
    }
}

#[test]
fn failing_history_is_shrunk() {
    let fails = |actions: &[Action]| {
        let del = actions.iter().position(|action| matches!(action, Action::Del(_)));
        let work = |action: &Action| matches!(action, Action::Work(n, _) if *n >= 2);
        del.is_some_and(|del| actions[del..].iter().any(work))
    };
    let (mut dice, mut met) = (Dice(1), 0);
    for _ in 0..200 {
        let actions: Vec<_> = (0..25).map(|_| dice.action()).collect();
        if fails(&actions) {
            met += 1;
            let least = minimise(actions, fails);
            assert!(matches!(&least[..], [Action::Del(_), Action::Work(2, Outcome::Fine)]), "{least:?}");
        }
    }
    assert!(met > 50, "{met}");
}
