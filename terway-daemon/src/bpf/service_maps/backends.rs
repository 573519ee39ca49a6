//! Backend map and backend tables: which backends exist, and the ranges of references that frontends choose from.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use aya::Ebpf;
use terway_abi::{Backend as AbiBackend, BackendRange, BackendRef as AbiBackendRef, names};
use terway_core::service::{
    Algorithm, Backend, BackendId, BackendRef, MapContents, Op, RangeAllocator, Selection, Table, TableId,
};

use super::{MAX_UNUSED_BACKENDS, convert};
use crate::bpf::elements::Elements;
use crate::bpf::error::BpfError;
use crate::bpf::object::take_elements;

/// The backend map, the array of backend references, and the active connection counts.
pub(super) struct BackendMaps {
    pub(super) members: Elements<u32, AbiBackendRef>,
    pub(super) backends: Elements<u32, AbiBackend>,
    connection_counts: Elements<u32, u64>,
    /// Mirror of the backend map.
    mirror: Mirror,
    /// Free ranges of the array of references.
    pub(super) ranges: RangeAllocator,
    /// Where tables are in that array.
    tables: BTreeMap<TableId, (BackendRange, Algorithm)>,
}

/// Result of writing several objects.
#[derive(Default)]
pub(super) struct Writes {
    /// Writes that succeeded.
    pub(super) count: u64,
    /// Operations that failed, by their place in the batch.
    pub(super) failed: Vec<(usize, Arc<BpfError>)>,
}

/// Backends by their numbers, which are dense: freed numbers are reused first.
#[derive(Default)]
struct Mirror {
    /// Without a generation: no backend.
    all: Vec<AbiBackend>,
    count: usize,
}

impl Mirror {
    fn get(&self, number: u32) -> Option<AbiBackend> {
        self.all.get(number as usize).copied().filter(|backend| backend.generation != 0)
    }

    fn insert(&mut self, number: u32, backend: AbiBackend) {
        let index = number as usize;
        if self.all.len() <= index {
            self.all.resize(index + 1, AbiBackend::default());
        }
        if let Some(place) = self.all.get_mut(index) {
            self.count += usize::from(place.generation == 0);
            *place = backend;
        }
    }

    fn remove(&mut self, number: u32) {
        if let Some(place) = self.all.get_mut(number as usize) {
            self.count -= usize::from(place.generation != 0);
            *place = AbiBackend::default();
        }
    }
}

impl BackendMaps {
    pub(super) fn open(loaded: &mut Ebpf) -> Result<Self, BpfError> {
        Ok(Self::new(
            take_elements(loaded, names::BACKEND_REFS)?,
            take_elements(loaded, names::BACKENDS)?,
            take_elements(loaded, names::ACTIVE_CONNS)?,
        ))
    }

    pub(super) fn new(
        members: Elements<u32, AbiBackendRef>,
        backends: Elements<u32, AbiBackend>,
        connection_counts: Elements<u32, u64>,
    ) -> Self {
        Self {
            ranges: RangeAllocator::new(members.capacity()),
            members,
            backends,
            connection_counts,
            mirror: Mirror::default(),
            tables: BTreeMap::new(),
        }
    }

    /// The number of backends.
    pub(super) const fn len(&self) -> usize {
        self.mirror.count
    }

    /// Reads the backends; tables are adopted as frontends name them ([`Self::adopt_table`]).
    pub(super) fn recover(&mut self, contents: &mut MapContents) -> Result<(), BpfError> {
        self.mirror = Mirror::default();
        let mut unused = 0;
        self.backends.each(|number, entry| {
            unused = if entry.generation == 0 { unused + 1 } else { 0 };
            if unused > MAX_UNUSED_BACKENDS {
                return ControlFlow::Break(());
            }
            contents.generation = contents.generation.max(entry.generation);
            if let Some(backend) = convert::backend_from_abi(entry) {
                self.mirror.insert(*number, *entry);
                contents.backends.insert(BackendId(*number), backend);
            }
            ControlFlow::Continue(())
        })?;
        self.ranges = RangeAllocator::new(self.members.capacity());
        self.tables.clear();
        Ok(())
    }

    /// Makes a table of the range that a frontend names. A range that is invalid, or overlaps another, is not adopted: its frontend
    /// gets a new one.
    pub(super) fn adopt_table(
        &mut self,
        range: BackendRange,
        algorithm: Algorithm,
        contents: &mut MapContents,
    ) -> Result<Selection, BpfError> {
        if !self.ranges.reserve(range.first, range.count) {
            return Ok(Selection::Reject);
        }
        let mut slots = Vec::with_capacity(range.count as usize);
        for index in range.first..range.first + range.count {
            let member = self.members.get(&index)?.unwrap_or_default();
            slots.push(BackendRef { backend: BackendId(member.backend), generation: member.generation });
        }
        let id = TableId(self.tables.len() as u32 + 1);
        self.tables.insert(id, (range, algorithm));
        contents.tables.insert(id, Arc::new(Table { algorithm, slots }));
        Ok(Selection::Table(id))
    }

