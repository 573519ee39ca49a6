//! What a history consists of, how it is lived through, and what holds when it is over.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use ipnetwork::IpNetwork;
use terway_core::cloud::Eni;
use terway_core::ident::{Family, IpStack};
use terway_core::ipam::{
    ADDRESSES_PER_V4_PREFIX, ADDRESSES_PER_V6_PREFIX, ALWAYS_BLOCKED, Degradation, EniPhase, EniSelection, Event,
    Phase, PoolConfig, PoolMode, Reclaim, Record, Reply, VSwitchSelection,
};

use crate::cloud::prefixes_of;
use crate::world::{Outcome, World, config, key};

pub(crate) const KEYS: usize = 9;

/// One thing that happens. Numbers are taken modulo what there is.
#[derive(Clone, Debug)]
pub(crate) enum Action {
    Add(usize),
    Del(usize),
    Gc(u16),
    Cancel(usize),
    /// The netns of a pod disappears, and with it the links in it; `true` tells the pool.
    Vanish(usize, bool),
    Flush(usize),
    Run(usize, Outcome),
    /// Everything is flushed, so many effects go well, and one more has this outcome.
    Work(usize, Outcome),
    Repeat(usize),
    Advance(u64),
    /// Somebody else gives an ENI an address.
    Meddle(usize),
    /// Somebody else deletes an ENI, or takes an address from one.
    Tamper(usize, bool),
    /// Somebody marks an ENI as not to be touched, or takes the mark off.
    Mark(usize),
    /// The configuration is edited.
    Configure(Edit),
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

/// What an edit leaves different from the node's own configuration.
#[derive(Clone, Debug)]
pub(crate) struct Edit {
    /// Bits of what is changed.
    pub(crate) what: u16,
    pub(crate) idle: u32,
}

impl Edit {
    fn apply(&self, base: &PoolConfig) -> PoolConfig {
        let mut config = base.clone();
        let on = |bit: u16| self.what >> bit & 1 == 1;
        if on(0) {
            config.vswitches = vec!["vsw-b".into()];
        }
        if on(1) {
            config.security_groups = vec!["sg-2".into()];
        }
        if on(2) {
            (config.min_idle, config.max_idle) = (self.idle, self.idle + 1);
        }
        if on(3) {
            config.degradation = if on(4) { Degradation::L0 } else { Degradation::L1 };
        }
        if on(5) {
            config.vswitch_selection = if on(4) { VSwitchSelection::Most } else { VSwitchSelection::Random };
        }
        if on(6) {
            let (after, interval) = (Duration::from_secs(3), Duration::from_secs(2));
            config.reclaim = Some(Reclaim { after, interval, batch: 1, jitter_permille: 100 });
        }
        if on(7) {
            config.eni_selection = EniSelection::LeastIps;
        }
        if on(8) {
            config.max_enis = Some(1);
        }
        if on(9) {
            config.min_enis = 2;
        }
        if on(10) && on(11) {
            config.prefixes = !config.prefixes;
        }
        config
    }
}

fn perform(world: &mut World, base: &PoolConfig, action: &Action) {
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
                    world.step(Event::NetnsGone { key });
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
        Action::Work(count, outcome) => {
            for n in 0..=*count {
                world.flush(usize::MAX);
                let runnable = world.runnable();
                if runnable.is_empty() {
                    break;
                }
                let outcome = if n == *count { *outcome } else { Outcome::Fine };
                world.run(runnable[(5 * n + count) % runnable.len()], outcome, n);
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
        Action::Tamper(n, whole) => {
            let enis: Vec<_> = world.cloud.enis.values().cloned().collect();
            if !enis.is_empty() {
                let eni = &enis[n % enis.len()];
                let secondary: Vec<_> =
                    eni.v4.iter().filter(|a| **a != eni.primary_v4).map(|a| IpAddr::V4(*a)).collect();
                if *whole {
                    world.cloud.tamper(&eni.id, None);
                } else if !secondary.is_empty() {
                    world.cloud.tamper(&eni.id, Some(secondary[n % secondary.len()]));
                }
                world.cloud.note(world.now);
            }
        }
        Action::Mark(n) => {
            let count = world.cloud.enis.len();
            if let Some(eni) = world.cloud.enis.values_mut().nth(n % count.max(1)) {
                let (key, value) = ALWAYS_BLOCKED[n % 2];
                if eni.tags.remove(key).is_none() {
                    eni.tags.insert(key.into(), value.into());
                }
                world.cloud.note(world.now);
            }
        }
        Action::Configure(edit) => world.configure(edit.apply(base)),
        Action::Land(n) => world.land(*n),
        Action::Crash { flushed, ran, outcome, cloud, choice } => {
            world.crash(*flushed, *ran, *outcome, *cloud, *choice);
        }
    }
}

/// On a node with prefixes a single address, from when none was to be had or from somebody else, takes the place of a whole one: it may carry less
/// than its configuration says.
fn cramped(world: &World) -> bool {
    let single = |eni: &Eni| eni.v4.len() > 1 || !eni.v6.is_empty();
    world.config.prefixes && world.cloud.enis.values().any(single)
}

/// When all is well again and a while has passed, store, cloud, kernel and pool agree and nothing is left over.
pub(crate) fn check_at_rest(world: &World, scarce: bool) {
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
        let single = |a: &&IpAddr| eni.prefixes.iter().all(|p| !p.prefix.contains(**a));
        ours.extend(eni.addresses.iter().filter(single).map(|address| (id.clone(), IpNetwork::from(*address))));
        ours.extend(eni.prefixes.iter().map(|p| (id.clone(), p.prefix)));
        assert_eq!(eni.phase, EniPhase::InUse, "{id}");
    }
    let mut theirs = BTreeSet::new();
    for eni in world.cloud.enis.values() {
        theirs.extend(eni.v4.iter().map(|a| (eni.id.clone(), IpNetwork::from(IpAddr::V4(*a)))));
        theirs.extend(eni.v6.iter().map(|a| (eni.id.clone(), IpNetwork::from(IpAddr::V6(*a)))));
        theirs.extend(prefixes_of(eni).into_iter().map(|prefix| (eni.id.clone(), prefix)));
    }
    assert_eq!(ours, theirs, "the pool's addresses and the cloud's");
    if !scarce && !cramped(world) {
        let least = world.config.min_idle.min(world.config.capacity().saturating_sub(stats.bound));
        assert!(stats.idle >= least, "{stats:?}");
    }
    // The primary address of an ENI stays as long as the ENI does, and a prefix as long as one pod is on it.
    let enis = world.pool.enis();
    let primaries = u32::try_from(enis.len()).unwrap_or(0);
    let partly = enis.iter().flat_map(|eni| &eni.prefixes).filter(|p| p.in_use > 0);
    let partly: u32 = partly.map(|p| p.slots - p.in_use).sum();
    let whole = match (enis.iter().any(|eni| !eni.prefixes.is_empty()), world.config.stack) {
        (false, _) => 0,
        (true, IpStack::Ipv6) => ADDRESSES_PER_V6_PREFIX - 1,
        (true, _) => ADDRESSES_PER_V4_PREFIX - 1,
    };
    assert!(stats.idle <= world.config.high_watermark() + primaries + partly + whole, "{stats:?}");
}

#[allow(clippy::disallowed_methods, reason = "whoever debugs a failure says where its trace goes")]
fn dump(world: &World) {
    if let (Some(path), Some(trace)) = (crate::world::trace_file(), &world.trace) {
        std::fs::write(path, trace.join("\n")).unwrap();
    }
}

/// The node of a history.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Node {
    pub(crate) stack: IpStack,
    pub(crate) adapters: u32,
    pub(crate) per_eni: u32,
    pub(crate) min_idle: u32,
    pub(crate) scarce: bool,
    pub(crate) prefixes: bool,
    pub(crate) exclusive: bool,
    /// Waiting times are short, so that a history comes to rest in fewer steps.
    pub(crate) quick: bool,
}

