//! What policies decided, counted: from the datapath's counters by reason to sums by policy and direction.
//!
//! A reason's counter is made before its number stands in a map that packets meet, and read for the last time behind the fence after which it
//! stands in none, so nothing is missed. What several policies decide together, their isolation of a pod, counts for each of them. A
//! daemon that takes over gives out other numbers; it knows the old counters again by a tag, and their sums go on.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use terway_core::objects::{Action, Direction, ObjectKey};
use terway_core::policy::{Compiler, MatchedRule, RuleId};
use tracing::warn;

use crate::bpf::{BpfError, Datapath};

/// How often something decided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    /// Connections that began, or packets that were dropped.
    pub(super) packets: u64,
    /// Their bytes.
    pub(super) bytes: u64,
}

impl Tally {
    const fn add(&mut self, other: Self) {
        self.packets = self.packets.wrapping_add(other.packets);
        self.bytes = self.bytes.wrapping_add(other.bytes);
    }
}

/// What a policy decided in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Verdicts {
    /// Connections that began.
    pub(super) allowed: Tally,
    /// Packets that were dropped.
    pub(super) denied: Tally,
}

impl Verdicts {
    const fn of(allows: bool, tally: Tally) -> Self {
        let none = Tally { packets: 0, bytes: 0 };
        if allows { Self { allowed: tally, denied: none } } else { Self { allowed: none, denied: tally } }
    }

    pub(super) const fn add(&mut self, other: Self) {
        self.allowed.add(other.allowed);
        self.denied.add(other.denied);
    }
}

/// One reason, and how often it decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Counted {
    pub(super) reason: MatchedRule,
    pub(super) direction: Direction,
    pub(super) allows: bool,
    pub(super) tally: Tally,
}

impl Counted {
    /// Whether it counts for a policy.
    pub(super) fn concerns(&self, policy: &ObjectKey) -> bool {
        subject(&self.reason).is_some_and(|(policies, ..)| policies.contains(policy))
    }
}

/// Sums by policy and direction.
pub(super) type Sums = BTreeMap<(ObjectKey, Direction), Verdicts>;

/// What a reason is for, and whether it allows; none for those that are no policy's.
fn subject(reason: &MatchedRule) -> Option<(&[ObjectKey], Direction, bool)> {
    match reason {
        MatchedRule::Rule { policy, direction, action, .. } => {
            Some((std::slice::from_ref(policy), *direction, *action == Action::Accept))
        }
        MatchedRule::Isolated { direction, policies } => Some((policies, *direction, false)),
        MatchedRule::NoPolicy
        | MatchedRule::Disabled
        | MatchedRule::Loopback
        | MatchedRule::LocalNode
        | MatchedRule::UnknownPod => None,
    }
}

/// What stands for a reason in the kernel: its text, by FNV-1a. It must be the same in each version, or sums begin anew.
fn tag(reason: &MatchedRule) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    reason.to_string().bytes().fold(0xcbf2_9ce4_8422_2325, step)
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Ledger {
    datapath: Arc<Datapath>,
    /// Held for as long as maps are read; never together with a step of the compiler.
    book: Mutex<Book>,
}

#[derive(Debug, Default)]
struct Book {
    /// RuleIds with a counter, and what was counted before it was made.
    live: BTreeMap<u32, (MatchedRule, Tally)>,
    /// What reasons counted that are gone.
    past: Sums,
    /// What an earlier daemon's reasons counted, by tag, until it is taken over.
    found: HashMap<u64, Tally>,
    /// The kernel has refused a counter; one line in the log is enough.
    complained: bool,
}

impl Book {
    fn complain(&mut self, error: &BpfError) {
        if !std::mem::replace(&mut self.complained, true) {
            warn!(%error, "what policies decide is not counted completely");
        }
    }
}

