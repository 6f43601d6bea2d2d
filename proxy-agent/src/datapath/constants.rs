//! The load-time constants of the programs that run now, read back from the kernel: a tool knows by them what a running agent was
//! told (`--masquerade-all`, how pods are detected). Nothing here changes anything.
//!
//! Where the read-only data lies is asked of the embedded object: a constant is where a patch would change it. So this only answers
//! for programs of the same layout, and says `None` otherwise.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::path::Path;

use aya::maps::{MapData, MapInfo};
use aya::programs::loaded_programs;
use proxy_common::addr::Addr4;
use proxy_common::{config, names};

use super::loader::{OBJECT, Pins};
use super::sys;

/// The constants that decide about connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Decisive {
    /// Pods are told by the interface they are behind.
    pub(crate) pods_by_link: bool,
    /// Every connection to a cluster IP is masqueraded.
    pub(crate) masquerade_all: bool,
}

/// The constants of the packet programs that use the maps of this directory.
pub(crate) fn decisive(bpf_dir: &Path) -> Option<Decisive> {
    let data = read_only_data(bpf_dir)?;
    let flag = |name| {
        let place = place(name, 4, data.len())?;
        let bytes: [u8; 4] = data.get(place..place + 4)?.try_into().ok()?;
        Some(u32::from_ne_bytes(bytes) != 0)
    };
    Some(Decisive {
        pods_by_link: flag(config::PODS_BY_LINK)?,
        masquerade_all: flag(config::MASQUERADE_ALL)?,
    })
}

/// The read-only data of the newest of these programs.
fn read_only_data(bpf_dir: &Path) -> Option<Vec<u8>> {
    let frontends = Pins::new(bpf_dir)
        .maps
        .join(names::for_family::<Addr4>(names::FRONTENDS));
    let ours = MapInfo::from_pin(frontends).ok()?.id();
    let maps = loaded_programs()
        .flatten()
        .filter(|program| program.name_as_str() == Some(names::TC_INGRESS))
        .filter_map(|program| Some((program.id(), program.map_ids().ok()??)))
        .filter(|(_, maps)| maps.contains(&ours))
        .max_by_key(|(id, _)| *id)?
        .1;
    let info = maps
        .into_iter()
        .filter_map(|id| MapInfo::from_id(id).ok())
        .find(|info| info.name_as_str().is_some_and(|name| name.ends_with(".rodata")))?;
    let map = MapData::from_id(info.id()).ok()?;
    sys::lookup_many(map.fd().as_fd(), &0, info.value_size() as usize).ok()
}

/// Where a constant of `size` bytes lies in read-only data of `length` bytes.
fn place(name: &str, size: usize, length: usize) -> Option<usize> {
    let patched = |byte: u8| {
        let mut object = aya_obj::Object::parse(OBJECT).ok()?;
        let bytes = vec![byte; size];
        let globals = HashMap::from([(name, (&bytes[..], true))]);
        object.patch_map_data(globals).ok()?;
        let (_, map) = object.maps.into_iter().find(|(name, _)| name.ends_with(".rodata"))?;
        Some(map.data().to_vec())
    };
    let (zeros, ones) = (patched(0)?, patched(0xff)?);
    if zeros.len() != length {
        return None;
    }
    zeros.iter().zip(&ones).position(|(zero, one)| zero != one)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_are_found_in_the_object() {
        let object = aya_obj::Object::parse(OBJECT).unwrap();
        let data = object
            .maps
            .iter()
            .find(|(name, _)| name.ends_with(".rodata"))
            .unwrap()
            .1;
        let length = data.data().len();
        let places = [config::PODS_BY_LINK, config::MASQUERADE_ALL].map(|name| place(name, 4, length).unwrap());
        assert_ne!(places[0], places[1]);
        assert_eq!(place("NO_SUCH_CONSTANT", 4, length), None);
        assert_eq!(place(config::PODS_BY_LINK, 4, length + 1), None, "another object");
    }
}
