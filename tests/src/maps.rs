//! What the kernel holds for a frontend, read from an agent's pinned maps: how a test knows that a change has arrived.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use aya::maps::{Array, HashMap, Map, MapData};
use proxy_common::addr::{Addr4, Addr6, Address, Port, Protocol};
use proxy_common::backend::Backend;
use proxy_common::clock::ticks_of_seconds;
use proxy_common::frontend::{Frontend, FrontendKey, Origin, Range};
use proxy_common::names;
use proxy_common::rewrite::{Rewrite, RewriteKey};
use proxy_common::socket::ANY_OPTED_OUT;

use crate::process;
use crate::programs::Plain;

/// The backends that new connections to a frontend choose from, sorted; `None` if nobody serves it.
pub fn backends(bpf_dir: &Path, vip: SocketAddr, protocol: Protocol) -> Result<Option<Vec<SocketAddr>>> {
    match vip.ip() {
        IpAddr::V4(ip) => read(bpf_dir, Addr4::from(ip), vip.port(), protocol),
        IpAddr::V6(ip) => read(bpf_dir, Addr6::from(ip), vip.port(), protocol),
    }
}

/// The session-affinity timeout of a frontend in seconds, 0 for none; `None` if nobody serves it.
pub fn affinity_seconds(bpf_dir: &Path, vip: SocketAddr, protocol: Protocol) -> Result<Option<u32>> {
    let (port, protocol) = (Port::new(vip.port()), protocol.number());
    let seconds = |found: Option<Frontend>| found.map(|frontend| frontend.affinity_seconds);
    match vip.ip() {
        IpAddr::V4(ip) => frontend(bpf_dir, FrontendKey::new(Addr4::from(ip), port, protocol)).map(seconds),
        IpAddr::V6(ip) => frontend(bpf_dir, FrontendKey::new(Addr6::from(ip), port, protocol)).map(seconds),
    }
}

fn read<A: Address>(bpf_dir: &Path, addr: A, port: u16, protocol: Protocol) -> Result<Option<Vec<SocketAddr>>> {
    let Some(frontend) = frontend(bpf_dir, FrontendKey::new(addr, Port::new(port), protocol.number()))? else {
        return Ok(None);
    };
    let map = Map::Array(open(bpf_dir, names::for_family::<A>(names::BACKENDS))?);
    let slots: Array<MapData, Plain<Backend<A>>> = map.try_into()?;
    let range = frontend.range(Origin::External);
    let mut found = Vec::new();
    for index in range.first..range.first + range.count {
        let backend = slots.get(&index, 0)?.0;
        found.push(SocketAddr::new(backend.addr.into(), backend.port.get()));
    }
    found.sort_unstable();
    Ok(Some(found))
}

fn frontend<A: Address>(bpf_dir: &Path, key: FrontendKey<A>) -> Result<Option<Frontend>> {
    let map = Map::HashMap(open(bpf_dir, names::for_family::<A>(names::FRONTENDS))?);
    let frontends: HashMap<MapData, Plain<FrontendKey<A>>, Plain<Frontend>> = map.try_into()?;
    match frontends.get(&Plain(key), 0) {
        Ok(frontend) => Ok(Some(frontend.0)),
        Err(aya::maps::MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error).context("reading a frontend"),
    }
}

/// The frontends of IPv4, open to be asked often.
pub struct Frontends4(HashMap<MapData, Plain<FrontendKey<Addr4>>, Plain<Frontend>>);

impl Frontends4 {
    /// Opens the map of an agent.
    pub fn open(bpf_dir: &Path) -> Result<Self> {
        Ok(Self(Map::HashMap(open(bpf_dir, names::FRONTENDS[0])?).try_into()?))
    }

    /// A TCP frontend.
    pub fn get(&self, address: Ipv4Addr, port: u16) -> Result<Option<Frontend>> {
        let key = FrontendKey::new(Addr4::from(address), Port::new(port), Protocol::Tcp.number());
        match self.0.get(&Plain(key), 0) {
            Ok(frontend) => Ok(Some(frontend.0)),
            Err(aya::maps::MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).context("reading a frontend"),
        }
    }

    /// How many frontends lead somewhere, and to how many endpoints in all.
    pub fn held(&self) -> Result<(usize, usize)> {
        let mut held = (0, 0);
        for entry in self.0.iter() {
            let (_, frontend) = entry?;
            if frontend.0.cluster.count > 0 {
                held = (held.0 + 1, held.1 + frontend.0.cluster.count as usize);
            }
        }
        Ok(held)
    }
}

/// Removes a frontend behind the agent's back; false if there was none.
pub fn remove_frontend(bpf_dir: &Path, vip: SocketAddr, protocol: Protocol) -> Result<bool> {
    match vip.ip() {
        IpAddr::V4(ip) => remove(bpf_dir, Addr4::from(ip), vip.port(), protocol),
        IpAddr::V6(ip) => remove(bpf_dir, Addr6::from(ip), vip.port(), protocol),
    }
}

