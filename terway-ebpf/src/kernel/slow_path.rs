//! The slow path: understand the packet, decide, write the flow for both directions, and send it.
//!
//! The stack has 512 bytes for a whole chain of calls, so each stage is a function of its own, whose frame is gone when the next
//! one runs, and what they share lies on the [`Desk`].

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::bpf_printk;
use terway_abi::{
    Action, Drop, Endpoint, Flow, FragmentKey, FragmentValue, NO_BACKEND, POLICY_EPOCH_MASK, PORT_REMAPPED,
    PathCounter, flow_flags, is_epoch_between,
};

use super::exit::{Verdict, count, now};
use super::icmp_nat::Quote;
use super::policy_check::{STALE, STALE_MOVED, permitted, resume};
use super::maps::{DEBUG, Desk, Maps, Replaced};
use super::fast_path::{
    ANSWERS, Before, FROM_POD, FROM_VPC, Known, Layout, TO_POD, TO_VPC, Way, drift, entry, hook, is_stale, kinds,
    known, lookup, send, use_known,
};
use super::reject::refuse;
use super::service_nat::{prepare_both, recall, remember_both, serve};
use super::skb::{Skb, Window};
use super::flow_events::begun;
use crate::route::{self, Decision, Tables};
use crate::family::{Family, Glance, V4, V6};
use crate::flow::{self, Basis, Route};
use crate::frame::{Frame as _, zero};
use crate::icmp;
use crate::neighbour;
use crate::parse::{Fragment, Packet, Payload, ethertype, tcp_flags};
use crate::policy::{self, Policies};
use crate::service::{self, Services};

/// This CPU's desk; what an earlier packet left on it is still there.
#[inline(always)]
pub(super) fn desk<F: Way>() -> Option<&'static mut Desk<F>> {
    let desk = F::desk().get_ptr_mut(0)?;
    // SAFETY: the value is this CPU's own, and programs at these hooks do not preempt each other on a CPU. It began as zeros, which
    // are a value: integers, and enums that have a variant 0; and one is taken at a time.
    Some(unsafe { &mut *desk })
}

/// The first packet of a flow, of common shape: the fast path has read all there is to know.
#[inline(always)]
pub(super) fn first<F: Way, const PROGRAM: u8>(skb: Skb, glance: &Glance<F>, stale: bool, before: Before<F>) -> Verdict
where
    Maps: Tables<F> + Services<F> + Policies<F>,
{
    // An array of one entry always has it.
    let Some(desk) = desk::<F>() else { return Verdict::drop(Drop::Truncated) };
    desk.packet.clear();
    F::assign(&mut desk.packet.src, &glance.src);
    F::assign(&mut desk.packet.dst, &glance.dst);
    desk.packet.ports = glance.ports;
    (desk.packet.protocol, desk.packet.tcp_flags) = (glance.protocol, glance.tcp_flags);
    desk.packet.transport = F::TRANSPORT;
    desk.stale = if stale { STALE } else { 0 };
    note(&mut desk.replaced, before);
    decide_on::<F, PROGRAM>(skb, desk)
}

/// The stages of a packet that is understood.
#[inline(always)]
fn decide_on<F: Way, const PROGRAM: u8>(skb: Skb, desk: &mut Desk<F>) -> Verdict
where
    Maps: Tables<F> + Services<F> + Policies<F>,
{
    if desk.stale != 0 {
        let resumed = resume::<F, PROGRAM>(skb.0, desk);
        if !resumed.is_open() {
            return resumed;
        }
    }
    (desk.choice.member.backend, desk.choice.refused) = (NO_BACKEND, 0);
    F::assign(&mut desk.choice.address, &desk.packet.dst);
    (desk.choice.port, desk.choice.source) = (desk.packet.ports >> 16, 0);
    desk.choice.kept = if desk.replaced.translated != 0 { keep::<F>(desk) } else { 0 };
    let clients = PROGRAM == FROM_POD || PROGRAM == FROM_VPC;
    if clients && desk.choice.kept == 0 && service::is_served(desk.packet.protocol) && Maps.may_serve(&desk.packet.dst)
    {
        // Read back by `serve`.
        let _found = recall::<F>(desk);
        let early = serve::<F, PROGRAM>(skb.0, desk);
        if !early.is_open() {
            return early;
        }
        if desk.choice.refused != 0 {
            return refuse::<F, PROGRAM>(skb.0, &desk.packet);
        }
    }
    let early = settle::<F, PROGRAM>(skb.0, desk);
    if !early.is_open() {
        return early;
    }
    if desk.choice.seat == MOVED_ON {
        desk.stale = STALE_MOVED;
        let resumed = resume::<F, PROGRAM>(skb.0, desk);
        // Gone since it was found.
        return if resumed.is_open() { Verdict::drop(Drop::NotTranslatable) } else { resumed };
    }
    let sent = enter::<F, PROGRAM>(skb.0, desk);
    if !sent.is_drop() {
        begun::<F>(skb.0, desk, PROGRAM);
    }
    sent
}

