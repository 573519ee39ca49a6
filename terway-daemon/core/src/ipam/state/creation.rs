//! Creations of ENIs that are under way: each keeps its client token until its outcome is known.

use std::collections::BTreeMap;

use super::block::CallBlock;
use crate::clock::Moment;
use crate::cloud::{CloudError, ErrorClass};
use crate::errors::Error;
use crate::ident::Family;
use crate::ipam::config::{PoolConfig, addresses_per_prefix};
use crate::ipam::ids::{ClientToken, OpId};
use crate::ipam::record::CreationRecord;

/// The addresses and prefixes that an ENI is created with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct EniContents {
    /// The primary address included.
    pub(crate) v4: u32,
    pub(crate) v6: u32,
    pub(crate) v4_prefixes: u32,
    pub(crate) v6_prefixes: u32,
}

/// The creation of one ENI: a call that may have been sent.
#[derive(Debug)]
pub(crate) struct Creation {
    record: CreationRecord,
    /// The attempt under way; `None` while it waits to be repeated.
    op: Option<OpId>,
    failures: u32,
    error: Option<CloudError>,
    /// An attempt ended without an outcome: only the cloud's word about this very token may end it.
    is_uncertain: bool,
    /// Refused, and only kept because an attempt without an outcome may still arrive: asked again at that moment.
    recheck_at: Option<Moment>,
}

/// What a failed creation needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CreationFailure {
    /// To be repeated after so many failures in a row.
    Retry(u32),
    /// Refused, and to be asked once more, when an earlier attempt without an outcome must have arrived.
    Recheck,
    /// Refused.
    Refused,
}

impl Creation {
    pub(crate) const fn new(record: CreationRecord) -> Self {
        Self { record, op: None, failures: 0, error: None, is_uncertain: false, recheck_at: None }
    }

    pub(crate) const fn restored(record: CreationRecord) -> Self {
        Self { record, op: None, failures: 0, error: None, is_uncertain: true, recheck_at: None }
    }

    pub(crate) const fn record(&self) -> &CreationRecord {
        &self.record
    }

    pub(crate) const fn error(&self) -> Option<&CloudError> {
        self.error.as_ref()
    }

    pub(crate) const fn has_failed(&self) -> bool {
        self.failures > 0
    }

    /// Whether it was refused, so that nothing is expected of it.
    pub(crate) const fn is_refused(&self) -> bool {
        self.recheck_at.is_some()
    }

    /// Whether a retry now tells more than the last one.
    pub(crate) fn may_retry(&self, now: Moment) -> bool {
        self.recheck_at.is_none_or(|at| at <= now)
    }

    /// Units it brings.
    pub(crate) fn units(&self, config: &PoolConfig) -> u32 {
        let brings = |family: Family| match family {
            Family::V4 => self.record.v4 + self.record.v4_prefixes * addresses_per_prefix(family),
            Family::V6 => self.record.v6 + self.record.v6_prefixes * addresses_per_prefix(family),
        };
        config.families().iter().map(|family| brings(*family)).min().unwrap_or(0).min(config.units_per_eni())
    }

    /// Notes that the call is sent; what to send, unless it is under way already.
    pub(crate) fn begin(&mut self, op: OpId) -> Option<CreationRecord> {
        if self.op.is_some() {
            return None;
        }
        self.op = Some(op);
        Some(self.record.clone())
    }

    /// Takes in a failure. `recheck_at` is when an attempt without an outcome must have arrived.
    pub(crate) fn failed(&mut self, error: &CloudError, recheck_at: Moment) -> CreationFailure {
        self.is_uncertain |= error.class == ErrorClass::Unknown;
        let repeat = match error.class {
            ErrorClass::Throttled | ErrorClass::Unknown | ErrorClass::InvalidState => true,
            // The cloud refused the caller, so this says nothing about an earlier attempt.
            ErrorClass::Forbidden => self.is_uncertain,
            ErrorClass::VSwitchExhausted | ErrorClass::Quota | ErrorClass::NotFound | ErrorClass::Invalid => false,
        };
        if repeat {
            self.op = None;
            self.recheck_at = None;
            self.failures += 1;
            self.error = Some(error.clone());
            return CreationFailure::Retry(self.failures);
        }
        if self.is_uncertain && self.recheck_at.is_none() {
            // An earlier attempt may be on its way yet, and make an ENI that nobody knows. The same token asked again when it must have
            // arrived brings that ENI, or this refusal once more.
            (self.op, self.recheck_at) = (None, Some(recheck_at));
            return CreationFailure::Recheck;
        }
        CreationFailure::Refused
    }
}

/// All creations under way, and the back-off after refused ones.
#[derive(Debug, Default)]
pub(crate) struct Creations {
    by_token: BTreeMap<ClientToken, Creation>,
    block: CallBlock,
    /// ENIs in a row that were given back because their NICs never appeared.
    lost_nics: u32,
}

impl Creations {
    pub(crate) fn insert(&mut self, creation: Creation) {
        self.by_token.insert(creation.record.token.clone(), creation);
    }

    pub(crate) fn get_mut(&mut self, token: &ClientToken) -> Option<&mut Creation> {
        self.by_token.get_mut(token)
    }

    /// The creation whose attempt under way has this number.
    pub(crate) fn by_op(&mut self, op: OpId) -> Option<&mut Creation> {
        self.by_token.values_mut().find(|creation| creation.op == Some(op))
    }

    pub(crate) fn remove(&mut self, token: &ClientToken) {
        self.by_token.remove(token);
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Creation> {
        self.by_token.values()
    }

    pub(crate) fn count(&self) -> usize {
        self.by_token.len()
    }

    /// The end of the back-off and its cause, while it lasts.
    pub(crate) fn blocked(&self, now: Moment) -> Option<(Moment, &Error)> {
        self.block.get(now)
    }

    pub(crate) fn block(&mut self, until: Moment, error: Error) {
        self.block.set(until, error);
    }

    /// The configuration has changed, which may be the cure.
    pub(crate) fn unblock(&mut self) {
        self.block.clear();
        self.lost_nics = 0;
    }

    pub(crate) const fn nic_appeared(&mut self) {
        self.lost_nics = 0;
    }

    /// An ENI is given back because its NIC never appeared; how many in a row.
    pub(crate) const fn nic_lost(&mut self) -> u32 {
        self.lost_nics += 1;
        self.lost_nics
    }
}
