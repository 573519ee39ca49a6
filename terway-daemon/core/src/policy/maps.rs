//! The maps as the datapath reads them: the very lookups, in their order. `policy explain` and the tests ask here.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::number::{Decision, Identity, Nature, ReasonId, RowId, SetId, Target};
use super::op::{EndpointPolicy, Op, Pair, Side, Sides};
use super::reason::{DISABLED, LOOPBACK, RESIDENT_NODE, UNDECIDED, decided};
use super::row::RowEntry;
use super::rule::host;
use crate::cidr::Cidr as _;
use crate::ident::Family;

/// The contents of the policy maps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Maps {
    /// Identity by address.
    pub addresses: HashMap<IpAddr, Pair<Identity>>,
    /// Identity by block, the longest counts.
    pub blocks: HashMap<IpNetwork, Pair<Identity>>,
    /// What sets say about identities.
    pub peers: HashMap<(SetId, Identity), Pair<Target>>,
    /// Port tables: by table, the prefixes.
    pub rows: HashMap<RowId, BTreeSet<RowEntry>>,
    /// Local endpoints by slot.
    pub endpoints: HashMap<u32, Pair<EndpointPolicy>>,
    /// The phase that counts.
    pub phase: usize,
    /// Whether policies are enforced.
    pub enforce: bool,
}

/// The first packet of a flow, after translation of Services, with the client's true address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Packet {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// Destination port; 0 where the protocol has none.
    pub port: u16,
}

impl Maps {
    /// Does what the daemon does with an operation.
    pub fn apply(&mut self, op: &Op) {
        match op {
            Op::Row { row, entries } => {
                self.rows.insert(*row, entries.iter().copied().collect());
            }
            Op::DropRow { row, .. } => {
                self.rows.remove(row);
            }
            Op::Peer { set, identity, targets } => {
                self.peers.insert((*set, *identity), *targets);
            }
            Op::DropPeer { set, identity } => {
                self.peers.remove(&(*set, *identity));
            }
            Op::Address { address, identities } => {
                self.addresses.insert(*address, *identities);
            }
            Op::DropAddress(address) => {
                self.addresses.remove(address);
            }
            Op::Block { net, identities } => {
                self.blocks.insert(*net, *identities);
            }
            Op::DropBlock(net) => {
                self.blocks.remove(net);
            }
            Op::Endpoint { slot, phase, value } => {
                self.endpoints.entry(*slot).or_default()[phase & 1] = **value;
            }
            Op::Gate { phase, enforce } => {
                self.phase = phase & 1;
                self.enforce = *enforce;
            }
            Op::Stale(_) | Op::Fence => {}
        }
    }

    /// The identity of an address that is no local endpoint's: one exact lookup, then one for the longest block.
    #[must_use]
    pub fn identity(&self, address: IpAddr, phase: usize) -> Identity {
        match self.addresses.get(&address) {
            Some(pair) if pair[phase] != Identity::NONE => pair[phase],
            _ => {
                let net = host(address);
                let lengths = (0..=net.prefix()).rev();
                lengths
                    .filter_map(|length| IpNetwork::new(address, length).ok())
                    .find_map(|net| self.blocks.get(&net.truncated()).map(|pair| pair[phase]))
                    .unwrap_or_default()
            }
        }
    }

    /// One direction of one endpoint: for each of its sets at most one lookup by identity and one by port.
    #[must_use]
    pub fn decide(&self, sides: &Sides, peer: Identity, protocol: u8, port: u16, phase: usize) -> Decision {
        let decisions = sides.iter().map(|side| self.ask(side, peer, protocol, port, phase));
        decided(decisions).unwrap_or(UNDECIDED)
    }

    fn ask(&self, side: &Side, peer: Identity, protocol: u8, port: u16, phase: usize) -> Decision {
        if side.set == SetId(0) {
            return UNDECIDED;
        }
        let target = match self.peers.get(&(side.set, peer)) {
            Some(pair) if pair[phase] != Target::NONE => pair[phase],
            _ => side.defaults[peer.default_index()],
        };
        match target.resolve() {
            Ok(decision) => decision,
            Err(row) => self.port(row, protocol, port),
        }
    }

    /// The longest prefix of a port table. What is not there is denied: a table is written before anything leads to it.
    fn port(&self, row: RowId, protocol: u8, port: u16) -> Decision {
        let entries = self.rows.get(&row).into_iter().flatten();
        let longest = entries.filter(|entry| entry.covers(protocol, port)).max_by_key(|entry| entry.prefix_len());
        longest.map_or(Decision::deny(ReasonId(0)), |entry| entry.decision)
    }

    /// Both directions of a packet, as far as this node decides them: egress, if the source is a local endpoint, and ingress, if the
    /// destination is. `local` finds the slot of a local endpoint by address, as the endpoint map does.
    ///
    /// `phase` is read once, and before it the epochs that go into the flow entry.
    #[must_use]
    pub fn verdict(
        &self,
        packet: &Packet,
        local: &dyn Fn(IpAddr) -> Option<u32>,
        phase: usize,
    ) -> [Option<Decision>; 2] {
        let (source, destination) = (local(packet.source), local(packet.destination));
        let here = |slot: u32| self.endpoints.get(&slot).map(|pair| pair[phase]).unwrap_or_default();
        let seen = |address: IpAddr, slot: Option<u32>| match slot {
            Some(slot) => here(slot).identities[Family::of(address) as usize],
            None => self.identity(address, phase),
        };
        if !self.enforce {
            let passes = |slot: Option<u32>| slot.map(|_| Decision::allow(DISABLED));
            return [passes(source), passes(destination)];
        }
        if source.is_some() && source == destination {
            return [Some(Decision::allow(LOOPBACK)); 2];
        }
        let egress = source.map(|slot| {
            let peer = seen(packet.destination, destination);
            self.decide(&here(slot).egress, peer, packet.protocol, packet.port, phase)
        });
        let ingress = destination.map(|slot| match seen(packet.source, source) {
            peer if peer.nature() == Nature::Node => Decision::allow(RESIDENT_NODE),
            peer => self.decide(&here(slot).ingress, peer, packet.protocol, packet.port, phase),
        });
        [egress, ingress]
    }

    /// Whether a packet passes both directions that this node decides.
    #[must_use]
    pub fn passes(&self, packet: &Packet, local: &dyn Fn(IpAddr) -> Option<u32>) -> bool {
        self.verdict(packet, local, self.phase).into_iter().flatten().all(Decision::allowed)
    }
}
