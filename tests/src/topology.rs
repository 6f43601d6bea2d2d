//! A small cluster network made of namespaces: nodes on one underlay, pods on nodes, routes between them, no proxy.
//!
//! ```text
//!   pod a1   pod a2          pod b1        external
//!     │        │               │              │
//!   [bridge cni0, or a       [ ... ]          │
//!    veth each, like Calico]   │              │
//!   node 1 ─ eth0            node 2 ─ eth0    │
//!     └──────── underlay bridge ──────────────┘   192.168.56.1
//! ```
//! Both families everywhere, checksum offload as the kernel has it. The underlay namespace holds the default gateway address and
//! forwards nothing: what nobody translates dies there. With a router ([`router`]) that is the gateway instead, and what a node
//! sends untranslated comes back to a node.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Result, bail};

use crate::netns::Netns;

pub mod router;
use router::Router;

/// Both families' pod networks, for `--cluster-cidr`.
pub const CLUSTER_CIDR: &str = "10.244.0.0/16,fd00:10:244::/48";
/// Both families' service networks, for an API server.
pub const SERVICE_CIDR: &str = "10.96.0.0/16,fd00:96::/112";
/// The underlay's own address: the nodes' default gateway, and where an API server for the nodes can listen.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 56, 1);
/// The same in IPv6.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x56, 0, 0, 0, 0, 0, 1);
/// Networks that a pod may serve as a whole; routed to it by [`Topology::give_network`], so it answers on any of their addresses.
pub const ANY_ADDRESS: &str = "10.250.0.0/16";
/// The same in IPv6.
pub const ANY_ADDRESS6: &str = "fd00:250::/64";

const EXTERNAL_HOST: u8 = 200;

/// How pods are connected to their node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodNetwork {
    /// Veths are ports of a bridge that holds the gateway address, as the bridge CNI plugin does it.
    Bridge,
    /// Each veth is routed on its own and the gateway is link-local, as Calico does it.
    PointToPoint,
}

/// What to build.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Number of nodes.
    pub nodes: u8,
    /// Pods on each node at first.
    pub pods_per_node: u8,
    /// How pods are connected.
    pub network: PodNetwork,
    /// How pods of single nodes are connected, the first node's first; [`Shape::network`] for nodes beyond those.
    pub networks: Vec<PodNetwork>,
    /// A router between the nodes and hosts outside; see [`router`].
    pub router: bool,
    /// A host outside the cluster, which routes the service networks to the first node.
    pub external: bool,
    /// `rp_filter` of every node interface: 0, 1 (strict) or 2 (loose).
    pub rp_filter: u8,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            nodes: 2,
            pods_per_node: 2,
            network: PodNetwork::Bridge,
            networks: Vec::new(),
            router: false,
            external: false,
            rp_filter: 0,
        }
    }
}

/// The whole network; everything goes when it is dropped.
pub struct Topology {
    /// Where the nodes meet.
    pub underlay: Netns,
    /// The nodes, counted from 1 in names and addresses.
    pub nodes: Vec<Node>,
    /// A host outside the cluster.
    pub external: Option<Host>,
    /// The nodes' default gateway, if there is a router.
    pub router: Option<Router>,
}

/// Anything with a namespace and an address per family.
pub struct Host {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub netns: Netns,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
}

impl Host {
    /// Its address of one family, by example: `like` may be any address of that family.
    pub fn address(&self, like: IpAddr) -> IpAddr {
        if like.is_ipv4() { self.v4.into() } else { self.v6.into() }
    }

    /// Both addresses with a port.
    pub fn sockets(&self, port: u16) -> [SocketAddr; 2] {
        [
            SocketAddr::new(self.v4.into(), port),
            SocketAddr::new(self.v6.into(), port),
        ]
    }

    /// Runs `body` inside its namespace.
    pub fn run<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        self.netns.run(body)
    }
}

/// A node: a host with pods.
pub struct Node {
    /// Namespace and addresses of the node itself.
    pub host: Host,
    /// Its pods.
    pub pods: Vec<Pod>,
    number: u8,
    network: PodNetwork,
    made: u8,
}

/// A pod: a host behind a node.
pub struct Pod {
    /// Namespace and addresses.
    pub host: Host,
    /// The node's side of its veth.
    pub node_interface: String,
}

