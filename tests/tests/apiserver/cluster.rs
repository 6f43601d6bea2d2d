//! The shared cluster: one node with four pods, an API server on the underlay, and the node's agent, which runs under its own
//! service account with the rules of `deploy/proxy-agent.yaml`.

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use proxy_common::addr::Protocol;
use proxy_tests::agent::{Agent, Source};
use proxy_tests::apiserver::ApiServer;
use proxy_tests::echo::{self, EchoServer, Failure};
use proxy_tests::manifests::{self, Port, port};
use proxy_tests::shared::{Fixture, Shared, Turn};
use proxy_tests::topology::{CLUSTER_CIDR, GATEWAY, Host, Shape, Topology};
use proxy_tests::traffic::{self, Running};
use proxy_tests::{maps, process};
use serde_json::{Value, json};

/// Where every pod's echo server listens.
pub(crate) const ECHO: u16 = 8080;
/// The port of the services, and of their endpoints.
pub(crate) const HTTP: Port = port("http", "TCP", 80);
pub(crate) const TARGET: Port = port("http", "TCP", ECHO);
/// How long a change may take. Watches that were interrupted are tried again with growing pauses of up to half a minute.
pub(crate) const ARRIVAL: Duration = Duration::from_secs(45);
/// The pod that all requests come from, and those that answer.
pub(crate) const CLIENT: usize = 0;
pub(crate) const ALPHA: usize = 1;
pub(crate) const BETA: usize = 2;
/// The pod that answers on a whole network of addresses.
const MANY: usize = 3;

/// The order of the fields is the order in which things go.
pub(crate) struct Cluster {
    pub(crate) agent: Agent,
    pub(crate) api: ApiServer,
    _servers: Vec<EchoServer>,
    topology: Topology,
}

static SHARED: Shared<Cluster> = Shared::new();

/// Waits for the test's turn with the cluster.
pub(crate) fn turn() -> Turn<Cluster> {
    SHARED.turn()
}

/// A file of the repository.
pub(crate) fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

impl Fixture for Cluster {
    fn after_failure(&mut self) {
        let _ = writeln!(std::io::stderr(), "--- log of the agent\n{}---", self.agent.log());
        // The next test expects both.
        self.api.stop();
        let _ = self.api.launch();
        self.agent.kill();
        let _ = self.agent.launch();
    }

    fn build() -> Self {
        let shape = Shape {
            nodes: 1,
            pods_per_node: 4,
            ..Default::default()
        };
        let topology = Topology::new(&shape).unwrap();
        topology.give_network(0, MANY).unwrap();
        let mut servers: Vec<_> = [ALPHA, BETA]
            .map(|pod| topology.pod(0, pod))
            .iter()
            .map(|pod| EchoServer::start(&pod.netns, &pod.name, &pod.sockets(ECHO)).unwrap())
            .collect();
        let any = [SocketAddr::from(([0, 0, 0, 0], ECHO))];
        servers.push(EchoServer::start(&topology.pod(0, MANY).netns, "many", &any).unwrap());
        let api = ApiServer::start(&topology.underlay, GATEWAY.into()).unwrap();
        // The server makes its own namespaces when it starts, a moment after it says that it is ready.
        let has_namespaces = || api.kubectl(&["get", "namespace", "default", "kube-system"]).ok();
        process::wait_until(ARRIVAL, has_namespaces).expect("the namespaces default and kube-system");
        let manifest = repository("deploy/proxy-agent.yaml");
        let manifest = manifest.to_str().unwrap();
        api.kubectl(&["apply", "-f", manifest]).unwrap();
        let node = topology.node(0);
        api.apply(&[json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name}})])
            .unwrap();
        let source = Source::Kubeconfig(api.agent_kubeconfig());
        // The Node says no address, so `primary` is every one, except where a test gives it some (S84).
        let options = ["--cluster-cidr", CLUSTER_CIDR, "--nodeport-addresses", "primary"];
        let agent = Agent::start(&node.name, &node.netns, &source, &options).unwrap();
        Self {
            agent,
            api,
            _servers: servers,
            topology,
        }
    }
}

impl Cluster {
    /// The node.
    pub(crate) fn node(&self) -> &Host {
        self.topology.node(0)
    }

    /// A pod.
    pub(crate) fn pod(&self, pod: usize) -> &Host {
        self.topology.pod(0, pod)
    }

    /// Where a pod's echo server listens.
    pub(crate) fn target(&self, pod: usize) -> SocketAddr {
        SocketAddr::new(self.pod(pod).v4.into(), ECHO)
    }

    /// A slice with these pods as endpoints.
    pub(crate) fn slice(&self, service: &str, pods: &[usize]) -> Value {
        let endpoints = pods.iter().map(|pod| self.endpoint(*pod)).collect();
        manifests::slice(&format!("{service}-1"), service, "IPv4", &[TARGET], endpoints)
    }

    /// A pod as an endpoint.
    pub(crate) fn endpoint(&self, pod: usize) -> Value {
        manifests::endpoint(self.pod(pod).v4, &self.topology.node(0).name)
    }

