//! The slow path: packets without a usable flow entry. A state machine of stages.
//!
//! | stage | outcome | next |
//! |---|---|---|
//! | [`parse_and_lookup`] (packets without common headers) | [`Outcome::Done`] | return the verdict |
//! | | [`Outcome::RelatedIcmp`] | [`forward_related_icmp`] → return |
//! | | [`Outcome::StalePolicy`] | [`recheck_policy`] |
//! | | [`Outcome::Continue`] | [`keep_reply_nat`] |
//! | conntrack lookup of the fast path (packets with common headers) | policy stale | [`recheck_policy`] |
//! | | else | [`keep_reply_nat`] |
//! | [`recheck_policy`] | [`Outcome::Done`] | return the verdict |
//! | | [`Outcome::Continue`] (entry not usable any more) | [`keep_reply_nat`] |
//! | [`keep_reply_nat`] (previous entry translated replies) | reply | [`route_and_check_policy`] |
//! | | else | [`select_service_backend`] |
//! | [`lookup_previous_backend`], [`select_service_backend`] (destination may be a Service) | [`Outcome::Done`] | return the verdict |
//! | | [`Outcome::Reject`] | [`reject()`] → return |
//! | | [`Outcome::Continue`] | [`route_and_check_policy`] |
//! | [`route_and_check_policy`] | [`Outcome::Done`] | return the verdict |
//! | | [`Outcome::UseRemapped`] | [`recheck_policy`] of the key with [`PORT_REMAPPED`] → return |
//! | | [`Outcome::CreateEntry`], [`Outcome::CreateNatPair`] | [`create_entry`] |
//! | [`create_entry`], which emits the packet | verdict | [`report_new_connection`] if not dropped → return |
//!
//! Each stage is an `inline(never)` function that is called from the program itself: its stack frame is gone when the next stage runs (the
//! limit is 512 bytes for the whole call chain). Stages share the [`Scratch`] memory.

use aya_ebpf::bindings::__sk_buff;
use terway_abi::{Action, Drop, Flow, POLICY_EPOCH_MASK, PORT_REMAPPED, PathCounter, flow_flags, is_epoch_between};

use super::counters::{count, jiffies};
use super::debug_log;
use super::flow_events::report_new_connection;
use super::flow_table::{FlowHit, Lookup, REPLY_NAT, check_entry, entry, epoch_diff, is_policy_stale, lookup};
use super::forward::{emit, forward_hit};
use super::fragments::resolve_ports;
use super::hook::{FROM_POD, FROM_VPC, TO_POD, TO_VPC, hook, path_counters};
use super::icmp_nat::QuotedPacket;
use super::maps::{DatapathFamily, Maps, sending_endpoint};
use super::nat::PacketLayout;
use super::neighbour::{Checks, NeighbourCheck};
use super::policy_check::{check_new_flow, recheck_policy};
use super::reject::reject;
use super::scratch::{PreviousEntry, Scratch};
use super::service_nat::{create_nat_pair, lookup_previous_backend, prepare_nat_pair, select_service_backend};
use super::skb::{Skb, Window};
use super::verdict::{Outcome, StageResult, Verdict};
use crate::family::{Family, FastHeaders};
use crate::flow::{self, EpochRef, Route};
use crate::frame::{Frame as _, zero};
use crate::icmp;
use crate::parse::{Fragment, Packet, Payload, tcp_flags};
use crate::policy::{self, Policies};
use crate::route::{self, RouteDecision, Tables};
use crate::service::{self, Services};

/// This CPU's scratch memory. It still holds what an earlier packet left.
#[inline(always)]
fn scratch<F: DatapathFamily>() -> Option<&'static mut Scratch<F>> {
    let scratch = F::scratch().get_ptr_mut(0)?;
    // SAFETY: the value belongs to this CPU, and programs at these hooks do not preempt each other on a CPU. Zeros are valid: integers,
    // booleans, and enums with a variant 0. One reference is taken per packet.
    Some(unsafe { &mut *scratch })
}

