//! How an SCTP packet's CRC32c (RFC 9260 §6.8) changes when the ports do, without reading the packet (S195). Pure, used by the
//! programs and by host tests.
//!
//! A CRC is linear: the sums of two packets of one length differ by what the bits in which they differ contribute. Only the ports
//! differ, which are the first four bytes; what follows in the packet multiplies their contribution by x^8 per byte, modulo the
//! polynomial. Initial value and final inversion cancel out, and the checksum field counts as zero in both packets.
//!
//! Polynomials are reflected, as in every CRC32c: bit 31 is the coefficient of x^0. What must stay true: no branch depends on the
//! data, because the verifier would follow every combination of them.

/// The Castagnoli polynomial without x^32.
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// The polynomial 1.
const ONE: u32 = 1 << 31;

/// `POWERS[0][i]` is x^(8i), `POWERS[1][i]` is x^(8·256·i): together they reach every length of an IP packet.
static POWERS: [[u32; 256]; 2] = [powers(1), powers(256)];
/// A byte's contribution after eight steps.
static BYTES: [u32; 256] = bytes();

/// `value` times x^8, bit by bit.
const fn times_x8(mut value: u32) -> u32 {
    let mut bit = 0;
    while bit < 8 {
        value = (value >> 1) ^ (POLYNOMIAL * (value & 1));
        bit += 1;
    }
    value
}

const fn bytes() -> [u32; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = times_x8(byte as u32);
        byte += 1;
    }
    table
}

/// x^(8·`stride`·i) for every i.
const fn powers(stride: u32) -> [u32; 256] {
    let mut table = [ONE; 256];
    let mut i = 1;
    while i < 256 {
        let mut value = table[i - 1];
        let mut byte = 0;
        while byte < stride {
            value = times_x8(value);
            byte += 1;
        }
        table[i] = value;
        i += 1;
    }
    table
}

/// The product of two polynomials of 32 bits, by integer multiplication: of numbers that have three zeros between any two bits, at
/// most eight ones meet in a place, and the carries end in the gaps.
#[inline(always)]
const fn carryless_product(a: u32, b: u32) -> u64 {
    const EVERY_FOURTH: u64 = 0x1111_1111_1111_1111;
    let mut product = 0;
    let mut place = 0;
    while place < 4 {
        let mut sum = 0;
        let mut i = 0;
        while i < 4 {
            let a = a as u64 & (EVERY_FOURTH << i);
            let b = b as u64 & (EVERY_FOURTH << ((place + 4 - i) % 4));
            sum ^= a.wrapping_mul(b);
            i += 1;
        }
        product |= sum & (EVERY_FOURTH << place);
        place += 1;
    }
    product
}

/// The product modulo the Castagnoli polynomial.
#[inline(always)]
fn product(a: u32, b: u32) -> u32 {
    // Reflected numbers of 32 bits have a reflected product of 63; shifted, its upper half is what is below x^32.
    let product = carryless_product(a, b) << 1;
    let mut high_powers = product as u32;
    let mut byte = 0;
    while byte < 4 {
        high_powers = BYTES[(high_powers & 0xff) as usize] ^ (high_powers >> 8);
        byte += 1;
    }
    high_powers ^ (product >> 32) as u32
}

/// What to XOR the CRC32c of a packet of `len` bytes with when its first four bytes change: `changed` is the old ones XOR the new
/// ones. Numbers are little-endian, as the CRC stands in an SCTP packet.
#[inline(always)]
pub fn difference(changed: u32, len: u16) -> u32 {
    let [low, high] = len.to_le_bytes();
    let [small, large] = &POWERS;
    product(product(changed, small[usize::from(low)]), large[usize::from(high)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Textbook computation, independent of the code under test.
    fn reference(data: &[u8]) -> u32 {
        let mut crc = u32::MAX;
        for byte in data {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = if crc & 1 == 1 {
                    (crc >> 1) ^ 0x82f6_3b78
                } else {
                    crc >> 1
                };
            }
        }
        !crc
    }

    fn check(mut data: Vec<u8>, new: [u8; 4]) {
        let before = reference(&data);
        let old: [u8; 4] = data[..4].try_into().unwrap();
        data[..4].copy_from_slice(&new);
        let changed = u32::from_le_bytes(old) ^ u32::from_le_bytes(new);
        let after = before ^ difference(changed, data.len() as u16);
        assert_eq!(after, reference(&data), "{} bytes, {old:?} to {new:?}", data.len());
    }

    #[test]
    fn reference_gives_the_published_value() {
        assert_eq!(reference(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn no_change_changes_nothing() {
        for len in [0, 12, 1_480, u16::MAX] {
            assert_eq!(difference(0, len), 0);
        }
    }

    #[test]
    fn every_short_length_and_the_longest() {
        for len in (4..=600).chain([1_452, 1_460, 32_768, 65_279, 65_280, 65_515, 65_535]) {
            let data: Vec<u8> = (0..len).map(|i| (i * 31 + len) as u8).collect();
            check(data, [0xff, 0x00, 0x1f, 0x90]);
        }
    }

    proptest! {
        #[test]
        fn incremental_update_is_a_full_recompute(
            data in proptest::collection::vec(any::<u8>(), 12..3_000),
            new in any::<[u8; 4]>(),
        ) {
            check(data, new);
        }
    }
}