/// A packet of another shape.
///
/// The stages are called from the program itself, not one from the other: their frames take turns on the stack.
#[inline(always)]
pub(super) fn unusual<F: Way, const PROGRAM: u8>(skb: Skb) -> Verdict
where
    Maps: Tables<F> + Services<F> + Policies<F>,
    Checks: Neighbourly<F>,
{
    let Some(desk) = desk::<F>() else { return Verdict::drop(Drop::Truncated) };
    desk.packet.clear();
    desk.stale = 0;
    note(&mut desk.replaced, Before { entry: None, from_high: 0 });
    let early = understand::<F, PROGRAM>(skb.0, desk);
    if early.is_related() {
        return relate::<F, PROGRAM>(skb.0, desk);
    }
    if !early.is_open() {
        return early;
    }
    if PROGRAM == TO_VPC {
        return Verdict::next(const { kinds::<PROGRAM>() }.stack);
    }
    decide_on::<F, PROGRAM>(skb, desk)
}

/// Parses the packet and looks up its flow. Ends early for what needs no decision.
#[inline(never)]
fn understand<F: Way, const PROGRAM: u8>(ctx: *mut __sk_buff, desk: &mut Desk<F>) -> Verdict
where
    Maps: Tables<F>,
    Checks: Neighbourly<F>,
{
    let understood = understood::<F, PROGRAM>(Skb(ctx), desk);
    // What comes from the VPC for the host is the host's to judge: fragments out of order, options, and all.
    if PROGRAM == FROM_VPC && understood.is_err() && Maps.by_address(&desk.packet.dst).is_none() {
        return Verdict::next(PathCounter::VpcToHost);
    }
    if PROGRAM == TO_VPC && understood.is_err() {
        return Verdict::next(PathCounter::HostToVpc);
    }
    understood.into()
}

#[inline(always)]
fn understood<F: Way, const PROGRAM: u8>(skb: Skb, desk: &mut Desk<F>) -> Result<Verdict, Drop>
where
    Maps: Tables<F>,
    Checks: Neighbourly<F>,
{
    let Desk { packet, quoted, stale, replaced, .. } = desk;
    let window = skb.pull();
    F::parse(&window, packet)?;
    let place = (skb.ifindex(), hook::<PROGRAM>());
    if packet.payload == Payload::Neighbour {
        if PROGRAM == FROM_POD {
            Checks::neighbour(&window, packet, endpoint::<F>(skb)?)?;
        }
        return Ok(Verdict::next(match PROGRAM {
            FROM_VPC => PathCounter::VpcToHost,
            TO_VPC => PathCounter::HostToVpc,
            _ => PathCounter::Neighbour,
        }));
    }
    if packet.fragment != Fragment::Whole {
        reassociate::<F>(packet, place)?;
    }
    if packet.payload == Payload::IcmpError {
        return Ok(quoting::<F, PROGRAM>(skb, window, packet, quoted));
    }
    // The fast path could not look it up.
    let (key, from_high) = flow::key::<F>(&packet.src, &packet.dst, packet.ports, packet.protocol);
    let entry = entry::<F>(&key);
    note(replaced, Before { entry, from_high });
    Ok(match entry.and_then(|entry| known::<F, PROGRAM>(skb, &window, entry, from_high)) {
        Some(known) if is_stale::<F, PROGRAM>(&known) => {
            *stale = STALE;
            Verdict::OPEN
        }
        Some(known) if flow::continues(known.side.flags, packet.tcp_flags) => {
            known.side.flags |= flow::remembered(packet.tcp_flags);
            use_known::<F, PROGRAM>(skb, window, known, layout(packet))
        }
        _ => Verdict::OPEN,
    })
}

