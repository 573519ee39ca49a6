//! Endpoints: the pods' interfaces in the kernel's maps, and the epochs that their flows depend on.

mod maps;

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use aya::Ebpf;
use parking_lot::Mutex;
use terway_abi::MacPair;
use terway_core::ident::{Addresses, Mac};

use super::address::{address_v4, address_v6, word, words};
use super::error::BpfError;
use maps::Maps;

/// An endpoint: the interface of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The host end of its veth.
    pub host_ifindex: u32,
    /// The host end's Ethernet address: what the pod sends to.
    pub host_mac: Mac,
    /// The pod end's Ethernet address.
    pub pod_mac: Mac,
    /// Its addresses.
    pub addresses: Addresses,
    /// The ENI that owns the addresses.
    pub eni_ifindex: u32,
    /// That ENI's IPv4 gateway.
    pub gateway_v4: Option<Ipv4Addr>,
    /// That ENI's IPv6 gateway.
    pub gateway_v6: Option<Ipv6Addr>,
}

impl Endpoint {
    fn to_abi(self, slot: u32, epoch: u32, first_epoch: u32) -> terway_abi::Endpoint {
        terway_abi::Endpoint {
            host_ifindex: self.host_ifindex,
            eni_ifindex: self.eni_ifindex,
            slot,
            epoch,
            flags: 0,
            v4: self.addresses.v4.map_or(0, word),
            v6: self.addresses.v6.map_or([0; 4], words),
            gateway_v4: self.gateway_v4.map_or(0, word),
            gateway_v6: self.gateway_v6.map_or([0; 4], words),
            from_pod_macs: MacPair::new(self.host_mac.0, self.pod_mac.0),
            to_pod_macs: MacPair::new(self.pod_mac.0, self.host_mac.0),
            first_epoch,
            spare: [0; 2],
        }
    }

    fn from_abi(abi: &terway_abi::Endpoint) -> Self {
        Self {
            host_ifindex: abi.host_ifindex,
            host_mac: Mac(abi.from_pod_macs.destination()),
            pod_mac: Mac(abi.from_pod_macs.source()),
            addresses: Addresses {
                v4: (abi.v4 != 0).then(|| address_v4(abi.v4)),
                v6: (abi.v6 != [0; 4]).then(|| address_v6(abi.v6)),
            },
            eni_ifindex: abi.eni_ifindex,
            gateway_v4: (abi.gateway_v4 != 0).then(|| address_v4(abi.gateway_v4)),
            gateway_v6: (abi.gateway_v6 != [0; 4]).then(|| address_v6(abi.gateway_v6)),
        }
    }
}

/// Handle of the endpoint maps and of the epoch map.
///
/// Its lock is the last one in the order of locks: [`ServiceMaps`](super::ServiceMaps) takes it while it holds its own.
pub struct EndpointMaps {
    maps: Mutex<Maps>,
}

impl fmt::Debug for EndpointMaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EndpointMaps").finish_non_exhaustive()
    }
}

impl EndpointMaps {
    /// Takes the maps out of the loaded object and reads what an earlier daemon wrote.
    pub(super) fn open(loaded: &mut Ebpf) -> Result<Self, BpfError> {
        let mut maps = Maps::open(loaded)?;
        maps.recover()?;
        Ok(Self { maps: Mutex::new(maps) })
    }

    /// Adds an endpoint, or changes it. Packets see it whole or not at all; flows that a change touches are decided anew.
    ///
    /// An address that another endpoint had goes over to this one, and that other endpoint is removed: two pods never share one.
    ///
    /// # Errors
    /// [`BpfError`]; nothing or a part was written, and calling again completes it.
    pub fn upsert(&self, endpoint: &Endpoint) -> Result<(), BpfError> {
        self.maps.lock().upsert(endpoint)
    }

    /// Removes the endpoint of an interface and invalidates its flows; `false` if there is none.
    ///
    /// # Errors
    /// [`BpfError`]; calling again completes it.
    pub fn remove(&self, host_ifindex: u32) -> Result<bool, BpfError> {
        self.maps.lock().remove(host_ifindex)
    }

    /// All endpoints as this daemon knows them, by interface index.
    #[must_use]
    pub fn list(&self) -> Vec<Endpoint> {
        self.maps.lock().list()
    }

    /// All endpoints as the kernel's maps hold them now, whatever this daemon believes. An incomplete entry (missing under one of its
    /// addresses, or with an epoch that is not current) is left out.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn read(&self) -> Result<Vec<Endpoint>, BpfError> {
        self.maps.lock().read()
    }

    /// Drops what this daemon believes and reads the kernel's maps again: completes endpoints that are there by half, and removes
    /// addresses whose endpoint is gone. Flows of complete endpoints stay valid.
    ///
    /// # Errors
    /// [`BpfError::Map`]; calling again completes it.
    pub fn recover(&self) -> Result<(), BpfError> {
        self.maps.lock().recover()
    }

    /// Reserves the slot under which the policies of an interface's endpoint are written, before [`Self::upsert`] or after it; the slot,
    /// and whether the interface has an endpoint already. The slot is given to no other endpoint until [`Self::release_slot`].
    ///
    /// # Errors
    /// [`BpfError::Full`].
    pub fn reserve_slot(&self, host_ifindex: u32) -> Result<(u32, bool), BpfError> {
        self.maps.lock().reserve_slot(host_ifindex)
    }

    /// Cancels the reservation for an interface that gets no endpoint. Its policies stay until [`Self::release_slot`].
    pub fn cancel_reservation(&self, host_ifindex: u32) {
        self.maps.lock().cancel_reservation(host_ifindex);
    }

    /// Releases a slot, under which the maps hold no policies any more.
    pub fn release_slot(&self, slot: u32) {
        self.maps.lock().release_slot(slot);
    }

    /// Slots of endpoints that exist or are reserved.
    #[must_use]
    pub fn slots(&self) -> BTreeSet<u32> {
        self.maps.lock().slots()
    }

    /// Makes the policy verdicts of all flows of a slot stale: their next packet is checked again.
    pub(super) fn revalidate_slot(&self, slot: u32) -> Result<(), BpfError> {
        self.maps.lock().revalidate_slot(slot)
    }

    /// The same for all flows with an address, whether or not it is an endpoint's.
    pub(super) fn revalidate_address(&self, address: IpAddr) -> Result<(), BpfError> {
        self.maps.lock().revalidate_address(address)
    }

    /// The same for all flows of endpoints.
    pub(super) fn revalidate_all(&self) -> Result<(), BpfError> {
        self.maps.lock().revalidate_all()
    }

    /// Invalidates every flow that was decided while its address was no endpoint's.
    pub(super) fn invalidate_unowned(&self) -> Result<(), BpfError> {
        self.maps.lock().invalidate_unowned()
    }

    /// Invalidates every flow that was decided while these addresses were no endpoint's.
    pub(super) fn invalidate_addresses(&self, addresses: &[IpAddr]) -> Result<(), BpfError> {
        self.maps.lock().invalidate_addresses(addresses)
    }
}