impl Topology {
    /// Builds the network.
    pub fn new(shape: &Shape) -> Result<Self> {
        let underlay = Netns::new("underlay")?;
        underlay.ip(&format!(
            "link add br0 type bridge
             link set br0 up
             addr add {GATEWAY}/24 dev br0
             addr add {GATEWAY6}/64 dev br0 nodad"
        ))?;
        let mut topology = Self {
            underlay,
            nodes: Vec::new(),
            external: None,
            router: None,
        };
        for number in 1..=shape.nodes {
            topology.add_node(number, shape)?;
        }
        topology.route_between_nodes()?;
        for node in &mut topology.nodes {
            for _ in 0..shape.pods_per_node {
                node.add_pod()?;
            }
        }
        if shape.external {
            topology.add_external()?;
        }
        if shape.router {
            topology.router = Some(Router::new(&topology)?);
        }
        Ok(topology)
    }

    fn add_node(&mut self, number: u8, shape: &Shape) -> Result<()> {
        let host = self.attach_to_underlay(&format!("node{number}"), 10 + number, shape.rp_filter)?;
        host.netns.sysctl("net/ipv4/ip_forward", "1")?;
        host.netns.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        let own = shape.networks.get(usize::from(number) - 1);
        let network = own.copied().unwrap_or(shape.network);
        if network == PodNetwork::Bridge {
            // A fixed address, as the plugin gives it one: else it changes with the ports, and pods send to the old one.
            host.netns.ip(&format!(
                "link add cni0 address 02:00:00:00:00:{number:02x} type bridge
                 link set cni0 up
                 addr add 10.244.{number}.1/24 dev cni0
                 addr add fd00:10:244:{number}::1/64 dev cni0 nodad"
            ))?;
        }
        self.nodes.push(Node {
            host,
            pods: Vec::new(),
            number,
            network,
            made: 0,
        });
        Ok(())
    }

    fn attach_to_underlay(&self, name: &str, number: u8, rp_filter: u8) -> Result<Host> {
        let netns = Netns::new(name)?;
        // Interfaces take the larger of their own value and that of `all`; their own comes from `default`.
        netns.sysctl("net/ipv4/conf/all/rp_filter", &rp_filter.to_string())?;
        netns.sysctl("net/ipv4/conf/default/rp_filter", &rp_filter.to_string())?;
        let (v4, v6) = (
            Ipv4Addr::new(192, 168, 56, number),
            Ipv6Addr::new(0xfd00, 0x56, 0, 0, 0, 0, 0, number.into()),
        );
        self.underlay.ip(&format!(
            "link add {name} type veth peer name eth0 netns {}
             link set {name} master br0 up",
            netns.name()
        ))?;
        netns.ip(&format!(
            "link set eth0 up
             addr add {v4}/24 dev eth0
             addr add {v6}/64 dev eth0 nodad
             route add default via {GATEWAY}
             route add default via {GATEWAY6}"
        ))?;
        Ok(Host {
            name: name.to_owned(),
            netns,
            v4,
            v6,
        })
    }

    fn route_between_nodes(&self) -> Result<()> {
        for node in &self.nodes {
            let mut routes = String::new();
            for other in self.nodes.iter().filter(|other| other.number != node.number) {
                routes += &other.pod_routes();
            }
            node.host.netns.ip(&routes)?;
        }
        Ok(())
    }

    fn add_external(&mut self) -> Result<()> {
        let host = self.attach_to_underlay("external", EXTERNAL_HOST, 0)?;
        let Some(first) = self.nodes.first() else {
            bail!("an external host needs a node to send to")
        };
        let mut routes: String = self.nodes.iter().map(Node::pod_routes).collect();
        routes += &format!("route add 10.96.0.0/16 via {}\n", first.host.v4);
        routes += &format!("route add fd00:96::/112 via {}\n", first.host.v6);
        host.netns.ip(&routes)?;
        self.external = Some(host);
        Ok(())
    }

