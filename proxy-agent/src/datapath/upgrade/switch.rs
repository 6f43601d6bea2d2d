//! The change from one directory of maps to another, once the programs that use the new one are verified.
//!
//! New connections are held back from before the rewrite table is copied until every program is replaced, because an entry that is
//! written to the old table after the copy, or known to one of two programs only, would be a connection that breaks. Those that exist
//! have their entries in both and go on.

use std::fs;
use std::io;
use std::os::fd::AsFd;

use proxy_common::link::{LINK_NO_ETHERNET, Link};
use proxy_common::names;
use proxy_common::settings::{MODE_HOLD, MODE_SERVE};

use super::dirs::{State, Version, versions};
use super::{Former, Layouts, Treatment};
use crate::datapath::classic::{Classic, Filter};
use crate::datapath::cleanup::interfaces;
use crate::datapath::error::DatapathError;
use crate::datapath::links::{DIRECTIONS, interface_of, program_names, remove_pin};
use crate::datapath::loader::{Pins, Programs};
use crate::datapath::sys;
use crate::datapath::sys::raw::RawMap;
use crate::datapath::xdp;

/// The field of the settings that says whether connections are held back.
const MODE: &str = "mode";

impl Former {
    /// Copies what has to be copied, puts the programs in place of the old ones, and removes what is left of other versions. On failure
    /// the programs of the former agent go on with its maps.
    pub(in crate::datapath) fn take_over(self, programs: &Programs) -> Result<(), DatapathError> {
        let is_copied = |name: &&str| self.copied().any(|copied| copied == *name);
        let holds = names::REWRITES.iter().any(is_copied);
        if holds {
            set_mode(&self.source.pins, MODE_HOLD)?;
        }
        let result = self.copy().and_then(|()| self.replace());
        if let Err(error) = result {
            if holds && let Err(error) = set_mode(&self.source.pins, MODE_SERVE) {
                tracing::error!(%error, "new connections are held until an agent starts");
            }
            return Err(error);
        }
        clear_away(&self.target.pins, programs)?;
        if holds {
            set_mode(&self.target.pins, MODE_SERVE)?;
        }
        let name = self.source.name();
        tracing::info!(
            from = name,
            copied = self.copied().count(),
            "maps and links were taken over"
        );
        Ok(())
    }

    fn copied(&self) -> impl Iterator<Item = &'static str> {
        let copied =
            |(name, treatment): &(&'static str, Treatment)| matches!(treatment, Treatment::Copy(_)).then_some(*name);
        self.maps.iter().filter_map(copied)
    }

    fn copy(&self) -> Result<(), DatapathError> {
        for (name, treatment) in &self.maps {
            let copying = match treatment {
                Treatment::Keep => continue,
                Treatment::Empty(lost) => {
                    tracing::warn!(map = name, lost, "the map begins empty: its layout changed too much");
                    continue;
                }
                Treatment::Copy(copying) => copying,
            };
            let path = self.source.pins.maps.join(name);
            let copy = || {
                copying.run(
                    &RawMap::open(&path)?,
                    &RawMap::open(&self.building.pins.maps.join(name))?,
                )
            };
            let entries = copy().map_err(DatapathError::call("copying the pinned map", path.display()))?;
            tracing::debug!(map = name, entries, "copied");
        }
        Ok(())
    }

    /// From here on the new directory is what counts. In between the old one does: it is the only one that was retired.
    fn replace(&self) -> Result<(), DatapathError> {
        for other in others(&self.source)? {
            if other != self.building {
                give_links(&other, &self.source)?;
                other.remove()?;
            }
        }
        let retired = Version::new(&self.target.pins.base, self.source.number, State::Retired);
        rename(&self.source, &retired)?;
        rename(&self.building, &self.target).inspect_err(|_| {
            if let Err(error) = rename(&retired, &self.source) {
                tracing::error!(%error, "the maps stay under another name until an agent starts");
            }
        })
    }
}

fn rename(from: &Version, to: &Version) -> Result<(), DatapathError> {
    if from == to {
        return Ok(());
    }
    fs::rename(&from.pins.root, &to.pins.root).map_err(DatapathError::call("renaming", from.pins.root.display()))
}

/// All directories but this one.
fn others(version: &Version) -> Result<Vec<Version>, DatapathError> {
    let mut all = versions(&version.pins.base)?;
    all.retain(|other| other != version);
    Ok(all)
}