impl Ledger {
    pub(super) fn new(datapath: Arc<Datapath>) -> Self {
        Self { datapath, book: Mutex::default() }
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows what has changed about reasons: after a step of the compiler and before its operations run, or after it has settled.
    pub(super) fn follow(&self, compiler: &mut Compiler) {
        let changes = compiler.take_rule_id_changes();
        if changes.added.is_empty() && changes.removed.is_empty() {
            return;
        }
        let mut book = self.book();
        for RuleId(number) in changes.added {
            let Some(reason) = compiler.rule(RuleId(number)) else { continue };
            // An earlier daemon may have left one under this number, of a reason that stood in no map when this one took over.
            self.keep(&mut book, number);
            match self.datapath.policy_counters().create(number, tag(reason)) {
                Ok(()) => drop(book.live.insert(number, (reason.clone(), Tally::default()))),
                Err(error) => book.complain(&error),
            }
        }
        for RuleId(number) in changes.removed {
            let Some((reason, before)) = book.live.remove(&number) else { continue };
            let tally = self.take(&mut book, number, before);
            let Some((policies, direction, allows)) = subject(&reason) else { continue };
            for policy in policies.iter().filter(|policy| compiler.has_policy(policy)) {
                let sum = book.past.entry((policy.clone(), direction)).or_default();
                sum.add(Verdicts::of(allows, tally));
            }
        }
    }

    /// Notes what a counter of an earlier daemon holds, if there is one.
    fn keep(&self, book: &mut Book, number: u32) {
        match self.datapath.policy_counters().read(number) {
            Ok(counter) if counter.tag != 0 => {
                let tally = Tally { packets: counter.packets, bytes: counter.bytes };
                book.found.entry(counter.tag).or_default().add(tally);
            }
            Ok(_) => {}
            Err(error) => book.complain(&error),
        }
    }

    /// Forgets the sums of policies that are no more.
    pub(super) fn forget(&self, compiler: &Compiler) {
        self.book().past.retain(|(policy, _), _| compiler.has_policy(policy));
    }

    /// Takes over what an earlier daemon's reasons have counted, which decide nothing any more.
    pub(super) fn inherit(&self) {
        let mut book = self.book();
        let old = match self.datapath.policy_counters().rule_ids() {
            Ok(all) => all.into_iter().filter(|number| !book.live.contains_key(number)),
            Err(error) => return book.complain(&error),
        };
        for number in old.collect::<Vec<_>>() {
            self.keep(&mut book, number);
            if let Err(error) = self.datapath.policy_counters().remove(number) {
                book.complain(&error);
            }
        }
        let mut found = std::mem::take(&mut book.found);
        for (reason, before) in book.live.values_mut() {
            if let Some(tally) = found.remove(&tag(reason)) {
                before.add(tally);
            }
        }
    }

    /// Reads a counter for the last time.
    fn take(&self, book: &mut Book, number: u32, before: Tally) -> Tally {
        let tally = self.read(book, number, before);
        if let Err(error) = self.datapath.policy_counters().remove(number) {
            book.complain(&error);
        }
        tally
    }

    fn read(&self, book: &mut Book, number: u32, before: Tally) -> Tally {
        let mut sum = before;
        match self.datapath.policy_counters().read(number) {
            Ok(counter) => sum.add(Tally { packets: counter.packets, bytes: counter.bytes }),
            Err(error) => book.complain(&error),
        }
        sum
    }

    /// Everything that is counted now, by reason, in the order of the reasons.
    pub(super) fn counted(&self) -> Vec<Counted> {
        self.counted_in(&mut self.book())
    }

    fn counted_in(&self, book: &mut Book) -> Vec<Counted> {
        let live: Vec<(u32, MatchedRule, Tally)> =
            book.live.iter().map(|(number, (reason, before))| (*number, reason.clone(), *before)).collect();
        let mut all = Vec::with_capacity(live.len());
        for (number, reason, before) in live {
            let tally = self.read(book, number, before);
            if let Some((_, direction, allows)) = subject(&reason) {
                all.push(Counted { direction, allows, tally, reason });
            }
        }
        all.sort_by(|a, b| a.reason.cmp(&b.reason));
        all
    }

    /// Sums by policy and direction, of policies that select a pod of this node, or have.
    pub(super) fn sums(&self) -> Sums {
        let mut book = self.book();
        let mut sums = book.past.clone();
        for counted in self.counted_in(&mut book) {
            for policy in subject(&counted.reason).map_or(&[][..], |(policies, ..)| policies) {
                let sum = sums.entry((policy.clone(), counted.direction)).or_default();
                sum.add(Verdicts::of(counted.allows, counted.tally));
            }
        }
        sums
    }
}

/// The word for a direction.
pub(super) const fn word(direction: Direction) -> &'static str {
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
    fn what_a_reason_counts_for() {
        let (policies, direction, allows) =
            subject(&rule("web", 0, Action::Accept)).map(|(p, d, a)| (p.len(), d, a)).unwrap();
        assert_eq!((policies, direction, allows), (1, Direction::Ingress, true));
        assert!(!subject(&rule("web", 0, Action::Deny)).unwrap().2);
        assert!(!subject(&MatchedRule::Isolated { direction: Direction::Egress, policies: Vec::new() }).unwrap().2);
        assert_eq!(subject(&MatchedRule::NoPolicy), None);
    }

    #[test]
    fn tags_tell_reasons_apart_and_stay_what_they_are() {
        let first = rule("web", 0, Action::Accept);
        assert_ne!(tag(&first), tag(&rule("web", 1, Action::Accept)));
        assert_ne!(tag(&first), tag(&rule("db", 0, Action::Accept)));
        // A pinned counter of an earlier version has this one.
        assert_eq!(first.to_string(), "NetworkPolicy shop/web, ingress rule 0: Accept");
        assert_eq!(tag(&first), 0x5623_7c53_eb7c_f755);
    }
}
