//! Handle of the prefixes that the node's own network stack serves.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use aya::Ebpf;
use aya::maps::MapData;
use aya::maps::lpm_trie::{Key, LpmTrie};
use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use parking_lot::Mutex;
use terway_abi::names;
use terway_core::cidr::Cidr;

use super::address::{address_v4, address_v6, word, words};
use super::endpoints::EndpointMaps;
use super::error::{BpfError, ignore_absent};
use super::object::take;

/// Handle of the host prefix maps: pods' packets to these prefixes go up the node's own stack.
///
/// Its lock is held for the map writes, and released before flows are invalidated.
pub struct HostPrefixes {
    maps: Mutex<Maps>,
    endpoints: Arc<EndpointMaps>,
}

impl fmt::Debug for HostPrefixes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostPrefixes").finish_non_exhaustive()
    }
}

impl HostPrefixes {
    /// Takes the maps out of the loaded object and reads what an earlier daemon wrote.
    pub(super) fn open(loaded: &mut Ebpf, endpoints: Arc<EndpointMaps>) -> Result<Self, BpfError> {
        Ok(Self { maps: Mutex::new(Maps::open(loaded)?), endpoints })
    }

    /// Sets the prefixes that the host stack serves: the node's own addresses and `host_stack_cidrs`. Flows that this concerns are
    /// decided anew.
    ///
    /// # Errors
    /// [`BpfError::Map`]; calling again completes it.
    pub fn set(&self, prefixes: &[IpNetwork]) -> Result<(), BpfError> {
        let changed = self.maps.lock().set(prefixes)?;
        if changed { self.endpoints.invalidate_unowned() } else { Ok(()) }
    }
}

/// The maps with a mirror of their contents, which is changed after each write.
struct Maps {
    v4: LpmTrie<MapData, u32, u32>,
    v6: LpmTrie<MapData, [u32; 4], u32>,
    mirror: BTreeSet<IpNetwork>,
}

impl Maps {
    fn open(loaded: &mut Ebpf) -> Result<Self, BpfError> {
        let v4: LpmTrie<MapData, u32, u32> = take(loaded, names::HOST_V4)?;
        let v6: LpmTrie<MapData, [u32; 4], u32> = take(loaded, names::HOST_V6)?;
        let mut mirror = BTreeSet::new();
        for key in v4.keys() {
            let key = key.map_err(BpfError::map(names::HOST_V4))?;
            mirror.extend(Ipv4Network::new(address_v4(key.data()), key.prefix_len() as u8).map(IpNetwork::V4));
        }
        for key in v6.keys() {
            let key = key.map_err(BpfError::map(names::HOST_V6))?;
            mirror.extend(Ipv6Network::new(address_v6(key.data()), key.prefix_len() as u8).map(IpNetwork::V6));
        }
        Ok(Self { v4, v6, mirror })
    }

    /// Writes the difference; whether there was any.
    fn set(&mut self, prefixes: &[IpNetwork]) -> Result<bool, BpfError> {
        let wanted: BTreeSet<IpNetwork> = prefixes.iter().map(Cidr::truncated).collect();
        let added: Vec<IpNetwork> = wanted.difference(&self.mirror).copied().collect();
        let removed: Vec<IpNetwork> = self.mirror.difference(&wanted).copied().collect();
        // New ones first: an address that both an old and a new prefix cover is the host's all the time.
        for prefix in &added {
            match prefix {
                IpNetwork::V4(net) => self.v4.insert(&key_v4(*net), 1, 0).map_err(BpfError::map(names::HOST_V4))?,
                IpNetwork::V6(net) => self.v6.insert(&key_v6(*net), 1, 0).map_err(BpfError::map(names::HOST_V6))?,
            }
            self.mirror.insert(*prefix);
        }
        for prefix in &removed {
            match prefix {
                IpNetwork::V4(net) => {
                    ignore_absent(self.v4.remove(&key_v4(*net))).map_err(BpfError::map(names::HOST_V4))?;
                }
                IpNetwork::V6(net) => {
                    ignore_absent(self.v6.remove(&key_v6(*net))).map_err(BpfError::map(names::HOST_V6))?;
                }
            }
            self.mirror.remove(prefix);
        }
        Ok(!added.is_empty() || !removed.is_empty())
    }
}

fn key_v4(net: Ipv4Network) -> Key<u32> {
    Key::new(u32::from(net.prefix()), word(net.network()))
}

fn key_v6(net: Ipv6Network) -> Key<[u32; 4]> {
    Key::new(u32::from(net.prefix()), words(net.network()))
}
