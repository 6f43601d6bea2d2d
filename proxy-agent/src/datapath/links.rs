//! Attaches the packet programs to interfaces and keeps `LINKS` and `NODE_ADDRS4/6` in step with netlink. What runs at XDP is
//! attached by [`super::xdp`].
//!
//! Both directions are attached before all foreign programs (tcx: first; classic: priority 1), so that none of them can end the
//! chain before a service's packet was translated; ours end with "next", so that foreign ones still run. Links are pinned as
//! `<ifindex>-ingress|egress`; on restart the program of a pinned link is replaced in one step. When the mode changes, the other
//! mode's attachments go only after the new ones are in place. An interface that vanishes meanwhile is no error.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use aya::programs::{SchedClassifier, TcAttachType};
use proxy_common::addr::{Addr4, Addr6, Address};
use proxy_common::link::{
    LINK_NO_ETHERNET, LINK_PODS, LINK_XDP, Link, NODE_ADDR_NODE_PORTS, NODE_ADDR_SOCKETS, NodeAddr,
};
use proxy_common::names;

use super::classic::{Classic, Filter};
use super::doubts::{self, Doubt};
use super::error::{DatapathError, TableError};
use super::loader::{Programs, repin};
use super::node_port_addresses::NodePortAddresses;
use super::options::{AttachMode, InterfaceFilter, PodDetection, XdpOptions};
use super::sync::SyncReport;
use super::sys::{self, LinkTarget};
use super::tables::{FamilyTables, Tables};
use super::xdp::Xdp;
use crate::netlink::{LinkInfo, Network};

/// The two hooks, in the order in which they are attached: replies must be known before requests are translated.
pub(super) const DIRECTIONS: [(bool, &str); 2] = [(true, "egress"), (false, "ingress")];

/// Attachments, and what the maps say about interfaces.
pub(super) struct Links {
    filter: InterfaceFilter,
    pods: PodDetection,
    node_ports: NodePorts,
    tcx: bool,
    dir: PathBuf,
    classic: Classic,
    xdp: Xdp,
    attached: BTreeMap<u32, Attached>,
    /// Interfaces we leave alone, seen already.
    ignored: BTreeSet<u32>,
    links: BTreeMap<u32, Link>,
    node_addrs4: HashMap<Addr4, NodeAddr>,
    node_addrs6: HashMap<Addr6, NodeAddr>,
    /// What netlink said last.
    network: Option<Network>,
    /// What was said of options that fit no interface.
    doubts: Vec<Doubt>,
    /// Something has to be tried again.
    pending: bool,
}

/// Which local addresses serve node ports.
struct NodePorts {
    addresses: NodePortAddresses,
    /// The node's own addresses as its Node object has them.
    node_ips: Vec<IpAddr>,
}

/// The hooks of one interface.
struct Attached {
    name: String,
    ethernet: bool,
    /// tcx links by direction; empty with classic filters.
    links: Vec<(PathBuf, OwnedFd)>,
}

impl Links {
    /// Chooses the mode and takes over what the maps hold.
    pub(super) fn open(
        filter: InterfaceFilter,
        pods: PodDetection,
        node_ports: NodePortAddresses,
        mode: AttachMode,
        xdp: XdpOptions,
        dir: &Path,
        tables: &impl Tables,
    ) -> Result<Self, DatapathError> {
        let tcx = match mode {
            AttachMode::Classic => false,
            AttachMode::Auto => has_tcx(),
            // `probe` has seen to it.
            AttachMode::Tcx => true,
        };
        let table =
            |error: TableError| DatapathError::call("reading", "the maps of interfaces")(io::Error::other(error));
        let mut links = Self {
            filter,
            pods,
            node_ports: NodePorts {
                addresses: node_ports,
                node_ips: Vec::new(),
            },
            tcx,
            dir: dir.to_owned(),
            classic: Classic::open().map_err(DatapathError::call("opening", "an rtnetlink socket"))?,
            xdp: Xdp::open(xdp, dir),
            attached: BTreeMap::new(),
            ignored: BTreeSet::new(),
            links: BTreeMap::new(),
            node_addrs4: HashMap::new(),
            node_addrs6: HashMap::new(),
            network: None,
            doubts: Vec::new(),
            pending: false,
        };
        links.read_back(tables).map_err(table)?;
        Ok(links)
    }

