//! The slow path: understand the packet, decide, write the flow in both directions, and send it.
//!
//! The stack has 512 bytes for a whole chain of calls, so each stage is a function of its own, whose frame is gone when the next
//! one runs, and what they share is the [`Packet`].

use core::mem::MaybeUninit;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::bpf_printk;
use terway_abi::{Drop, Endpoint, Flow, FlowKey, FragmentKey, FragmentValue, Kind, flow_flags};

use super::exit::{Verdict, count, now};
use super::maps::{DEBUG, Maps};
use super::path::{FROM_POD, FROM_VPC, TO_POD, Way, hook, kinds, lookup, send, use_entry};
use super::skb::{Skb, Window};
use crate::decide::{self, Decision, Tables};
use crate::family::{Family, V4, V6};
use crate::flow::{self, Route};
use crate::frame::{Frame as _, zero};
use crate::icmp;
use crate::neighbour;
use crate::parse::{Fragment, Packet, Payload, ethertype, tcp_flags};

/// The first packet of a flow, of common shape: the fast path has read all there is to know.
#[inline(always)]
pub(super) fn first<F: Way, const PROGRAM: u8>(skb: Skb, key: &FlowKey<F::Addr>, tcp_flags: u8) -> Verdict
where
    Maps: Tables<F>,
{
    let mut packet = MaybeUninit::<Packet<F>>::uninit();
    // SAFETY: `Packet` consists of integers, and of enums that have a variant 0.
    let packet = unsafe { zero(&mut packet) };
    (packet.key, packet.protocol, packet.tcp_flags) = (*key, key.protocol(), tcp_flags);
    settle::<F, PROGRAM>(skb.0, packet)
}

/// A packet of another shape.
///
/// Both stages are called from the program itself, not one from the other: their frames take turns on the stack.
#[inline(always)]
pub(super) fn unusual<F: Way, const PROGRAM: u8>(skb: Skb) -> Verdict
where
    Maps: Tables<F>,
    Checks: Neighbourly<F>,
{
    let mut packet = MaybeUninit::<Packet<F>>::uninit();
    // SAFETY: as in `first`.
    let packet = unsafe { zero(&mut packet) };
    let early = understand::<F, PROGRAM>(skb.0, packet);
    if early.is_open() { settle::<F, PROGRAM>(skb.0, packet) } else { early }
}

/// Parses the packet and looks up its flow. Ends early for what needs no decision.
#[inline(never)]
fn understand<F: Way, const PROGRAM: u8>(ctx: *mut __sk_buff, packet: &mut Packet<F>) -> Verdict
where
    Maps: Tables<F>,
    Checks: Neighbourly<F>,
{
    let understood = understood::<F, PROGRAM>(Skb(ctx), packet);
    // What comes from the VPC for the host is the host's to judge: fragments out of order, options, and all.
    if PROGRAM == FROM_VPC && understood.is_err() && Maps.by_address(&packet.key.dst).is_none() {
        return Verdict::next(Kind::VpcToHost);
    }
    understood.into()
}

#[inline(always)]
fn understood<F: Way, const PROGRAM: u8>(skb: Skb, packet: &mut Packet<F>) -> Result<Verdict, Drop>
where
    Maps: Tables<F>,
    Checks: Neighbourly<F>,
{
    let window = skb.pull();
    F::parse(&window, packet)?;
    let place = (skb.ifindex(), hook::<PROGRAM>());
    if packet.payload == Payload::Neighbour {
        if PROGRAM == FROM_POD {
            Checks::neighbour(&window, packet, endpoint::<F>(skb)?)?;
        }
        return Ok(Verdict::next(if PROGRAM == FROM_VPC { Kind::VpcToHost } else { Kind::Neighbour }));
    }
    if packet.fragment != Fragment::Whole {
        reassociate::<F>(packet, place)?;
    }
    flow::complete(&mut packet.key, packet.protocol, place);
    if packet.payload == Payload::IcmpError {
        return Ok(quoting::<F, PROGRAM>(skb, window, packet));
    }
    // The fast path could not look it up.
    Ok(match lookup::<F, PROGRAM>(skb, &window, &packet.key) {
        Some(entry) if flow::continues(entry.flags, packet.tcp_flags) => {
            entry.flags |= flow::remembered(packet.tcp_flags);
            use_entry::<F, PROGRAM>(skb, window, entry)
        }
        _ => Verdict::OPEN,
    })
}

/// An ICMP error goes the way of the flow it belongs to, if that is known.
#[inline(always)]
fn quoting<F: Way, const PROGRAM: u8>(skb: Skb, window: Window, packet: &Packet<F>) -> Verdict
where
    Maps: Tables<F>,
{
    let mut quoted = MaybeUninit::<Packet<F>>::uninit();
    // SAFETY: as in `first`.
    let quoted = unsafe { zero(&mut quoted) };
    if icmp::answer::<_, F>(&window, packet.inner as usize, quoted).is_none() {
        return Verdict::OPEN;
    }
    flow::complete(&mut quoted.key, quoted.protocol, (0, 0));
    flow::turn(&mut quoted.key, (skb.ifindex(), hook::<PROGRAM>()));
    // It must go where that flow goes. From a pod it must also come from there; elsewhere it comes from any router, but a pod of
    // this node is none, and would not come in by an ENI.
    let goes = F::same(&quoted.key.dst, &packet.key.dst);
    let comes = match PROGRAM {
        FROM_POD => F::same(&quoted.key.src, &packet.key.src),
        FROM_VPC => Maps.by_address(&packet.key.src).is_none(),
        _ => true,
    };
    match lookup::<F, PROGRAM>(skb, &window, &quoted.key) {
        Some(entry) if goes && comes => use_entry::<F, PROGRAM>(skb, window, entry),
        _ => Verdict::OPEN,
    }
}

