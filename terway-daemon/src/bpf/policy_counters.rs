//! Counters of what reasons decided: the daemon makes them, the programs count in them.

use aya::Ebpf;
use aya::maps::{MapData, PerCpuHashMap, PerCpuValues};
use aya::util::nr_cpus;
use terway_abi::{PolicyCounter, names};

use super::endpoints::absent_is_fine;
use super::error::BpfError;
use super::object::take;

/// The map.
pub(super) struct Verdicts {
    map: PerCpuHashMap<MapData, u32, PolicyCounter>,
    cpus: usize,
}

impl Verdicts {
    pub(super) fn new(loaded: &mut Ebpf) -> Result<Self, BpfError> {
        let cpus = nr_cpus().map_err(|(call, source)| BpfError::System { call, source })?;
        Ok(Self { map: take(loaded, names::POLICY_COUNTERS)?, cpus })
    }

    /// Makes a counter that starts with nothing.
    pub(super) fn make(&mut self, reason: u32, tag: u64) -> Result<(), BpfError> {
        let zero = PolicyCounter { tag, ..PolicyCounter::default() };
        PerCpuValues::try_from(vec![zero; self.cpus])
            .map_err(aya::maps::MapError::from)
            .and_then(|values| self.map.insert(reason, values, 0))
            .map_err(BpfError::map(names::POLICY_COUNTERS))
    }

    /// The sum over all CPUs; nothing if there is no such counter.
    pub(super) fn read(&self, reason: u32) -> Result<PolicyCounter, BpfError> {
        match self.map.get(&reason, 0) {
            Ok(cpus) => Ok(cpus.iter().fold(PolicyCounter::default(), |sum, cpu| PolicyCounter {
                packets: sum.packets.wrapping_add(cpu.packets),
                bytes: sum.bytes.wrapping_add(cpu.bytes),
                tag: cpu.tag,
            })),
            Err(aya::maps::MapError::KeyNotFound) => Ok(PolicyCounter::default()),
            Err(error) => Err(BpfError::map(names::POLICY_COUNTERS)(error)),
        }
    }

    pub(super) fn remove(&mut self, reason: u32) -> Result<(), BpfError> {
        absent_is_fine(self.map.remove(&reason)).map_err(BpfError::map(names::POLICY_COUNTERS))
    }

    /// The reasons that have a counter.
    pub(super) fn reasons(&self) -> Result<Vec<u32>, BpfError> {
        self.map.keys().collect::<Result<_, _>>().map_err(BpfError::map(names::POLICY_COUNTERS))
    }
}
