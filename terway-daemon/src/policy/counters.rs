//! Counters of policy rules: the datapath counts by rule id, the daemon sums by policy and direction.
//!
//! The counter of a rule id is made before the id is written into a map that packets meet. It is read for the last time after the RCU grace period
//! behind which no map holds the id any more, so no packet is missed. The isolation of a pod counts for each policy that isolates it. A
//! daemon that takes over assigns other ids; it recognises old counters by a tag and goes on with their sums.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use terway_core::objects::{Action, Direction, ObjectKey};
use terway_core::policy::{Compiler, MatchedRule, RuleId};
use tracing::warn;

use crate::bpf::{BpfError, Datapath};

/// Packets and bytes of one verdict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    /// Connections that began, or packets that were dropped.
    pub(crate) packets: u64,
    /// Their bytes.
    pub(crate) bytes: u64,
}

impl Count {
    const fn add(&mut self, other: Self) {
        self.packets = self.packets.wrapping_add(other.packets);
        self.bytes = self.bytes.wrapping_add(other.bytes);
    }
}

/// Counts of a policy in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct VerdictCounts {
    /// Connections that began.
    pub(crate) allowed: Count,
    /// Packets that were dropped.
    pub(crate) denied: Count,
}

impl VerdictCounts {
    const fn of(allows: bool, count: Count) -> Self {
        let none = Count { packets: 0, bytes: 0 };
        if allows { Self { allowed: count, denied: none } } else { Self { allowed: none, denied: count } }
    }

    pub(super) const fn add(&mut self, other: Self) {
        self.allowed.add(other.allowed);
        self.denied.add(other.denied);
    }
}

/// A rule with its count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RuleCount {
    pub(crate) rule: MatchedRule,
    pub(crate) direction: Direction,
    pub(crate) is_allowed: bool,
    pub(crate) count: Count,
}

impl RuleCount {
    /// Whether the rule is one of a policy.
    pub(super) fn is_of(&self, policy: &ObjectKey) -> bool {
        policies_of(&self.rule).is_some_and(|(policies, ..)| policies.contains(policy))
    }
}

/// Counts by policy and direction.
pub(super) type Totals = BTreeMap<(ObjectKey, Direction), VerdictCounts>;

/// The policies that a rule counts for, its direction, and whether it allows; none for rules that belong to no policy.
fn policies_of(rule: &MatchedRule) -> Option<(&[ObjectKey], Direction, bool)> {
    match rule {
        MatchedRule::Rule { policy, direction, action, .. } => {
            Some((std::slice::from_ref(policy), *direction, *action == Action::Accept))
        }
        MatchedRule::Isolated { direction, policies } => Some((policies, *direction, false)),
        MatchedRule::NoPolicy
        | MatchedRule::Disabled
        | MatchedRule::Loopback
        | MatchedRule::LocalNode
        | MatchedRule::UnknownPod
        | MatchedRule::NotProgrammed => None,
    }
}

/// The tag of a rule in the kernel's counter: FNV-1a of its text. It must not change between versions, or sums begin anew.
fn tag(rule: &MatchedRule) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    rule.to_string().bytes().fold(0xcbf2_9ce4_8422_2325, step)
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct PolicyCounters {
    datapath: Arc<Datapath>,
    /// Locked while maps are read; never together with a step of the compiler.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Rules with a counter by rule id, and their count before the counter was made.
    active: BTreeMap<u32, (MatchedRule, Count)>,
    /// Counts of rules that were removed, of policies that still exist.
    removed: Totals,
    /// Counts of an earlier daemon's rules by tag, until they are adopted.
    found: HashMap<u64, Count>,
    /// A failed operation was logged; one line is enough.
    is_logged: bool,
}

impl State {
    fn log_once(&mut self, error: &BpfError) {
        if !std::mem::replace(&mut self.is_logged, true) {
            warn!(%error, "policy counters are incomplete");
        }
    }
}

