//! What the agent's code would have written, against what the kernel holds, in words.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};

use proxy_common::addr::{Addr4, Addr6, Address, Protocol};
use proxy_common::backend::Backend;
use proxy_common::frontend::{
    FRONTEND_CLUSTER_IP, FRONTEND_HAS_ENDPOINTS, FRONTEND_LOCAL, FRONTEND_SOURCE_RANGES, FRONTEND_UNDEFINED, Frontend,
    FrontendKey,
};
use proxy_common::link::{Link, NODE_ADDR_NODE_PORTS, NODE_ADDR_SOCKETS, NodeAddr};
use proxy_common::settings::{Prefix, Settings};

use super::super::error::TableError;
use super::super::sync::name_of;
use super::super::tables::{BpfTables, FamilyTables, HasFamily, Tables};
use super::Difference;
use super::dry::{DryFamily, DryTables};

/// Service ports by id, of the kernel and of what would have been written.
type Names = BTreeMap<u32, String>;

/// Appends what differs in the maps.
pub(super) fn differences(tables: &DryTables, found: &mut Vec<Difference>) -> Result<(), TableError> {
    let mut names = Names::new();
    let held = Tables::services(tables)?;
    for (id, info) in held.iter().map(|(id, info)| (id, info)).chain(&tables.services) {
        names.insert(
            *id,
            name_of(info).map_or_else(|| format!("#{id}"), |name| name.to_string()),
        );
    }
    for id in tables.services.keys() {
        let object = names.get(id).cloned().unwrap_or_default();
        found.push(difference("service", object, None, Some(format!("id {id}"))));
    }
    let held: HashMap<u32, Link> = Tables::links(tables)?.into_iter().collect();
    for (ifindex, wanted) in &tables.links {
        let held = held.get(ifindex).map(show_link);
        found.push(difference(
            "interface",
            format!("index {ifindex}"),
            held,
            wanted.as_ref().map(show_link),
        ));
    }
    family::<Addr4>(tables, &names, found)?;
    family::<Addr6>(tables, &names, found)
}

/// What is held on neither side is no difference; what is held on one is missing or extra.
fn difference(kind: &'static str, object: String, held: Option<String>, wanted: Option<String>) -> Difference {
    Difference {
        kind,
        object,
        problem: match (&held, &wanted) {
            (None, _) => "missing",
            (_, None) => "extra",
            _ => "different",
        },
        held: held.unwrap_or_default(),
        wanted: wanted.unwrap_or_default(),
    }
}

fn family<A: Address>(tables: &DryTables, names: &Names, found: &mut Vec<Difference>) -> Result<(), TableError>
where
    DryTables: HasFamily<A, Family = DryFamily<A>> + FamilyTables<A>,
    BpfTables: FamilyTables<A>,
{
    let dry = HasFamily::<A>::family(tables);
    let held: HashMap<FrontendKey<A>, Frontend> = FamilyTables::<A>::frontends(tables)?.into_iter().collect();
    for (key, wanted) in &dry.frontends {
        frontend(tables, names, key, (held.get(key), wanted.as_ref()), found)?;
    }
    for (key, is_wanted) in &dry.source_ranges {
        let service = name(names, u32::from_ne_bytes(key.service));
        let prefix = format!("{}/{}", key.addr, key.prefix_len.saturating_sub(32));
        let row = Some(prefix.clone());
        let (held, wanted) = if *is_wanted { (None, row) } else { (row, None) };
        found.push(difference("sourceRange", format!("{service} {prefix}"), held, wanted));
    }
    let addrs: HashMap<A, NodeAddr> = FamilyTables::<A>::node_addrs(tables)?.into_iter().collect();
    for (addr, wanted) in &dry.node_addrs {
        let held = addrs.get(addr).map(show_node_addr);
        found.push(difference(
            "nodeAddress",
            addr.to_string(),
            held,
            wanted.as_ref().map(show_node_addr),
        ));
    }
    if let Some(wanted) = &dry.settings {
        settings(&FamilyTables::<A>::settings(tables)?, wanted, found);
    }
    Ok(())
}