fn give_links(from: &Version, to: &Version) -> Result<usize, DatapathError> {
    let dir = &to.pins.links;
    fs::create_dir_all(dir).map_err(DatapathError::call("creating the directory", dir.display()))?;
    from.move_links(dir)
}

/// Takes over the links of all other versions, puts the programs into them, and removes what is left of these versions: also what a
/// start that ended halfway left, or an agent that runs no more.
pub(in crate::datapath) fn clear_away(own: &Pins, programs: &Programs) -> Result<(), DatapathError> {
    let own = Version {
        state: State::Complete,
        number: names::LAYOUT_VERSION,
        pins: own.clone(),
    };
    let mut links = 0;
    for other in others(&own)? {
        let taken = give_links(&other, &own)?;
        if taken == 0 && other.state != State::Retired {
            tracing::info!(version = other.name(), "removing what is left of another version");
        }
        links += taken;
    }
    if links > 0 {
        let replaced = replace_programs(&own.pins, programs).map_err(DatapathError::call(
            "replacing programs of another version",
            own.pins.links.display(),
        ))?;
        tracing::info!(links, replaced, "links of another version were taken over");
    }
    // Only now: until here what they run reads these maps, and a start that ended before goes on with the links.
    for other in others(&own)? {
        other.remove()?;
    }
    Ok(())
}

/// Puts the programs into all pinned links and into our classic filters, each in one step. What no link of this version is is detached,
/// and so is what a later step of the start would detach anyway: programs that are not loaded.
fn replace_programs(own: &Pins, programs: &Programs) -> io::Result<usize> {
    let links = RawMap::open(&own.maps.join(names::LINKS))?;
    let program = |ifindex: u32, egress: bool| {
        let link: Option<Link> = sys::lookup(links.fd(), &ifindex).ok()?;
        let all = program_names(link?.flags & LINK_NO_ETHERNET == 0);
        let chosen = DIRECTIONS.into_iter().zip(all).find(|((of, _), _)| *of == egress);
        let name = chosen.map(|(_, name)| name)?;
        Some((programs.get(name)?, name))
    };
    let mut replaced = 0;
    for pin in fs::read_dir(&own.links)? {
        let pin = pin?.path();
        let name = pin.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let wanted = match interface_of(&pin) {
            None if xdp::interface_of(&pin).is_some() => programs.get(names::XDP_FORWARD),
            Some(ifindex) => program(ifindex, name.ends_with("-egress")).map(|(program, _)| program),
            None => programs.get(name),
        };
        let Some(wanted) = wanted else {
            let removed = remove_pin(&pin)?;
            tracing::info!(link = name, removed, "a program of another version was removed");
            continue;
        };
        let link = sys::open_pin(&pin)?;
        match sys::update_link(link.as_fd(), wanted) {
            Ok(()) => replaced += 1,
            // Its interface or cgroup is gone; the rest of the start removes it or makes it anew.
            Err(error) => tracing::info!(link = name, %error, "the link is not attached any more"),
        }
    }
    let mut classic = Classic::open()?;
    for ifindex in interfaces()? {
        for (egress, _) in DIRECTIONS {
            let is_ours = classic.filters(ifindex, egress)?.iter().any(Filter::is_ours);
            if is_ours && let Some((program, name)) = program(ifindex, egress) {
                classic.attach(ifindex, egress, program, name)?;
                replaced += 1;
            }
        }
    }
    Ok(replaced)
}

/// Writes the mode into the settings of a directory. What has no such field holds nothing back.
fn set_mode(pins: &Pins, mode: u32) -> Result<(), DatapathError> {
    let layouts = Layouts::read(&pins.maps)?;
    for name in names::SETTINGS {
        let field = layouts
            .as_ref()
            .and_then(|layouts| layouts.0.get(name)?.value.field(MODE));
        let Some(field) = field else {
            tracing::warn!(
                map = name,
                "connections that begin now may break: nothing holds them back"
            );
            continue;
        };
        let path = pins.maps.join(name);
        let write = || {
            let map = RawMap::open(&path)?;
            let mut value = map.lookup(&[0; 4])?.unwrap_or_default();
            if field.set(&mut value, mode) {
                map.update(&[0; 4], &value)?;
            }
            io::Result::Ok(())
        };
        write().map_err(DatapathError::call("writing", path.display()))?;
    }
    // Programs that have read the former mode have finished.
    sys::synchronize();
    Ok(())
}
