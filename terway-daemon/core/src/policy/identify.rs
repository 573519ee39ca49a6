//! Which identity an address has, and how blocks and label keys that come into use split identities without changing any decision.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::cells::{CellId, Cells, family, inside, whole};
use super::class::{ClassId, Classes, ProfileId};
use super::compiler::Compiler;
use super::hash::{NumberMap, NumberSet};
use super::number::{Identity, Nature, RowId, SetId, Target};
use super::op::{Op, Stale};
use super::plan::Item;
use super::rule::Policy;
use super::set::{NewRows, PeerView, Set, SetKey};
use crate::ident::Family;
use crate::objects::Labels;

/// The label that each namespace has by its name (well-known labels, `kubernetes.io/metadata.name`).
const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// A namespace's labels with its name among them, whoever made the object.
pub(super) fn with_name(namespace: &Arc<str>, labels: &Labels) -> Labels {
    if labels.get(NAMESPACE_NAME) == Some(namespace) {
        return labels.clone();
    }
    let own = labels.iter().filter(|(key, _)| &***key != NAMESPACE_NAME).map(|(k, v)| (Arc::clone(k), Arc::clone(v)));
    own.chain([(Arc::from(NAMESPACE_NAME), Arc::clone(namespace))]).collect()
}

pub(super) fn view<'a>(
    classes: &'a Classes,
    cells: &'a Cells,
    identity: Identity,
    none: &'a Labels,
) -> Option<PeerView<'a>> {
    let meaning = classes.meaning(identity)?;
    let class = meaning.class.and_then(|class| classes.get(class));
    Some(PeerView {
        nature: identity.nature(),
        labels: class.map_or(none, |class| &class.key.labels),
        ports: class.map_or(&[], |class| &class.key.ports),
        net: cells.get(meaning.cell).net,
    })
}

impl Compiler {
    /// The labels of a namespace; one that is not known has its name.
    pub(super) fn namespace_labels(&self, namespace: &Arc<str>) -> Labels {
        self.namespaces.get(namespace).cloned().unwrap_or_else(|| with_name(namespace, &Labels::default()))
    }

    /// Settles what identity an address has. `neutral`: it is known that no decision changes by it.
    pub(super) fn resolve(&mut self, address: IpAddr, neutral: bool) {
        let old = self.claims.get(&address).map_or(Identity::NONE, |claim| claim.identity);
        let who = if self.node.contains(&address) {
            Some((Nature::Node, None))
        } else {
            self.holder(address).and_then(|pod| self.classes.class_of(pod)).map(|class| (Nature::Pod, Some(class)))
        };
        let new = who.map_or(Identity::NONE, |(nature, class)| {
            let cell = self.cells.of(address);
            self.acquire(nature, class, cell)
        });
        if new == old {
            if new != Identity::NONE {
                self.abandon(new);
            }
        } else {
            if neutral {
                self.change.neutral.push(Op::Address { address, identities: [new; 2] });
                self.later.settled(Item::Address(address));
            } else {
                self.change.address(address, old, new);
            }
            if let Some(claim) = self.claims.get_mut(&address) {
                claim.identity = new;
            }
            if old != Identity::NONE {
                self.abandon(old);
            }
        }
        if !self.node.contains(&address) && self.claims.get(&address).is_some_and(|claim| claim.pods.is_empty()) {
            self.claims.remove(&address);
        }
    }

    /// The profile of the pod that an address belongs to. On this node the endpoint decides, else who came last.
    fn holder(&self, address: IpAddr) -> Option<ProfileId> {
        let claim = self.claims.get(&address)?;
        let pod = match self.addresses.get(&address).and_then(|slot| self.endpoints.get(slot)) {
            Some(endpoint) => self.known_pod(endpoint).filter(|pod| claim.pods.contains(pod))?,
            None => *claim.pods.last()?,
        };
        self.pods.get(&pod).map(|state| state.profile)
    }

