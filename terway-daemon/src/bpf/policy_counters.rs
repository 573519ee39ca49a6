//! Handle of the policy counters: what each policy rule decided. The daemon creates them, the programs count in them.

use std::fmt;

use aya::Ebpf;
use aya::maps::{MapData, MapError, PerCpuHashMap, PerCpuValues};
use aya::util::nr_cpus;
use parking_lot::Mutex;
use terway_abi::{PolicyCounter, names};

use super::error::{BpfError, ignore_absent};
use super::object::take;

/// Handle of the policy counter map, whose keys are rule ids. Its lock is held for one map operation.
pub struct PolicyCounters {
    map: Mutex<PerCpuHashMap<MapData, u32, PolicyCounter>>,
    cpus: usize,
}

impl fmt::Debug for PolicyCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PolicyCounters").finish_non_exhaustive()
    }
}

impl PolicyCounters {
    pub(super) fn open(loaded: &mut Ebpf) -> Result<Self, BpfError> {
        let cpus = nr_cpus().map_err(|(call, source)| BpfError::System { call, source })?;
        Ok(Self { map: Mutex::new(take(loaded, names::POLICY_COUNTERS)?), cpus })
    }

    /// Creates the counter of a rule, which starts at zero. The programs store nothing in `tag`: it is the daemon's mark of the rule.
    ///
    /// # Errors
    /// [`BpfError::Map`], also if there are too many.
    pub fn create(&self, rule: u32, tag: u64) -> Result<(), BpfError> {
        let zero = PolicyCounter { tag, ..PolicyCounter::default() };
        PerCpuValues::try_from(vec![zero; self.cpus])
            .map_err(MapError::from)
            .and_then(|values| self.map.lock().insert(rule, values, 0))
            .map_err(BpfError::map(names::POLICY_COUNTERS))
    }

    /// The counter of a rule, summed over CPUs; zero if there is none.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn read(&self, rule: u32) -> Result<PolicyCounter, BpfError> {
        match self.map.lock().get(&rule, 0) {
            Ok(cpus) => Ok(cpus.iter().fold(PolicyCounter::default(), |sum, cpu| PolicyCounter {
                packets: sum.packets.wrapping_add(cpu.packets),
                bytes: sum.bytes.wrapping_add(cpu.bytes),
                tag: cpu.tag,
            })),
            Err(MapError::KeyNotFound) => Ok(PolicyCounter::default()),
            Err(error) => Err(BpfError::map(names::POLICY_COUNTERS)(error)),
        }
    }

    /// Removes the counter of a rule. One that does not exist is no error.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn remove(&self, rule: u32) -> Result<(), BpfError> {
        ignore_absent(self.map.lock().remove(&rule)).map_err(BpfError::map(names::POLICY_COUNTERS))
    }

    /// The rules that have a counter.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn rule_ids(&self) -> Result<Vec<u32>, BpfError> {
        self.map.lock().keys().collect::<Result<_, _>>().map_err(BpfError::map(names::POLICY_COUNTERS))
    }
}
