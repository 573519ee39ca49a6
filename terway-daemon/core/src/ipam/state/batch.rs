//! The effects of one step: at most one write to the store, then everything else.

use crate::ipam::effect::Effect;
use crate::ipam::record::{Change, Record, RecordKey};

/// The effects that one step has ordered so far.
///
/// Writing first all that the step decided is stricter than needed for each effect, and makes every step one transaction.
#[derive(Debug, Default)]
pub(crate) struct EffectBatch {
    changes: Vec<Change>,
    is_durable: bool,
    effects: Vec<Effect>,
}

impl EffectBatch {
    /// Writes a record before any effect of this step.
    pub(crate) fn put(&mut self, record: Record) {
        self.changes.push(Change::Put(record));
        self.is_durable = true;
    }

    /// Deletes a record before any effect of this step.
    pub(crate) fn delete(&mut self, key: RecordKey) {
        self.changes.push(Change::Delete(key));
        self.is_durable = true;
    }

    /// Writes a record some time.
    pub(crate) fn put_lazily(&mut self, record: Record) {
        self.changes.push(Change::Put(record));
    }

    /// Deletes a record some time.
    pub(crate) fn delete_lazily(&mut self, key: RecordKey) {
        self.changes.push(Change::Delete(key));
    }

    /// Orders an effect other than a write.
    pub(crate) fn effect(&mut self, effect: Effect) {
        self.effects.push(effect);
    }

    /// Ends the step: its effects in the order of execution.
    pub(crate) fn take(&mut self) -> Vec<Effect> {
        let Self { changes, is_durable, effects } = std::mem::take(self);
        let mut all = Vec::with_capacity(effects.len() + 2);
        if !changes.is_empty() {
            all.push(if is_durable { Effect::Persist(changes) } else { Effect::PersistLazily(changes) });
        }
        all.extend(effects);
        all
    }
}
