//! On what kind of machine something was measured, in words that name no particular one.

use std::fs;

use anyhow::{Context, Result, ensure};

/// What a reader has to know beside the figures.
pub(crate) struct Machine {
    pub(crate) kernel: String,
    pub(crate) processor: String,
    pub(crate) cores: usize,
    pub(crate) gigabytes: u64,
    pub(crate) is_virtual: bool,
    pub(crate) date: String,
}

/// The load generators want a core, and what is measured another one.
pub(crate) fn check() -> Result<()> {
    ensure!(
        cores() >= 2,
        "this machine has one processor: one is needed for the load and one for what is measured"
    );
    Ok(())
}

/// How many processors there are.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// This machine.
pub(crate) fn describe() -> Result<Machine> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("reading the kernel's version")?;
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").context("reading /proc/cpuinfo")?;
    let meminfo = fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let kilobytes = field(&meminfo, "MemTotal").and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
    // The version alone: what distributions append may name a machine.
    let version = release.split('-').next().unwrap_or_default();
    Ok(Machine {
        kernel: format!("Linux {}", version.trim()),
        processor: field(&cpuinfo, "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
        cores: cores(),
        gigabytes: kilobytes.unwrap_or_default().div_ceil(1 << 20),
        is_virtual: field(&cpuinfo, "flags").is_some_and(|flags| flags.contains("hypervisor")),
        date: today(),
    })
}

fn today() -> String {
    // SAFETY: both structures are plain integers, and the functions write nothing else.
    let (year, month, day) = unsafe {
        let now = libc::time(std::ptr::null_mut());
        let mut parts: libc::tm = std::mem::zeroed();
        libc::gmtime_r(&raw const now, &raw mut parts);
        (parts.tm_year + 1900, parts.tm_mon + 1, parts.tm_mday)
    };
    format!("{year}-{month:02}-{day:02}")
}
