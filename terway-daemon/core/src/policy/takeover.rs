//! A new daemon takes over maps that another has filled: the same promise holds as for an event, no packet meets anything but the old
//! state or the new one.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::compiler::{Compiler, Event};
use super::maps::Maps;
use super::number::Identity;
use super::op::{EndpointPolicy, Op, Stale};
use crate::cidr::Cidr as _;

impl Compiler {
    /// What the maps are to hold, both phases alike.
    #[must_use]
    pub fn maps(&self) -> Maps {
        Maps {
            addresses: self
                .claims
                .iter()
                .filter(|(_, claim)| claim.identity != Identity::NONE)
                .map(|(address, claim)| (*address, [claim.identity; 2]))
                .collect(),
            blocks: self.blocks().map(|(net, identity)| (net, [identity; 2])).collect(),
            peers: self
                .sets
                .iter()
                .flat_map(|(id, set)| set.entries().iter().map(|(peer, target)| ((*id, *peer), [*target; 2])))
                .collect(),
            rows: self
                .sets
                .values()
                .flat_map(|set| set.tables().iter().map(|(row, entries)| (*row, entries.iter().copied().collect())))
                .collect(),
            endpoints: self.endpoints.iter().map(|(slot, endpoint)| (*slot, [endpoint.value; 2])).collect(),
            phase: self.phase,
            enforce: self.enforce,
        }
    }

    /// What the maps are to hold of a local endpoint; none if no interface has this slot.
    #[must_use]
    pub fn endpoint(&self, slot: u32) -> Option<EndpointPolicy> {
        self.endpoints.get(&slot).map(|endpoint| endpoint.value)
    }

    /// A compiler that has taken in `events` and comes after one that left `found` in the maps, with the operations between the two. None of its
    /// numbers is one of the old ones. [`Compiler::settle`] is not needed for what they leave: they clean up themselves.
    #[must_use]
    pub fn take_over(found: &Maps, events: impl IntoIterator<Item = Event>) -> (Self, Vec<Op>) {
        let (mut compiler, _) = Self::after(found);
        compiler.enforce = true;
        compiler.steps(events);
        compiler.settle();
        compiler.settle();
        let wanted = compiler.maps();
        let (old, new) = (found.phase & 1, 1 - (found.phase & 1));
        compiler.phase = new;
        let pair = |now, next| if old == 0 { [now, next] } else { [next, now] };
        let mut ops = vec![Op::Fence];
        for (row, entries) in &wanted.rows {
            ops.push(Op::Row { row: *row, entries: entries.iter().copied().collect() });
        }
        for ((set, identity), targets) in &wanted.peers {
            ops.push(Op::Peer { set: *set, identity: *identity, targets: *targets });
        }
        let mut after = vec![Op::Fence];
        let nets: BTreeSet<IpNetwork> = found.blocks.keys().chain(wanted.blocks.keys()).copied().collect();
        // The shorter first: a block that is not written yet is answered for by the one around it.
        let mut nets: Vec<IpNetwork> = nets.into_iter().collect();
        nets.sort_by_key(IpNetwork::prefix);
        for net in nets {
            let (now, next) = (longest(found, net, old), longest(&wanted, net, new));
            ops.push(Op::Block { net, identities: pair(now, next) });
            after.push(match wanted.blocks.get(&net) {
                Some(identities) => Op::Block { net, identities: *identities },
                None => Op::DropBlock(net),
            });
        }
        let addresses: BTreeSet<IpAddr> = found.addresses.keys().chain(wanted.addresses.keys()).copied().collect();
        for address in addresses {
            let now = found.addresses.get(&address).map_or(Identity::NONE, |pair| pair[old]);
            let next = wanted.addresses.get(&address).map_or(Identity::NONE, |pair| pair[new]);
            ops.push(Op::Address { address, identities: pair(now, next) });
            after.push(if next == Identity::NONE {
                Op::DropAddress(address)
            } else {
                Op::Address { address, identities: [next; 2] }
            });
        }
        for (slot, values) in &wanted.endpoints {
            ops.push(Op::Endpoint { slot: *slot, phase: new, value: Box::new(values[new]) });
            after.push(Op::Endpoint { slot: *slot, phase: old, value: Box::new(values[new]) });
        }
        ops.push(Op::Gate { phase: new, enforce: wanted.enforce });
        ops.push(Op::Stale(Stale::All));
        for (set, identity) in found.peers.keys() {
            after.push(Op::DropPeer { set: *set, identity: *identity });
        }
        for (row, entries) in &found.rows {
            after.push(Op::DropRow { row: *row, entries: entries.iter().copied().collect() });
        }
        ops.append(&mut after);
        (compiler, ops)
    }
}

/// The identity of the addresses of a block that have none of their own.
fn longest(maps: &Maps, net: IpNetwork, phase: usize) -> Identity {
    let lengths = (0..=net.prefix()).rev().filter_map(|length| IpNetwork::new(net.ip(), length).ok());
    lengths.map(|net| net.truncated()).find_map(|net| maps.blocks.get(&net)).map_or(Identity::NONE, |pair| pair[phase])
}