/// An ICMP error goes the way of the flow it belongs to, if that is known, and judged as policies are now.
#[inline(always)]
fn quoting<F: Way, const PROGRAM: u8>(skb: Skb, window: Window, packet: &Packet<F>, quoted: &mut Packet<F>) -> Verdict
where
    Maps: Tables<F>,
{
    quoted.clear();
    if icmp::answer::<_, F>(&window, packet.inner as usize, quoted).is_none() {
        return Verdict::OPEN;
    }
    // It must go where that flow goes. From a pod it must also come from there; elsewhere it comes from any router, but a pod of
    // this node is none, and would not come in by an ENI.
    let goes = F::same(&quoted.src, &packet.dst);
    let comes = match PROGRAM {
        FROM_POD => F::same(&quoted.dst, &packet.src),
        FROM_VPC => Maps.by_address(&packet.src).is_none(),
        _ => true,
    };
    match flow_of_quoted::<F, PROGRAM>(skb, &window, quoted) {
        Some(known) if goes && comes && !is_stale::<F, PROGRAM>(&known) => match known.side.flags & flow_flags::NAT {
            0 => use_known::<F, PROGRAM>(skb, window, known, layout(packet)),
            _ => Verdict::RELATED,
        },
        _ => Verdict::OPEN,
    }
}

/// The flow is the quoted packet's, and the error goes the other way.
#[inline(always)]
fn flow_of_quoted<F: Way, const PROGRAM: u8>(skb: Skb, window: &Window, quoted: &Packet<F>) -> Option<Known<F>>
where
    Maps: Tables<F>,
{
    let (key, quoted_from_high) = flow::key::<F>(&quoted.src, &quoted.dst, quoted.ports, quoted.protocol);
    lookup::<F, PROGRAM>(skb, window, &key, quoted_from_high ^ 1)
}

/// An ICMP error about a flow whose packets are translated ([`Verdict::RELATED`]).
#[inline(never)]
fn relate<F: Way, const PROGRAM: u8>(ctx: *mut __sk_buff, desk: &Desk<F>) -> Verdict
where
    Maps: Tables<F>,
{
    let Desk { packet, quoted, .. } = desk;
    let (skb, window) = (Skb(ctx), Skb(ctx).window());
    let quote =
        Quote { icmp: packet.transport, packet: packet.inner, transport: quoted.transport, protocol: quoted.protocol };
    match flow_of_quoted::<F, PROGRAM>(skb, &window, quoted) {
        Some(known) => use_known::<F, PROGRAM>(skb, window, known, Layout { quote: Some(quote), ..layout(packet) }),
        // Gone since it was found.
        None => Verdict::drop(Drop::NotTranslatable),
    }
}

/// Decides: the way, and whether policies allow it. Open if they do; the flow's entry is on the desk then.
#[inline(never)]
fn settle<F: Way, const PROGRAM: u8>(ctx: *mut __sk_buff, desk: &mut Desk<F>) -> Verdict
where
    Maps: Tables<F> + Policies<F>,
{
    settled::<F, PROGRAM>(Skb(ctx), desk).into()
}

