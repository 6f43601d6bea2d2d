//! The clock of `last_seen`: ticks of 2^30 ns (about 1.07 s) of CLOCK_MONOTONIC_COARSE. A shift instead of a division, and a
//! tick's length bounds how often an established flow writes to its own entry.

/// Nanoseconds of the coarse monotonic clock, as ticks.
#[inline(always)]
pub const fn ticks(nanoseconds: u64) -> u32 {
    (nanoseconds >> 30) as u32
}

/// Nanoseconds of the coarse monotonic clock, as moments of 2^24 ns (about 17 ms): for so long XDP goes by what it found out about a
/// flow.
#[inline(always)]
pub const fn moment(nanoseconds: u64) -> u32 {
    (nanoseconds >> 24) as u32
}

/// The smallest number of ticks that is at least `seconds` long.
pub const fn ticks_of_seconds(seconds: u64) -> u32 {
    (seconds * 1_000_000_000).div_ceil(1 << 30) as u32
}

/// Ticks from `then` to `now`; 0 if `then` is later, as seen when another processor's clock is a moment ahead.
#[inline(always)]
pub const fn elapsed(then: u32, now: u32) -> u32 {
    now.saturating_sub(then)
}
