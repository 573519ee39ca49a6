//! What sets say about identities: everything for a new set, about a new identity for all sets that have something to say about it, and about a
//! namespace's pods when its labels change. Each costs what changes by it, not what there is.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::cidr_region::family;
use super::compiler::Compiler;
use super::id_map::{NumberMap, NumberSet};
use super::ids::{Identity, IdentityKind, PortTableId, RegionId, SetId, VerdictOrTable};
use super::namespace_labels::labels_of;
use super::op::{FlowScope, Op};
use super::peer_match::Match;
use super::peers::Who;
use super::rule::Policy;
use super::set::{Base, Deviation, NewPortTables, Set, SetKey};
use crate::ident::Family;
use crate::objects::Labels;

/// Stands where no selector deviates, for an identity that has to be asked about all the same.
const NO_DEVIATION: Deviation = (u32::MAX, false);

/// An identity that was asked about: its cell, where that counts, its deviations, and the answer.
type Asked<'a> = (Option<RegionId>, &'a [(Identity, Deviation)], VerdictOrTable);

impl Compiler {
    /// Asks about a new identity: each selector once, then the sets that use one of those with an answer of their own.
    pub(super) fn announce(&mut self, identity: Identity) {
        let Some(meaning) = self.classes.meaning(identity) else { return };
        let (kind, net) = (identity.kind(), self.cells.get(meaning.cell).net);
        let class = meaning.class.and_then(|class| self.classes.get(class));
        let deviating = class.map_or_else(Vec::new, |class| {
            let (namespace, space) = (&class.like.namespace, labels_of(&self.namespaces, &class.like.namespace));
            self.peers.meet(identity, Who { namespace, space: &space, labels: &class.like.labels })
        });
        let ports = class.map_or(&[][..], |class| &class.like.ports);
        let mut concerned = if kind == IdentityKind::Pod { self.wildcard_sets.clone() } else { BTreeSet::new() };
        for peer in deviating.iter().copied().chain(self.peers.around(net, kind == IdentityKind::Pod)) {
            concerned.extend(self.peers.users(peer));
        }
        let mut made = Vec::new();
        let mut entries = Vec::new();
        let mut number = || next_port_table_id(&mut self.port_table_counter, &mut self.port_tables);
        for id in &concerned {
            let Some(set) = self.sets.get_mut(id) else { continue };
            let base = set.base(kind, net, &self.peers);
            let deviations = set.deviations(&deviating, &self.peers);
            let mut tables = NewPortTables { number: &mut number, made: &mut made };
            let result = set.evaluate(&base, &deviations, ports, &mut tables);
            let (_, new) = set.put(identity, result);
            if new != VerdictOrTable::NONE {
                entries.push(Op::PutPeer { set: *id, identity, verdicts: [new; 2] });
            }
        }
        self.effort.set_evaluations += concerned.len() as u64;
        self.change.fresh.extend(made.into_iter().map(|(table, entries)| Op::PutPortTable { table, entries }));
        self.change.fresh.extend(entries);
    }