    /// Programs on interfaces.
    pub(super) fn attached(&self) -> usize {
        self.attached.len() * DIRECTIONS.len()
    }

    /// XDP programs, and `native` or `generic`.
    pub(super) fn xdp(&self) -> (usize, &'static str) {
        self.xdp.attached()
    }

    /// Entries of `LINKS`, `NODE_ADDRS4` and `NODE_ADDRS6`.
    pub(super) fn entries(&self) -> [u64; 3] {
        [self.links.len(), self.node_addrs4.len(), self.node_addrs6.len()].map(|entries| entries as u64)
    }

    /// `tcx` or `classic`.
    pub(super) fn mode(&self) -> &'static str {
        if self.tcx { "tcx" } else { "classic" }
    }

    /// Brings maps and attachments in step with the interfaces.
    pub(super) fn set_network(
        &mut self,
        network: &Network,
        programs: &Programs,
        tables: &mut impl Tables,
        report: &mut SyncReport,
    ) {
        let failures = report.failed.len();
        let filter = &self.filter;
        let carrying = network.links.iter().filter(|(_, info)| filter.accepts_link(info));
        // `LINKS` says of an interface that it has XDP after it got it, and no more before it loses it.
        self.xdp.attach(carrying, programs, report);
        self.write_maps(network, tables, report);
        self.xdp.detach(network, report);
        self.say_doubts(network);
        for (ifindex, info) in &network.links {
            let result = if self.accepts(info) {
                self.attach(*ifindex, info, programs)
            } else {
                self.ignore(*ifindex)
            };
            if let Err(error) = result
                && error.raw_os_error() != Some(libc::ENODEV)
            {
                report.fail(format!("interface {} ({ifindex})", info.name), error);
            }
        }
        self.attached.retain(|ifindex, _| network.links.contains_key(ifindex));
        self.ignored.retain(|ifindex| network.links.contains_key(ifindex));
        if let Err(error) = self.remove_stale_pins(network) {
            report.fail(format!("pins in {}", self.dir.display()), error);
        }
        self.pending = report.failed.len() > failures;
        self.network = Some(network.clone());
    }

    /// `LINKS` and `NODE_ADDRS4/6` alone.
    pub(super) fn write_maps(&mut self, network: &Network, tables: &mut impl Tables, report: &mut SyncReport) {
        self.write_links(network, tables, report);
        write_node_addrs(&mut self.node_addrs4, network, &self.node_ports, tables, report);
        write_node_addrs(&mut self.node_addrs6, network, &self.node_ports, tables, report);
    }

    /// The addresses in the Node object are these now.
    pub(super) fn set_node_ips(&mut self, ips: &[IpAddr], tables: &mut impl Tables, report: &mut SyncReport) {
        if self.node_ports.node_ips == ips {
            return;
        }
        self.node_ports.node_ips = ips.to_vec();
        let Some(network) = &self.network else { return };
        let failures = report.failed.len();
        write_node_addrs(&mut self.node_addrs4, network, &self.node_ports, tables, report);
        write_node_addrs(&mut self.node_addrs6, network, &self.node_ports, tables, report);
        self.pending |= report.failed.len() > failures;
    }

    /// What the kernel holds may not be what was written.
    pub(super) fn read_back(&mut self, tables: &impl Tables) -> Result<(), TableError> {
        self.links = tables.links()?.into_iter().collect();
        self.node_addrs4 = tables.node_addrs()?.into_iter().collect();
        self.node_addrs6 = tables.node_addrs()?.into_iter().collect();
        Ok(())
    }

    /// Writes and attaches again what differs from what netlink said last.
    pub(super) fn refresh(&mut self, programs: &Programs, tables: &mut impl Tables, report: &mut SyncReport) {
        if let Some(network) = self.network.take() {
            self.set_network(&network, programs, tables, report);
        }
    }

    /// Attaches again what somebody took away (S164), and tries again what failed.
    pub(super) fn repair(&mut self, programs: &Programs, tables: &mut impl Tables, report: &mut SyncReport) {
        let Some(network) = self.network.take() else { return };
        let mut lost: Vec<u32> = self.attached.keys().copied().collect();
        lost.retain(|ifindex| !self.is_intact(*ifindex));
        for ifindex in &lost {
            if let Some(attached) = self.attached.remove(ifindex) {
                tracing::warn!(
                    ifindex,
                    interface = attached.name,
                    "programs were taken away, attaching them again"
                );
            }
        }
        for (pin, link) in self.attached.values().flat_map(|attached| &attached.links) {
            if sys::open_pin(pin).is_err()
                && let Err(error) = repin(link.as_fd(), pin)
            {
                report.fail(pin.display(), error);
            }
        }
        if self.xdp.find_lost(report) || self.pending || !lost.is_empty() {
            self.set_network(&network, programs, tables, report);
        } else {
            self.network = Some(network);
        }
    }

    /// Are both programs where we put them?
    pub(super) fn is_intact(&mut self, ifindex: u32) -> bool {
        let Some(attached) = self.attached.get(&ifindex) else {
            return true;
        };
        if self.tcx {
            attached
                .links
                .iter()
                .all(|(_, link)| sys::link_target(link.as_fd()).is_ok_and(|at| at == LinkTarget::Interface(ifindex)))
        } else {
            DIRECTIONS.iter().all(|(egress, _)| {
                let filters = self.classic.filters(ifindex, *egress);
                filters.is_ok_and(|filters| filters.iter().any(Filter::is_ours))
            })
        }
    }

    fn accepts(&self, info: &LinkInfo) -> bool {
        self.filter.accepts_link(info)
    }

    fn say_doubts(&mut self, network: &Network) {
        let doubts = doubts::all(&self.filter, self.xdp.options(), &self.pods, network);
        for doubt in doubts.iter().filter(|doubt| !self.doubts.contains(doubt)) {
            tracing::warn!(remedy = doubt.remedy, "{}", doubt.found);
        }
        self.doubts = doubts;
    }

    fn attach(&mut self, ifindex: u32, info: &LinkInfo, programs: &Programs) -> io::Result<()> {
        let known = self.attached.get(&ifindex);
        // An index may have gone to another interface between two pictures of the network: then the links are gone as well.
        if known.is_some_and(|known| known.ethernet == info.has_ethernet) && self.is_intact(ifindex) {
            return Ok(());
        }
        let names = program_names(info.has_ethernet);
        let mut links = Vec::new();
        let mut pinned = Ok(());
        for ((egress, direction), name) in DIRECTIONS.into_iter().zip(names) {
            let program = programs
                .get(name)
                .ok_or_else(|| io::Error::other(format!("program {name} is not loaded")))?;
            let pin = self.dir.join(format!("{ifindex}-{direction}"));
            if self.tcx {
                let (link, link_pinned) = attach_tcx(&pin, ifindex, egress, program)?;
                links.push((pin, link));
                pinned = pinned.and(link_pinned);
            } else {
                self.classic.attach(ifindex, egress, program, name)?;
                remove_pin(&pin)?;
            }
        }
        if self.tcx {
            self.detach_classic(ifindex)?;
        }
        tracing::info!(ifindex, interface = info.name, mode = self.mode(), "programs attached");
        self.ignored.remove(&ifindex);
        self.attached.insert(
            ifindex,
            Attached {
                name: info.name.clone(),
                ethernet: info.has_ethernet,
                links,
            },
        );
        pinned
    }

    /// Takes our programs off an interface that is not to have them, whoever put them there.
    fn ignore(&mut self, ifindex: u32) -> io::Result<()> {
        if self.ignored.contains(&ifindex) {
            return Ok(());
        }
        self.attached.remove(&ifindex);
        self.detach_classic(ifindex)?;
        for (_, direction) in DIRECTIONS {
            remove_pin(&self.dir.join(format!("{ifindex}-{direction}")))?;
        }
        self.ignored.insert(ifindex);
        Ok(())
    }

    fn detach_classic(&mut self, ifindex: u32) -> io::Result<()> {
        let mut removed = false;
        for (egress, _) in DIRECTIONS {
            removed |= self.classic.detach(ifindex, egress)?;
        }
        if removed {
            self.classic.remove_empty_qdisc(ifindex)?;
        }
        Ok(())
    }

    /// Pins of interfaces that are gone, or that are not to have our programs. Where attaching failed, a former agent's programs
    /// stay until it succeeds.
    fn remove_stale_pins(&self, network: &Network) -> io::Result<()> {
        let is_stale = |ifindex: u32| !network.links.get(&ifindex).is_some_and(|info| self.accepts(info));
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if interface_of(&path).is_some_and(is_stale) {
                remove_pin(&path)?;
            }
        }
        Ok(())
    }

    fn write_links(&mut self, network: &Network, tables: &mut impl Tables, report: &mut SyncReport) {
        let primary4 = node_primary(network, network.default_link4, IpAddr::is_ipv4);
        let primary6 = node_primary(network, network.default_link6, IpAddr::is_ipv6);
        let wanted: BTreeMap<u32, Link> = network
            .links
            .iter()
            .filter(|(_, info)| self.accepts(info))
            .map(|(ifindex, info)| {
                let no_ethernet = if info.has_ethernet { 0 } else { LINK_NO_ETHERNET };
                let pods = if self.pods.is_pod_link(info, network) {
                    LINK_PODS
                } else {
                    0
                };
                let xdp = if self.xdp.carries(*ifindex, info) { LINK_XDP } else { 0 };
                let link = Link {
                    flags: no_ethernet | pods | xdp,
                    addr4: source_address(info.primary(IpAddr::is_ipv4).or(primary4)),
                    addr6: source_address(info.primary(IpAddr::is_ipv6).or(primary6)),
                    mac: info.mac.filter(|_| info.has_ethernet).unwrap_or_default(),
                    pad: [0; 2],
                };
                (*ifindex, link)
            })
            .collect();
        for (ifindex, link) in &wanted {
            if self.links.get(ifindex) == Some(link) {
                continue;
            }
            match tables.set_link(*ifindex, link) {
                Ok(()) => {
                    report.written += 1;
                    self.links.insert(*ifindex, *link);
                }
                Err(error) => report.fail(format!("interface {ifindex}"), error),
            }
        }
        let gone: Vec<u32> = self
            .links
            .keys()
            .filter(|ifindex| !wanted.contains_key(ifindex))
            .copied()
            .collect();
        for ifindex in gone {
            match tables.remove_link(ifindex) {
                Ok(()) => {
                    report.deleted += 1;
                    self.links.remove(&ifindex);
                }
                Err(error) => report.fail(format!("interface {ifindex}"), error),
            }
        }
    }
}

