//! Running plans: the planner keeps apart what it wants in the maps and what is there, entry by entry.

use std::collections::{BTreeMap, BTreeSet};

use super::Planner;
use crate::objects::ObjectKey;
use crate::service::actual::{ApplyBatch, Entry};
use crate::service::model::{MapContents, Op, Owner, Plan};
use crate::service::sockets::invalidates_backend;

/// The outcome of running operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Executed {
    /// Operations that were applied.
    pub applied: usize,
    /// Whether one of them invalidated or removed a backend, so that sockets may have to be destroyed.
    pub backends_removed: bool,
}

impl Planner {
    /// Runs the operations of a plan, in batches of one kind. What fails, and what has to wait for it, is kept ([`Planner::unapplied`]); all else goes on.
    pub fn execute(&mut self, plan: &Plan, apply: &mut ApplyBatch<'_>) -> Executed {
        let mut executed = Executed::default();
        self.unapplied.run(&plan.ops, &plan.replaced, apply, |op| executed.count(op));
        executed
    }

    /// Runs a plan's operations for later ([`Plan::retire`]), after the grace period. Ids of what is removed may then be used again.
    pub fn execute_retired(&mut self, retire: &[Op], apply: &mut ApplyBatch<'_>) -> Executed {
        let mut executed = Executed::default();
        let mut applied = Vec::new();
        self.unapplied.run(retire, &MapContents::default(), apply, |op| {
            executed.count(op);
            applied.push(op.clone());
        });
        self.retired(&applied);
        executed
    }

    /// Plans again what has not been applied: failed operations, and those that waited for them. To be called after a back-off.
    #[must_use]
    pub fn retry(&mut self) -> Plan {
        let (ops, retire) = self.unapplied.retry();
        Plan { ops, retire, ..Plan::default() }
    }

    /// Map entries whose last planned operation has not been applied, each with its error; none while it waits for another entry.
    pub fn unapplied(&self) -> impl Iterator<Item = (Entry, Option<&str>)> {
        self.unapplied.entries()
    }

    /// Whether the maps hold everything that was planned, operations for later apart.
    #[must_use]
    pub fn is_applied(&self) -> bool {
        self.unapplied.is_empty()
    }

    /// The objects that are not in force as planned, each with the map entries that are missing or out of date.
    #[must_use]
    pub fn unapplied_objects(&self) -> BTreeMap<ObjectKey, BTreeSet<String>> {
        let mut objects: BTreeMap<ObjectKey, BTreeSet<String>> = BTreeMap::new();
        for (entry, error) in self.unapplied.entries() {
            let text = match error {
                Some(error) => format!("{entry}: {error}"),
                None => format!("{entry} waits for another map entry"),
            };
            for owner in self.owners_of(entry) {
                objects.entry(owner.object()).or_default().insert(text.clone());
            }
        }
        objects
    }

    /// The owners of a map entry; none if what it belonged to is gone. Walks over all backends or ports: for what is rare.
    fn owners_of(&self, entry: Entry) -> Vec<&Owner> {
        match entry {
            Entry::Frontend(key) => {
                let references = self.frontends.get(&key).and_then(|entry| entry.references.first());
                references.map(|reference| &*reference.owner).into_iter().collect()
            }
            Entry::Backend(id) => {
                let backend = self.backends.values().find(|entry| entry.id == id);
                backend.into_iter().flat_map(|entry| &entry.references).map(|(owner, _)| &**owner).collect()
            }
            Entry::Table(id) => {
                let Some((table, _)) = self.tables.iter().find(|(_, entry)| entry.id == id) else { return Vec::new() };
                self.ports().filter(|(_, port)| port.tables.contains(table)).map(|(owner, _)| &**owner).collect()
            }
            Entry::Range(id, _) | Entry::Port(id) => {
                self.ports().filter(|(_, port)| port.id == id).map(|(owner, _)| &**owner).collect()
            }
        }
    }
}

impl Executed {
    fn count(&mut self, op: &Op) {
        self.applied += 1;
        self.backends_removed |= invalidates_backend(op);
    }
}
