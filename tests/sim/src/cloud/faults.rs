//! Faults on order, and the server's own limits.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// What goes wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    /// The call is refused with this code and HTTP status, without effect.
    Error {
        /// Such as `InternalError`. For the metadata service only the status counts.
        code: String,
        /// Such as 500.
        status: u16,
    },
    /// The call takes this much longer.
    Delay {
        /// Milliseconds.
        ms: u64,
    },
    /// The call has its effect, and the connection breaks before the answer.
    LoseReply,
    /// The call has its effect, and the answer is not what the API promises.
    Garble,
    /// The call arrives twice, as after a proxy's repetition, and the caller sees the second answer.
    Duplicate,
    /// The call is answered at once and has its effect later: attaching, detaching, deleting and unassigning, which answer with
    /// nothing but success. Others are not concerned.
    EffectLater {
        /// Milliseconds.
        ms: u64,
    },
    /// An assign call gives at most this many addresses or prefixes.
    Partial {
        /// At least 1.
        most: u32,
    },
    /// What goes on after the answer (attaching, detaching, deleting) takes this much longer.
    SlowEnd {
        /// Milliseconds.
        ms: u64,
    },
    /// Attaching ends with the ENI `Available` again.
    FailEnd,
    /// Attaching ends with the ENI `InUse`, but its NIC never arrives.
    NoNic,
}

/// One fault: when and what. Without `nth` and `probability` it strikes every time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// The action, `metadata` for the metadata service, `metadata/PATH` for a part of it (below `meta-data/`, or `api/token`), `*` for
    /// every OpenAPI action.
    pub action: String,
    /// The how manieth matching call it strikes, from 1, counted since the fault was set.
    #[serde(default)]
    pub nth: Option<u64>,
    /// The chance of each matching call, 0 to 1.
    #[serde(default)]
    pub probability: Option<f64>,
    /// How often it strikes at most.
    #[serde(default)]
    pub times: Option<u64>,
    /// What goes wrong.
    pub kind: FaultKind,
}

impl Fault {
    /// A fault that strikes the next `times` calls of an action.
    #[must_use]
    pub fn next(action: &str, times: u64, kind: FaultKind) -> Self {
        Self { action: action.to_owned(), nth: None, probability: None, times: Some(times), kind }
    }

    /// A refusal of the next `times` calls.
    #[must_use]
    pub fn refuse(action: &str, times: u64, code: &str, status: u16) -> Self {
        Self::next(action, times, FaultKind::Error { code: code.to_owned(), status })
    }
}

pub(super) struct Faults {
    armed: Vec<ActiveFault>,
    random: fastrand::Rng,
}

struct ActiveFault {
    fault: Fault,
    seen: u64,
    struck: u64,
}

impl Faults {
    pub(super) fn new(seed: u64, faults: Vec<Fault>) -> Self {
        let mut new = Self { armed: Vec::new(), random: fastrand::Rng::with_seed(seed) };
        new.set(faults);
        new
    }

    pub(super) fn set(&mut self, faults: Vec<Fault>) {
        self.armed = faults.into_iter().map(|fault| ActiveFault { fault, seen: 0, struck: 0 }).collect();
    }

    pub(super) fn add(&mut self, faults: Vec<Fault>) {
        self.armed.extend(faults.into_iter().map(|fault| ActiveFault { fault, seen: 0, struck: 0 }));
    }

    pub(super) fn list(&self) -> Vec<Fault> {
        self.armed.iter().map(|armed| armed.fault.clone()).collect()
    }

    /// What strikes this call, in the order in which the faults were given.
    pub(super) fn faults_for(&mut self, action: &str) -> Vec<FaultKind> {
        let mut kinds = Vec::new();
        for ActiveFault { fault, seen, struck } in &mut self.armed {
            let concerned = match action.strip_prefix(&*fault.action) {
                Some(rest) => rest.is_empty() || rest.starts_with('/') || fault.action.ends_with('/'),
                None => fault.action == "*" && !action.starts_with("metadata"),
            };
            if !concerned {
                continue;
            }
            *seen += 1;
            let strikes = fault.nth.is_none_or(|nth| nth == *seen)
                && fault.times.is_none_or(|times| *struck < times)
                && fault.probability.is_none_or(|chance| self.random.f64() < chance);
            if strikes {
                *struck += 1;
                kinds.push(fault.kind.clone());
            }
        }
        kinds
    }
}

/// Token buckets by action.
pub(super) struct Buckets {
    per_minute: BTreeMap<String, u32>,
    levels: BTreeMap<String, (f64, Instant)>,
}

impl Buckets {
    pub(super) fn new(per_minute: BTreeMap<String, u32>) -> Self {
        Self { per_minute, levels: BTreeMap::new() }
    }

    /// Whether this call is within the limit.
    pub(super) fn admit(&mut self, action: &str, now: Instant) -> bool {
        let Some(limit) = self.per_minute.get(action).or_else(|| self.per_minute.get("")) else { return true };
        let limit = f64::from(*limit);
        let (level, at) = self.levels.entry(action.to_owned()).or_insert((limit, now));
        let minutes = now.duration_since(*at).div_duration_f64(Duration::from_secs(60));
        (*level, *at) = ((*level + minutes * limit).min(limit), now);
        let admitted = *level >= 1.0;
        if admitted {
            *level -= 1.0;
        }
        admitted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_count_from_their_setting_and_repeat_by_seed() {
        let nth = Fault { nth: Some(2), ..Fault::next("A", 9, FaultKind::LoseReply) };
        let mut faults = Faults::new(1, vec![nth, Fault::next("*", 1, FaultKind::Garble)]);
        assert_eq!(faults.faults_for("metadata/mac"), []);
        let mut parts = Faults::new(1, vec![Fault::next("metadata/ram", 9, FaultKind::LoseReply)]);
        assert_eq!(parts.faults_for("metadata/mac"), []);
        assert_eq!(parts.faults_for("metadata/ram/security-credentials/").len(), 1);
        assert_eq!(faults.faults_for("A"), [FaultKind::Garble]);
        assert_eq!(faults.faults_for("A"), [FaultKind::LoseReply]);
        assert_eq!(faults.faults_for("A"), []);
        let chance =
            Fault { action: "A".into(), nth: None, probability: Some(0.5), times: None, kind: FaultKind::LoseReply };
        let history = |seed| {
            let mut faults = Faults::new(seed, vec![chance.clone()]);
            (0..64).map(|_| faults.faults_for("A").len()).collect::<Vec<_>>()
        };
        assert_eq!(history(7), history(7));
        assert_ne!(history(7), history(8));
        assert!((10..54).contains(&history(7).iter().sum::<usize>()));
    }

    #[test]
    fn buckets_refill_with_time() {
        let mut buckets = Buckets::new(BTreeMap::from([("A".to_owned(), 60)]));
        let start = Instant::now();
        assert_eq!((0..100).filter(|_| buckets.admit("A", start)).count(), 60);
        assert_eq!((0..100).filter(|_| buckets.admit("A", start + Duration::from_secs(2))).count(), 2);
        assert!(buckets.admit("B", start));
    }
}