/// A frontend and, if it is there and should be, the endpoints behind it.
fn frontend<A: Address>(
    tables: &DryTables,
    names: &Names,
    key: &FrontendKey<A>,
    (held, wanted): (Option<&Frontend>, Option<&Frontend>),
    found: &mut Vec<Difference>,
) -> Result<(), TableError>
where
    DryTables: HasFamily<A, Family = DryFamily<A>>,
    BpfTables: FamilyTables<A>,
{
    let Some(service) = wanted.or(held).map(|frontend| name(names, frontend.service)) else {
        return Ok(());
    };
    let texts = [held, wanted].map(|row| row.map(|row| format!("{} {}", name(names, row.service), show_frontend(row))));
    if texts[0] != texts[1] {
        let [held, wanted] = texts;
        let object = format!("{service} {}", show_key(key));
        found.push(difference("frontend", object, held, wanted));
    }
    let (Some(held), Some(wanted)) = (held, wanted) else {
        return Ok(());
    };
    for (set, held, wanted) in [
        ("cluster", held.cluster, wanted.cluster),
        ("local", held.local, wanted.local),
    ] {
        let parts = tables
            .endpoints::<A>(held, false)?
            .into_iter()
            .zip(tables.endpoints::<A>(wanted, true)?);
        for (part, (held, wanted)) in ["", ", kept for running flows"].into_iter().zip(parts) {
            let [held, wanted] = [held, wanted].map(|list| list.into_iter().map(show_backend).collect::<BTreeSet<_>>());
            let object = |endpoint| format!("{service} {set} set {endpoint}{part}");
            let missing = wanted
                .difference(&held)
                .map(|one| difference("backend", object(one), None, Some(one.clone())));
            found.extend(missing);
            let extra = held
                .difference(&wanted)
                .map(|one| difference("backend", object(one), Some(one.clone()), None));
            found.extend(extra);
        }
    }
    Ok(())
}

fn settings<A: Address>(held: &Settings<A>, wanted: &Settings<A>, found: &mut Vec<Difference>) {
    let family = A::FAMILY;
    let networks = |settings: &Settings<A>| {
        settings
            .networks
            .iter()
            .filter_map(show_prefix)
            .collect::<Vec<_>>()
            .join(",")
    };
    let mut one = |what: &str, held: String, wanted: String| {
        if held != wanted {
            found.push(difference(
                "settings",
                format!("{what}, IPv{family}"),
                Some(held),
                Some(wanted),
            ));
        }
    };
    let pods = |settings: &Settings<A>| show_prefix(&settings.pods).unwrap_or_default();
    one("pods", pods(held), pods(wanted));
    one("service networks", networks(held), networks(wanted));
    // A running agent's range of node ports never shrinks.
    let [first, last] = wanted.node_ports;
    if first.get() != 0 && !(held.may_be_node_port(first) && held.may_be_node_port(last)) {
        let ports = |settings: &Settings<A>| format!("{}-{}", settings.node_ports[0], settings.node_ports[1]);
        one("node ports", ports(held), ports(wanted));
    }
}

fn name(names: &Names, id: u32) -> String {
    names.get(&id).cloned().unwrap_or_else(|| format!("#{id}"))
}

fn show_prefix<A: Address>(prefix: &Prefix<A>) -> Option<String> {
    let bits: u32 = prefix.mask.octets().iter().map(|octet| octet.count_ones()).sum();
    (prefix.set != 0).then(|| format!("{}/{bits}", prefix.addr))
}

fn show_key<A: Address>(key: &FrontendKey<A>) -> String {
    let socket = SocketAddr::new(key.addr.into(), key.port.get());
    match Protocol::from_number(key.protocol) {
        Some(protocol) if key.addr == A::zeroed() => format!("node port {}/{protocol}, IPv{}", key.port, A::FAMILY),
        Some(protocol) => format!("{socket}/{protocol}"),
        None => format!("undefined ports of {}", key.addr),
    }
}

fn show_frontend(frontend: &Frontend) -> String {
    let names = [
        (FRONTEND_CLUSTER_IP, "cluster-ip"),
        (FRONTEND_LOCAL, "local"),
        (FRONTEND_HAS_ENDPOINTS, "has-endpoints"),
        (FRONTEND_SOURCE_RANGES, "source-ranges"),
        (FRONTEND_UNDEFINED, "undefined"),
    ];
    let flags: Vec<&str> = names
        .iter()
        .filter(|(flag, _)| frontend.flags & flag != 0)
        .map(|(_, name)| *name)
        .collect();
    format!("[{}] affinity {}s", flags.join(" "), frontend.affinity_seconds)
}

fn show_backend<A: Address>(backend: Backend<A>) -> String {
    SocketAddr::new(backend.addr.into(), backend.port.get()).to_string()
}

fn show_node_addr(addr: &NodeAddr) -> String {
    let serves = match addr.flags & (NODE_ADDR_NODE_PORTS | NODE_ADDR_SOCKETS) {
        0 => "no node ports",
        NODE_ADDR_SOCKETS => "node ports for its own sockets",
        _ => "node ports",
    };
    format!("{serves}, interface {}", addr.ifindex)
}

fn show_link(link: &Link) -> String {
    let (v4, v6): (IpAddr, IpAddr) = (link.addr4.into(), link.addr6.into());
    let mac: Vec<String> = link.mac.iter().map(|byte| format!("{byte:02x}")).collect();
    format!(
        "flags {:#x}, masquerade as {v4} and {v6}, {}",
        link.flags,
        mac.join(":")
    )
}
