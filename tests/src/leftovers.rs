//! Names that tell which process made a thing, and the removal of things whose process is dead.
//!
//! Called by everything that makes namespaces, cgroups and folders. A killed run cannot clean up after itself; the next one does.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cgroup;
use crate::process::wait_until;

/// How long the kernel may take to let go of an ended process.
const PATIENCE: Duration = Duration::from_secs(2);

/// Everything made by the tests is called `ebpf-proxy-test-<pid>-<number>-<label>`.
pub const PREFIX: &str = "ebpf-proxy-test-";

/// Where iproute2 keeps named namespaces.
pub const NETNS_DIR: &str = "/run/netns";

/// Everything that outlives its process on purpose, because somebody asked to keep it, is called
/// `ebpf-proxy-demo-<pid>-<number>-<label>`; nothing but [`remove_kept`] touches it.
pub const KEPT_PREFIX: &str = "ebpf-proxy-demo-";

/// File in a kept folder with a line `<pid> <start time>` for each process that was left running.
const PROCESSES: &str = "processes";

static KEEP: AtomicBool = AtomicBool::new(false);

/// From now on names say that their bearers are to be kept.
pub fn keep_everything() {
    KEEP.store(true, Ordering::Relaxed);
}

/// Remembers, in a kept folder, a process that is left running.
pub fn record_process(dir: &Path, pid: u32) -> std::io::Result<()> {
    use std::io::Write;
    let mut file = fs::File::options()
        .create(true)
        .append(true)
        .open(dir.join(PROCESSES))?;
    writeln!(file, "{pid} {}", start_time(pid).unwrap_or_default())
}

/// Ends and removes what was kept: by the process of this id, or by all. Gives the number of things removed.
pub fn remove_kept(of: Option<u32>) -> usize {
    let prefix = of.map_or_else(|| KEPT_PREFIX.to_owned(), |pid| format!("{KEPT_PREFIX}{pid}-"));
    let kept = |dir: &Path| -> Vec<PathBuf> {
        let paths = fs::read_dir(dir)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path());
        let named = |path: &PathBuf| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with(&prefix))
        };
        paths.filter(named).collect()
    };
    let dirs = kept(&std::env::temp_dir());
    for dir in &dirs {
        let recorded = fs::read_to_string(dir.join(PROCESSES)).unwrap_or_default();
        recorded.lines().for_each(end_recorded);
    }
    for dir in &dirs {
        remove_dir_with_mounts(dir);
    }
    let namespaces = kept(Path::new(NETNS_DIR));
    for path in &namespaces {
        let _ = umount2(path, MntFlags::MNT_DETACH);
        let _ = fs::remove_file(path);
    }
    let cgroups = cgroup::base().map(|base| kept(&base)).unwrap_or_default();
    for path in &cgroups {
        wait_until(PATIENCE, || fs::remove_dir(path).ok());
    }
    dirs.len() + namespaces.len() + cgroups.len()
}

/// Ends the process of one recorded line, unless its number belongs to another process by now.
fn end_recorded(line: &str) {
    let Some((pid, started)) = line.split_once(' ') else {
        return;
    };
    let Ok(pid) = pid.parse() else { return };
    if start_time(pid).as_deref() == Some(started) {
        let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
        wait_until(PATIENCE, || start_time(pid).is_none().then_some(()));
    }
}

/// Field 22 of `/proc/<pid>/stat`; `None` for a process that is gone or a zombie.
fn start_time(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the name in parentheses, which may hold anything.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    (fields.first() != Some(&"Z")).then(|| fields.get(19).map(|f| (*f).to_owned()))?
}

/// A name that nobody else on the machine uses. The first call of a process removes what dead ones left.
pub fn unique_name(label: &str) -> String {
    static SWEEP: Once = Once::new();
    static NEXT: AtomicU32 = AtomicU32::new(0);
    SWEEP.call_once(sweep);
    let prefix = if KEEP.load(Ordering::Relaxed) {
        KEPT_PREFIX
    } else {
        PREFIX
    };
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{prefix}{}-{number}-{label}", std::process::id())
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
    for place in cgroup_places() {
        for path in ours(&place).filter(|p| is_dead(p)) {
            let _ = remove_cgroup(&path);
        }
    }
}

/// What this process made and has not removed yet.
pub fn owned_by_this_process() -> Vec<PathBuf> {
    let places = [PathBuf::from(NETNS_DIR), std::env::temp_dir()];
    let all = places.into_iter().chain(cgroup_places()).flat_map(|dir| ours(&dir));
    all.filter(|path| pid_of(path) == Some(std::process::id())).collect()
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

/// Processes that run and own a folder with this label.
pub fn living_owners(label: &str) -> Vec<u32> {
    let folders = ours(&std::env::temp_dir()).filter(|path| !is_dead(path));
    let labelled = folders.filter(|path| path.to_string_lossy().contains(&format!("-{label}")));
    labelled.filter_map(|path| pid_of(&path)).collect()
}

/// Kind (`cgroup` or `cgroup2`) and place of every hierarchy that is mounted.
pub fn cgroup_mounts() -> Vec<(String, PathBuf)> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let hierarchies = fields.filter(|f| f.get(2).is_some_and(|kind| kind.starts_with("cgroup")));
    hierarchies.map(|f| (f[2].to_owned(), PathBuf::from(f[1]))).collect()
}

/// Removes a cgroup and those below it, which must be empty.
pub fn remove_cgroup(path: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(path)?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

/// Where cgroups are made: whole nodes at the root of each hierarchy, single agents below this process.
fn cgroup_places() -> Vec<PathBuf> {
    let mut places: Vec<_> = cgroup_mounts().into_iter().map(|(_, mount)| mount).collect();
    places.extend(cgroup::base());
    places.sort();
    places.dedup();
    places
}

fn ours(dir: &Path) -> impl Iterator<Item = PathBuf> + use<> {
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