/// Processes a packet with common headers, after the conntrack lookup of the fast path.
#[inline(always)]
pub(super) fn process_headers<F: DatapathFamily, const PROGRAM: u8>(
    skb: Skb,
    headers: &FastHeaders<F>,
    policy_stale: bool,
    lookup: Lookup<F>,
) -> Verdict
where
    Maps: Tables<F> + Services<F> + Policies<F>,
{
    // The array has one entry, so the lookup never fails.
    let Some(scratch) = scratch::<F>() else { return Verdict::drop(Drop::Truncated) };
    scratch.packet.clear();
    F::assign(&mut scratch.packet.src, &headers.src);
    F::assign(&mut scratch.packet.dst, &headers.dst);
    scratch.packet.ports = headers.ports;
    (scratch.packet.protocol, scratch.packet.tcp_flags) = (headers.protocol, headers.tcp_flags);
    scratch.packet.transport = F::TRANSPORT_OFFSET;
    snapshot_previous(&mut scratch.previous, lookup);
    run_stages::<F, PROGRAM>(skb, scratch, policy_stale)
}

/// Processes a packet without common headers: parses it first.
#[inline(always)]
pub(super) fn process_unparsed<F: DatapathFamily, const PROGRAM: u8>(skb: Skb) -> Verdict
where
    Maps: Tables<F> + Services<F> + Policies<F>,
    Checks: NeighbourCheck<F>,
{
    let Some(scratch) = scratch::<F>() else { return Verdict::drop(Drop::Truncated) };
    scratch.packet.clear();
    snapshot_previous(&mut scratch.previous, Lookup { entry: None, is_high_end: 0 });
    let policy_stale = match parse_and_lookup::<F, PROGRAM>(skb.0, scratch).outcome() {
        Outcome::Done(verdict) => return verdict,
        Outcome::RelatedIcmp => return forward_related_icmp::<F, PROGRAM>(skb.0, scratch),
        Outcome::StalePolicy => true,
        _ => false,
    };
    if PROGRAM == TO_VPC {
        return Verdict::pass(const { path_counters::<PROGRAM>() }.stack);
    }
    run_stages::<F, PROGRAM>(skb, scratch, policy_stale)
}

/// The stages of a parsed packet; see the table above.
#[inline(always)]
fn run_stages<F: DatapathFamily, const PROGRAM: u8>(skb: Skb, scratch: &mut Scratch<F>, policy_stale: bool) -> Verdict
where
    Maps: Tables<F> + Services<F> + Policies<F>,
{
    scratch.destination.set_original::<F>(&scratch.packet);
    if debug_log::is_on() {
        debug_log::packet::<F>(skb.0, scratch, u32::from(policy_stale));
    }
    if policy_stale && let Outcome::Done(verdict) = recheck_policy::<F, PROGRAM>(skb.0, scratch, 0).outcome() {
        if debug_log::is_on() {
            debug_log::policy_rechecked::<F>(skb.0, scratch);
        }
        return verdict;
    }
    scratch.destination.keeps_reply_nat = scratch.previous.is_reply_nat && keep_reply_nat::<F>(scratch) != 0;
    let has_clients = PROGRAM == FROM_POD || PROGRAM == FROM_VPC;
    if has_clients
        && !scratch.destination.keeps_reply_nat
        && service::is_supported_protocol(scratch.packet.protocol)
        && Maps.may_be_frontend(&scratch.packet.dst)
    {
        // The result is in the scratch memory.
        let _found = lookup_previous_backend::<F>(scratch);
        match select_service_backend::<F, PROGRAM>(skb.0, scratch).outcome() {
            Outcome::Done(verdict) => return logged(skb, verdict),
            Outcome::Reject => {
                if debug_log::is_on() {
                    debug_log::rejected::<F>(skb.0, scratch);
                }
                return reject::<F, PROGRAM>(skb.0, &scratch.packet);
            }
            _ if debug_log::is_on() => {
                debug_log::backend::<F>(skb.0, scratch);
            }
            _ => {}
        }
    }
    let has_nat = match route_and_check_policy::<F, PROGRAM>(skb.0, scratch).outcome() {
        Outcome::Done(verdict) => return logged(skb, verdict),
        Outcome::UseRemapped => {
            return match recheck_policy::<F, PROGRAM>(skb.0, scratch, PORT_REMAPPED).outcome() {
                Outcome::Done(verdict) => verdict,
                // The entry was deleted since the lookup.
                _ => Verdict::drop(Drop::NotTranslatable),
            };
        }
        Outcome::CreateNatPair => 1,
        _ => 0,
    };
    if debug_log::is_on() {
        debug_log::route::<F>(skb.0, scratch, has_nat);
    }
    let verdict = logged(skb, create_entry::<F, PROGRAM>(skb.0, scratch, has_nat));
    if !verdict.is_drop() {
        report_new_connection::<F>(skb.0, scratch, PROGRAM);
    }
    verdict
}

