//! The one exit of every program: what is decided is counted, and a drop is reported.

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::bpf_jiffies64;
use terway_abi::{Counter, DROP_BASE, Drop, FlowEvent, MacPair, PathCounter, Program};

use super::maps::{COUNTERS, Desk, EVENT_BUDGET, EVENTS, EVENTS_PER_SECOND, HZ, Kernel};
use super::skb::Skb;
use super::flow_events::{spend, tally};
use crate::family::{V4, V6};
use crate::frame::Frame;
use crate::parse::ethertype;

/// What becomes of a packet: the action for the kernel, and the counter it goes under.
///
/// In one word, so that it crosses function calls in a register. Made here only, and good for nothing but [`finish`].
#[must_use = "a verdict that is not returned is a packet that goes its way"]
#[derive(Clone, Copy)]
pub struct Verdict(u64);

impl Verdict {
    /// Not decided yet. No action has this number.
    pub const OPEN: Self = Self(u64::MAX);

    /// Not decided yet: it is an ICMP error about a flow whose packets are translated. No action has this number either.
    pub const RELATED: Self = Self(u64::MAX - 1);

    /// Whether it is [`Verdict::RELATED`].
    #[inline(always)]
    #[must_use]
    pub const fn is_related(self) -> bool {
        self.0 == u64::MAX - 1
    }

    /// Whether it is [`Verdict::OPEN`].
    #[inline(always)]
    #[must_use]
    pub const fn is_open(self) -> bool {
        self.0 == u64::MAX
    }

    /// The packet goes on to whatever comes next at this hook, and then to the host stack or out of the interface.
    ///
    /// `TC_ACT_UNSPEC` and not `TC_ACT_OK`: programs of others on the same hook still see the packet.
    #[inline(always)]
    pub const fn next(kind: PathCounter) -> Self {
        Self::with_action(TC_ACT_UNSPEC, kind)
    }

    /// The packet goes where `action`, the answer of a redirect helper, says.
    #[inline(always)]
    pub const fn with_action(action: i32, kind: PathCounter) -> Self {
        Self(kind as u64 | (action as u32 as u64) << 32)
    }

    /// The packet is dropped.
    #[inline(always)]
    pub const fn drop(reason: Drop) -> Self {
        Self((DROP_BASE + reason as u32) as u64)
    }

    /// The packet is dropped because of what has this number; that stands in place of the action.
    #[inline(always)]
    pub const fn forbidden(reason: Drop, rule: u32) -> Self {
        Self((DROP_BASE + reason as u32) as u64 | (rule as u64) << 32)
    }

    #[inline(always)]
    const fn action(self) -> i32 {
        if self.is_drop() { TC_ACT_SHOT } else { (self.0 >> 32) as i32 }
    }

    /// Whether the packet is dropped.
    #[inline(always)]
    pub(super) const fn is_drop(self) -> bool {
        self.counter() >= DROP_BASE
    }

    /// The number of what forbids a packet that is dropped.
    #[inline(always)]
    const fn rule(self) -> u32 {
        (self.0 >> 32) as u32
    }

    #[inline(always)]
    const fn counter(self) -> u32 {
        self.0 as u32
    }
}

impl From<Result<Self, Drop>> for Verdict {
    #[inline(always)]
    fn from(result: Result<Self, Drop>) -> Self {
        match result {
            Ok(verdict) => verdict,
            Err(reason) => Self::drop(reason),
        }
    }
}

/// Counts and reports, and gives the kernel its answer.
#[inline(always)]
pub fn finish(skb: Skb, program: Program, verdict: Verdict) -> i32 {
    count(verdict.counter(), skb.len());
    if verdict.is_drop() {
        report(skb.0, u32::from(program as u8) << 16 | (verdict.counter() - DROP_BASE), verdict.rule());
    }
    verdict.action()
}

/// Counts one packet, or one thing that happened to a packet.
#[inline(always)]
pub fn count(index: u32, bytes: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: the value is this CPU's own, and programs at these hooks do not preempt each other on a CPU.
        let counter: &mut Counter = unsafe { &mut *counter };
        counter.packets += 1;
        counter.bytes += u64::from(bytes);
    }
}

/// Jiffies, the clock of flow entries. The verifier turns the call into one load (`do_misc_fixups`, kernel/bpf/verifier.c).
#[inline(always)]
#[must_use]
pub fn now() -> u32 {
    // SAFETY: the helper has no preconditions.
    (unsafe { bpf_jiffies64() }) as u32
}

/// Reports a drop, unless too many were reported already. Not inlined: it is big, and drops are rare.
#[inline(never)]
fn report(skb: *mut aya_ebpf::bindings::__sk_buff, what: u32, rule: u32) -> i32 {
    let skb = Skb(skb);
    if rule != 0 {
        tally(rule, skb.len());
    }
    let Some(budget) = EVENT_BUDGET.get_ptr_mut(0) else { return 0 };
    // SAFETY: the value is this CPU's own.
    let budget = unsafe { &mut *budget };
    let within = spend(budget, now(), EVENTS_PER_SECOND.load(), HZ.load());
    let reserved = if within { EVENTS.reserve::<FlowEvent>(0) } else { None };
    let Some(mut entry) = reserved else {
        budget.lost = budget.lost.wrapping_add(1);
        count(PathCounter::EventLost as u32, skb.len());
        return 0;
    };
    let lost = core::mem::take(&mut budget.lost);
    let window = skb.window();
    let kind = window.ethertype().unwrap_or(0);
    let event = entry.write(FlowEvent {
        reason: what as u16,
        program: (what >> 16) as u8,
        family: 0,
        protocol: 0,
        pad: [0; 3],
        ifindex: skb.ifindex(),
        length: skb.len(),
        ports: 0,
        lost,
        src: [0; 4],
        dst: [0; 4],
        mac: window.macs().unwrap_or(MacPair([0; 3])),
        ethertype: u32::from(kind),
        verdicts: [0; 2],
        policy_destination: [0; 4],
        policy_port: 0,
        service: 0,
    });
    match kind {
        ethertype::IPV4 => describe::<V4, _>(&window, event, rule != 0),
        ethertype::IPV6 => describe::<V6, _>(&window, event, rule != 0),
        _ => {}
    }
    entry.submit(0);
    0
}

/// Addresses, protocol and ports, as far as they stand where they usually do. What stands behind options and extension headers is
/// not looked for: the parser's loops would double the work of the verifier. If policies forbid it, the case is still on the desk.
#[inline(always)]
fn describe<F: Kernel, P: Frame>(frame: &P, event: &mut FlowEvent, judged: bool) {
    event.family = F::VERSION;
    if let Some(glance) = F::outline(frame) {
        event.protocol = glance.protocol;
        event.ports = glance.ports;
        event.src = F::widen(&glance.src);
        event.dst = F::widen(&glance.dst);
    }
    if judged && let Some(desk) = desk_of::<F>() {
        event.verdicts = desk.verdicts;
        event.policy_destination = F::widen(&desk.case.destination);
        event.policy_port = desk.case.port;
        event.service = if desk.stale == 0 { desk.service() } else { 0 };
    }
}

/// What the slow path has left on this CPU's desk.
#[inline(always)]
fn desk_of<F: Kernel>() -> Option<&'static Desk<F>> {
    let desk = F::desk().get_ptr(0)?;
    // SAFETY: the value is this CPU's own, and nobody borrows it any more when the packet has a verdict.
    Some(unsafe { &*desk })
}