    /// Asks about the pods of a namespace whose labels were `old`: the selectors that select it no more or only now, and the sets that use them.
    pub(super) fn ask_again(&mut self, namespace: &Arc<str>, old: &Labels) {
        let space = labels_of(&self.namespaces, namespace);
        let turned = self.peers.turned(old, &space);
        if turned.is_empty() {
            return;
        }
        let mut made = Vec::new();
        let mut changed: NumberSet<SetId> = NumberSet::default();
        let mut number = || next_port_table_id(&mut self.port_table_counter, &mut self.port_tables);
        for class in self.classes.members_of(namespace) {
            let selected = |what: &Match| matches!(what, Match::Pods(pods) if pods.pods.matches(&class.like.labels));
            let turned: Vec<_> = turned.iter().filter(|(_, what)| selected(what)).map(|(peer, _)| *peer).collect();
            let concerned: BTreeSet<SetId> = turned.iter().flat_map(|peer| self.peers.users(*peer)).copied().collect();
            if concerned.is_empty() {
                continue;
            }
            let who = Who { namespace, space: &space, labels: &class.like.labels };
            let deviating = self.peers.deviating(who);
            for (identity, cell) in &class.identities {
                turned.iter().for_each(|peer| self.peers.turn(*peer, *identity));
                let net = self.cells.get(*cell).net;
                for id in &concerned {
                    let Some(set) = self.sets.get_mut(id) else { continue };
                    let base = set.base(IdentityKind::Pod, net, &self.peers);
                    let deviations = set.deviations(&deviating, &self.peers);
                    let mut tables = NewPortTables { number: &mut number, made: &mut made };
                    let result = set.evaluate(&base, &deviations, &class.like.ports, &mut tables);
                    let (old, new) = set.put(*identity, result);
                    if old != new {
                        self.change.peers.insert((*id, *identity), (old, new));
                        changed.insert(*id);
                    }
                }
                self.effort.set_evaluations += concerned.len() as u64;
            }
        }
        let users = self.endpoints.iter().filter(|(_, e)| e.sets.iter().flatten().any(|set| changed.contains(set)));
        self.change.stale.extend(users.map(|(slot, _)| FlowScope::Endpoint(*slot)));
        self.change.fresh.extend(made.into_iter().map(|(table, entries)| Op::PutPortTable { table, entries }));
    }

    /// Makes a set and everything it says.
    pub(super) fn make_set(&mut self, key: SetKey, policies: &[Arc<Policy>]) -> SetId {
        let id = SetId(self.set_counter.next(|n| self.sets.contains_key(&SetId(n))));
        let mut set = Set::new(key, id, policies, &self.peers, &mut self.reasons);
        for peer in set.peers() {
            self.peers.employ(peer, id, &self.classes, &self.namespaces);
        }
        let mut made = Vec::new();
        let mut number = || next_port_table_id(&mut self.port_table_counter, &mut self.port_tables);
        let mut tables = NewPortTables { number: &mut number, made: &mut made };
        // What holds for a pod that no selector says anything in particular about, where most pods are, and for the rest of the world.
        let mut wildcard_sets = set.names_for_all();
        let everyone = wildcard_sets;
        for of in [Family::V4, Family::V6] {
            let home = self.cells.get(self.cells.home(of)).net;
            wildcard_sets |= set.held(home, &self.peers);
            for (kind, net) in [(IdentityKind::World, super::cidr_region::whole(of)), (IdentityKind::Pod, home)] {
                let base = set.base(kind, net, &self.peers);
                let result = set.evaluate(&base, &[], &[], &mut tables);
                set.set_default(Identity::new(kind, of, 0).default_index(), result);
            }
        }
        let mut said: Vec<(Identity, VerdictOrTable)> = Vec::new();

        // Outside of all its blocks the world is like the default: one that holds a whole family is around everything.
        let mut cells: Vec<(Identity, RegionId)> = Vec::new();
        for (peer, _) in set.blocks() {
            if let Match::Block(block) = self.peers.get(*peer) {
                let worlds = self.cells.within(block.cidr).map(|cell| cell.world);
                cells.extend(worlds.filter_map(|world| Some((world, self.classes.meaning(world)?.cell))));
            }
        }
        let nodes = self.node.iter().filter_map(|address| self.claims.get(address)).map(|claim| claim.identity);
        cells.extend(nodes.filter_map(|node| Some((node, self.classes.meaning(node)?.cell))));
        cells.sort_unstable();
        cells.dedup();
        for (identity, cell) in &cells {
            let base = set.base(IdentityKind::World, self.cells.get(*cell).net, &self.peers);
            said.push((*identity, set.evaluate(&base, &[], &[], &mut tables)));
        }

        // Pods: those about which one of its selectors deviates, and those of cells in which another answer holds than at home.
        let mut asked: Vec<(Identity, Deviation)> = Vec::new();
        for (peer, rule) in set.selectors() {
            let selected = !self.peers.inverted(*peer);
            asked.extend(self.peers.odd(*peer).iter().map(|identity| (*identity, (*rule, selected))));
        }
        let mut bases: NumberMap<RegionId, Base> = NumberMap::default();
        let anywhere = set.base(IdentityKind::Pod, super::cidr_region::whole(Family::V4), &self.peers);
        let by_cell = !set.blocks().is_empty();
        if by_cell || everyone {
            for (id, cell, pods) in self.cells.populated() {
                let base = set.base(IdentityKind::Pod, cell.net, &self.peers);
                let index = Identity::new(IdentityKind::Pod, family(&cell.net), 0).default_index();
                if everyone || set.evaluate(&base, &[], &[], &mut tables) != set.default(index) {
                    asked.extend(pods.iter().map(|identity| (*identity, NO_DEVIATION)));
                }
                bases.insert(id, base);
            }
        }
        // Not unstable: the lists come sorted, one after the other.
        asked.sort();
        let mut last: Option<Asked<'_>> = None;
        let mut deviations = Vec::new();
        for about in asked.chunk_by(|a, b| a.0 == b.0) {
            let identity = about[0].0;
            let meaning = if by_cell || set.by_port_name { self.classes.meaning(identity) } else { None };
            let cell = meaning.map(|meaning| meaning.cell).filter(|_| by_cell);
            let like = |(of, before, _): &Asked<'_>| {
                *of == cell && before.iter().map(|(_, d)| d).eq(about.iter().map(|(_, d)| d))
            };
            let result = match last.filter(like) {
                Some((.., result)) if !set.by_port_name => result,
                _ => {
                    deviations.clear();
                    deviations.extend(about.iter().map(|(_, deviation)| *deviation));
                    let class = meaning.and_then(|meaning| meaning.class).and_then(|class| self.classes.get(class));
                    let ports = class.map_or(&[][..], |class| &class.like.ports);
                    let base = cell.and_then(|cell| bases.get(&cell)).unwrap_or(&anywhere);
                    set.evaluate(base, &deviations, ports, &mut tables)
                }
            };
            last = Some((cell, about, result));
            said.push((identity, result));
        }
        self.effort.set_evaluations += said.len() as u64;
        set.begin(said);

