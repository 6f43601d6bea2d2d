//! What is measured on: one cluster whose nodes differ in nothing but their proxy, all standing at the same time.
//!
//! Every node has a pod for the client and one for the server, each behind a veth of its own and routed, the proxy in the node's
//! namespace. One more node, with a pod that nobody needs to run, is where a backend on another machine is; a host outside the cluster
//! dials node ports. The endpoints of all Services are in one network that every node routes to its own server, so that one set of
//! objects, from one stand-in for an API server, serves all contenders alike.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use proxy_tests::manifests::{self, port};
use proxy_tests::netns::Netns;
use proxy_tests::standin::objects::{self, Size};
use proxy_tests::standin::{Options, StandIn};
use proxy_tests::topology::{GATEWAY, Host, PodNetwork, Shape, Topology};
use proxy_tests::xdp::Ready;
use serde_json::json;

use crate::Run;
use crate::conntrack;
use crate::contenders::{Kind, Proxy, UPLINK};
use crate::flood::{Path, Place};
use crate::load::{self, Server};

/// Pods of a node.
const CLIENT: usize = 0;
const SERVER: usize = 1;
/// Where the endpoints of the stand-in's Services are; see [`objects::endpoint_ip`].
const ENDPOINTS: &str = "10.128.0.0/10";
/// The Service that is there from the beginning, and its endpoint.
const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const WEB_ENDPOINT: Ipv4Addr = Ipv4Addr::new(10, 191, 0, 1);
const WEB_NODE_PORT: u16 = 30_080;
/// The Service whose endpoint is on another machine.
const REMOTE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 11);
const REMOTE_NODE_PORT: u16 = 30_081;
/// So many Services are dialled in turn, spread over all: where one stands in a chain of rules must not decide.
const DIALLED: u32 = 64;
/// How long a proxy may take to serve at first.
const START: Duration = Duration::from_secs(60);
/// How long one try may take while a proxy is not ready.
const TRY: Duration = Duration::from_millis(200);

/// Someone who is measured, on a node of its own.
pub(crate) struct Contender {
    pub(crate) kind: Kind,
    pub(crate) proxy: Proxy,
    node: usize,
    /// Why it is measured no more.
    pub(crate) out: Option<String>,
}

/// How a client gets to the server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Way {
    /// From the pod, by cluster IP.
    ClusterIp,
    /// From the host outside, by node port.
    NodePort,
}

/// The cluster. The order of the fields is the order in which things go.
pub(crate) struct Site {
    pub(crate) contenders: Vec<Contender>,
    _servers: Vec<Server>,
    api: StandIn,
    topology: Topology,
    /// Services of the stand-in; one more is there from the beginning.
    generated: u32,
}

impl Site {
    pub(crate) fn new(run: &Run, kinds: &[Kind]) -> Result<Self> {
        run.step(&format!("{} nodes, one for each contender, and one more", kinds.len()));
        let topology = Topology::new(&Shape {
            nodes: u8::try_from(kinds.len() + 1)?,
            pods_per_node: 2,
            network: PodNetwork::PointToPoint,
            external: true,
            ..Default::default()
        })?;
        let size = Size {
            services: 0,
            endpoints: 1,
        };
        let api = StandIn::start(
            &topology.underlay,
            GATEWAY.into(),
            &topology.node(0).name,
            size,
            Options::default(),
        )?;
        for node in &topology.nodes[1..] {
            api.add(&manifests::node(&node.host.name, "zone-a", &[node.host.v4.into()]));
        }
        publish(&api, "web", WEB, WEB_NODE_PORT, WEB_ENDPOINT, "elsewhere");
        let mut servers = Vec::new();
        for node in 0..kinds.len() {
            route_endpoints(&topology, node)?;
            tune(&topology.pod(node, CLIENT).netns, &topology.pod(node, SERVER).netns)?;
            servers.push(Server::start(&topology.pod(node, SERVER).netns, objects::TARGET_PORT)?);
        }
        let external = topology.external.as_ref().context("a host outside")?;
        tune(&external.netns, &external.netns)?;
        let mut site = Self {
            contenders: Vec::new(),
            _servers: servers,
            api,
            topology,
            generated: 0,
        };
        for (node, kind) in kinds.iter().enumerate() {
            run.check()?;
            run.step(&format!("starting: {}", kind.name()));
            let proxy = Proxy::start(*kind, site.topology.node(node), &site.api.kubeconfig())?;
            site.contenders.push(Contender {
                kind: *kind,
                proxy,
                node,
                out: None,
            });
        }
        site.wait_for(run, START)?;
        for contender in &site.contenders {
            ensure!(
                contender.out.is_none(),
                "{} does not serve a single Service after {START:?}; it said\n{}",
                contender.kind.name(),
                contender.proxy.log()
            );
        }
        Ok(site)
    }

