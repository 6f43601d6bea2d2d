//! Cases that programs beside this one measure, each for itself as well: they leave their results as files.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use proxy_tests::results::Case;
use proxy_tests::{leftovers, process};

use crate::Run;

/// Starts, changes and memory in large clusters.
pub(crate) const PLANE: &[&str] = &[
    "cold-start",
    "cold-start-in-all",
    "cold-start-cpu",
    "change-to-map-p50",
    "change-to-map-p99",
    "change-to-packet-p50",
    "change-to-packet-p99",
    "memory",
    "memory-anonymous",
    "memory-peak",
    "memory-maps",
];

/// Measures them.
pub(crate) fn plane(run: &Run) -> Result<Vec<Case>> {
    let full: &[&str] = &[];
    let quick: &[&str] = &["--size", "1000x10", "--starts", "1", "--changes", "20"];
    let tiny: &[&str] = &["--size", "50x2", "--starts", "1", "--changes", "2"];
    call(run, "bench-plane", PLANE, run.pick([full, quick, tiny]))
}

/// How long a program may take to remove what it has made.
const CLEANING: Duration = Duration::from_secs(30);

/// Runs a program that stands beside this one to its end, and reads what it has found.
fn call(run: &Run, name: &str, names: &[&str], args: &[&str]) -> Result<Vec<Case>> {
    run.step(&format!("starting {name}"));
    let out = leftovers::temp_dir("results")?;
    let mut command = Command::new(beside(name)?);
    command.args(args).arg("--out").arg(out.path());
    // What it prints is said again with everything else.
    let log = out.path().join("log");
    let mut child = process::spawn_logged(command, &log)?;
    let ended = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if let Err(interrupted) = run.check() {
            process::signal(&child, Signal::SIGTERM);
            process::wait_or_kill(&mut child, CLEANING)?;
            leftovers::sweep();
            return Err(interrupted);
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    if !ended.success() {
        leftovers::sweep();
        bail!(
            "{name} ended with {ended}; it said\n{}",
            std::fs::read_to_string(&log).unwrap_or_default()
        );
    }
    let mut cases = Case::read_all(out.path())?;
    let unknown = cases.iter().find(|case| !names.contains(&case.name.as_str()));
    ensure!(
        unknown.is_none(),
        "{name} has measured a case that nobody knows: {unknown:?}"
    );
    cases.retain(|case| run.wants(&case.name));
    Ok(cases)
}

fn beside(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("finding the bench's own path")?;
    let path = own
        .parent()
        .map(|dir: &Path| dir.join(name))
        .filter(|path| path.is_file());
    path.with_context(|| format!("{name} is not beside {}: use `cargo xtask bench all`", own.display()))
}
