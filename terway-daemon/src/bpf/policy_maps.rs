//! Handle of the policy maps: the operations of the compiler (`terway_core::policy`) are run in its order.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use aya::Ebpf;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, MapData, MapError};
use ipnetwork::IpNetwork;
use parking_lot::Mutex;
use terway_abi::{
    CONTROL_ENFORCE, CONTROL_SAMPLE_SHIFT, CONTROL_VERSION, MAX_ENDPOINTS, PeerKey, PolicyDirection, PolicyEndpoint,
    PortKey, Versioned as AbiVersioned, names, policy_index,
};
use terway_core::policy::{
    EndpointPolicy, FlowScope, Identity, Maps, Op, PortTableEntry, PortTableId, RuleId, SetId, SetRef, Verdict,
    VerdictOrTable, Versioned,
};

use super::address::{address_v4, address_v6, word, words};
use super::endpoints::EndpointMaps;
use super::error::{BpfError, ignore_absent};
use super::object::take;
use super::rcu;
use super::report::{ApplyReport, RefusedOp};

/// The set of endpoints whose rules are incomplete: it has no entries, and its defaults deny. Compilers give ids from 1 up.
const INCOMPLETE: SetId = SetId(u32::MAX - 2);

/// Handle of the policy maps.
///
/// An operation that the kernel refuses does not stop the others. Where it leaves a set of rules incomplete, every endpoint that refers to
/// the set is *quarantined*: all its traffic of that direction is denied, in both versions, until the operation has succeeded. There is no
/// mirror of the maps: the compiler knows what they hold.
///
/// Its lock is held for one operation, and not while that of [`EndpointMaps`] is taken.
pub struct PolicyMaps {
    state: Mutex<State>,
    endpoints: Arc<EndpointMaps>,
}

impl fmt::Debug for PolicyMaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PolicyMaps").finish_non_exhaustive()
    }
}

impl PolicyMaps {
    pub(super) fn open(loaded: &mut Ebpf, endpoints: Arc<EndpointMaps>) -> Result<Self, BpfError> {
        Ok(Self { state: Mutex::new(State::new(MapSet::open(loaded)?)), endpoints })
    }

    /// Reads the maps: where a compiler starts from ([`terway_core::policy::Compiler::take_over`]). Quarantined endpoints are shown with
    /// a value that no compiler writes, so that it writes them.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn read(&self) -> Result<Maps, BpfError> {
        self.state.lock().maps.read()
    }

    /// Drops what this daemon believes, refused operations included, and reads the maps. To be called after a panic of a caller.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn recover(&self) -> Result<Maps, BpfError> {
        let mut state = self.state.lock();
        state.refused.clear();
        state.quarantined.clear();
        state.maps.read()
    }

    /// The identity that the maps give an address which is no local endpoint's, in the current version; 0 if there is none.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn identity(&self, address: IpAddr) -> Result<Identity, BpfError> {
        self.state.lock().maps.identity(address)
    }

    /// Runs operations in their order. Refused ones are kept for [`Self::retry`], until a later operation on the same object replaces
    /// them; endpoints that they concern are quarantined.
    ///
    /// A refused identity of an address or CIDR quarantines nobody: that address has the identity of the next larger CIDR.
    pub fn apply_all(&self, ops: &[Op]) -> ApplyReport<Op> {
        for op in ops {
            if matches!(op, Op::SetControlWord { .. }) {
                self.update_quarantine();
            }
            let outcome = self.run(op).map_err(Arc::new);
            self.state.lock().note(op, outcome);
        }
        self.update_quarantine();
        let refused = self.state.lock().refused.values().cloned().collect();
        ApplyReport { refused }
    }

    /// Runs the refused operations again. To be called with back-off.
    pub fn retry(&self) -> ApplyReport<Op> {
        let ops: Vec<Op> = self.state.lock().refused.values().map(|refused| refused.op.clone()).collect();
        self.apply_all(&ops)
    }

    /// Slots of endpoints whose traffic is denied because a set of their rules is incomplete.
    #[must_use]
    pub fn quarantined(&self) -> BTreeSet<u32> {
        self.state.lock().quarantined.keys().map(|(slot, _)| *slot).collect()
    }

    /// Runs one operation.
    ///
    /// # Errors
    /// When a map is full or the kernel refuses; running it again completes it.
    pub fn apply(&self, op: &Op) -> Result<(), BpfError> {
        self.run(op)
    }

    fn run(&self, op: &Op) -> Result<(), BpfError> {
        match op {
            Op::RcuBarrier => {
                rcu::synchronize();
                Ok(())
            }
            Op::Revalidate(FlowScope::Endpoint(slot)) => self.endpoints.revalidate_slot(*slot),
            Op::Revalidate(FlowScope::Address(address)) => self.endpoints.revalidate_address(*address),
            Op::Revalidate(FlowScope::All) => self.endpoints.revalidate_all(),
            op => self.state.lock().write(op),
        }
    }

    fn update_quarantine(&self) {
        let changed = self.state.lock().update_quarantine();
        let revalidate = |slots: BTreeSet<u32>| slots.iter().try_for_each(|slot| self.endpoints.revalidate_slot(*slot));
        if let Err(error) = changed.and_then(revalidate) {
            tracing::error!(%error, "endpoints with incomplete policies cannot be quarantined");
        }
    }

    /// Has one in `one_in` new connections reported as flow event: all with 1, none with 0. Takes effect with the next packet.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn sample_flows(&self, one_in: u32) -> Result<(), BpfError> {
        self.state.lock().maps.sample(one_in)
    }
}

