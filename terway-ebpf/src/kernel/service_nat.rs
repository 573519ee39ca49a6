//! Services in the packet path: choose a backend, and remember the translation in both directions.

use aya_ebpf::bindings::{__sk_buff, BPF_NOEXIST};
use aya_ebpf::helpers::bpf_get_prandom_u32;
use terway_abi::{
    BackendRef, Drop, Flow, FlowKey, NO_BACKEND, POLICY_EPOCH_MASK, PORT_REMAPPED, PathCounter, flow_flags,
    frontend_flags,
};

use super::exit::{Verdict, count, now};
use super::slow_path::{endpoint, layout};
use super::maps::{Choice, Desk, HZ, Maps, burden};
use super::fast_path::{FROM_POD, FROM_VPC, Way, drift, is_current, send};
use super::skb::{Skb, Window};
use crate::route::{self, Tables};
use crate::flow::{self, Place, Route};
use crate::frame::{Frame as _, zero};
use crate::nat::{self, Ports, Tuple};
use crate::parse::{Fragment, Packet, Payload, SCTP, tcp_flags};
use crate::service::{self, Asker, Outcome, Services};

/// How many source ports are tried.
const TRIES: u32 = 6;

/// Chooses a backend, if the packet is for a Service: it stands in the desk's choice then, or that the packet is refused.
#[inline(never)]
pub(super) fn serve<F: Way, const PROGRAM: u8>(ctx: *mut __sk_buff, desk: &mut Desk<F>) -> Verdict
where
    Maps: Tables<F> + Services<F>,
{
    served::<F, PROGRAM>(Skb(ctx), desk).into()
}

#[inline(always)]
fn served<F: Way, const PROGRAM: u8>(skb: Skb, desk: &mut Desk<F>) -> Result<Verdict, Drop>
where
    Maps: Tables<F> + Services<F>,
{
    let Desk { packet, choice, .. } = desk;
    let (recalled, source) = (choice.member, choice.source);
    (choice.member.backend, choice.source) = (NO_BACKEND, 0);
    if PROGRAM == FROM_POD {
        // What follows may be remembered, and answered.
        route::sender(endpoint::<F>(skb)?, packet, skb.window().macs().ok_or(Drop::Truncated)?)?;
    }
    let node = || Maps.is_host(&packet.dst);
    let (inside, ports, protocol) = (PROGRAM == FROM_POD, packet.ports, packet.protocol);
    let found = service::find::<F, _>(&Maps, &packet.dst, ports, protocol, inside, node);
    let Some(frontend) = found else { return Ok(Verdict::OPEN) };
    // SAFETY: the helper has no preconditions.
    let random = unsafe { bpf_get_prandom_u32() };
    let asker = Asker { client: F::widen(&packet.src), kind: F::VERSION.into(), random, now: now(), hz: HZ.load() };
    let hash = service::hash::<F>(&packet.src, ports, frontend.affinity != 0);
    let mut outcome = service::choose::<F, _>(&Maps, frontend, inside, hash, &asker);
    if let Outcome::Chosen(_) = outcome
        && source != 0
    {
        (outcome, choice.source) = (Outcome::Chosen(recalled), source);
    }
    match outcome {
        Outcome::Other => Ok(Verdict::OPEN),
        Outcome::Excluded => Err(Drop::SourceRange),
        Outcome::Refused { silent: true } => Err(Drop::NoBackend),
        Outcome::Refused { silent: false } => {
            choice.refused = 1;
            Ok(Verdict::OPEN)
        }
        Outcome::Chosen(member) => {
            let backend = Services::<F>::backend(&Maps, member.backend).ok_or(Drop::NoBackend)?;
            let Choice { address, port, member: chosen, service, local, .. } = choice;
            *local = frontend.flags & frontend_flags::EXTERNAL_LOCAL;
            F::assign(address, &F::narrow(&backend.address));
            *port = u32::from(backend.port);
            *chosen = member;
            *service = frontend.service;
            Ok(Verdict::OPEN)
        }
    }
}

/// Puts on the desk what [`before`] finds. A stage of its own, for the stack's sake.
#[inline(never)]
pub(super) fn recall<F: Way>(desk: &mut Desk<F>) -> u32 {
    let Desk { packet, choice, .. } = desk;
    let Some((member, source)) = before::<F>(packet) else { return 0 };
    (choice.member, choice.source) = (member, source);
    1
}

