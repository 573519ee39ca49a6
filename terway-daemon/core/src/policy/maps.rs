//! The policy maps as the datapath reads them: the same lookups in the same order. For take-over and tests.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::ids::{Identity, IdentityKind, PortTableId, RuleId, SetId, Verdict, VerdictOrTable};
use super::matched_rule::{DISABLED, LOCAL_NODE, LOOPBACK, UNDECIDED, decided};
use super::op::{DirectionPolicy, EndpointPolicy, Op, SetRef, Versioned};
use super::peer_match::host;
use super::port_table::PortTableEntry;
use crate::cidr::Cidr as _;
use crate::ident::Family;

/// The contents of the policy maps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Maps {
    /// Identity by address.
    pub addresses: HashMap<IpAddr, Versioned<Identity>>,
    /// Identity by block, the longest counts.
    pub cidrs: HashMap<IpNetwork, Versioned<Identity>>,
    /// Sets' entries for peer identities.
    pub peers: HashMap<(SetId, Identity), Versioned<VerdictOrTable>>,
    /// Port tables: by table, the prefixes.
    pub port_tables: HashMap<PortTableId, BTreeSet<PortTableEntry>>,
    /// Local endpoints by slot.
    pub endpoints: HashMap<u32, Versioned<EndpointPolicy>>,
    /// The version that counts.
    pub version: usize,
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
    /// Applies an operation.
    pub fn apply(&mut self, op: &Op) {
        match op {
            Op::PutPortTable { table, entries } => {
                self.port_tables.insert(*table, entries.iter().copied().collect());
            }
            Op::RemovePortTable { table, .. } => {
                self.port_tables.remove(table);
            }
            Op::PutPeer { set, identity, verdicts } => {
                self.peers.insert((*set, *identity), *verdicts);
            }
            Op::RemovePeer { set, identity } => {
                self.peers.remove(&(*set, *identity));
            }
            Op::PutAddress { address, identities } => {
                self.addresses.insert(*address, *identities);
            }
            Op::RemoveAddress(address) => {
                self.addresses.remove(address);
            }
            Op::PutCidr { net, identities } => {
                self.cidrs.insert(*net, *identities);
            }
            Op::RemoveCidr(net) => {
                self.cidrs.remove(net);
            }
            Op::PutEndpoint { slot, version, value } => {
                self.endpoints.entry(*slot).or_default()[version & 1] = **value;
            }
            Op::SetControlWord { version, enforce } => {
                self.version = version & 1;
                self.enforce = *enforce;
            }
            Op::Revalidate(_) | Op::RcuBarrier => {}
        }
    }

    /// The identity of an address that is no local endpoint's: one exact lookup, then one for the longest block.
    #[must_use]
    pub fn identity(&self, address: IpAddr, version: usize) -> Identity {
        match self.addresses.get(&address) {
            Some(pair) if pair[version] != Identity::NONE => pair[version],
            _ => {
                let net = host(address);
                let lengths = (0..=net.prefix()).rev();
                lengths
                    .filter_map(|length| IpNetwork::new(address, length).ok())
                    .find_map(|net| self.cidrs.get(&net.truncated()).map(|pair| pair[version]))
                    .unwrap_or_default()
            }
        }
    }

    /// One direction of one endpoint: for each of its sets at most one lookup by identity and one by port.
    #[must_use]
    pub fn decide(&self, sides: &DirectionPolicy, peer: Identity, protocol: u8, port: u16, version: usize) -> Verdict {
        let verdicts = sides.iter().map(|side| self.ask(side, peer, protocol, port, version));
        decided(verdicts).unwrap_or(UNDECIDED)
    }

    fn ask(&self, side: &SetRef, peer: Identity, protocol: u8, port: u16, version: usize) -> Verdict {
        if side.set == SetId(0) {
            return UNDECIDED;
        }
        let target = match self.peers.get(&(side.set, peer)) {
            Some(pair) if pair[version] != VerdictOrTable::NONE => pair[version],
            _ => side.defaults[peer.default_index()],
        };
        match target.resolve() {
            Ok(verdict) => verdict,
            Err(table) => self.port(table, protocol, port),
        }
    }

    /// The longest prefix of a port table. What is not there is denied: a table is written before anything leads to it.
    fn port(&self, table: PortTableId, protocol: u8, port: u16) -> Verdict {
        let entries = self.port_tables.get(&table).into_iter().flatten();
        let longest = entries.filter(|entry| entry.covers(protocol, port)).max_by_key(|entry| entry.prefix_len());
        longest.map_or(Verdict::deny(RuleId(0)), |entry| entry.verdict)
    }

    /// Both directions of a packet, as far as this node decides them: egress, if the source is a local endpoint, and ingress, if the
    /// destination is. `local` finds the slot of a local endpoint by address, as the endpoint map does.
    ///
    /// `version` is read once, and before it the epochs that go into the flow entry.
    #[must_use]
    pub fn verdict(
        &self,
        packet: &Packet,
        local: &dyn Fn(IpAddr) -> Option<u32>,
        version: usize,
    ) -> [Option<Verdict>; 2] {
        let (source, destination) = (local(packet.source), local(packet.destination));
        let here = |slot: u32| self.endpoints.get(&slot).map(|pair| pair[version]).unwrap_or_default();
        let seen = |address: IpAddr, slot: Option<u32>| match slot {
            Some(slot) => here(slot).identities[Family::of(address) as usize],
            None => self.identity(address, version),
        };
        if !self.enforce {
            let passes = |slot: Option<u32>| slot.map(|_| Verdict::allow(DISABLED));
            return [passes(source), passes(destination)];
        }
        if source.is_some() && source == destination {
            return [Some(Verdict::allow(LOOPBACK)); 2];
        }
        let egress = source.map(|slot| {
            let peer = seen(packet.destination, destination);
            self.decide(&here(slot).egress, peer, packet.protocol, packet.port, version)
        });
        let ingress = destination.map(|slot| match seen(packet.source, source) {
            peer if peer.kind() == IdentityKind::LocalNode => Verdict::allow(LOCAL_NODE),
            peer => self.decide(&here(slot).ingress, peer, packet.protocol, packet.port, version),
        });
        [egress, ingress]
    }

    /// Whether a packet passes both directions that this node decides.
    #[must_use]
    pub fn passes(&self, packet: &Packet, local: &dyn Fn(IpAddr) -> Option<u32>) -> bool {
        self.verdict(packet, local, self.version).into_iter().flatten().all(Verdict::is_allowed)
    }
}
