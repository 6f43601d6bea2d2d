//! What is pinned in a directory, and whether an agent is using it. Read-only.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use proxy_common::names::LAYOUT_VERSION;

use super::loader::{Pins, pinned_maps};
use super::upgrade::{State, Version, versions};

/// See the module.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Remains {
    /// An agent is running.
    pub(crate) is_locked: bool,
    /// Pinned maps of this version.
    pub(crate) maps: usize,
    /// Those that should be pinned too.
    pub(crate) missing: Vec<&'static str>,
    /// Directories of other layout versions.
    pub(crate) other_versions: Vec<String>,
}

/// Looks at `--bpf-dir`. What is not there has nothing in it.
pub(crate) fn remains(bpf_dir: &Path) -> Remains {
    let pins = Pins::new(bpf_dir);
    let (found, missing): (Vec<_>, Vec<_>) = pinned_maps().partition(|name| pins.maps.join(name).exists());
    let other = |version: &Version| (version.number, version.state) != (LAYOUT_VERSION, State::Complete);
    let versions = versions(bpf_dir).unwrap_or_default();
    Remains {
        is_locked: is_locked(bpf_dir),
        maps: found.len(),
        missing,
        other_versions: versions
            .iter()
            .filter(|version| other(version))
            .map(Version::name)
            .collect(),
    }
}

/// Tries for the lock and gives it back at once.
fn is_locked(bpf_dir: &Path) -> bool {
    let Ok(dir) = File::open(bpf_dir) else { return false };
    // SAFETY: no pointers; the descriptor is open. Its end releases the lock, which is shared, so that two that look do not meet.
    let result = unsafe { libc::flock(dir.as_raw_fd(), libc::LOCK_SH | libc::LOCK_NB) };
    result != 0
}
