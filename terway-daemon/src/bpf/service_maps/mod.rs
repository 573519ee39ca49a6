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

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use aya::Ebpf;
use parking_lot::Mutex;
use terway_abi::{BackendRange, frontend_flags};
use terway_core::service::{Algorithm, MapContents, Op, Selection};

use super::endpoints::EndpointMaps;
use super::error::BpfError;
use super::rcu;
use backends::BackendMaps;
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

    /// Drops what this daemon believes and reads the maps: where a planner starts from ([`terway_core::service::Planner::restore`]).
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn recover(&self) -> Result<MapContents, BpfError> {
        self.state.lock().recover()
    }

    /// Runs operations in their order. Those that a plan defers are due after [`RETIRE_AFTER`].
    ///
    /// # Errors
    /// When a map is full or the kernel refuses. What was written before stays; call [`Self::recover`] and make a new planner.
    pub fn apply(&self, ops: &[Op]) -> Result<(), BpfError> {
        self.state.lock().apply(ops, &mut |addresses| self.endpoints.invalidate_addresses(addresses))
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
    pub fn set_frontend(
        &self,
        key: &terway_core::service::FrontendKey,
        value: &terway_abi::Frontend,
    ) -> Result<(), BpfError> {
        let new = self.state.lock().frontends.put(&[(*key, *value)])?;
        self.endpoints.invalidate_addresses(&new)
    }

    /// Removes a frontend; `false` if there is none.
    ///
    /// # Errors
    /// [`BpfError::Map`]; calling again completes it.
    pub fn remove_frontend(&self, key: &terway_core::service::FrontendKey) -> Result<bool, BpfError> {
        self.state.lock().frontends.remove(key)
    }
}

/// The maps with mirrors of their contents. A map is written first and its mirror after it: a panic in between leaves a mirror that
/// lacks the last write, until [`State::recover`] reads everything anew.
struct State {
    frontends: FrontendMaps,
    backends: BackendMaps,
    source_ranges: SourceRanges,
    /// Writes to maps so far.
    writes: u64,
}

/// Invalidates the flows to addresses that have become a Service's.
type InvalidateFlows<'a> = dyn FnMut(&[IpAddr]) -> Result<(), BpfError> + 'a;

impl State {
    fn new(frontends: FrontendMaps, backends: BackendMaps, source_ranges: SourceRanges) -> Self {
        Self { frontends, backends, source_ranges, writes: 0 }
    }

    fn recover(&mut self) -> Result<MapContents, BpfError> {
        self.frontends.recover()?;
        self.source_ranges.recover()?;
        let mut contents = MapContents { ranges: self.source_ranges.all().clone(), ..MapContents::default() };
        self.backends.recover(&mut contents)?;
        let mut tables: BTreeMap<(u32, u32, Algorithm), Selection> = BTreeMap::new();
        for (key, frontend) in self.frontends.iter() {
            let algorithm = convert::algorithm(frontend.flags);
            let mut selection = |run: BackendRange, pass: u32, drops: bool| -> Result<Selection, BpfError> {
                if frontend.flags & pass != 0 {
                    return Ok(Selection::Pass);
                }
                if run.count == 0 {
                    return Ok(if drops { Selection::Drop } else { Selection::Reject });
                }
                if let Some(known) = tables.get(&(run.first, run.count, algorithm)) {
                    return Ok(*known);
                }
                let selection = self.backends.adopt_table(run, algorithm, &mut contents)?;
                tables.insert((run.first, run.count, algorithm), selection);
                Ok(selection)
            };
            let inside = selection(frontend.internal, frontend_flags::EXTERNAL_ONLY, false)?;
            let drops = frontend.flags & frontend_flags::DROP_WITHOUT_REPLY != 0;
            let outside = selection(frontend.external, frontend_flags::IN_CLUSTER_ONLY, drops)?;
            contents.frontends.insert(*key, convert::frontend_from_abi(*key, frontend, inside, outside));
        }
        Ok(contents)
    }

    /// Runs operations in their order, up to the first that fails.
    ///
    /// Operations of one kind that follow each other are written in one batch: they do not depend on each other.
    fn apply(&mut self, ops: &[Op], invalidate: &mut InvalidateFlows<'_>) -> Result<(), BpfError> {
        for batch in ops.chunk_by(|a, b| std::mem::discriminant(a) == std::mem::discriminant(b)) {
            match batch.first() {
                Some(Op::PutBackend(..)) => self.writes += self.backends.put_backends(batch)?,
                Some(Op::PutTable(..)) => self.writes += self.backends.put_tables(batch)?,
                Some(Op::PutFrontend(..)) => self.put_frontends(batch, invalidate)?,
                _ => batch.iter().try_for_each(|op| self.apply_one(op))?,
            }
        }
        Ok(())
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

    fn put_frontends(&mut self, batch: &[Op], invalidate: &mut InvalidateFlows<'_>) -> Result<(), BpfError> {
        let mut changed = Vec::new();
        for op in batch {
            let Op::PutFrontend(key, frontend) = op else { continue };
            let entry = convert::frontend_to_abi(frontend, |id| self.backends.table(id));
            if self.frontends.get(key) != Some(&entry) {
                changed.push((*key, entry));
            }
        }
        if changed.is_empty() {
            return Ok(());
        }
        self.writes += changed.len() as u64;
        let new = self.frontends.put(&changed)?;
        invalidate(&new)
    }
}