#[inline(always)]
fn settled<F: Way, const PROGRAM: u8>(skb: Skb, desk: &mut Desk<F>) -> Result<Verdict, Drop>
where
    Maps: Tables<F> + Policies<F>,
{
    let packet = &desk.packet;
    let served = (PROGRAM == FROM_POD || PROGRAM == FROM_VPC) && desk.choice.member.backend != NO_BACKEND;
    let decision = match PROGRAM {
        FROM_POD => {
            let macs = skb.window().macs().ok_or(Drop::Truncated)?;
            route::from_pod(&Maps, endpoint::<F>(skb)?, packet, &desk.choice.address, macs)?
        }
        TO_POD => route::to_pod(&Maps, packet, skb.ifindex())?,
        // An answer to this node in whose name its request was sent on, which goes on to the client.
        _ if served || !F::same(&desk.choice.address, &packet.dst) => {
            let only_here = served && desk.choice.local != 0;
            route::from_client::<F, _>(&Maps, &packet.src, &desk.choice.address, only_here, skb.ifindex())?
        }
        _ => route::from_vpc(&Maps, packet, skb.ifindex())?,
    };
    let Decision::Way(route) = decision else { return Ok(Verdict::next(const { kinds::<PROGRAM>() }.stack)) };
    let kept = desk.choice.kept != 0;
    let seat = match served {
        true => TAKEN,
        false if kept => FREE,
        false => seat::<F, PROGRAM>(skb, packet, &desk.replaced),
    };
    let answers = seat == FREE && answers::<F>(packet, &desk.replaced, &route);
    desk.choice.seat = seat;
    match seat {
        FREE => {
            prepare::<F>(&mut desk.flow, &route, answers);
            if kept && answers {
                translate_on::<F>(&mut desk.flow, &desk.reply);
            } else if !F::same(&desk.choice.address, &packet.dst) {
                // It looks like an answer, and comes from another pod than the one that was asked.
                return Err(Drop::NotTranslatable);
            }
        }
        TAKEN => prepare_both::<F, PROGRAM>(desk, &route)?,
        // It is judged when its entry is used.
        _ => return Ok(Verdict::OPEN),
    }
    Ok(permitted::<F>(desk, seat == TAKEN, answers))
}

/// Remembers what is on the desk, and sends the packet.
#[inline(never)]
fn enter<F: Way, const PROGRAM: u8>(ctx: *mut __sk_buff, desk: &mut Desk<F>) -> Verdict
where
    Maps: Tables<F>,
{
    let (skb, window) = (Skb(ctx), Skb(ctx).window());
    if desk.choice.seat == TAKEN {
        return remember_both::<F, PROGRAM>(skb, window, desk).into();
    }
    remember::<F, PROGRAM>(skb, window, &desk.packet, &mut desk.flow)
}

/// A connection can have the entry that its packets lead to.
const FREE: u32 = 0;
/// The answers of a Service's backend are there, which look the same: the connection gets another source port. Or it is for a Service.
const TAKEN: u32 = 1;
/// It has got another port already.
const MOVED_ON: u32 = 2;

/// Puts down what is replaced, before it may be gone.
#[inline(always)]
fn note<F: Way>(replaced: &mut Replaced, before: Before<F>)
where
    Maps: Tables<F>,
{
    let Before { entry, from_high } = before;
    let Some(old) = entry else {
        (replaced.taken, replaced.answers, replaced.translated) = (0, 0, 0);
        return;
    };
    // SAFETY: the value stays mapped for the program's run; an entry that is reused meanwhile is a race that every preallocated map
    // has.
    let old = unsafe { &mut *old };
    let ([side, other], by_other) = (&old.directions, old.initiator != from_high);
    let others = by_other && side.flags & flow_flags::NAT != 0;
    let reset = (side.flags | other.flags) & flow_flags::RST != 0;
    replaced.taken = u32::from(others && !reset && drift::<F>(old) <= POLICY_EPOCH_MASK);
    let ([makers, others], [at_makers, at_others]) = (old.slots, old.epochs);
    (replaced.slots, replaced.epochs) =
        if by_other { ([others, makers], [at_others, at_makers]) } else { ([makers, others], [at_makers, at_others]) };
    let flags = flow::side(old, from_high).flags;
    replaced.answers = flags & flow_flags::REPLY;
    replaced.translated = u32::from(flags & ANSWERS == ANSWERS);
}

/// Puts the entry of a translated answer on the desk, which is void, and where its translation sends it; 0 if it is none.
///
/// What has changed is the way, mostly of somebody else. The client knows nobody but the Service, so whatever the new way is, its answers
/// come from there.
#[inline(never)]
fn keep<F: Way>(desk: &mut Desk<F>) -> u32 {
    let Desk { packet, reply, choice, .. } = desk;
    if opens(packet) {
        return 0;
    }
    let (key, from_high) = flow::key::<F>(&packet.src, &packet.dst, packet.ports, packet.protocol);
    let Some(old) = entry::<F>(&key) else { return 0 };
    // SAFETY: copied at once; an entry that is reused meanwhile is a race that every preallocated map has.
    *reply = unsafe { *old };
    let [side, _] = &reply.directions;
    if reply.initiator != from_high || side.flags & ANSWERS != ANSWERS {
        return 0;
    }
    F::assign(&mut choice.address, &reply.nat_dst);
    1
}

