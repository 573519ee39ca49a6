//! The way of a packet through the tables: found in the flow table and sent, or decided, remembered and sent.

use aya_ebpf::bindings::{__sk_buff, bpf_redir_neigh};
use aya_ebpf::helpers::{bpf_redirect_neigh, bpf_redirect_peer};
use terway_abi::{
    Action, Drop, Endpoint, Flow, FlowKey, FragmentKey, FragmentValue, HOOK_IN, HOOK_TO_POD, Kind, MARK_CHECKED,
    Nexthop, Program, flow_flags,
};

use super::exit::{Verdict, count, now};
use super::maps::{Kernel, Maps};
use super::skb::{Skb, Window};
use crate::decide::{self, Decision, Tables};
use crate::family::{Family, V4, V6};
use crate::flow::{self, Route};
use crate::frame::Frame;
use crate::icmp;
use crate::neighbour;
use crate::parse::{Fragment, Packet, Payload, ethertype};

/// What a family needs to go this way.
pub trait Way: Kernel + icmp::Inner {}
impl<F: Kernel + icmp::Inner> Way for F {}

/// Programs as constants, so that each is compiled for what it is.
pub const FROM_POD: u8 = Program::FromPod as u8;
/// See [`FROM_POD`].
pub const TO_POD: u8 = Program::ToPod as u8;
/// See [`FROM_POD`].
pub const FROM_VPC: u8 = Program::FromVpc as u8;

#[inline(always)]
const fn hook<const PROGRAM: u8>() -> u8 {
    if PROGRAM == TO_POD { HOOK_TO_POD } else { HOOK_IN }
}

/// The fast path: a packet of common shape whose flow is known. `None` if there is more to it.
#[inline(always)]
pub fn established<F: Way, const PROGRAM: u8>(skb: Skb, window: Window) -> Option<Verdict>
where
    Maps: Tables<F>,
{
    let glance = F::glance(&window)?;
    let key = flow::key(glance.src, glance.dst, glance.ports, glance.protocol, (skb.ifindex(), hook::<PROGRAM>()));
    let entry = lookup::<F, PROGRAM>(&key, &window)?;
    if glance.tcp_flags & flow::NOTABLE != 0 {
        if !flow::continues(entry.flags, glance.tcp_flags) {
            return None;
        }
        entry.flags |= flow::remembered(glance.tcp_flags);
    }
    Some(use_entry::<F, PROGRAM>(skb, window, entry))
}

/// The entry of this key, if it still holds and the frame is from whom it was made for.
#[inline(always)]
fn lookup<F: Way, const PROGRAM: u8>(key: &FlowKey<F::Addr>, window: &Window) -> Option<&'static mut Flow<F::Addr>>
where
    Maps: Tables<F>,
{
    let entry = F::flows().get_ptr_mut(key)?;
    // SAFETY: the value stays mapped for the program's run. Other CPUs may count in it at the same time, which `Flow` allows for; an
    // entry that is evicted and reused meanwhile is a race that every preallocated map has.
    let entry = unsafe { &mut *entry };
    if PROGRAM == FROM_POD && window.macs()? != entry.expect {
        return None;
    }
    decide::holds::<F, _>(&Maps, entry.slots, entry.epochs).then_some(entry)
}

#[inline(always)]
fn use_entry<F: Way, const PROGRAM: u8>(skb: Skb, window: Window, entry: &'static mut Flow<F::Addr>) -> Verdict {
    entry.packets += 1;
    entry.bytes += u64::from(skb.len());
    // In the same cache line as the counters, so writing it each time costs nothing.
    entry.last_seen = now();
    send::<F, PROGRAM>(skb, window, entry)
}

/// Does with a packet what its flow says.
#[inline(always)]
fn send<F: Way, const PROGRAM: u8>(skb: Skb, mut window: Window, flow: &Flow<F::Addr>) -> Verdict {
    let kinds = const { kinds::<PROGRAM>() };
    if PROGRAM == TO_POD || flow.action == Action::Stack as u32 {
        return Verdict::next(kinds.stack);
    }
    if F::hop(&mut window).is_none() {
        // The stack finds the same and answers with an ICMP error; the source has been checked.
        return Verdict::next(Kind::TtlExpired);
    }
    if PROGRAM == FROM_VPC && F::VERSION == 6 {
        skb.hop_limit_fell();
    }
    if PROGRAM == FROM_POD && flow.action == Action::Vpc as u32 {
        skb.set_mark(MARK_CHECKED);
        let nexthop: *const Nexthop = &flow.nexthop;
        // SAFETY: `Nexthop` has the layout of `bpf_redir_neigh` (asserted below), and the helper only reads it.
        let action = unsafe { bpf_redirect_neigh(flow.oif, nexthop.cast_mut().cast(), size_of::<Nexthop>() as i32, 0) };
        return Verdict::with_action(action as i32, kinds.vpc);
    }
    // The pod's kernel does not look at the addresses any more, but a bridge or a packet capture in the pod does.
    if window.write(0, flow.write).is_none() {
        return Verdict::drop(Drop::Truncated);
    }
    // SAFETY: the helper has no preconditions; an interface that is gone makes it a drop.
    let action = unsafe { bpf_redirect_peer(flow.oif, 0) };
    Verdict::with_action(action as i32, kinds.local)
}

const _: () = assert!(size_of::<Nexthop>() == size_of::<bpf_redir_neigh>());

struct Kinds {
    stack: Kind,
    local: Kind,
    vpc: Kind,
}

