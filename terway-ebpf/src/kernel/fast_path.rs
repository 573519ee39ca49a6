//! The fast path: a packet whose flow is known is sent by it.

use aya_ebpf::bindings::bpf_redir_neigh;
use aya_ebpf::helpers::{bpf_redirect_neigh, bpf_redirect_peer};
use terway_abi::{
    Action, BackendRef, Drop, Flow, FlowDirection, FlowKey, HOOK_INGRESS, HOOK_TO_POD, HOOK_TO_VPC, MARK_CHECKED,
    NO_BACKEND, Nexthop, POLICY_EPOCH_MASK, PathCounter, Program, flow_flags,
};

use super::exit::{Verdict, count, now};
use super::slow_path::{Checks, Neighbourly, first, unusual};
use super::icmp_nat::Quote;
use super::maps::{BACKENDS, Kernel, Maps};
use super::nat;
use super::skb::{Skb, Window};
use crate::route::{self, Tables};
use crate::family::Family;
use crate::flow;
use crate::frame::Frame;
use crate::icmp;
use crate::parse::tcp_flags;
use crate::policy::Policies;
use crate::reject::Refusal;
use crate::service::Services;

/// What a family needs to go this way.
pub trait Way: Kernel + icmp::Inner + Refusal {}
impl<F: Kernel + icmp::Inner + Refusal> Way for F {}

/// Programs as constants, so that each is compiled for what it is.
pub const FROM_POD: u8 = Program::FromPod as u8;
/// See [`FROM_POD`].
pub const TO_POD: u8 = Program::ToPod as u8;
/// See [`FROM_POD`].
pub const FROM_VPC: u8 = Program::FromVpc as u8;
/// See [`FROM_POD`].
pub const TO_VPC: u8 = Program::ToVpc as u8;

#[inline(always)]
pub(super) const fn hook<const PROGRAM: u8>() -> u8 {
    match PROGRAM {
        TO_POD => HOOK_TO_POD,
        TO_VPC => HOOK_TO_VPC,
        _ => HOOK_INGRESS,
    }
}

/// The way of every IP packet. A packet of common shape whose flow is known is on its way with one lookup; all others take the
/// slow path.
#[inline(always)]
pub fn forward<F: Way, const PROGRAM: u8>(skb: Skb, window: Window) -> Verdict
where
    Maps: Tables<F> + Services<F> + Policies<F>,
    Checks: Neighbourly<F>,
{
    let Some(glance) = F::glance(&window) else { return unusual::<F, PROGRAM>(skb) };
    let (key, from_high) = flow::key::<F>(&glance.src, &glance.dst, glance.ports, glance.protocol);
    let mut stale = false;
    let entry = entry::<F>(&key);
    if let Some(entry) = entry
        && let Some(known) = known::<F, PROGRAM>(skb, &window, entry, from_high)
    {
        let layout = Layout { protocol: glance.protocol, transport: F::TRANSPORT, quote: None };
        stale = is_stale::<F, PROGRAM>(&known);
        if !stale && glance.tcp_flags & flow::NOTABLE == 0 {
            return use_known::<F, PROGRAM>(skb, window, known, layout);
        }
        if !stale && flow::continues(known.side.flags, glance.tcp_flags) {
            known.side.flags |= flow::remembered(glance.tcp_flags);
            if glance.tcp_flags & tcp_flags::RST != 0 && known.side.flags & flow_flags::NAT != 0 {
                reset::<F>(known.flow, glance.ports, u32::from(glance.protocol));
            }
            return use_known::<F, PROGRAM>(skb, window, known, layout);
        }
    }
    if PROGRAM == TO_VPC {
        return Verdict::next(const { kinds::<PROGRAM>() }.stack);
    }
    first::<F, PROGRAM>(skb, &glance, stale, Before { entry, from_high })
}

/// Notes in the entry of the other direction that a reset has ended a translated connection: the ports that it takes are free again. `ports`
/// are the packet's, before translation.
#[inline(never)]
fn reset<F: Way>(flow: *const Flow<F::Addr>, ports: u32, protocol: u32) -> u32 {
    // SAFETY: the caller's entry, which stays mapped for the program's run.
    let flow = unsafe { &*flow };
    let (key, _) = flow::key::<F>(&flow.nat_src, &flow.nat_dst, flow.nat_ports, protocol as u8);
    let Some(other) = F::flows().get_ptr_mut(&key) else { return 0 };
    // SAFETY: as in `known`.
    let other = unsafe { &mut *other };
    let [side, unused] = &mut other.directions;
    // It may have become another connection's.
    if side.flags & flow_flags::NAT != 0 && other.nat_ports == ports.rotate_left(16) {
        unused.flags |= flow_flags::RST;
    }
    0
}

