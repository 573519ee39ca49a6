//! Policies at flow set-up, and again for a known flow when they have changed.
//!
//! A connection is judged in the direction in which it began, once, for both ends that are pods of this node. Answers pass by the
//! flow's entry. When policies change, the entry stays, with its translation and its counters; its next packet, whichever end sends it,
//! has the connection judged again.

use aya_ebpf::bindings::__sk_buff;
use terway_abi::{PORT_REMAPPED, PathCounter, flow_flags, same_route_epoch};

use super::exit::{Verdict, count};
use super::slow_path::layout;
use super::maps::{Desk, Kernel, Maps};
use super::fast_path::{Way, lookup, use_known};
use super::skb::Skb;
use crate::route::Tables;
use crate::family::Family;
use crate::flow;
use crate::policy::{self, Case, Policies};

/// [`Desk::stale`]: the packet's flow is known, and policies have changed since it was judged.
pub(super) const STALE: u32 = 1;
/// [`Desk::stale`]: its flow is known under another source port ([`PORT_REMAPPED`]), and may have to be judged again.
pub(super) const STALE_MOVED: u32 = 2;

/// Asks the policies about the case on the desk; open if it passes.
///
/// The epochs that go into the entry have been read before.
#[inline(never)]
fn judge<F: Kernel>(desk: &mut Desk<F>) -> Verdict
where
    Maps: Policies<F>,
{
    let decisions = policy::verdict::<F, _>(&Maps, &desk.case);
    desk.verdicts = decisions;
    match policy::forbidden(decisions) {
        Some((reason, rule)) => Verdict::forbidden(reason, rule),
        None => Verdict::OPEN,
    }
}

/// One end of a packet's way: its address, and the slot of what decided about that.
type End<'a, F> = (&'a <F as Family>::Addr, u32);

/// Puts a case on the desk; `answers` if the sender of the packet is not the one who began.
#[inline(always)]
fn put<F: Family>(case: &mut Case<F::Addr>, from: End<'_, F>, to: End<'_, F>, ports: u32, protocol: u8, answers: bool) {
    case.protocol = u32::from(protocol);
    if answers {
        F::assign(&mut case.source, to.0);
        F::assign(&mut case.destination, from.0);
        (case.slots, case.port) = ([to.1, from.1], ports & 0xffff);
    } else {
        F::assign(&mut case.source, from.0);
        F::assign(&mut case.destination, to.0);
        (case.slots, case.port) = ([from.1, to.1], ports >> 16);
    }
}

/// Whether policies allow the connection that the packet on the desk begins, or belongs to; open if they do.
///
/// To be called when its entry is on the desk, whose maker is the packet's sender, and before it is written. With `translated` the packet
/// goes to what is chosen; its source is the client's true address.
#[inline(always)]
pub(super) fn permitted<F: Way>(desk: &mut Desk<F>, translated: bool, answers: bool) -> Verdict
where
    Maps: Policies<F>,
{
    let Desk { packet, flow, choice, case, .. } = &mut *desk;
    let [own, other] = flow.slots;
    let ports = if translated { choice.port << 16 } else { packet.ports };
    put::<F>(case, (&packet.src, own), (&choice.address, other), ports, packet.protocol, answers);
    judge::<F>(desk)
}

/// Judges the flow of the packet on the desk again, whose policies have changed, and sends the packet by it. Open if it is to be decided
/// like a first packet.
#[inline(never)]
pub(super) fn resume<F: Way, const PROGRAM: u8>(ctx: *mut __sk_buff, desk: &mut Desk<F>) -> Verdict
where
    Maps: Policies<F> + Tables<F>,
{
    let (skb, window) = (Skb(ctx), Skb(ctx).window());
    let packet = &desk.packet;
    let (mut key, from_high) = flow::key::<F>(&packet.src, &packet.dst, packet.ports, packet.protocol);
    if desk.stale == STALE_MOVED {
        key.class |= PORT_REMAPPED;
    }
    let Some(known) = lookup::<F, PROGRAM>(skb, &window, &key, from_high) else { return Verdict::OPEN };
    let flags = known.side.flags;
    if !flow::continues(flags, packet.tcp_flags) {
        return Verdict::OPEN;
    }
    if !known.stale {
        known.side.flags |= flow::remembered(packet.tcp_flags);
        return use_known::<F, PROGRAM>(skb, window, known, layout(packet));
    }
    count(PathCounter::FlowStale as u32, skb.len());
    let translated = flags & flow_flags::NAT != 0;
    let answers = flags & flow_flags::REPLY != 0;
    let flow = known.flow;
    // SAFETY: the entry stays mapped for the program's run, and these fields are not of the side that is borrowed; see `lookup` for who
    // else writes it.
    let (slots, before, mapped) = unsafe { ((*flow).slots, (*flow).epochs, (*flow).nat_ports) };
    let [makers, others] = slots;
    let (own, other) = if known.from_maker { (makers, others) } else { (others, makers) };
    let now = [Tables::<F>::epoch(&Maps, makers), Tables::<F>::epoch(&Maps, others)];
    // SAFETY: as above.
    let to = if translated { unsafe { &(*flow).nat_dst } } else { &packet.dst };
    let ports = if translated { packet.ports & 0xffff | mapped & 0xffff_0000 } else { packet.ports };
    put::<F>(&mut desk.case, (&packet.src, own), (to, other), ports, packet.protocol, answers);
    let verdict = judge::<F>(desk);
    if !verdict.is_open() {
        return verdict;
    }
    let ([now_makers, now_others], [makers, others]) = (now, before);
    // If the way has changed since the entry was found, it stays void.
    if same_route_epoch(now_makers, makers) && same_route_epoch(now_others, others) {
        // SAFETY: as above.
        unsafe { (*flow).epochs = now };
    }
    known.side.flags |= flow::remembered(desk.packet.tcp_flags);
    use_known::<F, PROGRAM>(skb, window, known, layout(&desk.packet))
}