const fn kinds<const PROGRAM: u8>() -> Kinds {
    match PROGRAM {
        FROM_POD => Kinds { stack: Kind::PodToHost, local: Kind::PodToPod, vpc: Kind::PodToVpc },
        TO_POD => Kinds { stack: Kind::HostToPod, local: Kind::HostToPod, vpc: Kind::HostToPod },
        _ => Kinds { stack: Kind::VpcToHost, local: Kind::VpcToPod, vpc: Kind::VpcToPod },
    }
}

/// Everything that the fast path left. Not inlined: the fast path stays small, and its stack frame too.
#[inline(never)]
pub fn first<F: Way, const PROGRAM: u8>(ctx: *mut __sk_buff) -> Verdict
where
    Maps: Tables<F>,
    Checks: Neighbourly<F>,
{
    decided::<F, PROGRAM>(Skb(ctx)).into()
}

#[inline(always)]
fn decided<F: Way, const PROGRAM: u8>(skb: Skb) -> Result<Verdict, Drop>
where
    Maps: Tables<F>,
    Checks: Neighbourly<F>,
{
    let window = skb.pull();
    let mut packet = Packet::<F>::new();
    F::parse(&window, &mut packet)?;
    let place = (skb.ifindex(), hook::<PROGRAM>());

    if packet.payload == Payload::Neighbour {
        if PROGRAM == FROM_POD {
            Checks::neighbour(&window, &packet, endpoint::<F>(skb)?)?;
        }
        return Ok(Verdict::next(Kind::Neighbour));
    }
    if packet.fragment != Fragment::Whole {
        reassociate::<F, PROGRAM>(&mut packet, place)?;
    }
    let key = if packet.payload == Payload::IcmpError {
        match icmp::answer::<_, F>(&window, packet.inner) {
            // The answer must go where the error goes, and from a pod it must come from the pod.
            Some(of) if F::same(&of.dst, &packet.dst) && (PROGRAM != FROM_POD || F::same(&of.src, &packet.src)) => {
                flow::key(of.src, of.dst, of.ports, of.protocol, place)
            }
            _ => flow::key(packet.src, packet.dst, 0, packet.protocol, place),
        }
    } else {
        flow::key(packet.src, packet.dst, packet.ports, packet.protocol, place)
    };
    if let Some(entry) = lookup::<F, PROGRAM>(&key, &window) {
        // A router's error has the router's address: from the VPC it must not be a pod's.
        let lies =
            PROGRAM == FROM_VPC && packet.payload == Payload::IcmpError && Maps.by_address(&packet.src).is_some();
        if !lies && flow::continues(entry.flags, packet.tcp_flags) {
            entry.flags |= flow::remembered(packet.tcp_flags);
            return Ok(use_entry::<F, PROGRAM>(skb, window, entry));
        }
    }
    let decision = match PROGRAM {
        FROM_POD => decide::from_pod(&Maps, endpoint::<F>(skb)?, &packet, window.macs().ok_or(Drop::Truncated)?)?,
        TO_POD => decide::to_pod(&Maps, &packet, skb.ifindex())?,
        _ => decide::from_vpc(&Maps, &packet, skb.ifindex())?,
    };
    match decision {
        Decision::NotOurs => Ok(Verdict::next(const { kinds::<PROGRAM>() }.stack)),
        Decision::Way(route) => Ok(remember::<F, PROGRAM>(skb, window, &packet, &key, &route)),
    }
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
fn reassociate<F: Way, const PROGRAM: u8>(packet: &mut Packet<F>, (ifindex, hook): (u32, u8)) -> Result<(), Drop> {
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

/// Writes the entries of both directions and sends the packet by the new one.
#[inline(always)]
fn remember<F: Way, const PROGRAM: u8>(
    skb: Skb,
    window: Window,
    packet: &Packet<F>,
    key: &FlowKey<F::Addr>,
    route: &Route<'_>,
) -> Verdict {
    let now = now();
    let mut flow: Flow<F::Addr> = Flow {
        packets: 0,
        bytes: 0,
        expect: terway_abi::MacPair([0; 3]),
        write: terway_abi::MacPair([0; 3]),
        action: 0,
        oif: 0,
        slots: [0; 2],
        epochs: [0; 2],
        flags: 0,
        last_seen: now,
        created: now,
        spare: 0,
        nexthop: Nexthop { family: 0, address: [0; 4] },
        rewrite_ports: 0,
        rewrite_src: F::NONE,
        rewrite_dst: F::NONE,
    };
    // ICMP errors that belong to no flow are not the beginning of one.
    if packet.payload != Payload::IcmpError {
        let back = route.back();
        let back_key = flow::answer_key(key, back.hook());
        // The other direction may have survived this one in the table: then it says which of them began.
        // SAFETY: only the flags are copied.
        let survivor = unsafe { F::flows().get(&back_key) }.map(|other| other.flags);
        let began = survivor.is_none_or(|flags| flags & flow_flags::REVERSE != 0);
        if survivor.is_none() || !began {
            // See `remembered`: a SYN begins a connection anew, whatever was before.
        }
        back.fill::<F>(&mut flow);
        flow.flags = if began { flow_flags::REVERSE } else { 0 };
        let full = F::flows().insert(&back_key, &flow, 0).is_err();
        route.fill::<F>(&mut flow);
        flow.flags =
            flow_flags::SEEN | if began { 0 } else { flow_flags::REVERSE } | flow::remembered(packet.tcp_flags);
        (flow.packets, flow.bytes) = (1, u64::from(skb.len()));
        let full = F::flows().insert(key, &flow, 0).is_err() || full;
        count(if full { Kind::FlowFull } else { Kind::FlowNew } as u32, skb.len());
    } else {
        route.fill::<F>(&mut flow);
    }
    send::<F, PROGRAM>(skb, window, &flow)
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
