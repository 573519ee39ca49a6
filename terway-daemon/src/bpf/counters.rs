//! Handle of the path counters: packets and bytes by path and by drop reason.

use std::fmt;

use aya::Ebpf;
use aya::maps::{MapData, PerCpuArray};
use terway_abi::{COUNTERS, Counter, Drop, PathCounter, names};

use super::error::BpfError;
use super::object::take;

/// Packets and bytes by path and by drop reason since the maps were created, summed over CPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters(Vec<Counter>);

impl Counters {
    /// The counter of a path.
    #[must_use]
    pub fn kind(&self, kind: PathCounter) -> Counter {
        self.at(kind as u32)
    }

    /// The counter of a drop reason.
    #[must_use]
    pub fn drop(&self, reason: Drop) -> Counter {
        self.at(reason.counter())
    }

    /// Every counter with the name of its path or drop reason.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, Counter)> + '_ {
        let kinds = PathCounter::ALL.iter().map(|kind| (kind.name(), self.kind(*kind)));
        kinds.chain(Drop::ALL.iter().map(|reason| (reason.name(), self.drop(*reason))))
    }

    fn at(&self, index: u32) -> Counter {
        self.0.get(index as usize).copied().unwrap_or_default()
    }
}

/// Handle of the path counters. It has no lock: nothing here writes.
pub struct PathCounters {
    map: PerCpuArray<MapData, Counter>,
}

impl fmt::Debug for PathCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PathCounters").finish_non_exhaustive()
    }
}

impl PathCounters {
    pub(super) fn open(loaded: &mut Ebpf) -> Result<Self, BpfError> {
        Ok(Self { map: take(loaded, names::COUNTERS)? })
    }

    /// Reads all counters.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn read(&self) -> Result<Counters, BpfError> {
        let sum = |index| {
            let cpus = self.map.get(&index, 0).map_err(BpfError::map(names::COUNTERS))?;
            Ok(cpus.iter().fold(Counter::default(), |sum, cpu| Counter {
                packets: sum.packets.wrapping_add(cpu.packets),
                bytes: sum.bytes.wrapping_add(cpu.bytes),
            }))
        };
        (0..COUNTERS).map(sum).collect::<Result<_, _>>().map(Counters)
    }
}
