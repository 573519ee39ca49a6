//! The actual contents of the Service maps, as far as they differ from what was planned.
//!
//! A map operation may fail: a map is full, the kernel has no memory. The failure of one entry must not keep others from being written, so the desired
//! state (the [`super::Planner`]'s entries) and the actual state are kept apart: [`Unapplied`] holds, for each map entry whose last planned operation has
//! not been applied, that operation and what the map still holds. Everything else is as planned.
//!
//! An operation also waits, without having failed, while it would break what another entry still needs:
//!
//! | operation | waits while |
//! |---|---|
//! | write a table | a backend that it names is not written in the same generation |
//! | write a frontend | a table that it names is not written; source ranges that it starts to check are missing |
//! | write another generation of a backend, invalidate or remove it | a frontend that was not updated leads to it |
//! | remove a table | a frontend that was not updated leads to it |
//! | remove a source range | a frontend that was not updated still checks the ranges, and will not |
//! | release a port id | a frontend or source range with this id is in the maps |
//!
//! So each frontend leads to its old or to its new backends at every moment, whatever fails. [`Unapplied::retry`] plans the remaining operations again.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use ipnetwork::IpNetwork;

use super::model::{BackendId, Frontend, FrontendKey, MapContents, Op, PortId, Selection, Table, TableId};

/// A map entry that operations change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Entry {
    /// A backend.
    Backend(BackendId),
    /// A backend table.
    Table(TableId),
    /// A source range of a port.
    Range(PortId, IpNetwork),
    /// A frontend.
    Frontend(FrontendKey),
    /// A port id.
    Port(PortId),
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Backend(id) => write!(f, "backend {}", id.0),
            Self::Table(id) => write!(f, "backend table {}", id.0),
            Self::Range(_, net) => write!(f, "source range {net}"),
            Self::Frontend(key) => write!(f, "frontend {key}"),
            Self::Port(id) => write!(f, "port id {}", id.0),
        }
    }
}

impl Entry {
    /// The entry that an operation changes; none for a barrier.
    #[must_use]
    pub const fn of(op: &Op) -> Option<Self> {
        match op {
            Op::PutBackend(id, _) | Op::InvalidateBackend(id, _) | Op::RemoveBackend(id, _) => Some(Self::Backend(*id)),
            Op::PutTable(id, _) | Op::RemoveTable(id) => Some(Self::Table(*id)),
            Op::PutRange(port, net) | Op::RemoveRange(port, net) => Some(Self::Range(*port, *net)),
            Op::PutFrontend(key, _) | Op::RemoveFrontend(key) => Some(Self::Frontend(*key)),
            Op::ReleasePort(port) => Some(Self::Port(*port)),
            Op::RcuBarrier => None,
        }
    }
}

/// An operation that has failed: its place in the batch, and the error.
pub type OpError = (usize, String);

/// Applies a batch of operations of one kind to the maps, and returns those that failed. The others have been applied.
pub type ApplyBatch<'a> = dyn FnMut(&[Op]) -> Vec<OpError> + 'a;

/// A planned operation that has not been applied.
#[derive(Debug)]
struct Pending {
    op: Op,
    /// The error, if the operation was tried; none while it waits for other entries.
    error: Option<String>,
    actual: Actual,
    /// It was planned again for after a grace period, which has not passed: planned twice, it would release its id twice.
    is_scheduled: bool,
}

/// What the map holds for an entry with a pending operation.
#[derive(Debug)]
enum Actual {
    Absent,
    /// A backend of this generation.
    Backend(u32),
    /// A frontend, and the tables that it leads to and that are no longer planned.
    Frontend(Frontend, BTreeMap<TableId, Option<Arc<Table>>>),
    /// A table, or a source range.
    Present,
}

/// Map entries whose last planned operation has not been applied. See the [module](self).
#[derive(Debug, Default)]
pub(super) struct Unapplied {
    pending: BTreeMap<Entry, Pending>,
}

impl Unapplied {
    pub(super) fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// The entries, each with its error; none while it waits for other entries.
    pub(super) fn entries(&self) -> impl Iterator<Item = (Entry, Option<&str>)> {
        self.pending.iter().map(|(entry, pending)| (*entry, pending.error.as_deref()))
    }

