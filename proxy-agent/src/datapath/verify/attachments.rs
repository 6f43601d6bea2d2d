//! Are the programs where they should be: on every interface that is to have them, at XDP, on the cgroup, and working on these maps?

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use aya::maps::MapInfo;
use aya::programs::loaded_programs;
use proxy_common::names;

use super::super::classic::{Classic, Filter};
use super::super::error::DatapathError;
use super::super::links::{DIRECTIONS, has_tcx, interface_of, program_names};
use super::super::loader::{Pins, cgroup_id, pinned_maps};
use super::super::options::{AttachMode, Options, SocketLb, XdpMode};
use super::super::probe;
use super::super::sys::{self, LinkTarget};
use super::super::xdp;
use super::Difference;
use crate::netlink::{LinkInfo, Network};

/// Loaded programs by id: name, and whether they use the pinned maps.
type Loaded = HashMap<u32, (String, bool)>;

/// What is not attached as it should be.
pub(super) fn look(options: &Options, pins: &Pins, network: &Network) -> Result<Vec<Difference>, DatapathError> {
    let loaded = loaded(pins)?;
    let mut found = Vec::new();
    let tcx = match options.attach {
        AttachMode::Auto => has_tcx(),
        AttachMode::Tcx => true,
        AttachMode::Classic => false,
    };
    let wanted = |ifindex: &u32| {
        let info = network.links.get(ifindex)?;
        (!info.loopback && options.interfaces.accepts(&info.name)).then_some(info)
    };
    let mut classic = Classic::open().map_err(DatapathError::call("opening", "an rtnetlink socket"))?;
    for ifindex in network.links.keys() {
        let Some(info) = wanted(ifindex) else { continue };
        for ((egress, direction), program) in DIRECTIONS.into_iter().zip(program_names(info.has_ethernet)) {
            let object = format!("{program} on {} ({direction})", info.name);
            let state = if tcx {
                let pin = pins.links.join(format!("{ifindex}-{direction}"));
                pinned(&pin, program, LinkTarget::Interface(*ifindex), &loaded)
            } else {
                let filters = classic.filters(*ifindex, egress);
                let filters = filters.map_err(DatapathError::call("listing the filters of", &info.name))?;
                filter(&filters, program, &loaded)
            };
            found.extend(complaint(object, state));
        }
    }
    for entry in fs::read_dir(&pins.links).map_err(DatapathError::call("reading", pins.links.display()))? {
        let path = entry
            .map_err(DatapathError::call("reading", pins.links.display()))?
            .path();
        if tcx && interface_of(&path).is_some_and(|ifindex| wanted(&ifindex).is_none()) {
            let object = format!("pinned link {}", path.display());
            found.extend(complaint(
                object,
                Some(("extra", "of an interface that is gone or excluded".to_owned())),
            ));
        }
    }
    found.extend(xdp(options, pins, network, &loaded)?);
    found.extend(sockets(options, pins, &loaded)?);
    Ok(found)
}

/// An interface without the program is a difference only where the option insists on it: the agent has said why it is so.
fn xdp(options: &Options, pins: &Pins, network: &Network, loaded: &Loaded) -> Result<Vec<Difference>, DatapathError> {
    let program = names::XDP_FORWARD;
    let is_wanted = |info: &LinkInfo| options.interfaces.accepts_link(info) && options.xdp.accepts(info);
    let mut found = Vec::new();
    for (ifindex, info) in network.links.iter().filter(|(_, info)| is_wanted(info)) {
        let pin = xdp::pin(&pins.links, *ifindex);
        if options.xdp.mode == XdpMode::Auto && !pin.exists() {
            continue;
        }
        let state = pinned(&pin, program, LinkTarget::Interface(*ifindex), loaded);
        found.extend(complaint(format!("{program} on {} (xdp)", info.name), state));
    }
    for entry in fs::read_dir(&pins.links).map_err(DatapathError::call("reading", pins.links.display()))? {
        let path = entry
            .map_err(DatapathError::call("reading", pins.links.display()))?
            .path();
        if xdp::interface_of(&path).is_some_and(|ifindex| !network.links.get(&ifindex).is_some_and(is_wanted)) {
            let object = format!("pinned link {}", path.display());
            let held = "of an interface that is gone or not to have XDP".to_owned();
            found.extend(complaint(object, Some(("extra", held))));
        }
    }
    Ok(found)
}

