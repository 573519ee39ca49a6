//! The common exit of all programs: count the verdict, report a drop, return the action.

use terway_abi::{DROP_BASE, Program};

use super::counters::count;
use super::flow_events::report_drop;
use super::skb::Skb;
use super::verdict::Verdict;

/// Counts the verdict, reports a drop, and returns the action for the kernel.
#[inline(always)]
pub fn finish(skb: Skb, program: Program, verdict: Verdict) -> i32 {
    count(verdict.counter(), skb.len());
    if verdict.is_drop() {
        report_drop(skb.0, u32::from(program as u8) << 16 | (verdict.counter() - DROP_BASE), verdict.rule_id());
    }
    verdict.action()
}
