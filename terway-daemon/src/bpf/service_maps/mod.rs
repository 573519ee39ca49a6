//! Handle of the Service maps: frontends, backends, their tables, source ranges, and the filter of addresses.
//!
//! The planner (`terway_core::service`) orders operations so that no packet finds half a Service: backends, then tables, then
//! frontends, and back for removals. They are run one by one in that order. A write of what the map holds already is left out, so that
//! after a restart only differences are written.

mod backends;
mod convert;
mod frontends;
mod source_ranges;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use aya::Ebpf;
use parking_lot::Mutex;
use terway_abi::{BackendRange, frontend_flags};
#[cfg(feature = "test-api")]
use terway_core::service::FrontendKey;
use terway_core::service::{Algorithm, MapContents, Op, OpError, Selection};

use super::endpoints::EndpointMaps;
use super::error::BpfError;
use super::rcu;
use backends::{BackendMaps, Writes};
use frontends::FrontendMaps;
use source_ranges::SourceRanges;

/// Time from the last operation of a plan to its deferred ones. A program runs for microseconds, so none that has read an old table
/// runs any more after a second.
pub const RETIRE_AFTER: Duration = Duration::from_secs(1);

/// The most unused numbers in a row that are read when the backend map is read. Numbers are given from 1 up, and used ones keep a
/// generation, so behind a longer gap there are no backends.
pub(super) const MAX_UNUSED_BACKENDS: u32 = 4096;

/// Handle of the Service maps, the only writer of them.
///
/// Its lock is held for a whole list of operations, and while it is held, that of [`EndpointMaps`] is taken to invalidate flows.
pub struct ServiceMaps {
    state: Mutex<State>,
    endpoints: Arc<EndpointMaps>,
}

impl fmt::Debug for ServiceMaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServiceMaps").finish_non_exhaustive()
    }
}

impl ServiceMaps {
    /// Takes the maps out of the loaded object and reads which frontends an earlier daemon wrote.
    pub(super) fn open(loaded: &mut Ebpf, endpoints: Arc<EndpointMaps>) -> Result<Self, BpfError> {
        let state = State::new(FrontendMaps::open(loaded)?, BackendMaps::open(loaded)?, SourceRanges::open(loaded)?);
        Ok(Self { state: Mutex::new(state), endpoints })
    }

    /// Drops what this daemon believes and reads the maps: where a planner starts from
    /// ([`terway_core::service::Planner::restore`]). To be called at start and after a panic of a caller.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn recover(&self) -> Result<MapContents, BpfError> {
        self.state.lock().recover()
    }

    /// Runs operations in their order; those that failed, by their place in `ops`. The others are in effect. Operations that a plan
    /// defers are due after [`RETIRE_AFTER`].
    ///
    /// The planner decides what a failure concerns ([`terway_core::service::Planner::execute`] calls this with batches of one kind).
    pub fn apply(&self, ops: &[Op]) -> Vec<OpError> {
        let failed = self.state.lock().apply(ops, &mut |addresses| self.endpoints.invalidate_addresses(addresses));
        failed.into_iter().map(|(place, error)| (place, error.to_string())).collect()
    }

    /// Sets which addresses of the node have NodePorts. To be called once after each start, too: it corrects the filter of addresses.
    ///
    /// # Errors
    /// [`BpfError::Map`]; calling again completes it.
    pub fn set_node_addresses(&self, addresses: &[IpAddr]) -> Result<(), BpfError> {
        let mut state = self.state.lock();
        let changed = state.frontends.set_node_addresses(addresses)?;
        self.endpoints.invalidate_addresses(&changed)
    }

    /// The numbers of frontends and backends in the maps.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        let state = self.state.lock();
        (state.frontends.len(), state.backends.len())
    }

    /// Whether there is no frontend.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.state.lock().frontends.len() == 0
    }

    /// Whether a frontend chooses the backend with the fewest connections: then
    /// [`GcOptions::recount_connections`](super::GcOptions::recount_connections) is of use.
    #[must_use]
    pub fn uses_connection_counts(&self) -> bool {
        self.state.lock().frontends.any_flag(frontend_flags::LEAST_CONNECTIONS)
    }
}

