//! Internet checksum arithmetic (RFC 1071, RFC 1624). Pure, used by the programs and by host tests.
//!
//! Words are taken in memory order, as the kernel does: a ones'-complement sum may be computed in either byte order as long as
//! loads and stores agree, so nothing is swapped here.

/// Folds a 32-bit ones'-complement sum to 16 bits.
#[inline(always)]
pub const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// `new - old` in ones'-complement, folded: adding it to a sum that contains `old` gives a sum that contains `new`.
///
/// Zero exactly if the two sums are the same number, so that a rewrite without effect is recognised.
#[inline(always)]
pub const fn difference(old: u32, new: u32) -> u16 {
    if old == new {
        return 0;
    }
    change(old, new)
}

/// As [`difference`], but never zero if `new` is not: two equal sums differ by the other zero, 0xffff. For data that is known to have
/// changed although its sum may not have.
#[inline(always)]
pub const fn change(old: u32, new: u32) -> u16 {
    fold(new + (!fold(old) as u32))
}

/// A checksum field (the complement of a sum) after its data changed by `delta` (RFC 1624, equation 3).
#[inline(always)]
pub const fn update(field: u16, delta: u16) -> u16 {
    !fold((!field) as u32 + delta as u32)
}

/// Ones'-complement sum of `data`, taken as 16-bit words in memory order; an odd last byte is padded with zero.
pub fn sum(data: &[u8]) -> u32 {
    let mut sum = 0u32;
    let mut chunks = data.chunks_exact(2);
    for chunk in &mut chunks {
        if let [a, b] = chunk {
            sum += u32::from(u16::from_ne_bytes([*a, *b]));
        }
        sum = (sum & 0xffff) + (sum >> 16);
    }
    if let [last] = chunks.remainder() {
        sum += u32::from(u16::from_ne_bytes([*last, 0]));
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Textbook computation over big-endian words, independent of the code under test.
    fn reference(data: &[u8]) -> [u8; 2] {
        let mut total: u64 = 0;
        for pair in data.chunks(2) {
            total += u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |b| u64::from(*b));
        }
        while total > 0xffff {
            total = (total >> 16) + (total & 0xffff);
        }
        (!(total as u16)).to_be_bytes()
    }

    #[test]
    fn sum_of_the_rfc_1071_example() {
        let data = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!((!fold(sum(&data))).to_ne_bytes(), reference(&data));
        assert_eq!(reference(&data), [0x22, 0x0d]);
    }

    proptest! {
        #[test]
        fn full_sum_is_the_reference(data in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!((!fold(sum(&data))).to_ne_bytes(), reference(&data));
        }

        #[test]
        fn incremental_update_is_a_full_recompute(
            mut data in proptest::collection::vec(any::<u8>(), 40..100),
            new in any::<[u8; 12]>(),
            at in 0usize..14,
        ) {
            let at = at * 2;
            let before = u16::from_ne_bytes(reference(&data));
            let old: [u8; 12] = data[at..at + 12].try_into().unwrap();
            data[at..at + 12].copy_from_slice(&new);
            let after = update(before, difference(sum(&old), sum(&new)));
            let full = u16::from_ne_bytes(reference(&data));
            // Ones'-complement has two zeros; they are the same number on the wire for every verifier.
            prop_assert!(after == full || (after ^ full) == 0xffff && (after == 0 || full == 0), "{after:#x} {full:#x}");
        }
    }
}
