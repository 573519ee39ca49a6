//! Stories in which the process dies at every effect boundary: before and after each write, before, during and after each effect. The runtime asks
//! again for what was not answered, the story goes on, and must end as if nothing had been.

use std::time::Duration;

use terway_core::ident::IpStack;
use terway_core::ipam::{Event, PoolConfig, PoolMode, Reclaim, Reply};

use crate::history::check_at_rest;
use crate::world::{Asked, Outcome, World, config, key};

/// What the process leaves of the effect that is next in line.
#[derive(Clone, Copy, Debug)]
enum Death {
    /// Nothing.
    Before,
    /// Half of it in the kernel; all of it in the cloud.
    During,
    /// All of it, and nobody hears of it.
    After,
    /// A request to the cloud that arrives when the next process has started.
    Sent,
    /// The same as `After`, for all effects that may run.
    AllDone,
}

const DEATHS: [Death; 5] = [Death::Before, Death::During, Death::After, Death::Sent, Death::AllDone];

enum Beat {
    Add(usize),
    Del(usize),
    /// The pod's netns goes, and the pool is told.
    Gone(usize),
    /// So many writes and effects.
    Work(u32),
    /// All there is to do, and so many seconds.
    Rest(u64),
    Edit(fn(&mut PoolConfig)),
}

use Beat::{Add, Del, Edit, Gone, Rest, Work};

struct Story {
    config: PoolConfig,
    beats: Vec<Beat>,
    /// Who is there in the end.
    pods: Vec<usize>,
}

/// Where and how the process dies.
#[derive(Clone, Copy, Debug)]
struct Strike {
    boundary: u32,
    death: Death,
    cloud: bool,
}

struct Teller {
    world: World,
    /// Boundaries passed.
    passed: u32,
    strike: Option<Strike>,
}

impl Teller {
    /// Dies, or goes one write or one effect further; says whether there was anything to do.
    fn work(&mut self) -> bool {
        let next = self.world.runnable().first().copied();
        if self.world.writes.is_empty() && next.is_none() {
            return false;
        }
        let strike = self.strike.filter(|strike| strike.boundary == self.passed);
        self.passed += 1;
        if let Some(strike) = strike {
            self.die(strike, next);
        } else if self.world.writes.is_empty() {
            self.world.run(next.unwrap(), Outcome::Fine, 0);
        } else {
            self.world.flush(1);
        }
        true
    }

    fn die(&mut self, Strike { boundary, death, cloud }: Strike, next: Option<usize>) {
        let world = &mut self.world;
        let bit = next.map_or(0, |index| 1u64 << index);
        let (ran, outcome) = match death {
            Death::Before => (0, Outcome::Fine),
            Death::During => (bit | bit << 32, Outcome::Lost),
            Death::After => (bit | bit << 32, Outcome::Fine),
            Death::Sent => (bit, Outcome::Fine),
            Death::AllDone => (u64::MAX, Outcome::Fine),
        };
        let open: Vec<_> = world.open.values().cloned().collect();
        // Old and new lists of the cloud in turn.
        world.crash(0, ran, outcome, cloud, boundary as usize);
        // The runtime does not add what it has given up, and deletes it until it is told that it is gone.
        for (n, (asked, key)) in open.iter().enumerate() {
            let Some(key) = key else { continue };
            let given_up = open[n..].iter().any(|(asked, other)| *asked == Asked::Del && other.as_ref() == Some(key));
            match asked {
                Asked::Add if !given_up => drop(world.add(key)),
                Asked::Del => drop(world.del(key)),
                _ => {}
            }
        }
    }

    fn rest(&mut self, time: Duration) {
        let end = self.world.now.after(time);
        loop {
            while self.work() {}
            let Some(next) = self.world.wake.filter(|next| *next <= end) else { break };
            self.world.advance(next.since(self.world.now));
        }
        self.world.advance(end.since(self.world.now));
    }
}