    /// The identity of one more address.
    pub(super) fn acquire(&mut self, nature: Nature, class: Option<ClassId>, cell: CellId) -> Identity {
        let net = self.cells.get(cell).net;
        let (identity, new) = self.classes.identity(nature, class, cell, &net);
        if nature != Nature::World {
            self.cells.get_mut(cell).members += 1;
        }
        if new {
            self.announce(identity);
        }
        identity
    }

    /// One address less has the identity.
    fn abandon(&mut self, identity: Identity) {
        let Some(cell) = self.classes.meaning(identity).map(|meaning| meaning.cell) else { return };
        if identity.nature() != Nature::World {
            self.cells.get_mut(cell).members -= 1;
        }
        if self.classes.forget(identity) {
            for (id, set) in &mut self.sets {
                if set.forget(identity) {
                    self.change.garbage.push(Op::DropPeer { set: *id, identity });
                }
            }
        }
    }

    /// Asks every set about a new identity.
    fn announce(&mut self, identity: Identity) {
        let none = Labels::default();
        let namespace = self.classes.meaning(identity).and_then(|m| m.class).and_then(|c| self.classes.get(c));
        let name = namespace.map_or_else(|| Arc::from(""), |class| Arc::clone(&class.key.namespace));
        let labels = self.namespace_labels(&name);
        let Some(peer) = view(&self.classes, &self.cells, identity, &none) else { return };
        let mut made = Vec::new();
        let mut peers = Vec::new();
        for (id, set) in &mut self.sets {
            let answers = set.namespace_answers(&name, &labels);
            let counter = &mut self.row_counter;
            let live = &mut self.rows;
            let mut rows = NewRows { number: &mut || number_row(counter, live), made: &mut made };
            let target = set.target(&peer, &answers, &mut rows);
            let (_, new) = set.put(identity, target);
            if new != Target::NONE {
                peers.push(Op::Peer { set: *id, identity, targets: [new; 2] });
            }
        }
        self.change.fresh.extend(made.into_iter().map(|(row, entries)| Op::Row { row, entries }));
        self.change.fresh.extend(peers);
    }

    /// Asks the sets that look at the labels of namespaces about all pods of one.
    pub(super) fn ask_again(&mut self, namespace: &Arc<str>) {
        let none = Labels::default();
        let labels = self.namespace_labels(namespace);
        let identities = self.classes.identities_in(namespace);
        let mut made = Vec::new();
        for (id, set) in self.sets.iter_mut().filter(|(_, set)| set.by_namespace) {
            let answers = set.namespace_answers(namespace, &labels);
            for identity in &identities {
                let Some(peer) = view(&self.classes, &self.cells, *identity, &none) else { continue };
                let counter = &mut self.row_counter;
                let live = &mut self.rows;
                let mut rows = NewRows { number: &mut || number_row(counter, live), made: &mut made };
                let target = set.target(&peer, &answers, &mut rows);
                let (old, new) = set.put(*identity, target);
                if old != new {
                    self.change.peers.insert((*id, *identity), (old, new));
                    let users = self.endpoints.iter().filter(|(_, e)| e.sets.contains(id));
                    self.change.stale.extend(users.map(|(slot, _)| Stale::Endpoint(*slot)));
                }
            }
        }
        self.change.fresh.extend(made.into_iter().map(|(row, entries)| Op::Row { row, entries }));
    }