    /// Creates a service with these pods behind it and waits until requests are answered.
    pub(crate) fn publish(&self, name: &str, vip: SocketAddr, pods: &[usize]) {
        self.api
            .apply(&[
                manifests::service(name, &[&vip.ip().to_string()], &[HTTP]),
                self.slice(name, pods),
            ])
            .unwrap();
        self.wait_for_pods(vip, pods);
        self.assert_answered_by(vip, pods);
    }

    /// Deletes a service and its slice, and waits until it is gone.
    pub(crate) fn unpublish(&self, name: &str, vip: SocketAddr) {
        let slice = format!("endpointslice/{name}-1");
        self.api
            .kubectl(&["delete", &format!("service/{name}"), &slice])
            .unwrap();
        self.wait_for(vip, None);
    }

    /// Waits until exactly these pods are the backends.
    pub(crate) fn wait_for_pods(&self, vip: SocketAddr, pods: &[usize]) {
        let targets: Vec<_> = pods.iter().map(|pod| self.target(*pod)).collect();
        self.wait_for(vip, Some(&targets));
    }

    /// Waits until the maps hold exactly these backends for a frontend; with `None`, no such frontend.
    pub(crate) fn wait_for(&self, vip: SocketAddr, backends: Option<&[SocketAddr]>) {
        let want = backends.map(|backends| {
            let mut sorted = backends.to_vec();
            sorted.sort_unstable();
            sorted
        });
        let mut last = None;
        let arrived = process::wait_until(ARRIVAL, || {
            last = Some(self.backends(vip));
            (last.as_ref() == Some(&want)).then_some(())
        });
        assert!(
            arrived.is_some(),
            "{vip} should have {want:?} after {ARRIVAL:?}, it has {last:?}"
        );
    }

    /// What the maps hold for a frontend.
    pub(crate) fn backends(&self, vip: SocketAddr) -> Option<Vec<SocketAddr>> {
        maps::backends(&self.agent.bpf_dir(), vip, Protocol::Tcp).unwrap()
    }

    /// Waits until no map names a service any more. Its number is free only when no packet under way can carry it.
    pub(crate) fn wait_until_forgotten(&self, name: &str) {
        let list = || self.agent.command(&["service", "list"]).unwrap();
        let gone = process::wait_until(ARRIVAL, || (!list().contains(name)).then_some(()));
        assert!(gone.is_some(), "{name} is still there:\n{}", list());
    }

    /// One request of the client pod.
    pub(crate) fn request(&self, vip: SocketAddr) -> Result<String, Failure> {
        self.pod(CLIENT).run(|| echo::tcp(vip)).map(|answer| answer.server)
    }

    /// Enough requests to be sure that each of these pods answers, and nobody else does.
    pub(crate) fn assert_answered_by(&self, vip: SocketAddr, pods: &[usize]) {
        let mut who = self
            .pod(CLIENT)
            .run(|| echo::names(60, || echo::tcp(vip)))
            .unwrap_or_else(|error| panic!("{vip}: {error}"));
        who.sort_unstable();
        who.dedup();
        let mut want: Vec<_> = pods.iter().map(|pod| self.pod(*pod).name.clone()).collect();
        want.sort_unstable();
        assert_eq!(who, want, "{vip}");
    }

    /// Requests of the client pod, one after the other, until stopped.
    pub(crate) fn traffic(&self, vip: SocketAddr) -> Running {
        let netns = self.pod(CLIENT).netns.clone();
        traffic::repeat(
            |body| netns.spawn(body),
            Duration::from_millis(2),
            move || echo::tcp(vip),
        )
    }

    /// Waits until the agent has written `text` into its log after the first `from` bytes.
    pub(crate) fn wait_for_log(&self, from: usize, text: &str) {
        let said = process::wait_until(ARRIVAL, || {
            self.agent
                .log()
                .get(from..)
                .is_some_and(|log| log.contains(text))
                .then_some(())
        });
        assert!(said.is_some(), "the agent does not say {text:?} within {ARRIVAL:?}");
    }
}

/// A service address of IPv4 with the usual port.
pub(crate) fn vip(last: u8) -> SocketAddr {
    SocketAddr::new(IpAddr::from([10, 96, 1, last]), HTTP.number)
}

/// Ends traffic and checks that there was some, all of it answered.
pub(crate) fn assert_undisturbed(running: Running) {
    let samples = running.stop();
    let failures = traffic::failures(&samples);
    assert!(
        failures.is_empty() && samples.len() > 50,
        "{} of {} requests failed: {:?}",
        failures.len(),
        samples.len(),
        failures.first()
    );
}

/// What the agent's account may do from now on.
pub(crate) fn set_rules(cluster: &Cluster, rules: &[Value]) {
    let patch = json!({"rules": rules}).to_string();
    let args = ["patch", "clusterrole/proxy-agent", "--type=merge", "-p", &patch];
    cluster.api.kubectl(&args).unwrap();
}
