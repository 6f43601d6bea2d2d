//! Attaches the XDP program to the network cards that the options name. Called by [`super::links`], which says in `LINKS` where it
//! is: packets are sent out only of interfaces that have it.
//!
//! Links are pinned as `<ifindex>-xdp`, and on restart the program of a pinned link is replaced in one step. An interface has room for
//! one XDP program: somebody else's is left alone. Without the program an interface is served by tc, so what does not work here is
//! told, and is no reason to stop.

#[cfg(test)]
mod kernel_tests;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use proxy_common::names;

use super::links::remove_pin;
use super::loader::{Programs, repin};
use super::options::{XdpMode, XdpOptions};
use super::sync::SyncReport;
use super::sys::{self, LinkTarget};
use crate::netlink::{LinkInfo, Network};

/// What the name of a pin ends with.
const SUFFIX: &str = "-xdp";

/// The program on interfaces.
pub(super) struct Xdp {
    options: XdpOptions,
    dir: PathBuf,
    attached: BTreeMap<u32, Attached>,
    /// Interfaces that should have the program and have not, and why.
    refused: BTreeMap<u32, Refusal>,
}

struct Attached {
    pin: PathBuf,
    link: OwnedFd,
    /// The program is this agent's: not that of the agent which left the link.
    is_ours: bool,
}

/// Why an interface does not get the program.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Refusal {
    /// Somebody else's program is there.
    Taken,
    /// The driver has no XDP.
    NoDriver,
    /// Another error of the system call.
    Failed(i32),
}

impl Refusal {
    fn of(error: &io::Error) -> Self {
        match error.raw_os_error() {
            // The second one: in the other mode.
            Some(libc::EBUSY | libc::EEXIST) => Self::Taken,
            Some(libc::EOPNOTSUPP) => Self::NoDriver,
            other => Self::Failed(other.unwrap_or_default()),
        }
    }

    fn reason(self) -> String {
        match self {
            Self::Taken => "it has somebody else's XDP program".to_owned(),
            Self::NoDriver => "its driver has no XDP".to_owned(),
            Self::Failed(errno) => format!("its driver refuses: {}", io::Error::from_raw_os_error(errno)),
        }
    }

    fn remedy(self) -> &'static str {
        match self {
            Self::Taken => "remove the other program, or leave the interface out of --xdp-interfaces",
            Self::NoDriver => {
                "leave the interface out of --xdp-interfaces; --xdp-mode generic works everywhere, but is hardly faster than tc"
            }
            Self::Failed(_) => {
                "see the kernel's log; many drivers need an MTU below 3,500 and receive offloads (LRO) off"
            }
        }
    }
}

impl Xdp {
    /// Takes over what is pinned.
    pub(super) fn open(options: XdpOptions, dir: &Path) -> Self {
        let pins = fs::read_dir(dir).into_iter().flatten().flatten();
        let attached = pins
            .filter_map(|pin| {
                let pin = pin.path();
                let ifindex = interface_of(&pin)?;
                let link = sys::open_pin(&pin).ok().filter(|link| is_at(link, ifindex))?;
                let is_ours = false;
                Some((ifindex, Attached { pin, link, is_ours }))
            })
            .collect();
        Self {
            options,
            dir: dir.to_owned(),
            attached,
            refused: BTreeMap::new(),
        }
    }

    pub(super) fn options(&self) -> &XdpOptions {
        &self.options
    }

    /// Interfaces that have the program, and where in them.
    pub(super) fn attached(&self) -> (usize, &'static str) {
        (self.attached.len(), self.options.mode.name())
    }

    /// Has the interface the program, and is it to keep it?
    pub(super) fn carries(&self, ifindex: u32, info: &LinkInfo) -> bool {
        self.attached.contains_key(&ifindex) && self.options.accepts(info)
    }

