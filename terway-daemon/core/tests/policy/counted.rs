//! Which reasons are in use: whoever makes a counter for each that is told, and removes it when told, has one for every decision that any
//! packet can meet.

use std::collections::BTreeSet;

use terway_core::policy::{Compiler, Decision, Maps, ReasonId};

use crate::world::World;

/// The reasons that a counter is there for.
#[derive(Debug, Default)]
pub(crate) struct Counted(BTreeSet<ReasonId>);

impl Counted {
    /// Does as the compiler says; to be called before its operations run.
    pub(crate) fn follow(&mut self, compiler: &mut Compiler, label: &str) {
        let changes = compiler.reason_changes();
        for reason in changes.made {
            assert!(self.0.insert(reason), "{label}: {reason} is made twice");
            assert!(compiler.reason(reason).is_some(), "{label}: {reason} is nothing");
        }
        for reason in changes.gone {
            assert!(self.0.remove(&reason), "{label}: {reason} goes without having come");
        }
    }

    /// Each decision has a counter, those apart that stand under slots of nobody. To be called when the operations have run.
    pub(crate) fn covers(&self, maps: &Maps, world: &World, label: &str) {
        let rows = maps.rows.values().flatten().map(|entry| entry.decision);
        let peers = maps.peers.values().flatten().copied();
        let sides =
            maps.endpoints.iter().filter(|(slot, _)| world.locals.contains_key(slot)).flat_map(|(_, values)| values);
        let sides = sides.flat_map(|e| [e.ingress, e.egress]);
        let targets = peers.chain(sides.flat_map(|side| side.defaults)).filter_map(|target| target.resolve().ok());
        let fixed = |decision: &Decision| decision.reason().0 <= 15;
        for decision in rows.chain(targets).filter(|decision| !fixed(decision)) {
            assert!(self.0.contains(&decision.reason()), "{label}: nothing counts {decision:?}");
        }
    }

    /// Another daemon has taken over: none of its reasons has a number of before.
    pub(crate) fn taken_over(&mut self, compiler: &mut Compiler, label: &str) {
        let old = std::mem::take(self);
        self.follow(compiler, label);
        assert!(old.0.is_disjoint(&self.0), "{label}: old and new reasons share numbers");
    }
}
