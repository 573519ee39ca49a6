//! Which identity an address has, and how blocks and label keys that come into use split identities without changing any verdict.

use std::net::IpAddr;
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;

use ipnetwork::IpNetwork;

use super::change::Item;
use super::compiler::Compiler;
use super::ids::{ClassId, Identity, IdentityKind, ProfileId, RegionId};
use super::namespace_labels::labels_of;
use super::op::Op;
use super::rule::Policy;
use super::state::Claim;
use crate::ident::Family;
use crate::objects::Labels;

impl Compiler {
    pub(super) fn namespace_labels(&self, namespace: &Arc<str>) -> Labels {
        labels_of(&self.namespaces, namespace)
    }

    /// Settles what identity an address has. `neutral`: it is known that no verdict changes by it.
    pub(super) fn resolve(&mut self, address: IpAddr, neutral: bool) {
        let old = self.claims.get(&address).map_or(Identity::NONE, |claim| claim.identity);
        let who = if self.node.contains(&address) {
            Some((IdentityKind::LocalNode, None))
        } else {
            self.holder(address)
                .and_then(|pod| self.classes.class_of(pod))
                .map(|class| (IdentityKind::Pod, Some(class)))
        };
        let new = who.map_or(Identity::NONE, |(kind, class)| {
            let cell = self.cells.of(address);
            self.acquire(kind, class, cell)
        });
        if new == old {
            if new != Identity::NONE {
                self.abandon(new);
            }
        } else {
            if neutral {
                self.change.neutral.push(Op::PutAddress { address, identities: [new; 2] });
                self.deferred.settled(Item::Address(address));
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
    pub(super) fn acquire(&mut self, kind: IdentityKind, class: Option<ClassId>, cell: RegionId) -> Identity {
        let net = self.cells.get(cell).net;
        let (identity, new) = self.classes.identity(kind, class, cell, &net);
        if kind != IdentityKind::World {
            self.cells.get_mut(cell).members += 1;
        }
        if new {
            if kind == IdentityKind::Pod {
                self.cells.settle_in(cell, identity);
            }
            self.announce(identity);
        }
        identity
    }

    /// One address less has the identity.
    fn abandon(&mut self, identity: Identity) {
        let Some(meaning) = self.classes.meaning(identity) else { return };
        let cell = meaning.cell;
        let class = meaning.class.and_then(|class| self.classes.get(class));
        let namespace = class.map(|class| Arc::clone(&class.like.namespace));
        if identity.kind() != IdentityKind::World {
            self.cells.get_mut(cell).members -= 1;
        }
        if self.classes.forget(identity) {
            if let Some(namespace) = namespace {
                self.peers.forget(identity, &namespace);
                self.cells.move_out(cell, identity);
            }
            for (id, set) in &mut self.sets {
                if set.forget(identity) {
                    self.change.garbage.push(Op::RemovePeer { set: *id, identity });
                }
            }
        }
    }

    /// Brings a block into use that is not.
    pub(super) fn insert_block(&mut self, net: IpNetwork) {
        let parent = self.cells.longest(net, true);
        let outer = self.cells.cell_of_block(parent);
        // The larger part keeps the cell, so that fewer addresses are written anew.
        let (movers, majority) = self.smaller_part(net, parent, outer);
        let around = if majority { parent } else { net };
        let fresh = self.cells.fresh(around);
        if majority {
            self.cells.insert(net, outer);
            self.cells.set_cell(parent, fresh);
        } else {
            self.cells.insert(net, fresh);
        }
        let (world, _) = self.classes.identity(IdentityKind::World, None, fresh, &around);
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
    pub(super) fn remove_block(&mut self, net: IpNetwork) {
        if !self.cells.unused(net) {
            return;
        }
        let parent = self.cells.longest(net, true);
        let (inner, outer) = (self.cells.cell_of_block(net), self.cells.cell_of_block(parent));
        let majority = self.cells.get(inner).members > self.cells.get(outer).members;
        let (gone, movers): (_, Vec<IpAddr>) = if majority {
            (outer, self.outside(net, parent).filter(|(_, cell)| *cell == outer).map(|(address, _)| address).collect())
        } else {
            (inner, self.inside(net).filter(|(_, cell)| *cell == inner).map(|(address, _)| address).collect())
        };
        self.cells.remove(net);
        if majority {
            self.cells.set_cell(parent, inner);
            self.write_block(parent, self.cells.get(inner).world);
        }
        self.change.neutral.push(Op::RemoveCidr(net));
        for address in movers {
            self.resolve(address, true);
        }
        let world = self.cells.get(gone).world;
        self.abandon(world);
        self.cells.drop_cell(gone);
    }

    fn write_block(&mut self, net: IpNetwork, identity: Identity) {
        self.change.neutral.push(Op::PutCidr { net, identities: [identity; 2] });
    }

    /// Addresses that have an identity of their own, with their cells.
    fn identified(&self, range: impl RangeBounds<IpAddr>) -> impl Iterator<Item = (IpAddr, RegionId)> {
        let cell = |claim: &Claim| self.classes.meaning(claim.identity).map(|meaning| meaning.cell);
        self.claims.range(range).filter_map(move |(address, claim)| Some((*address, cell(claim)?)))
    }

    fn inside(&self, net: IpNetwork) -> impl Iterator<Item = (IpAddr, RegionId)> {
        self.identified(net.network()..=net.broadcast())
    }

    /// Those of a block that are not in one of its parts.
    fn outside(&self, part: IpNetwork, block: IpNetwork) -> impl Iterator<Item = (IpAddr, RegionId)> {
        let after = (Bound::Excluded(part.broadcast()), Bound::Included(block.broadcast()));
        // Without this, a part that ends where the block does would be a range that ends before it begins.
        let after = (part.broadcast() < block.broadcast()).then(|| self.identified(after));
        self.identified(block.network()..part.network()).chain(after.into_iter().flatten())
    }

    /// Of the addresses of a cell, those inside `net` or those outside, whichever are fewer, and whether these are those outside. Walks both at
    /// once and stops with the shorter one: a block around all pods of the cluster costs as little as one around none.
    fn smaller_part(&self, net: IpNetwork, parent: IpNetwork, cell: RegionId) -> (Vec<IpAddr>, bool) {
        let (mut inner, mut outer) = (self.inside(net), self.outside(net, parent));
        let (mut moving, mut staying) = (Vec::new(), Vec::new());
        loop {
            match inner.next() {
                Some((address, of)) => moving.extend((of == cell).then_some(address)),
                None => return (moving, false),
            }
            match outer.next() {
                Some((address, of)) => staying.extend((of == cell).then_some(address)),
                None => return (staying, true),
            }
        }
    }

    /// Label keys and port names that come into use.
    pub(super) fn look_at(&mut self, policy: &Policy) {
        let moved = self.classes.look_at(policy.keys(&self.peers), policy.port_names());
        if moved.is_empty() {
            return;
        }
        let pods = moved.iter().flat_map(|profile| self.classes.pods_of(*profile));
        let states = pods.filter_map(|pod| self.pods.get(&pod));
        let addresses: Vec<IpAddr> = states.flat_map(|state| state.claims()).copied().collect();
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

    /// Identities of local endpoints that changed without changing a verdict.
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
            self.deferred.settled(Item::Endpoint(slot));
            for version in [0, 1] {
                self.change.neutral.push(Op::PutEndpoint { slot, version, value: Box::new(value) });
            }
        }
    }

    /// The block and identity of every part of the address space.
    pub(super) fn blocks(&self) -> impl Iterator<Item = (IpNetwork, Identity)> {
        self.cells.blocks()
    }
}