/// The backend of a connection that goes on, and the source port that it is known by there, if its entry is void only because
/// something else on its way has changed.
#[inline(always)]
fn before<F: Way>(packet: &Packet<F>) -> Option<(BackendRef, u32)> {
    if packet.tcp_flags & tcp_flags::SYN != 0 {
        return None;
    }
    let (key, from_high) = flow::key::<F>(&packet.src, &packet.dst, packet.ports, packet.protocol);
    // SAFETY: read at once; an entry that is reused meanwhile is a race that every preallocated map has.
    let old = unsafe { F::flows().get(&key) }?;
    let ([side, _], member) = (&old.directions, BackendRef { backend: old.backend, generation: old.generation });
    let own = old.initiator == from_high && side.flags & flow_flags::NAT != 0;
    (own && member.backend != NO_BACKEND && is_current(member)).then_some((member, old.nat_ports & 0xffff))
}

/// Makes the entries of a connection whose packets are translated, to a Service or, without a backend, only to another source port:
/// one for each direction, because their packets look different. As far as the way decides about them.
#[inline(always)]
pub(super) fn prepare_both<F: Way, const PROGRAM: u8>(desk: &mut Desk<F>, route: &Route<'_>) -> Result<(), Drop> {
    let Desk { packet, flow, reply, choice, .. } = desk;
    // Of a later fragment or an ICMP error there is nothing to learn.
    if packet.fragment == Fragment::Later || packet.payload != Payload::Plain {
        return Err(Drop::NotTranslatable);
    }
    if packet.protocol == SCTP && choice.port != packet.ports >> 16 {
        return Err(Drop::NotTranslatable);
    }
    // SAFETY: flow entries consist of integers.
    unsafe {
        zero(flow);
        zero(reply);
    }
    let (source, destination) = (route.source, route.destination);
    for (entry, maker, other) in [(&mut *flow, source, destination), (&mut *reply, destination, source)] {
        entry.slots = [maker.slot, other.slot];
        entry.epochs = [maker.epoch, other.epoch];
    }
    let ([side, _], [other, _]) = (&mut flow.directions, &mut reply.directions);
    route.fill::<F>(side);
    route.back().fill::<F>(other);
    side.flags = flow_flags::SEEN | flow::remembered(packet.tcp_flags);
    other.flags = flow_flags::REPLY;
    choice.itself = match (route.origin, route.target) {
        (Place::Pod(pod), Place::Pod(peer)) => u32::from(pod.host_ifindex == peer.host_ifindex),
        _ => 0,
    };
    choice.uplink = match (route.origin, route.target) {
        (Place::Vpc(_), Place::Vpc(node)) if PROGRAM == FROM_VPC => node.eni_ifindex,
        _ => 0,
    };
    Ok(())
}

