//! The node's interfaces and addresses as the kernel reports them over rtnetlink: dumped once, then followed. `run` spawns
//! [`watch`] and hands every new [`Network`] to the datapath.
//!
//! What must stay true: after every published change the picture is complete; lost messages lead to a fresh dump.

mod watch;

use std::collections::BTreeMap;
use std::net::IpAddr;

use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{self, LinkAttribute, LinkFlags, LinkLayerType, LinkMessage, LinkXdp, XdpAttached};

pub use watch::watch;

/// Why interfaces could not be followed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket could not be opened.
    #[error("the rtnetlink socket could not be opened")]
    Open(#[source] std::io::Error),
    /// A dump failed.
    #[error("the {what} could not be listed over rtnetlink")]
    Dump {
        /// What was asked for.
        what: &'static str,
        /// The kernel's reason.
        #[source]
        source: rtnetlink::Error,
    },
    /// The connection's task ended.
    #[error("the rtnetlink connection ended")]
    Closed,
}

/// Interfaces of the agent's network namespace.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Network {
    /// Interfaces by index.
    pub links: BTreeMap<u32, LinkInfo>,
    /// Index of the interface of the IPv4 default route with the lowest metric.
    pub default_link4: Option<u32>,
    /// The same for IPv6.
    pub default_link6: Option<u32>,
}

/// An interface.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LinkInfo {
    /// Its name.
    pub name: String,
    /// The driver's name for virtual interfaces (`veth`, `bridge`, …).
    pub kind: Option<String>,
    /// Hardware address, if it is an Ethernet one.
    pub mac: Option<[u8; 6]>,
    /// Packets start with an Ethernet header.
    pub has_ethernet: bool,
    /// Is it the loopback interface?
    pub loopback: bool,
    /// Index of the bridge or bond that it is a port of.
    pub controller: Option<u32>,
    /// The XDP program that it had when the kernel last told of it, ours or somebody else's.
    pub xdp: Option<XdpProgram>,
    /// Administratively up.
    pub up: bool,
    /// Addresses in the order in which the kernel lists them: the primary one of a subnet comes first.
    pub addresses: Vec<LinkAddress>,
}

/// An XDP program on an interface.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct XdpProgram {
    /// Its id.
    pub id: u32,
    /// It runs behind the driver.
    pub generic: bool,
}

/// An address of an interface.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LinkAddress {
    /// The address.
    pub ip: IpAddr,
    /// It can be used to talk to other machines (scope global).
    pub global: bool,
    /// It can be used as a source address already and still: neither tentative nor deprecated.
    pub preferred: bool,
}

impl LinkInfo {
    /// The address that the interface's packets should carry: global and preferred if there is one.
    pub fn primary(&self, is_family: impl Fn(&IpAddr) -> bool) -> Option<IpAddr> {
        let mut candidates: Vec<_> = self
            .addresses
            .iter()
            .filter(|address| address.global && is_family(&address.ip))
            .collect();
        // A stable sort: among equals the kernel's order stands.
        candidates.sort_by_key(|address| !address.preferred);
        candidates.first().map(|address| address.ip)
    }
}

