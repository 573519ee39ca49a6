//! Which reasons are in use: whoever makes a counter for each that is told, and removes it when told, has one for every decision that any
//! packet can meet.

use std::collections::BTreeSet;

use terway_core::policy::{Compiler, Maps, RuleId, Verdict};
use terway_oracle::cluster_state::ClusterState;

/// The reasons that a counter is there for.
#[derive(Debug, Default)]
pub(crate) struct Counted(BTreeSet<RuleId>);

impl Counted {
    /// Does as the compiler says; to be called before its operations run.
    pub(crate) fn follow(&mut self, compiler: &mut Compiler, label: &str) {
        let changes = compiler.take_rule_id_changes();
        for reason in changes.added {
            assert!(self.0.insert(reason), "{label}: {reason} is made twice");
            assert!(compiler.rule(reason).is_some(), "{label}: {reason} is nothing");
        }
        for reason in changes.removed {
            assert!(self.0.remove(&reason), "{label}: {reason} goes without having come");
        }
    }

    /// Each decision has a counter, those apart that stand under slots of nobody. To be called when the operations have run.
    pub(crate) fn covers(&self, maps: &Maps, world: &ClusterState, label: &str) {
        for reason in reasons(maps, |slot| world.locals.contains_key(&slot)) {
            assert!(self.0.contains(&reason), "{label}: nothing counts {reason}");
        }
    }

    /// Another daemon has taken over, and its operations have not run yet: none of its reasons has a number that stands in the maps.
    pub(crate) fn taken_over(&mut self, compiler: &mut Compiler, maps: &Maps, label: &str) {
        *self = Self::default();
        self.follow(compiler, label);
        for reason in reasons(maps, |_| true) {
            assert!(!self.0.contains(&reason), "{label}: {reason} stands in the maps for something else");
        }
    }
}

/// The numbers of all decisions, those that are fixed apart.
fn reasons(maps: &Maps, slots: impl Fn(u32) -> bool) -> BTreeSet<RuleId> {
    let rows = maps.port_tables.values().flatten().map(|entry| entry.verdict);
    let peers = maps.peers.values().flatten().copied();
    let endpoints = maps.endpoints.iter().filter(|(slot, _)| slots(**slot)).flat_map(|(_, values)| values);
    let sides = endpoints.flat_map(|endpoint| [endpoint.ingress, endpoint.egress]).flatten();
    let targets = peers.chain(sides.flat_map(|side| side.defaults)).filter_map(|target| target.resolve().ok());
    rows.chain(targets).map(Verdict::rule_id).filter(|reason| reason.0 > 15).collect()
}
