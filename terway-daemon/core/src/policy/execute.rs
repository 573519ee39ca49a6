//! Running operations that may fail one by one, and writing again what failed: see [`super::failures`].

use std::collections::{BTreeMap, BTreeSet};

use super::change::append;
use super::compiler::Compiler;
use super::failures::{ApplyOp, Entry, Failed, Halted};
use super::ids::{Identity, PolicyVersion, SetId};
use super::op::{FlowScope, Op};
use super::rule::Policy;
use crate::objects::{Kind, ObjectKey, ObjectName};

impl Compiler {
    /// Runs operations in their order. Entries that fail are kept for [`Compiler::retry`], endpoints with incomplete sets go into lockdown, and endpoints
    /// whose sets are complete again leave it.
    ///
    /// # Errors
    /// When an operation failed that cannot fail by itself.
    pub fn execute(&mut self, ops: Vec<Op>, apply: &mut ApplyOp<'_>) -> Result<(), Halted> {
        self.failures.backlog.extend(ops);
        loop {
            while let Some(op) = self.failures.backlog.pop_front() {
                if let Err(halted) = self.execute_one(&op, apply) {
                    self.failures.backlog.push_front(op);
                    return Err(halted);
                }
            }
            let ops = self.update_lockdown();
            if ops.is_empty() {
                return Ok(());
            }
            self.failures.backlog.extend(ops);
        }
    }

    fn execute_one(&mut self, op: &Op, apply: &mut ApplyOp<'_>) -> Result<(), Halted> {
        let halted = |error| Halted { error };
        match Entry::of(op) {
            Some(entry) => match apply(op) {
                Ok(()) => drop(self.failures.entries.remove(&entry)),
                Err(error) => {
                    self.failures.incomplete.extend(self.live_set(entry));
                    self.failures.entries.insert(entry, Failed { op: op.clone(), error });
                }
            },
            None if self.failures.incomplete.is_empty() => apply(op).map_err(halted)?,
            None => match op {
                Op::PutEndpoint { slot, version, value } => {
                    let value = Box::new(self.failures.locked(**value));
                    apply(&Op::PutEndpoint { slot: *slot, version: *version, value }).map_err(halted)?;
                }
                Op::SetControlWord { version, .. } => {
                    // Endpoints of sets that have become incomplete go into lockdown with the version that would make it visible.
                    for (slot, endpoint) in &self.endpoints {
                        let value = self.failures.locked(endpoint.value);
                        if value != endpoint.value {
                            let op = Op::PutEndpoint { slot: *slot, version: *version, value: Box::new(value) };
                            apply(&op).map_err(halted)?;
                        }
                    }
                    apply(op).map_err(halted)?;
                }
                _ => apply(op).map_err(halted)?,
            },
        }
        Ok(())
    }

    /// Writes the entries that failed again, from the desired state. To be called after a back-off.
    ///
    /// # Errors
    /// As [`Compiler::execute`].
    pub fn retry(&mut self, apply: &mut ApplyOp<'_>) -> Result<(), Halted> {
        let (mut puts, mut removals) = (Vec::new(), Vec::new());
        for (entry, failed) in &self.failures.entries {
            match self.desired(*entry) {
                Some(op) => puts.push(op),
                None => removals.push(removal(*entry, &failed.op)),
            }
            match entry {
                Entry::Address(address) => puts.push(Op::Revalidate(FlowScope::Address(*address))),
                Entry::Cidr(_) => puts.push(Op::Revalidate(FlowScope::All)),
                Entry::PortTable(_) | Entry::Peer(..) => {}
            }
        }
        if !removals.is_empty() {
            puts.push(Op::RcuBarrier);
            append(&mut puts, removals);
        }
        self.execute(puts, apply)
    }

    /// Whether the maps hold everything that was compiled.
    #[must_use]
    pub fn is_applied(&self) -> bool {
        self.failures.entries.is_empty() && self.failures.backlog.is_empty()
    }

    /// The objects that are not in force as compiled, each with the map entries that are missing or out of date.
    #[must_use]
    pub fn unapplied_objects(&self) -> BTreeMap<ObjectKey, BTreeSet<String>> {
        let mut objects: BTreeMap<ObjectKey, BTreeSet<String>> = BTreeMap::new();
        for (entry, failed) in &self.failures.entries {
            let text = format!("{entry}: {}", failed.error);
            for object in self.objects_of(*entry) {
                objects.entry(object).or_default().insert(text.clone());
            }
        }
        objects
    }