/// Whether a flow is to be judged again before it is used. What the host stack sends by an ENI has no pod at either end.
#[inline(always)]
pub(super) const fn is_stale<F: Family, const PROGRAM: u8>(known: &Known<F>) -> bool {
    PROGRAM != TO_VPC && known.stale
}

/// The way of a packet that the host stack sends by an ENI: only answers of the node itself to clients of its Services are known here.
#[inline(always)]
pub fn leave<F: Way>(skb: Skb) -> Verdict
where
    Maps: Tables<F> + Services<F> + Policies<F>,
    Checks: Neighbourly<F>,
{
    let mut window = skb.window();
    let mut outline = F::outline(&window);
    if outline.is_none() {
        window = skb.pull();
        outline = F::outline(&window);
    }
    let Some(outline) = outline else { return Verdict::drop(Drop::Truncated) };
    match route::to_vpc::<F, _>(&Maps, &outline.src, skb.ifindex()) {
        Ok(()) => forward::<F, TO_VPC>(skb, window),
        Err(reason) => Verdict::drop(reason),
    }
}

/// A flow, and the sender's side of it.
pub(super) struct Known<F: Family> {
    pub(super) side: &'static mut FlowDirection,
    pub(super) flow: *mut Flow<F::Addr>,
    /// The sender is who made the entry.
    pub(super) from_maker: bool,
    /// Policies have changed since it was judged; before it is used it is judged again.
    pub(super) stale: bool,
}

/// Where the transport header is.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    pub(super) protocol: u8,
    /// Its offset; 0 if there is none, in later fragments.
    pub(super) transport: u32,
    /// Where it is an ICMP error that goes the flow's way: what it quotes.
    pub(super) quote: Option<Quote>,
}

/// [`FlowDirection::flags`] of translated answers.
pub(super) const ANSWERS: u32 = flow_flags::REPLY | flow_flags::NAT;

/// What the flow table holds under a packet's key, whether or not it still holds.
#[derive(Clone, Copy)]
pub(super) struct Before<F: Family> {
    pub(super) entry: Option<*mut Flow<F::Addr>>,
    /// Which end sends the packet.
    pub(super) from_high: u32,
}

/// The entry of a key.
#[inline(always)]
pub(super) fn entry<F: Way>(key: &FlowKey<F::Addr>) -> Option<*mut Flow<F::Addr>> {
    F::flows().get_ptr_mut(key)
}

/// [`known`] of the entry of this key.
#[inline(always)]
pub(super) fn lookup<F: Way, const PROGRAM: u8>(
    skb: Skb,
    window: &Window,
    key: &FlowKey<F::Addr>,
    from_high: u32,
) -> Option<Known<F>>
where
    Maps: Tables<F>,
{
    known::<F, PROGRAM>(skb, window, entry::<F>(key)?, from_high)
}

/// The sender's side of an entry, if the entry still holds, and the packet is met where it was made for and comes from whom it was
/// made for.
#[inline(always)]
pub(super) fn known<F: Way, const PROGRAM: u8>(
    skb: Skb,
    window: &Window,
    entry: *mut Flow<F::Addr>,
    from_high: u32,
) -> Option<Known<F>>
where
    Maps: Tables<F>,
{
    // SAFETY: the value stays mapped for the program's run. Other CPUs may count in it at the same time, which `Flow` allows for; an
    // entry that is evicted and reused meanwhile is a race that every preallocated map has.
    let entry = unsafe { &mut *entry };
    // A backend that has gone from its Service still owes answers to what it was asked before, and they are the Service's.
    let answers = flow::side(entry, from_high).flags & ANSWERS == ANSWERS;
    let drift = if answers || backend_is_current::<F>(entry) {
        route::drift::<F, _>(&Maps, entry.slots, entry.epochs)
    } else {
        u32::MAX
    };
    let from_maker = entry.initiator == from_high;
    let flow: *mut _ = entry;
    let side = flow::side(entry, from_high);
    if side.ifindex != skb.ifindex() || side.hook != u32::from(hook::<PROGRAM>()) {
        return None;
    }
    if PROGRAM == FROM_POD && window.macs()? != side.expected_macs {
        return None;
    }
    // What the node itself answers leaves by the stack's way, whatever has become of that which is remembered here.
    if drift > POLICY_EPOCH_MASK && !(PROGRAM == TO_VPC && answers) {
        count(PathCounter::FlowStale as u32, skb.len());
        return None;
    }
    Some(Known { side, flow, from_maker, stale: drift != 0 })
}

