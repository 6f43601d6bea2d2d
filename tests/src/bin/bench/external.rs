//! Cases that programs beside this one measure, each for itself as well: they leave their results as files, or in their table.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use proxy_tests::results::{Better, Case};
use proxy_tests::{leftovers, process};

use crate::Run;
use crate::cases::Builder;

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

/// Programs by test-run.
pub(crate) const PACKET: &[&str] = &[RUNS, LOOK_UPS];
const RUNS: &str = "program-runs";
const LOOK_UPS: &str = "program-look-ups";
/// Calls, by scale.
const CALLS: [usize; 3] = [3, 1, 1];

/// Measures them.
pub(crate) fn packet(run: &Run) -> Result<Vec<Case>> {
    let mut runs = Builder::new(
        RUNS,
        "A run of a program over one packet",
        "ns",
        Better::Lower,
        ABOUT_RUNS,
    );
    let mut look_ups = Builder::new(
        LOOK_UPS,
        "The same in look-ups",
        "look-ups",
        Better::Lower,
        ABOUT_LOOK_UPS,
    );
    for _ in 0..run.pick(CALLS) {
        let table = finish(run, "bench-packet", Command::new(beside("bench-packet")?))?;
        for line in table.lines() {
            let Some((name, [time, ratio])) = figures(line) else {
                continue;
            };
            runs.add(&name, None, time.unwrap_or_default());
            if let Some(ratio) = ratio {
                look_ups.add(&name, None, ratio);
            }
        }
    }
    let cases = [runs, look_ups].into_iter().filter_map(Builder::finish);
    Ok(cases.filter(|case| run.wants(&case.name)).collect())
}

/// A line of the table of `bench packet`: a name, nanoseconds, look-ups where it says them. Only these figures have a fraction.
fn figures(line: &str) -> Option<(String, [Option<f64>; 2])> {
    let fraction = |word: &&str| word.contains('.').then(|| word.parse::<f64>().ok()).flatten();
    let words: Vec<&str> = line.split_whitespace().collect();
    let first = words.iter().position(|word| fraction(word).is_some())?;
    let time = fraction(&words[first]);
    Some((
        words[..first].join(" "),
        [time, words.get(first + 1).and_then(fraction)],
    ))
}

const ABOUT_RUNS: &str = "By the kernel's program test-run, as `cargo xtask bench packet` does it: the program alone, without network stack \
    and driver, over the same packet again and again, so with warm caches. The fastest of several rounds counts; it was called three times.";
const ABOUT_LOOK_UPS: &str = "How many times a program that only looks the packet's key up in the rewrite table goes into a run, both \
    measured in turn.";

/// How long a program may take to remove what it has made.
const CLEANING: Duration = Duration::from_secs(30);

/// Runs a program that stands beside this one to its end, and reads what it has found.
fn call(run: &Run, name: &str, names: &[&str], args: &[&str]) -> Result<Vec<Case>> {
    let out = leftovers::temp_dir("results")?;
    let mut command = Command::new(beside(name)?);
    command.args(args).arg("--out").arg(out.path());
    finish(run, name, command)?;
    let mut cases = Case::read_all(out.path())?;
    let unknown = cases.iter().find(|case| !names.contains(&case.name.as_str()));
    ensure!(
        unknown.is_none(),
        "{name} has measured a case that nobody knows: {unknown:?}"
    );
    cases.retain(|case| run.wants(&case.name));
    Ok(cases)
}

/// Runs it to its end, and gives what it printed.
fn finish(run: &Run, name: &str, command: Command) -> Result<String> {
    run.step(&format!("starting {name}"));
    let dir = leftovers::temp_dir("log")?;
    let log = dir.path().join("log");
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
    let said = std::fs::read_to_string(&log).unwrap_or_default();
    if !ended.success() {
        leftovers::sweep();
        bail!("{name} ended with {ended}; it said\n{said}");
    }
    Ok(said)
}

fn beside(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("finding the bench's own path")?;
    let path = own
        .parent()
        .map(|dir: &Path| dir.join(name))
        .filter(|path| path.is_file());
    path.with_context(|| format!("{name} is not beside {}: use `cargo xtask bench all`", own.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_packet_table() {
        let with = figures("IPv4 TCP tc_ingress, established               61.0         1.85            210");
        assert_eq!(
            with,
            Some(("IPv4 TCP tc_ingress, established".into(), [Some(61.0), Some(1.85)]))
        );
        let without = figures("IPv4 TCP tc_ingress, not ours               31.5                -");
        assert_eq!(
            without,
            Some(("IPv4 TCP tc_ingress, not ours".into(), [Some(31.5), None]))
        );
        assert_eq!(figures("program and case   ns/packet   instructions"), None);
    }
}
