//! Failed map operations: each delays only what depends on it, no frontend ever leads to what is not written, and after retries the maps are as desired.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use terway_core::objects::{Applied, Change, Kind, ObjectKey, ObjectName, Protocol};
use terway_core::service::{Entry, FrontendKey, MapContents, Op, OpError, Plan};

use crate::oracle::{self, Answer, Expected, TCP};
use crate::random::{any_change, any_settings};
use crate::world::{ME, World, check_step, endpoint, ip, service, similar, slice};

const PORTS: &[(&str, u16, Protocol)] = &[("", 8080, TCP)];

/// Operations that fail: so many in a hundred, by a generator of its own (xorshift64).
struct Faults {
    state: u64,
    percent: u64,
}

impl Faults {
    fn hit(&mut self) -> bool {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % 100 < self.percent
    }
}

type Seen = BTreeMap<FrontendKey, Expected>;

/// Applies what does not fail. Reading a frontend that leads to a missing table or backend panics (`oracle::seen`).
fn apply(
    kernel: &mut MapContents,
    batch: &[Op],
    fails: &mut dyn FnMut(&Op) -> bool,
    before: &Seen,
    desired: &Seen,
) -> Vec<OpError> {
    let mut errors = Vec::new();
    for (place, op) in batch.iter().enumerate() {
        if *op != Op::RcuBarrier && fails(op) {
            errors.push((place, "no room".to_owned()));
            continue;
        }
        kernel.apply(op);
        check_step(op, before, &oracle::seen(kernel), desired);
    }
    errors
}

impl World {
    fn execute(&mut self, plan: &Plan, fails: &mut dyn FnMut(&Op) -> bool) {
        let (before, desired) = (oracle::seen(&self.kernel), oracle::seen(&self.planner.map_contents()));
        let kernel = &mut self.kernel;
        self.planner.execute(plan, &mut |batch| apply(kernel, batch, fails, &before, &desired));
        self.take_in(plan);
        self.check_undisturbed(&desired);
    }

    fn execute_retired(&mut self, fails: &mut dyn FnMut(&Op) -> bool) {
        let before = oracle::seen(&self.kernel);
        let pending = std::mem::take(&mut self.pending);
        let kernel = &mut self.kernel;
        self.planner.execute_retired(&pending, &mut |batch| {
            let errors = apply(kernel, batch, fails, &before, &before);
            assert_eq!(oracle::seen(kernel), before, "{batch:?} changed what clients get");
            errors
        });
    }

    /// Every frontend without a pending operation is as desired, and every object with one is named.
    fn check_undisturbed(&self, desired: &Seen) {
        let pending: BTreeSet<FrontendKey> = self
            .planner
            .unapplied()
            .filter_map(|(entry, _)| if let Entry::Frontend(key) = entry { Some(key) } else { None })
            .collect();
        let now = oracle::seen(&self.kernel);
        for key in now.keys().chain(desired.keys()).filter(|key| !pending.contains(key)) {
            assert!(similar(now.get(key), desired.get(key)), "{key}: {:?}, {:?}", now.get(key), desired.get(key));
        }
        let named = self.planner.unapplied_objects();
        for key in pending.iter().filter(|key| desired.contains_key(key)) {
            assert!(named.values().flatten().any(|text| text.contains(&key.to_string())), "{key} in {named:?}");
        }
    }

    fn update(&mut self, changes: Vec<Change>) -> Plan {
        let applied: Vec<Applied> = changes.into_iter().filter_map(|c| self.objects.apply(c)).collect();
        self.planner.update(&self.objects, &applied)
    }

    /// Retries until everything is applied; without failures a few rounds are enough, each with its operations for later.
    fn recover(&mut self) {
        for _ in 0..4 {
            let plan = self.planner.retry();
            self.execute(&plan, &mut |_| false);
            self.execute_retired(&mut |_| false);
        }
        assert!(self.planner.is_applied(), "{:?}", self.planner.unapplied().collect::<Vec<_>>());
    }
}

proptest! {
    #[test]
    fn failed_service_operations_are_isolated_and_retried(
        settings in any_settings(),
        batches in prop::collection::vec(
            (prop::collection::vec(any_change(), 1..4), 0..70_u64, any::<bool>(), any::<bool>()), 1..14),
        seed in 1..u64::MAX,
    ) {
        let mut world = World::with(settings);
        let mut faults = Faults { state: seed, percent: 0 };
        for (changes, percent, retry, retire) in batches {
            faults.percent = percent;
            let plan = world.update(changes);
            world.execute(&plan, &mut |_| faults.hit());
            if retire {
                world.execute_retired(&mut |_| faults.hit());
            }
            if retry {
                let plan = world.planner.retry();
                world.execute(&plan, &mut |_| faults.hit());
            }
        }
        world.recover();
        // A generation that was never written is not in the maps.
        world.kernel.generation = world.planner.map_contents().generation;
        world.check();
    }
}