/// The programs of an interface, in the order of [`DIRECTIONS`].
pub(super) fn program_names(has_ethernet: bool) -> [&'static str; 2] {
    if has_ethernet {
        [names::TC_EGRESS, names::TC_INGRESS]
    } else {
        [names::TC_EGRESS_L3, names::TC_INGRESS_L3]
    }
}

/// The kernel knows the hook even where nothing is attached to it.
pub(super) fn has_tcx() -> bool {
    SchedClassifier::query_tcx("lo", TcAttachType::Ingress).is_ok()
}

/// The node's address for interfaces that have none: that of the default route's interface, else the first global one.
fn node_primary(network: &Network, default: Option<u32>, is_family: fn(&IpAddr) -> bool) -> Option<IpAddr> {
    let default = default.and_then(|ifindex| network.links.get(&ifindex));
    default
        .into_iter()
        .chain(network.links.values())
        .find_map(|info| info.primary(is_family).filter(|ip| !ip.is_loopback()))
}

fn source_address<A: Address>(ip: Option<IpAddr>) -> A {
    ip.and_then(A::from_ip).unwrap_or_else(bytemuck::Zeroable::zeroed)
}

/// Every local address. Those of the loopback networks are there for the node's own sockets alone, and only if these are served.
fn write_node_addrs<A: Address>(
    held: &mut HashMap<A, NodeAddr>,
    network: &Network,
    node_ports: &NodePorts,
    tables: &mut impl FamilyTables<A>,
    report: &mut SyncReport,
) {
    let mut wanted: HashMap<A, NodeAddr> = HashMap::new();
    for (ifindex, info) in &network.links {
        for address in &info.addresses {
            let Some(addr) = A::from_ip(address.ip) else { continue };
            let serves = node_ports.addresses.accepts(address.ip, &node_ports.node_ips);
            let flags = match (serves, address.ip.is_loopback()) {
                (false, true) => continue,
                (true, true) => NODE_ADDR_SOCKETS,
                (true, false) => NODE_ADDR_NODE_PORTS,
                (false, false) => 0,
            };
            let ifindex = *ifindex;
            wanted.entry(addr).or_insert(NodeAddr { ifindex, flags });
        }
    }
    for (addr, value) in &wanted {
        if held.get(addr) == Some(value) {
            continue;
        }
        match tables.set_node_addr(addr, value) {
            Ok(()) => {
                report.written += 1;
                held.insert(*addr, *value);
            }
            Err(error) => report.fail(format!("local address {addr}"), error),
        }
    }
    held.retain(|addr, _| {
        if wanted.contains_key(addr) {
            return true;
        }
        match tables.remove_node_addr(addr) {
            Ok(()) => {
                report.deleted += 1;
                false
            }
            Err(error) => {
                report.fail(format!("local address {addr}"), error);
                true
            }
        }
    });
}