/// The verdict, written to the debug log.
#[inline(always)]
fn logged(skb: Skb, verdict: Verdict) -> Verdict {
    if debug_log::is_on() {
        debug_log::verdict(skb.0, verdict);
    }
    verdict
}

/// The stage of packets without common headers: parses the packet, resolves fragments, and looks up its flow entry.
#[inline(never)]
fn parse_and_lookup<F: DatapathFamily, const PROGRAM: u8>(ctx: *mut __sk_buff, scratch: &mut Scratch<F>) -> StageResult
where
    Maps: Tables<F>,
    Checks: NeighbourCheck<F>,
{
    let result = try_parse_and_lookup::<F, PROGRAM>(Skb(ctx), scratch);
    // Packets of the VPC to the host pass to the host stack, malformed ones and later fragments included.
    if PROGRAM == FROM_VPC && result.is_err() && Maps.by_address(&scratch.packet.dst).is_none() {
        return Outcome::Done(Verdict::pass(PathCounter::VpcToHost)).into();
    }
    if PROGRAM == TO_VPC && result.is_err() {
        return Outcome::Done(Verdict::pass(PathCounter::HostToVpc)).into();
    }
    result.into()
}

#[inline(always)]
fn try_parse_and_lookup<F: DatapathFamily, const PROGRAM: u8>(
    skb: Skb,
    scratch: &mut Scratch<F>,
) -> Result<Outcome, Drop>
where
    Maps: Tables<F>,
    Checks: NeighbourCheck<F>,
{
    let Scratch { packet, quoted, previous, .. } = scratch;
    let window = skb.pull();
    F::parse(&window, packet)?;
    if packet.payload == Payload::Neighbour {
        if PROGRAM == FROM_POD {
            Checks::check_neighbour(&window, packet, sending_endpoint::<F>(skb)?)?;
        }
        return Ok(Outcome::Done(Verdict::pass(match PROGRAM {
            FROM_VPC => PathCounter::VpcToHost,
            TO_VPC => PathCounter::HostToVpc,
            _ => PathCounter::Neighbour,
        })));
    }
    if packet.fragment != Fragment::Whole {
        resolve_ports::<F>(packet, (skb.ifindex(), hook::<PROGRAM>()))?;
    }
    if packet.payload == Payload::IcmpError {
        return Ok(lookup_quoted::<F, PROGRAM>(skb, window, packet, quoted));
    }
    let (key, is_high_end) = flow::flow_key::<F>(&packet.src, &packet.dst, packet.ports, packet.protocol);
    let entry = entry::<F>(&key);
    snapshot_previous(previous, Lookup { entry, is_high_end });
    Ok(match entry.and_then(|entry| check_entry::<F, PROGRAM>(skb, &window, entry, is_high_end)) {
        Some(hit) if is_policy_stale::<F, PROGRAM>(&hit) => Outcome::StalePolicy,
        Some(hit) if flow::is_same_connection(hit.direction.flags, packet.tcp_flags) => {
            hit.direction.flags |= flow::tracked_tcp_flags(packet.tcp_flags);
            Outcome::Done(forward_hit::<F, PROGRAM>(skb, window, hit, PacketLayout::of(packet)))
        }
        _ => Outcome::Continue,
    })
}

