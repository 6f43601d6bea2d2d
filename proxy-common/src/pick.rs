//! Uniform choice and binary search over ranges: pure functions that the programs run with the kernel's random numbers and the
//! tests with their own.

/// Turns that [`uniform`] takes at most. The chance to need another one is below `count / 2^32`.
const TURNS: u32 = 4;

/// A number in `0..count`, every one with the same probability (Lemire 2019, "Fast random integer generation in an interval").
///
/// `random` gives uniform 32-bit numbers. For `count == 0` the answer is 0: the caller has to look first.
#[inline(always)]
pub fn uniform(count: u32, mut random: impl FnMut() -> u32) -> u32 {
    let mut product = u64::from(random()) * u64::from(count);
    if (product as u32) < count && count != 0 {
        let threshold = count.wrapping_neg() % count;
        let mut turn = 0;
        while turn < TURNS && (product as u32) < threshold {
            product = u64::from(random()) * u64::from(count);
            turn += 1;
        }
    }
    (product >> 32) as u32
}

/// Steps that [`find`] needs for the largest range: 2^20 slots.
const SEARCH_STEPS: u32 = 21;

/// The slot in `first .. first+count` for which `order` says "equal". The slots are sorted, `order(slot)` compares the slot with
/// what is looked for; `None` means the slot is out of bounds and ends the search.
#[inline(always)]
pub fn find(first: u32, count: u32, mut order: impl FnMut(u32) -> Option<core::cmp::Ordering>) -> Option<u32> {
    let mut low = first;
    let mut high = first.wrapping_add(count);
    let mut step = 0;
    while step < SEARCH_STEPS && low < high {
        let middle = low + (high - low) / 2;
        match order(middle) {
            Some(core::cmp::Ordering::Equal) => return Some(middle),
            Some(core::cmp::Ordering::Less) => low = middle + 1,
            Some(core::cmp::Ordering::Greater) => high = middle,
            None => return None,
        }
        step += 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn uniform_rejects_exactly_the_excess() {
        // With count = 3, 2^32 mod 3 = 1: a product whose low half is below 1 is redrawn, so 0 must lead to a second draw.
        let mut draws = [0u32, u32::MAX].into_iter();
        assert_eq!(uniform(3, || draws.next().unwrap()), 2);
        assert_eq!(draws.next(), None);
    }

    #[test]
    fn uniform_is_bounded_when_the_source_is_broken() {
        assert_eq!(uniform(3, || 0), 0);
        assert_eq!(uniform(0, || 7), 0);
    }

    proptest! {
        #[test]
        fn uniform_stays_in_range(count in 1u32.., seed in any::<u32>()) {
            let mut x = seed;
            let picked = uniform(count, || {
                x = x.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
                x
            });
            prop_assert!(picked < count);
        }

        #[test]
        fn find_finds_what_is_there(mut slots in proptest::collection::vec(0u32..300, 0..200), wanted in 0u32..300, first in 0u32..9) {
            slots.sort_unstable();
            let found = find(first, slots.len() as u32, |i| slots.get((i - first) as usize).map(|s| s.cmp(&wanted)));
            prop_assert_eq!(found.is_some(), slots.contains(&wanted));
            prop_assert!(found.is_none_or(|i| slots[(i - first) as usize] == wanted));
        }
    }
}