    /// Where a table is.
    pub(super) fn table(&self, id: TableId) -> Option<(BackendRange, Algorithm)> {
        self.tables.get(&id).copied()
    }

    /// Writes backends that differ from the map.
    pub(super) fn put_backends(&mut self, batch: &[Op]) -> Writes {
        let limit = self.backends.capacity();
        let mut writes = Writes::default();
        let (mut new, mut numbers, mut entries, mut places) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (place, op) in batch.iter().enumerate() {
            let Op::PutBackend(id, backend) = op else { continue };
            if id.0 >= limit {
                let error = BpfError::NoRoom { what: "backends", limit: limit.saturating_sub(1) };
                writes.failed.push((place, Arc::new(error)));
                continue;
            }
            let (entry, old) = (convert::backend_to_abi(backend), self.mirror.get(id.0));
            if old == Some(entry) {
                continue;
            }
            if old.is_none() {
                new.push(id.0);
            }
            numbers.push(id.0);
            entries.push(entry);
            places.push(place);
        }
        // Programs do not count connections of a backend before it is written.
        if let Err(error) = self.connection_counts.put_all(&new, &vec![0; new.len()]) {
            let error = Arc::new(error);
            writes.failed.extend(places.into_iter().map(|place| (place, Arc::clone(&error))));
            return writes;
        }
        let mut refused: BTreeMap<usize, BpfError> = self.backends.put_each(&numbers, &entries).into_iter().collect();
        for (index, (number, entry)) in numbers.into_iter().zip(entries).enumerate() {
            match (refused.remove(&index), places.get(index)) {
                (Some(error), Some(place)) => writes.failed.push((*place, Arc::new(error))),
                _ => {
                    self.mirror.insert(number, entry);
                    writes.count += 1;
                }
            }
        }
        writes
    }

    /// Puts a tombstone in the place of a backend: another generation, so that references to it are invalid.
    pub(super) fn remove_backend(&mut self, id: BackendId, backend: &Backend) -> Result<(), BpfError> {
        let tombstone = AbiBackend { generation: backend.generation.wrapping_add(1).max(1), ..Default::default() };
        self.backends.put(&id.0, &tombstone, 0)?;
        self.mirror.remove(id.0);
        Ok(())
    }

    /// Writes tables into free ranges.
    pub(super) fn put_tables(&mut self, batch: &[Op]) -> Writes {
        let mut writes = Writes::default();
        let (mut indices, mut references, mut tables) = (Vec::new(), Vec::new(), Vec::new());
        let reference = |slot: &BackendRef| AbiBackendRef { backend: slot.backend.0, generation: slot.generation };
        for (place, op) in batch.iter().enumerate() {
            let Op::PutTable(id, table) = op else { continue };
            let count = table.slots.len() as u32;
            let Some(first) = self.ranges.take(count) else {
                let limit = self.members.capacity();
                let error = BpfError::NoRoom { what: "slots of backend tables", limit };
                writes.failed.push((place, Arc::new(error)));
                continue;
            };
            indices.extend(first..first + count);
            references.extend(table.slots.iter().map(reference));
            tables.push((place, *id, BackendRange { first, count }, table.algorithm));
        }
        // Indices of an array that exist: the kernel refuses all of them or none.
        match self.members.put_all(&indices, &references) {
            Ok(()) => {
                writes.count = indices.len() as u64;
                self.tables.extend(tables.into_iter().map(|(_, id, range, algorithm)| (id, (range, algorithm))));
            }
            Err(error) => {
                let error = Arc::new(error);
                for (place, _, range, _) in tables {
                    self.ranges.give_back(range.first, range.count);
                    writes.failed.push((place, Arc::clone(&error)));
                }
            }
        }
        writes
    }

    /// Frees the range of a table.
    pub(super) fn remove_table(&mut self, id: TableId) {
        if let Some((range, _)) = self.tables.remove(&id) {
            self.ranges.give_back(range.first, range.count);
        }
    }

    #[cfg(feature = "test-api")]
    pub(super) fn set_backend(&self, number: u32, backend: &AbiBackend) -> Result<(), BpfError> {
        self.backends.put(&number, backend, 0).map(drop)
    }

    #[cfg(feature = "test-api")]
    pub(super) fn set_members(&self, first: u32, members: &[AbiBackendRef]) -> Result<(), BpfError> {
        (first..).zip(members).try_for_each(|(index, member)| self.members.put(&index, member, 0).map(drop))
    }
}