    /// Attaches to the interfaces that are to have the program and do not.
    pub(super) fn attach<'n>(
        &mut self,
        links: impl Iterator<Item = (&'n u32, &'n LinkInfo)>,
        programs: &Programs,
        report: &mut SyncReport,
    ) {
        for (ifindex, info) in links {
            if !self.options.accepts(info) {
                continue;
            }
            // Nothing changes a driver, and it was said.
            if self.options.mode == XdpMode::Auto && self.refused.get(ifindex) == Some(&Refusal::NoDriver) {
                continue;
            }
            if let Err(error) = self.attach_one(*ifindex, info, programs)
                && error.raw_os_error() != Some(libc::ENODEV)
            {
                self.refuse(*ifindex, info, &error, report);
            }
        }
    }

    fn attach_one(&mut self, ifindex: u32, info: &LinkInfo, programs: &Programs) -> io::Result<()> {
        let known = self.attached.get(&ifindex);
        if known.is_some_and(|known| known.is_ours && is_at(&known.link, ifindex)) {
            return Ok(());
        }
        let program = programs
            .get(names::XDP_FORWARD)
            .ok_or_else(|| io::Error::other("the XDP program is not loaded"))?;
        let pin = pin(&self.dir, ifindex);
        let generic = self.options.mode == XdpMode::Generic;
        let is_elsewhere = info.xdp.is_some_and(|found| found.generic != generic);
        let link = match self.attached.remove(&ifindex) {
            Some(former) if is_at(&former.link, ifindex) && !is_elsewhere => {
                sys::update_link(former.link.as_fd(), program)?;
                former.link
            }
            _ => self.make(&pin, ifindex, program, generic)?,
        };
        self.refused.remove(&ifindex);
        let is_ours = true;
        self.attached.insert(ifindex, Attached { pin, link, is_ours });
        tracing::info!(
            ifindex,
            interface = info.name,
            mode = self.options.mode.name(),
            "XDP program attached"
        );
        Ok(())
    }

    fn make(&self, pin: &Path, ifindex: u32, program: BorrowedFd<'_>, generic: bool) -> io::Result<OwnedFd> {
        // Of another interface that had this index, detached, or in the other place.
        remove_pin(pin)?;
        let link = sys::attach_xdp(program, ifindex, generic)?;
        if let Err(error) = sys::pin(link.as_fd(), pin) {
            // As long as this agent runs it works without, and the repair tries again.
            tracing::warn!(pin = %pin.display(), %error, "the XDP link is not pinned");
        }
        Ok(link)
    }

    /// Says once why an interface has to do with tc.
    fn refuse(&mut self, ifindex: u32, info: &LinkInfo, error: &io::Error, report: &mut SyncReport) {
        let refusal = Refusal::of(error);
        let is_new = self.refused.insert(ifindex, refusal) != Some(refusal);
        if self.options.mode != XdpMode::Auto && refusal != Refusal::Taken {
            report.fail(format!("XDP on interface {} ({ifindex})", info.name), refusal.reason());
        } else if is_new {
            tracing::warn!(
                ifindex,
                interface = info.name,
                remedy = refusal.remedy(),
                "no XDP here, tc forwards alone: {}",
                refusal.reason()
            );
        }
    }

    /// Takes the program off interfaces that are not to have it, and forgets those that are gone.
    pub(super) fn detach(&mut self, network: &Network, report: &mut SyncReport) {
        let wanted = |ifindex: &u32| {
            network
                .links
                .get(ifindex)
                .is_some_and(|info| self.options.accepts(info))
        };
        let pins = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        for pin in pins.map(|pin| pin.path()) {
            if interface_of(&pin).is_some_and(|ifindex| !wanted(&ifindex))
                && let Err(error) = remove_pin(&pin)
            {
                report.fail(pin.display(), error);
            }
        }
        self.attached.retain(|ifindex, _| wanted(ifindex));
        self.refused.retain(|ifindex, _| wanted(ifindex));
    }

    /// Forgets links that somebody took away, and pins again what lost its pin. Is there something to attach?
    pub(super) fn find_lost(&mut self, report: &mut SyncReport) -> bool {
        let before = self.attached.len();
        self.attached.retain(|ifindex, attached| {
            let is_there = is_at(&attached.link, *ifindex);
            if !is_there {
                tracing::warn!(ifindex, "the XDP program was taken away, attaching it again");
                return false;
            }
            if sys::open_pin(&attached.pin).is_err()
                && let Err(error) = repin(attached.link.as_fd(), &attached.pin)
            {
                report.fail(attached.pin.display(), error);
            }
            true
        });
        self.attached.len() < before || self.refused.values().any(|refusal| *refusal != Refusal::NoDriver)
    }
}

fn is_at(link: &OwnedFd, ifindex: u32) -> bool {
    sys::link_target(link.as_fd()).is_ok_and(|target| target == LinkTarget::Interface(ifindex))
}

/// Where the link of an interface is pinned.
pub(super) fn pin(dir: &Path, ifindex: u32) -> PathBuf {
    dir.join(format!("{ifindex}{SUFFIX}"))
}

/// The interface index in the name of a pinned XDP link.
pub(super) fn interface_of(pin: &Path) -> Option<u32> {
    pin.file_name()?.to_str()?.strip_suffix(SUFFIX)?.parse().ok()
}