    /// Makes a set and everything it says.
    pub(super) fn make_set(&mut self, key: SetKey, policies: &[Arc<Policy>]) -> SetId {
        let id = SetId(self.set_counter.next(|n| self.sets.contains_key(&SetId(n))));
        let mut set = Set::new(key, id, policies, &mut self.reasons);
        let none = Labels::default();
        let mut made = Vec::new();
        let mut peers = Vec::new();
        let counter = &mut self.row_counter;
        let live = &mut self.rows;
        let mut number = || number_row(counter, live);
        let mut rows = NewRows { number: &mut number, made: &mut made };
        // What holds for a pod that nothing in particular is said about, where most pods are, and for the rest of the world.
        for of in [Family::V4, Family::V6] {
            let nobody = set.namespace_answers("", &none);
            for (nature, net) in [(Nature::World, whole(of)), (Nature::Pod, self.cells.get(self.cells.home(of)).net)] {
                let peer = PeerView { nature, labels: &none, ports: &[], net };
                let target = set.target(&peer, &nobody, &mut rows);
                set.set_default(Identity::new(nature, of, 0).default_index(), target);
            }
        }
        // Where no peer selects anything of a namespace, only the cell matters; and where the cell says what the default says, nothing does.
        let mut plain: NumberMap<CellId, Target> = NumberMap::default();
        let mut plain_is_default = true;
        for (id, cell) in self.cells.iter().filter(|(_, cell)| cell.members > 0) {
            let peer = PeerView { nature: Nature::Pod, labels: &none, ports: &[], net: cell.net };
            let target = set.target(&peer, &[], &mut rows);
            let index = Identity::new(Nature::Pod, family(&cell.net), 0).default_index();
            plain_is_default &= target == set.default(index);
            plain.insert(id, target);
        }
        for (namespace, classes) in self.classes.namespaces() {
            let labels = self.namespaces.get(namespace).cloned().unwrap_or_else(|| with_name(namespace, &none));
            let answers = set.namespace_answers(namespace, &labels);
            let quiet = !set.by_port_name && !answers.contains(&true);
            if quiet && plain_is_default {
                continue;
            }
            for (identity, cell) in classes.iter().filter_map(|c| self.classes.get(*c)).flat_map(|c| &c.identities) {
                let target = match plain.get(cell) {
                    Some(target) if quiet => *target,
                    _ => {
                        let Some(peer) = view(&self.classes, &self.cells, *identity, &none) else { continue };
                        set.target(&peer, &answers, &mut rows)
                    }
                };
                if set.put(*identity, target).1 != Target::NONE {
                    peers.push(Op::Peer { set: id, identity: *identity, targets: [target; 2] });
                }
            }
        }
        let nodes = self.node.iter().filter_map(|address| self.claims.get(address)).map(|claim| claim.identity);
        for identity in self.cells.iter().map(|(_, cell)| cell.world).chain(nodes) {
            let Some(peer) = view(&self.classes, &self.cells, identity, &none) else { continue };
            let target = set.target(&peer, &[], &mut rows);
            if set.put(identity, target).1 != Target::NONE {
                peers.push(Op::Peer { set: id, identity, targets: [target; 2] });
            }
        }
        self.change.fresh.extend(made.into_iter().map(|(row, entries)| Op::Row { row, entries }));
        self.change.fresh.extend(peers);
        self.set_keys.insert(set.key.clone(), id);
        self.sets.insert(id, set);
        id
    }

    /// Removes a set that no endpoint uses.
    pub(super) fn drop_set(&mut self, id: SetId) {
        let Some(set) = self.sets.remove(&id) else { return };
        self.set_keys.remove(&set.key);
        for identity in set.entries().keys() {
            self.later.settled(Item::Peer(id, *identity));
            self.change.garbage.push(Op::DropPeer { set: id, identity: *identity });
        }
        // Entries that this event removed have not been written yet, and need not be.
        let gone: Vec<_> =
            self.change.peers.range((id, Identity(0))..=(id, Identity(u32::MAX))).map(|(k, v)| (*k, *v)).collect();
        for (key, (old, _)) in gone {
            self.change.peers.remove(&key);
            if old != Target::NONE && !set.entries().contains_key(&key.1) {
                self.change.garbage.push(Op::DropPeer { set: id, identity: key.1 });
            }
        }
        for (row, entries) in set.tables() {
            self.rows.remove(row);
            self.change.garbage.push(Op::DropRow { row: *row, entries: entries.clone() });
        }
        self.later.reasons.extend_from_slice(set.reasons());
    }