    /// Routes [`ANY_ADDRESS`] and [`ANY_ADDRESS6`] to a pod, on every node, and makes the pod answer on all their addresses: any
    /// number of endpoints on one interface.
    pub fn give_network(&self, node: usize, pod: usize) -> Result<()> {
        let owner = &self.nodes[node];
        let pod = &owner.pods[pod];
        let host = &pod.host;
        host.netns.ip(&format!(
            "route add local {ANY_ADDRESS} dev lo\nroute add local {ANY_ADDRESS6} dev lo\n"
        ))?;
        for other in &self.nodes {
            let (v4, v6) = if other.number == owner.number {
                (host.v4, host.v6)
            } else {
                (owner.host.v4, owner.host.v6)
            };
            // Over a point-to-point veth the pod is no neighbour in any network, so the route needs the device.
            let device = match (other.number == owner.number, owner.network) {
                (true, PodNetwork::PointToPoint) => format!("dev {} onlink", pod.node_interface),
                _ => String::new(),
            };
            other.host.netns.ip(&format!(
                "route add {ANY_ADDRESS} via {v4} {device}\nroute add {ANY_ADDRESS6} via {v6} {device}\n"
            ))?;
        }
        Ok(())
    }

    /// A pod of a node, both counted from 0.
    pub fn pod(&self, node: usize, pod: usize) -> &Host {
        &self.nodes[node].pods[pod].host
    }

    /// A node, counted from 0.
    pub fn node(&self, node: usize) -> &Host {
        &self.nodes[node].host
    }

    /// Every namespace of the network.
    pub fn namespaces(&self) -> Vec<&Netns> {
        let nodes = self
            .nodes
            .iter()
            .flat_map(|n| n.pods.iter().map(|p| &p.host.netns).chain([&n.host.netns]));
        nodes
            .chain(self.external.iter().map(|h| &h.netns))
            .chain(self.router.iter().flat_map(Router::namespaces))
            .chain([&self.underlay])
            .collect()
    }
}

impl Node {
    /// Counted from 1; its pod networks are 10.244.N.0/24 and fd00:10:244:N::/64.
    pub fn number(&self) -> u8 {
        self.number
    }

    /// The node's own addresses on the pods' bridge, if it has one.
    pub fn bridge_address(&self, like: IpAddr) -> Option<IpAddr> {
        let n = self.number;
        let (v4, v6) = (
            Ipv4Addr::new(10, 244, n, 1),
            Ipv6Addr::new(0xfd00, 0x10, 0x244, n.into(), 0, 0, 0, 1),
        );
        let address = if like.is_ipv4() { v4.into() } else { v6.into() };
        (self.network == PodNetwork::Bridge).then_some(address)
    }

    fn pod_routes(&self) -> String {
        let (n, host) = (self.number, &self.host);
        format!(
            "route add 10.244.{n}.0/24 via {}\nroute add fd00:10:244:{n}::/64 via {}\n",
            host.v4, host.v6
        )
    }

    /// Adds a pod while the network runs.
    pub fn add_pod(&mut self) -> Result<&Pod> {
        self.made += 1;
        let (n, m) = (self.number, self.made);
        let name = format!("pod{n}-{m}");
        let netns = Netns::new(&name)?;
        let address = m + 1;
        let (v4, v6) = (
            Ipv4Addr::new(10, 244, n, address),
            format!("fd00:10:244:{n}::{address:x}").parse()?,
        );
        let host = Host { name, netns, v4, v6 };
        let node_interface = format!("veth{m}");
        let attach = format!(
            "link add {node_interface} type veth peer name eth0 netns {}\n",
            host.netns.name()
        );
        match self.network {
            PodNetwork::Bridge => {
                self.host
                    .netns
                    .ip(&format!("{attach}link set {node_interface} master cni0 up"))?;
                host.netns.ip(&format!(
                    "link set eth0 up
                     addr add {v4}/24 dev eth0
                     addr add {v6}/64 dev eth0 nodad
                     route add default via 10.244.{n}.1
                     route add default via fd00:10:244:{n}::1"
                ))?;
            }
            PodNetwork::PointToPoint => {
                // The address every Calico host interface has; fe80::ecee:eeff:feee:eeee is its link-local form.
                const MAC: &str = "ee:ee:ee:ee:ee:ee";
                self.host.netns.ip(&format!(
                    "{attach}link set {node_interface} address {MAC} up
                     route add {v4}/32 dev {node_interface}
                     route add {v6}/128 dev {node_interface}"
                ))?;
                self.host
                    .netns
                    .sysctl(&format!("net/ipv4/conf/{node_interface}/proxy_arp"), "1")?;
                self.host
                    .netns
                    .sysctl(&format!("net/ipv6/conf/{node_interface}/proxy_ndp"), "1")?;
                host.netns.ip(&format!(
                    "link set eth0 up
                     addr add {v4}/32 dev eth0
                     addr add {v6}/128 dev eth0 nodad
                     route add 169.254.1.1 dev eth0 scope link
                     route add default via 169.254.1.1 dev eth0
                     neigh replace 169.254.1.1 lladdr {MAC} dev eth0 nud permanent
                     route add default via fe80::ecee:eeff:feee:eeee dev eth0"
                ))?;
            }
        }
        self.pods.push(Pod { host, node_interface });
        Ok(&self.pods[self.pods.len() - 1])
    }

