//! The numbers that stand for things in the maps. None is given out twice until its counter has gone all the way round, so nothing that
//! still runs with an old number can meet a new meaning.

use std::fmt;

use crate::ident::Family;

macro_rules! number {
    ($($(#[$doc:meta])* $name:ident;)*) => { $(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u32);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )* };
}

number! {
    /// The rules that hold for some endpoints in one direction. 0 = none: all traffic passes.
    SetId;
    /// A table of ports.
    RowId;
    /// What decided, as an index into [`super::Compiler::reason`].
    ReasonId;
}

/// One version of one policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct PolicyVersion(pub(super) u64);

/// What an address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Nature {
    /// Neither of the others: outside the cluster, another node, a pod in a node's network.
    World = 0,
    /// A pod.
    Pod = 1,
    /// The resident node, which may always talk to its pods.
    Node = 2,
}

/// A class of addresses that no rule tells apart. 0 = none.
///
/// Bits 31-30 are the [`Nature`], bit 29 the family (1 = IPv6), the rest counts up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity(pub u32);

impl Identity {
    /// No identity.
    pub const NONE: Self = Self(0);

    /// Numbers that one nature and family can have.
    pub const NUMBERS: u32 = 1 << 29;

    pub(super) const fn new(nature: Nature, family: Family, number: u32) -> Self {
        let six = match family {
            Family::V4 => 0,
            Family::V6 => 1 << 29,
        };
        Self((nature as u32) << 30 | six | number)
    }

    /// What the addresses are.
    #[must_use]
    pub const fn nature(self) -> Nature {
        match self.0 >> 30 {
            1 => Nature::Pod,
            2 => Nature::Node,
            _ => Nature::World,
        }
    }

    /// Which of [`super::Side::defaults`] holds for it: bit 0 says IPv6, bit 1 says pod.
    #[must_use]
    pub const fn default_index(self) -> usize {
        let pod = matches!(self.nature(), Nature::Pod) as usize;
        pod << 1 | (self.0 >> 29 & 1) as usize
    }
}

/// Allowed or not, and why. What the port table holds: bit 30 = allowed, below it the reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Decision(pub u32);

const ALLOW: u32 = 1 << 30;

impl Decision {
    /// Passes.
    #[must_use]
    pub const fn allow(reason: ReasonId) -> Self {
        Self(ALLOW | reason.0)
    }

    /// Is dropped.
    #[must_use]
    pub const fn deny(reason: ReasonId) -> Self {
        Self(reason.0)
    }

    /// Whether it passes.
    #[must_use]
    pub const fn allowed(self) -> bool {
        self.0 & ALLOW != 0
    }

    /// What decided.
    #[must_use]
    pub const fn reason(self) -> ReasonId {
        ReasonId(self.0 & !ALLOW)
    }
}

/// Where the lookup by identity leads. Bit 31 set: a [`Decision`], whatever the ports; else a port table. 0 = nothing is said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target(pub u32);

const INLINE: u32 = 1 << 31;

impl Target {
    /// Nothing is said.
    pub const NONE: Self = Self(0);

    /// One decision for all ports.
    #[must_use]
    pub const fn decision(decision: Decision) -> Self {
        Self(INLINE | decision.0)
    }

    /// A table of ports.
    #[must_use]
    pub const fn row(row: RowId) -> Self {
        Self(row.0)
    }

    /// The decision, or the table to ask.
    ///
    /// # Errors
    /// The table to ask.
    pub const fn resolve(self) -> Result<Decision, RowId> {
        if self.0 & INLINE != 0 { Ok(Decision(self.0 & !INLINE)) } else { Err(RowId(self.0)) }
    }
}

/// Counts up, and after the last number starts again with what is free.
#[derive(Clone, Debug)]
pub(super) struct Counter {
    last: u32,
    limit: u32,
}

impl Counter {
    /// Gives out `after + 1` first, and nothing from `limit` on.
    pub(super) const fn new(after: u32, limit: u32) -> Self {
        Self { last: after, limit }
    }

    pub(super) fn next(&mut self, taken: impl Fn(u32) -> bool) -> u32 {
        loop {
            self.last = if self.last + 1 >= self.limit { 1 } else { self.last + 1 };
            if !taken(self.last) {
                return self.last;
            }
        }
    }
}