    /// Brings a block into use that is not.
    pub(super) fn insert_block(&mut self, net: IpNet) {
        let parent = self.cells.longest(net, true);
        let outer = self.cells.cell_of_block(parent);
        let moving = self.members(net, outer);
        // The larger part keeps the cell, so that fewer addresses are written anew.
        let majority = moving.len() * 2 > self.cells.get(outer).members;
        let around = if majority { parent } else { net };
        let fresh = self.cells.fresh(around);
        let movers = if majority {
            let all = self.members(parent, outer);
            self.cells.insert(net, outer);
            self.cells.set_cell(parent, fresh);
            all.into_iter().filter(|address| !inside(*address, net)).collect()
        } else {
            self.cells.insert(net, fresh);
            moving
        };
        let (world, _) = self.classes.identity(Nature::World, None, fresh, &around);
        self.cells.get_mut(fresh).world = world;
        self.announce(world);
        if majority {
            self.write_block(net, self.cells.get(outer).world);
        }
        self.write_block(around, world);
        for address in movers {
            self.resolve(address, true);
        }
    }

    /// Takes a block out of use that no policy names, if none has come to name it again.
    pub(super) fn remove_block(&mut self, net: IpNet) {
        if !self.cells.unused(net) {
            return;
        }
        let parent = self.cells.longest(net, true);
        let (inner, outer) = (self.cells.cell_of_block(net), self.cells.cell_of_block(parent));
        let majority = self.cells.get(inner).members > self.cells.get(outer).members;
        let (gone, movers) =
            if majority { (outer, self.members(parent, outer)) } else { (inner, self.members(net, inner)) };
        self.cells.remove(net);
        if majority {
            self.cells.set_cell(parent, inner);
            self.write_block(parent, self.cells.get(inner).world);
        }
        self.change.neutral.push(Op::DropBlock(net));
        for address in movers {
            self.resolve(address, true);
        }
        let world = self.cells.get(gone).world;
        self.abandon(world);
        self.cells.drop_cell(gone);
    }

    fn write_block(&mut self, net: IpNet, identity: Identity) {
        self.change.neutral.push(Op::Block { net, identities: [identity; 2] });
    }

    /// Addresses of a block that have an identity in a cell.
    fn members(&self, net: IpNet, cell: CellId) -> Vec<IpAddr> {
        let range = self.claims.range(net.network()..=net.broadcast());
        let here = |id: Identity| self.classes.meaning(id).is_some_and(|meaning| meaning.cell == cell);
        range.filter(|(_, claim)| here(claim.identity)).map(|(address, _)| *address).collect()
    }

    /// Label keys and port names that come into use.
    pub(super) fn look_at(&mut self, policy: &Policy) {
        let moved = self.classes.look_at(policy.keys(), policy.port_names());
        if moved.is_empty() {
            return;
        }
        let addresses: Vec<IpAddr> = self
            .claims
            .keys()
            .copied()
            .filter(|address| self.holder(*address).is_some_and(|profile| moved.contains(&profile)))
            .collect();
        for address in addresses {
            self.resolve(address, true);
        }
    }

    /// The identity by which others see an address of a local endpoint.
    pub(super) fn seen(&self, address: IpAddr) -> Identity {
        match self.claims.get(&address) {
            Some(claim) if claim.identity != Identity::NONE => claim.identity,
            _ => self.cells.get(self.cells.of(address)).world,
        }
    }

    /// Identities of local endpoints that changed without changing a decision.
    pub(super) fn refresh_identities(&mut self) {
        let slots: Vec<u32> = self.endpoints.keys().copied().collect();
        for slot in slots {
            let Some(endpoint) = self.endpoints.get(&slot) else { continue };
            let mut value = endpoint.value;
            for address in endpoint.addresses.iter() {
                value.identities[Family::of(address) as usize] = self.seen(address);
            }
            if value == endpoint.value {
                continue;
            }
            if let Some(endpoint) = self.endpoints.get_mut(&slot) {
                endpoint.value = value;
            }
            self.later.settled(Item::Endpoint(slot));
            for phase in [0, 1] {
                self.change.neutral.push(Op::Endpoint { slot, phase, value });
            }
        }
    }

    /// The block and identity of every part of the address space.
    pub(super) fn blocks(&self) -> impl Iterator<Item = (IpNet, Identity)> {
        self.cells.blocks()
    }
}

pub(super) fn number_row(counter: &mut super::number::Counter, live: &mut NumberSet<RowId>) -> RowId {
    let row = RowId(counter.next(|n| live.contains(&RowId(n))));
    live.insert(row);
    row
}