fn two_services() -> World {
    let mut world = World::new();
    world.put(service("a", "10.96.0.1", &[("", 80, TCP)]));
    world.put(service("b", "10.96.0.2", &[("", 80, TCP)]));
    world.put(slice("ea", "a", PORTS, vec![endpoint("10.0.0.1", ME)]));
    world.put(slice("eb", "b", PORTS, vec![endpoint("10.0.0.1", ME)]));
    world
}

fn endpoints_of(world: &World, vip: &str) -> Vec<String> {
    match oracle::resolve(&world.kernel, world.kernel.frontends[&FrontendKey::new(ip(vip), 80, TCP)].internal) {
        Answer::Backends(_, shares) => shares.keys().map(|key| key.address.to_string()).collect(),
        other => vec![format!("{other:?}")],
    }
}

fn put_endpoints(world: &mut World, name: &str, owner: &str, hosts: &[&str]) -> Plan {
    let endpoints = hosts.iter().map(|host| endpoint(host, ME)).collect();
    let object = terway_core::objects::Object::EndpointSlice(slice(name, owner, PORTS, endpoints));
    world.update(vec![Change::Upsert(Box::new(object))])
}

#[test]
fn full_backend_map_keeps_old_backends() {
    let mut world = two_services();
    let plan = put_endpoints(&mut world, "ea", "a", &["10.0.0.2", "10.0.0.3"]);
    world.execute(&plan, &mut |op| matches!(op, Op::PutTable(..)));
    assert_eq!(endpoints_of(&world, "10.96.0.1"), ["10.0.0.1"], "the old backends");
    let key = ObjectKey { kind: Kind::Service, name: ObjectName::new("ns", "a") };
    let unapplied = world.planner.unapplied_objects();
    assert_eq!(unapplied.keys().collect::<Vec<_>>(), [&key], "only this Service is concerned");
    assert!(unapplied[&key].iter().any(|text| text.ends_with("no room")), "{unapplied:?}");
    // What it still leads to is not removed when its time comes.
    world.execute_retired(&mut |_| false);
    assert_eq!(endpoints_of(&world, "10.96.0.1"), ["10.0.0.1"]);
    let plan = put_endpoints(&mut world, "eb", "b", &["10.0.0.4"]);
    world.execute(&plan, &mut |_| false);
    assert_eq!(endpoints_of(&world, "10.96.0.2"), ["10.0.0.4"], "another Service changes meanwhile");
    world.recover();
    assert_eq!(endpoints_of(&world, "10.96.0.1"), ["10.0.0.2", "10.0.0.3"]);
    assert!(world.planner.unapplied_objects().is_empty());
    world.check();
}

#[test]
fn unwritten_backend_is_not_selectable() {
    let mut world = two_services();
    let plan = put_endpoints(&mut world, "ea", "a", &["10.0.0.1", "10.0.0.2"]);
    world.execute(&plan, &mut |op| matches!(op, Op::PutBackend(..)));
    assert_eq!(endpoints_of(&world, "10.96.0.1"), ["10.0.0.1"]);
    assert!(world.planner.unapplied().count() >= 3, "backend, table and frontend");
    world.recover();
    world.check();
}

#[test]
fn id_is_not_reused_while_removal_fails() {
    let mut world = two_services();
    let plan = put_endpoints(&mut world, "ea", "a", &["10.0.0.2"]);
    world.execute(&plan, &mut |_| false);
    let plan = put_endpoints(&mut world, "ea", "a", &["10.0.0.1"]);
    world.execute(&plan, &mut |_| false);
    let gone = *world.kernel.backends.iter().find(|(_, b)| b.key.address == ip("10.0.0.2")).unwrap().0;
    world.execute_retired(&mut |op| matches!(op, Op::RemoveBackend(..)));
    let plan = put_endpoints(&mut world, "ea", "a", &["10.0.0.9"]);
    assert!(plan.ops.iter().all(|op| !matches!(op, Op::PutBackend(id, _) if *id == gone)), "{:?}", plan.ops);
    world.execute(&plan, &mut |_| false);
    world.recover();
    world.check();
}
