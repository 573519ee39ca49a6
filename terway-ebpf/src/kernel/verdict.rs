//! The verdict of a packet, and the outcome of a stage of the slow path.

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use terway_abi::{DROP_BASE, Drop, PathCounter};

/// The verdict of a packet: the action for the kernel and the index of its counter. In one word, so that it is returned in a register.
#[must_use = "without its verdict the packet passes"]
#[derive(Clone, Copy)]
pub struct Verdict(u64);

impl Verdict {
    /// Pass the packet to the next program at this hook, then to the host stack or out of the interface.
    ///
    /// `TC_ACT_UNSPEC` and not `TC_ACT_OK`: other programs at the hook still see the packet.
    #[inline(always)]
    pub const fn pass(counter: PathCounter) -> Self {
        Self::with_action(TC_ACT_UNSPEC, counter)
    }

    /// Return `action`, the result of a redirect helper.
    #[inline(always)]
    pub const fn with_action(action: i32, counter: PathCounter) -> Self {
        Self(counter as u64 | (action as u32 as u64) << 32)
    }

    /// Drop the packet.
    #[inline(always)]
    pub const fn drop(reason: Drop) -> Self {
        Self((DROP_BASE + reason as u32) as u64)
    }

    /// Drop the packet because a policy rule denies it. The rule id takes the place of the action.
    #[inline(always)]
    pub const fn denied(reason: Drop, rule_id: u32) -> Self {
        Self((DROP_BASE + reason as u32) as u64 | (rule_id as u64) << 32)
    }

    /// The action for the kernel.
    #[inline(always)]
    pub(super) const fn action(self) -> i32 {
        if self.is_drop() { TC_ACT_SHOT } else { (self.0 >> 32) as i32 }
    }

    /// Whether the packet is dropped.
    #[inline(always)]
    pub(super) const fn is_drop(self) -> bool {
        self.counter() >= DROP_BASE
    }

    /// The id of the rule that denies a dropped packet; 0 if no rule does.
    #[inline(always)]
    pub(super) const fn rule_id(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// The index in the counter map.
    #[inline(always)]
    pub(super) const fn counter(self) -> u32 {
        self.0 as u32
    }
}

/// The outcome of a stage of the slow path: the packet's verdict, or what the next stage is.
#[derive(Clone, Copy)]
pub(super) enum Outcome {
    /// The packet has its verdict.
    Done(Verdict),
    /// The next stage in order.
    Continue,
    /// The flow entry is valid, but policies have changed: check them again.
    StalePolicy,
    /// An ICMP error about a flow with NAT.
    RelatedIcmp,
    /// The Service has no backend: reject the packet with a reply.
    Reject,
    /// One flow entry for both directions is to be created.
    CreateEntry,
    /// Two flow entries with NAT are to be created.
    CreateNatPair,
    /// The flow is known under its key with [`terway_abi::PORT_REMAPPED`].
    UseRemapped,
}

/// An [`Outcome`] in one word, so that a stage returns it in a register.
#[must_use = "the outcome decides about the next stage"]
#[derive(Clone, Copy)]
pub(super) struct StageResult(u64);

impl StageResult {
    // The low word of a verdict is a counter's index, so no verdict has one of these values.
    const CONTINUE: u64 = u64::MAX;
    const STALE_POLICY: u64 = u64::MAX - 1;
    const RELATED_ICMP: u64 = u64::MAX - 2;
    const REJECT: u64 = u64::MAX - 3;
    const CREATE_ENTRY: u64 = u64::MAX - 4;
    const CREATE_NAT_PAIR: u64 = u64::MAX - 5;
    const USE_REMAPPED: u64 = u64::MAX - 6;

    /// The outcome.
    #[inline(always)]
    pub(super) const fn outcome(self) -> Outcome {
        match self.0 {
            Self::CONTINUE => Outcome::Continue,
            Self::STALE_POLICY => Outcome::StalePolicy,
            Self::RELATED_ICMP => Outcome::RelatedIcmp,
            Self::REJECT => Outcome::Reject,
            Self::CREATE_ENTRY => Outcome::CreateEntry,
            Self::CREATE_NAT_PAIR => Outcome::CreateNatPair,
            Self::USE_REMAPPED => Outcome::UseRemapped,
            verdict => Outcome::Done(Verdict(verdict)),
        }
    }
}

impl From<Outcome> for StageResult {
    #[inline(always)]
    fn from(outcome: Outcome) -> Self {
        Self(match outcome {
            Outcome::Done(Verdict(verdict)) => verdict,
            Outcome::Continue => Self::CONTINUE,
            Outcome::StalePolicy => Self::STALE_POLICY,
            Outcome::RelatedIcmp => Self::RELATED_ICMP,
            Outcome::Reject => Self::REJECT,
            Outcome::CreateEntry => Self::CREATE_ENTRY,
            Outcome::CreateNatPair => Self::CREATE_NAT_PAIR,
            Outcome::UseRemapped => Self::USE_REMAPPED,
        })
    }
}

impl From<Result<Outcome, Drop>> for StageResult {
    #[inline(always)]
    fn from(result: Result<Outcome, Drop>) -> Self {
        match result {
            Ok(outcome) => outcome.into(),
            Err(reason) => Outcome::Done(Verdict::drop(reason)).into(),
        }
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
