//! A node with pods, an API server, a real kube-proxy and, prepared beside it, the agent.

use std::net::{IpAddr, SocketAddr};
use std::process::Output;
use std::time::Duration;

use proxy_tests::agent::{Agent, Source};
use proxy_tests::apiserver::ApiServer;
use proxy_tests::echo::{self, EchoServer, Held, Outcome, Udp};
use proxy_tests::kube_proxy::{KubeProxy, Mode};
use proxy_tests::manifests::{self, Port, port};
use proxy_tests::process::{self, wait_until};
use proxy_tests::service::{self, NODE_PORT};
use proxy_tests::topology::{CLUSTER_CIDR, GATEWAY, Host, PodNetwork, Shape, Topology};
use proxy_tests::traffic::{self, Running};
use proxy_tests::world::{ECHO, ENDPOINT_PORTS, SERVICE_PORTS, vips};
use serde_json::{Value, json};

/// Watches that were interrupted are tried again with growing pauses of up to half a minute.
pub(crate) const ARRIVAL: Duration = Duration::from_secs(45);
const PAUSE: Duration = Duration::from_millis(20);
/// The pod that asks, and those that answer.
const CLIENT: usize = 0;
const SERVERS: [usize; 2] = [1, 2];

pub(crate) struct Site {
    pub(crate) agent: Agent,
    pub(crate) api: ApiServer,
    _servers: Vec<EchoServer>,
    pub(crate) topology: Topology,
}

/// Connections that stay, by who holds them.
pub(crate) struct Streams {
    tcp: Vec<(String, Held)>,
    udp: Vec<(String, Udp)>,
}

impl Site {
    pub(crate) fn new(options: &[&str]) -> Self {
        let shape = Shape {
            nodes: 1,
            pods_per_node: 3,
            external: true,
            // Every packet is routed: over a bridge, replies between its pods pass netfilter on some machines only.
            network: PodNetwork::PointToPoint,
            ..Default::default()
        };
        let topology = Topology::new(&shape).unwrap();
        let node = topology.node(0);
        let outside = topology.external.as_ref().unwrap();
        let routes = format!(
            "route add 203.0.113.0/24 via {}\nroute add 2001:db8:113::/64 via {}\n",
            node.v4, node.v6
        );
        outside.netns.ip(&routes).unwrap();
        let servers = SERVERS.map(|pod| topology.pod(0, pod));
        let servers = servers.map(|pod| EchoServer::start(&pod.netns, &pod.name, &pod.sockets(ECHO)).unwrap());
        let api = ApiServer::start(&topology.underlay, GATEWAY.into()).unwrap();
        let namespace = || api.kubectl(&["get", "namespace", "default"]).ok();
        wait_until(ARRIVAL, namespace).expect("the namespace default");
        let addresses = [node.v4.into(), node.v6.into()];
        api.apply(&[manifests::node(&node.name, "zone", &addresses)]).unwrap();
        let source = Source::Kubeconfig(api.kubeconfig());
        let mut all = vec!["--cluster-cidr", CLUSTER_CIDR];
        all.extend(options);
        let agent = Agent::prepare(&node.name, &node.netns, &source, &all).unwrap();
        let site = Self {
            agent,
            api,
            _servers: servers.into(),
            topology,
        };
        site.publish();
        site
    }

    pub(crate) fn node(&self) -> &Host {
        self.topology.node(0)
    }

    pub(crate) fn client(&self) -> &Host {
        self.topology.pod(0, CLIENT)
    }

    pub(crate) fn outside(&self) -> &Host {
        self.topology.external.as_ref().unwrap()
    }

    pub(crate) fn kube_proxy(&self, mode: Mode) -> KubeProxy {
        let proxy = KubeProxy::start(&self.node().netns, &self.node().name, &self.api.kubeconfig(), mode).unwrap();
        let serves = || {
            vips()
                .into_iter()
                .all(|vip| self.client().run(|| echo::tcp(vip)).is_ok())
                .then_some(())
        };
        assert!(
            wait_until(ARRIVAL, serves).is_some(),
            "kube-proxy does not serve:\n{}",
            proxy.log()
        );
        proxy
    }