/// What an operation is about. In the order in which refused operations are run again: dependencies first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum OpKey {
    PortTable(PortTableId),
    Address(IpAddr),
    Cidr(IpNetwork),
    Peer(SetId, Identity),
    Endpoint(u32, usize),
    ControlWord,
    Revalidate(FlowScope),
}

impl OpKey {
    const fn of(op: &Op) -> Option<Self> {
        match op {
            Op::PutPortTable { table, .. } | Op::RemovePortTable { table, .. } => Some(Self::PortTable(*table)),
            Op::PutAddress { address, .. } | Op::RemoveAddress(address) => Some(Self::Address(*address)),
            Op::PutCidr { net, .. } | Op::RemoveCidr(net) => Some(Self::Cidr(*net)),
            Op::PutPeer { set, identity, .. } | Op::RemovePeer { set, identity } => Some(Self::Peer(*set, *identity)),
            Op::PutEndpoint { slot, version, .. } => Some(Self::Endpoint(*slot, *version)),
            Op::SetControlWord { .. } => Some(Self::ControlWord),
            Op::Revalidate(scope) => Some(Self::Revalidate(*scope)),
            Op::RcuBarrier => None,
        }
    }
}

/// The policy maps, and what of the compiler's operations they do not hold.
struct State {
    maps: MapSet,
    /// Operations that are not in effect.
    refused: BTreeMap<OpKey, RefusedOp<Op>>,
    /// Values of quarantined endpoints as the compiler wants them, by slot and version.
    quarantined: BTreeMap<(u32, usize), EndpointPolicy>,
}

impl State {
    const fn new(maps: MapSet) -> Self {
        Self { maps, refused: BTreeMap::new(), quarantined: BTreeMap::new() }
    }

    fn note(&mut self, op: &Op, outcome: Result<(), Arc<BpfError>>) {
        let Some(key) = OpKey::of(op) else { return };
        match outcome {
            Ok(()) => drop(self.refused.remove(&key)),
            Err(error) => drop(self.refused.insert(key, RefusedOp { op: op.clone(), error })),
        }
    }

    fn write(&mut self, op: &Op) -> Result<(), BpfError> {
        match op {
            Op::PutPeer { verdicts, .. } if verdicts.iter().any(|verdict| self.is_refused_table(*verdict)) => {
                Err(BpfError::Dependency("its port table"))
            }
            Op::PutEndpoint { slot, version, value } => {
                let written = self.quarantine(value);
                self.maps.write_endpoint(*slot, *version, &written)?;
                if written == **value {
                    self.quarantined.remove(&(*slot, *version));
                } else {
                    self.quarantined.insert((*slot, *version), **value);
                }
                Ok(())
            }
            op => self.maps.write(op),
        }
    }

