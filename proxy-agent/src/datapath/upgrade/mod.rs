//! What a start makes of the maps and programs that another version left, an older one or a newer one. See `docs/architecture.md`,
//! "Upgrades". Called by `loader` before anything is made ([`find`]), and by `Datapath::open` once the programs are verified
//! ([`Former::take_over`]).
//!
//! What must stay true: what cannot be taken over is refused before anything is changed; whatever ends the agent, the next start goes on
//! from what is there: at any time at most one directory is complete, and the links are pinned in one of those there are.

mod copy;
mod dirs;
#[cfg(test)]
mod kernel_tests;
mod layout;
mod switch;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use aya_obj::{Map, Object};
use proxy_common::names;
use serde::{Deserialize, Serialize};

use self::copy::{Copying, Walk};
pub(crate) use self::dirs::{State, Version, versions};
pub(super) use self::dirs::{children, remove_dir};
use self::layout::{Layout, Mismatch, Types};
pub(super) use self::switch::clear_away;
use super::error::DatapathError;
use super::loader::pinned_maps;
use super::sys;
use super::sys::raw::RawMap;

/// Maps that begin empty if they cannot be copied, and what is lost by that.
const MAY_BE_EMPTY: [(&str, &str); 8] = [
    (
        names::SOCKETS[0],
        "sockets in use: the kernel lists no socket's storage; getpeername shows them the endpoint",
    ),
    (
        names::SOCKETS[1],
        "sockets in use: the kernel lists no socket's storage; getpeername shows them the endpoint",
    ),
    (names::FRAGMENTS[0], "fragmented packets that are under way"),
    (names::FRAGMENTS[1], "fragmented packets that are under way"),
    (names::AFFINITY[0], "which client was served by which endpoint"),
    (names::AFFINITY[1], "which client was served by which endpoint"),
    (names::REASONS, "counts, which begin at zero"),
    (names::COUNTERS, "counts, which begin at zero"),
];

/// What the keys and values of all maps consist of: the value of [`names::LAYOUTS`], in JSON. The kernel knows it as well, but tells
/// only those who have CAP_SYS_ADMIN.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Layouts(BTreeMap<String, KeyValue>);

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct KeyValue {
    key: Layout,
    value: Layout,
}

impl Layouts {
    /// Those of this agent's own object.
    pub(super) fn of_object(object: &Object) -> Result<Self, DatapathError> {
        let incomplete = || DatapathError::Incomplete("types of its maps (BTF)".to_owned());
        let btf = object.btf.as_ref().ok_or_else(incomplete)?;
        let types = Types::parse(&btf.to_bytes()).ok_or_else(incomplete)?;
        let layout = |name: &str| {
            let Some(Map::Btf(map)) = object.maps.get(name) else {
                return None;
            };
            Some(KeyValue {
                key: types.layout(map.def.btf_key_type_id)?,
                value: types.layout(map.def.btf_value_type_id)?,
            })
        };
        pinned_maps()
            .map(|name| Ok((name.to_owned(), layout(name).ok_or_else(incomplete)?)))
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Those that whoever made the maps in the directory left with them.
    fn read(maps: &Path) -> Result<Option<Self>, DatapathError> {
        let path = maps.join(names::LAYOUTS);
        let read = || {
            let Some(text) = RawMap::open(&path)?.lookup(&[0; 4])? else {
                return Ok(None);
            };
            serde_json::from_slice(&text).map(Some).map_err(io::Error::other)
        };
        match read() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            result => result.map_err(DatapathError::call("reading", path.display())),
        }
    }

    /// Leaves them with the maps in the directory.
    pub(super) fn write(&self, maps: &Path) -> Result<(), DatapathError> {
        if Self::read(maps)?.as_ref() == Some(self) {
            return Ok(());
        }
        let path = maps.join(names::LAYOUTS);
        let write = || {
            let text = serde_json::to_vec(self)?;
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            sys::pin(RawMap::new_value(names::LAYOUTS, &text)?.fd(), &path)
        };
        write().map_err(DatapathError::call("pinning", path.display()))
    }
}

