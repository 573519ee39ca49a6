//! Handle of the uplinks: the ENIs by which external clients reach the node's Services.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use aya::Ebpf;
use aya::maps::{HashMap, MapData, MapError};
use parking_lot::Mutex;
use terway_abi::names;
use terway_core::ident::Addresses;

use super::address::{address_v4, address_v6, word, words};
use super::error::{BpfError, ignore_absent};
use super::object::take;

/// An uplink: an ENI by which external clients reach Services.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplink {
    /// Its interface.
    pub ifindex: u32,
    /// The node's own addresses that the VPC takes from it.
    pub node: Addresses,
    /// Its IPv4 gateway.
    pub gateway_v4: Option<Ipv4Addr>,
    /// Its IPv6 gateway.
    pub gateway_v6: Option<Ipv6Addr>,
    /// Source ports for connections that are masqueraded (SNAT to the node); the host's sockets must not use them.
    pub ports: RangeInclusive<u16>,
}

impl Uplink {
    fn to_abi(&self) -> terway_abi::Uplink {
        let node = terway_abi::Endpoint {
            eni_ifindex: self.ifindex,
            v4: self.node.v4.map_or(0, word),
            v6: self.node.v6.map_or([0; 4], words),
            gateway_v4: self.gateway_v4.map_or(0, word),
            gateway_v6: self.gateway_v6.map_or([0; 4], words),
            ..terway_abi::Endpoint::default()
        };
        terway_abi::Uplink {
            node,
            first_snat_port: u32::from(*self.ports.start()),
            snat_port_count: self.ports.len() as u32,
        }
    }

    fn from_abi(abi: &terway_abi::Uplink) -> Self {
        let v4 = |word: u32| (word != 0).then(|| address_v4(word));
        let v6 = |words: [u32; 4]| (words != [0; 4]).then(|| address_v6(words));
        let port = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
        Self {
            ifindex: abi.node.eni_ifindex,
            node: Addresses { v4: v4(abi.node.v4), v6: v6(abi.node.v6) },
            gateway_v4: v4(abi.node.gateway_v4),
            gateway_v6: v6(abi.node.gateway_v6),
            ports: port(abi.first_snat_port)..=port((abi.first_snat_port + abi.snat_port_count).saturating_sub(1)),
        }
    }
}

/// Handle of the uplink map. There is no mirror: what an earlier daemon wrote is in the map.
pub struct UplinkMap {
    map: Mutex<HashMap<MapData, u32, terway_abi::Uplink>>,
}

impl fmt::Debug for UplinkMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UplinkMap").finish_non_exhaustive()
    }
}

impl UplinkMap {
    pub(super) fn open(loaded: &mut Ebpf) -> Result<Self, BpfError> {
        Ok(Self { map: Mutex::new(take(loaded, names::UPLINKS)?) })
    }

    /// Makes an ENI an uplink. To be called before [`Interfaces::attach_eni`](super::Interfaces::attach_eni): until then packets of
    /// external clients are dropped there.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn set(&self, uplink: &Uplink) -> Result<(), BpfError> {
        self.map.lock().insert(uplink.ifindex, uplink.to_abi(), 0).map_err(BpfError::map(names::UPLINKS))
    }

    /// Removes an uplink; `false` if the ENI is none. Connections that use it are not ended.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn remove(&self, ifindex: u32) -> Result<bool, BpfError> {
        let mut map = self.map.lock();
        match map.get(&ifindex, 0) {
            Err(MapError::KeyNotFound) => Ok(false),
            _ => ignore_absent(map.remove(&ifindex)).map(|()| true).map_err(BpfError::map(names::UPLINKS)),
        }
    }

    /// All uplinks.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn list(&self) -> Result<Vec<Uplink>, BpfError> {
        let map = self.map.lock();
        let entries = map.iter().map(|entry| entry.map(|(_, uplink)| Uplink::from_abi(&uplink)));
        entries.collect::<Result<_, _>>().map_err(BpfError::map(names::UPLINKS))
    }
}