/// Decides.
#[inline(never)]
fn settle<F: Way, const PROGRAM: u8>(ctx: *mut __sk_buff, packet: &mut Packet<F>) -> Verdict
where
    Maps: Tables<F>,
{
    settled::<F, PROGRAM>(Skb(ctx), packet).into()
}

#[inline(always)]
fn settled<F: Way, const PROGRAM: u8>(skb: Skb, packet: &mut Packet<F>) -> Result<Verdict, Drop>
where
    Maps: Tables<F>,
{
    let window = skb.window();
    let decision = match PROGRAM {
        FROM_POD => decide::from_pod(&Maps, endpoint::<F>(skb)?, packet, window.macs().ok_or(Drop::Truncated)?)?,
        TO_POD => decide::to_pod(&Maps, packet, skb.ifindex())?,
        _ => decide::from_vpc(&Maps, packet, skb.ifindex())?,
    };
    match decision {
        Decision::NotOurs => Ok(Verdict::next(const { kinds::<PROGRAM>() }.stack)),
        Decision::Way(route) => Ok(remember::<F, PROGRAM>(skb, window, packet, &route)),
    }
}

/// Writes the entries of both directions and sends the packet by the new one.
#[inline(always)]
fn remember<F: Way, const PROGRAM: u8>(skb: Skb, window: Window, packet: &mut Packet<F>, route: &Route<'_>) -> Verdict
where
    Maps: Tables<F>,
{
    let mut flow = MaybeUninit::<Flow<F::Addr>>::uninit();
    // SAFETY: a flow entry consists of integers.
    let flow = unsafe { zero(&mut flow) };
    let now = now();
    (flow.created, flow.last_seen) = (now, now);
    // An ICMP error that belongs to no flow is not the beginning of one.
    if packet.payload == Payload::IcmpError {
        route.fill::<F>(flow);
        return send::<F, PROGRAM>(skb, window, flow);
    }
    let back = route.back();
    flow::turn(&mut packet.key, back.hook());
    let began = opens(packet.tcp_flags) || !answers::<F>(&packet.key);
    back.fill::<F>(flow);
    flow.flags = if began { flow_flags::REVERSE } else { 0 };
    let full = F::flows().insert(&packet.key, &*flow, 0).is_err();

    flow::turn(&mut packet.key, (skb.ifindex(), hook::<PROGRAM>()));
    route.fill::<F>(flow);
    let reverse = if began { 0 } else { flow_flags::REVERSE };
    flow.flags = flow_flags::SEEN | reverse | flow::remembered(packet.tcp_flags);
    (flow.packets, flow.bytes) = (1, u64::from(skb.len()));
    let full = F::flows().insert(&packet.key, &*flow, 0).is_err() || full;
    count(if full { Kind::FlowFull } else { Kind::FlowNew } as u32, skb.len());
    if DEBUG.load() != 0 {
        // The branch is gone from the verified program when the global is 0.
        // SAFETY: the macro counts its arguments.
        unsafe {
            bpf_printk!(c"terway: flow on %d class %x action %d", packet.key.ifindex, packet.key.class, flow.action)
        };
    }
    send::<F, PROGRAM>(skb, window, flow)
}

/// Whether these TCP flags begin a connection, whatever was before.
#[inline(always)]
const fn opens(tcp: u8) -> bool {
    tcp & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN
}

/// Whether the other direction, of this key, survived in the table and says that it was the first: then this one answers.
#[inline(always)]
fn answers<F: Way>(other: &FlowKey<F::Addr>) -> bool
where
    Maps: Tables<F>,
{
    // SAFETY: read at once; of an entry that is reused meanwhile, the epochs decide whether it counts.
    let Some(other) = (unsafe { F::flows().get(other) }) else { return false };
    other.flags & flow_flags::REVERSE == 0 && decide::holds::<F, _>(&Maps, other.slots, other.epochs)
}

#[inline(always)]
fn endpoint<F: Family>(skb: Skb) -> Result<&'static Endpoint, Drop>
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
        src: packet.key.src,
        dst: packet.key.dst,
        id: packet.fragment_id,
        ifindex,
        class: u32::from(packet.protocol) | u32::from(hook) << 8,
        spare: 0,
    };
    if packet.fragment == Fragment::First {
        let value = FragmentValue { ports: packet.key.ports, seen: now() };
        // If the table does not take it, the later fragments are dropped with their own reason.
        let _full = F::fragments().insert(&key, &value, 0);
        return Ok(());
    }
    // SAFETY: copied at once; a value that is reused meanwhile gives other ports, and the flow decides for those.
    let value = unsafe { F::fragments().get(&key) }.ok_or(Drop::UnknownFragment)?;
    packet.key.ports = value.ports;
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
            .map(|()| Verdict::next(Kind::Neighbour)),
        Some(_) => Err(Drop::UnknownEthertype),
        None => Err(Drop::Truncated),
    };
    checked.into()
}
