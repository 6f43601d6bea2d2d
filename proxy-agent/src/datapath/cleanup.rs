//! Leaves the node as it was found: programs off interfaces and cgroup, pins and directories away. Works without a running agent
//! and without the object; refuses while an agent runs.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use super::classic::Classic;
use super::drain;
use super::error::DatapathError;
use super::links::remove_pin;
use super::loader::{self, Pins};
use super::upgrade::{children, remove_dir, versions};

/// What was removed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CleanupReport {
    /// Pinned links: programs on interfaces (tcx) and on the cgroup.
    pub links: usize,
    /// Classic filters.
    pub filters: usize,
    /// Pinned maps.
    pub maps: usize,
    /// Connections that were still translated at the end of [`cleanup`]'s patience.
    pub interrupted: usize,
    /// Connections whose source ports another proxy may have chosen too while they ran: netfilter's table had no room for them.
    pub unclaimed: usize,
}

/// Removes everything an agent with this directory left. Nothing there is success. With a time to drain, connections that are
/// translated may go on that long until they end, while new ones are left to another proxy.
pub fn cleanup(bpf_dir: &Path, drain: Option<Duration>) -> Result<CleanupReport, DatapathError> {
    let mut report = CleanupReport::default();
    let lock = if bpf_dir.exists() {
        Some(loader::lock(bpf_dir)?)
    } else {
        None
    };
    let pins = Pins::new(bpf_dir);
    if let Some(timeout) = drain.filter(|_| drain::is_possible(&pins)) {
        // Maps of another layout version are not drained: nobody knows their entries.
        let drained = drain::drain(&pins, timeout)?;
        (report.interrupted, report.unclaimed) = (drained.running, drained.unclaimed);
    }
    report.filters = remove_filters().map_err(DatapathError::call("removing filters", "the interfaces"))?;
    // Other layout versions are ours as well, earlier ones and later ones: they differ in what maps hold, not in where they are.
    for version in versions(bpf_dir)? {
        let pins = version.pins;
        for pin in children(&pins.links)? {
            remove_pin(&pin).map_err(DatapathError::call("removing the pinned link", pin.display()))?;
            report.links += 1;
        }
        for pin in children(&pins.maps)? {
            fs::remove_file(&pin).map_err(DatapathError::call("removing the pinned map", pin.display()))?;
            report.maps += 1;
        }
        for dir in [&pins.links, &pins.maps, &pins.root] {
            remove_dir(dir)?;
        }
    }
    drop(lock);
    // The directory may be the file system's root, or hold what is not ours.
    let _kept = fs::remove_dir(bpf_dir);
    Ok(report)
}

/// Our classic filters on every interface of this network namespace.
fn remove_filters() -> io::Result<usize> {
    let mut classic = Classic::open()?;
    let mut removed = 0;
    for ifindex in interfaces()? {
        let mut here = 0;
        for egress in [true, false] {
            here += usize::from(classic.detach(ifindex, egress)?);
        }
        if here > 0 {
            classic.remove_empty_qdisc(ifindex)?;
        }
        removed += here;
    }
    Ok(removed)
}

/// Indices of this network namespace's interfaces.
pub(super) fn interfaces() -> io::Result<Vec<u32>> {
    // SAFETY: the list is freed below, and read only in between; an entry with index 0 ends it.
    unsafe {
        let list = libc::if_nameindex();
        if list.is_null() {
            return Err(io::Error::last_os_error());
        }
        let mut indices = Vec::new();
        let mut entry = list;
        while (*entry).if_index != 0 {
            indices.push((*entry).if_index);
            entry = entry.add(1);
        }
        libc::if_freenameindex(list);
        Ok(indices)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_there_is_success() {
        assert_eq!(
            cleanup(Path::new("/tmp/no-such-directory"), Some(Duration::ZERO)).unwrap(),
            CleanupReport::default()
        );
    }
}
