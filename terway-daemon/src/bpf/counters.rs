//! Counters, summed over CPUs.

use aya::maps::{MapData, PerCpuArray};
use terway_abi::{COUNTERS, Counter, Drop, Kind, names};

use super::error::BpfError;

/// Packets and bytes by way and by drop reason, since the maps were made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters(Vec<Counter>);

impl Counters {
    /// Of a way.
    #[must_use]
    pub fn kind(&self, kind: Kind) -> Counter {
        self.at(kind as u32)
    }

    /// Of a drop reason.
    #[must_use]
    pub fn drop(&self, reason: Drop) -> Counter {
        self.at(reason.counter())
    }

    /// Every counter with the name of its way or reason.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, Counter)> + '_ {
        let kinds = Kind::ALL.iter().map(|kind| (kind.name(), self.kind(*kind)));
        kinds.chain(Drop::ALL.iter().map(|reason| (reason.name(), self.drop(*reason))))
    }

    fn at(&self, index: u32) -> Counter {
        self.0.get(index as usize).copied().unwrap_or_default()
    }
}

pub(super) fn read(map: &PerCpuArray<MapData, Counter>) -> Result<Counters, BpfError> {
    (0..COUNTERS)
        .map(|index| {
            let cpus = map.get(&index, 0).map_err(BpfError::map(names::COUNTERS))?;
            Ok(cpus.iter().fold(Counter::default(), |sum, cpu| Counter {
                packets: sum.packets.wrapping_add(cpu.packets),
                bytes: sum.bytes.wrapping_add(cpu.bytes),
            }))
        })
        .collect::<Result<_, _>>()
        .map(Counters)
}
