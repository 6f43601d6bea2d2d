//! The demo's cluster: network, pods with echo servers, agents, and where their objects come from.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use proxy_tests::agent::{self, Agent, Source};
use proxy_tests::monitoring::stage::{self, Cast};
use proxy_tests::prometheus::Prometheus;
use proxy_tests::topology::{CLUSTER_CIDR, GATEWAY, Host, Shape, Topology};
use proxy_tests::{echo, leftovers, maps, process};

use crate::objects::{self, Objects};
use crate::step;

/// Where the pods listen.
pub(crate) const ECHO: u16 = 8080;
/// Pods per node that are backends; the first node has one more, the client.
const BACKENDS: usize = 2;
const API_PORT: u16 = 6443;

pub(crate) struct Cluster {
    pub(crate) agents: Vec<Agent>,
    prometheus: Option<Prometheus>,
    objects: Objects,
    helpers: Vec<Child>,
    topology: Topology,
    state: PathBuf,
    keep: bool,
}

impl Cluster {
    pub(crate) fn build(keep: bool, kubeconfig: Option<&Path>, prometheus: bool) -> Result<Self> {
        let state = leftovers::temp_dir("demo")?.keep();
        step("Building two nodes with two backend pods each, and a client pod, from network namespaces");
        let mut topology = Topology::new(&Shape::default())?;
        topology.nodes[0].add_pod()?;
        if keep {
            topology.namespaces().iter().for_each(|netns| netns.keep());
        }
        let mut cluster = Self {
            agents: Vec::new(),
            objects: Objects::in_folder(&state)?,
            helpers: Vec::new(),
            topology,
            state,
            keep,
            prometheus: None,
        };
        cluster.start_servers()?;
        cluster.describe();
        step("Starting one agent per node");
        cluster.start_agents(kubeconfig, prometheus)?;
        if prometheus {
            step("Starting Prometheus, which scrapes both");
            cluster.prometheus = Some(stage::watch(&cluster.topology, keep)?);
        }
        Ok(cluster)
    }

    pub(crate) fn client(&self) -> &Host {
        self.topology.pod(0, BACKENDS)
    }

    fn backends(&self) -> Vec<(&Host, &str)> {
        let nodes = self.topology.nodes.iter();
        nodes
            .flat_map(|n| n.pods.iter().take(BACKENDS).map(|p| (&p.host, n.host.name.as_str())))
            .collect()
    }

    pub(crate) fn backend_names(&self) -> Vec<String> {
        self.backends().iter().map(|(host, _)| host.name.clone()).collect()
    }

    fn start_servers(&mut self) -> Result<()> {
        let mut commands = Vec::new();
        for (pod, _) in self.backends() {
            let mut command = pod.netns.command(std::env::current_exe()?);
            command
                .arg("serve")
                .arg(&pod.name)
                .args(pod.sockets(ECHO).map(|s| s.to_string()));
            commands.push(command);
        }
        for command in commands {
            self.start_helper(command)?;
        }
        // The first answers say that everybody is up, and that the network works without any proxy.
        for (pod, _) in self.backends() {
            for address in pod.sockets(ECHO) {
                let up = process::wait_until(Duration::from_secs(5), || self.client().run(|| echo::tcp(address)).ok());
                up.with_context(|| format!("{} does not answer at {address}", pod.name))?;
            }
        }
        Ok(())
    }

    fn start_helper(&mut self, mut command: Command) -> Result<()> {
        command.stdin(Stdio::null());
        let child = if self.keep {
            // Nobody reads what it says once this process is gone.
            command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()
        } else {
            process::spawn_bound(command)
        };
        let child = child.context("starting a helper process")?;
        leftovers::record_process(&self.state, child.id())?;
        self.helpers.push(child);
        Ok(())
    }

    fn start_agents(&mut self, kubeconfig: Option<&Path>, watched: bool) -> Result<()> {
        let source = match kubeconfig {
            None => Source::Manifests(self.state.join("manifests")),
            Some(kubeconfig) => self.reach_api_server(kubeconfig)?,
        };
        for node in &self.topology.nodes {
            let host = &node.host;
            let options = if watched {
                &stage::OPTIONS[..]
            } else {
                &["--cluster-cidr", CLUSTER_CIDR]
            };
            let mut agent = Agent::prepare(&host.name, &host.netns, &source, options)?;
            if watched {
                agent.open_metrics();
            }
            if self.keep {
                agent.keep();
            }
            agent.launch()?;
            if let Some(pid) = agent.pid() {
                leftovers::record_process(&self.state, pid)?;
            }
            println!(
                "  {} is ready: pinned maps in {}, cgroup {}",
                host.name,
                agent.bpf_dir().display(),
                agent.cgroup().display()
            );
            self.agents.push(agent);
        }
        Ok(())
    }

    /// Namespaces have no way out, so a relay leads from the underlay to the API server.
    fn reach_api_server(&mut self, kubeconfig: &Path) -> Result<Source> {
        let relay = SocketAddr::new(GATEWAY.into(), API_PORT);
        let copy = self.state.join("kubeconfig");
        let target = objects::through_relay(kubeconfig, relay, &copy)?;
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg("relay")
            .arg(self.topology.underlay.path())
            .arg(relay.to_string())
            .arg(&target);
        self.start_helper(command)?;
        self.objects = Objects::in_api_server(kubeconfig)?;
        println!("  objects come from the API server at {target}");
        Ok(Source::Kubeconfig(copy))
    }