/// Writes those entries, and sends the packet.
#[inline(always)]
pub(super) fn remember_both<F: Way, const PROGRAM: u8>(
    skb: Skb,
    window: Window,
    desk: &mut Desk<F>,
) -> Result<Verdict, Drop>
where
    Maps: Tables<F>,
{
    let Desk { packet, flow, reply, choice, .. } = desk;
    let now = now();
    for entry in [&mut *flow, &mut *reply] {
        entry.created = now;
        (entry.backend, entry.generation, entry.service) =
            (choice.member.backend, choice.member.generation, choice.service);
        let [side, _] = &mut entry.directions;
        side.last_seen = now;
    }
    let [side, _] = &mut flow.directions;
    (side.packets, side.bytes) = (1, u64::from(skb.len()));

    // A pod that is its own backend would not take a packet that comes from its own address: there it comes from the Service.
    let sent = Tuple { src: &packet.src, dst: &packet.dst, ports: packet.ports };
    let mut src = if choice.itself != 0 { &packet.dst } else { &packet.src };
    let mut ports = Draw { first: packet.ports & 0xffff, others: Ports::CLIENTS };
    // What goes on to another node goes in this one's name, so that the answers come back here.
    let own;
    if PROGRAM == FROM_VPC && choice.uplink != 0 {
        let uplink = Tables::<F>::uplink(&Maps, choice.uplink).ok_or(Drop::NoUplink)?;
        own = F::address(&uplink.node);
        src = &own;
        ports.others = Ports { first: uplink.first_snat_port, count: uplink.snat_port_count };
        if packet.protocol != SCTP {
            // SAFETY: the helper has no preconditions.
            ports.first = u32::from(ports.others.draw(unsafe { bpf_get_prandom_u32() }));
        }
    }
    if choice.source != 0 {
        ports.first = choice.source;
    }
    let to = Tuple { src, dst: &choice.address, ports: choice.port << 16 };
    let ports = settle_port::<F>(reply, sent, to, packet.protocol, ports)?;
    nat::translate::<F>(flow, sent, Tuple { ports, ..to });
    let (mut key, from_high) = flow::key::<F>(&packet.src, &packet.dst, packet.ports, packet.protocol);
    flow.initiator = from_high;
    if choice.member.backend == NO_BACKEND {
        key.class |= PORT_REMAPPED;
    } else {
        burden(choice.member.backend);
    }
    let full = F::flows().insert(&key, &*flow, 0).is_err();
    count(if full { PathCounter::FlowInsertFailed } else { PathCounter::FlowNew } as u32, skb.len());
    let [side, _] = &flow.directions;
    Ok(send::<F, PROGRAM>(skb, window, side, &raw const *flow, layout(packet)))
}

/// Which source ports are tried.
#[derive(Clone, Copy)]
struct Draw {
    /// The first, as in the packet.
    first: u32,
    /// From which the others are drawn.
    others: Ports,
}

/// Inserts the entry of the answers under the first source port, or, if the answers of another connection look the same, under
/// another; returns the ports that packets to the backend get.
#[inline(always)]
fn settle_port<F: Way>(
    reply: &mut Flow<F::Addr>,
    sent: Tuple<'_, F::Addr>,
    to: Tuple<'_, F::Addr>,
    protocol: u8,
    draw: Draw,
) -> Result<u32, Drop>
where
    Maps: Tables<F>,
{
    let mut source = draw.first;
    let back = Tuple { src: sent.dst, dst: sent.src, ports: sent.ports.rotate_left(16) };
    for _ in 0..TRIES {
        let ports = source | to.ports;
        let come = Tuple { src: to.dst, dst: to.src, ports: ports.rotate_left(16) };
        let (key, from_high) = flow::key::<F>(come.src, come.dst, come.ports, protocol);
        reply.initiator = from_high;
        nat::translate::<F>(reply, come, back);
        // An insertion that is refused takes as long as one that is not.
        // SAFETY: only whether there is one counts.
        let taken = unsafe { F::flows().get(&key) }.is_some();
        if !taken && F::flows().insert(&key, &*reply, u64::from(BPF_NOEXIST)).is_ok() {
            return Ok(ports);
        }
        if is_free::<F>(&key, back) {
            // Full, or its last connection is over: the packet goes its way in either case.
            let _full = F::flows().insert(&key, &*reply, 0);
            return Ok(ports);
        }
        if protocol == SCTP {
            break;
        }
        count(PathCounter::PortRemapped as u32, 0);
        // SAFETY: the helper has no preconditions.
        source = u32::from(draw.others.draw(unsafe { bpf_get_prandom_u32() }));
    }
    Err(Drop::SnatPortsExhausted)
}

/// Whether the entry of this key may be overwritten by that of answers which become `back`.
#[inline(always)]
fn is_free<F: Way>(key: &FlowKey<F::Addr>, back: Tuple<'_, F::Addr>) -> bool
where
    Maps: Tables<F>,
{
    // SAFETY: read at once; an entry that is reused meanwhile is a race that every preallocated map has.
    let Some(taken) = (unsafe { F::flows().get(key) }) else { return true };
    let [side, other] = &taken.directions;
    let over = (side.flags | other.flags) & (flow_flags::FIN | flow_flags::RST) != 0;
    let own = side.flags & flow_flags::NAT != 0
        && taken.nat_ports == back.ports
        && F::same(&taken.nat_src, back.src)
        && F::same(&taken.nat_dst, back.dst);
    own || over || drift::<F>(taken) > POLICY_EPOCH_MASK
}
