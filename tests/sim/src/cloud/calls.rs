//! The book of calls: how many of each action, and each one.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use serde::Serialize;

/// Older ones are dropped.
const MOST_RECORDS: usize = 100_000;

/// Calls of one action.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Calls {
    /// All that came in, refused ones included.
    pub total: u64,
    /// Those that were refused, for whatever reason.
    pub failed: u64,
    /// Those of the failed ones that were refused because there were too many.
    pub throttled: u64,
    /// Refused ones by code. For the metadata service the code is the HTTP status.
    pub refused: BTreeMap<String, u64>,
    /// Those that had their effect, but whose answer did not arrive.
    pub lost: u64,
}

/// One call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CallRecord {
    /// Its place among all calls, from 1.
    pub number: u64,
    /// When its answer went out, in milliseconds since the cloud was made.
    pub at_ms: u64,
    /// The action; `metadata` for the metadata service.
    pub action: String,
    /// Its `ClientToken`.
    pub token: Option<String>,
    /// The ENI it names, or the path for the metadata service.
    pub subject: Option<String>,
    /// The code it was refused with; empty if it was not.
    pub code: String,
    /// Whether its answer did not arrive.
    pub lost: bool,
    /// Its request id.
    pub request_id: String,
}

pub(super) struct CallLog {
    began: Instant,
    counts: BTreeMap<String, Calls>,
    records: VecDeque<CallRecord>,
    number: u64,
}

impl CallLog {
    pub(super) fn new() -> Self {
        Self { began: Instant::now(), counts: BTreeMap::new(), records: VecDeque::new(), number: 0 }
    }

    /// Enters a call; number and time are filled in. Returns how many of its action there are now.
    pub(super) fn enter(&mut self, mut record: CallRecord) -> u64 {
        self.number += 1;
        record.number = self.number;
        record.at_ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let counts = self.counts.entry(record.action.clone()).or_default();
        counts.total += 1;
        counts.lost += u64::from(record.lost);
        if !record.code.is_empty() {
            counts.failed += 1;
            counts.throttled += u64::from(record.code.starts_with("Throttling") || record.code == "429");
            *counts.refused.entry(record.code.clone()).or_default() += 1;
        }
        let total = counts.total;
        self.records.push_back(record);
        if self.records.len() > MOST_RECORDS {
            self.records.pop_front();
        }
        total
    }

    pub(super) fn counts(&self) -> &BTreeMap<String, Calls> {
        &self.counts
    }

    pub(super) fn records(&self) -> impl Iterator<Item = &CallRecord> {
        self.records.iter()
    }

    pub(super) fn clear(&mut self) {
        self.counts.clear();
        self.records.clear();
    }
}
