//! Rule ids: each verdict in the maps carries the id of the rule that it comes from.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;

use super::ids::{Counter, RuleId, Verdict};
use crate::objects::{Action, Direction, ObjectKey};

/// No policy says anything about the endpoint in this direction.
pub const NO_POLICY: RuleId = RuleId(1);
/// Policies are switched off.
pub const DISABLED: RuleId = RuleId(2);
/// A pod connects to itself.
pub const LOOPBACK: RuleId = RuleId(3);
/// The local node connects to its pod.
pub const LOCAL_NODE: RuleId = RuleId(4);
/// The pod's labels are not known yet, and a policy may select it.
pub const UNKNOWN_POD: RuleId = RuleId(5);
/// A policy of the endpoint could not be written into the maps.
pub const NOT_PROGRAMMED: RuleId = RuleId(6);

/// No policy that was asked decides: those of the next tier are asked, and after the last one the packet passes.
pub(super) const UNDECIDED: Verdict = Verdict::allow(NO_POLICY);

/// What sets say together that are asked one after the other.
pub(super) fn decided(said: impl Iterator<Item = Verdict>) -> Option<Verdict> {
    said.reduce(|first, next| if first == UNDECIDED { next } else { first })
}

/// Numbers up to this one are fixed.
const FIXED: u32 = 15;
/// Decisions hold 30 bits of it.
const LIMIT: u32 = 1 << 30;

/// The rule that a verdict comes from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MatchedRule {
    /// No policy says anything about the pod in this direction, or those that do leave this traffic alone.
    NoPolicy,
    /// Policies are switched off (`disable_network_policy`).
    Disabled,
    /// A pod always reaches itself.
    Loopback,
    /// The local node always reaches its pods.
    LocalNode,
    /// The pod's labels are not known yet, and a policy may select it.
    UnknownPod,
    /// A policy of the pod could not be written into the maps; the pod is in lockdown until it is.
    NotProgrammed,
    /// One rule decided.
    Rule {
        /// The policy it belongs to.
        policy: ObjectKey,
        /// The direction it is for.
        direction: Direction,
        /// Its place in the policy, counted from 0.
        index: u32,
        /// Its name, if it has one.
        name: Arc<str>,
        /// What it does.
        action: Action,
    },
    /// These policies isolate the pod in this direction, and none of their rules allows the traffic.
    Isolated {
        /// The direction.
        direction: Direction,
        /// The policies, sorted.
        policies: Vec<ObjectKey>,
    },
}

/// So many policies that isolate a pod together are named; a namespace may have a thousand.
const NAMED: usize = 4;

impl fmt::Display for MatchedRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoPolicy => f.write_str("no policy decides about it"),
            Self::Disabled => f.write_str("network policies are switched off"),
            Self::Loopback => f.write_str("a pod always reaches itself"),
            Self::LocalNode => f.write_str("a node always reaches its own pods"),
            Self::UnknownPod => f.write_str("the pod's labels are not known yet, and a policy may select it"),
            Self::NotProgrammed => f.write_str("a policy of the pod could not be written into the maps"),
            Self::Rule { policy, direction, index, name, action } => {
                let direction = if *direction == Direction::Ingress { "ingress" } else { "egress" };
                write!(f, "{policy}, {direction} rule {index}")?;
                if !name.is_empty() {
                    write!(f, " (`{name}`)")?;
                }
                write!(f, ": {action:?}")
            }
            Self::Isolated { direction, policies } => {
                let direction = if *direction == Direction::Ingress { "ingress" } else { "egress" };
                write!(f, "isolated in {direction} by ")?;
                for (n, policy) in policies.iter().take(NAMED).enumerate() {
                    write!(f, "{}{policy}", if n == 0 { "" } else { ", " })?;
                }
                if let more @ 1.. = policies.len().saturating_sub(NAMED) {
                    write!(f, " and {more} more")?;
                }
                f.write_str(", none of whose rules allows it")
            }
        }
    }
}

/// Rule ids that have come into use since the last call, and those that are no longer in use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuleIdChanges {
    /// They stand in the maps as soon as the operations of the event have run.
    pub added: BTreeSet<RuleId>,
    /// Nothing refers to them: they stood in sets that were removed behind a fence.
    pub removed: BTreeSet<RuleId>,
}

/// The rules in use, each with its id and the number of sets that use it.
#[derive(Debug)]
pub(super) struct RuleIds {
    numbers: HashMap<MatchedRule, (RuleId, usize)>,
    reasons: HashMap<RuleId, MatchedRule>,
    counter: Counter,
    pub(super) changes: RuleIdChanges,
}

impl RuleIds {
    pub(super) fn new(after: u32) -> Self {
        let fixed = [
            (NO_POLICY, MatchedRule::NoPolicy),
            (DISABLED, MatchedRule::Disabled),
            (LOOPBACK, MatchedRule::Loopback),
            (LOCAL_NODE, MatchedRule::LocalNode),
            (UNKNOWN_POD, MatchedRule::UnknownPod),
            (NOT_PROGRAMMED, MatchedRule::NotProgrammed),
        ];
        Self {
            numbers: HashMap::new(),
            reasons: fixed.into_iter().collect(),
            counter: Counter::new(after.max(FIXED), LIMIT),
            changes: RuleIdChanges::default(),
        }
    }

    pub(super) fn enlist(&mut self, reason: MatchedRule) -> RuleId {
        if let Some((id, users)) = self.numbers.get_mut(&reason) {
            *users += 1;
            return *id;
        }
        let id = RuleId(self.counter.next(|n| n <= FIXED || self.reasons.contains_key(&RuleId(n))));
        self.numbers.insert(reason.clone(), (id, 1));
        self.reasons.insert(id, reason);
        self.changes.added.insert(id);
        id
    }

    pub(super) fn release(&mut self, id: RuleId) {
        let Some(reason) = self.reasons.get(&id) else { return };
        if let Some((_, users)) = self.numbers.get_mut(reason) {
            *users -= 1;
            if *users == 0 {
                self.numbers.remove(reason);
                self.reasons.remove(&id);
                // What nobody has heard of need not go.
                if !self.changes.added.remove(&id) {
                    self.changes.removed.insert(id);
                }
            }
        }
    }

    pub(super) fn get(&self, id: RuleId) -> Option<&MatchedRule> {
        self.reasons.get(&id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::{Kind, ObjectName};

    #[test]
    fn explanation_of_many_isolating_policies() {
        let key = |n: u32| ObjectKey { kind: Kind::NetworkPolicy, name: ObjectName::new("x", &format!("p{n}")) };
        let says = |many: u32| {
            MatchedRule::Isolated { direction: Direction::Ingress, policies: (1..=many).map(key).collect() }.to_string()
        };
        assert_eq!(says(1), format!("isolated in ingress by {}, none of whose rules allows it", key(1)));
        let four = [1, 2, 3, 4].map(|n| key(n).to_string()).join(", ");
        assert_eq!(says(4), format!("isolated in ingress by {four}, none of whose rules allows it"));
        assert_eq!(says(1_000), format!("isolated in ingress by {four} and 996 more, none of whose rules allows it"));
    }
}
