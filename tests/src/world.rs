//! A small cluster that is ready for requests: network, an echo server in every pod, an agent on every node, one folder of
//! manifests for all. Used by the namespace tests; each test has its own.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use proxy_common::addr::Protocol;
use serde_json::Value;
use tempfile::TempDir;

use crate::agent::{Agent, Source};
use crate::echo::{EchoServer, Outcome};
use crate::manifests::{self, Manifests, Port, port};
use crate::topology::{Host, Shape, Topology};
use crate::{leftovers, maps, process};

/// The service that most tests use, in both families.
pub const VIPS: [&str; 2] = ["10.96.0.10:80", "[fd00:96::a]:80"];
/// Its addresses as they stand in the Service.
pub const CLUSTER_IPS: [&str; 2] = ["10.96.0.10", "fd00:96::a"];
/// Its ports: the same number for both protocols (S25).
pub const SERVICE_PORTS: [Port; 2] = [port("tcp", "TCP", 80), port("udp", "UDP", 80)];
/// The ports of its endpoints.
pub const ENDPOINT_PORTS: [Port; 2] = [port("tcp", "TCP", ECHO), port("udp", "UDP", ECHO)];
/// Where every pod's echo server listens.
pub const ECHO: u16 = 8080;
/// How long a change may take to arrive in every node's maps. Far above what it takes: a bound for a broken agent only.
pub const ARRIVAL: Duration = Duration::from_secs(10);

/// What to build.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    /// The network.
    pub shape: Shape,
    /// Further arguments of every `proxy-agent run`.
    pub options: Vec<&'static str>,
    /// Build everything but start no agent yet.
    pub without_agents: bool,
}

/// The cluster. The order of the fields is the order in which things go.
pub struct World {
    /// One per node.
    pub agents: Vec<Agent>,
    /// One per pod.
    pub servers: Vec<EchoServer>,
    /// What the agents read.
    pub manifests: Manifests,
    /// The network.
    pub topology: Topology,
    options: Vec<&'static str>,
    _state: TempDir,
}

/// Sends `count` requests, each of which must be answered, and gives the names of those who did.
#[track_caller]
pub fn answered_by(count: usize, what: &str, request: impl Fn() -> Outcome) -> BTreeSet<String> {
    let answer = |i| request().unwrap_or_else(|failure| panic!("{what}, request {i} of {count}: {failure}"));
    (0..count).map(|i| answer(i).server).collect()
}

/// A set of names, to compare with [`answered_by`].
pub fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// [`VIPS`], parsed.
pub fn vips() -> [SocketAddr; 2] {
    VIPS.map(|vip| vip.parse().expect("a constant"))
}

impl World {
    /// Builds the cluster.
    pub fn new(setup: &Setup) -> Result<Self> {
        let topology = Topology::new(&setup.shape)?;
        let state = leftovers::temp_dir("world")?;
        let mut world = Self {
            agents: Vec::new(),
            servers: Vec::new(),
            manifests: Manifests::new(state.path())?,
            topology,
            options: setup.options.clone(),
            _state: state,
        };
        for node in 0..world.topology.nodes.len() {
            for pod in 0..world.topology.nodes[node].pods.len() {
                world.serve(node, pod)?;
            }
        }
        if !setup.without_agents {
            world.start_agents()?;
        }
        Ok(world)
    }

    /// Starts an agent on every node that has none, all at once: most of their start is the verifier's work.
    pub fn start_agents(&mut self) -> Result<()> {
        self.start_agents_with(|_| ())
    }

    /// [`World::start_agents`], after something was done to each.
    pub fn start_agents_with(&mut self, change: impl Fn(&mut Agent)) -> Result<()> {
        let source = Source::Manifests(self.manifests.dir().to_owned());
        let mut agents = Vec::new();
        for node in &self.topology.nodes[self.agents.len()..] {
            let mut agent = Agent::prepare(&node.host.name, &node.host.netns, &source, &self.options)?;
            change(&mut agent);
            agents.push(agent);
        }
        std::thread::scope(|scope| {
            let starting: Vec<_> = agents.iter_mut().map(|agent| scope.spawn(|| agent.launch())).collect();
            starting
                .into_iter()
                .try_for_each(|s| s.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })?;
        self.agents.extend(agents);
        Ok(())
    }

    /// Starts the echo server of a pod.
    pub fn serve(&mut self, node: usize, pod: usize) -> Result<()> {
        let host = self.topology.pod(node, pod);
        self.servers
            .push(EchoServer::start(&host.netns, &host.name, &host.sockets(ECHO))?);
        Ok(())
    }

    /// All pods with the names of their nodes.
    pub fn pods(&self) -> Vec<(&Host, &str)> {
        let nodes = self.topology.nodes.iter();
        nodes
            .flat_map(|node| node.pods.iter().map(|pod| (&pod.host, node.host.name.as_str())))
            .collect()
    }

    /// Writes the usual service with these pods as its endpoints, and waits until every agent has it in its maps.
    pub fn publish(&self, pods: &[&str]) -> Result<()> {
        let endpoints = self.endpoints_of(pods);
        let mut objects = vec![manifests::service("web", &CLUSTER_IPS, &SERVICE_PORTS)];
        objects.extend(manifests::slices("web", &ENDPOINT_PORTS, &endpoints));
        self.manifests.write("web", &objects)?;
        self.wait_published(&endpoints)
    }

    /// Writes any objects into a file of the folder.
    pub fn write(&self, file: &str, objects: &[Value]) -> Result<()> {
        self.manifests.write(file, objects)
    }

    /// Addresses of pods by name, each with the name of its node.
    pub fn endpoints_of(&self, pods: &[&str]) -> Vec<(IpAddr, &str)> {
        let all = self.pods();
        let chosen = all.into_iter().filter(|(host, _)| pods.contains(&host.name.as_str()));
        chosen
            .flat_map(|(host, node)| [(IpAddr::V4(host.v4), node), (IpAddr::V6(host.v6), node)])
            .collect()
    }

    fn wait_published(&self, endpoints: &[(IpAddr, &str)]) -> Result<()> {
        for vip in vips() {
            let family = endpoints.iter().filter(|(ip, _)| ip.is_ipv4() == vip.is_ipv4());
            let backends: Vec<_> = family.map(|(ip, _)| SocketAddr::new(*ip, ECHO)).collect();
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                self.wait_for(vip, protocol, Some(&backends))?;
            }
        }
        Ok(())
    }

    /// Waits until every agent's maps have exactly these backends behind a frontend, or with `None` no such frontend.
    pub fn wait_for(&self, vip: SocketAddr, protocol: Protocol, backends: Option<&[SocketAddr]>) -> Result<()> {
        let want = backends.map(|b| {
            let mut sorted = b.to_vec();
            sorted.sort_unstable();
            sorted
        });
        for agent in &self.agents {
            let mut last = None;
            let arrived = process::wait_until(ARRIVAL, || {
                last = Some(maps::backends(&agent.bpf_dir(), vip, protocol));
                matches!(&last, Some(Ok(found)) if *found == want).then_some(())
            });
            if arrived.is_none() {
                let found = last.context("asked at least once")?;
                bail!(
                    "{}: {vip} {protocol} should have {want:?} after {ARRIVAL:?} and has {found:?}",
                    agent.node()
                );
            }
        }
        Ok(())
    }
}