    /// The pods of this node that are in lockdown.
    #[must_use]
    pub fn locked_pods(&self) -> Vec<ObjectName> {
        let locked = |set: &SetId| self.failures.is_locked(*set);
        let endpoints = self.endpoints.values().filter(|endpoint| endpoint.sets.iter().flatten().any(locked));
        endpoints.map(|endpoint| endpoint.pod.clone()).collect()
    }

    /// Puts endpoints into lockdown whose sets have become incomplete, and takes those out whose sets are complete again.
    fn update_lockdown(&mut self) -> Vec<Op> {
        let incomplete: BTreeSet<SetId> =
            self.failures.entries.keys().filter_map(|entry| self.live_set(*entry)).collect();
        let changed: BTreeSet<SetId> = incomplete.symmetric_difference(&self.failures.locked).copied().collect();
        self.failures.locked.clone_from(&incomplete);
        self.failures.incomplete = incomplete;
        if changed.is_empty() {
            return Vec::new();
        }
        let concerned = self.endpoints.iter().filter(|(_, e)| e.sets.iter().flatten().any(|set| changed.contains(set)));
        let slots: Vec<u32> = concerned.map(|(slot, _)| *slot).collect();
        if slots.is_empty() {
            return Vec::new();
        }
        for slot in slots {
            self.write_endpoint(slot);
        }
        self.commit()
    }

    /// The set in use that an entry belongs to.
    fn live_set(&self, entry: Entry) -> Option<SetId> {
        match entry {
            Entry::Peer(set, _) => self.sets.contains_key(&set).then_some(set),
            Entry::PortTable(table) => {
                self.sets.iter().find(|(_, set)| set.tables().contains_key(&table)).map(|(id, _)| *id)
            }
            Entry::Cidr(_) | Entry::Address(_) => None,
        }
    }

    /// The operation that writes an entry as it is compiled; none if there is no such entry.
    fn desired(&self, entry: Entry) -> Option<Op> {
        match entry {
            Entry::Peer(set, identity) => {
                let found = self.sets.get(&set).filter(|set| set.has(identity))?;
                Some(Op::PutPeer { set, identity, verdicts: [found.says(identity); 2] })
            }
            Entry::PortTable(table) => {
                let entries = self.sets.values().find_map(|set| set.tables().get(&table))?;
                Some(Op::PutPortTable { table, entries: entries.clone() })
            }
            Entry::Address(address) => {
                let identity = self.claims.get(&address).map(|claim| claim.identity)?;
                (identity != Identity::NONE).then_some(Op::PutAddress { address, identities: [identity; 2] })
            }
            Entry::Cidr(net) => {
                let (_, identity) = self.blocks().find(|(own, _)| *own == net)?;
                Some(Op::PutCidr { net, identities: [identity; 2] })
            }
        }
    }

    fn objects_of(&self, entry: Entry) -> Vec<ObjectKey> {
        let policies = || self.policy_objects();
        match entry {
            Entry::Peer(..) | Entry::PortTable(_) => {
                let set = self.live_set(entry).and_then(|id| self.sets.get(&id));
                let versions: BTreeSet<PolicyVersion> =
                    set.into_iter().flat_map(|set| set.key.policies.iter().copied()).collect();
                policies()
                    .filter(|policy| versions.contains(&policy.version))
                    .map(|policy| policy.key.clone())
                    .collect()
            }
            Entry::Cidr(net) => {
                let names = |policy: &&Policy| policy.nets(&self.peers).any(|own| own == net);
                policies().filter(names).map(|policy| policy.key.clone()).collect()
            }
            Entry::Address(address) => {
                let pod = self.pod_at(address).cloned();
                pod.map(|name| ObjectKey { kind: Kind::Pod, name }).into_iter().collect()
            }
        }
    }
}

/// The operation that removes an entry. `last` is the last operation on it, which has the prefixes of a port table.
fn removal(entry: Entry, last: &Op) -> Op {
    match (entry, last) {
        (Entry::PortTable(table), Op::PutPortTable { entries, .. } | Op::RemovePortTable { entries, .. }) => {
            Op::RemovePortTable { table, entries: entries.clone() }
        }
        (Entry::PortTable(table), _) => Op::RemovePortTable { table, entries: Vec::new() },
        (Entry::Peer(set, identity), _) => Op::RemovePeer { set, identity },
        (Entry::Cidr(net), _) => Op::RemoveCidr(net),
        (Entry::Address(address), _) => Op::RemoveAddress(address),
    }
}
