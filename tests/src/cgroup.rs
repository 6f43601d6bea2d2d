//! A cgroup per node, so that the socket programs of one simulated node see that node's processes only.
//!
//! The cgroup is *threaded*: single threads of the test move in and out, so host clients are closures like all others.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::leftovers::unique_name;

/// A child cgroup; removed when dropped.
pub struct Cgroup {
    path: PathBuf,
    keep: bool,
}

/// The cgroup2 directory this process is in: where a child may be made whose threads come from this process.
pub fn base() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("reading /proc/self/mounts")?;
    let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let Some(mount) = fields
        .find(|f| f.get(2) == Some(&"cgroup2"))
        .and_then(|f| f.get(1).copied())
    else {
        bail!("no cgroup2 hierarchy is mounted: mount one with `mount -t cgroup2 none /sys/fs/cgroup`");
    };
    let own = fs::read_to_string("/proc/self/cgroup").context("reading /proc/self/cgroup")?;
    let own = own
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .unwrap_or_default();
    Ok(Path::new(mount).join(own))
}

impl Cgroup {
    /// A new cgroup below the one this process is in.
    pub fn new(label: &str) -> Result<Self> {
        Self::inside(&base()?, &unique_name(label))
    }

    /// A new cgroup of this name inside of another one.
    pub fn inside(parent: &Path, name: &str) -> Result<Self> {
        let path = parent.join(name);
        fs::create_dir(&path).with_context(|| format!("making cgroup {} (this needs root)", path.display()))?;
        let cgroup = Self { path, keep: false };
        cgroup.write("cgroup.type", "threaded")?;
        Ok(cgroup)
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves the cgroup standing when the guard is dropped.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// Moves the calling thread into the cgroup; sockets it opens from now on belong to it. For a thread that ends soon: an
    /// occupied cgroup cannot be removed.
    pub fn enter(&self) -> Result<()> {
        self.entrance()()
    }

    /// [`Cgroup::enter`] for a thread that outlives the borrow.
    pub fn entrance(&self) -> impl FnOnce() -> Result<()> + Send + 'static {
        let path = self.path.join("cgroup.threads");
        move || {
            let thread = nix::unistd::gettid().as_raw();
            fs::write(&path, thread.to_string()).with_context(|| format!("entering cgroup {}", path.display()))
        }
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        let path = self.path.join(file);
        fs::write(&path, value).with_context(|| format!("writing {value} to {}", path.display()))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if !self.keep {
            // The kernel lets go of an ended thread a moment later.
            let removed = || fs::remove_dir(&self.path).ok();
            crate::process::wait_until(std::time::Duration::from_secs(2), removed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_enters_and_the_cgroup_goes_with_its_guard() {
        let cgroup = Cgroup::new("unit").unwrap();
        let path = cgroup.path().to_owned();
        let inside = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                cgroup.enter().unwrap();
                fs::read_to_string("/proc/thread-self/cgroup").unwrap()
            });
            thread.join().unwrap()
        });
        assert!(inside.contains(path.file_name().unwrap().to_str().unwrap()), "{inside}");
        drop(cgroup);
        assert!(!path.exists());
    }
}