    /// Runs operations in their order; `replaced` is what they replace. `applied` is called for each that has been applied.
    pub(super) fn run(
        &mut self,
        ops: &[Op],
        replaced: &MapContents,
        apply: &mut ApplyBatch<'_>,
        mut applied: impl FnMut(&Op),
    ) {
        for pending in self.pending.values_mut() {
            pending.remember_tables(replaced);
        }
        for batch in ops.chunk_by(|a, b| std::mem::discriminant(a) == std::mem::discriminant(b)) {
            let ready: Vec<Op>;
            let batch = if self.pending.is_empty() {
                batch
            } else {
                let (waiting, rest) = batch.iter().cloned().partition(|op| self.must_wait(op, replaced));
                let waiting: Vec<Op> = waiting;
                waiting.into_iter().for_each(|op| self.keep(op, None, replaced));
                ready = rest;
                &ready[..]
            };
            if batch.is_empty() {
                continue;
            }
            let mut errors = apply(batch).into_iter().peekable();
            if errors.peek().is_none() && self.pending.is_empty() {
                batch.iter().for_each(&mut applied);
                continue;
            }
            let mut errors: BTreeMap<usize, String> = errors.collect();
            for (index, op) in batch.iter().enumerate() {
                match errors.remove(&index) {
                    Some(error) => self.keep(op.clone(), Some(error), replaced),
                    None => {
                        if let Some(entry) = Entry::of(op) {
                            self.pending.remove(&entry);
                        }
                        applied(op);
                    }
                }
            }
        }
    }

    /// The pending operations: those to run now, in their order, and those for after a grace period.
    pub(super) fn retry(&mut self) -> (Vec<Op>, Vec<Op>) {
        let none = MapContents::default();
        let mut now: Vec<(u8, Op)> = Vec::new();
        let mut retire: Vec<(u8, Op)> = Vec::new();
        for pending in self.pending.values().filter(|pending| !pending.is_scheduled) {
            let op = pending.op.clone();
            match stage(&op) {
                // A backend that gets another generation follows the frontends that led to the old one.
                0 if self.must_wait(&op, &none) => now.push((6, op)),
                later @ 9.. => retire.push((later, op)),
                stage => now.push((stage, op)),
            }
        }
        for entry in retire.iter().filter_map(|(_, op)| Entry::of(op)) {
            if let Some(pending) = self.pending.get_mut(&entry) {
                pending.is_scheduled = true;
            }
        }
        if now.iter().any(|(stage, _)| *stage >= 6) {
            now.push((5, Op::RcuBarrier));
        }
        // A stable sort: entries of one kind stay in their order.
        now.sort_by_key(|(stage, _)| *stage);
        retire.sort_by_key(|(stage, _)| *stage);
        let ops = |staged: Vec<(u8, Op)>| staged.into_iter().map(|(_, op)| op).collect();
        (ops(now), ops(retire))
    }

    fn keep(&mut self, op: Op, error: Option<String>, replaced: &MapContents) {
        let Some(entry) = Entry::of(&op) else { return };
        let actual = match self.pending.remove(&entry) {
            Some(before) => before.actual,
            None => actual_of(&op, replaced),
        };
        let mut pending = Pending { op, error, actual, is_scheduled: false };
        pending.remember_tables(replaced);
        self.pending.insert(entry, pending);
    }

    /// Whether an operation would break what an entry with a pending operation still needs.
    fn must_wait(&self, op: &Op, replaced: &MapContents) -> bool {
        match op {
            Op::PutBackend(id, backend) => {
                self.pinned_slots().any(|(own, generation)| own == *id && generation != backend.generation)
            }
            Op::InvalidateBackend(id, _) | Op::RemoveBackend(id, _) => self.pinned_slots().any(|(own, _)| own == *id),
            Op::PutTable(_, table) => table.slots.iter().any(|slot| {
                let pending = self.pending.get(&Entry::Backend(slot.backend));
                pending.is_some_and(|p| !matches!(p.actual, Actual::Backend(own) if own == slot.generation))
            }),
            Op::RemoveTable(id) => self.stuck_frontends().any(|(f, ..)| tables_of(f).any(|own| own == *id)),
            Op::PutFrontend(key, frontend) => {
                let is_missing = |id: TableId| self.pending.contains_key(&Entry::Table(id));
                tables_of(frontend).any(is_missing)
                    || frontend.check_source
                        && self.pending_ranges(frontend.port).any(|p| matches!(p.op, Op::PutRange(..)))
                        && self.actual_frontend(key, replaced).is_some_and(|old| !old.check_source)
            }
            Op::RemoveRange(port, _) => self.stuck_frontends().any(|(actual, _, op)| {
                let goes_on = matches!(op, Op::PutFrontend(_, new) if new.port == *port && new.check_source);
                actual.port == *port && actual.check_source && !goes_on
            }),
            Op::ReleasePort(port) => {
                self.stuck_frontends().any(|(actual, ..)| actual.port == *port)
                    || self.pending_ranges(*port).next().is_some()
            }
            Op::RemoveFrontend(_) | Op::PutRange(..) | Op::RcuBarrier => false,
        }
    }

