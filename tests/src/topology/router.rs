//! The router of a [`Topology`]: the nodes' default gateway, with hosts of another network behind it.
//!
//! ```text
//!   outsider1 198.51.100.11   outsider2 198.51.100.12
//!        └──────── outside0 ─ router ─ eth0 ───────┘
//!                             │ 192.168.56.254
//!                          underlay: node1, node2, …
//! ```
//! It forwards everything it has a route for, also back to where it came from: a packet to a service that a node sends on
//! untranslated comes back, as in a real network. What outsider N sends to a service enters the cluster at node N, everybody
//! else's at the first node. Made by [`Topology::new`]; nothing here knows which addresses services have until
//! [`Router::serve`] says so.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};

use super::{GATEWAY, GATEWAY6, Host, Topology};
use crate::netns::Netns;
use crate::process;

/// Its host number in the underlay.
const NUMBER: u8 = 254;
/// The outsiders' network.
pub const OUTSIDE: &str = "198.51.100.0/24";
/// The same in IPv6.
pub const OUTSIDE6: &str = "2001:db8:51::/64";
/// Hosts in it.
const OUTSIDERS: u8 = 2;

/// The router and what is behind it.
pub struct Router {
    /// The router itself, with its addresses in the underlay.
    pub host: Host,
    /// Hosts outside the cluster.
    pub outsiders: Vec<Host>,
    /// The nodes at which the service traffic of everybody, and of each outsider, enters.
    entrances: Vec<[IpAddr; 2]>,
}

impl Router {
    /// Adds a router to a network whose nodes are there already.
    pub(super) fn new(topology: &Topology) -> Result<Self> {
        let host = topology.attach_to_underlay("router", NUMBER, 0)?;
        let netns = &host.netns;
        netns.sysctl("net/ipv4/ip_forward", "1")?;
        netns.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        // A redirect would tell senders a way around the router.
        netns.sysctl("net/ipv4/conf/all/send_redirects", "0")?;
        netns.sysctl("net/ipv4/conf/eth0/send_redirects", "0")?;
        let pods: String = topology.nodes.iter().map(super::Node::pod_routes).collect();
        netns.ip(&format!(
            "route del default via {GATEWAY}
             route del default via {GATEWAY6}
             link add outside0 type bridge
             link set outside0 up
             addr add 198.51.100.1/24 dev outside0
             addr add 2001:db8:51::1/64 dev outside0 nodad
             {pods}"
        ))?;
        let outsiders = (1..=OUTSIDERS)
            .map(|number| add_outsider(netns, number))
            .collect::<Result<Vec<_>>>()?;
        for node in &topology.nodes {
            node.host.netns.ip(&format!(
                "route replace default via {}\nroute replace default via {}",
                host.v4, host.v6
            ))?;
        }
        let first = topology.nodes.first().context("a router needs a node to send to")?;
        let nodes = topology.nodes.iter().take(outsiders.len());
        let router = Self {
            host,
            outsiders,
            entrances: [first]
                .into_iter()
                .chain(nodes)
                .map(|node| [node.host.v4.into(), node.host.v6.into()])
                .collect(),
        };
        router.choose_entrances()?;
        Ok(router)
    }

    /// Rules that give each outsider a routing table of its own, which is asked first.
    fn choose_entrances(&self) -> Result<()> {
        for (index, outsider) in self.outsiders.iter().enumerate() {
            // One by one: a batch takes no IPv6 rules.
            for (family, source) in [("-4", IpAddr::from(outsider.v4)), ("-6", outsider.v6.into())] {
                let (source, table) = (source.to_string(), (index + 1).to_string());
                let mut command = self.host.netns.command("ip");
                process::run(command.args([family, "rule", "add", "from", &source, "lookup", &table]))?;
            }
        }
        Ok(())
    }

    /// Sends what is addressed to this network of services to the nodes.
    pub fn serve(&self, network: &str) -> Result<()> {
        let family = usize::from(network.contains(':'));
        for (index, entrance) in self.entrances.iter().enumerate() {
            let table = if index == 0 {
                "main".to_owned()
            } else {
                index.to_string()
            };
            let via = entrance[family];
            self.host
                .netns
                .ip(&format!("route add {network} via {via} table {table}"))?;
        }
        Ok(())
    }

    /// Gives an outsider one more address, as a load balancer has it, and routes everybody's traffic for it there.
    pub fn give_address(&self, outsider: usize, address: IpAddr) -> Result<()> {
        let host = &self.outsiders[outsider];
        let (length, via, usable) = if address.is_ipv4() {
            (32, IpAddr::from(host.v4), "")
        } else {
            (128, host.v6.into(), "nodad")
        };
        host.netns.ip(&format!("addr add {address}/{length} dev lo {usable}"))?;
        for table in ["main".to_owned()]
            .into_iter()
            .chain((1..self.entrances.len()).map(|t| t.to_string()))
        {
            self.host
                .netns
                .ip(&format!("route add {address}/{length} via {via} table {table}"))?;
        }
        Ok(())
    }

    /// Its namespaces.
    pub(super) fn namespaces(&self) -> impl Iterator<Item = &Netns> {
        self.outsiders
            .iter()
            .map(|outsider| &outsider.netns)
            .chain([&self.host.netns])
    }
}

fn add_outsider(router: &Netns, number: u8) -> Result<Host> {
    let name = format!("outsider{number}");
    let netns = Netns::new(&name)?;
    let (v4, v6) = (
        Ipv4Addr::new(198, 51, 100, 10 + number),
        Ipv6Addr::new(0x2001, 0xdb8, 0x51, 0, 0, 0, 0, u16::from(10 + number)),
    );
    router.ip(&format!(
        "link add {name} type veth peer name eth0 netns {}
         link set {name} master outside0 up",
        netns.name()
    ))?;
    netns.ip(&format!(
        "link set eth0 up
         addr add {v4}/24 dev eth0
         addr add {v6}/64 dev eth0 nodad
         route add default via 198.51.100.1
         route add default via 2001:db8:51::1"
    ))?;
    Ok(Host { name, netns, v4, v6 })
}

#[cfg(test)]
mod tests {
    use super::super::{PodNetwork, Shape};
    use super::*;
    use crate::echo::{self, EchoServer};

    /// Without any proxy: through the router everybody reaches everybody under their own addresses, and an address that is routed
    /// to a node nobody has does not come back to the outsider as an answer.
    #[test]
    fn the_router_leads_outsiders_to_pods_and_back() {
        let topology = Topology::new(&Shape {
            nodes: 3,
            pods_per_node: 1,
            networks: vec![PodNetwork::Bridge, PodNetwork::PointToPoint, PodNetwork::Bridge],
            router: true,
            ..Default::default()
        })
        .unwrap();
        let router = topology.router.as_ref().unwrap();
        let pods = || topology.nodes.iter().map(|node| &node.pods[0].host);
        let everybody: Vec<&Host> = pods().chain(&router.outsiders).collect();
        let servers: Vec<EchoServer> = everybody
            .iter()
            .map(|h| EchoServer::start(&h.netns, &h.name, &h.sockets(8080)).unwrap())
            .collect();
        assert_eq!(servers.len(), 5);
        for client in &everybody {
            for server in everybody.iter().filter(|server| server.name != client.name) {
                for address in server.sockets(8080) {
                    let answer = client
                        .run(|| echo::tcp(address))
                        .unwrap_or_else(|f| panic!("{} -> {address}: {f}", client.name));
                    assert_eq!(answer.server, server.name);
                    assert_eq!(answer.client.ip(), client.address(address.ip()));
                }
            }
        }
    }
}