impl Network {
    /// An interface appeared or changed.
    fn set_link(&mut self, message: &LinkMessage) {
        // Bridge ports are reported a second time for the bridge's own address family.
        if u8::from(message.header.interface_family) != libc::AF_UNSPEC as u8 {
            return;
        }
        let info = self.links.entry(message.header.index).or_default();
        info.has_ethernet = message.header.link_layer_type == LinkLayerType::Ether;
        info.up = message.header.flags.contains(LinkFlags::Up);
        info.loopback = message.header.flags.contains(LinkFlags::Loopback);
        // It is not mentioned when there is none any more.
        info.controller = None;
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::Controller(ifindex) => info.controller = Some(*ifindex).filter(|ifindex| *ifindex != 0),
                LinkAttribute::IfName(name) => info.name.clone_from(name),
                LinkAttribute::Address(bytes) => info.mac = bytes.as_slice().try_into().ok(),
                LinkAttribute::Xdp(details) => info.xdp = xdp_of(details),
                LinkAttribute::LinkInfo(details) => {
                    info.kind = details.iter().find_map(|detail| match detail {
                        link::LinkInfo::Kind(kind) => Some(kind.to_string()),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
    }

    fn remove_link(&mut self, message: &LinkMessage) {
        if u8::from(message.header.interface_family) == libc::AF_UNSPEC as u8 {
            self.links.remove(&message.header.index);
        }
    }

    /// An address appeared or changed. One of an interface we have not heard of yet comes again with the next dump.
    fn set_address(&mut self, message: &AddressMessage) {
        let Some(address) = address_of(message) else { return };
        let Some(info) = self.links.get_mut(&message.header.index) else {
            return;
        };
        match info.addresses.iter_mut().find(|known| known.ip == address.ip) {
            Some(known) => *known = address,
            None => info.addresses.push(address),
        }
    }

    fn remove_address(&mut self, message: &AddressMessage) {
        if let (Some(address), Some(info)) = (address_of(message), self.links.get_mut(&message.header.index)) {
            info.addresses.retain(|known| known.ip != address.ip);
        }
    }
}

fn xdp_of(details: &[LinkXdp]) -> Option<XdpProgram> {
    let id = details.iter().find_map(|detail| match detail {
        LinkXdp::ProgId(id) => Some(*id),
        _ => None,
    })?;
    let generic = details.contains(&LinkXdp::Attached(XdpAttached::SocketBuffer));
    Some(XdpProgram { id, generic })
}

fn address_of(message: &AddressMessage) -> Option<LinkAddress> {
    let mut ip = None;
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    for attribute in &message.attributes {
        match attribute {
            // On a point-to-point interface `Address` is the peer's.
            AddressAttribute::Local(local) => ip = Some(*local),
            AddressAttribute::Address(address) => ip = ip.or(Some(*address)),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    Some(LinkAddress {
        ip: ip?,
        global: message.header.scope == AddressScope::Universe,
        preferred: !flags.intersects(AddressFlags::Deprecated | AddressFlags::Tentative | AddressFlags::Dadfailed),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str, scope: AddressScope, flags: AddressFlags) -> AddressMessage {
        let mut message = AddressMessage::default();
        message.header.index = 2;
        message.header.scope = scope;
        message.attributes = vec![
            AddressAttribute::Address(text.parse().unwrap()),
            AddressAttribute::Flags(flags),
        ];
        message
    }

    #[test]
    fn links_and_addresses_come_and_go() {
        let mut network = Network::default();
        let mut link = LinkMessage::default();
        link.header.index = 2;
        link.header.link_layer_type = LinkLayerType::Ether;
        link.attributes = vec![
            LinkAttribute::IfName("eth0".to_owned()),
            LinkAttribute::Address(vec![2, 0, 0, 0, 0, 1]),
        ];
        network.set_link(&link);
        for message in [
            address("fe80::1", AddressScope::Link, AddressFlags::Permanent),
            address("fd00::1", AddressScope::Universe, AddressFlags::Deprecated),
            address("fd00::2", AddressScope::Universe, AddressFlags::Permanent),
            address("192.0.2.1", AddressScope::Universe, AddressFlags::empty()),
            address("192.0.2.2", AddressScope::Universe, AddressFlags::Secondary),
        ] {
            network.set_address(&message);
        }
        let info = &network.links[&2];
        assert_eq!(info.mac, Some([2, 0, 0, 0, 0, 1]));
        assert_eq!(info.primary(IpAddr::is_ipv4), Some("192.0.2.1".parse().unwrap()));
        assert_eq!(info.primary(IpAddr::is_ipv6), Some("fd00::2".parse().unwrap()));
        network.remove_address(&address("fd00::2", AddressScope::Universe, AddressFlags::empty()));
        assert_eq!(
            network.links[&2].primary(IpAddr::is_ipv6),
            Some("fd00::1".parse().unwrap())
        );
        network.remove_link(&link);
        assert_eq!(network, Network::default());
    }

    #[tokio::test]
    async fn the_kernels_own_loopback_is_seen() {
        let (tx, mut rx) = tokio::sync::watch::channel(None);
        let task = tokio::spawn(watch(tx));
        let network = rx.wait_for(Option::is_some).await.unwrap().clone().unwrap();
        task.abort();
        let lo = network.links.values().find(|link| link.name == "lo").unwrap();
        assert!(lo.loopback);
    }
}