    /// Frontends in the maps that are not as planned: what the map holds, the tables of that, and the pending operation.
    fn stuck_frontends(&self) -> impl Iterator<Item = (&Frontend, &BTreeMap<TableId, Option<Arc<Table>>>, &Op)> {
        self.pending.values().filter_map(|pending| match &pending.actual {
            Actual::Frontend(frontend, tables) => Some((frontend, tables, &pending.op)),
            _ => None,
        })
    }

    /// Slots of the tables that stuck frontends lead to.
    fn pinned_slots(&self) -> impl Iterator<Item = (BackendId, u32)> {
        let tables = self.stuck_frontends().flat_map(|(_, tables, _)| tables.values().flatten());
        tables.flat_map(|table| table.slots.iter().map(|slot| (slot.backend, slot.generation)))
    }

    fn pending_ranges(&self, port: PortId) -> impl Iterator<Item = &Pending> {
        let of_port = move |entry: &Entry| matches!(entry, Entry::Range(own, _) if *own == port);
        self.pending.iter().filter(move |(entry, _)| of_port(entry)).map(|(_, pending)| pending)
    }

    /// What the map holds for a frontend before the operations that replace `replaced`.
    fn actual_frontend<'a>(&'a self, key: &FrontendKey, replaced: &'a MapContents) -> Option<&'a Frontend> {
        match self.pending.get(&Entry::Frontend(*key)) {
            Some(Pending { actual: Actual::Frontend(frontend, _), .. }) => Some(frontend),
            Some(_) => None,
            None => replaced.frontends.get(key),
        }
    }
}

impl Pending {
    /// Keeps the contents of tables that are no longer planned, for as long as the frontend leads to them.
    fn remember_tables(&mut self, replaced: &MapContents) {
        let Actual::Frontend(_, tables) = &mut self.actual else { return };
        for (id, known) in tables.iter_mut().filter(|(_, known)| known.is_none()) {
            *known = replaced.tables.get(id).map(Arc::clone);
        }
    }
}

/// What the map holds for an entry before an operation that is not applied.
fn actual_of(op: &Op, replaced: &MapContents) -> Actual {
    match op {
        Op::PutBackend(id, _) => {
            replaced.backends.get(id).map_or(Actual::Absent, |old| Actual::Backend(old.generation))
        }
        Op::InvalidateBackend(_, old) | Op::RemoveBackend(_, old) => Actual::Backend(old.generation),
        Op::PutFrontend(key, _) | Op::RemoveFrontend(key) => match replaced.frontends.get(key) {
            Some(old) => Actual::Frontend(*old, tables_of(old).map(|id| (id, None)).collect()),
            None => Actual::Absent,
        },
        Op::PutTable(..) | Op::PutRange(..) | Op::RcuBarrier => Actual::Absent,
        Op::RemoveTable(_) | Op::RemoveRange(..) | Op::ReleasePort(_) => Actual::Present,
    }
}

fn tables_of(frontend: &Frontend) -> impl Iterator<Item = TableId> + use<> {
    let id = |selection| if let Selection::Table(id) = selection { Some(id) } else { None };
    [frontend.internal, frontend.external].into_iter().filter_map(id)
}

/// The order of operations of different kinds; from 9 on they are for after a grace period.
const fn stage(op: &Op) -> u8 {
    match op {
        Op::PutBackend(..) => 0,
        Op::PutTable(..) => 1,
        Op::PutRange(..) => 2,
        Op::PutFrontend(..) => 3,
        Op::RemoveFrontend(_) => 4,
        Op::RcuBarrier => 5,
        Op::InvalidateBackend(..) => 7,
        Op::RemoveRange(..) => 8,
        Op::RemoveTable(_) => 9,
        Op::RemoveBackend(..) => 10,
        Op::ReleasePort(_) => 11,
    }
}