    /// Creates the Service and waits until it is live everywhere.
    pub(crate) fn publish(&self) -> Result<Vec<SocketAddr>> {
        step("Creating a Service with four endpoints");
        let names = self.backend_names();
        let vips = self.objects.publish(&self.endpoints(&names))?;
        crate::wait_until_live(self, &vips, names.len())?;
        Ok(vips)
    }

    pub(crate) fn set_endpoints(&self, names: &[String]) -> Result<()> {
        self.objects.set_endpoints(&self.endpoints(names))
    }

    fn endpoints(&self, names: &[String]) -> Vec<(IpAddr, &str)> {
        let chosen = self.backends().into_iter().filter(|(pod, _)| names.contains(&pod.name));
        chosen
            .flat_map(|(pod, node)| [(IpAddr::V4(pod.v4), node), (IpAddr::V6(pod.v6), node)])
            .collect()
    }

    /// Everything that Prometheus needs to be told the truth about; none without it.
    pub(crate) fn stage(&mut self) -> Option<Cast<'_>> {
        let Objects::Folder(manifests) = &self.objects else {
            return None;
        };
        let nodes = self.topology.nodes.iter();
        let backends = nodes.flat_map(|n| n.pods.iter().take(BACKENDS).map(|p| (&p.host, n.host.name.as_str())));
        Some(Cast {
            agents: &mut self.agents,
            client: self.topology.pod(0, BACKENDS),
            backends: backends.collect(),
            manifests,
            prometheus: self.prometheus.as_ref()?,
        })
    }

    /// A port of the machine's own loopback that leads to Prometheus in its namespace.
    pub(crate) fn open_prometheus(&mut self) -> Result<Option<SocketAddr>> {
        let Some(prometheus) = &self.prometheus else {
            return Ok(None);
        };
        let here = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?;
        let mut command = self.topology.underlay.command(std::env::current_exe()?);
        command
            .arg("relay")
            .arg(format!("/proc/{}/ns/net", std::process::id()))
            .arg(here.to_string())
            .arg(prometheus.address().to_string());
        self.start_helper(command)?;
        // It has to open this process's namespace before this process ends.
        let up = process::wait_until(Duration::from_secs(5), || TcpStream::connect(here).ok());
        up.with_context(|| format!("nothing answers at {here}"))?;
        Ok(Some(here))
    }

    fn describe(&self) {
        for node in &self.topology.nodes {
            println!("  {}  {}  {}", node.host.name, node.host.v4, node.host.v6);
            for pod in &node.pods {
                let role = if pod.host.name == self.client().name {
                    "client"
                } else {
                    "backend"
                };
                println!(
                    "    {}  {:<12}  {:<18}  {role}",
                    pod.host.name, pod.host.v4, pod.host.v6
                );
            }
        }
    }

    /// How to look around in what is kept, and how to get rid of it.
    pub(crate) fn explain(&mut self) -> Result<()> {
        let prometheus = self.open_prometheus()?;
        // Some may have been started again.
        for pid in self.agents.iter().filter_map(Agent::pid) {
            leftovers::record_process(&self.state, pid)?;
        }
        let Some(agent) = self.agents.first() else {
            return Ok(());
        };
        let (bpf, binary) = (agent.bpf_dir(), agent::binary().unwrap_or_default());
        let (bpf, binary) = (bpf.display(), binary.display());
        step("Left standing. To look around:");
        println!("  # what node1 serves, and its connections");
        for what in ["service list", "backend list", "connection list -o wide"] {
            println!("  {binary} {what} --bpf-dir {bpf}");
        }
        println!(
            "  bpftool map dump pinned {}/FRONTENDS4",
            maps::pins(&agent.bpf_dir()).display()
        );
        println!("  # a shell in the client pod, and one as a process of node1");
        println!("  nsenter --net={} bash", self.client().netns.path().display());
        println!(
            "  nsenter --net={} sh -c 'echo $$ > {}/cgroup.procs; exec bash'",
            agent.netns().path().display(),
            agent.cgroup().display()
        );
        println!("  # change an endpoint, and watch the agent");
        println!("  ls {}", self.state.join("manifests").display());
        println!("  tail -f {}", agent.state_dir().join("agent.log").display());
        if let Some(prometheus) = prometheus {
            println!("  # ask Prometheus, or give it to Grafana as a data source");
            println!("  curl http://{prometheus}/api/v1/query --data-urlencode 'query=ebpf_proxy_map_entries'");
        }
        println!("  # remove everything");
        let demo = std::env::current_exe().unwrap_or_default();
        println!("  {} --remove {}", demo.display(), std::process::id());
        Ok(())
    }

    pub(crate) fn remove(mut self) {
        self.objects.remove();
        // Agents first, then who they serve, then the network, as the fields are ordered.
        self.agents.clear();
        self.prometheus = None;
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        self.objects.remove();
        for helper in &mut self.helpers {
            let _ = helper.kill();
            let _ = helper.wait();
        }
        leftovers::remove_dir_with_mounts(&self.state);
    }
}
