//! The policy check of new flows, and of known flows after a policy change.
//!
//! A connection is checked in its original direction, once, for both ends that are local pods. Replies pass by the flow entry. After a
//! policy change the entry stays, with its NAT and counters: the next packet of either direction has the connection checked again.

use aya_ebpf::bindings::__sk_buff;
use terway_abi::{PORT_REMAPPED, PathCounter, flow_flags, same_route_epoch};

use super::counters::count;
use super::flow_table::lookup;
use super::forward::forward_hit;
use super::maps::{DatapathFamily, FamilyMaps, Maps};
use super::nat::PacketLayout;
use super::scratch::Scratch;
use super::skb::Skb;
use super::verdict::{Outcome, StageResult, Verdict};
use crate::family::Family;
use crate::flow;
use crate::policy::{self, Policies, PolicyQuery};
use crate::route::Tables;

/// Checks the query in `scratch` against the policies: [`Outcome::Continue`] if it is allowed.
///
/// The epochs of the flow entry have been read before.
#[inline(never)]
fn check<F: FamilyMaps>(scratch: &mut Scratch<F>) -> StageResult
where
    Maps: Policies<F>,
{
    let verdicts = policy::check::<F, _>(&Maps, &scratch.policy_query);
    scratch.verdicts = verdicts;
    match policy::denied(verdicts) {
        Some((reason, rule_id)) => Outcome::Done(Verdict::denied(reason, rule_id)),
        None => Outcome::Continue,
    }
    .into()
}

/// One end of a connection: its address and its epoch slot.
type End<'a, F> = (&'a <F as Family>::Addr, u32);

/// Writes a policy query in the original direction; `is_reply` if the packet goes in the reply direction.
#[inline(always)]
fn write_query<F: Family>(
    query: &mut PolicyQuery<F::Addr>,
    from: End<'_, F>,
    to: End<'_, F>,
    ports: u32,
    protocol: u8,
    is_reply: bool,
) {
    query.protocol = u32::from(protocol);
    if is_reply {
        F::assign(&mut query.source, to.0);
        F::assign(&mut query.destination, from.0);
        (query.slots, query.port) = ([to.1, from.1], ports & 0xffff);
    } else {
        F::assign(&mut query.source, from.0);
        F::assign(&mut query.destination, to.0);
        (query.slots, query.port) = ([from.1, to.1], ports >> 16);
    }
}

/// Checks the connection of the packet in `scratch` against the policies: [`Outcome::Continue`] if it is allowed.
///
/// Called between preparation and insertion of the flow entry, whose initiator is the packet's sender. With `has_nat` the destination is
/// that after DNAT; the source is always the client's own address.
#[inline(always)]
pub(super) fn check_new_flow<F: DatapathFamily>(scratch: &mut Scratch<F>, has_nat: bool, is_reply: bool) -> StageResult
where
    Maps: Policies<F>,
{
    let Scratch { packet, flow, destination, policy_query, .. } = &mut *scratch;
    let [sender, other] = flow.slots;
    let ports = if has_nat { destination.port << 16 } else { packet.ports };
    let to = (&destination.address, other);
    write_query::<F>(policy_query, (&packet.src, sender), to, ports, packet.protocol, is_reply);
    check::<F>(scratch)
}

/// The stage for a known flow: checks its policies again if they are stale, and forwards the packet. `class` is 0, or [`PORT_REMAPPED`] to
/// look up the key with that bit. [`Outcome::Continue`] if there is no usable entry any more.
#[inline(never)]
pub(super) fn recheck_policy<F: DatapathFamily, const PROGRAM: u8>(
    ctx: *mut __sk_buff,
    scratch: &mut Scratch<F>,
    class: u32,
) -> StageResult
where
    Maps: Policies<F> + Tables<F>,
{
    let (skb, window) = (Skb(ctx), Skb(ctx).window());
    let packet = &scratch.packet;
    let (mut key, is_high_end) = flow::flow_key::<F>(&packet.src, &packet.dst, packet.ports, packet.protocol);
    key.class |= class & PORT_REMAPPED;
    let Some(hit) = lookup::<F, PROGRAM>(skb, &window, &key, is_high_end) else { return Outcome::Continue.into() };
    let flags = hit.direction.flags;
    if !flow::is_same_connection(flags, packet.tcp_flags) {
        return Outcome::Continue.into();
    }
    if !hit.is_policy_stale {
        hit.direction.flags |= flow::tracked_tcp_flags(packet.tcp_flags);
        return Outcome::Done(forward_hit::<F, PROGRAM>(skb, window, hit, PacketLayout::of(packet))).into();
    }
    count(PathCounter::FlowStale as u32, skb.len());
    let has_nat = flags & flow_flags::NAT != 0;
    let is_reply = flags & flow_flags::REPLY != 0;
    let flow = hit.flow;
    // SAFETY: the entry stays mapped for the program run, and these fields are not of the direction that is borrowed; see `check_entry`
    // for concurrent writers.
    let (slots, before, nat_ports) = unsafe { ((*flow).slots, (*flow).epochs, (*flow).nat_ports) };
    let [initiator, responder] = slots;
    let (sender, other) = if hit.is_initiator { (initiator, responder) } else { (responder, initiator) };
    let now = [Tables::<F>::epoch(&Maps, initiator), Tables::<F>::epoch(&Maps, responder)];
    // SAFETY: as above.
    let to = if has_nat { unsafe { &(*flow).nat_dst } } else { &packet.dst };
    let ports = if has_nat { packet.ports & 0xffff | nat_ports & 0xffff_0000 } else { packet.ports };
    let (from, to) = ((&packet.src, sender), (to, other));
    write_query::<F>(&mut scratch.policy_query, from, to, ports, packet.protocol, is_reply);
    let checked = check::<F>(scratch);
    if let Outcome::Done(_) = checked.outcome() {
        return checked;
    }
    let ([now_initiator, now_responder], [at_initiator, at_responder]) = (now, before);
    // If a route epoch has changed since the lookup, the entry stays invalid.
    if same_route_epoch(now_initiator, at_initiator) && same_route_epoch(now_responder, at_responder) {
        // SAFETY: as above.
        unsafe { (*flow).epochs = now };
    }
    hit.direction.flags |= flow::tracked_tcp_flags(scratch.packet.tcp_flags);
    Outcome::Done(forward_hit::<F, PROGRAM>(skb, window, hit, PacketLayout::of(&scratch.packet))).into()
}
