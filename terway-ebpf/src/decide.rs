//! What is done with the first packet of a flow. The tables are asked through a trait, so that the same code runs on the kernel's
//! maps and, in tests, on ordinary ones.

use terway_abi::{Drop, Endpoint, MacPair, NO_SLOT};

use crate::family::Family;
use crate::flow::{Basis, Place, Route};
use crate::parse::Packet;

/// What the daemon has told the kernel.
pub trait Tables<F: Family> {
    /// The pod whose host end this is.
    fn by_ifindex(&self, ifindex: u32) -> Option<&Endpoint>;
    /// The pod of this node that has this address.
    fn by_address(&self, address: &F::Addr) -> Option<&Endpoint>;
    /// Whether the host stack serves this address.
    fn is_host(&self, address: &F::Addr) -> bool;
    /// The epoch of a slot.
    fn epoch(&self, slot: u32) -> u32;
}

/// What a decision comes to.
#[derive(Clone, Copy)]
pub enum Decision<'a> {
    /// This way, and so do the packets that follow.
    Way(Route<'a>),
    /// To the host stack, without a memory: it is no pod's packet.
    NotOurs,
}

/// Of an address that is nobody's here.
///
/// The epoch is read *before* the tables are asked whether it is somebody's: if it becomes somebody's in between, the flow made
/// from this is void at once.
#[inline(always)]
fn nobody<F: Family, T: Tables<F>>(tables: &T, address: &F::Addr) -> Basis {
    let slot = F::bucket(address);
    Basis { slot, epoch: tables.epoch(slot) }
}

/// Of an address that is this pod's. The epoch stands in the endpoint itself, so it is as old as what is decided from it.
#[inline(always)]
fn pods(pod: &Endpoint) -> Basis {
    Basis { slot: pod.slot, epoch: pod.epoch }
}

/// A packet that a pod sent.
///
/// # Errors
/// The reason to drop it.
#[inline(always)]
pub fn from_pod<'a, F: Family, T: Tables<F>>(
    tables: &'a T,
    pod: &'a Endpoint,
    packet: &Packet<F>,
    macs: MacPair,
) -> Result<Decision<'a>, Drop> {
    if macs.source() != pod.sent.source() {
        return Err(Drop::SpoofedMac);
    }
    if let Some(drop) = F::unroutable(&packet.key.src, &packet.key.dst) {
        return Err(drop);
    }
    if F::same(&packet.key.src, &F::NONE) || !F::same(&packet.key.src, &F::address(pod)) {
        return Err(Drop::SpoofedSource);
    }
    if macs != pod.sent {
        return Err(Drop::NotForGateway);
    }
    // Services: the destination becomes the backend's here, before it is looked up.
    let unowned = nobody(tables, &packet.key.dst);
    let (target, destination) = match tables.by_address(&packet.key.dst) {
        Some(peer) => (Place::Pod(peer), pods(peer)),
        None if tables.is_host(&packet.key.dst) => (Place::Host(pod), unowned),
        None if F::has_gateway(pod) => (Place::Vpc(pod), unowned),
        None => return Err(Drop::NoGateway),
    };
    // Policy: egress of `pod` and, for `Place::Pod`, ingress of the peer are decided here.
    Ok(Decision::Way(Route { origin: Place::Pod(pod), target, source: pods(pod), destination }))
}

/// A packet that came in by the ENI `ifindex`.
///
/// # Errors
/// The reason to drop it.
#[inline(always)]
pub fn from_vpc<'a, F: Family, T: Tables<F>>(
    tables: &'a T,
    packet: &Packet<F>,
    ifindex: u32,
) -> Result<Decision<'a>, Drop> {
    let source = nobody(tables, &packet.key.src);
    let Some(pod) = tables.by_address(&packet.key.dst) else { return Ok(Decision::NotOurs) };
    if pod.eni_ifindex != ifindex {
        return Err(Drop::WrongEni);
    }
    // A pod of this node reaches another one without the VPC, so from there such a source is a lie.
    if tables.by_address(&packet.key.src).is_some() {
        return Err(Drop::SpoofedSource);
    }
    // Policy: ingress of `pod` is decided here.
    Ok(Decision::Way(Route { origin: Place::Vpc(pod), target: Place::Pod(pod), source, destination: pods(pod) }))
}

/// A packet that the host stack sends to the pod behind `ifindex`.
///
/// # Errors
/// The reason to drop it.
#[inline(always)]
pub fn to_pod<'a, F: Family, T: Tables<F>>(
    tables: &'a T,
    packet: &Packet<F>,
    ifindex: u32,
) -> Result<Decision<'a>, Drop> {
    let source = nobody(tables, &packet.key.src);
    let pod = tables.by_ifindex(ifindex).ok_or(Drop::UnknownEndpoint)?;
    // Neighbour discovery and the like: it is not sent to the pod's address, and no flow comes of it.
    if F::same(&packet.key.dst, &F::NONE) || !F::same(&packet.key.dst, &F::address(pod)) {
        return Ok(Decision::NotOurs);
    }
    // A pod's packet that the host stack forwarded (to the backend of a Service, say) depends on that pod too.
    let source = tables.by_address(&packet.key.src).map_or(source, pods);
    // Policy: ingress of `pod` is decided here; what the node itself sends is always allowed.
    Ok(Decision::Way(Route { origin: Place::Host(pod), target: Place::Pod(pod), source, destination: pods(pod) }))
}

/// A packet with this source that leaves by the ENI `ifindex` and that [`from_pod`] has not seen.
///
/// # Errors
/// [`Drop::WrongEni`]: the address is a pod's, and another ENI owns it.
#[inline(always)]
pub fn to_vpc<F: Family, T: Tables<F>>(tables: &T, src: &F::Addr, ifindex: u32) -> Result<(), Drop> {
    match tables.by_address(src) {
        Some(pod) if pod.eni_ifindex != ifindex => Err(Drop::WrongEni),
        _ => Ok(()),
    }
}

/// Whether both ends of an entry are as they were when it was made.
#[inline(always)]
pub fn holds<F: Family, T: Tables<F>>(tables: &T, slots: [u32; 2], epochs: [u32; 2]) -> bool {
    let ([source, destination], [at_source, at_destination]) = (slots, epochs);
    // An entry that was never filled has slot 0 twice.
    source != NO_SLOT && tables.epoch(source) == at_source && tables.epoch(destination) == at_destination
}
