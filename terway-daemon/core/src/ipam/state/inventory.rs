//! The state of the inventory: the cloud's list of ENIs, asked for from time to time.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::clock::Moment;
use crate::cloud::{CloudError, Eni, EniKind};
use crate::ident::{EniId, InstanceId};
use crate::ipam::ids::OpId;

/// What is known about the cloud's list.
#[derive(Debug)]
pub(crate) struct InventoryState {
    /// The pool has seen a list, or started on a node that has nothing. Before that it creates nothing new.
    is_known: bool,
    op: Option<OpId>,
    asked: Moment,
    due: Option<Moment>,
    failures: u32,
    error: Option<CloudError>,
    /// ENIs that went away lately; a late list may still show them.
    removed: BTreeMap<EniId, Moment>,
    /// ENIs of the last list that the pool does not use.
    foreign: Vec<Eni>,
}

impl Default for InventoryState {
    fn default() -> Self {
        Self {
            is_known: true,
            op: None,
            asked: Moment::ZERO,
            due: None,
            failures: 0,
            error: None,
            removed: BTreeMap::new(),
            foreign: Vec::new(),
        }
    }
}

impl InventoryState {
    pub(crate) const fn is_known(&self) -> bool {
        self.is_known
    }

    /// The cloud did not answer at the start.
    pub(crate) const fn set_unknown(&mut self) {
        self.is_known = false;
    }

    pub(crate) const fn error(&self) -> Option<&CloudError> {
        self.error.as_ref()
    }

    pub(crate) const fn is_under_way(&self) -> bool {
        self.op.is_some()
    }

    pub(crate) const fn begin(&mut self, op: OpId, now: Moment) {
        self.op = Some(op);
        self.asked = now;
    }

    /// Takes a report: when its list was asked for, unless it is not the one waited for.
    pub(crate) fn reported(&mut self, op: OpId) -> Option<Moment> {
        self.op.take_if(|waiting| *waiting == op).map(|_| self.asked)
    }

    pub(crate) fn succeeded(&mut self) {
        self.is_known = true;
        self.failures = 0;
        self.error = None;
    }

    /// Counts a failure; returns how many there are in a row.
    pub(crate) fn failed(&mut self, error: CloudError) -> u32 {
        self.failures += 1;
        self.error = Some(error);
        self.failures
    }

    pub(crate) const fn schedule(&mut self, due: Moment) {
        self.due = Some(due);
    }

    pub(crate) fn is_due_after(&self, at: Moment) -> bool {
        self.due.is_none_or(|due| at < due)
    }

    /// Whether the next inventory is due; asked once per schedule.
    pub(crate) fn take_due(&mut self, now: Moment) -> bool {
        self.due.take_if(|due| *due <= now).is_some()
    }

    /// Notes that an ENI is gone.
    pub(crate) fn eni_removed(&mut self, id: EniId, now: Moment) {
        self.removed.insert(id, now);
    }

    /// Begins with a new list. ENIs that went away so early that the list must know of it are not remembered any longer.
    pub(crate) fn begin_list(&mut self, asked: Option<Moment>, window: Duration) {
        self.removed.retain(|_, at| asked.is_some_and(|asked| at.after(window) > asked));
        self.foreign.clear();
    }

    /// Whether an ENI went away so lately that the list may still show it.
    pub(crate) fn was_removed(&self, id: &EniId) -> bool {
        self.removed.contains_key(id)
    }

    pub(crate) fn add_foreign(&mut self, eni: Eni) {
        self.foreign.push(eni);
    }

    /// The ENI is the pool's from now on.
    pub(crate) fn claim(&mut self, id: &EniId) {
        self.foreign.retain(|other| other.id != *id);
    }

    /// ENIs of the last list that the pool does not use.
    pub(crate) fn foreign(&self) -> &[Eni] {
        &self.foreign
    }

    /// How many foreign ENIs besides the primary one take an adapter of this instance.
    pub(crate) fn foreign_on(&self, instance: &InstanceId) -> u32 {
        let here = |eni: &&Eni| eni.kind != EniKind::Primary && eni.instance.as_ref() == Some(instance);
        u32::try_from(self.foreign.iter().filter(here).count()).unwrap_or(u32::MAX)
    }
}
