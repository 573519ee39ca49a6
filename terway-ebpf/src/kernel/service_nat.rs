//! Service NAT: backend selection, and the pair of flow entries of a connection with NAT.

use aya_ebpf::bindings::{__sk_buff, BPF_NOEXIST};
use aya_ebpf::helpers::bpf_get_prandom_u32;
use terway_abi::{
    BackendRef, Drop, Flow, FlowKey, NO_BACKEND, POLICY_EPOCH_MASK, PORT_REMAPPED, PathCounter, flow_flags,
    frontend_flags,
};

use super::counters::{count, jiffies};
use super::flow_table::{epoch_diff, is_current_backend};
use super::forward::emit;
use super::hook::{FROM_POD, FROM_VPC};
use super::maps::{DatapathFamily, HZ, Maps, count_connection, sending_endpoint};
use super::nat::PacketLayout;
use super::scratch::{Destination, Scratch};
use super::skb::{Skb, Window};
use super::verdict::{Outcome, StageResult, Verdict};
use crate::flow::{self, Route, RouteEnd};
use crate::frame::{Frame as _, zero};
use crate::nat::{self, PortRange, Tuple};
use crate::parse::{Fragment, Packet, Payload, SCTP, tcp_flags};
use crate::route::{self, Tables};
use crate::service::{self, Client, Selection, Services};

/// Number of source ports that are tried before the connection is dropped.
const PORT_ATTEMPTS: u32 = 6;

/// The stage of Services: looks up the frontend of the packet's destination and selects a backend, which becomes the destination.
/// [`Outcome::Reject`] if the Service has no backend.
#[inline(never)]
pub(super) fn select_service_backend<F: DatapathFamily, const PROGRAM: u8>(
    ctx: *mut __sk_buff,
    scratch: &mut Scratch<F>,
) -> StageResult
where
    Maps: Tables<F> + Services<F>,
{
    select::<F, PROGRAM>(Skb(ctx), scratch).into()
}

#[inline(always)]
fn select<F: DatapathFamily, const PROGRAM: u8>(skb: Skb, scratch: &mut Scratch<F>) -> Result<Outcome, Drop>
where
    Maps: Tables<F> + Services<F>,
{
    let Scratch { packet, destination, .. } = scratch;
    let (previous, previous_port) = (destination.backend_ref, destination.nat_source_port);
    (destination.backend_ref.backend, destination.nat_source_port) = (NO_BACKEND, 0);
    if PROGRAM == FROM_POD {
        // Session affinity is stored, and a reply may be sent, before the route stage checks the source.
        route::check_source(sending_endpoint::<F>(skb)?, packet, skb.window().macs().ok_or(Drop::Truncated)?)?;
    }
    let is_node_address = || Maps.is_host(&packet.dst);
    let (in_cluster, ports, protocol) = (PROGRAM == FROM_POD, packet.ports, packet.protocol);
    let found = service::find_frontend::<F, _>(&Maps, &packet.dst, ports, protocol, in_cluster, is_node_address);
    let Some(frontend) = found else { return Ok(Outcome::Continue) };
    // SAFETY: the helper has no preconditions.
    let random = unsafe { bpf_get_prandom_u32() };
    let address = F::to_words(&packet.src);
    let client = Client { client: address, kind: F::VERSION.into(), random, now: jiffies(), hz: HZ.load() };
    let hash = service::client_hash::<F>(&packet.src, ports, frontend.affinity != 0);
    let mut selection = service::select_backend::<F, _>(&Maps, frontend, in_cluster, hash, &client);
    if let Selection::Backend(_) = selection
        && previous_port != 0
    {
        (selection, destination.nat_source_port) = (Selection::Backend(previous), previous_port);
    }
    match selection {
        Selection::NotService => Ok(Outcome::Continue),
        Selection::SourceRangeDenied => Err(Drop::SourceRange),
        Selection::NoBackend { drop: true } => Err(Drop::NoBackend),
        Selection::NoBackend { drop: false } => Ok(Outcome::Reject),
        Selection::Backend(selected) => {
            let backend = Services::<F>::backend(&Maps, selected.backend).ok_or(Drop::NoBackend)?;
            let Destination { address, port, backend_ref, service, is_local_only, .. } = destination;
            *is_local_only = frontend.flags & frontend_flags::EXTERNAL_LOCAL != 0;
            F::assign(address, &F::from_words(&backend.address));
            *port = u32::from(backend.port);
            *backend_ref = selected;
            *service = frontend.service;
            Ok(Outcome::Continue)
        }
    }
}