    fn is_refused_table(&self, verdict: VerdictOrTable) -> bool {
        let table = if verdict == VerdictOrTable::NONE { None } else { verdict.resolve().err() };
        table.is_some_and(|table| self.refused.contains_key(&OpKey::PortTable(table)))
    }

    fn is_incomplete(&self, side: &SetRef) -> bool {
        let all = OpKey::Peer(side.set, Identity(0))..=OpKey::Peer(side.set, Identity(u32::MAX));
        self.refused.range(all).next().is_some() || side.defaults.iter().any(|verdict| self.is_refused_table(*verdict))
    }

    /// A value whose directions with an incomplete set deny everything.
    fn quarantine(&self, value: &EndpointPolicy) -> EndpointPolicy {
        let mut value = *value;
        for sides in [&mut value.ingress, &mut value.egress] {
            if sides.iter().any(|side| self.is_incomplete(side)) {
                let deny = VerdictOrTable::verdict(Verdict::deny(RuleId(0)));
                *sides = [SetRef::default(), SetRef { set: INCOMPLETE, defaults: [deny; 4] }];
            }
        }
        value
    }

    /// Quarantines endpoints that refer to an incomplete set, and releases those that no longer do; the slots that have changed.
    fn update_quarantine(&mut self) -> Result<BTreeSet<u32>, BpfError> {
        let mut changed = BTreeSet::new();
        let is_rule = |key: &OpKey| matches!(key, OpKey::Peer(..) | OpKey::PortTable(_));
        if self.quarantined.is_empty() && !self.refused.keys().any(is_rule) {
            return Ok(changed);
        }
        for (slot, version) in (0..MAX_ENDPOINTS).flat_map(|slot| [(slot, 0), (slot, 1)]) {
            let present = self.maps.read_endpoint(slot, version)?;
            let wanted = self.quarantined.get(&(slot, version)).copied().unwrap_or(present);
            let written = self.quarantine(&wanted);
            if written != present {
                self.maps.write_endpoint(slot, version, &written)?;
                changed.insert(slot);
            }
            if written == wanted {
                self.quarantined.remove(&(slot, version));
            } else {
                self.quarantined.insert((slot, version), wanted);
            }
        }
        Ok(changed)
    }
}

/// The policy maps.
struct MapSet {
    control: Array<MapData, u32>,
    /// Also part of the control word: one in so many new connections is reported.
    one_in: u32,
    endpoints: Array<MapData, PolicyEndpoint>,
    peers: HashMap<MapData, PeerKey, AbiVersioned>,
    ports: LpmTrie<MapData, PortKey, u32>,
    exact_v4: HashMap<MapData, u32, AbiVersioned>,
    exact_v6: HashMap<MapData, [u32; 4], AbiVersioned>,
    net_v4: LpmTrie<MapData, u32, AbiVersioned>,
    net_v6: LpmTrie<MapData, [u32; 4], AbiVersioned>,
}

fn side(side: SetRef) -> PolicyDirection {
    PolicyDirection { set: side.set.0, defaults: side.defaults.map(|target| target.0) }
}

fn side_of(side: PolicyDirection) -> SetRef {
    SetRef { set: SetId(side.set), defaults: side.defaults.map(VerdictOrTable) }
}

fn endpoint(value: &EndpointPolicy) -> PolicyEndpoint {
    let identities = value.identities.map(|identity| identity.0);
    PolicyEndpoint { identities, ingress: value.ingress.map(side), egress: value.egress.map(side) }
}

fn endpoint_of(value: &PolicyEndpoint) -> EndpointPolicy {
    let identities = value.identities.map(Identity);
    EndpointPolicy { identities, ingress: value.ingress.map(side_of), egress: value.egress.map(side_of) }
}

/// A value as [`MapSet::read`] shows it. Defaults without a set are nothing that a compiler writes, so it writes the endpoint anew.
fn without_quarantine(mut value: EndpointPolicy) -> EndpointPolicy {
    for side in value.ingress.iter_mut().chain(&mut value.egress).filter(|side| side.set == INCOMPLETE) {
        side.set = SetId(0);
    }
    value
}

fn port_key(table: PortTableId, entry: &PortTableEntry) -> Key<PortKey> {
    let protocol = entry.protocol.unwrap_or(0);
    Key::new(32 + u32::from(entry.prefix_len()), PortKey::new(table.0, protocol, entry.port.to_be()))
}

