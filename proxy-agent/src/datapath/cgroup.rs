//! Attaches the socket programs to a cgroup by pinned links, each named like its program. On restart the program of a pinned link
//! is replaced in one step, so no socket call is missed.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use aya_obj::generated::bpf_attach_type;
use proxy_common::names;

use super::error::DatapathError;
use super::links::remove_pin;
use super::loader::{Programs, cgroup_id, repin};
use super::sync::SyncReport;
use super::sys::{self, LinkTarget};

/// The attached socket programs.
pub(super) struct Sockets {
    cgroup: File,
    id: u64,
    dir: std::path::PathBuf,
    links: Vec<(&'static str, OwnedFd)>,
}

impl Sockets {
    /// Attaches every socket program to the cgroup at `path`.
    pub(super) fn attach(path: &Path, dir: &Path, programs: &Programs) -> Result<Self, DatapathError> {
        let cgroup = File::open(path).map_err(DatapathError::call("opening", path.display()))?;
        let id = cgroup_id(&cgroup).map_err(DatapathError::call("stat", path.display()))?;
        let mut sockets = Self {
            cgroup,
            id,
            dir: dir.to_owned(),
            links: Vec::new(),
        };
        // Backwards: what makes a translated peer look right comes before what translates.
        for name in names::SOCKET_PROGRAMS.into_iter().rev() {
            let link = sockets
                .attach_one(name, programs)
                .map_err(DatapathError::call("attaching to the cgroup", name))?;
            sockets.links.push((name, link));
        }
        tracing::info!(cgroup = %path.display(), programs = sockets.links.len(), "socket programs attached");
        Ok(sockets)
    }

    /// Attached programs.
    pub(super) fn len(&self) -> usize {
        self.links.len()
    }

    /// Attaches again what somebody took away (S164).
    pub(super) fn repair(&mut self, programs: &Programs, report: &mut SyncReport) {
        let intact =
            |link: &OwnedFd| sys::link_target(link.as_fd()).is_ok_and(|target| target == LinkTarget::Cgroup(self.id));
        let lost: Vec<&'static str> = self
            .links
            .iter()
            .filter(|(_, link)| !intact(link))
            .map(|(name, _)| *name)
            .collect();
        for (name, link) in self.links.iter().filter(|(name, _)| !lost.contains(name)) {
            let pin = self.dir.join(name);
            if sys::open_pin(&pin).is_err()
                && let Err(error) = repin(link.as_fd(), &pin)
            {
                report.fail(pin.display(), error);
            }
        }
        for name in lost {
            tracing::warn!(program = name, "a socket program was taken away, attaching it again");
            match self.attach_one(name, programs) {
                Ok(link) => {
                    self.links.retain(|(held, _)| *held != name);
                    self.links.push((name, link));
                }
                Err(error) => report.fail(format!("socket program {name}"), error),
            }
        }
    }

    fn attach_one(&self, name: &str, programs: &Programs) -> io::Result<OwnedFd> {
        let program = programs
            .get(name)
            .ok_or_else(|| io::Error::other("the program is not loaded"))?;
        let pin = self.dir.join(name);
        if let Ok(link) = sys::open_pin(&pin)
            && sys::link_target(link.as_fd())? == LinkTarget::Cgroup(self.id)
        {
            sys::update_link(link.as_fd(), program)?;
            return Ok(link);
        }
        let link = sys::attach_cgroup(program, self.cgroup.as_fd(), attach_type(name)?)?;
        // Only now: a link to another cgroup, or one that was detached.
        remove_pin(&pin)?;
        sys::pin(link.as_fd(), &pin)?;
        Ok(link)
    }
}

/// Takes the socket programs of a former agent away.
pub(super) fn detach(dir: &Path) -> Result<usize, DatapathError> {
    let mut removed = 0;
    for name in names::SOCKET_PROGRAMS {
        let pin = dir.join(name);
        let was_there = remove_pin(&pin).map_err(DatapathError::call("removing the pinned link", pin.display()))?;
        removed += usize::from(was_there);
    }
    Ok(removed)
}

fn attach_type(name: &str) -> io::Result<bpf_attach_type> {
    Ok(match name {
        "connect4" => bpf_attach_type::BPF_CGROUP_INET4_CONNECT,
        "connect6" => bpf_attach_type::BPF_CGROUP_INET6_CONNECT,
        "sendmsg4" => bpf_attach_type::BPF_CGROUP_UDP4_SENDMSG,
        "sendmsg6" => bpf_attach_type::BPF_CGROUP_UDP6_SENDMSG,
        "recvmsg4" => bpf_attach_type::BPF_CGROUP_UDP4_RECVMSG,
        "recvmsg6" => bpf_attach_type::BPF_CGROUP_UDP6_RECVMSG,
        "getpeername4" => bpf_attach_type::BPF_CGROUP_INET4_GETPEERNAME,
        "getpeername6" => bpf_attach_type::BPF_CGROUP_INET6_GETPEERNAME,
        _ => return Err(io::Error::other("not a socket program")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_socket_program_has_a_hook() {
        for name in names::SOCKET_PROGRAMS {
            assert!(attach_type(name).is_ok(), "{name}");
        }
    }
}