/// Puts the program into the pinned link, or makes and pins a new one.
fn attach_tcx(
    pin: &Path,
    ifindex: u32,
    egress: bool,
    program: BorrowedFd<'_>,
) -> io::Result<(OwnedFd, io::Result<()>)> {
    if let Ok(link) = sys::open_pin(pin) {
        if sys::link_target(link.as_fd()).is_ok_and(|target| target == LinkTarget::Interface(ifindex)) {
            sys::update_link(link.as_fd(), program)?;
            return Ok((link, Ok(())));
        }
        // The interface of that index is another one by now, or somebody detached the link, or this is no link at all.
        remove_pin(pin)?;
    }
    let link = sys::attach_tcx(program, ifindex, egress)?;
    // Where that fails it goes on working as long as this agent runs, and the repair tries again.
    let pinned = sys::pin(link.as_fd(), pin);
    Ok((link, pinned))
}

/// Detaches and removes a pinned link, if there is one.
pub(super) fn remove_pin(pin: &Path) -> io::Result<bool> {
    if let Ok(link) = sys::open_pin(pin) {
        // Other holders of the link would otherwise keep it attached. A link whose target is gone says ENOLINK or the like.
        let _detached_already = sys::detach_link(link.as_fd());
    }
    match fs::remove_file(pin) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// The interface index in the name of a pin.
pub(super) fn interface_of(pin: &Path) -> Option<u32> {
    let (ifindex, direction) = pin.file_name()?.to_str()?.split_once('-')?;
    let known = DIRECTIONS.iter().any(|(_, name)| *name == direction);
    known.then(|| ifindex.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_of_interfaces_are_told_from_others() {
        assert_eq!(interface_of(Path::new("/x/12-ingress")), Some(12));
        assert_eq!(interface_of(Path::new("/x/12-egress")), Some(12));
        assert_eq!(interface_of(Path::new("/x/connect4")), None);
        assert_eq!(interface_of(Path::new("/x/12-other")), None);
    }
}