fn port_table_entry(prefix: u32, key: PortKey, decision: u32) -> PortTableEntry {
    let [protocol, high, low, _] = key.class.to_ne_bytes();
    let bits = prefix.saturating_sub(40);
    PortTableEntry {
        protocol: (prefix >= 40).then_some(protocol),
        port: u16::from_be_bytes([high, low]),
        bits: u8::try_from(bits).unwrap_or(16),
        verdict: Verdict(decision),
    }
}

fn numbers<T>(pair: Versioned<T>, number: impl Fn(T) -> u32) -> AbiVersioned {
    pair.map(number)
}

impl MapSet {
    fn open(loaded: &mut Ebpf) -> Result<Self, BpfError> {
        let control: Array<MapData, u32> = take(loaded, names::POLICY_CONTROL)?;
        Ok(Self {
            one_in: control.get(&0, 0).map_err(BpfError::map(names::POLICY_CONTROL))? >> CONTROL_SAMPLE_SHIFT,
            control,
            endpoints: take(loaded, names::POLICY_ENDPOINTS)?,
            peers: take(loaded, names::POLICY_PEERS)?,
            ports: take(loaded, names::POLICY_PORTS)?,
            exact_v4: take(loaded, names::IPCACHE_V4)?,
            exact_v6: take(loaded, names::IPCACHE_V6)?,
            net_v4: take(loaded, names::IPCACHE_NET_V4)?,
            net_v6: take(loaded, names::IPCACHE_NET_V6)?,
        })
    }

    fn read(&self) -> Result<Maps, BpfError> {
        let control = self.control.get(&0, 0).map_err(BpfError::map(names::POLICY_CONTROL))?;
        let mut maps = Maps {
            version: (control & CONTROL_VERSION) as usize,
            enforce: control & CONTROL_ENFORCE != 0,
            ..Maps::default()
        };
        for slot in 0..MAX_ENDPOINTS {
            let values = [self.read_endpoint(slot, 0)?, self.read_endpoint(slot, 1)?].map(without_quarantine);
            if values != [EndpointPolicy::default(); 2] {
                maps.endpoints.insert(slot, values);
            }
        }
        for entry in self.peers.iter() {
            let (key, targets) = entry.map_err(BpfError::map(names::POLICY_PEERS))?;
            maps.peers.insert((SetId(key.set), Identity(key.identity)), targets.map(VerdictOrTable));
        }
        for entry in self.ports.iter() {
            let (key, decision) = entry.map_err(BpfError::map(names::POLICY_PORTS))?;
            let table = maps.port_tables.entry(PortTableId(key.data().table)).or_default();
            table.insert(port_table_entry(key.prefix_len(), key.data(), decision));
        }
        for entry in self.exact_v4.iter() {
            let (address, identities) = entry.map_err(BpfError::map(names::IPCACHE_V4))?;
            maps.addresses.insert(address_v4(address).into(), identities.map(Identity));
        }
        for entry in self.exact_v6.iter() {
            let (address, identities) = entry.map_err(BpfError::map(names::IPCACHE_V6))?;
            maps.addresses.insert(address_v6(address).into(), identities.map(Identity));
        }
        for entry in self.net_v4.iter() {
            let (key, identities) = entry.map_err(BpfError::map(names::IPCACHE_NET_V4))?;
            if let Some(net) = net(address_v4(key.data()).into(), key.prefix_len()) {
                maps.cidrs.insert(net, identities.map(Identity));
            }
        }
        for entry in self.net_v6.iter() {
            let (key, identities) = entry.map_err(BpfError::map(names::IPCACHE_NET_V6))?;
            if let Some(net) = net(address_v6(key.data()).into(), key.prefix_len()) {
                maps.cidrs.insert(net, identities.map(Identity));
            }
        }
        Ok(maps)
    }