fn remove<A: Address>(bpf_dir: &Path, addr: A, port: u16, protocol: Protocol) -> Result<bool> {
    let map = Map::HashMap(open(bpf_dir, names::for_family::<A>(names::FRONTENDS))?);
    let mut frontends: HashMap<MapData, Plain<FrontendKey<A>>, Plain<Frontend>> = map.try_into()?;
    let key = FrontendKey::new(addr, Port::new(port), protocol.number());
    match frontends.remove(&Plain(key)) {
        Ok(()) => Ok(true),
        Err(aya::maps::MapError::KeyNotFound) => Ok(false),
        Err(error) => Err(error).context("removing a frontend"),
    }
}

/// Points a frontend outside of the backend table, behind the agent's back; an error if there is none.
pub fn misdirect_frontend(bpf_dir: &Path, vip: SocketAddr, protocol: Protocol) -> Result<()> {
    match vip.ip() {
        IpAddr::V4(ip) => misdirect(bpf_dir, Addr4::from(ip), vip.port(), protocol),
        IpAddr::V6(ip) => misdirect(bpf_dir, Addr6::from(ip), vip.port(), protocol),
    }
}

fn misdirect<A: Address>(bpf_dir: &Path, addr: A, port: u16, protocol: Protocol) -> Result<()> {
    let map = Map::HashMap(open(bpf_dir, names::for_family::<A>(names::FRONTENDS))?);
    let mut frontends: HashMap<MapData, Plain<FrontendKey<A>>, Plain<Frontend>> = map.try_into()?;
    let key = Plain(FrontendKey::new(addr, Port::new(port), protocol.number()));
    let mut frontend = frontends.get(&key, 0)?;
    frontend.0.cluster = Range {
        first: u32::MAX - 1,
        count: 1,
        keep: 0,
    };
    Ok(frontends.insert(key, frontend, 0)?)
}

/// Entries of a pinned map as the kernel lists them, and how many it has room for. Not for arrays, which are always full.
pub fn occupancy(bpf_dir: &Path, name: &str) -> Result<(usize, u32)> {
    let map = open(bpf_dir, name)?;
    let room = map.info()?.max_entries();
    let entries = match name {
        "REWRITES4" => rewrites::<Addr4>(map)?,
        "REWRITES6" => rewrites::<Addr6>(map)?,
        _ => {
            let path = pins(bpf_dir).join(name);
            let dump = process::run(
                Command::new("bpftool")
                    .args(["--json", "map", "dump", "pinned"])
                    .arg(path),
            )?;
            serde_json::from_str::<Vec<serde_json::Value>>(&dump)?.len()
        }
    };
    Ok((entries, room))
}

fn rewrites<A: Address>(map: MapData) -> Result<usize> {
    let rewrites: HashMap<MapData, Plain<RewriteKey<A>>, Plain<Rewrite<A>>> = Map::LruHashMap(map).try_into()?;
    Ok(rewrites.keys().filter(Result::is_ok).count())
}

/// Makes every connection of a node look as if its last packet was longer ago, but not before the machine's start.
pub fn age_connections(bpf_dir: &Path, seconds: u64) -> Result<()> {
    age::<Addr4>(bpf_dir, seconds)?;
    age::<Addr6>(bpf_dir, seconds)
}

fn age<A: Address>(bpf_dir: &Path, seconds: u64) -> Result<()> {
    let map = Map::LruHashMap(open(bpf_dir, names::for_family::<A>(names::REWRITES))?);
    let mut rewrites: HashMap<MapData, Plain<RewriteKey<A>>, Plain<Rewrite<A>>> = map.try_into()?;
    let keys: Vec<_> = rewrites.keys().collect::<Result<_, _>>()?;
    for key in keys {
        let mut rewrite = rewrites.get(&key, 0)?;
        rewrite.0.last_seen = rewrite.0.last_seen.saturating_sub(ticks_of_seconds(seconds));
        rewrites.insert(key, rewrite, 0)?;
    }
    Ok(())
}

/// Cgroups of pods whose sockets are left alone, sorted; without the entry for any.
pub fn opted_out(bpf_dir: &Path) -> Result<Vec<u64>> {
    let map: HashMap<_, u64, u32> = HashMap::try_from(Map::HashMap(open(bpf_dir, names::SOCKET_OPT_OUT)?))?;
    let mut ids: Vec<u64> = map.keys().collect::<Result<_, _>>()?;
    ids.sort_unstable();
    if ids.first() == Some(&ANY_OPTED_OUT) {
        ids.remove(0);
    } else {
        anyhow::ensure!(ids.is_empty(), "{ids:?} without the entry for any");
    }
    Ok(ids)
}

/// The folder of the pinned maps.
pub fn pins(bpf_dir: &Path) -> PathBuf {
    bpf_dir.join(format!("v{}/maps", names::LAYOUT_VERSION))
}

fn open(bpf_dir: &Path, name: &str) -> Result<MapData> {
    let path = pins(bpf_dir).join(name);
    MapData::from_pin(&path).with_context(|| format!("opening pinned map {}", path.display()))
}
