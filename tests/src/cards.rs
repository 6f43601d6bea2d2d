//! A node with two network cards and known neighbours, for the XDP program by test-run: its look-ups of routes see the network
//! namespace of the card that a packet arrives by. Used by the packet tests and by `bench packet`.

use anyhow::Result;
use proxy_common::addr::{Addr4, Addr6};
use proxy_common::link::{LINK_XDP, Link};

use crate::netns::Netns;
use crate::programs::Programs;
use crate::wire::DST_MAC;
use crate::xdp;

/// Hardware address of the second card; the first one's is the destination of every built packet ([`DST_MAC`]).
pub const SECOND_MAC: [u8; 6] = [2, 0, 0, 0, 0, 3];
/// The gateway, behind which all clients are.
pub const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x0a];
/// The node that the pods 10.244.2.0/24 and fd00:10:244:2::/64 are on, at the first card.
pub const OTHER_NODE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x0b];
/// The node that the pods 10.244.3.0/24 and fd00:10:244:3::/64 are on, at the second card.
pub const THIRD_NODE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x0c];

/// The node. Pods 10.244.4.0/24 and fd00:10:244:4::/64 are behind a neighbour nobody has heard of.
pub struct Cards {
    /// Its network namespace.
    pub netns: Netns,
    /// Index of the first card.
    pub first: u32,
    /// Index of the second card.
    pub second: u32,
}

impl Cards {
    /// Makes it.
    pub fn new() -> Result<Self> {
        let netns = Netns::new("cards")?;
        netns.sysctl("net/ipv4/ip_forward", "1")?;
        netns.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        netns.ip("link set lo up
             link add eth0 address 02:00:00:00:00:02 type veth peer name wire0
             link add eth1 address 02:00:00:00:00:03 type veth peer name wire1
             link set eth0 up
             link set eth1 up
             link set wire0 up
             link set wire1 up
             addr add 192.168.56.1/24 dev eth0
             addr add 192.168.57.1/24 dev eth1
             addr add fd00:56::1/64 dev eth0 nodad
             addr add fd00:57::1/64 dev eth1 nodad
             neigh add 192.168.56.254 lladdr 02:00:00:00:00:0a dev eth0
             neigh add fd00:56::254 lladdr 02:00:00:00:00:0a dev eth0
             neigh add 192.168.56.20 lladdr 02:00:00:00:00:0b dev eth0
             neigh add fd00:56::20 lladdr 02:00:00:00:00:0b dev eth0
             neigh add 192.168.57.20 lladdr 02:00:00:00:00:0c dev eth1
             neigh add fd00:57::20 lladdr 02:00:00:00:00:0c dev eth1
             route add default via 192.168.56.254
             route add default via fd00:56::254
             route add 10.244.2.0/24 via 192.168.56.20
             route add fd00:10:244:2::/64 via fd00:56::20
             route add 10.244.3.0/24 via 192.168.57.20
             route add fd00:10:244:3::/64 via fd00:57::20
             route add 10.244.4.0/24 via 192.168.56.40
             route add fd00:10:244:4::/64 via fd00:56::40")?;
        let index = |device| netns.run(|| xdp::index(device));
        let (first, second) = (index("eth0")?, index("eth1")?);
        Ok(Self { netns, first, second })
    }

    /// Tells the programs of the cards, the first with XDP and the second with or without it.
    pub fn make_known(&self, programs: &mut Programs, second_has_xdp: bool) {
        let link = |mac, addr4, addr6: std::net::Ipv6Addr, has_xdp| Link {
            flags: if has_xdp { LINK_XDP } else { 0 },
            addr4: Addr4(addr4),
            addr6: Addr6(addr6.octets()),
            mac,
            ..Link::default()
        };
        let [first6, second6] = [0x56, 0x57].map(|net| std::net::Ipv6Addr::new(0xfd00, net, 0, 0, 0, 0, 0, 1));
        programs.set_link(self.first, link(DST_MAC, [192, 168, 56, 1], first6, true));
        programs.set_link(
            self.second,
            link(SECOND_MAC, [192, 168, 57, 1], second6, second_has_xdp),
        );
    }
}