/// The stage that looks up the previous backend and source port of an established connection, for [`select_service_backend`]. Returns
/// 1 if there are any.
#[inline(never)]
pub(super) fn lookup_previous_backend<F: DatapathFamily>(scratch: &mut Scratch<F>) -> u32 {
    let Scratch { packet, destination, .. } = scratch;
    let Some((backend_ref, source_port)) = previous_backend::<F>(packet) else { return 0 };
    (destination.backend_ref, destination.nat_source_port) = (backend_ref, source_port);
    1
}

/// The backend of an established connection and its source port after NAT, if its entry is invalid for another reason than its backend.
#[inline(always)]
fn previous_backend<F: DatapathFamily>(packet: &Packet<F>) -> Option<(BackendRef, u32)> {
    if packet.tcp_flags & tcp_flags::SYN != 0 {
        return None;
    }
    let (key, is_high_end) = flow::flow_key::<F>(&packet.src, &packet.dst, packet.ports, packet.protocol);
    // SAFETY: read at once; an entry that is reused meanwhile is a race that every preallocated map has.
    let old = unsafe { F::flows().get(&key) }?;
    let [direction, _] = &old.directions;
    let backend_ref = BackendRef { backend: old.backend, generation: old.generation };
    let is_original = old.initiator == is_high_end && direction.flags & flow_flags::NAT != 0;
    (is_original && backend_ref.backend != NO_BACKEND && is_current_backend(backend_ref))
        .then_some((backend_ref, old.nat_ports & 0xffff))
}

/// Prepares the two flow entries of a connection with NAT from its route: to a backend, or, without one, to another source port. One for
/// each direction, because the tuples of their packets differ.
#[inline(always)]
pub(super) fn prepare_nat_pair<F: DatapathFamily, const PROGRAM: u8>(
    scratch: &mut Scratch<F>,
    route: &Route<'_>,
) -> Result<(), Drop> {
    let Scratch { packet, flow, reply_flow, destination, .. } = scratch;
    // Later fragments and ICMP errors without a flow cannot begin a connection.
    if packet.fragment == Fragment::Later || packet.payload != Payload::Plain {
        return Err(Drop::NotTranslatable);
    }
    if packet.protocol == SCTP && destination.port != packet.ports >> 16 {
        return Err(Drop::NotTranslatable);
    }
    // SAFETY: flow entries consist of integers.
    unsafe {
        zero(flow);
        zero(reply_flow);
    }
    let (from, to) = (route.source, route.destination);
    for (entry, initiator, other) in [(&mut *flow, from, to), (&mut *reply_flow, to, from)] {
        entry.slots = [initiator.slot, other.slot];
        entry.epochs = [initiator.epoch, other.epoch];
    }
    let ([original, _], [reply, _]) = (&mut flow.directions, &mut reply_flow.directions);
    route.fill_direction::<F>(original);
    route.reversed().fill_direction::<F>(reply);
    original.flags = flow_flags::SEEN | flow::tracked_tcp_flags(packet.tcp_flags);
    reply.flags = flow_flags::REPLY;
    destination.is_hairpin = match (route.origin, route.target) {
        (RouteEnd::Pod(pod), RouteEnd::Pod(peer)) => pod.host_ifindex == peer.host_ifindex,
        _ => false,
    };
    destination.snat_uplink = match (route.origin, route.target) {
        (RouteEnd::Vpc(_), RouteEnd::Vpc(node)) if PROGRAM == FROM_VPC => node.eni_ifindex,
        _ => 0,
    };
    Ok(())
}

/// Inserts the two entries of [`prepare_nat_pair`], and forwards the packet.
#[inline(always)]
pub(super) fn create_nat_pair<F: DatapathFamily, const PROGRAM: u8>(
    skb: Skb,
    window: Window,
    scratch: &mut Scratch<F>,
) -> Result<Verdict, Drop>
where
    Maps: Tables<F>,
{
    let Scratch { packet, flow, reply_flow, destination, .. } = scratch;
    let now = jiffies();
    for entry in [&mut *flow, &mut *reply_flow] {
        entry.created = now;
        (entry.backend, entry.generation, entry.service) =
            (destination.backend_ref.backend, destination.backend_ref.generation, destination.service);
        let [direction, _] = &mut entry.directions;
        direction.last_seen = now;
    }
    let [direction, _] = &mut flow.directions;
    (direction.packets, direction.bytes) = (1, u64::from(skb.len()));

    // A pod drops packets from its own address, so with a hairpin the Service's address is the source.
    let original = Tuple { src: &packet.src, dst: &packet.dst, ports: packet.ports };
    let mut src = if destination.is_hairpin { &packet.dst } else { &packet.src };
    let mut candidates = SourcePorts { first: packet.ports & 0xffff, range: PortRange::EPHEMERAL };
    // Packets to a backend on another node are masqueraded (SNAT to the node), so that replies come back here.
    let node_address;
    if PROGRAM == FROM_VPC && destination.snat_uplink != 0 {
        let uplink = Tables::<F>::uplink(&Maps, destination.snat_uplink).ok_or(Drop::NoUplink)?;
        node_address = F::address(&uplink.node);
        src = &node_address;
        candidates.range = PortRange { first: uplink.first_snat_port, count: uplink.snat_port_count };
        if packet.protocol != SCTP {
            // SAFETY: the helper has no preconditions.
            candidates.first = u32::from(candidates.range.pick(unsafe { bpf_get_prandom_u32() }));
        }
    }
    if destination.nat_source_port != 0 {
        candidates.first = destination.nat_source_port;
    }
    let translated = Tuple { src, dst: &destination.address, ports: destination.port << 16 };
    let ports = insert_reply_entry::<F>(reply_flow, original, translated, packet.protocol, candidates)?;
    nat::set_nat::<F>(flow, original, Tuple { ports, ..translated });
    let (mut key, is_high_end) = flow::flow_key::<F>(&packet.src, &packet.dst, packet.ports, packet.protocol);
    flow.initiator = is_high_end;
    if destination.has_backend() {
        count_connection(destination.backend_ref.backend);
    } else {
        key.class |= PORT_REMAPPED;
    }
    let failed = F::flows().insert(&key, &*flow, 0).is_err();
    count(if failed { PathCounter::FlowInsertFailed } else { PathCounter::FlowNew } as u32, skb.len());
    let [direction, _] = &flow.directions;
    Ok(emit::<F, PROGRAM>(skb, window, direction, &raw const *flow, PacketLayout::of(packet)))
}

