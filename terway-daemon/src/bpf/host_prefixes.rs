//! Prefixes that the host stack serves.

use std::collections::BTreeSet;

use aya::Ebpf;
use aya::maps::MapData;
use aya::maps::lpm_trie::{Key, LpmTrie};
use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use terway_abi::names;
use terway_core::cidr::Cidr;

use super::endpoints::{absent_is_fine, address_v4, address_v6, word, words};
use super::error::BpfError;
use super::object::take;

/// The maps, and what is in them.
#[derive(Debug)]
pub(super) struct Prefixes {
    v4: LpmTrie<MapData, u32, u32>,
    v6: LpmTrie<MapData, [u32; 4], u32>,
    known: BTreeSet<IpNetwork>,
}

impl Prefixes {
    /// Takes the maps and reads what an earlier daemon wrote.
    pub(super) fn new(loaded: &mut Ebpf) -> Result<Self, BpfError> {
        let v4: LpmTrie<MapData, u32, u32> = take(loaded, names::HOST_V4)?;
        let v6: LpmTrie<MapData, [u32; 4], u32> = take(loaded, names::HOST_V6)?;
        let mut known = BTreeSet::new();
        for key in v4.keys() {
            let key = key.map_err(BpfError::map(names::HOST_V4))?;
            known.extend(Ipv4Network::new(address_v4(key.data()), key.prefix_len() as u8).map(IpNetwork::V4));
        }
        for key in v6.keys() {
            let key = key.map_err(BpfError::map(names::HOST_V6))?;
            known.extend(Ipv6Network::new(address_v6(key.data()), key.prefix_len() as u8).map(IpNetwork::V6));
        }
        Ok(Self { v4, v6, known })
    }

    /// Writes the difference; whether there was any.
    pub(super) fn set(&mut self, prefixes: &[IpNetwork]) -> Result<bool, BpfError> {
        let wanted: BTreeSet<IpNetwork> = prefixes.iter().map(Cidr::truncated).collect();
        let added: Vec<IpNetwork> = wanted.difference(&self.known).copied().collect();
        let removed: Vec<IpNetwork> = self.known.difference(&wanted).copied().collect();
        // New ones first: an address that both an old and a new prefix cover is the host's all the time.
        for prefix in &added {
            match prefix {
                IpNetwork::V4(net) => self.v4.insert(&key_v4(*net), 1, 0).map_err(BpfError::map(names::HOST_V4))?,
                IpNetwork::V6(net) => self.v6.insert(&key_v6(*net), 1, 0).map_err(BpfError::map(names::HOST_V6))?,
            }
            self.known.insert(*prefix);
        }
        for prefix in &removed {
            match prefix {
                IpNetwork::V4(net) => {
                    absent_is_fine(self.v4.remove(&key_v4(*net))).map_err(BpfError::map(names::HOST_V4))?;
                }
                IpNetwork::V6(net) => {
                    absent_is_fine(self.v6.remove(&key_v6(*net))).map_err(BpfError::map(names::HOST_V6))?;
                }
            }
            self.known.remove(prefix);
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