    /// The lookup of the datapath.
    fn identity(&self, address: IpAddr) -> Result<Identity, BpfError> {
        let control = self.control.get(&0, 0).map_err(BpfError::map(names::POLICY_CONTROL))?;
        let version = (control & CONTROL_VERSION) as usize;
        let exact = match address {
            IpAddr::V4(v4) => found(self.exact_v4.get(&word(v4), 0), names::IPCACHE_V4)?,
            IpAddr::V6(v6) => found(self.exact_v6.get(&words(v6), 0), names::IPCACHE_V6)?,
        };
        if let Some(pair) = exact
            && pair[version] != 0
        {
            return Ok(Identity(pair[version]));
        }
        let block = match address {
            IpAddr::V4(v4) => found(self.net_v4.get(&Key::new(32, word(v4)), 0), names::IPCACHE_NET_V4)?,
            IpAddr::V6(v6) => found(self.net_v6.get(&Key::new(128, words(v6)), 0), names::IPCACHE_NET_V6)?,
        };
        Ok(Identity(block.map_or(0, |pair| pair[version])))
    }

    /// Runs an operation that writes a map.
    fn write(&mut self, op: &Op) -> Result<(), BpfError> {
        match op {
            Op::PutPortTable { table, entries } => entries.iter().try_for_each(|entry| {
                self.ports
                    .insert(&port_key(*table, entry), entry.verdict.0, 0)
                    .map_err(BpfError::map(names::POLICY_PORTS))
            }),
            Op::RemovePortTable { table, entries } => entries.iter().try_for_each(|entry| {
                ignore_absent(self.ports.remove(&port_key(*table, entry))).map_err(BpfError::map(names::POLICY_PORTS))
            }),
            Op::PutPeer { set, identity, verdicts } => {
                let key = PeerKey { set: set.0, identity: identity.0 };
                let verdicts = numbers(*verdicts, |verdict| verdict.0);
                self.peers.insert(key, verdicts, 0).map_err(BpfError::map(names::POLICY_PEERS))
            }
            Op::RemovePeer { set, identity } => {
                let key = PeerKey { set: set.0, identity: identity.0 };
                ignore_absent(self.peers.remove(&key)).map_err(BpfError::map(names::POLICY_PEERS))
            }
            Op::PutAddress { address, identities } => {
                let identities = numbers(*identities, |identity| identity.0);
                match address {
                    IpAddr::V4(v4) => {
                        self.exact_v4.insert(word(*v4), identities, 0).map_err(BpfError::map(names::IPCACHE_V4))
                    }
                    IpAddr::V6(v6) => {
                        self.exact_v6.insert(words(*v6), identities, 0).map_err(BpfError::map(names::IPCACHE_V6))
                    }
                }
            }
            Op::RemoveAddress(IpAddr::V4(v4)) => {
                ignore_absent(self.exact_v4.remove(&word(*v4))).map_err(BpfError::map(names::IPCACHE_V4))
            }
            Op::RemoveAddress(IpAddr::V6(v6)) => {
                ignore_absent(self.exact_v6.remove(&words(*v6))).map_err(BpfError::map(names::IPCACHE_V6))
            }
            Op::PutCidr { net, identities } => {
                let (identities, bits) = (numbers(*identities, |identity| identity.0), net.prefix().into());
                match net {
                    IpNetwork::V4(net) => self
                        .net_v4
                        .insert(&Key::new(bits, word(net.network())), identities, 0)
                        .map_err(BpfError::map(names::IPCACHE_NET_V4)),
                    IpNetwork::V6(net) => self
                        .net_v6
                        .insert(&Key::new(bits, words(net.network())), identities, 0)
                        .map_err(BpfError::map(names::IPCACHE_NET_V6)),
                }
            }
            Op::RemoveCidr(IpNetwork::V4(net)) => {
                let key = Key::new(net.prefix().into(), word(net.network()));
                ignore_absent(self.net_v4.remove(&key)).map_err(BpfError::map(names::IPCACHE_NET_V4))
            }
            Op::RemoveCidr(IpNetwork::V6(net)) => {
                let key = Key::new(net.prefix().into(), words(net.network()));
                ignore_absent(self.net_v6.remove(&key)).map_err(BpfError::map(names::IPCACHE_NET_V6))
            }
            Op::PutEndpoint { slot, version, value } => self.write_endpoint(*slot, *version, value),
            Op::SetControlWord { version, enforce } => {
                let enforce = if *enforce { CONTROL_ENFORCE } else { 0 };
                let control = (*version as u32 & CONTROL_VERSION) | enforce | self.one_in << CONTROL_SAMPLE_SHIFT;
                self.control.set(0, control, 0).map_err(BpfError::map(names::POLICY_CONTROL))
            }
            Op::Revalidate(_) | Op::RcuBarrier => Ok(()),
        }
    }