    /// Slices of a service with these pods on this node, or with their addresses on another.
    pub(crate) fn slices(&self, service: &str, pods: &[usize], node: &str) -> Vec<Value> {
        let hosts = pods.iter().map(|pod| self.topology.pod(0, *pod));
        let endpoints: Vec<(IpAddr, &str)> = hosts
            .flat_map(|host| [(host.v4.into(), node), (host.v6.into(), node)])
            .collect();
        manifests::slices(service, &ENDPOINT_PORTS, &endpoints)
    }

    /// A service of every kind that rules are written for.
    fn publish(&self) {
        let node = self.node().name.as_str();
        let ips = |last: &str| [format!("10.96.0.{last}"), format!("fd00:96::{last}")];
        let service = |name: &str, last: &str, ports: &[Port]| {
            let [v4, v6] = ips(last);
            manifests::service(name, &[&v4, &v6], ports)
        };
        let mut web = service::load_balancer();
        web["status"] = Value::Null;
        let mut objects = vec![web];
        objects.extend(self.slices("web", &SERVERS, node));
        for (name, last, node_port, place) in [("local", "31", 30_081, node), ("elsewhere", "32", 30_082, "another")] {
            let mut local = service(name, last, &[port("tcp", "TCP", 80)]);
            local["spec"]["type"] = json!("NodePort");
            local["spec"]["externalTrafficPolicy"] = json!("Local");
            local["spec"]["ports"][0]["nodePort"] = json!(node_port);
            objects.push(local);
            objects.extend(self.slices(name, &SERVERS[..1], place));
        }
        objects.push(service("empty", "33", &SERVICE_PORTS));
        let mut sticky = service("sticky", "34", &SERVICE_PORTS);
        sticky["spec"]["sessionAffinity"] = json!("ClientIP");
        objects.push(sticky);
        objects.extend(self.slices("sticky", &SERVERS, node));
        let mut inside = service("inside", "35", &SERVICE_PORTS);
        inside["spec"]["internalTrafficPolicy"] = json!("Local");
        objects.push(inside);
        objects.extend(self.slices("inside", &SERVERS, "another"));
        let mut ranged = service("ranged", "36", &SERVICE_PORTS);
        ranged["spec"]["type"] = json!("LoadBalancer");
        ranged["spec"]["loadBalancerSourceRanges"] = json!(["192.168.56.0/24"]);
        objects.push(ranged);
        objects.extend(self.slices("ranged", &SERVERS, node));
        objects.push(service("spare", "37", &SERVICE_PORTS));
        objects.extend(self.slices("spare", &SERVERS, node));
        self.api.apply(&objects).unwrap();
        for (name, ips) in [("web", service::LB), ("ranged", ["203.0.113.36", "2001:db8:113::36"])] {
            let status = json!({"status": {"loadBalancer": {"ingress": [{"ip": ips[0]}, {"ip": ips[1]}]}}}).to_string();
            let name = format!("service/{name}");
            let args = ["patch", &name, "--subresource=status", "--type=merge", "-p", &status];
            self.api.kubectl(&args).unwrap();
        }
    }

    /// Addresses of the service `web` for clients of the cluster, and those for others.
    fn targets(&self) -> (Vec<SocketAddr>, Vec<SocketAddr>) {
        (vips().into(), self.node().sockets(NODE_PORT).into())
    }

    /// Requests of every kind, until stopped.
    pub(crate) fn traffic(&self) -> Vec<(String, Running)> {
        let (inside, outside) = self.targets();
        let mut running = Vec::new();
        for (kind, request) in [("TCP", echo::tcp as fn(SocketAddr) -> Outcome), ("UDP", echo::udp)] {
            for (host, targets) in [(self.client(), &inside), (self.outside(), &outside)] {
                for target in targets.clone() {
                    let requests = traffic::repeat(|body| host.netns.spawn(body), PAUSE, move || request(target));
                    running.push((format!("{kind}, {} to {target}", host.name), requests));
                }
            }
        }
        for target in inside {
            let requests = traffic::repeat(|body| self.agent.spawn(body), PAUSE, move || echo::tcp(target));
            running.push((format!("TCP, the node to {target}"), requests));
        }
        running
    }