/// What has changed about an entry's ends, as [`route::drift`] has it, and about its backend, whose end makes it void.
#[inline(always)]
pub(super) fn drift<F: Way>(flow: &Flow<F::Addr>) -> u32
where
    Maps: Tables<F>,
{
    if !backend_is_current::<F>(flow) {
        return u32::MAX;
    }
    route::drift::<F, _>(&Maps, flow.slots, flow.epochs)
}

/// Whether an entry's backend is as it was, or it has none.
#[inline(always)]
fn backend_is_current<F: Family>(flow: &Flow<F::Addr>) -> bool {
    flow.backend == NO_BACKEND || is_current(BackendRef { backend: flow.backend, generation: flow.generation })
}

#[inline(always)]
pub(super) fn is_current(member: BackendRef) -> bool {
    BACKENDS.get(member.backend).is_some_and(|backend| backend.generation == member.generation)
}

#[inline(always)]
pub(super) fn use_known<F: Way, const PROGRAM: u8>(
    skb: Skb,
    window: Window,
    known: Known<F>,
    layout: Layout,
) -> Verdict {
    let Known { side, flow, .. } = known;
    side.packets += 1;
    side.bytes += u64::from(skb.len());
    // In the same cache line as the counters, so writing it each time costs nothing.
    side.last_seen = now();
    send::<F, PROGRAM>(skb, window, side, flow, layout)
}

/// Does with a packet what its side of the flow says. `flow` is the entry that `side` is of, and is read only to translate.
#[inline(always)]
pub(super) fn send<F: Way, const PROGRAM: u8>(
    skb: Skb,
    mut window: Window,
    side: &FlowDirection,
    flow: *const Flow<F::Addr>,
    layout: Layout,
) -> Verdict {
    let kinds = const { kinds::<PROGRAM>() };
    let translate = side.flags & flow_flags::NAT != 0;
    if PROGRAM == TO_POD || PROGRAM == TO_VPC || side.action == Action::Stack as u32 {
        if translate && !nat::rewrite::<F>(skb, window, flow, layout, PROGRAM == TO_VPC) {
            return Verdict::drop(Drop::NotTranslatable);
        }
        return Verdict::next(kinds.stack);
    }
    if F::hop(&mut window).is_none() {
        // At the node's own address the stack would take it for itself.
        if PROGRAM == FROM_VPC && translate {
            return Verdict::drop(Drop::HopLimit);
        }
        // The stack finds the same and answers with an ICMP error; the source has been checked.
        return Verdict::next(PathCounter::TtlExpired);
    }
    if PROGRAM == FROM_VPC && F::VERSION == 6 {
        skb.hop_limit_fell();
    }
    let (action, oif) = (side.action, side.oif);
    // The pod's kernel does not look at the addresses any more, but a bridge or a packet capture in the pod does.
    if action == Action::Local as u32 && window.write(0, flow::written(side)).is_none() {
        return Verdict::drop(Drop::Truncated);
    }
    if translate && !nat::rewrite::<F>(skb, window, flow, layout, action == Action::Vpc as u32) {
        return Verdict::drop(Drop::NotTranslatable);
    }
    if action == Action::Vpc as u32 {
        skb.set_mark(MARK_CHECKED);
        let nexthop: *const Nexthop = &side.nexthop;
        // SAFETY: `Nexthop` has the layout of `bpf_redir_neigh` (asserted below), and the helper only reads it.
        let action = unsafe { bpf_redirect_neigh(oif, nexthop.cast_mut().cast(), size_of::<Nexthop>() as i32, 0) };
        return Verdict::with_action(action as i32, kinds.vpc);
    }
    // SAFETY: the helper has no preconditions; an interface that is gone makes it a drop.
    let action = unsafe { bpf_redirect_peer(oif, 0) };
    Verdict::with_action(action as i32, kinds.local)
}

const _: () = assert!(size_of::<Nexthop>() == size_of::<bpf_redir_neigh>());

pub(super) struct Kinds {
    pub(super) stack: PathCounter,
    pub(super) local: PathCounter,
    pub(super) vpc: PathCounter,
}

pub(super) const fn kinds<const PROGRAM: u8>() -> Kinds {
    match PROGRAM {
        FROM_POD => Kinds { stack: PathCounter::PodToHost, local: PathCounter::PodToPod, vpc: PathCounter::PodToVpc },
        TO_POD => Kinds { stack: PathCounter::HostToPod, local: PathCounter::HostToPod, vpc: PathCounter::HostToPod },
        TO_VPC => Kinds { stack: PathCounter::HostToVpc, local: PathCounter::HostToVpc, vpc: PathCounter::HostToVpc },
        _ => Kinds { stack: PathCounter::VpcToHost, local: PathCounter::VpcToPod, vpc: PathCounter::VpcToVpc },
    }
}