/// Has a new entry translate as the old one did. What left by an ENI leaves by the same one: that of the client, and not the pod's.
#[inline(always)]
fn translate_on<F: Way>(flow: &mut Flow<F::Addr>, old: &Flow<F::Addr>) {
    let ([side, other], [before, _]) = (&mut flow.directions, &old.directions);
    if side.action == Action::Vpc as u32 && before.action == Action::Vpc as u32 {
        (side.oif, side.nexthop) = (before.oif, before.nexthop);
    }
    side.flags |= before.flags;
    // The requests have an entry of their own.
    // SAFETY: a side consists of integers.
    unsafe { zero(other) };
    F::assign(&mut flow.nat_src, &old.nat_src);
    F::assign(&mut flow.nat_dst, &old.nat_dst);
    (flow.nat_ports, flow.address_delta, flow.port_delta) = (old.nat_ports, old.address_delta, old.port_delta);
    (flow.backend, flow.generation, flow.service) = (old.backend, old.generation, old.service);
}

/// Where a connection stands.
#[inline(always)]
fn seat<F: Way, const PROGRAM: u8>(skb: Skb, packet: &Packet<F>, replaced: &Replaced) -> u32
where
    Maps: Tables<F>,
{
    if !service::is_served(packet.protocol) {
        return FREE;
    }
    let taken = replaced.taken != 0;
    // The other connection may have ended meanwhile. This one goes on where it is, and a new one need not look.
    if taken || packet.tcp_flags & tcp_flags::SYN == 0 {
        let (mut key, from_high) = flow::key::<F>(&packet.src, &packet.dst, packet.ports, packet.protocol);
        key.class |= PORT_REMAPPED;
        match lookup::<F, PROGRAM>(skb, &skb.window(), &key, from_high) {
            Some(known) if flow::continues(known.side.flags, packet.tcp_flags) => return MOVED_ON,
            _ => {}
        }
    }
    if taken { TAKEN } else { FREE }
}

/// Where a packet's transport header is.
#[inline(always)]
pub(super) fn layout<F: Family>(packet: &Packet<F>) -> Layout {
    let transport = if packet.fragment == Fragment::Later { 0 } else { packet.transport };
    Layout { protocol: packet.protocol, transport, quote: None }
}

/// Makes the entry of both directions, as far as the way decides about it.
#[inline(always)]
fn prepare<F: Way>(flow: &mut Flow<F::Addr>, route: &Route<'_>, answers: bool) {
    // SAFETY: a flow entry consists of integers.
    unsafe { zero(flow) };
    flow.slots = [route.source.slot, route.destination.slot];
    flow.epochs = [route.source.epoch, route.destination.epoch];
    let [side, other] = &mut flow.directions;
    route.fill::<F>(side);
    route.back().fill::<F>(other);
    let reverse = |it: bool| if it { flow_flags::REPLY } else { 0 };
    (side.flags, other.flags) = (flow_flags::SEEN | reverse(answers), reverse(!answers));
}

/// Writes the entry of both directions and sends the packet by it.
#[inline(always)]
fn remember<F: Way, const PROGRAM: u8>(
    skb: Skb,
    window: Window,
    packet: &Packet<F>,
    flow: &mut Flow<F::Addr>,
) -> Verdict {
    let (key, from_high) = flow::key::<F>(&packet.src, &packet.dst, packet.ports, packet.protocol);
    let now = now();
    (flow.created, flow.initiator) = (now, from_high);
    let whole: *const _ = flow;
    let [side, other] = &mut flow.directions;
    // An ICMP error that belongs to no flow is not the beginning of one.
    if packet.payload == Payload::IcmpError {
        return send::<F, PROGRAM>(skb, window, side, whole, layout(packet));
    }
    side.flags |= flow::remembered(packet.tcp_flags);
    (side.last_seen, other.last_seen) = (now, now);
    (side.packets, side.bytes) = (1, u64::from(skb.len()));
    let full = F::flows().insert(&key, &*flow, 0).is_err();
    count(if full { PathCounter::FlowInsertFailed } else { PathCounter::FlowNew } as u32, skb.len());
    let [side, _] = &flow.directions;
    if DEBUG.load() != 0 {
        // The branch is gone from the verified program when the global is 0.
        // SAFETY: the macro counts its arguments.
        unsafe { bpf_printk!(c"terway: flow on %d class %x action %d", side.ifindex, key.class, side.action) };
    }
    send::<F, PROGRAM>(skb, window, side, whole, layout(packet))
}

