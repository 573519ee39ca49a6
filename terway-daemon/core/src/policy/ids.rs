//! Ids in the policy maps. An id is not used again until its counter has wrapped around, so a program that still runs with an old id cannot meet
//! a new meaning of it.

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
    /// Id of a set: the compiled rules of some policies in one direction. 0 = none: all traffic passes.
    SetId;
    /// Id of a port table.
    PortTableId;
    /// Id of the rule that a verdict comes from ([`super::Compiler::rule`]).
    RuleId;
}

macro_rules! internal {
    ($($(#[$doc:meta])* $name:ident;)*) => { $(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub(super) struct $name(pub(super) u32);
    )* };
}

internal! {
    /// Id of a pod of the cluster.
    PodId;
    /// Id of a profile: the labels and named ports that pods of one ReplicaSet share.
    ProfileId;
    /// Id of a pod class.
    ClassId;
    /// Id of a CIDR region. It stays the same while CIDRs come and go, if most of the region's addresses stay.
    RegionId;
    /// Id of a peer: a selector or CIDR that rules name.
    PeerId;
}

/// A version of a policy object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct PolicyVersion(pub(super) u64);

/// The kind of addresses that an identity stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IdentityKind {
    /// Neither of the others: outside the cluster, another node, a pod in the network namespace of its node.
    World = 0,
    /// A pod.
    Pod = 1,
    /// The local node, which may always connect to its pods.
    LocalNode = 2,
}

/// A security identity: a class of addresses that no rule distinguishes. 0 = none.
///
/// Bits 31-30 are the [`IdentityKind`], bit 29 the family (1 = IPv6), the rest is a counter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity(pub u32);

impl Identity {
    /// No identity.
    pub const NONE: Self = Self(0);

    /// Number of identities that one kind and family can have.
    pub const NUMBERS: u32 = 1 << 29;

    pub(super) const fn new(kind: IdentityKind, family: Family, number: u32) -> Self {
        let six = match family {
            Family::V4 => 0,
            Family::V6 => 1 << 29,
        };
        Self((kind as u32) << 30 | six | number)
    }

    /// The kind of its addresses.
    #[must_use]
    pub const fn kind(self) -> IdentityKind {
        match self.0 >> 30 {
            1 => IdentityKind::Pod,
            2 => IdentityKind::LocalNode,
            _ => IdentityKind::World,
        }
    }

    /// Index into [`super::SetRef::defaults`]: bit 0 = IPv6, bit 1 = pod.
    #[must_use]
    pub const fn default_index(self) -> usize {
        let pod = matches!(self.kind(), IdentityKind::Pod) as usize;
        pod << 1 | (self.0 >> 29 & 1) as usize
    }
}

/// A policy verdict with the id of its rule, as a port table holds it: bit 30 = allow, below it the rule id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Verdict(pub u32);

const ALLOW: u32 = 1 << 30;

impl Verdict {
    /// The verdict that lets a packet pass.
    #[must_use]
    pub const fn allow(rule: RuleId) -> Self {
        Self(ALLOW | rule.0)
    }

    /// The verdict that drops a packet.
    #[must_use]
    pub const fn deny(rule: RuleId) -> Self {
        Self(rule.0)
    }

    /// Whether the packet passes.
    #[must_use]
    pub const fn is_allowed(self) -> bool {
        self.0 & ALLOW != 0
    }

    /// The rule that decided.
    #[must_use]
    pub const fn rule_id(self) -> RuleId {
        RuleId(self.0 & !ALLOW)
    }
}

/// The result of a set's lookup by peer identity. Bit 31 set: a [`Verdict`] for all ports; else the id of a port table. 0 = no entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VerdictOrTable(pub u32);

const INLINE: u32 = 1 << 31;

impl VerdictOrTable {
    /// No entry.
    pub const NONE: Self = Self(0);

    /// A verdict for all ports.
    #[must_use]
    pub const fn verdict(verdict: Verdict) -> Self {
        Self(INLINE | verdict.0)
    }

    /// A port table that has the verdict.
    #[must_use]
    pub const fn table(table: PortTableId) -> Self {
        Self(table.0)
    }

    /// The verdict, if it does not depend on the port.
    ///
    /// # Errors
    /// The port table to look up.
    pub const fn resolve(self) -> Result<Verdict, PortTableId> {
        if self.0 & INLINE != 0 { Ok(Verdict(self.0 & !INLINE)) } else { Err(PortTableId(self.0)) }
    }
}

/// A wrapping id counter that skips ids in use.
#[derive(Clone, Debug)]
pub(super) struct Counter {
    last: u32,
    limit: u32,
}

impl Counter {
    /// A counter whose first id is `after + 1`, and whose ids are below `limit`.
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