/// Looks up the flow that an ICMP error is related to, and forwards the error if the flow has no NAT and no stale policy.
#[inline(always)]
fn lookup_quoted<F: DatapathFamily, const PROGRAM: u8>(
    skb: Skb,
    window: Window,
    packet: &Packet<F>,
    quoted: &mut Packet<F>,
) -> Outcome
where
    Maps: Tables<F>,
{
    quoted.clear();
    if icmp::parse_quoted_packet::<_, F>(&window, packet.inner as usize, quoted).is_none() {
        return Outcome::Continue;
    }
    // The destination must be the quoted packet's source. An error from a pod must come from the quoted destination; an error from
    // elsewhere may come from any router, but no local pod arrives through an ENI.
    let has_destination = F::same(&quoted.src, &packet.dst);
    let has_source = match PROGRAM {
        FROM_POD => F::same(&quoted.dst, &packet.src),
        FROM_VPC => Maps.by_address(&packet.src).is_none(),
        _ => true,
    };
    match quoted_flow::<F, PROGRAM>(skb, &window, quoted) {
        Some(hit) if has_destination && has_source && !is_policy_stale::<F, PROGRAM>(&hit) => {
            match hit.direction.flags & flow_flags::NAT {
                0 => Outcome::Done(forward_hit::<F, PROGRAM>(skb, window, hit, PacketLayout::of(packet))),
                _ => Outcome::RelatedIcmp,
            }
        }
        _ => Outcome::Continue,
    }
}

/// The flow of a quoted packet, in the opposite direction: the one that the ICMP error takes.
#[inline(always)]
fn quoted_flow<F: DatapathFamily, const PROGRAM: u8>(
    skb: Skb,
    window: &Window,
    quoted: &Packet<F>,
) -> Option<FlowHit<F>>
where
    Maps: Tables<F>,
{
    let (key, is_high_end) = flow::flow_key::<F>(&quoted.src, &quoted.dst, quoted.ports, quoted.protocol);
    lookup::<F, PROGRAM>(skb, window, &key, is_high_end ^ 1)
}

/// The stage of an ICMP error about a flow with NAT: translates and forwards it.
#[inline(never)]
fn forward_related_icmp<F: DatapathFamily, const PROGRAM: u8>(ctx: *mut __sk_buff, scratch: &Scratch<F>) -> Verdict
where
    Maps: Tables<F>,
{
    let Scratch { packet, quoted, .. } = scratch;
    let (skb, window) = (Skb(ctx), Skb(ctx).window());
    let quote = QuotedPacket {
        icmp: packet.transport,
        packet: packet.inner,
        transport: quoted.transport,
        protocol: quoted.protocol,
    };
    match quoted_flow::<F, PROGRAM>(skb, &window, quoted) {
        Some(hit) => {
            let layout = PacketLayout { quote: Some(quote), ..PacketLayout::of(packet) };
            forward_hit::<F, PROGRAM>(skb, window, hit, layout)
        }
        // The entry was deleted since the lookup.
        None => Verdict::drop(Drop::NotTranslatable),
    }
}

/// The stage that decides the route of a new flow, prepares its entries, and checks it against the policies.
#[inline(never)]
fn route_and_check_policy<F: DatapathFamily, const PROGRAM: u8>(
    ctx: *mut __sk_buff,
    scratch: &mut Scratch<F>,
) -> StageResult
where
    Maps: Tables<F> + Policies<F>,
{
    try_route_and_check_policy::<F, PROGRAM>(Skb(ctx), scratch).into()
}