/// Single writes, without a plan.
#[cfg(feature = "test-api")]
impl ServiceMaps {
    /// Writes a backend. Another generation invalidates everything that refers to the one before.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn set_backend(&self, number: u32, backend: &terway_abi::Backend) -> Result<(), BpfError> {
        self.state.lock().backends.set_backend(number, backend)
    }

    /// Writes backend references from index `first` on.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn set_members(&self, first: u32, members: &[terway_abi::BackendRef]) -> Result<(), BpfError> {
        self.state.lock().backends.set_members(first, members)
    }

    /// Writes a frontend. Flows to its address that were decided when it was no Service's are decided anew.
    ///
    /// # Errors
    /// [`BpfError::Map`]; calling again completes it.
    pub fn set_frontend(&self, key: &FrontendKey, value: &terway_abi::Frontend) -> Result<(), BpfError> {
        let mut state = self.state.lock();
        let writes = state.frontends.put(&[(*key, *value)]);
        state.frontends.write_filter()?;
        match writes.refused.into_iter().next() {
            Some((_, error)) => Err(error),
            None => self.endpoints.invalidate_addresses(&writes.new),
        }
    }

    /// Removes a frontend; `false` if there is none.
    ///
    /// # Errors
    /// [`BpfError::Map`]; calling again completes it.
    pub fn remove_frontend(&self, key: &FrontendKey) -> Result<bool, BpfError> {
        self.state.lock().frontends.remove(key)
    }
}

/// The maps with mirrors of their contents. A map is written first and its mirror after it: a panic in between leaves a mirror that
/// lacks the last write, until [`State::recover`] reads everything anew.
struct State {
    frontends: FrontendMaps,
    backends: BackendMaps,
    source_ranges: SourceRanges,
    /// Addresses that have become a Service's, whose flows are to be invalidated.
    uninvalidated: BTreeSet<IpAddr>,
    /// Writes to maps so far.
    writes: u64,
}

/// Invalidates the flows to addresses that have become a Service's.
type InvalidateFlows<'a> = dyn FnMut(&[IpAddr]) -> Result<(), BpfError> + 'a;

impl State {
    const fn new(frontends: FrontendMaps, backends: BackendMaps, source_ranges: SourceRanges) -> Self {
        Self { frontends, backends, source_ranges, uninvalidated: BTreeSet::new(), writes: 0 }
    }

    fn recover(&mut self) -> Result<MapContents, BpfError> {
        self.frontends.recover()?;
        self.source_ranges.recover()?;
        let mut contents = MapContents { ranges: self.source_ranges.all().clone(), ..MapContents::default() };
        self.backends.recover(&mut contents)?;
        let mut tables: BTreeMap<(u32, u32, Algorithm), Selection> = BTreeMap::new();
        for (key, frontend) in self.frontends.iter() {
            let algorithm = convert::algorithm(frontend.flags);
            let mut selection = |range: BackendRange, pass: u32, drops: bool| -> Result<Selection, BpfError> {
                if frontend.flags & pass != 0 {
                    return Ok(Selection::Pass);
                }
                if range.count == 0 {
                    return Ok(if drops { Selection::Drop } else { Selection::Reject });
                }
                if let Some(known) = tables.get(&(range.first, range.count, algorithm)) {
                    return Ok(*known);
                }
                let selection = self.backends.adopt_table(range, algorithm, &mut contents)?;
                tables.insert((range.first, range.count, algorithm), selection);
                Ok(selection)
            };
            let internal = selection(frontend.internal, frontend_flags::EXTERNAL_ONLY, false)?;
            let drops = frontend.flags & frontend_flags::DROP_WITHOUT_REPLY != 0;
            let external = selection(frontend.external, frontend_flags::IN_CLUSTER_ONLY, drops)?;
            contents.frontends.insert(*key, convert::frontend_from_abi(*key, frontend, internal, external));
        }
        Ok(contents)
    }