/// The source ports to try.
#[derive(Clone, Copy)]
struct SourcePorts {
    /// The first port, as in the packet.
    first: u32,
    /// The range of the other ports, which are drawn at random.
    range: PortRange,
}

/// Inserts the reply entry under the first source port whose reply tuple does not collide with another connection's. Returns the ports of
/// the original direction after NAT.
#[inline(always)]
fn insert_reply_entry<F: DatapathFamily>(
    reply_flow: &mut Flow<F::Addr>,
    original: Tuple<'_, F::Addr>,
    translated: Tuple<'_, F::Addr>,
    protocol: u8,
    candidates: SourcePorts,
) -> Result<u32, Drop>
where
    Maps: Tables<F>,
{
    let mut source_port = candidates.first;
    let reply_to_client = Tuple { src: original.dst, dst: original.src, ports: original.ports.rotate_left(16) };
    for _ in 0..PORT_ATTEMPTS {
        let ports = source_port | translated.ports;
        let reply = Tuple { src: translated.dst, dst: translated.src, ports: ports.rotate_left(16) };
        let (key, is_high_end) = flow::flow_key::<F>(reply.src, reply.dst, reply.ports, protocol);
        reply_flow.initiator = is_high_end;
        nat::set_nat::<F>(reply_flow, reply, reply_to_client);
        // A refused insertion takes as long as a successful one, so the lookup comes first.
        // SAFETY: only the existence of the entry counts.
        let is_taken = unsafe { F::flows().get(&key) }.is_some();
        if !is_taken && F::flows().insert(&key, &*reply_flow, u64::from(BPF_NOEXIST)).is_ok() {
            return Ok(ports);
        }
        if is_replaceable::<F>(&key, reply_to_client) {
            // The insertion fails if the table is full; the packet is forwarded all the same.
            let _result = F::flows().insert(&key, &*reply_flow, 0);
            return Ok(ports);
        }
        if protocol == SCTP {
            break;
        }
        count(PathCounter::PortRemapped as u32, 0);
        // SAFETY: the helper has no preconditions.
        source_port = u32::from(candidates.range.pick(unsafe { bpf_get_prandom_u32() }));
    }
    Err(Drop::SnatPortsExhausted)
}

/// Whether the entry of this key may be replaced by the reply entry that translates to `reply_to_client`: it belongs to the same
/// connection, its connection has ended, or it is invalid.
#[inline(always)]
fn is_replaceable<F: DatapathFamily>(key: &FlowKey<F::Addr>, reply_to_client: Tuple<'_, F::Addr>) -> bool
where
    Maps: Tables<F>,
{
    // SAFETY: read at once; an entry that is reused meanwhile is a race that every preallocated map has.
    let Some(entry) = (unsafe { F::flows().get(key) }) else { return true };
    let [direction, other] = &entry.directions;
    let has_ended = (direction.flags | other.flags) & (flow_flags::FIN | flow_flags::RST) != 0;
    let is_same_connection = direction.flags & flow_flags::NAT != 0
        && entry.nat_ports == reply_to_client.ports
        && F::same(&entry.nat_src, reply_to_client.src)
        && F::same(&entry.nat_dst, reply_to_client.dst);
    is_same_connection || has_ended || epoch_diff::<F>(entry) > POLICY_EPOCH_MASK
}
