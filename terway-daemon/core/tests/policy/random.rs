//! Worlds without history: what the maps say of every packet is what the oracle says.

use std::net::IpAddr;

use terway_core::policy::{Compiler, Maps, Packet, Verdict};
use terway_oracle::cluster_state::ClusterState;
use terway_oracle::policy::expected_verdicts;

use crate::dice::Dice;
use crate::making::{ClusterInputs as _, random};
use crate::setting;

/// The slot of a local pod's address.
pub(crate) fn finder(world: &ClusterState) -> impl Fn(IpAddr) -> Option<u32> {
    let slots: std::collections::BTreeMap<IpAddr, u32> =
        world.locals.iter().flat_map(|(slot, local)| local.addresses.iter().map(|a| (*a, *slot))).collect();
    move |address| slots.get(&address).copied()
}

pub(crate) fn compile(world: &ClusterState) -> (Compiler, Maps) {
    let (mut compiler, ops) = Compiler::new();
    let mut maps = Maps::default();
    ops.iter().for_each(|op| maps.apply(op));
    compiler.steps(world.events()).iter().for_each(|op| maps.apply(op));
    (compiler, maps)
}

pub(crate) fn said(verdict: [Option<Verdict>; 2]) -> [Option<bool>; 2] {
    verdict.map(|side| side.map(Verdict::is_allowed))
}

/// A packet, what the maps say of its two sides, and what the oracle says.
type Difference = (Packet, [Option<bool>; 2], [Option<bool>; 2]);

/// The first packet on which maps and oracle differ, with the two answers.
fn difference(world: &ClusterState) -> Option<Difference> {
    let (compiler, maps) = compile(world);
    let local = finder(world);
    for packet in world.packets() {
        let verdict = maps.verdict(&packet, &local, maps.version);
        let (found, expected) = (said(verdict), expected_verdicts(world, &packet));
        if found != expected {
            return Some((packet, found, expected));
        }
        for decision in verdict.into_iter().flatten() {
            assert!(
                compiler.rule(decision.rule_id()).is_some(),
                "a decision without a reason: {packet:?} {decision:?}"
            );
        }
    }
    None
}

/// Takes away what the difference does not need.
fn shrink(mut world: ClusterState) -> ClusterState {
    loop {
        let mut smaller: Vec<ClusterState> = Vec::new();
        let mut without = |change: &dyn Fn(&mut ClusterState)| {
            let mut less = world.clone();
            change(&mut less);
            smaller.push(less);
        };
        for name in world.pods.keys() {
            without(&|w| drop(w.pods.remove(name)));
        }
        for name in world.policies.keys() {
            without(&|w| drop(w.policies.remove(name)));
            without(&|w| drop(w.policies.get_mut(name).unwrap().ingress.pop()));
            without(&|w| drop(w.policies.get_mut(name).unwrap().egress.pop()));
        }
        for name in world.cluster.keys() {
            without(&|w| drop(w.cluster.remove(name)));
            without(&|w| drop(w.cluster.get_mut(name).unwrap().ingress.pop()));
            without(&|w| drop(w.cluster.get_mut(name).unwrap().egress.pop()));
        }
        for slot in world.locals.keys() {
            without(&|w| drop(w.locals.remove(slot)));
        }
        for name in world.namespaces.keys() {
            without(&|w| drop(w.namespaces.remove(name)));
        }
        let size = |w: &ClusterState| {
            let rules = w.policies.values().map(|p| p.ingress.len() + p.egress.len()).sum::<usize>()
                + w.cluster.values().map(|p| p.ingress.len() + p.egress.len()).sum::<usize>();
            w.pods.len() + w.policies.len() + w.cluster.len() + w.locals.len() + w.namespaces.len() + rules
        };
        match smaller.into_iter().find(|w| size(w) < size(&world) && difference(w).is_some()) {
            Some(less) => world = less,
            None => return world,
        }
    }
}

#[test]
fn compiled_policies_match_oracle() {
    let worlds = setting("POLICY_WORLDS", 500);
    let seed = setting("POLICY_SEED", 1);
    for n in 0..worlds {
        let world = random(&mut Dice::new(seed.wrapping_add(n).wrapping_mul(0x1000_0000_01b3)));
        if difference(&world).is_some() {
            let least = shrink(world);
            let (packet, found, expected) = difference(&least).unwrap();
            panic!("world {n} of seed {seed}: {packet:?}\nmaps say {found:?}, oracle says {expected:?}\n{least:#?}");
        }
    }
}

/// The worlds above would prove little if nearly everything in them were allowed, or denied.
#[test]
fn random_policies_allow_and_deny() {
    let mut counts = [0usize; 2];
    for n in 0..60 {
        let world = random(&mut Dice::new(7_000 + n));
        for packet in world.packets() {
            for side in expected_verdicts(&world, &packet).into_iter().flatten() {
                counts[usize::from(side)] += 1;
            }
        }
    }
    let [denied, allowed] = counts;
    assert!(denied * 5 > allowed && allowed * 5 > denied, "{denied} denied, {allowed} allowed");
}
