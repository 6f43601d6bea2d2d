//! Tables of legacy iptables, by its socket options. Read-only.
//!
//! What must stay true: a table is asked for only if the namespace has it, since asking makes it.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use ipnet::IpNet;
use socket2::{Domain, Protocol, Socket, Type};

use super::{Action, Chain, Rule, Table, address, number16, number32, text, xtables};

/// `IPT_SO_GET_INFO` and `IPT_SO_GET_ENTRIES`, which have the same numbers for IPv6.
const GET_INFO: libc::c_int = 64;
const GET_ENTRIES: libc::c_int = 65;
const TABLE_NAME: usize = 32;
/// `ipt_getinfo`: name, valid hooks, five entries, five underflows, number of entries, size.
const HOOKS: usize = TABLE_NAME + 4;
const INFO: usize = HOOKS + 5 * 4 + 5 * 4 + 4 + 4;
/// `ipt_get_entries` before the entries: name, size, padding to 8.
const ENTRIES: usize = TABLE_NAME + 8;
/// `xt_entry_match` and `xt_entry_target` before their data: size, name, revision.
const PART: usize = 32;
const PART_NAME: usize = 29;

/// Bits of `invflags`.
const NOT_SOURCE: u8 = 0x08;
const NOT_DESTINATION: u8 = 0x10;
const NOT_PROTOCOL: u8 = 0x40;
const NOT_OTHER: u8 = 0x27;

const HOOK_NAMES: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];

/// Where things are in `ipt_entry` and `ip6t_entry`.
struct Layout {
    address: usize,
    /// Interfaces, which follow four addresses: two names.
    interfaces: usize,
    protocol: usize,
    inverted: usize,
    /// `target_offset`, with `next_offset` behind it.
    offsets: usize,
    parts: usize,
}

const V4: Layout = Layout {
    address: 4,
    interfaces: 16,
    protocol: 80,
    inverted: 83,
    offsets: 88,
    parts: 112,
};
const V6: Layout = Layout {
    address: 16,
    interfaces: 64,
    protocol: 128,
    inverted: 132,
    offsets: 140,
    parts: 168,
};

