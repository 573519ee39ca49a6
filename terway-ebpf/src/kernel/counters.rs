//! Per-CPU counters, and the clock of flow entries.

use aya_ebpf::helpers::bpf_jiffies64;
use terway_abi::Counter;

use super::maps::{COUNTERS, POLICY_COUNTERS};

/// Counts one packet, or one event of a packet, under an index of the counter map.
#[inline(always)]
pub fn count(index: u32, bytes: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: the value belongs to this CPU, and programs at these hooks do not preempt each other on a CPU.
        let counter: &mut Counter = unsafe { &mut *counter };
        counter.packets += 1;
        counter.bytes += u64::from(bytes);
    }
}

/// Counts a packet for a policy rule, if the daemon has created a counter for the rule.
#[inline(always)]
pub(super) fn count_rule(rule_id: u32, bytes: u32) {
    if let Some(counter) = POLICY_COUNTERS.get_ptr_mut(rule_id) {
        // SAFETY: as above. A value that the daemon deletes meanwhile stays mapped for an RCU grace period.
        let counter = unsafe { &mut *counter };
        counter.packets += 1;
        counter.bytes += u64::from(bytes);
    }
}

/// The low 32 bits of jiffies. The verifier turns the call into one load (`do_misc_fixups`, kernel/bpf/verifier.c).
#[inline(always)]
#[must_use]
pub fn jiffies() -> u32 {
    // SAFETY: the helper has no preconditions.
    (unsafe { bpf_jiffies64() }) as u32
}
