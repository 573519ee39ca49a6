//! Entries that the kernel took away by itself.
//!
//! An LRU table does not say when it takes an entry for a new one. What can be said: whether it can have had to at all, and how many
//! entries of the last pass are gone although nobody deleted or replaced them.

/// Elements that an LRU table keeps in hand for each CPU (`LOCAL_FREE_TARGET`, kernel/bpf/bpf_lru_list.c): it takes entries away when
/// so many are still free elsewhere.
const IN_HAND: u64 = 128;

/// What a pass over one table saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GcPass {
    /// Entries that it left.
    pub left: u64,
    /// Entries that it can hold.
    pub capacity: u64,
}

/// What happened from one pass to the next, over all tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EvictionInputs {
    /// Connections that got entries, one or two each.
    pub made: u64,
    /// Entries that were met void, and so were replaced.
    pub replaced: u64,
    /// Entries that were deleted on request.
    pub flushed: u64,
    /// Entries that are there and were made before the last pass.
    pub old: u64,
    /// Entries that are there and were made since.
    pub young: u64,
}

/// An estimate of the entries that tables took away since they were as in `before`: 0 for certain where no table can have been full;
/// otherwise what is missing of the old entries, and of one entry for each connection since. A connection that replaced a closed one
/// on the same ports counts as well, which the tables do not tell apart.
#[must_use]
pub fn estimate_evictions(before: &[GcPass], since: &EvictionInputs, cpus: u64) -> u64 {
    let may_have_been_full =
        |pass: &GcPass| pass.left + 2 * since.made + IN_HAND * cpus > pass.capacity && pass.capacity > 0;
    if !before.iter().any(may_have_been_full) {
        return 0;
    }
    let left: u64 = before.iter().map(|pass| pass.left).sum();
    let old = left.saturating_sub(since.old).saturating_sub(since.replaced + since.flushed);
    old + since.made.saturating_sub(since.young)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn eviction_estimate_of_half_full_table() {
        let before = [GcPass { left: 1000, capacity: 65_536 }, GcPass { left: 10, capacity: 65_536 }];
        // Half of the old ones were replaced by connections on the same ports: nobody can tell, but the table was never full.
        assert_eq!(
            estimate_evictions(
                &before,
                &EvictionInputs { made: 500, old: 505, young: 500, ..EvictionInputs::default() },
                8
            ),
            0
        );
    }

    proptest! {
        /// A table that is filled beyond its size without closing, flushing or replacing has lost exactly what does not fit.
        #[test]
        fn eviction_estimate_of_full_table(left in 0..1000_u64, made in 0..5000_u64, kept in any::<prop::sample::Index>()) {
            let capacity = 1000;
            let total = (left + made).min(capacity);
            let gone = left + made - total;
            // Any of them may have gone.
            let old_gone = kept.index(usize::try_from(gone.min(left)).unwrap() + 1) as u64;
            let old_gone = old_gone.max(gone.saturating_sub(made));
            let since = EvictionInputs { made, old: left - old_gone, young: made - (gone - old_gone), ..EvictionInputs::default() };
            let found = estimate_evictions(&[GcPass { left, capacity }], &since, 0);
            prop_assert_eq!(found, gone);
        }
    }
}