/// Whether the sender of this packet is the one who answers: so says the entry that it is about to replace, if that was made between
/// the same pods. What voids an entry is where packets go, and not who began.
///
/// What the packet says of itself does not count, as it would open a way past policies: without an entry, who speaks first began.
#[inline(always)]
fn answers<F: Way>(packet: &Packet<F>, replaced: &Replaced, route: &Route<'_>) -> bool {
    if opens(packet) || replaced.answers == 0 {
        return false;
    }
    let ([own, other], [at_own, at_other]) = (replaced.slots, replaced.epochs);
    let same = |slot: u32, epoch: u32, now: Basis| {
        !policy::is_pod(now.slot) || slot == now.slot && is_epoch_between(now.since, epoch, now.epoch)
    };
    same(own, at_own, route.source) && same(other, at_other, route.destination)
}

/// Whether a packet can only be the first of a connection.
#[inline(always)]
fn opens<F: Family>(packet: &Packet<F>) -> bool {
    const BOTH: u8 = tcp_flags::SYN | tcp_flags::ACK;
    packet.tcp_flags & BOTH == tcp_flags::SYN
}

#[inline(always)]
pub(super) fn endpoint<F: Family>(skb: Skb) -> Result<&'static Endpoint, Drop>
where
    Maps: Tables<F>,
{
    const MAPS: &Maps = &Maps;
    MAPS.by_ifindex(skb.ifindex()).ok_or(Drop::UnknownEndpoint)
}

/// Notes the ports of a first fragment, and gives them to the later ones.
#[inline(always)]
fn reassociate<F: Way>(packet: &mut Packet<F>, (ifindex, hook): (u32, u8)) -> Result<(), Drop> {
    let key = FragmentKey {
        src: packet.src,
        dst: packet.dst,
        id: packet.fragment_id,
        ifindex,
        class: u32::from(packet.protocol) | u32::from(hook) << 8,
        spare: 0,
    };
    if packet.fragment == Fragment::First {
        let value = FragmentValue { ports: packet.ports, seen: now() };
        // If the table does not take it, the later fragments are dropped with their own reason.
        let _full = F::fragments().insert(&key, &value, 0);
        return Ok(());
    }
    // SAFETY: copied at once; a value that is reused meanwhile gives other ports, and the flow decides for those.
    let value = unsafe { F::fragments().get(&key) }.ok_or(Drop::UnknownFragment)?;
    packet.ports = value.ports;
    Ok(())
}

/// Neighbour discovery exists in one family only.
pub trait Neighbourly<F: Family> {
    /// See [`neighbour::check_neighbour`].
    ///
    /// # Errors
    /// The reason to drop it.
    fn neighbour(window: &Window, packet: &Packet<F>, pod: &Endpoint) -> Result<(), Drop>;
}

/// The checks of neighbour messages.
pub struct Checks;

impl Neighbourly<V4> for Checks {
    #[inline(always)]
    fn neighbour(_: &Window, _: &Packet<V4>, _: &Endpoint) -> Result<(), Drop> {
        Ok(())
    }
}

impl Neighbourly<V6> for Checks {
    #[inline(always)]
    fn neighbour(window: &Window, packet: &Packet<V6>, pod: &Endpoint) -> Result<(), Drop> {
        neighbour::check_neighbour(window, packet, pod)
    }
}

/// A frame from a pod that is not IP.
#[inline(never)]
pub fn other(ctx: *mut __sk_buff) -> Verdict {
    let skb = Skb(ctx);
    let window = skb.pull();
    let checked = match window.ethertype() {
        Some(ethertype::ARP) => endpoint::<V4>(skb)
            .and_then(|pod| neighbour::check_arp(&window, pod))
            .map(|()| Verdict::next(PathCounter::Neighbour)),
        Some(_) => Err(Drop::UnknownEthertype),
        None => Err(Drop::Truncated),
    };
    checked.into()
}
