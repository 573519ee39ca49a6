//! Visibility: what policies decided is counted by reason, and new connections are reported if the daemon wishes.
//!
//! All of it is about first packets and drops. An established packet meets nothing of this.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::bpf_get_prandom_u32;
use terway_abi::{CONTROL_SAMPLE_SHIFT, EventBudget, FlowEvent, MacPair, VERDICT_ALLOW, rule_id};

use super::exit::now;
use super::maps::{Desk, EVENT_BUDGET, EVENTS, EVENTS_PER_SECOND, HZ, Kernel, POLICY_CONTROL, POLICY_COUNTERS};
use super::skb::Skb;
use crate::parse::Payload;

/// Counts something that a reason decided, if the daemon has made a counter for it.
#[inline(always)]
pub(super) fn tally(reason: u32, bytes: u32) {
    if let Some(counter) = POLICY_COUNTERS.get_ptr_mut(reason) {
        // SAFETY: the value is this CPU's own, and programs at these hooks do not preempt each other on a CPU. One that the daemon
        // removes meanwhile stays mapped for a grace period.
        let counter = unsafe { &mut *counter };
        counter.packets += 1;
        counter.bytes += u64::from(bytes);
    }
}

/// Whether this CPU may report another event now, of `limit` in a second.
#[inline(always)]
pub(super) fn spend(budget: &mut EventBudget, now: u32, limit: u32, hz: u32) -> bool {
    if now.wrapping_sub(budget.second_start) >= hz {
        (budget.second_start, budget.spent) = (now, 0);
    }
    if budget.spent >= limit {
        return false;
    }
    budget.spent += 1;
    true
}

/// A connection has begun with the packet on the desk, which is on its way: counts what let it pass, and reports it.
///
/// A stage of its own; the packet itself is not looked at, which may be translated by now.
#[inline(never)]
pub(super) fn begun<F: Kernel>(ctx: *mut __sk_buff, desk: &Desk<F>, program: u8) -> u32 {
    // An ICMP error that belongs to no flow is not the beginning of one.
    if desk.packet.payload == Payload::IcmpError {
        return 0;
    }
    let skb = Skb(ctx);
    let [egress, ingress] = desk.verdicts;
    let (egress, ingress) = (egress & !VERDICT_ALLOW, ingress & !VERDICT_ALLOW);
    if egress > rule_id::LAST_RESERVED {
        tally(egress, skb.len());
    }
    if ingress > rule_id::LAST_RESERVED {
        tally(ingress, skb.len());
    }
    // SAFETY: the map's value outlives the program run. Volatile: the daemon writes it meanwhile.
    let one_in =
        POLICY_CONTROL.get(0).map_or(0, |gate| unsafe { core::ptr::read_volatile(gate) }) >> CONTROL_SAMPLE_SHIFT;
    if one_in == 0 {
        return 0;
    }
    // SAFETY: the helper has no preconditions.
    let random = unsafe { bpf_get_prandom_u32() };
    // The whole part is below N, and 0 for one in N.
    if (u64::from(random) * u64::from(one_in)) >> 32 != 0 {
        return 0;
    }
    let Some(budget) = EVENT_BUDGET.get_ptr_mut(0) else { return 0 };
    // SAFETY: the value is this CPU's own.
    let budget = unsafe { &mut *budget };
    // Drops have at least half of the budget for themselves. Connections that are not reported are a part of the sample.
    if !spend(budget, now(), EVENTS_PER_SECOND.load() / 2, HZ.load()) {
        return 0;
    }
    let Some(mut entry) = EVENTS.reserve::<FlowEvent>(0) else { return 0 };
    entry.write(FlowEvent {
        reason: 0,
        program,
        family: F::VERSION,
        protocol: desk.packet.protocol,
        pad: [0; 3],
        ifindex: skb.ifindex(),
        length: skb.len(),
        ports: desk.packet.ports,
        lost: 0,
        src: F::widen(&desk.packet.src),
        dst: F::widen(&desk.packet.dst),
        mac: MacPair([0; 3]),
        ethertype: 0,
        verdicts: desk.verdicts,
        policy_destination: F::widen(&desk.case.destination),
        policy_port: desk.case.port,
        service: desk.service(),
    });
    entry.submit(0);
    0
}