    /// Removes its newest pod, interface and all.
    pub fn remove_pod(&mut self) -> Result<()> {
        let Some(pod) = self.pods.pop() else {
            bail!("{} has no pod", self.host.name)
        };
        self.detach(&pod)
    }

    /// Removes a pod by name; later ones move up.
    pub fn remove_pod_named(&mut self, name: &str) -> Result<()> {
        let Some(index) = self.pods.iter().position(|pod| pod.host.name == name) else {
            bail!("{} has no pod {name}", self.host.name)
        };
        let pod = self.pods.remove(index);
        self.detach(&pod)
    }

    fn detach(&self, pod: &Pod) -> Result<()> {
        self.host.netns.ip(&format!("link del {}", pod.node_interface))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::echo::{self, EchoServer};

    /// Without any proxy, everybody reaches everybody under their own addresses.
    fn everybody_reaches_everybody(network: PodNetwork) {
        let shape = Shape {
            network,
            external: true,
            ..Default::default()
        };
        let topology = Topology::new(&shape).unwrap();
        let external = topology.external.as_ref().unwrap();
        let pods = || topology.nodes.iter().flat_map(|n| n.pods.iter().map(|p| &p.host));
        let servers: Vec<EchoServer> = pods()
            .map(|p| EchoServer::start(&p.netns, &p.name, &p.sockets(8080)).unwrap())
            .collect();
        assert_eq!(servers.len(), 4);
        for client in pods().chain(topology.nodes.iter().map(|n| &n.host)).chain([external]) {
            for server in pods().filter(|s| s.name != client.name) {
                for address in server.sockets(8080) {
                    let answer = client
                        .run(|| echo::tcp(address))
                        .unwrap_or_else(|f| panic!("{} -> {address}: {f}", client.name));
                    assert_eq!(answer.server, server.name);
                    if !client.name.starts_with("node") {
                        assert_eq!(answer.client.ip(), client.address(address.ip()));
                    }
                }
            }
        }
    }

    #[test]
    fn pods_on_bridges_reach_each_other() {
        everybody_reaches_everybody(PodNetwork::Bridge);
    }

    #[test]
    fn pods_on_point_to_point_links_reach_each_other() {
        everybody_reaches_everybody(PodNetwork::PointToPoint);
    }

    #[test]
    fn one_pod_answers_on_a_whole_network() {
        for network in [PodNetwork::Bridge, PodNetwork::PointToPoint] {
            let shape = Shape {
                network,
                ..Default::default()
            };
            let topology = Topology::new(&shape).unwrap();
            topology.give_network(1, 0).unwrap();
            let any = ["0.0.0.0:8080".parse().unwrap()];
            let _server = EchoServer::start(&topology.pod(1, 0).netns, "many", &any).unwrap();
            for address in ["10.250.0.1:8080", "10.250.3.77:8080"].map(|a| a.parse().unwrap()) {
                let answer = topology.pod(0, 0).run(|| echo::tcp(address)).unwrap();
                assert_eq!(answer.local, address);
            }
        }
    }

    #[test]
    fn pods_come_and_go() {
        let mut topology = Topology::new(&Shape {
            nodes: 1,
            pods_per_node: 1,
            ..Default::default()
        })
        .unwrap();
        let name = topology.nodes[0].add_pod().unwrap().host.netns.path().to_owned();
        assert!(name.exists());
        topology.nodes[0].remove_pod().unwrap();
        assert!(!name.exists());
    }
}
