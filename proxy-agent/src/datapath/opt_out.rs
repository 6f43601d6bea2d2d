//! Pods whose sockets are left to the packet programs: finds their cgroups by their names and writes `SOCKET_OPT_OUT`. Called by
//! `Datapath`, which is told the pods' UIDs.
//!
//! The kubelet names a pod's cgroup `pod<uid>`, or with systemd `<slices above>-pod<uid, with _ for ->.slice`, and makes it before it
//! starts the first container. It may be below other slices than the usual ones, so the whole hierarchy is searched, except what is
//! inside of pods.
//!
//! What must stay true: until the pods are known, what a former agent wrote stands.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proxy_common::names;
use proxy_common::socket::{ANY_OPTED_OUT, CGROUP_LEVELS};

use super::MapStats;
use super::error::TableError;
use super::sync::SyncReport;
use super::tables::Hash;

/// Time between two searches for the cgroup of a pod that was named a moment ago: its containers start later than that.
const OFTEN: Duration = Duration::from_millis(50);
/// Time between two searches after that.
const SELDOM: Duration = Duration::from_secs(1);
/// What a moment is. Longer ones are said: the cgroups of pods may be in another hierarchy.
const MOMENT: Duration = Duration::from_secs(60);

/// See the module.
pub(super) struct OptOut {
    table: Hash<u64, u32>,
    /// The cgroup below which pods are.
    root: PathBuf,
    /// `None`: nobody has said.
    wanted: Option<BTreeSet<String>>,
    /// Where their cgroups are.
    found: BTreeMap<String, (PathBuf, u64)>,
    /// Since when the current ones are looked for, and whether it has been said that some are not found.
    since: Instant,
    is_said: bool,
}

impl OptOut {
    /// Of pods below the cgroup.
    pub(super) fn open(maps: &Path, root: PathBuf) -> Result<Self, TableError> {
        Ok(Self {
            table: Hash::open(maps, names::SOCKET_OPT_OUT, "fewer pods with the label")?,
            root,
            wanted: None,
            found: BTreeMap::new(),
            since: Instant::now(),
            is_said: false,
        })
    }

    /// Where no pod's sockets are translated: nothing is left of what a former agent wrote.
    pub(super) fn clear(maps: &Path) -> Result<(), TableError> {
        let mut table: Hash<u64, u32> = Hash::open(maps, names::SOCKET_OPT_OUT, "nothing")?;
        for (id, _) in table.all()? {
            table.remove(&id)?;
        }
        Ok(())
    }

    /// These pods, from now on.
    pub(super) fn set(&mut self, wanted: BTreeSet<String>, report: &mut SyncReport) {
        self.found.retain(|uid, _| wanted.contains(uid));
        if self.wanted.as_ref() != Some(&wanted) {
            (self.since, self.is_said) = (Instant::now(), false);
        }
        self.wanted = Some(wanted);
        self.look(report);
    }

    /// Looks for cgroups that are missing, and at those that were found.
    pub(super) fn look(&mut self, report: &mut SyncReport) {
        let Some(wanted) = &self.wanted else { return };
        self.found.retain(|_, (path, id)| id_of(path) == Some(*id));
        if wanted.iter().any(|uid| !self.found.contains_key(uid)) {
            search(&self.root, CGROUP_LEVELS, &mut |uid, path| {
                if wanted.contains(&uid)
                    && let Some(id) = id_of(&path)
                {
                    self.found.insert(uid, (path, id));
                }
            });
            self.complain();
        }
        if let Err(error) = self.write() {
            report.fail("pods that keep their sockets", error);
        }
    }

    /// When to look again for what is missing.
    pub(super) fn next(&self) -> Option<Duration> {
        let is_complete = self
            .wanted
            .as_ref()
            .is_none_or(|wanted| wanted.len() == self.found.len());
        if is_complete {
            None
        } else if self.since.elapsed() < MOMENT {
            Some(OFTEN)
        } else {
            Some(SELDOM)
        }
    }

    /// Pods whose cgroups are known.
    pub(super) fn stats(&self) -> MapStats {
        MapStats {
            name: names::SOCKET_OPT_OUT,
            entries: self.found.len() as u64,
            capacity: u64::from(self.table.capacity()),
        }
    }

    fn complain(&mut self) {
        let missing = self.wanted.iter().flatten().find(|uid| !self.found.contains_key(*uid));
        if let Some(uid) = missing
            && !self.is_said
            && self.since.elapsed() >= MOMENT
        {
            self.is_said = true;
            tracing::warn!(
                pod = uid,
                cgroup = %self.root.display(),
                remedy = "give with --cgroup the cgroup2 hierarchy that the kubelet uses",
                "no cgroup of a pod that keeps its sockets is found: they are translated"
            );
        }
    }

    fn write(&mut self) -> Result<(), TableError> {
        let mut ids: BTreeSet<u64> = self.found.values().map(|(_, id)| *id).collect();
        if !ids.is_empty() {
            ids.insert(ANY_OPTED_OUT);
        }
        let held: BTreeSet<u64> = self.table.all()?.into_iter().map(|(id, _)| id).collect();
        // Backwards, so that the entry for any comes last, and first when it goes.
        let new: Vec<u64> = ids.difference(&held).copied().collect();
        for id in new.iter().rev() {
            self.table.set(id, &1)?;
        }
        for id in held.difference(&ids) {
            self.table.remove(id)?;
        }
        Ok(())
    }
}

/// Calls back for every pod's cgroup below `dir`.
fn search(dir: &Path, levels: i32, found: &mut impl FnMut(String, PathBuf)) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        match entry.file_name().to_str().and_then(pod_of) {
            Some(uid) => found(uid, entry.path()),
            None if levels > 1 => search(&entry.path(), levels - 1, found),
            None => {}
        }
    }
}

/// The UID of the pod whose cgroup has this name.
fn pod_of(name: &str) -> Option<String> {
    let uid = match name.strip_suffix(".slice") {
        Some(slice) => slice.rsplit_once("-pod")?.1.replace('_', "-"),
        None => name.strip_prefix("pod")?.to_owned(),
    };
    let is_uid = uid.len() >= 32 && uid.bytes().all(|byte| byte == b'-' || byte.is_ascii_hexdigit());
    is_uid.then_some(uid)
}

/// Its id is its inode number, where those have 64 bits.
fn id_of(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().map(|meta| meta.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroups_of_pods_by_their_names() {
        let uid = "01234567-89ab-cdef-0123-456789abcdef";
        let underscores = uid.replace('-', "_");
        for name in [
            format!("pod{uid}"),
            format!("kubepods-pod{underscores}.slice"),
            format!("kubepods-besteffort-pod{underscores}.slice"),
            format!("kubelet-kubepods-burstable-pod{underscores}.slice"),
        ] {
            assert_eq!(pod_of(&name).as_deref(), Some(uid), "{name}");
        }
        // A static pod's is a hash.
        assert!(pod_of("pod0123456789abcdef0123456789abcdef").is_some());
        for name in [
            "kubepods",
            "kubepods.slice",
            "podman",
            "kubepods-podx.slice",
            "system.slice",
            "pod",
        ] {
            assert_eq!(pod_of(name), None, "{name}");
        }
    }
}
