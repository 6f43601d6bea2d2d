//! Which slots of a family's backend array are taken. Blocks are counted by who refers to them (frontends in the kernel, and the
//! service they were written for); one that nobody refers to any more is freed after a grace period, because a program that
//! started before may still read it.
//!
//! What must stay true: blocks never overlap; a block is not handed out again while a frontend points to it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Taken and free blocks of an array.
#[derive(Debug)]
pub(super) struct Ranges {
    /// Free blocks by first slot, for joining neighbours.
    free: BTreeMap<u32, u32>,
    /// The same by (length, first slot), for the best fit.
    free_by_length: BTreeSet<(u32, u32)>,
    /// Taken blocks by first slot.
    blocks: BTreeMap<u32, Block>,
    taken: u32,
}

#[derive(Debug)]
struct Block {
    length: u32,
    references: u32,
    /// Since when nobody refers to it.
    idle_since: Option<Duration>,
}

impl Ranges {
    /// An array of `capacity` slots in which the blocks (first, length) of `found` are taken, with nobody referring to them yet.
    /// Overlapping ones, which only a broken map can hold, become one block; what is outside the array is ignored.
    pub(super) fn new(capacity: u32, found: impl IntoIterator<Item = (u32, u32)>) -> Self {
        let mut found: Vec<(u32, u32)> = found
            .into_iter()
            .filter_map(|(first, length)| Some((first, first.checked_add(length)?)))
            .filter(|(first, end)| first < end && *end <= capacity)
            .collect();
        found.sort_unstable();
        let mut ranges = Self {
            free: BTreeMap::new(),
            free_by_length: BTreeSet::new(),
            blocks: BTreeMap::new(),
            taken: 0,
        };
        let mut merged: Vec<(u32, u32)> = Vec::new();
        for (first, end) in found {
            match merged.last_mut() {
                Some((_, last_end)) if first < *last_end => *last_end = end.max(*last_end),
                _ => merged.push((first, end)),
            }
        }
        let mut next = 0;
        for (first, end) in merged {
            ranges.add_free(next, first - next);
            ranges.take(first, end - first, 0);
            next = end;
        }
        ranges.add_free(next, capacity - next);
        ranges
    }

    /// A block of `length` slots with one reference, or `None` if no gap is large enough. `length` is not 0.
    pub(super) fn allocate(&mut self, length: u32) -> Option<u32> {
        let (free_length, first) = *self.free_by_length.range((length, 0)..).next()?;
        self.remove_free(first, free_length);
        self.add_free(first + length, free_length - length);
        self.take(first, length, 1);
        Some(first)
    }

    /// One more reference to the block that holds slot `first`.
    pub(super) fn retain(&mut self, first: u32) {
        if let Some(block) = self.block_mut(first) {
            block.references += 1;
            block.idle_since = None;
        }
    }

    /// One reference less.
    pub(super) fn release(&mut self, first: u32, now: Duration) {
        if let Some(block) = self.block_mut(first) {
            block.references = block.references.saturating_sub(1);
            if block.references == 0 {
                block.idle_since = Some(now);
            }
        }
    }

    /// Blocks of a former agent that nobody took over: they wait for the grace period like all others.
    pub(super) fn retire_unclaimed(&mut self, now: Duration) {
        for block in self.blocks.values_mut().filter(|block| block.references == 0) {
            block.idle_since.get_or_insert(now);
        }
    }

    /// Is some block waiting to be freed?
    pub(super) fn has_idle(&self) -> bool {
        self.blocks.values().any(|block| block.idle_since.is_some())
    }

    /// Frees what nobody has referred to since `before` or longer; gives the number of slots.
    pub(super) fn free_idle(&mut self, before: Duration) -> u32 {
        let idle: Vec<(u32, u32)> = self
            .blocks
            .iter()
            .filter(|(_, block)| block.idle_since.is_some_and(|since| since <= before))
            .map(|(first, block)| (*first, block.length))
            .collect();
        for (first, length) in &idle {
            self.blocks.remove(first);
            self.taken -= length;
            self.give_back(*first, *length);
        }
        idle.iter().map(|(_, length)| length).sum()
    }

