//! A row of the table: who dials what over which protocol.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};

use proxy_common::addr::Protocol;
use proxy_tests::topology::Host;

use super::cluster::{self, BALANCER_HOST, Cluster, secondary};
use super::services::{PORT, Spec};

/// Who dials. Nodes and outsiders are counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A pod, by name.
    Pod(&'static str),
    /// A process of a node in the agent's cgroup: the socket programs see it first. So is a pod on the host network.
    Host(usize),
    /// A process of a node in another cgroup: only the packet programs see it.
    OtherHost(usize),
    /// A host behind the router. The first one's service traffic enters at the first node, the second one's at the second.
    Outsider(usize),
}

/// Everybody who dials.
pub(crate) const SOURCES: [Source; 11] = [
    Source::Pod("pod1-1"),
    Source::Pod("pod1-2"),
    Source::Pod("pod2-1"),
    Source::Pod("pod2-2"),
    Source::Pod("pod3-1"),
    Source::Host(0),
    Source::Host(1),
    Source::OtherHost(0),
    Source::OtherHost(2),
    Source::Outsider(0),
    Source::Outsider(1),
];

/// What is dialled of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Via {
    ClusterIp,
    Balancer,
    ExternalIp,
    /// The node port at a node's main address.
    NodePort(usize),
    /// The node port at the address of the first node's bridge.
    BridgePort,
    /// The node port at an address that came while the agent ran (S85).
    SecondaryPort,
    /// A port that the cluster IP does not define (S77).
    Undefined,
    /// A port of a node that no service has (S93).
    Unregistered(usize),
}

/// How a request is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Tcp,
    Udp,
    /// UDP from a socket that is not connected.
    UdpTo,
}

/// A row.
#[derive(Clone, Debug)]
pub(crate) struct Flow {
    pub(crate) source: Source,
    pub(crate) service: &'static str,
    pub(crate) via: Via,
    pub(crate) request: Request,
    pub(crate) target: SocketAddr,
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            source,
            service,
            via,
            request,
            target,
        } = self;
        write!(f, "{source:?} {request:?} -> {service} {via:?} {target}")
    }
}

impl Request {
    pub(crate) fn protocol(self) -> Protocol {
        match self {
            Self::Tcp => Protocol::Tcp,
            Self::Udp | Self::UdpTo => Protocol::Udp,
        }
    }
}

impl Source {
    /// Its host and the number of its node, if it is on one.
    pub(crate) fn host(self, cluster: &Cluster) -> (&Host, Option<usize>) {
        let topology = &cluster.world.topology;
        match self {
            Self::Pod(name) => {
                let (host, node) = cluster::host(topology, name);
                (host, Some(node))
            }
            Self::Host(node) | Self::OtherHost(node) => (topology.node(node), Some(node)),
            Self::Outsider(number) => (&cluster.router().outsiders[number], None),
        }
    }

    /// A client port that nobody has used so far: what a connection leaves behind in the tables must not meet another one, which
    /// is what other tests are about.
    pub(crate) fn next_port(self) -> u16 {
        const EACH: u16 = 5_500;
        static USED: [AtomicU16; SOURCES.len()] = [const { AtomicU16::new(0) }; SOURCES.len()];
        let number = SOURCES.iter().position(|source| *source == self).unwrap();
        4_000 + EACH * number as u16 + USED[number].fetch_add(1, Ordering::Relaxed) % EACH
    }

    /// Runs `body` as this source.
    pub(crate) fn run<T: Send>(self, cluster: &Cluster, body: impl FnOnce() -> T + Send) -> T {
        match self {
            Self::Host(node) => cluster.world.agents[node].run(body),
            _ => self.host(cluster).0.run(body),
        }
    }

    /// How it may ask. Only sockets of the node are translated as such, and only they see a difference between the ways of UDP.
    pub(crate) fn requests(self) -> &'static [Request] {
        match self {
            Self::Host(_) => &[Request::Tcp, Request::Udp, Request::UdpTo],
            _ => &[Request::Tcp, Request::Udp],
        }
    }
}

impl Via {
    /// The address and port.
    pub(crate) fn target(self, cluster: &Cluster, spec: &Spec, is_v4: bool) -> SocketAddr {
        let topology = &cluster.world.topology;
        let addresses = spec.addresses(is_v4, topology);
        let like = addresses.cluster;
        let node = |number: usize| -> IpAddr { topology.node(number).address(like) };
        let (ip, port) = match self {
            Self::ClusterIp => (like, PORT),
            Self::Balancer => (addresses.balancer, PORT),
            Self::ExternalIp => (addresses.external, PORT),
            Self::NodePort(number) => (node(number), spec.node_port()),
            Self::BridgePort => (topology.nodes[0].bridge_address(like).unwrap(), spec.node_port()),
            Self::SecondaryPort => (secondary(like), spec.node_port()),
            Self::Undefined => (like, PORT + 1),
            Self::Unregistered(number) => (node(number), 31_999),
        };
        SocketAddr::new(ip, port)
    }
}

/// What of a service is dialled in the big table. The addresses of single nodes differ little, so not every service has them all.
fn vias(spec: &Spec) -> Vec<Via> {
    let mut vias = vec![Via::ClusterIp, Via::Balancer, Via::ExternalIp];
    vias.extend((0..3).map(Via::NodePort));
    if ["everywhere", "everywhere-local", "only-routed-local", "none"].contains(&spec.name) {
        vias.extend([Via::BridgePort, Via::SecondaryPort]);
    }
    if ["everywhere", "none"].contains(&spec.name) {
        vias.push(Via::Undefined);
    }
    if spec.name == "everywhere" {
        vias.extend([Via::Unregistered(0), Via::Unregistered(1)]);
    }
    vias
}

/// All rows of one source.
pub(crate) fn table(cluster: &Cluster, source: Source) -> Vec<Flow> {
    let mut flows = Vec::new();
    for spec in &cluster.specs {
        for via in vias(spec) {
            // The balancer itself has no need of anybody.
            if spec.is_proxied && via == Via::Balancer && source == Source::Outsider(BALANCER_HOST) {
                continue;
            }
            for is_v4 in [true, false] {
                let target = via.target(cluster, spec, is_v4);
                flows.extend(source.requests().iter().map(|request| Flow {
                    source,
                    service: spec.name,
                    via,
                    request: *request,
                    target,
                }));
            }
        }
    }
    flows
}