        let entries = set.entries().iter();
        self.change.fresh.reserve(made.len() + entries.len());
        self.change.fresh.extend(made.into_iter().map(|(table, entries)| Op::PutPortTable { table, entries }));
        self.change.fresh.extend(entries.map(|(identity, result)| Op::PutPeer {
            set: id,
            identity: *identity,
            verdicts: [*result; 2],
        }));
        if wildcard_sets {
            self.wildcard_sets.insert(id);
        }
        self.set_keys.insert(set.key.clone(), id);
        self.sets.insert(id, set);
        id
    }

    /// Removes a set that no endpoint uses.
    pub(super) fn drop_set(&mut self, id: SetId) {
        let Some(mut set) = self.sets.remove(&id) else { return };
        self.set_keys.remove(&set.key);
        self.wildcard_sets.remove(&id);
        for peer in set.peers() {
            self.peers.dismiss(peer, id);
        }
        self.deferred.settled_entries(id, |identity| set.has(identity));
        // Entries that this event removed have not been written yet, and need not be.
        let gone: Vec<_> =
            self.change.peers.range((id, Identity(0))..=(id, Identity(u32::MAX))).map(|(k, v)| (*k, *v)).collect();
        for (key, (old, _)) in gone {
            self.change.peers.remove(&key);
            if old != VerdictOrTable::NONE && !set.has(key.1) {
                self.change.garbage.push(Op::RemovePeer { set: id, identity: key.1 });
            }
        }
        for (table, entries) in set.tables() {
            self.port_tables.remove(table);
            self.change.garbage.push(Op::RemovePortTable { table: *table, entries: entries.clone() });
        }
        self.deferred.reasons.extend_from_slice(set.reasons());
        self.change.sets.push((id, set.end()));
    }
}

fn next_port_table_id(counter: &mut super::ids::Counter, live: &mut NumberSet<PortTableId>) -> PortTableId {
    let table = PortTableId(counter.next(|n| live.contains(&PortTableId(n))));
    live.insert(table);
    table
}
