//! What the programs need to know of an interface and of the node's own addresses: values of `LINKS` and `NODE_ADDRS4/6`.
//! Written by the agent from netlink; read for new connections, and at XDP for packets that leave by another
//! interface than they came in.

use bytemuck::{Pod, Zeroable};

use crate::addr::{Addr4, Addr6};

/// The interface has no Ethernet header (WireGuard, IPIP, tun).
pub const LINK_NO_ETHERNET: u32 = 1 << 0;
/// What arrives over the interface comes from a pod of this node (S114 BridgeInterface, InterfaceNamePrefix).
pub const LINK_PODS: u32 = 1 << 1;
/// The interface has our XDP program, so that packets may be sent out of it from XDP.
pub const LINK_XDP: u32 = 1 << 2;

/// An interface that carries traffic; keyed by ifindex. A zero address means the node has none of that family.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Pod, Zeroable)]
pub struct Link {
    /// `LINK_*` bits.
    pub flags: u32,
    /// Source address for connections masqueraded out of this interface: its primary IPv4 address, or the node's (S116).
    pub addr4: Addr4,
    /// The same for IPv6.
    pub addr6: Addr6,
    /// Hardware address; zero without an Ethernet header.
    pub mac: [u8; 6],
    /// Always zero.
    pub pad: [u8; 2],
}

const _: () = assert!(size_of::<Link>() == 32);

/// Node ports are served on this address (S81).
pub const NODE_ADDR_NODE_PORTS: u32 = 1 << 0;
/// Node ports are served on this address for the node's own sockets only: the loopback address, to which no packet leads (S90).
pub const NODE_ADDR_SOCKETS: u32 = 1 << 1;

/// A local address of this node; the value of `NODE_ADDRS4/6`, keyed by address.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Pod, Zeroable)]
pub struct NodeAddr {
    /// Interface that holds the address.
    pub ifindex: u32,
    /// `NODE_ADDR_*` bits.
    pub flags: u32,
}

const _: () = assert!(size_of::<NodeAddr>() == 8);
