//! Support for the tests that need a kernel, for the demo and for the benchmarks.

pub mod programs;
pub mod wire;
