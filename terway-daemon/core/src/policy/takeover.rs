//! A new daemon takes over maps that another has filled: the same promise holds as for an event, no packet meets anything but the old
//! state or the new one.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::compiler::{Compiler, Event};
use super::ids::Identity;
use super::maps::Maps;
use super::op::{EndpointPolicy, FlowScope, Op};
use crate::cidr::Cidr as _;

impl Compiler {
    /// What the maps are to hold, both versions alike.
    #[must_use]
    pub fn maps(&self) -> Maps {
        Maps {
            addresses: self
                .claims
                .iter()
                .filter(|(_, claim)| claim.identity != Identity::NONE)
                .map(|(address, claim)| (*address, [claim.identity; 2]))
                .collect(),
            cidrs: self.blocks().map(|(net, identity)| (net, [identity; 2])).collect(),
            peers: self
                .sets
                .iter()
                .flat_map(|(id, set)| set.entries().iter().map(|(peer, target)| ((*id, *peer), [*target; 2])))
                .collect(),
            port_tables: self
                .sets
                .values()
                .flat_map(|set| set.tables().iter().map(|(table, entries)| (*table, entries.iter().copied().collect())))
                .collect(),
            endpoints: self.endpoints.iter().map(|(slot, endpoint)| (*slot, [endpoint.value; 2])).collect(),
            version: self.version,
            enforce: self.enforce,
        }
    }

    /// What the maps are to hold of a local endpoint; none if no interface has this slot.
    #[must_use]
    pub fn endpoint(&self, slot: u32) -> Option<EndpointPolicy> {
        self.endpoints.get(&slot).map(|endpoint| endpoint.value)
    }

    /// A compiler that has taken in `events` and comes after one that left `found` in the maps, with the operations between the two. None of its
    /// numbers is one of the old ones. [`Compiler::run_deferred`] is not needed for what they leave: they clean up themselves.
    #[must_use]
    pub fn take_over(found: &Maps, events: impl IntoIterator<Item = Event>) -> (Self, Vec<Op>) {
        let (mut compiler, _) = Self::after(found);
        compiler.enforce = true;
        compiler.steps(events);
        compiler.run_deferred();
        compiler.run_deferred();
        let wanted = compiler.maps();
        let (old, new) = (found.version & 1, 1 - (found.version & 1));
        compiler.version = new;
        let pair = |now, next| if old == 0 { [now, next] } else { [next, now] };
        let mut ops = vec![Op::RcuBarrier];
        for (table, entries) in &wanted.port_tables {
            ops.push(Op::PutPortTable { table: *table, entries: entries.iter().copied().collect() });
        }
        for ((set, identity), verdicts) in &wanted.peers {
            ops.push(Op::PutPeer { set: *set, identity: *identity, verdicts: *verdicts });
        }
        let mut after = vec![Op::RcuBarrier];
        let nets: BTreeSet<IpNetwork> = found.cidrs.keys().chain(wanted.cidrs.keys()).copied().collect();
        // The shorter first: a block that is not written yet is answered for by the one around it.
        let mut nets: Vec<IpNetwork> = nets.into_iter().collect();
        nets.sort_by_key(IpNetwork::prefix);
        for net in nets {
            let (now, next) = (longest(found, net, old), longest(&wanted, net, new));
            ops.push(Op::PutCidr { net, identities: pair(now, next) });
            after.push(match wanted.cidrs.get(&net) {
                Some(identities) => Op::PutCidr { net, identities: *identities },
                None => Op::RemoveCidr(net),
            });
        }
        let addresses: BTreeSet<IpAddr> = found.addresses.keys().chain(wanted.addresses.keys()).copied().collect();
        for address in addresses {
            let now = found.addresses.get(&address).map_or(Identity::NONE, |pair| pair[old]);
            let next = wanted.addresses.get(&address).map_or(Identity::NONE, |pair| pair[new]);
            ops.push(Op::PutAddress { address, identities: pair(now, next) });
            after.push(if next == Identity::NONE {
                Op::RemoveAddress(address)
            } else {
                Op::PutAddress { address, identities: [next; 2] }
            });
        }
        for (slot, values) in &wanted.endpoints {
            ops.push(Op::PutEndpoint { slot: *slot, version: new, value: Box::new(values[new]) });
            after.push(Op::PutEndpoint { slot: *slot, version: old, value: Box::new(values[new]) });
        }
        ops.push(Op::SetControlWord { version: new, enforce: wanted.enforce });
        ops.push(Op::Revalidate(FlowScope::All));
        for (set, identity) in found.peers.keys() {
            after.push(Op::RemovePeer { set: *set, identity: *identity });
        }
        for (table, entries) in &found.port_tables {
            after.push(Op::RemovePortTable { table: *table, entries: entries.iter().copied().collect() });
        }
        ops.append(&mut after);
        (compiler, ops)
    }
}

/// The identity of the addresses of a block that have none of their own.
fn longest(maps: &Maps, net: IpNetwork, version: usize) -> Identity {
    let lengths = (0..=net.prefix()).rev().filter_map(|length| IpNetwork::new(net.ip(), length).ok());
    lengths.map(|net| net.truncated()).find_map(|net| maps.cidrs.get(&net)).map_or(Identity::NONE, |pair| pair[version])
}