#[inline(always)]
fn try_route_and_check_policy<F: DatapathFamily, const PROGRAM: u8>(
    skb: Skb,
    scratch: &mut Scratch<F>,
) -> Result<Outcome, Drop>
where
    Maps: Tables<F> + Policies<F>,
{
    let packet = &scratch.packet;
    let to_backend = (PROGRAM == FROM_POD || PROGRAM == FROM_VPC) && scratch.destination.has_backend();
    let decision = match PROGRAM {
        FROM_POD => {
            let macs = skb.window().macs().ok_or(Drop::Truncated)?;
            route::from_pod(&Maps, sending_endpoint::<F>(skb)?, packet, &scratch.destination.address, macs)?
        }
        TO_POD => route::to_pod(&Maps, packet, skb.ifindex())?,
        // To a backend, or a reply to a masqueraded connection, which goes on to the client.
        _ if to_backend || !F::same(&scratch.destination.address, &packet.dst) => {
            let is_local_only = to_backend && scratch.destination.is_local_only;
            let (src, to) = (&packet.src, &scratch.destination.address);
            route::from_external_client::<F, _>(&Maps, src, to, is_local_only, skb.ifindex())?
        }
        _ => route::from_vpc(&Maps, packet, skb.ifindex())?,
    };
    let RouteDecision::Forward(route) = decision else {
        return Ok(Outcome::Done(Verdict::pass(const { path_counters::<PROGRAM>() }.stack)));
    };
    let keeps_reply_nat = scratch.destination.keeps_reply_nat;
    let tuple = match (to_backend, keeps_reply_nat) {
        (true, _) => TupleState::Collision,
        (false, true) => TupleState::Free,
        (false, false) => tuple_state::<F, PROGRAM>(skb, packet, &scratch.previous),
    };
    let (has_nat, is_reply) = match tuple {
        TupleState::Free => {
            let is_reply = is_reply::<F>(packet, &scratch.previous, &route);
            prepare_entry::<F>(&mut scratch.flow, &route, is_reply);
            if keeps_reply_nat && is_reply {
                copy_reply_nat::<F>(&mut scratch.flow, &scratch.reply_flow);
            } else if !F::same(&scratch.destination.address, &packet.dst) {
                // The tuple is that of a reply with NAT, but the sender is not the pod that the connection went to.
                return Err(Drop::NotTranslatable);
            }
            (false, is_reply)
        }
        TupleState::Collision => {
            prepare_nat_pair::<F, PROGRAM>(scratch, &route)?;
            (true, false)
        }
        // Its policies are checked when its entry is used.
        TupleState::Remapped => return Ok(Outcome::UseRemapped),
    };
    Ok(match check_new_flow::<F>(scratch, has_nat, is_reply).outcome() {
        Outcome::Done(denied) => Outcome::Done(denied),
        _ if has_nat => Outcome::CreateNatPair,
        _ => Outcome::CreateEntry,
    })
}

/// The stage that inserts the flow entries (two with `has_nat`), and emits the packet.
#[inline(never)]
fn create_entry<F: DatapathFamily, const PROGRAM: u8>(
    ctx: *mut __sk_buff,
    scratch: &mut Scratch<F>,
    has_nat: u32,
) -> Verdict
where
    Maps: Tables<F>,
{
    let (skb, window) = (Skb(ctx), Skb(ctx).window());
    if has_nat != 0 {
        return create_nat_pair::<F, PROGRAM>(skb, window, scratch).into();
    }
    create_single_entry::<F, PROGRAM>(skb, window, &scratch.packet, &mut scratch.flow)
}

/// The tuple of a new flow in the flow table.
#[derive(Clone, Copy)]
enum TupleState {
    /// The flow can be stored under its own tuple.
    Free,
    /// The flow needs NAT: it is for a Service, or its tuple is the reply tuple of another connection with NAT, and its source port must be
    /// remapped.
    Collision,
    /// The flow is stored under its key with [`PORT_REMAPPED`].
    Remapped,
}