    /// Runs operations in their order; those that failed, by their place. Operations of one kind that follow each other are written in
    /// one batch: they do not depend on each other.
    fn apply(&mut self, ops: &[Op], invalidate: &mut InvalidateFlows<'_>) -> Vec<(usize, Arc<BpfError>)> {
        let (mut failed, mut begin) = (Vec::new(), 0);
        for batch in ops.chunk_by(|a, b| std::mem::discriminant(a) == std::mem::discriminant(b)) {
            let writes = match batch.first() {
                Some(Op::PutBackend(..)) => self.backends.put_backends(batch),
                Some(Op::PutTable(..)) => self.backends.put_tables(batch),
                Some(Op::PutFrontend(..)) => self.put_frontends(batch, invalidate),
                _ => {
                    let places = batch.iter().enumerate();
                    let error = |(place, op)| Some((place, Arc::new(self.apply_one(op).err()?)));
                    Writes { count: 0, failed: places.filter_map(error).collect() }
                }
            };
            self.writes += writes.count;
            failed.extend(writes.failed.into_iter().map(|(place, error)| (begin + place, error)));
            begin += batch.len();
        }
        failed
    }

    fn apply_one(&mut self, op: &Op) -> Result<(), BpfError> {
        match op {
            Op::PutBackend(..) | Op::PutTable(..) | Op::PutFrontend(..) | Op::ReleasePort(_) => Ok(()),
            Op::RcuBarrier => {
                rcu::synchronize();
                Ok(())
            }
            Op::InvalidateBackend(id, backend) | Op::RemoveBackend(id, backend) => {
                self.backends.remove_backend(*id, backend)
            }
            Op::RemoveTable(id) => {
                self.backends.remove_table(*id);
                Ok(())
            }
            Op::PutRange(port, net) => {
                self.writes += 1;
                self.source_ranges.put(*port, *net)
            }
            Op::RemoveRange(port, net) => self.source_ranges.remove(*port, *net),
            Op::RemoveFrontend(key) => self.frontends.remove(key).map(drop),
        }
    }

    /// Writes frontends that differ from the map, then the filter, and invalidates flows to addresses that are new.
    fn put_frontends(&mut self, batch: &[Op], invalidate: &mut InvalidateFlows<'_>) -> Writes {
        let (mut failed, mut changed, mut places) = (Vec::new(), Vec::new(), Vec::new());
        for (place, op) in batch.iter().enumerate() {
            let Op::PutFrontend(key, frontend) = op else { continue };
            let selections = [frontend.internal, frontend.external];
            let is_missing = |selection| matches!(selection, Selection::Table(id) if self.backends.table(id).is_none());
            if selections.into_iter().any(is_missing) {
                failed.push((place, Arc::new(BpfError::Dependency("its backend table"))));
                continue;
            }
            let entry = convert::frontend_to_abi(frontend, |id| self.backends.table(id));
            if self.frontends.get(key) != Some(&entry) || self.uninvalidated.contains(&key.address) {
                changed.push((*key, entry));
                places.push(place);
            }
        }
        if changed.is_empty() {
            return Writes { count: 0, failed };
        }
        let writes = self.frontends.put(&changed);
        self.uninvalidated.extend(writes.new);
        let addresses: Vec<IpAddr> = self.uninvalidated.iter().copied().collect();
        match self.frontends.write_filter().and_then(|()| invalidate(&addresses)) {
            Ok(()) => {
                self.uninvalidated.clear();
                let place = |(index, error)| Some((*places.get(index)?, Arc::new(error)));
                failed.extend(writes.refused.into_iter().filter_map(place));
            }
            // The frontends are in the map, but not in effect.
            Err(error) => {
                let error = Arc::new(error);
                failed.extend(places.iter().map(|place| (*place, Arc::clone(&error))));
            }
        }
        Writes { count: changed.len() as u64, failed }
    }
}