    fn sample(&mut self, one_in: u32) -> Result<(), BpfError> {
        let control = self.control.get(&0, 0).map_err(BpfError::map(names::POLICY_CONTROL))?;
        let rest = control & ((1 << CONTROL_SAMPLE_SHIFT) - 1);
        self.control.set(0, rest | one_in << CONTROL_SAMPLE_SHIFT, 0).map_err(BpfError::map(names::POLICY_CONTROL))?;
        self.one_in = one_in;
        Ok(())
    }

    fn read_endpoint(&self, slot: u32, version: usize) -> Result<EndpointPolicy, BpfError> {
        let index = policy_index(slot, version as u32);
        let value = self.endpoints.get(&index, 0).map_err(BpfError::map(names::POLICY_ENDPOINTS))?;
        Ok(endpoint_of(&value))
    }

    fn write_endpoint(&mut self, slot: u32, version: usize, value: &EndpointPolicy) -> Result<(), BpfError> {
        let index = policy_index(slot, version as u32);
        self.endpoints.set(index, endpoint(value), 0).map_err(BpfError::map(names::POLICY_ENDPOINTS))
    }
}

fn found(value: Result<AbiVersioned, MapError>, name: &'static str) -> Result<Option<AbiVersioned>, BpfError> {
    match value {
        Ok(pair) => Ok(Some(pair)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(BpfError::map(name)(error)),
    }
}

fn net(address: IpAddr, bits: u32) -> Option<IpNetwork> {
    IpNetwork::new(address, u8::try_from(bits).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_prefixes_round_trip() {
        let verdict = Verdict::allow(RuleId(20));
        for (protocol, port, bits) in [(None, 0, 0), (Some(6), 0, 0), (Some(17), 80, 16), (Some(132), 0x8000, 1)] {
            let entry = PortTableEntry { protocol, port, bits, verdict };
            let key = port_key(PortTableId(7), &entry);
            assert_eq!(port_table_entry(key.prefix_len(), key.data(), verdict.0), entry);
        }
    }

    /// Maps with room for so many peers; none if this process may not create maps.
    fn maps(peers: u32) -> Option<State> {
        /// `BPF_F_NO_PREALLOC` (include/uapi/linux/bpf.h): a table without it may take a few entries more than its size.
        const NO_PREALLOC: u32 = 1;
        let create = || -> Result<MapSet, MapError> {
            Ok(MapSet {
                control: Array::create(1, 0)?,
                one_in: 0,
                endpoints: Array::create(2 * MAX_ENDPOINTS, 0)?,
                peers: HashMap::create(peers, NO_PREALLOC)?,
                ports: LpmTrie::create(64, NO_PREALLOC)?,
                exact_v4: HashMap::create(64, NO_PREALLOC)?,
                exact_v6: HashMap::create(64, NO_PREALLOC)?,
                net_v4: LpmTrie::create(64, NO_PREALLOC)?,
                net_v6: LpmTrie::create(64, NO_PREALLOC)?,
            })
        };
        match create() {
            Ok(maps) => Some(State::new(maps)),
            Err(error) => {
                println!("SKIP: this process may not create BPF maps: {error}");
                None
            }
        }
    }

    fn apply(state: &mut State, ops: &[Op]) {
        for op in ops {
            let outcome = state.write(op).map_err(Arc::new);
            state.note(op, outcome);
        }
    }

    fn peer(set: u32, identity: u32) -> Op {
        let verdict = VerdictOrTable::verdict(Verdict::allow(RuleId(20)));
        Op::PutPeer { set: SetId(set), identity: Identity(identity), verdicts: [verdict; 2] }
    }

    fn put_endpoint(slot: u32, set: u32) -> (EndpointPolicy, [Op; 2]) {
        let deny = VerdictOrTable::verdict(Verdict::deny(RuleId(21)));
        let side = SetRef { set: SetId(set), defaults: [deny; 4] };
        let value = EndpointPolicy { ingress: [SetRef::default(), side], ..EndpointPolicy::default() };
        (value, [0, 1].map(|version| Op::PutEndpoint { slot, version, value: Box::new(value) }))
    }

    #[test]
    fn full_peer_map_quarantines_only_endpoints_of_the_incomplete_set() {
        let Some(mut state) = maps(2) else { return };
        let (of_set_1, endpoints_1) = put_endpoint(1, 1);
        let (of_set_2, endpoints_2) = put_endpoint(2, 2);
        apply(&mut state, &endpoints_1);
        apply(&mut state, &[peer(1, 100), peer(2, 100), peer(2, 101)]);
        assert_eq!(state.refused.keys().copied().collect::<Vec<_>>(), [OpKey::Peer(SetId(2), Identity(101))]);
        // An endpoint that is written after the refusal, and one that has been written before.
        apply(&mut state, &endpoints_2);
        let (of_both, both) = put_endpoint(3, 2);
        apply(&mut state, &both);
        assert!(state.update_quarantine().unwrap().is_empty(), "they were written so");
        for version in [0, 1] {
            assert_eq!(state.maps.read_endpoint(1, version).unwrap(), of_set_1);
            for slot in [2, 3] {
                let written = state.maps.read_endpoint(slot, version).unwrap();
                assert_eq!(written.ingress[1].set, INCOMPLETE);
                assert!(written.ingress[1].defaults.iter().all(|d| !d.resolve().unwrap().is_allowed()));
                assert_eq!(written.egress, of_set_2.egress, "the other direction is complete");
            }
        }
        // A compiler that starts from these maps sees that they are not what it wants.
        assert_ne!(state.maps.read().unwrap().endpoints[&2], [of_set_2; 2]);
        assert_ne!(state.maps.read().unwrap().endpoints[&2], [EndpointPolicy::default(); 2]);
        // After room is made all is as wanted.
        apply(&mut state, &[Op::RemovePeer { set: SetId(1), identity: Identity(100) }]);
        let again: Vec<Op> = state.refused.values().map(|refused| refused.op.clone()).collect();
        apply(&mut state, &again);
        assert!(state.refused.is_empty());
        assert_eq!(state.update_quarantine().unwrap(), BTreeSet::from([2, 3]));
        for (slot, wanted) in [(1, of_set_1), (2, of_set_2), (3, of_both)] {
            assert_eq!([0, 1].map(|version| state.maps.read_endpoint(slot, version).unwrap()), [wanted; 2]);
        }
        assert!(state.quarantined.is_empty());
    }

    #[test]
    fn refused_peer_quarantines_endpoints_that_were_written_before() {
        let Some(mut state) = maps(1) else { return };
        let (wanted, endpoints) = put_endpoint(1, 1);
        apply(&mut state, &endpoints);
        apply(&mut state, &[peer(1, 100), peer(1, 101)]);
        assert_eq!(state.update_quarantine().unwrap(), BTreeSet::from([1]));
        assert_eq!(state.maps.read_endpoint(1, 0).unwrap().ingress[1].set, INCOMPLETE);
        // The policy changes: the peer is not wanted any more.
        apply(&mut state, &[Op::RemovePeer { set: SetId(1), identity: Identity(101) }]);
        assert_eq!(state.update_quarantine().unwrap(), BTreeSet::from([1]));
        assert_eq!(state.maps.read_endpoint(1, 0).unwrap(), wanted);
    }

    #[test]
    fn table_of_a_refused_port_table_is_not_pointed_to() {
        let Some(mut state) = maps(8) else { return };
        let verdict = Verdict::allow(RuleId(20));
        let entries = (0..100).map(|port| PortTableEntry { protocol: Some(6), port, bits: 16, verdict }).collect();
        let table = VerdictOrTable::table(PortTableId(7));
        let peer = Op::PutPeer { set: SetId(1), identity: Identity(100), verdicts: [table; 2] };
        let (_, endpoints) = put_endpoint(1, 1);
        apply(&mut state, &[Op::PutPortTable { table: PortTableId(7), entries }, peer]);
        apply(&mut state, &endpoints);
        assert_eq!(state.refused.len(), 2, "{:?}", state.refused.keys());
        assert_eq!(state.maps.read_endpoint(1, 1).unwrap().ingress[1].set, INCOMPLETE);
    }
}