/// The state of a packet's tuple, for a packet that is for no Service.
#[inline(always)]
fn tuple_state<F: DatapathFamily, const PROGRAM: u8>(
    skb: Skb,
    packet: &Packet<F>,
    previous: &PreviousEntry,
) -> TupleState
where
    Maps: Tables<F>,
{
    if !service::is_supported_protocol(packet.protocol) {
        return TupleState::Free;
    }
    // The other connection may have ended meanwhile: an established connection keeps its remapped port. A new one need not look.
    if previous.collides || packet.tcp_flags & tcp_flags::SYN == 0 {
        let (mut key, is_high_end) = flow::flow_key::<F>(&packet.src, &packet.dst, packet.ports, packet.protocol);
        key.class |= PORT_REMAPPED;
        match lookup::<F, PROGRAM>(skb, &skb.window(), &key, is_high_end) {
            Some(hit) if flow::is_same_connection(hit.direction.flags, packet.tcp_flags) => {
                return TupleState::Remapped;
            }
            _ => {}
        }
    }
    if previous.collides { TupleState::Collision } else { TupleState::Free }
}

/// Takes a snapshot of the entry that is about to be replaced.
#[inline(always)]
fn snapshot_previous<F: DatapathFamily>(previous: &mut PreviousEntry, lookup: Lookup<F>)
where
    Maps: Tables<F>,
{
    let Lookup { entry, is_high_end } = lookup;
    let Some(old) = entry else {
        (previous.collides, previous.is_reply, previous.is_reply_nat) = (false, false, false);
        return;
    };
    // SAFETY: the value stays mapped for the program run; an entry that is reused meanwhile is a race that every preallocated map has.
    let old = unsafe { &mut *old };
    let ([direction, other], is_responder) = (&old.directions, old.initiator != is_high_end);
    let is_foreign_reply = is_responder && direction.flags & flow_flags::NAT != 0;
    let is_reset = (direction.flags | other.flags) & flow_flags::RST != 0;
    previous.collides = is_foreign_reply && !is_reset && epoch_diff::<F>(old) <= POLICY_EPOCH_MASK;
    let ([initiator, responder], [at_initiator, at_responder]) = (old.slots, old.epochs);
    (previous.slots, previous.epochs) = if is_responder {
        ([responder, initiator], [at_responder, at_initiator])
    } else {
        ([initiator, responder], [at_initiator, at_responder])
    };
    let flags = flow::direction(old, is_high_end).flags;
    previous.is_reply = flags & flow_flags::REPLY != 0;
    previous.is_reply_nat = flags & REPLY_NAT == REPLY_NAT;
}

/// The stage that copies the invalid entry of a reply with NAT into the scratch memory, and takes its translated destination as the
/// destination; 0 if the packet is no such reply.
///
/// The entry is invalid because a route has changed. The client knows the Service's address only, so replies keep their NAT whatever the
/// new route is.
#[inline(never)]
fn keep_reply_nat<F: DatapathFamily>(scratch: &mut Scratch<F>) -> u32 {
    let Scratch { packet, reply_flow, destination, .. } = scratch;
    if is_syn(packet) {
        return 0;
    }
    let (key, is_high_end) = flow::flow_key::<F>(&packet.src, &packet.dst, packet.ports, packet.protocol);
    let Some(old) = entry::<F>(&key) else { return 0 };
    // SAFETY: copied at once; an entry that is reused meanwhile is a race that every preallocated map has.
    *reply_flow = unsafe { *old };
    let [direction, _] = &reply_flow.directions;
    if reply_flow.initiator != is_high_end || direction.flags & REPLY_NAT != REPLY_NAT {
        return 0;
    }
    F::assign(&mut destination.address, &reply_flow.nat_dst);
    1
}