/// What becomes of a map.
enum Treatment {
    /// It is the same map.
    Keep,
    /// A new one, into which its entries are copied.
    Copy(Copying),
    /// A new one.
    Empty(&'static str),
}

/// Maps that are to be taken over, none of them touched yet.
pub(super) struct Former {
    /// Where they are.
    source: Version,
    /// Where the new ones are made, to take that place later.
    pub(super) building: Version,
    target: Version,
    maps: Vec<(&'static str, Treatment)>,
}

/// Looks for maps that have to be taken over. `None`: those in this version's own directory are this version's, or there are none.
pub(super) fn find(bpf_dir: &Path, object: &Object, layouts: &Layouts) -> Result<Option<Former>, DatapathError> {
    let version = |state| Version::new(bpf_dir, names::LAYOUT_VERSION, state);
    let target = version(State::Complete);
    let source = if target.has_maps() {
        target.clone()
    } else {
        let all = versions(bpf_dir)?;
        let usable = all
            .into_iter()
            .filter(|version| version.state != State::Building && version.has_maps());
        // Where none is complete, a change of versions ended halfway: the retired one is what the programs use.
        match usable.max_by_key(|version| (version.state, version.number)) {
            Some(source) => source,
            None => return Ok(None),
        }
    };
    let found = Layouts::read(&source.pins.maps)?;
    if found.is_none() && source.number != target.number {
        return Err(DatapathError::Undescribed(source.pins.root));
    }
    let mut maps = Vec::new();
    for name in pinned_maps() {
        let path = source.pins.maps.join(name);
        if path.exists() {
            let treatment = treat(name, &path, object, found.as_ref(), layouts)?;
            maps.push((name, treatment));
        }
    }
    let all_kept = maps.iter().all(|(_, treatment)| matches!(treatment, Treatment::Keep));
    if all_kept && source == target {
        return Ok(None);
    }
    Ok(Some(Former {
        source,
        building: version(State::Building),
        target,
        maps,
    }))
}

fn treat(
    name: &'static str,
    path: &Path,
    object: &Object,
    found: Option<&Layouts>,
    wanted: &Layouts,
) -> Result<Treatment, DatapathError> {
    let pinned = RawMap::open(path).map_err(DatapathError::call("opening the pinned map", path.display()))?;
    let declared = object
        .maps
        .get(name)
        .ok_or_else(|| DatapathError::Incomplete(format!("map {name}")))?;
    let found_shape = Shape {
        kind: pinned.kind(),
        key: pinned.key_size() as u32,
        value: pinned.value_size() as u32,
        flags: pinned.flags(),
    };
    let wanted_shape = Shape {
        kind: declared.map_type(),
        key: declared.key_size(),
        value: declared.value_size(),
        flags: declared.map_flags(),
    };
    let other_shape = || DatapathError::Shape {
        path: path.to_owned(),
        found: found_shape.to_string(),
        wanted: wanted_shape.to_string(),
    };
    let of = |layouts: &Layouts| layouts.0.get(name).map(|both| [both.key.clone(), both.value.clone()]);
    let (found, wanted) = (found.and_then(of), of(wanted));
    let (Some(found), Some(wanted)) = (found, wanted) else {
        // Made by a build that did not leave word; what it has in common with this one is the version.
        return if found_shape == wanted_shape {
            Ok(Treatment::Keep)
        } else {
            Err(other_shape())
        };
    };
    if found == wanted && found_shape == wanted_shape {
        return Ok(Treatment::Keep);
    }
    let [[old_key, old_value], [new_key, new_value]] = [&found, &wanted];
    let moves = || {
        let walk = Walk::of(found_shape.kind);
        if walk.is_none() || walk != Walk::of(wanted_shape.kind) {
            return Err(Mismatch {
                field: String::new(),
                what: "another kind",
            });
        }
        Ok(Copying {
            key: old_key.key_to(new_key)?,
            value: old_value.value_to(new_value)?,
            capacity: pinned.max_entries(),
        })
    };
    // Somebody else's map under this name would be read as if it were ours.
    let is_described = pinned.key_size() == old_key.end() && pinned.value_size() == old_value.end();
    let empty = MAY_BE_EMPTY.into_iter().find(|(map, _)| *map == name);
    match (moves(), empty) {
        _ if !is_described => Err(other_shape()),
        (Ok(copying), _) => Ok(Treatment::Copy(copying)),
        (Err(_), Some((_, lost))) => Ok(Treatment::Empty(lost)),
        (Err(mismatch), None) if mismatch.field.is_empty() => Err(other_shape()),
        (Err(Mismatch { field, what }), None) => Err(DatapathError::Layout {
            path: path.to_owned(),
            field,
            what,
        }),
    }
}

impl Former {
    /// Makes the directory and pins the maps that stay into it; the loader makes the others.
    pub(super) fn begin(&self, layouts: &Layouts) -> Result<(), DatapathError> {
        self.building.remove()?;
        let pins = &self.building.pins;
        for dir in [&pins.maps, &pins.links] {
            fs::create_dir_all(dir).map_err(DatapathError::call("creating the directory", dir.display()))?;
        }
        layouts.write(&pins.maps)?;
        for (name, treatment) in &self.maps {
            if let Treatment::Keep = treatment {
                let (from, to) = (self.source.pins.maps.join(name), pins.maps.join(name));
                sys::open_pin(&from)
                    .and_then(|map| sys::pin(map.as_fd(), &to))
                    .map_err(DatapathError::call("pinning", to.display()))?;
            }
        }
        Ok(())
    }

    /// Without the change: removes what was made for it.
    pub(super) fn abandon(&self) -> Result<(), DatapathError> {
        self.building.remove()
    }

    /// The entries a new map must have room for.
    pub(super) fn capacity(&self, name: &str) -> Option<u32> {
        self.maps.iter().find_map(|(map, treatment)| match treatment {
            Treatment::Copy(copying) if *map == name => Some(copying.capacity),
            _ => None,
        })
    }
}

/// What two maps must have in common to be used for one another.
#[derive(PartialEq, Eq)]
struct Shape {
    kind: u32,
    key: u32,
    value: u32,
    flags: u32,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kind,
            key,
            value,
            flags,
        } = self;
        write!(f, "type {kind}, key {key} B, value {value} B, flags {flags:#x}")
    }
}