    /// Makes the cluster larger, and waits so long until everybody serves it. Who does not is out, and its process ends.
    pub(crate) fn grow(&mut self, run: &Run, services: u32, limit: Duration) -> Result<()> {
        let generated = services.saturating_sub(1);
        if generated > self.generated {
            run.step(&format!("growing to {services} Services"));
            self.api.grow(generated);
            self.generated = generated;
            self.wait_for(run, limit)?;
        }
        Ok(())
    }

    fn wait_for(&mut self, run: &Run, limit: Duration) -> Result<()> {
        let began = Instant::now();
        let mut waiting: Vec<usize> = (0..self.contenders.len()).collect();
        waiting.retain(|index| self.contenders[*index].out.is_none());
        run.wait(limit, || {
            waiting.retain(|index| {
                let contender = &self.contenders[*index];
                let serves = self.serves(contender);
                if serves && began.elapsed() > Duration::from_secs(1) {
                    run.step(&format!(
                        "{} serves after {:.1} s",
                        contender.kind.name(),
                        began.elapsed().as_secs_f64()
                    ));
                }
                !serves
            });
            waiting.is_empty()
        })?;
        for index in waiting {
            let contender = &mut self.contenders[index];
            let why = format!("not programmed within {} s", limit.as_secs());
            run.step(&format!("{}: {why}", contender.kind.name()));
            contender.out = Some(why);
            // It would go on to take time from the others.
            contender.proxy = Proxy::None;
        }
        Ok(())
    }

    /// Everything that will be dialled is answered.
    fn serves(&self, contender: &Contender) -> bool {
        [Way::ClusterIp, Way::NodePort].into_iter().all(|way| {
            let (targets, client) = (self.targets(contender, way), self.client(contender, way).clone());
            // The newest first: it is the last to be served.
            let ask = move || targets.iter().rev().all(|target| load::once(*target, TRY).is_ok());
            let asking = match way {
                Way::ClusterIp => contender.proxy.spawn_in_pod(&client, ask),
                Way::NodePort => client.spawn(ask),
            };
            asking.join().unwrap_or(false)
        })
    }

    /// What a client dials to measure a contender.
    pub(crate) fn targets(&self, contender: &Contender, way: Way) -> Vec<SocketAddrV4> {
        let (node, direct) = (self.topology.node(contender.node), contender.kind.has_no_proxy());
        let server = self.topology.pod(contender.node, SERVER).v4;
        match way {
            Way::NodePort if direct => vec![SocketAddrV4::new(server, objects::TARGET_PORT)],
            Way::NodePort => vec![SocketAddrV4::new(node.v4, WEB_NODE_PORT)],
            Way::ClusterIp => self.services().map(|service| self.service(service, direct)).collect(),
        }
    }

    /// Those that are dialled: the first one, or a sample of those that came later, the last one among them.
    fn services(&self) -> impl Iterator<Item = Option<u32>> + use<> {
        let (all, some) = (self.generated, self.generated.min(DIALLED));
        let first = (all == 0).then_some(None);
        first
            .into_iter()
            .chain((1..=some).map(move |i| Some((u64::from(all) * u64::from(i) / u64::from(some)) as u32 - 1)))
    }

    fn service(&self, service: Option<u32>, direct: bool) -> SocketAddrV4 {
        let size = Size {
            services: self.generated,
            endpoints: 1,
        };
        let (vip, endpoint) = service.map_or((WEB, WEB_ENDPOINT), |number| {
            (objects::cluster_ip(number), objects::endpoint_ip(size, number, 0))
        });
        if direct {
            SocketAddrV4::new(endpoint, objects::TARGET_PORT)
        } else {
            SocketAddrV4::new(vip, objects::PORT)
        }
    }

    /// Where the client is.
    pub(crate) fn client(&self, contender: &Contender, way: Way) -> &Netns {
        match way {
            Way::ClusterIp => &self.topology.pod(contender.node, CLIENT).netns,
            Way::NodePort => &self.outside().netns,
        }
    }

    /// Where the proxy is.
    pub(crate) fn node(&self, contender: &Contender) -> &Host {
        self.topology.node(contender.node)
    }

    fn outside(&self) -> &Host {
        self.topology
            .external
            .as_ref()
            .expect("this network has a host outside")
    }