impl Node {
    fn config(self) -> PoolConfig {
        let mut config = config(self.stack, self.adapters, self.per_eni);
        config.min_idle = self.min_idle;
        config.max_idle = 1;
        config.shrink_after = Duration::from_secs(2);
        config.prefixes = self.prefixes;
        if self.exclusive {
            (config.mode, config.limits.adapters) = (PoolMode::Exclusive, 2 * self.adapters);
        }
        if self.quick {
            config.resync = Duration::from_secs(40);
            (config.refusal_backoff, config.vswitch_backoff) = (Duration::from_secs(20), Duration::from_secs(30));
        }
        config
    }

    /// After so long all is well again.
    fn rest(self) -> Duration {
        Duration::from_secs(if self.quick { 240 } else { 1_500 })
    }
}

/// How a history ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Faults cease, time passes, and everything must be in order.
    Rest,
    /// Whoever waits gives up and is answered.
    GiveUp,
}

/// Faults have an end: calls succeed, the configuration is as it was, marks are off, and pods that lost their address are replaced.
fn recover(world: &mut World, base: &PoolConfig, rest: Duration) {
    for eni in world.cloud.enis.values_mut() {
        for (key, _) in ALWAYS_BLOCKED {
            eni.tags.remove(key);
        }
    }
    world.cloud.note(world.now);
    if world.config != *base {
        world.configure(base.clone());
    }
    world.settle(rest);
    for view in world.pool.list() {
        let lost = |a: IpAddr| !world.cloud.has(&view.lease.eni, a);
        if view.phase != Phase::Releasing && view.lease.addresses.iter().any(lost) {
            assert!(world.reported_loss.contains_key(&view.key), "{} lost its address and nobody is told", view.key);
            assert!(!view.missing.is_empty());
            world.del(&view.key);
        } else {
            assert!(view.missing.is_empty(), "{view:?}");
        }
    }
    world.settle(rest);
}