    /// Connections of every kind that stay.
    pub(crate) fn hold(&self) -> Streams {
        let (inside, outside) = self.targets();
        let (mut tcp, mut udp) = (Vec::new(), Vec::new());
        for (host, targets) in [(self.client(), &inside), (self.outside(), &outside)] {
            for target in targets {
                let name = format!("{} to {target}", host.name);
                tcp.push((name.clone(), host.run(|| Held::open(*target)).unwrap()));
                udp.push((name, host.run(|| Udp::connect(*target)).unwrap()));
            }
        }
        for target in inside {
            let held = self.agent.run(|| Held::open(target)).unwrap();
            tcp.push((format!("the node to {target}"), held));
        }
        let mut streams = Streams { tcp, udp };
        streams.answer("opened");
        streams
    }

    /// `migrate STEP` with the options of the agent.
    pub(crate) fn migrate(&self, step: &str, options: &[&str]) -> (Option<i32>, Value, String) {
        let (bpf_dir, cgroup) = (
            self.agent.bpf_dir().display().to_string(),
            self.agent.cgroup().display().to_string(),
        );
        let kubeconfig = self.api.kubeconfig().display().to_string();
        let mut args = vec![
            "migrate",
            step,
            "--node-name",
            &self.node().name,
            "--kubeconfig",
            &kubeconfig,
        ];
        args.extend([
            "--bpf-dir",
            &bpf_dir,
            "--cgroup",
            &cgroup,
            "--cluster-cidr",
            CLUSTER_CIDR,
            "-o",
            "json",
        ]);
        args.extend(options);
        let output = self.agent.tool(&args).unwrap();
        let said = serde_json::from_slice(&output.stdout).unwrap_or_default();
        (output.status.code(), said, text(&output))
    }

    /// Waits until `migrate check` finds nothing that differs.
    pub(crate) fn no_difference(&self, options: &[&str]) -> Value {
        let mut last = String::new();
        let found = wait_until(ARRIVAL, || {
            let (code, said, text) = self.migrate("check", options);
            last = text;
            (code == Some(0)).then_some(said)
        });
        found.unwrap_or_else(|| panic!("something differs: {last}"))
    }

    /// `migrate remove-rules`.
    pub(crate) fn remove_rules(&self, options: &[&str]) -> Output {
        let bpf_dir = self.agent.bpf_dir().display().to_string();
        let mut args = vec!["migrate", "remove-rules", "--bpf-dir", &bpf_dir];
        args.extend(options);
        self.agent.tool(&args).unwrap()
    }

    /// Runs a command of the machine in the node's namespace.
    pub(crate) fn on_node(&self, program: &str, args: &[&str]) -> String {
        process::run(self.node().netns.command(program).args(args)).unwrap()
    }
}

impl Streams {
    /// Everybody is answered, by whoever serves it now.
    pub(crate) fn answer(&mut self, when: &str) {
        for (name, held) in &mut self.tcp {
            held.ask()
                .unwrap_or_else(|failure| panic!("{when}: TCP, {name}: {failure}"));
        }
        for (name, flow) in &mut self.udp {
            flow.ask()
                .unwrap_or_else(|failure| panic!("{when}: UDP, {name}: {failure}"));
        }
    }
}

pub(crate) fn text(output: &Output) -> String {
    format!(
        "exit {:?}\n{}{}",
        output.status.code(),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Requests of each kind after the last change.
const ENOUGH: usize = 50;
/// Ends traffic; every request of it was answered.
pub(crate) fn assert_undisturbed(running: Vec<(String, Running)>) {
    for (name, running) in running {
        assert!(running.wait_for(ENOUGH, ARRIVAL), "{name}: requests came to a halt");
        let samples = running.stop();
        let failures = traffic::failures(&samples);
        assert!(
            failures.is_empty(),
            "{name}: {} of {} requests failed, this long ago: {:?}",
            failures.len(),
            samples.len(),
            failures
                .iter()
                .map(|sample| (sample.began.elapsed(), &sample.outcome))
                .collect::<Vec<_>>()
        );
    }
}
