//! The shared cluster: three nodes in two zones, the first and the third with bridged pods, the second with routed ones, a router
//! and two outsiders; every service of the table; and what the plans of each node are, computed here from the very same folder.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use proxy_agent::model::{Change, ClusterState};
use proxy_agent::plan::trace::View;
use proxy_agent::plan::{ServicePortName, ServicePortPlan};
use proxy_agent::source::convert::Converter;
use proxy_agent::source::{self, Event};
use proxy_tests::echo::EchoServer;
use proxy_tests::manifests;
use proxy_tests::shared::{Fixture, Shared, Turn};
use proxy_tests::topology::router::Router;
use proxy_tests::topology::{CLUSTER_CIDR, Host, PodNetwork, Shape, Topology};
use proxy_tests::world::{ECHO, Setup, World};

use super::services::{self, PORT, Spec, ZONES};

/// The host that a proxied load-balancer address belongs to.
pub(crate) const BALANCER: &str = "balancer";
/// The outsider that it runs on.
pub(crate) const BALANCER_HOST: usize = 1;
/// An address that the first node gets while its agent runs (S85).
const SECONDARY: [&str; 2] = ["192.168.56.101", "fd00:56::101"];

/// A node as the tracer sees it.
pub(crate) struct Planned {
    pub(crate) plans: Vec<(ServicePortName, ServicePortPlan)>,
    pub(crate) view: View,
}

/// The cluster. The order of the fields is the order in which things go.
pub(crate) struct Cluster {
    pub(crate) world: World,
    pub(crate) specs: Vec<Spec>,
    pub(crate) nodes: Vec<Planned>,
    /// Who has which address.
    pub(crate) servers: BTreeMap<IpAddr, String>,
    _others: Vec<EchoServer>,
}

static SHARED: Shared<Cluster> = Shared::new();

/// Waits for the test's turn with the cluster.
pub(crate) fn turn() -> Turn<Cluster> {
    SHARED.turn()
}

impl Fixture for Cluster {
    fn after_failure(&mut self) {
        for agent in &self.world.agents {
            let log = agent.log();
            let _ = writeln!(std::io::stderr(), "--- log of the agent of {}\n{log}---", agent.node());
        }
    }

    fn build() -> Self {
        let mut world = World::new(&Setup {
            shape: Shape {
                nodes: 3,
                networks: vec![PodNetwork::Bridge, PodNetwork::PointToPoint, PodNetwork::Bridge],
                router: true,
                ..Default::default()
            },
            options: vec!["--cluster-cidr", CLUSTER_CIDR],
            without_agents: true,
        })
        .unwrap();
        let specs = services::all();
        let topology = &world.topology;
        let mut servers = BTreeMap::new();
        let mut others = Vec::new();
        for (host, _) in world.pods() {
            servers.extend(host.sockets(ECHO).map(|s| (s.ip(), host.name.clone())));
        }
        for node in &topology.nodes {
            let host = &node.host;
            servers.extend(host.sockets(ECHO).map(|s| (s.ip(), host.name.clone())));
            others.push(EchoServer::start(&host.netns, &host.name, &host.sockets(ECHO)).unwrap());
            // Refusals of the host itself must not be rationed.
            host.netns.sysctl("net/ipv4/icmp_ratelimit", "0").unwrap();
            host.netns.sysctl("net/ipv6/icmp/ratelimit", "0").unwrap();
        }
        let router = topology.router.as_ref().unwrap();
        for network in ["10.96.0.0/16", "fd00:96::/112", "203.0.113.0/24", "2001:db8:113::/64"] {
            router.serve(network).unwrap();
        }
        for is_v4 in [true, false] {
            for spec in specs.iter().filter(|spec| spec.is_proxied) {
                let address = spec.addresses(is_v4, topology).balancer;
                router.give_address(BALANCER_HOST, address).unwrap();
                let socket = SocketAddr::new(address, PORT);
                others.push(EchoServer::start(&router.outsiders[BALANCER_HOST].netns, BALANCER, &[socket]).unwrap());
                servers.insert(address, BALANCER.to_owned());
            }
        }
        let mut objects: Vec<_> = specs.iter().flat_map(|spec| spec.objects(topology)).collect();
        for (node, zone) in topology.nodes.iter().zip(ZONES) {
            let host = &node.host;
            objects.push(manifests::node(&host.name, zone, &[host.v4.into(), host.v6.into()]));
        }
        world.write("table", &objects).unwrap();
        world.start_agents().unwrap();
        world
            .topology
            .node(0)
            .netns
            .ip(&format!(
                "addr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad",
                SECONDARY[0], SECONDARY[1]
            ))
            .unwrap();
        let nodes = (0..3).map(|node| Planned::new(&world, node)).collect();
        Self {
            world,
            specs,
            nodes,
            servers,
            _others: others,
        }
    }
}

impl Cluster {
    /// The router.
    pub(crate) fn router(&self) -> &Router {
        self.world.topology.router.as_ref().unwrap()
    }

    /// A service by name.
    pub(crate) fn spec(&self, name: &str) -> &Spec {
        self.specs.iter().find(|spec| spec.name == name).unwrap()
    }

    /// The node that has this address.
    pub(crate) fn owner(&self, ip: IpAddr) -> Option<usize> {
        let mut nodes = self.nodes.iter();
        nodes.position(|node| node.view.node_port_addresses.contains(&ip))
    }
}

/// The first node's address that came later.
pub(crate) fn secondary(like: IpAddr) -> IpAddr {
    SECONDARY[usize::from(like.is_ipv6())].parse().unwrap()
}

impl Planned {
    fn new(world: &World, number: usize) -> Self {
        let node = &world.topology.nodes[number];
        let Host { v4, v6, .. } = node.host;
        let own = [IpAddr::from(v4), v6.into()];
        let bridge = own.iter().filter_map(|ip| node.bridge_address(*ip));
        let mut node_port_addresses: Vec<IpAddr> = own.iter().copied().chain(bridge).collect();
        if number == 0 {
            node_port_addresses.extend(own.map(secondary));
        }
        Self {
            plans: plans(world.manifests.dir(), &node.host.name),
            view: View {
                node_port_addresses,
                has_pods: [true, true],
                masquerade_all: false,
            },
        }
    }
}

/// What an agent of this name plans for the folder.
fn plans(dir: &Path, node: &str) -> Vec<(ServicePortName, ServicePortPlan)> {
    let (tx, mut rx) = tokio::sync::mpsc::channel(1024);
    source::manifests::watch(dir.to_owned(), Converter::new(node), tx).unwrap();
    let mut state = ClusterState::default();
    while !state.is_complete() {
        match rx.blocking_recv().unwrap() {
            Event::Change(change) => {
                assert!(!matches!(change, Change::Node(None)), "{node} has no Node object");
                state.apply(change);
            }
            Event::Warning(warning) => panic!("{warning}"),
        }
    }
    let changes = state.take_changes();
    changes
        .into_iter()
        .filter_map(|(name, plan)| Some((name, plan?)))
        .collect()
}

/// A node's pods, and the number of a node by the name of one of its hosts.
pub(crate) fn host<'t>(topology: &'t Topology, name: &str) -> (&'t Host, usize) {
    let nodes = topology.nodes.iter().enumerate();
    let mut hosts = nodes.flat_map(|(number, node)| {
        let pods = node.pods.iter().map(|pod| &pod.host);
        pods.chain([&node.host]).map(move |host| (host, number))
    });
    hosts.find(|(host, _)| host.name == name).unwrap()
}