impl PolicyCounters {
    pub(super) fn new(datapath: Arc<Datapath>) -> Self {
        Self { datapath, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Makes and removes counters for rule ids that were added or removed. To be called after a step of the compiler and before its operations
    /// are run, and after its deferred operations.
    pub(super) fn update(&self, compiler: &mut Compiler) {
        let changes = compiler.take_rule_id_changes();
        if changes.added.is_empty() && changes.removed.is_empty() {
            return;
        }
        let mut state = self.state();
        for RuleId(number) in changes.added {
            let Some(rule) = compiler.rule(RuleId(number)) else { continue };
            // An earlier daemon may have left a counter under this id, of a rule that was in no map when this one took over.
            self.save_existing(&mut state, number);
            match self.datapath.policy_counters().create(number, tag(rule)) {
                Ok(()) => drop(state.active.insert(number, (rule.clone(), Count::default()))),
                Err(error) => state.log_once(&error),
            }
        }
        for RuleId(number) in changes.removed {
            let Some((rule, before)) = state.active.remove(&number) else { continue };
            let count = self.read_and_remove(&mut state, number, before);
            let Some((policies, direction, allows)) = policies_of(&rule) else { continue };
            for policy in policies.iter().filter(|policy| compiler.has_policy(policy)) {
                let sum = state.removed.entry((policy.clone(), direction)).or_default();
                sum.add(VerdictCounts::of(allows, count));
            }
        }
    }

    /// Saves the count of an earlier daemon's counter, if there is one.
    fn save_existing(&self, state: &mut State, number: u32) {
        match self.datapath.policy_counters().read(number) {
            Ok(counter) if counter.tag != 0 => {
                let count = Count { packets: counter.packets, bytes: counter.bytes };
                state.found.entry(counter.tag).or_default().add(count);
            }
            Ok(_) => {}
            Err(error) => state.log_once(&error),
        }
    }

    /// Removes the counts of deleted policies.
    pub(super) fn remove_deleted(&self, compiler: &Compiler) {
        self.state().removed.retain(|(policy, _), _| compiler.has_policy(policy));
    }

    /// Treats the counters of a lost compiler as an earlier daemon's: [`Self::adopt`] adopts their counts.
    pub(super) fn orphan(&self) {
        let mut state = self.state();
        for (rule, before) in std::mem::take(&mut state.active).into_values() {
            state.found.entry(tag(&rule)).or_default().add(before);
        }
    }

    /// Adopts the counts of an earlier daemon's rules. To be called when no map holds their ids any more.
    pub(super) fn adopt(&self) {
        let mut state = self.state();
        let old = match self.datapath.policy_counters().rule_ids() {
            Ok(all) => all.into_iter().filter(|number| !state.active.contains_key(number)),
            Err(error) => return state.log_once(&error),
        };
        for number in old.collect::<Vec<_>>() {
            self.save_existing(&mut state, number);
            if let Err(error) = self.datapath.policy_counters().remove(number) {
                state.log_once(&error);
            }
        }
        let mut found = std::mem::take(&mut state.found);
        for (rule, before) in state.active.values_mut() {
            if let Some(count) = found.remove(&tag(rule)) {
                before.add(count);
            }
        }
    }

    /// Reads a counter for the last time and removes it.
    fn read_and_remove(&self, state: &mut State, number: u32, before: Count) -> Count {
        let count = self.read(state, number, before);
        if let Err(error) = self.datapath.policy_counters().remove(number) {
            state.log_once(&error);
        }
        count
    }

    fn read(&self, state: &mut State, number: u32, before: Count) -> Count {
        let mut sum = before;
        match self.datapath.policy_counters().read(number) {
            Ok(counter) => sum.add(Count { packets: counter.packets, bytes: counter.bytes }),
            Err(error) => state.log_once(&error),
        }
        sum
    }

    /// The counts of all rules in force, ordered by rule.
    pub(super) fn rules(&self) -> Vec<RuleCount> {
        self.rules_in(&mut self.state())
    }

    fn rules_in(&self, state: &mut State) -> Vec<RuleCount> {
        let live: Vec<(u32, MatchedRule, Count)> =
            state.active.iter().map(|(number, (rule, before))| (*number, rule.clone(), *before)).collect();
        let mut all = Vec::with_capacity(live.len());
        for (number, rule, before) in live {
            let count = self.read(state, number, before);
            if let Some((_, direction, is_allowed)) = policies_of(&rule) {
                all.push(RuleCount { rule, direction, is_allowed, count });
            }
        }
        all.sort_by(|a, b| a.rule.cmp(&b.rule));
        all
    }

    /// Counts by policy and direction, of policies that select a pod of this node or did so before.
    pub(super) fn totals(&self) -> Totals {
        let mut state = self.state();
        let mut sums = state.removed.clone();
        for rule in self.rules_in(&mut state) {
            for policy in policies_of(&rule.rule).map_or(&[][..], |(policies, ..)| policies) {
                let sum = sums.entry((policy.clone(), rule.direction)).or_default();
                sum.add(VerdictCounts::of(rule.is_allowed, rule.count));
            }
        }
        sums
    }
}

/// The label of a direction.
pub(crate) const fn direction_label(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    }
}

#[cfg(test)]
mod tests {
    use terway_core::objects::{Kind, ObjectName};

    use super::*;

    fn rule(name: &str, index: u32, action: Action) -> MatchedRule {
        let policy = ObjectKey { kind: Kind::NetworkPolicy, name: ObjectName::new("shop", name) };
        MatchedRule::Rule { policy, direction: Direction::Ingress, index, name: "".into(), action }
    }

    #[test]
    fn rules_count_for_their_policies() {
        let (policies, direction, allows) =
            policies_of(&rule("web", 0, Action::Accept)).map(|(p, d, a)| (p.len(), d, a)).unwrap();
        assert_eq!((policies, direction, allows), (1, Direction::Ingress, true));
        assert!(!policies_of(&rule("web", 0, Action::Deny)).unwrap().2);
        assert!(!policies_of(&MatchedRule::Isolated { direction: Direction::Egress, policies: Vec::new() }).unwrap().2);
        assert_eq!(policies_of(&MatchedRule::NoPolicy), None);
    }

    #[test]
    fn tags_differ_between_rules_and_are_stable() {
        let first = rule("web", 0, Action::Accept);
        assert_ne!(tag(&first), tag(&rule("web", 1, Action::Accept)));
        assert_ne!(tag(&first), tag(&rule("db", 0, Action::Accept)));
        // A pinned counter of an earlier version has this one.
        assert_eq!(first.to_string(), "NetworkPolicy shop/web, ingress rule 0: Accept");
        assert_eq!(tag(&first), 0x5623_7c53_eb7c_f755);
    }
}