/// Copies the NAT of the previous reply entry into the new one. If both leave through an ENI, the ENI and next hop stay too: they are those
/// of the client's uplink, not those of the pod.
#[inline(always)]
fn copy_reply_nat<F: DatapathFamily>(flow: &mut Flow<F::Addr>, old: &Flow<F::Addr>) {
    let ([direction, other], [previous, _]) = (&mut flow.directions, &old.directions);
    if direction.action == Action::Vpc as u32 && previous.action == Action::Vpc as u32 {
        (direction.oif, direction.nexthop) = (previous.oif, previous.nexthop);
    }
    direction.flags |= previous.flags;
    // The original direction has an entry of its own.
    // SAFETY: a direction consists of integers.
    unsafe { zero(other) };
    F::assign(&mut flow.nat_src, &old.nat_src);
    F::assign(&mut flow.nat_dst, &old.nat_dst);
    (flow.nat_ports, flow.address_delta, flow.port_delta) = (old.nat_ports, old.address_delta, old.port_delta);
    (flow.backend, flow.generation, flow.service) = (old.backend, old.generation, old.service);
}

/// Prepares the flow entry of both directions from the route.
#[inline(always)]
fn prepare_entry<F: DatapathFamily>(flow: &mut Flow<F::Addr>, route: &Route<'_>, is_reply: bool) {
    // SAFETY: a flow entry consists of integers.
    unsafe { zero(flow) };
    flow.slots = [route.source.slot, route.destination.slot];
    flow.epochs = [route.source.epoch, route.destination.epoch];
    let [direction, other] = &mut flow.directions;
    route.fill_direction::<F>(direction);
    route.reversed().fill_direction::<F>(other);
    let reply_flag = |is_reply: bool| if is_reply { flow_flags::REPLY } else { 0 };
    (direction.flags, other.flags) = (flow_flags::SEEN | reply_flag(is_reply), reply_flag(!is_reply));
}

/// Inserts the flow entry of both directions, and emits the packet.
#[inline(always)]
fn create_single_entry<F: DatapathFamily, const PROGRAM: u8>(
    skb: Skb,
    window: Window,
    packet: &Packet<F>,
    flow: &mut Flow<F::Addr>,
) -> Verdict {
    let (key, is_high_end) = flow::flow_key::<F>(&packet.src, &packet.dst, packet.ports, packet.protocol);
    let now = jiffies();
    (flow.created, flow.initiator) = (now, is_high_end);
    let whole: *const _ = flow;
    let [direction, other] = &mut flow.directions;
    // An ICMP error without a flow does not begin one.
    if packet.payload == Payload::IcmpError {
        return emit::<F, PROGRAM>(skb, window, direction, whole, PacketLayout::of(packet));
    }
    direction.flags |= flow::tracked_tcp_flags(packet.tcp_flags);
    (direction.last_seen, other.last_seen) = (now, now);
    (direction.packets, direction.bytes) = (1, u64::from(skb.len()));
    let failed = F::flows().insert(&key, &*flow, 0).is_err();
    count(if failed { PathCounter::FlowInsertFailed } else { PathCounter::FlowNew } as u32, skb.len());
    let [direction, _] = &flow.directions;
    emit::<F, PROGRAM>(skb, window, direction, whole, PacketLayout::of(packet))
}

/// Whether the packet goes in the reply direction: the entry that it replaces says so, and was created between the same endpoints. An
/// invalid entry has an outdated route, but its direction still holds.
///
/// The packet's own flags do not count: a sender could use them to bypass policies. Without an entry the sender is the initiator.
#[inline(always)]
fn is_reply<F: DatapathFamily>(packet: &Packet<F>, previous: &PreviousEntry, route: &Route<'_>) -> bool {
    if is_syn(packet) || !previous.is_reply {
        return false;
    }
    let ([sender, other], [at_sender, at_other]) = (previous.slots, previous.epochs);
    let is_same_endpoint = |slot: u32, epoch: u32, now: EpochRef| {
        !policy::is_pod(now.slot) || slot == now.slot && is_epoch_between(now.first_epoch, epoch, now.epoch)
    };
    is_same_endpoint(sender, at_sender, route.source) && is_same_endpoint(other, at_other, route.destination)
}

/// Whether the packet opens a TCP connection (SYN without ACK).
#[inline(always)]
fn is_syn<F: Family>(packet: &Packet<F>) -> bool {
    const BOTH: u8 = tcp_flags::SYN | tcp_flags::ACK;
    packet.tcp_flags & BOTH == tcp_flags::SYN
}
