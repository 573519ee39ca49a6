//! Debug log of the slow path (aya-log), one line per decision. The global [`DEBUG`] folds all of it away.
//!
//! Each line is an `inline(never)` function, so that its stack frame is gone when the next stage runs.

use aya_ebpf::bindings::__sk_buff;
use aya_log_ebpf::debug;

use super::maps::DEBUG;
use super::scratch::Scratch;
use super::skb::Skb;
use super::verdict::Verdict;
use crate::family::Family;

/// Whether the debug log is on. If not, the verifier removes the calls and the functions.
#[inline(always)]
pub(super) fn is_on() -> bool {
    DEBUG.load() != 0
}

/// The two ports of a packet in host byte order.
#[inline(always)]
fn port_numbers(ports: u32) -> (u16, u16) {
    let [a, b, c, d] = ports.to_ne_bytes();
    (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
}

/// The packet, and the result of its conntrack lookup.
#[inline(never)]
pub(super) fn packet<F: Family>(ctx: *mut __sk_buff, scratch: &Scratch<F>, policy_stale: u32) -> u32 {
    let packet = &scratch.packet;
    let (ifindex, protocol) = (Skb(ctx).ifindex(), packet.protocol);
    let (source_port, destination_port) = port_numbers(packet.ports);
    if F::VERSION == 4 {
        let ([src, ..], [dst, ..]) = (F::to_words(&packet.src), F::to_words(&packet.dst));
        let (src, dst) = (u32::from_be(src), u32::from_be(dst));
        debug!(
            ctx,
            target: "datapath",
            "if {} proto {} {:i}:{} -> {:i}:{} stale policy {}",
            ifindex, protocol, src, source_port, dst, destination_port, policy_stale
        );
    } else {
        let (ports, [.., src], [.., dst]) = (packet.ports, F::to_words(&packet.src), F::to_words(&packet.dst));
        let (src, dst) = (u32::from_be(src), u32::from_be(dst));
        debug!(
            ctx,
            target: "datapath",
            "if {} proto {} v6 ..{:x} -> ..{:x} ports {:x} stale policy {}",
            ifindex, protocol, src, dst, ports, policy_stale
        );
    }
    0
}

/// The stale policies of a known flow were checked again.
#[inline(never)]
pub(super) fn policy_rechecked<F: Family>(ctx: *mut __sk_buff, scratch: &Scratch<F>) -> u32 {
    let [egress, ingress] = scratch.verdicts;
    debug!(ctx, target: "datapath", "known flow rechecked: egress {:x} ingress {:x}", egress, ingress);
    0
}

/// The selected backend.
#[inline(never)]
pub(super) fn backend<F: Family>(ctx: *mut __sk_buff, scratch: &Scratch<F>) -> u32 {
    let (service, backend) = (scratch.service(), scratch.destination.backend_ref.backend);
    debug!(ctx, target: "datapath", "service {} backend {}", service, backend);
    0
}

/// The Service has no backend; the packet is rejected.
#[inline(never)]
pub(super) fn rejected<F: Family>(ctx: *mut __sk_buff, scratch: &Scratch<F>) -> u32 {
    let (source_port, destination_port) = port_numbers(scratch.packet.ports);
    debug!(ctx, target: "datapath", "no backend: rejected, ports {} -> {}", source_port, destination_port);
    0
}

/// The route, and the policy verdicts.
#[inline(never)]
pub(super) fn route<F: Family>(ctx: *mut __sk_buff, scratch: &Scratch<F>, has_nat: u32) -> u32 {
    let [direction, _] = &scratch.flow.directions;
    let (action, oif, [egress, ingress]) = (direction.action, direction.oif, scratch.verdicts);
    debug!(
        ctx,
        target: "datapath",
        "route: action {} oif {} nat {}, policy: egress {:x} ingress {:x}",
        action, oif, has_nat, egress, ingress
    );
    0
}

/// The verdict of a packet that the slow path drops or forwards.
#[inline(never)]
pub(super) fn verdict(ctx: *mut __sk_buff, verdict: Verdict) -> u32 {
    let (counter, action) = (verdict.counter(), verdict.action());
    debug!(ctx, target: "datapath", "verdict: counter {} action {}", counter, action);
    0
}
