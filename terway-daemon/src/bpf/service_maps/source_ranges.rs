//! Source range maps: the blocks whose clients a load balancer's frontends admit (`loadBalancerSourceRanges`).

use std::collections::BTreeSet;

use aya::Ebpf;
use aya::maps::MapData;
use aya::maps::lpm_trie::{Key, LpmTrie};
use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use terway_abi::{SourceRangeV4, SourceRangeV6, names};
use terway_core::service::PortId;

use crate::bpf::address::{address_v4, address_v6, word, words};
use crate::bpf::error::{BpfError, ignore_absent};
use crate::bpf::object::take;

/// The source range maps.
pub(super) struct SourceRanges {
    v4: LpmTrie<MapData, SourceRangeV4, u32>,
    v6: LpmTrie<MapData, SourceRangeV6, u32>,
    mirror: BTreeSet<(PortId, IpNetwork)>,
}

impl SourceRanges {
    pub(super) fn open(loaded: &mut Ebpf) -> Result<Self, BpfError> {
        Ok(Self::new(take(loaded, names::SRC_RANGES_V4)?, take(loaded, names::SRC_RANGES_V6)?))
    }

    pub(super) const fn new(
        v4: LpmTrie<MapData, SourceRangeV4, u32>,
        v6: LpmTrie<MapData, SourceRangeV6, u32>,
    ) -> Self {
        Self { v4, v6, mirror: BTreeSet::new() }
    }

    pub(super) const fn all(&self) -> &BTreeSet<(PortId, IpNetwork)> {
        &self.mirror
    }

    pub(super) fn recover(&mut self) -> Result<(), BpfError> {
        self.mirror.clear();
        for key in self.v4.keys() {
            let key = key.map_err(BpfError::map(names::SRC_RANGES_V4))?;
            let ([service, address], bits) = (key.data(), key.prefix_len().saturating_sub(32));
            let net = Ipv4Network::new(address_v4(address), bits as u8).map(IpNetwork::V4);
            self.mirror.extend(net.map(|net| (PortId(service), net)));
        }
        for key in self.v6.keys() {
            let key = key.map_err(BpfError::map(names::SRC_RANGES_V6))?;
            let ([service, a, b, c, d], bits) = (key.data(), key.prefix_len().saturating_sub(32));
            let net = Ipv6Network::new(address_v6([a, b, c, d]), bits as u8).map(IpNetwork::V6);
            self.mirror.extend(net.map(|net| (PortId(service), net)));
        }
        Ok(())
    }

    pub(super) fn put(&mut self, port: PortId, net: IpNetwork) -> Result<(), BpfError> {
        match net {
            IpNetwork::V4(net) => self.v4.insert(&key_v4(port, net), 1, 0).map_err(BpfError::map(names::SRC_RANGES_V4)),
            IpNetwork::V6(net) => self.v6.insert(&key_v6(port, net), 1, 0).map_err(BpfError::map(names::SRC_RANGES_V6)),
        }?;
        self.mirror.insert((port, net));
        Ok(())
    }

    pub(super) fn remove(&mut self, port: PortId, net: IpNetwork) -> Result<(), BpfError> {
        match net {
            IpNetwork::V4(net) => {
                ignore_absent(self.v4.remove(&key_v4(port, net))).map_err(BpfError::map(names::SRC_RANGES_V4))
            }
            IpNetwork::V6(net) => {
                ignore_absent(self.v6.remove(&key_v6(port, net))).map_err(BpfError::map(names::SRC_RANGES_V6))
            }
        }?;
        self.mirror.remove(&(port, net));
        Ok(())
    }
}

fn key_v4(port: PortId, net: Ipv4Network) -> Key<SourceRangeV4> {
    Key::new(32 + u32::from(net.prefix()), [port.0, word(net.network())])
}

fn key_v6(port: PortId, net: Ipv6Network) -> Key<SourceRangeV6> {
    let [a, b, c, d] = words(net.network());
    Key::new(32 + u32::from(net.prefix()), [port.0, a, b, c, d])
}
