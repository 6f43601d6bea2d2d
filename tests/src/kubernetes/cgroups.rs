//! A node's cgroup in every hierarchy that is mounted: what runs on the node is below it, so that its limits are its own, and the
//! agent's socket programs see this node's processes only.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::leftovers::{self, unique_name};
use crate::process;

/// How long the kernel may take to let go of ended processes.
const PATIENCE: Duration = Duration::from_secs(10);

/// Removed when dropped; its processes have to be gone by then.
pub(crate) struct Cgroups {
    name: String,
    /// Its directory in each hierarchy.
    dirs: Vec<PathBuf>,
    unified: PathBuf,
}

impl Cgroups {
    pub(crate) fn new(label: &str) -> Result<Self> {
        let name = unique_name(label);
        let mut cgroups = Self {
            unified: PathBuf::new(),
            dirs: Vec::new(),
            name,
        };
        for (kind, mount) in leftovers::cgroup_mounts() {
            let dir = mount.join(&cgroups.name);
            fs::create_dir(&dir).with_context(|| format!("making cgroup {} (this needs root)", dir.display()))?;
            // A cpuset of the first version starts empty, and nothing may run in it.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if kind == "cgroup" && mount.join(file).is_file() {
                    fs::copy(mount.join(file), dir.join(file))
                        .with_context(|| format!("{file} of {}", dir.display()))?;
                }
            }
            if kind == "cgroup2" {
                cgroups.unified.clone_from(&dir);
            }
            cgroups.dirs.push(dir);
        }
        if cgroups.unified.as_os_str().is_empty() {
            bail!("no cgroup2 hierarchy is mounted: mount one with `mount -t cgroup2 none /sys/fs/cgroup`");
        }
        Ok(cgroups)
    }

    /// Its path below the root of every hierarchy, as the kubelet wants it.
    pub(crate) fn root(&self) -> String {
        format!("/{}", self.name)
    }

    /// Its directory in the cgroup2 hierarchy.
    pub(crate) fn unified(&self) -> &Path {
        &self.unified
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        for dir in &self.dirs {
            process::wait_until(PATIENCE, || leftovers::remove_cgroup(dir).ok());
        }
    }
}

/// Makes `child` in a node's cgroup, and gives what a process does between fork and exec to enter it.
pub(crate) fn entrance(cgroup: &Path, child: &str) -> io::Result<impl FnMut() -> io::Result<()> + Send + Sync + use<>> {
    let dir = cgroup.join(child);
    fs::create_dir_all(&dir)?;
    let mut processes = File::options().write(true).open(dir.join("cgroup.procs"))?;
    // 0 is the writer, whatever its number is in its own PID namespace.
    Ok(move || processes.write_all(b"0"))
}