    /// Adds the Service with a backend on another machine, and gives the kernel's neighbour tables a reason to know that machine.
    pub(crate) fn add_remote(&self, run: &Run) -> Result<()> {
        let remote = self.topology.nodes.last().context("one more node")?;
        let backend = &remote.pods[CLIENT].host;
        let server = Server::start(&backend.netns, objects::TARGET_PORT)?;
        publish(
            &self.api,
            "remote",
            REMOTE,
            REMOTE_NODE_PORT,
            backend.v4,
            &remote.host.name,
        );
        let outside = self.outside().netns.clone();
        // For connections of a stack; the measurement brings programs of its own.
        let by_xdp = self.contenders.iter().filter(|contender| contender.kind == Kind::Xdp);
        let peers: Vec<_> = by_xdp
            .map(|contender| (&self.topology.underlay, self.node(contender).name.as_str()))
            .collect();
        let _ready = Ready::make(&peers, &[(&outside, UPLINK), (&backend.netns, UPLINK)])?;
        for contender in &self.contenders {
            let target = match contender.kind.has_no_proxy() {
                true => SocketAddrV4::new(backend.v4, objects::TARGET_PORT),
                false => SocketAddrV4::new(self.node(contender).v4, REMOTE_NODE_PORT),
            };
            let served = run.wait(START, || outside.run(|| load::once(target, TRY)).is_ok())?;
            ensure!(served, "{} does not serve {target}", contender.kind.name());
        }
        drop(server);
        Ok(())
    }

    /// Small packets of a pod to another pod of the node, or from outside to a pod of another node.
    pub(crate) fn path(&self, contender: &Contender, way: Way) -> Path {
        let topology = &self.topology;
        let (node, direct) = (&topology.nodes[contender.node], contender.kind.has_no_proxy());
        let place = |netns: &Netns, interface: &str| Place {
            netns: netns.clone(),
            interface: interface.to_owned(),
        };
        let uplink = place(&node.host.netns, UPLINK);
        match way {
            Way::ClusterIp => {
                let [client, server] = [CLIENT, SERVER].map(|pod| &node.pods[pod]);
                Path {
                    source: place(&client.host.netns, UPLINK),
                    entrance: place(&node.host.netns, &client.node_interface),
                    exit: place(&server.host.netns, UPLINK),
                    from: client.host.v4,
                    to: if direct {
                        (WEB_ENDPOINT, objects::TARGET_PORT)
                    } else {
                        (WEB, objects::PORT)
                    },
                }
            }
            Way::NodePort => {
                let remote = topology.pod(topology.nodes.len() - 1, CLIENT);
                let beyond = place(&topology.underlay, &node.host.name);
                Path {
                    source: beyond.clone(),
                    entrance: uplink,
                    exit: beyond,
                    from: self.outside().v4,
                    to: if direct {
                        (remote.v4, objects::TARGET_PORT)
                    } else {
                        (node.host.v4, REMOTE_NODE_PORT)
                    },
                }
            }
        }
    }

    /// Empties the kernel's table of connections on a node with kube-proxy. It remembers a closed one for two minutes and is soon full at
    /// this rate, which would be all that is measured.
    pub(crate) fn forget_connections(&self, contender: &Contender) -> Result<()> {
        if matches!(contender.kind, Kind::Nftables | Kind::Iptables) {
            self.node(contender).run(conntrack::flush)?;
        }
        Ok(())
    }

    /// Stops every proxy but that of one contender, until the guard is dropped.
    pub(crate) fn alone(&self, index: usize) -> Alone<'_> {
        for (other, contender) in self.contenders.iter().enumerate() {
            contender.proxy.freeze(other != index);
        }
        Alone(self)
    }
}

/// While it lives, one proxy has the machine for itself.
pub(crate) struct Alone<'s>(&'s Site);

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.0
            .contenders
            .iter()
            .for_each(|contender| contender.proxy.freeze(false));
    }
}

/// A Service with a node port, both for TCP and UDP, and one endpoint.
fn publish(api: &StandIn, name: &str, vip: Ipv4Addr, node_port: u16, endpoint: Ipv4Addr, node: &str) {
    let ports = |number| [port("tcp", "TCP", number), port("udp", "UDP", number)];
    let mut service = manifests::service(name, &[&vip.to_string()], &ports(objects::PORT));
    service["spec"]["type"] = json!("NodePort");
    for index in [0, 1] {
        service["spec"]["ports"][index]["nodePort"] = json!(node_port);
    }
    let endpoints = vec![manifests::endpoint(endpoint, node)];
    let slice = manifests::slice(name, name, "IPv4", &ports(objects::TARGET_PORT), endpoints);
    api.add(&service);
    api.add(&slice);
}

/// A node sends all endpoints to its own server.
fn route_endpoints(topology: &Topology, node: usize) -> Result<()> {
    let pod = &topology.nodes[node].pods[SERVER];
    pod.host.netns.ip(&format!("route add local {ENDPOINTS} dev lo\n"))?;
    let route = format!(
        "route add {ENDPOINTS} via {} dev {} onlink\n",
        pod.host.v4, pod.node_interface
    );
    topology.node(node).netns.ip(&route)
}

/// Room for connections that are opened as fast as it goes.
fn tune(client: &Netns, server: &Netns) -> Result<()> {
    client.sysctl("net/ipv4/ip_local_port_range", "10000 60999")?;
    // A lost packet must not stop a client for minutes.
    client.sysctl("net/ipv4/tcp_syn_retries", "2")?;
    // The server closes first, so this is where closed connections are remembered.
    server.sysctl("net/ipv4/tcp_max_tw_buckets", "8192")
}
