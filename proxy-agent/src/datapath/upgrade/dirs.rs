//! The directories of layout versions in `--bpf-dir`: which there are, and moving links from one to another.
//!
//! `v<N>` is complete: its maps hold everything. `v<N>-old` was complete until another took its place; only its links may matter, but
//! if no directory is complete it is what was, and is again. `v<N>-new` is being made: without the agent that makes it, it is nothing.
//! A BPF file system knows no names with a dot.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::datapath::error::DatapathError;
use crate::datapath::links::remove_pin;
use crate::datapath::loader::Pins;

/// See the module.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum State {
    Building,
    Retired,
    Complete,
}

const SUFFIXES: [(State, &str); 3] = [
    (State::Building, "-new"),
    (State::Retired, "-old"),
    (State::Complete, ""),
];

/// A directory of a layout version.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Version {
    pub(crate) state: State,
    pub(crate) number: u32,
    pub(crate) pins: Pins,
}

impl Version {
    pub(crate) fn new(base: &Path, number: u32, state: State) -> Self {
        let suffix = SUFFIXES
            .into_iter()
            .find(|(of, _)| *of == state)
            .map_or("", |(_, suffix)| suffix);
        Self {
            state,
            number,
            pins: Pins::at(base, base.join(format!("v{number}{suffix}"))),
        }
    }

    pub(crate) fn name(&self) -> String {
        let name = self.pins.root.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// Is any map pinned here?
    pub(super) fn has_maps(&self) -> bool {
        fs::read_dir(&self.pins.maps).is_ok_and(|mut entries| entries.next().is_some())
    }

    /// Removes the pins of its maps and the directories; its links must have gone elsewhere.
    pub(super) fn remove(&self) -> Result<(), DatapathError> {
        for pin in children(&self.pins.maps)? {
            fs::remove_file(&pin).map_err(DatapathError::call("removing the pinned map", pin.display()))?;
        }
        for dir in [&self.pins.links, &self.pins.maps, &self.pins.root] {
            remove_dir(dir)?;
        }
        Ok(())
    }

    /// Takes over the links: from now on they are pinned in `to`, and what they run goes on running. One that has its counterpart
    /// there is detached. Gives how many there were.
    pub(super) fn move_links(&self, to: &Path) -> Result<usize, DatapathError> {
        let pins = children(&self.pins.links)?;
        for pin in &pins {
            let place = to.join(pin.file_name().unwrap_or_default());
            let moved = if place.exists() {
                remove_pin(pin).map(drop)
            } else {
                fs::rename(pin, &place)
            };
            moved.map_err(DatapathError::call("taking over the pinned link", pin.display()))?;
        }
        Ok(pins.len())
    }
}

/// What is there, in no particular order.
pub(crate) fn versions(base: &Path) -> Result<Vec<Version>, DatapathError> {
    let names = children(base)?;
    let names = names.iter().filter_map(|path| path.file_name()?.to_str());
    Ok(names.filter_map(|name| parse(base, name)).collect())
}

fn parse(base: &Path, name: &str) -> Option<Version> {
    let name = name.strip_prefix('v')?;
    SUFFIXES.into_iter().find_map(|(state, suffix)| {
        let number = name.strip_suffix(suffix)?;
        let plain = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        Some(Version::new(base, plain.then(|| number.parse().ok()).flatten()?, state))
    })
}

/// What is in a directory; nothing if it does not exist.
pub(crate) fn children(dir: &Path) -> Result<Vec<PathBuf>, DatapathError> {
    match fs::read_dir(dir) {
        Ok(entries) => Ok(entries.filter_map(Result::ok).map(|entry| entry.path()).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(DatapathError::call("listing", dir.display())(error)),
    }
}

pub(crate) fn remove_dir(dir: &Path) -> Result<(), DatapathError> {
    match fs::remove_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(DatapathError::call("removing the directory", dir.display())(error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_of_versions_are_told_from_others() {
        let base = Path::new("/x");
        for (name, expected) in [
            ("v1", Some((1, State::Complete))),
            ("v12-old", Some((12, State::Retired))),
            ("v3-new", Some((3, State::Building))),
            ("v", None),
            ("v+1", None),
            ("v1-other", None),
            ("maps", None),
        ] {
            let found = parse(base, name);
            assert_eq!(
                found.as_ref().map(|version| (version.number, version.state)),
                expected,
                "{name}"
            );
            assert!(found.is_none_or(|version| version.name() == name), "{name}");
        }
    }
}