fn sockets(options: &Options, pins: &Pins, loaded: &Loaded) -> Result<Vec<Difference>, DatapathError> {
    let is_wanted = options.socket_lb != SocketLb::Off;
    let target = if is_wanted {
        let cgroup = probe::cgroup(options.cgroup.as_deref())?;
        let file = File::open(&cgroup).map_err(DatapathError::call("opening", cgroup.display()))?;
        let id = cgroup_id(&file).map_err(DatapathError::call("stat", cgroup.display()))?;
        LinkTarget::Cgroup(id)
    } else {
        LinkTarget::Other
    };
    let state = |name: &str| {
        let pin = pins.links.join(name);
        match (is_wanted, pin.exists()) {
            (true, _) => pinned(&pin, name, target, loaded),
            (false, true) => Some(("extra", "--socket-lb is off".to_owned())),
            (false, false) => None,
        }
    };
    let all = names::SOCKET_PROGRAMS.into_iter();
    Ok(all
        .filter_map(|name| complaint(format!("{name} on the cgroup"), state(name)))
        .collect())
}

fn complaint(object: String, state: Option<(&'static str, String)>) -> Option<Difference> {
    state.map(|(problem, held)| Difference {
        kind: "program",
        object,
        problem,
        held,
        wanted: if problem == "extra" {
            String::new()
        } else {
            "attached, on the pinned maps".to_owned()
        },
    })
}

/// What is wrong with a pinned link.
fn pinned(pin: &Path, program: &str, target: LinkTarget, loaded: &Loaded) -> Option<(&'static str, String)> {
    let link = match sys::open_pin(pin) {
        Ok(link) => link,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Some(("missing", String::new())),
        Err(error) => return Some(("different", error.to_string())),
    };
    match (sys::link_target(link.as_fd()), sys::link_program(link.as_fd())) {
        (Ok(at), _) if at != target => Some(("missing", format!("the pinned link is attached to {at:?}"))),
        (Ok(_), Ok(id)) => wrong_program(id, program, loaded),
        (Err(error), _) | (_, Err(error)) => Some(("different", error.to_string())),
    }
}

/// What is wrong with the filters of a direction.
fn filter(filters: &[Filter], program: &str, loaded: &Loaded) -> Option<(&'static str, String)> {
    match filters.iter().find(|filter| filter.is_ours()) {
        None => Some(("missing", String::new())),
        Some(filter) => wrong_program(filter.program(), program, loaded),
    }
}

fn wrong_program(id: u32, wanted: &str, loaded: &Loaded) -> Option<(&'static str, String)> {
    match loaded.get(&id) {
        Some((name, true)) if name == wanted => None,
        Some((name, true)) => Some(("different", format!("program {name}"))),
        Some((name, false)) => Some(("different", format!("program {name} of other maps"))),
        None => Some(("different", format!("program {id}, which is gone"))),
    }
}

fn loaded(pins: &Pins) -> Result<Loaded, DatapathError> {
    // Every program uses some of them.
    let mut ours = HashSet::new();
    for path in pinned_maps().map(|name| pins.maps.join(name)) {
        let info = MapInfo::from_pin(&path);
        let info = info.map_err(|error| DatapathError::call("reading", path.display())(io::Error::other(error)))?;
        ours.insert(info.id());
    }
    let mut loaded = Loaded::new();
    for program in loaded_programs() {
        // One that went away while we looked is no error.
        let Ok(program) = program else { continue };
        let maps = program.map_ids().ok().flatten().unwrap_or_default();
        let name = program.name_as_str().unwrap_or_default().to_owned();
        loaded.insert(program.id(), (name, maps.iter().any(|map| ours.contains(map))));
    }
    Ok(loaded)
}
