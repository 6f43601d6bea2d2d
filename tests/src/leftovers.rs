//! Names that tell which process made a thing, and the removal of things whose process is dead.
//!
//! Called by everything that makes namespaces, cgroups and folders. A killed run cannot clean up after itself; the next one does.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::mount::{MntFlags, umount2};

use crate::cgroup;

/// Everything made by the tests is called `ebpf-proxy-test-<pid>-<number>-<label>`.
pub const PREFIX: &str = "ebpf-proxy-test-";

/// Where iproute2 keeps named namespaces.
pub const NETNS_DIR: &str = "/run/netns";

/// A name that nobody else on the machine uses. The first call of a process removes what dead ones left.
pub fn unique_name(label: &str) -> String {
    static SWEEP: Once = Once::new();
    static NEXT: AtomicU32 = AtomicU32::new(0);
    SWEEP.call_once(sweep);
    format!(
        "{PREFIX}{}-{}-{label}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}

/// A folder that disappears with its guard, and with the next run if this one is killed.
pub fn temp_dir(label: &str) -> std::io::Result<tempfile::TempDir> {
    tempfile::Builder::new().prefix(&unique_name(label)).tempdir()
}

/// Removes namespaces, mounts, folders and cgroups of test processes that do not run any more. What cannot be removed (someone
/// else is removing it too) stays for the next time.
pub fn sweep() {
    for path in ours(Path::new(NETNS_DIR)).filter(|p| is_dead(p)) {
        let _ = umount2(&path, MntFlags::MNT_DETACH);
        let _ = fs::remove_file(&path);
    }
    for path in ours(&std::env::temp_dir()).filter(|p| is_dead(p)) {
        remove_dir_with_mounts(&path);
    }
    if let Ok(base) = cgroup::base() {
        for path in ours(&base).filter(|p| is_dead(p)) {
            let _ = fs::remove_dir(&path);
        }
    }
}

/// Unmounts whatever is mounted below `path`, then removes the folder.
pub fn remove_dir_with_mounts(path: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for target in mounts.lines().filter_map(|line| line.split(' ').nth(1)) {
        if Path::new(target).starts_with(path) {
            let _ = umount2(target, MntFlags::MNT_DETACH);
        }
    }
    let _ = fs::remove_dir_all(path);
}

fn ours(dir: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|e| e.path()).filter(|p| pid_of(p).is_some())
}

fn pid_of(path: &Path) -> Option<u32> {
    let (pid, _) = path.file_name()?.to_str()?.strip_prefix(PREFIX)?.split_once('-')?;
    pid.parse().ok()
}

fn is_dead(path: &Path) -> bool {
    pid_of(path).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_is_in_the_name() {
        let name = unique_name("x");
        assert_eq!(pid_of(Path::new(&name)), Some(std::process::id()));
        assert!(!is_dead(Path::new(&name)));
        // Larger than any pid the kernel gives out (2^22).
        assert!(is_dead(Path::new(&format!("{PREFIX}99999999-0-x"))));
        assert_eq!(pid_of(Path::new("/run/netns/somebody-else")), None);
    }
}