    /// Slots in blocks.
    pub(super) fn taken(&self) -> u32 {
        self.taken
    }

    fn block_mut(&mut self, slot: u32) -> Option<&mut Block> {
        let (first, block) = self.blocks.range_mut(..=slot).next_back()?;
        (slot - first < block.length).then_some(block)
    }

    fn take(&mut self, first: u32, length: u32, references: u32) {
        self.taken += length;
        self.blocks.insert(
            first,
            Block {
                length,
                references,
                idle_since: None,
            },
        );
    }

    /// Joins a freed block with its free neighbours.
    fn give_back(&mut self, mut first: u32, mut length: u32) {
        if let Some((&before, &before_length)) = self.free.range(..first).next_back()
            && before + before_length == first
        {
            self.remove_free(before, before_length);
            first = before;
            length += before_length;
        }
        if let Some(&after_length) = self.free.get(&(first + length)) {
            self.remove_free(first + length, after_length);
            length += after_length;
        }
        self.add_free(first, length);
    }

    fn add_free(&mut self, first: u32, length: u32) {
        if length > 0 {
            self.free.insert(first, length);
            self.free_by_length.insert((length, first));
        }
    }

    fn remove_free(&mut self, first: u32, length: u32) {
        self.free.remove(&first);
        self.free_by_length.remove(&(length, first));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CAPACITY: u32 = 64;
    const NOW: Duration = Duration::from_secs(1);

    #[test]
    fn what_is_found_is_not_handed_out() {
        let mut ranges = Ranges::new(16, [(4, 4), (6, 4), (15, 9), (12, 2)]);
        assert_eq!(ranges.taken(), 8);
        let mut slots: Vec<u32> = std::iter::from_fn(|| ranges.allocate(1)).collect();
        slots.sort_unstable();
        assert_eq!(slots, [0, 1, 2, 3, 10, 11, 14, 15]);
    }

    #[test]
    fn unclaimed_blocks_are_freed_after_the_grace_period() {
        let mut ranges = Ranges::new(16, [(0, 8), (8, 8)]);
        ranges.retain(0);
        ranges.retire_unclaimed(NOW);
        assert_eq!(ranges.free_idle(Duration::ZERO), 0);
        assert_eq!(ranges.free_idle(NOW), 8);
        assert_eq!(ranges.allocate(8), Some(8));
    }

    proptest! {
        /// Blocks never overlap, nothing is lost: once all is released, the whole array is one block again.
        #[test]
        fn blocks_are_disjoint_and_space_comes_back(steps in proptest::collection::vec((1u32..20, any::<bool>(), 0usize..8), 0..200)) {
            let mut ranges = Ranges::new(CAPACITY, []);
            let mut held: Vec<(u32, u32)> = Vec::new();
            for (length, allocate, which) in steps {
                if allocate {
                    match ranges.allocate(length) {
                        Some(first) => {
                            prop_assert!(first + length <= CAPACITY);
                            for (other, other_length) in &held {
                                prop_assert!(first + length <= *other || other + other_length <= first);
                            }
                            held.push((first, length));
                        }
                        None => prop_assert!(ranges.free.values().all(|free| *free < length)),
                    }
                } else if !held.is_empty() {
                    let (first, _) = held.swap_remove(which % held.len());
                    ranges.release(first, NOW);
                    ranges.free_idle(NOW);
                }
                prop_assert_eq!(ranges.taken(), held.iter().map(|(_, length)| length).sum::<u32>());
            }
            for (first, _) in held {
                ranges.release(first, NOW);
            }
            ranges.free_idle(NOW);
            prop_assert_eq!(ranges.allocate(CAPACITY), Some(0));
        }
    }
}
