//! Handle of the policy maps: the operations of the compiler (`terway_core::policy`) are run in its order.

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
    EndpointPolicy, FlowScope, Identity, Maps, Op, PortTableEntry, PortTableId, SetId, SetRef, Verdict, VerdictOrTable,
    Versioned,
};

use super::address::{address_v4, address_v6, word, words};
use super::endpoints::EndpointMaps;
use super::error::{BpfError, ignore_absent};
use super::object::take;
use super::rcu;

/// Handle of the policy maps. There is no mirror: the compiler knows what they hold, and after a panic it starts from [`Self::read`].
///
/// Its lock is held for one operation, and not while that of [`EndpointMaps`] is taken.
pub struct PolicyMaps {
    maps: Mutex<MapSet>,
    endpoints: Arc<EndpointMaps>,
}

impl fmt::Debug for PolicyMaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PolicyMaps").finish_non_exhaustive()
    }
}

impl PolicyMaps {
    pub(super) fn open(loaded: &mut Ebpf, endpoints: Arc<EndpointMaps>) -> Result<Self, BpfError> {
        Ok(Self { maps: Mutex::new(MapSet::open(loaded)?), endpoints })
    }

    /// Reads the maps: where a compiler starts from ([`terway_core::policy::Compiler::take_over`]).
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn read(&self) -> Result<Maps, BpfError> {
        self.maps.lock().read()
    }

    /// The identity that the maps give an address which is no local endpoint's, in the current version; 0 if there is none.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn identity(&self, address: IpAddr) -> Result<Identity, BpfError> {
        self.maps.lock().identity(address)
    }

    /// Runs one operation. The compiler decides what a failure concerns ([`terway_core::policy::Compiler::execute`]).
    ///
    /// # Errors
    /// When a map is full or the kernel refuses. A part may be written; running it again completes it.
    pub fn apply(&self, op: &Op) -> Result<(), BpfError> {
        match op {
            Op::RcuBarrier => {
                rcu::synchronize();
                Ok(())
            }
            Op::Revalidate(FlowScope::Endpoint(slot)) => self.endpoints.revalidate_slot(*slot),
            Op::Revalidate(FlowScope::Address(address)) => self.endpoints.revalidate_address(*address),
            Op::Revalidate(FlowScope::All) => self.endpoints.revalidate_all(),
            op => self.maps.lock().write(op),
        }
    }

    /// Has one in `one_in` new connections reported as flow event: all with 1, none with 0. Takes effect with the next packet.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn sample_flows(&self, one_in: u32) -> Result<(), BpfError> {
        self.maps.lock().sample(one_in)
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
            let values = [self.read_endpoint(slot, 0)?, self.read_endpoint(slot, 1)?];
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
    use terway_core::policy::RuleId;

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
    fn maps(peers: u32) -> Option<MapSet> {
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
            Ok(maps) => Some(maps),
            Err(error) => {
                println!("SKIP: this process may not create BPF maps: {error}");
                None
            }
        }
    }

    #[test]
    fn full_peer_map_refuses_new_entries_only() {
        let Some(mut maps) = maps(2) else { return };
        let peer = |set, identity, rule| {
            let verdict = VerdictOrTable::verdict(Verdict::allow(RuleId(rule)));
            Op::PutPeer { set: SetId(set), identity: Identity(identity), verdicts: [verdict; 2] }
        };
        maps.write(&peer(1, 100, 20)).unwrap();
        maps.write(&peer(2, 100, 20)).unwrap();
        let error = maps.write(&peer(2, 101, 20)).unwrap_err();
        assert!(error.to_string().contains(names::POLICY_PEERS), "{error}");
        // Those that are there can be changed and removed, and other maps are not concerned.
        maps.write(&peer(1, 100, 21)).unwrap();
        let address = "10.0.0.1".parse().unwrap();
        maps.write(&Op::PutAddress { address, identities: [Identity(7); 2] }).unwrap();
        maps.write(&Op::RemovePeer { set: SetId(1), identity: Identity(100) }).unwrap();
        maps.write(&peer(2, 101, 20)).unwrap();
        let read = maps.read().unwrap();
        assert_eq!((read.peers.len(), read.addresses[&address]), (2, [Identity(7); 2]));
    }
}
