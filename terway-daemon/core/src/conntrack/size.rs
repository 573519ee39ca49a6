//! How large the tables are.
//!
//! As Cilium does it (`--bpf-map-dynamic-size-ratio`, calculateDynamicBPFMapSizes in pkg/option/config.go): a part of the node's
//! memory, 0.25 % by default, is shared out among the tables, within bounds.

use crate::config::Ratio;

/// The fewest entries that may be asked for: an LRU table keeps 128 elements in hand for each CPU.
pub const LEAST: u32 = 1024;
/// The fewest that a table gets by itself, if pods have addresses of its family.
pub const SHARE_FLOOR: u32 = 65_536;
/// The most that it gets by itself: going through so many copies 300 MB.
pub const CEILING: u32 = 1 << 20;

/// What sizes are worked out from. 0 leaves a size to the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizing {
    /// Entries for IPv4; none by memory.
    pub v4: Option<u32>,
    /// Entries for IPv6; none by memory.
    pub v6: Option<u32>,
    /// The tables' part of the memory.
    pub ratio: Ratio,
}

/// Bytes that the kernel takes for an entry of each family; none if pods have no addresses of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// IPv4.
    pub v4: Option<u32>,
    /// IPv6.
    pub v6: Option<u32>,
}

impl Sizing {
    /// Entries of both tables on a node with so many bytes of memory.
    #[must_use]
    pub fn entries(&self, memory: u64, cost: Cost) -> [u32; 2] {
        let families = u32::from(cost.v4.is_some()) + u32::from(cost.v6.is_some());
        let budget = memory as f64 * self.ratio.get() / f64::from(families.max(1));
        let share = |bytes: Option<u32>| match bytes {
            None => LEAST,
            Some(bytes) => ((budget / f64::from(bytes.max(1))) as u32).clamp(SHARE_FLOOR, CEILING),
        };
        [self.v4.unwrap_or_else(|| share(cost.v4)), self.v6.unwrap_or_else(|| share(cost.v6))]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GIB: u64 = 1 << 30;
    const DUAL: Cost = Cost { v4: Some(280), v6: Some(328) };

    fn by_memory() -> Sizing {
        Sizing { v4: None, v6: None, ratio: Ratio::new(0.0025).unwrap() }
    }

    #[test]
    fn flow_table_sizes_by_memory() {
        assert_eq!(by_memory().entries(8 * GIB, DUAL), [SHARE_FLOOR; 2]);
        assert_eq!(by_memory().entries(32 * GIB, DUAL), [153_391, 130_944]);
        assert_eq!(by_memory().entries(32 * GIB, Cost { v6: None, ..DUAL }), [306_783, LEAST]);
        assert_eq!(by_memory().entries(4096 * GIB, DUAL), [CEILING; 2]);
        let given = Sizing { v4: Some(2000), ..by_memory() };
        assert_eq!(given.entries(8 * GIB, DUAL), [2000, SHARE_FLOOR]);
    }

    proptest! {
        #[test]
        fn flow_tables_stay_in_memory_budget(gib in 1..2000_u64, ratio in 1..100_u32) {
            let sizing = Sizing { ratio: Ratio::new(f64::from(ratio) / 10_000.0).unwrap(), ..by_memory() };
            let [v4, v6] = sizing.entries(gib * GIB, DUAL);
            let bytes = f64::from(v4) * 280.0 + f64::from(v6) * 328.0;
            let floor = f64::from(SHARE_FLOOR) * (280.0 + 328.0);
            prop_assert!(bytes <= (gib * GIB) as f64 * sizing.ratio.get() + floor);
            prop_assert!(v4 >= SHARE_FLOOR && v6 >= SHARE_FLOOR && v4 <= CEILING && v6 <= CEILING);
        }
    }
}