/// After a history: order returns, whoever comes is served, and when all have gone nothing is left.
fn come_to_rest(world: &mut World, node: Node, base: &PoolConfig) {
    recover(world, base, node.rest());
    check_at_rest(world, node.scarce);
    // Whatever has happened, a pod that comes now is served.
    let capacity = world.config.capacity() as usize;
    // Where there is no whole prefix left, an ENI holds single addresses.
    let places = world.config.eni_limit() * node.per_eni.min(world.config.per_eni(Family::V4));
    let scarce = world.cloud.supply(&"vsw-a".into()).min(capacity).min(places as usize);
    let room = match (node.scarce, cramped(world)) {
        (true, _) => scarce,
        (false, true) => 0,
        (false, false) => capacity,
    };
    let mut tickets = Vec::new();
    for n in 100.. {
        if world.pool.list().len() + tickets.len() >= room.min(20) {
            break;
        }
        tickets.push(world.add(&key(n)));
    }
    world.settle(Duration::from_secs(60));
    for ticket in tickets {
        let answer = world.answers.get(&ticket);
        assert!(matches!(answer, Some(Ok(Reply::Attached(_)))), "{ticket:?}: {answer:?}");
    }
    let problems: Vec<_> =
        world.pool.problems().into_iter().filter(|e| e.code != terway_core::errors::NO_ADDRESS).collect();
    assert!(node.scarce || problems.is_empty(), "{problems:?}");
    for n in (0..KEYS).chain(100..120) {
        world.del(&key(n));
    }
    world.settle(2 * node.rest());
    check_at_rest(world, node.scarce);
    assert_eq!(world.pool.list().len(), 0);
}

/// Lives through a history and returns the world it leaves. Panics at the first broken promise.
pub(crate) fn live(node: Node, actions: &[Action], end: End) -> World {
    let base = node.config();
    let mut world = World::new(base.clone(), if node.scarce { &[5, 40] } else { &[100, 100] });
    world.thorough = !node.quick;
    let result = catch_unwind(AssertUnwindSafe(|| {
        for action in actions {
            perform(&mut world, &base, action);
        }
        world.check();
        match end {
            End::Rest => come_to_rest(&mut world, node, &base),
            End::GiveUp => world.give_up(),
        }
        world.check();
    }));
    if let Err(panic) = result {
        dump(&world);
        resume_unwind(panic);
    }
    world
}