/// What the kernel gives of a table.
struct Blob {
    hooks: Vec<(usize, &'static str)>,
    entries: Vec<u8>,
}

/// A table, `None` if this network namespace has none of this name. `names` is `ip_tables_names` of /proc/net.
pub(crate) fn table(is_v4: bool, name: &str, names: &str) -> io::Result<Option<Table>> {
    if !names.lines().any(|known| known == name) {
        return Ok(None);
    }
    let blob = read(is_v4, name)?;
    let chains = parse(is_v4, &blob).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    Ok(Some(Table {
        is_v4,
        name: name.to_owned(),
        chains,
    }))
}

/// The names of the legacy tables that this network namespace has.
pub(crate) fn names(is_v4: bool) -> String {
    let file = if is_v4 { "ip_tables_names" } else { "ip6_tables_names" };
    std::fs::read_to_string(format!("/proc/self/net/{file}")).unwrap_or_default()
}

fn read(is_v4: bool, name: &str) -> io::Result<Blob> {
    let (domain, level) = if is_v4 {
        (Domain::IPV4, libc::IPPROTO_IP)
    } else {
        (Domain::IPV6, libc::IPPROTO_IPV6)
    };
    let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
    let named = |length: usize| {
        let mut bytes = vec![0u8; length];
        for (byte, letter) in bytes.iter_mut().zip(name.bytes().take(TABLE_NAME - 1)) {
            *byte = letter;
        }
        bytes
    };
    let mut info = named(INFO);
    option(&socket, level, GET_INFO, &mut info)?;
    let size = number32(&info, INFO - 4).unwrap_or_default();
    let valid = number32(&info, TABLE_NAME).unwrap_or_default();
    let hooks = HOOK_NAMES
        .into_iter()
        .enumerate()
        .filter(|(hook, _)| valid & 1 << hook != 0);
    let hooks = hooks.filter_map(|(hook, name)| Some((number32(&info, HOOKS + hook * 4)? as usize, name)));
    let hooks = hooks.collect();
    let mut entries = named(ENTRIES + size as usize);
    entries[TABLE_NAME..TABLE_NAME + 4].copy_from_slice(&size.to_ne_bytes());
    option(&socket, level, GET_ENTRIES, &mut entries)?;
    entries.drain(..ENTRIES);
    Ok(Blob { hooks, entries })
}

fn option(socket: &Socket, level: libc::c_int, name: libc::c_int, value: &mut [u8]) -> io::Result<()> {
    let mut length = value.len() as libc::socklen_t;
    // SAFETY: the buffer lives through the call and has the length that is given.
    let result = unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &mut length) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Where an entry leads.
enum Target {
    Begins(String),
    Jump(usize),
    Action(Action),
}

fn parse(is_v4: bool, blob: &Blob) -> Option<BTreeMap<String, Chain>> {
    let mut chains: BTreeMap<String, Chain> = BTreeMap::new();
    // Jumps say where a chain's first rule is.
    let mut starts: HashMap<usize, String> = HashMap::new();
    let mut jumps: Vec<(String, usize, usize)> = Vec::new();
    let mut current = String::new();
    let mut at = 0;
    while at < blob.entries.len() {
        if let Some((_, hook)) = blob.hooks.iter().find(|(start, _)| *start == at) {
            current = (*hook).to_owned();
            let chain = chains.entry(current.clone()).or_default();
            chain.is_base = true;
        }
        let entry = blob.entries.get(at..)?;
        let (mut rule, target, length) = entry_of(is_v4, entry)?;
        match target {
            // The table ends with one, too.
            Target::Begins(name) if name == "ERROR" => {}
            Target::Begins(name) => {
                starts.insert(at + length, name.clone());
                chains.entry(name.clone()).or_default();
                current = name;
            }
            target => {
                let rules = &mut chains.entry(current.clone()).or_default().rules;
                match target {
                    Target::Action(action) => rule.action = action,
                    Target::Jump(start) => jumps.push((current.clone(), rules.len(), start)),
                    Target::Begins(_) => {}
                }
                rules.push(rule);
            }
        }
        at += length;
    }
    for (chain, index, start) in jumps {
        let rule = chains.get_mut(&chain)?.rules.get_mut(index)?;
        // A jump to the next rule is one that does nothing.
        if let Some(name) = starts.get(&start) {
            rule.action = Action::Chains(vec![name.clone()]);
        }
    }
    Some(chains)
}

/// An entry: its conditions, what it does, and its length.
fn entry_of(is_v4: bool, entry: &[u8]) -> Option<(Rule, Target, usize)> {
    let layout = if is_v4 { &V4 } else { &V6 };
    let target = usize::from(number16(entry, layout.offsets)?);
    let next = usize::from(number16(entry, layout.offsets + 2)?);
    if next <= target || target < layout.parts {
        return None;
    }
    let mut rule = Rule::default();
    conditions(&mut rule, is_v4, layout, entry)?;
    let mut at = layout.parts;
    while at < target {
        let (name, _, info, length) = part(entry.get(at..target)?)?;
        xtables::matched(&mut rule, &name, info);
        at += length;
    }
    let (name, revision, info, _) = part(entry.get(target..next)?)?;
    let target = match name.as_str() {
        "ERROR" => Target::Begins(text(info)),
        "" => standard(number32(info, 0)? as i32),
        name => Target::Action(xtables::target(name, u32::from(revision), info, is_v4)),
    };
    Some((rule, target, next))
}

fn conditions(rule: &mut Rule, is_v4: bool, layout: &Layout, entry: &[u8]) -> Option<()> {
    let address_at = |index: usize| address(entry.get(index * layout.address..)?, is_v4);
    let prefix = |address: IpAddr, mask: IpAddr| IpNet::with_netmask(address, mask).ok();
    let inverted = *entry.get(layout.inverted)?;
    let source = prefix(address_at(0)?, address_at(2)?);
    rule.by_source = source.is_none_or(|source| source.prefix_len() != 0) || inverted & NOT_SOURCE != 0;
    let destination = prefix(address_at(1)?, address_at(3)?);
    rule.destination = destination.filter(|prefix| prefix.prefix_len() != 0 && inverted & NOT_DESTINATION == 0);
    let protocol = *entry.get(layout.protocol)?;
    rule.protocol = Some(protocol).filter(|number| *number != 0);
    let names = entry.get(layout.interfaces..layout.interfaces + 32)?;
    rule.conditional = destination.is_none()
        || inverted & (NOT_DESTINATION | NOT_PROTOCOL | NOT_OTHER) != 0
        || names.iter().any(|letter| *letter != 0);
    Some(())
}

/// A match or target: name, revision, data, length.
fn part(bytes: &[u8]) -> Option<(String, u8, &[u8], usize)> {
    let length = usize::from(number16(bytes, 0)?);
    let name = text(bytes.get(2..2 + PART_NAME)?);
    let revision = *bytes.get(2 + PART_NAME)?;
    if length < PART {
        return None;
    }
    Some((name, revision, bytes.get(PART..length)?, length))
}

fn standard(verdict: i32) -> Target {
    // -NF_DROP - 1
    const DROP: i32 = -1;
    match verdict {
        DROP => Target::Action(Action::Drop),
        start if start >= 0 => Target::Jump(start as usize),
        _ => Target::Action(Action::Accept),
    }
}
