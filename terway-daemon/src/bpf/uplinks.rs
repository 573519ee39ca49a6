//! ENIs by which clients outside reach Services of the node, in the kernel's map.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use aya::Ebpf;
use aya::maps::{HashMap, MapData, MapError};
use terway_abi::names;
use terway_core::ident::Addresses;

use super::endpoints::{absent_is_fine, address_v4, address_v6, word, words};
use super::error::BpfError;
use super::object::take;

/// An ENI by which clients outside reach Services.
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
    /// Source ports for what is sent on in the node's name; the host's sockets must not have them.
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
        terway_abi::Uplink { node, first_port: u32::from(*self.ports.start()), ports: self.ports.len() as u32 }
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
            ports: port(abi.first_port)..=port((abi.first_port + abi.ports).saturating_sub(1)),
        }
    }
}

/// The map. What an earlier daemon wrote is in it.
pub(super) struct Uplinks(HashMap<MapData, u32, terway_abi::Uplink>);

impl Uplinks {
    pub(super) fn new(loaded: &mut Ebpf) -> Result<Self, BpfError> {
        take(loaded, names::UPLINKS).map(Self)
    }

    pub(super) fn set(&mut self, uplink: &Uplink) -> Result<(), BpfError> {
        self.0.insert(uplink.ifindex, uplink.to_abi(), 0).map_err(BpfError::map(names::UPLINKS))
    }

    pub(super) fn remove(&mut self, ifindex: u32) -> Result<bool, BpfError> {
        match self.0.get(&ifindex, 0) {
            Err(MapError::KeyNotFound) => Ok(false),
            _ => absent_is_fine(self.0.remove(&ifindex)).map(|()| true).map_err(BpfError::map(names::UPLINKS)),
        }
    }

    pub(super) fn list(&self) -> Result<Vec<Uplink>, BpfError> {
        let entries = self.0.iter().map(|entry| entry.map(|(_, uplink)| Uplink::from_abi(&uplink)));
        entries.collect::<Result<_, _>>().map_err(BpfError::map(names::UPLINKS))
    }
}
