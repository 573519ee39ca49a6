//! Answers of the policy actor: status, list and the names in flow events.

use std::collections::{BTreeMap, BTreeSet};

use terway_core::ident::PodRef;
use terway_core::objects::{Direction, ObjectKey, ObjectName};
use terway_core::policy::{Compiler, MatchedRule, Stats};

use super::counters::{PolicyCounters, RuleCount, VerdictCounts};

/// The status of policies on this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyStatus {
    /// Whether policies are enforced.
    pub is_enforced: bool,
    /// Whether all objects that policies need were listed; before that, nothing is compiled.
    pub is_synced: bool,
    /// Numbers of the compiler.
    pub stats: Stats,
    /// Pods of this node that are in quarantine, because their labels are not known yet.
    pub quarantined: Vec<ObjectName>,
}

/// The policies in force.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyList {
    /// Whether policies are enforced.
    pub is_enforced: bool,
    /// Whether all objects that policies need were listed.
    pub is_synced: bool,
    /// The policies.
    pub policies: Vec<PolicyEntry>,
}

/// A policy in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyEntry {
    /// Its kind and name.
    pub key: ObjectKey,
    /// The pods of this node that it selects.
    pub pods: Vec<PodRef>,
    /// Map entries of the policy that are missing or out of date.
    pub problems: Vec<String>,
    /// Its counts, both directions together.
    pub(crate) total: VerdictCounts,
    /// Its counts by rule; empty in a list of several policies, which would be as long as there are pairs of policies.
    pub(crate) rules: Vec<RuleCount>,
}

/// The verdict of policies on the first packet of a connection, as a flow event names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyVerdict {
    /// Whether the connection is allowed.
    pub is_allowed: bool,
    /// The rule that matched.
    pub rule: String,
    /// The policies that the rule belongs to, [`NAMED_POLICIES`] at most.
    pub policies: Vec<String>,
}

/// The policies that a verdict names at most: events are kept by the thousand.
pub const NAMED_POLICIES: usize = 16;

/// The policies that a rule belongs to, the first of them.
pub(super) fn policies(rule: &MatchedRule) -> Vec<String> {
    match rule {
        MatchedRule::Rule { policy, .. } => vec![policy.to_string()],
        MatchedRule::Isolated { policies, .. } => {
            policies.iter().take(NAMED_POLICIES).map(ToString::to_string).collect()
        }
        _ => Vec::new(),
    }
}

/// The policies of a namespace and of a name, where these are not empty.
pub(super) fn list(
    compiler: &Compiler,
    (namespace, name): (&str, &str),
    pod: impl Fn(&u32) -> Option<PodRef>,
    counters: &PolicyCounters,
    unapplied: &BTreeMap<ObjectKey, BTreeSet<String>>,
) -> Vec<PolicyEntry> {
    let (totals, rules) = (counters.totals(), counters.rules());
    let matches = |part: &str, filter: &str| filter.is_empty() || part == filter;
    let all = compiler.policies().into_iter();
    let selected = all.filter(|(key, _)| matches(&key.name.namespace, namespace) && matches(&key.name.name, name));
    let rules_of = |key: &ObjectKey| match name.is_empty() {
        true => Vec::new(),
        false => rules.iter().filter(|rule| rule.is_of(key)).cloned().collect(),
    };
    let entry = |(key, slots): (ObjectKey, Vec<u32>)| {
        let directions = [Direction::Ingress, Direction::Egress];
        let mut total = VerdictCounts::default();
        for counts in directions.iter().filter_map(|direction| totals.get(&(key.clone(), *direction))) {
            total.add(*counts);
        }
        let problems = unapplied.get(&key).into_iter().flatten().cloned().collect();
        PolicyEntry { pods: slots.iter().filter_map(&pod).collect(), problems, total, rules: rules_of(&key), key }
    };
    selected.map(entry).collect()
}