/// Tells a story to its end and returns how many boundaries it had.
fn tell(story: &Story, strike: Option<Strike>) -> u32 {
    let mut world = World::new(story.config.clone(), &[100, 100]);
    world.thorough = strike.is_none();
    let mut teller = Teller { world, passed: 0, strike };
    for beat in &story.beats {
        match beat {
            Add(n) => drop(teller.world.add(&key(*n))),
            Del(n) => drop(teller.world.del(&key(*n))),
            Gone(n) => {
                teller.world.vanished.insert(key(*n));
                teller.world.step(Event::NetnsGone { key: key(*n) });
            }
            Work(count) => {
                for _ in 0..*count {
                    teller.work();
                }
            }
            Rest(seconds) => teller.rest(Duration::from_secs(*seconds)),
            Edit(change) => {
                let mut config = teller.world.config.clone();
                change(&mut config);
                teller.world.configure(config);
            }
        }
    }
    let Teller { mut world, passed, .. } = teller;
    world.settle(Duration::from_secs(300));
    world.check();
    check_at_rest(&world, false);
    let there: Vec<_> = world.kernel.keys().cloned().collect();
    assert_eq!(there, story.pods.iter().map(|n| key(*n)).collect::<Vec<_>>());
    let refused: Vec<_> = world.answers.values().filter(|answer| answer.is_err()).collect();
    // A pod that was deleted while it came may hear so; everybody else was served.
    let deleted = story.beats.iter().filter(|beat| matches!(beat, Del(_) | Gone(_))).count();
    assert!(refused.len() <= deleted, "{refused:?}");
    let ticket = world.add(&key(99));
    world.settle(Duration::from_secs(60));
    assert!(matches!(world.answers[&ticket], Ok(Reply::Attached(_))), "{:?}", world.answers[&ticket]);
    for n in story.pods.iter().chain(&[99]) {
        world.del(&key(*n));
    }
    world.settle(Duration::from_secs(600));
    check_at_rest(&world, false);
    assert!(world.pool.list().is_empty());
    passed
}

fn at_every_boundary(story: &Story, least: u32) {
    let boundaries = tell(story, None);
    assert!(boundaries >= least, "the story has become short: {boundaries}");
    println!("{boundaries} boundaries");
    for boundary in 0..boundaries {
        for death in DEATHS {
            for cloud in [true, false] {
                let strike = Strike { boundary, death, cloud };
                let told = std::panic::catch_unwind(|| tell(story, Some(strike)));
                assert!(told.is_ok(), "{strike:?}");
            }
        }
    }
}

/// Three adapters for pods with three addresses each; little is kept idle.
fn small(stack: IpStack) -> PoolConfig {
    let mut config = config(stack, 4, 3);
    (config.max_idle, config.shrink_after) = (1, Duration::from_secs(2));
    config.resync = Duration::from_secs(60);
    config
}

#[test]
fn crash_points_of_cold_burst() {
    for stack in [IpStack::Ipv4, IpStack::Ipv6, IpStack::Dual] {
        let beats = vec![Add(0), Add(1), Add(2), Work(4), Add(3), Rest(2)];
        at_every_boundary(&Story { config: small(stack), beats, pods: vec![0, 1, 2, 3] }, 20);
    }
}

#[test]
fn crash_points_of_del_during_add() {
    // Before the ENI, on its way, before the wiring, and just wired.
    for far in [1, 3, 5, 7, 9, 11] {
        let beats = vec![Add(1), Add(0), Work(far), Del(0), Rest(1), Add(0), Work(2), Del(0), Add(0), Rest(8)];
        at_every_boundary(&Story { config: small(IpStack::Dual), beats, pods: vec![0, 1] }, 15);
    }
}

#[test]
fn crash_points_of_eni_replacement() {
    fn other(config: &mut PoolConfig) {
        config.vswitches = vec!["vsw-b".into()];
    }
    let beats = vec![Add(0), Add(1), Rest(1), Edit(other), Add(2), Rest(2), Del(0), Del(1), Rest(60)];
    at_every_boundary(&Story { config: small(IpStack::Ipv4), beats, pods: vec![2] }, 30);
}

#[test]
fn crash_points_of_prefixes() {
    let mut config = small(IpStack::Ipv4);
    config.prefixes = true;
    let beats =
        vec![Add(0), Add(1), Add(2), Rest(1), Del(0), Del(1), Rest(12), Add(3), Rest(1), Del(2), Del(3), Rest(60)];
    at_every_boundary(&Story { config, beats, pods: vec![] }, 30);
}

#[test]
fn crash_points_of_exclusive_enis() {
    let mut config = small(IpStack::Dual);
    config.mode = PoolMode::Exclusive;
    let beats = vec![Add(0), Add(1), Rest(1), Del(0), Rest(6), Add(2), Rest(1), Gone(1), Rest(30)];
    at_every_boundary(&Story { config, beats, pods: vec![2] }, 25);
}

#[test]
fn crash_points_of_reclaim() {
    let mut config = small(IpStack::Ipv4);
    config.max_idle = 6;
    config.reclaim = Some(Reclaim {
        after: Duration::from_secs(20),
        interval: Duration::from_secs(10),
        batch: 2,
        jitter_permille: 100,
    });
    let mut beats: Vec<_> = (0..5).map(Add).collect();
    beats.push(Rest(1));
    beats.extend((1..5).map(Del));
    beats.push(Rest(120));
    at_every_boundary(&Story { config, beats, pods: vec![0] }, 40);
}
