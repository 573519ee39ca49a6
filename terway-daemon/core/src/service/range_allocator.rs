//! Allocates ranges of backend slots in the array of backend references.

use std::collections::{BTreeMap, BTreeSet};

/// A best-fit allocator of ranges in an array.
#[derive(Debug)]
pub struct RangeAllocator {
    /// First index → length.
    free: BTreeMap<u32, u32>,
    /// Length, first index: the smallest range that fits is taken, so that large ones stay whole.
    by_length: BTreeSet<(u32, u32)>,
}

impl RangeAllocator {
    /// An allocator for an array of this many elements, all free.
    #[must_use]
    pub fn new(capacity: u32) -> Self {
        let mut this = Self { free: BTreeMap::new(), by_length: BTreeSet::new() };
        this.insert(0, capacity);
        this
    }

    /// Reserves a range that is in use already. Nothing happens if any of it is taken or outside.
    pub fn reserve(&mut self, first: u32, count: u32) -> bool {
        let Some((&begin, &length)) = self.free.range(..=first).next_back() else { return false };
        let Some(end) = first.checked_add(count).filter(|end| *end <= begin + length) else { return false };
        self.remove(begin, length);
        self.insert(begin, first - begin);
        self.insert(end, begin + length - end);
        true
    }

    /// Allocates a range; none if no free one is long enough.
    pub fn take(&mut self, count: u32) -> Option<u32> {
        let (length, first) = self.by_length.range((count, 0)..).next().copied()?;
        self.remove(first, length);
        self.insert(first + count, length - count);
        Some(first)
    }

    /// Frees a range.
    pub fn give_back(&mut self, first: u32, count: u32) {
        let (mut begin, mut end) = (first, first + count);
        if let Some((&before, &length)) = self.free.range(..first).next_back().filter(|(b, l)| **b + **l == first) {
            self.remove(before, length);
            begin = before;
        }
        if let Some(&length) = self.free.get(&end) {
            self.remove(end, length);
            end += length;
        }
        self.insert(begin, end - begin);
    }

    /// The number of free elements, in however many ranges.
    #[must_use]
    pub fn left(&self) -> u32 {
        self.free.values().sum()
    }

    fn insert(&mut self, first: u32, length: u32) {
        if length > 0 {
            self.free.insert(first, length);
            self.by_length.insert((length, first));
        }
    }

    fn remove(&mut self, first: u32, length: u32) {
        self.free.remove(&first);
        self.by_length.remove(&(length, first));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn allocator_ranges_do_not_overlap(
            steps in prop::collection::vec((1..20u32, any::<bool>(), any::<prop::sample::Index>()), 1..200),
        ) {
            const CAPACITY: u32 = 300;
            let mut runs = RangeAllocator::new(CAPACITY);
            let mut held: Vec<(u32, u32)> = Vec::new();
            for (count, take, which) in steps {
                if take {
                    match runs.take(count) {
                        Some(first) => {
                            prop_assert!(first + count <= CAPACITY);
                            prop_assert!(held.iter().all(|(f, c)| first + count <= *f || f + c <= first));
                            held.push((first, count));
                        }
                        None => prop_assert!(!runs.free.values().any(|length| *length >= count)),
                    }
                } else if !held.is_empty() {
                    let (first, count) = held.swap_remove(which.index(held.len()));
                    runs.give_back(first, count);
                }
                prop_assert_eq!(runs.left() + held.iter().map(|(_, c)| c).sum::<u32>(), CAPACITY);
            }
            // What a restart finds can be reserved anew, each stretch once.
            let mut again = RangeAllocator::new(CAPACITY);
            for (first, count) in &held {
                prop_assert!(again.reserve(*first, *count));
                prop_assert!(!again.reserve(*first, *count));
            }
            prop_assert_eq!(&again.free, &runs.free);
            held.drain(..).for_each(|(first, count)| runs.give_back(first, count));
            prop_assert_eq!(runs.free.into_iter().collect::<Vec<_>>(), [(0, CAPACITY)]);
        }
    }
}
