//! The clock of `last_seen`: ticks of 2^30 ns (about 1.07 s) of CLOCK_MONOTONIC_COARSE. A shift instead of a division, and a
//! tick's length bounds how often an established flow writes to its own entry.

/// Nanoseconds of the coarse monotonic clock, as ticks.
#[inline(always)]
pub const fn ticks(nanoseconds: u64) -> u32 {
    (nanoseconds >> 30) as u32
}

/// The kernel's jiffies, as moments of four: 4 to 40 ms, by what the kernel was built with (CONFIG_HZ), 16 ms as a rule. For so long XDP
/// goes by what it found out about a flow. Reading jiffies takes no call.
#[inline(always)]
pub const fn moment(jiffies: u64) -> u32 {
    (jiffies >> 2) as u32
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
