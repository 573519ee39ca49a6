//! Flow events: dropped packets and sampled new connections. Established packets are never reported.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::bpf_get_prandom_u32;
use terway_abi::{CONTROL_SAMPLE_SHIFT, EventBudget, FlowEvent, MacPair, PathCounter, VERDICT_ALLOW, rule_id};

use super::counters::{count, count_rule, jiffies};
use super::maps::{EVENT_BUDGET, EVENTS, EVENTS_PER_SECOND, FamilyMaps, HZ, POLICY_CONTROL};
use super::scratch::Scratch;
use super::skb::Skb;
use crate::family::{V4, V6};
use crate::frame::Frame;
use crate::parse::{Payload, ethertype};

/// Takes one event from the CPU's budget of `limit` events per second; `false` if it is spent.
#[inline(always)]
fn spend(budget: &mut EventBudget, now: u32, limit: u32, hz: u32) -> bool {
    if now.wrapping_sub(budget.second_start) >= hz {
        (budget.second_start, budget.spent) = (now, 0);
    }
    if budget.spent >= limit {
        return false;
    }
    budget.spent += 1;
    true
}

/// Reports a dropped packet, unless the budget is spent. `what` is the drop reason, and the program in bits 16-23. Not inlined: it is
/// large, and drops are rare.
#[inline(never)]
pub(super) fn report_drop(skb: *mut __sk_buff, what: u32, rule_id: u32) -> i32 {
    let skb = Skb(skb);
    if rule_id != 0 {
        count_rule(rule_id, skb.len());
    }
    let Some(budget) = EVENT_BUDGET.get_ptr_mut(0) else { return 0 };
    // SAFETY: the value belongs to this CPU.
    let budget = unsafe { &mut *budget };
    let is_within_budget = spend(budget, jiffies(), EVENTS_PER_SECOND.load(), HZ.load());
    let reserved = if is_within_budget { EVENTS.reserve::<FlowEvent>(0) } else { None };
    let Some(mut entry) = reserved else {
        budget.lost = budget.lost.wrapping_add(1);
        count(PathCounter::EventLost as u32, skb.len());
        return 0;
    };
    let lost = core::mem::take(&mut budget.lost);
    let window = skb.window();
    let ethertype = window.ethertype().unwrap_or(0);
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
        ethertype: u32::from(ethertype),
        verdicts: [0; 2],
        policy_destination: [0; 4],
        policy_port: 0,
        service: 0,
    });
    match ethertype {
        ethertype::IPV4 => describe::<V4, _>(&window, event, rule_id != 0),
        ethertype::IPV6 => describe::<V6, _>(&window, event, rule_id != 0),
        _ => {}
    }
    entry.submit(0);
    0
}

/// Fills in addresses, protocol and ports, as far as the L3 header is plain: the parser's loops over options and extension headers would
/// double the verifier's work. If a policy denied the packet, the query is still in the scratch memory.
#[inline(always)]
fn describe<F: FamilyMaps, P: Frame>(frame: &P, event: &mut FlowEvent, is_denied: bool) {
    event.family = F::VERSION;
    if let Some(headers) = F::l3_header(frame) {
        event.protocol = headers.protocol;
        event.ports = headers.ports;
        event.src = F::to_words(&headers.src);
        event.dst = F::to_words(&headers.dst);
    }
    if is_denied && let Some(scratch) = F::scratch().get_ptr(0) {
        // SAFETY: the value belongs to this CPU, and no borrow of it is alive once the packet has its verdict.
        let scratch = unsafe { &*scratch };
        event.verdicts = scratch.verdicts;
        event.policy_destination = F::to_words(&scratch.policy_query.destination);
        event.policy_port = scratch.policy_query.port;
        event.service = scratch.service();
    }
}

/// Counts the rules that allowed the new connection in `scratch`, and reports the connection if it is sampled.
///
/// A stage of its own. It does not read the packet, which may be translated already.
#[inline(never)]
pub(super) fn report_new_connection<F: FamilyMaps>(ctx: *mut __sk_buff, scratch: &Scratch<F>, program: u8) -> u32 {
    // An ICMP error without a flow does not begin a connection.
    if scratch.packet.payload == Payload::IcmpError {
        return 0;
    }
    let skb = Skb(ctx);
    let [egress, ingress] = scratch.verdicts;
    let (egress, ingress) = (egress & !VERDICT_ALLOW, ingress & !VERDICT_ALLOW);
    if egress > rule_id::LAST_RESERVED {
        count_rule(egress, skb.len());
    }
    if ingress > rule_id::LAST_RESERVED {
        count_rule(ingress, skb.len());
    }
    // SAFETY: the map's value outlives the program run. Volatile: the daemon writes it concurrently.
    let control = POLICY_CONTROL.get(0).map_or(0, |control| unsafe { core::ptr::read_volatile(control) });
    let one_in = control >> CONTROL_SAMPLE_SHIFT;
    if one_in == 0 {
        return 0;
    }
    // SAFETY: the helper has no preconditions.
    let random = unsafe { bpf_get_prandom_u32() };
    // The high word of the product is below N, and 0 for one in N.
    if (u64::from(random) * u64::from(one_in)) >> 32 != 0 {
        return 0;
    }
    let Some(budget) = EVENT_BUDGET.get_ptr_mut(0) else { return 0 };
    // SAFETY: the value belongs to this CPU.
    let budget = unsafe { &mut *budget };
    // At least half of the budget is left for drops. Connections over the budget are not counted as lost: they are a sample anyway.
    if !spend(budget, jiffies(), EVENTS_PER_SECOND.load() / 2, HZ.load()) {
        return 0;
    }
    let Some(mut entry) = EVENTS.reserve::<FlowEvent>(0) else { return 0 };
    entry.write(FlowEvent {
        reason: 0,
        program,
        family: F::VERSION,
        protocol: scratch.packet.protocol,
        pad: [0; 3],
        ifindex: skb.ifindex(),
        length: skb.len(),
        ports: scratch.packet.ports,
        lost: 0,
        src: F::to_words(&scratch.packet.src),
        dst: F::to_words(&scratch.packet.dst),
        mac: MacPair([0; 3]),
        ethertype: 0,
        verdicts: scratch.verdicts,
        policy_destination: F::to_words(&scratch.policy_query.destination),
        policy_port: scratch.policy_query.port,
        service: scratch.service(),
    });
    entry.submit(0);
    0
}
