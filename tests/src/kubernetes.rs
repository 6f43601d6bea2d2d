//! A whole Kubernetes on this machine: the real control plane in the underlay's namespace, and nodes with a real kubelet and
//! containerd each, in namespaces of their own. No kube-proxy anywhere.
//!
//! Used by `cargo xtask cluster` and the tests of the DaemonSet. Everything goes when [`Kubernetes`] is dropped; if its process is
//! killed, the kernel ends every process with it, and the next run removes the folders, cgroups and namespaces.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::apiserver::{self, ApiServer};
use crate::topology::{GATEWAY, Shape, Topology};
use crate::{leftovers, process};

mod cgroups;
pub mod client;
mod files;
pub mod image;
pub mod init;
mod machine;
pub mod objects;

pub use machine::Machine;

/// Version of containerd that `cargo xtask setup` builds; `tests/containerd/go.mod` names the same.
const CONTAINERD: &str = "containerd-2.3.7";
/// Everything is slow on a busy machine: a bound for what never comes.
const START: Duration = Duration::from_secs(180);

/// A running cluster.
pub struct Kubernetes {
    /// Its nodes, `node1` first. Ended before the control plane.
    pub machines: Vec<Machine>,
    control: Vec<Child>,
    /// Its API server.
    pub api: ApiServer,
    /// Its network.
    pub topology: Topology,
    dir: TempDir,
}

impl Kubernetes {
    /// Starts a cluster and waits until its nodes are Ready. `helper` is the `cluster` program, which is init on the nodes and, in
    /// an image, everything that runs in pods beside the agent.
    pub fn start(nodes: u8, helper: &Path) -> Result<Self> {
        let dir = leftovers::temp_dir("kubernetes")?;
        let topology = Topology::new(&Shape {
            nodes,
            pods_per_node: 0,
            ..Default::default()
        })?;
        let api = ApiServer::start(&topology.underlay, IpAddr::V4(GATEWAY))?;
        let mut kubernetes = Self {
            machines: Vec::new(),
            control: Vec::new(),
            api,
            topology,
            dir,
        };
        kubernetes.start_control_plane()?;
        let pause = image::helper(helper)?.write(kubernetes.dir.path())?;
        for node in &kubernetes.topology.nodes {
            let machine = Machine::start(&node.host, node.number(), helper, &kubernetes.api, &[&pause])?;
            kubernetes.machines.push(machine);
        }
        kubernetes.wait_for_nodes()?;
        Ok(kubernetes)
    }

    /// Where images are packed.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Makes an image known to every node.
    pub fn load(&self, archive: &Path) -> Result<()> {
        self.machines.iter().try_for_each(|machine| machine.load(archive))
    }

    /// Waits for a rollout, for example of `daemonset/proxy-agent`; an error says what the pods say.
    pub fn wait_for_rollout(&self, namespace: &str, what: &str, limit: Duration) -> Result<()> {
        let timeout = format!("--timeout={}s", limit.as_secs());
        let rollout = self
            .api
            .kubectl(&["-n", namespace, "rollout", "status", what, &timeout]);
        rollout.map(drop).with_context(|| {
            let show = |args: &[&str]| self.api.kubectl(args).unwrap_or_else(|error| format!("{error:#}"));
            format!(
                "{what} is not rolled out\n{}\n{}\n{}",
                show(&["-n", namespace, "get", "pods", "-o", "wide"]),
                show(&["-n", namespace, "get", "events"]),
                show(&["-n", namespace, "logs", "--tail=20", what]),
            )
        })
    }

    fn start_control_plane(&mut self) -> Result<()> {
        let kubeconfig = self.api.kubeconfig();
        let mut manager = self.control_plane_command("kube-controller-manager")?;
        manager
            .arg("--service-account-private-key-file")
            .arg(self.api.file("sa.key"));
        // Its default is a folder of the machine, which it makes.
        manager
            .arg("--flex-volume-plugin-dir")
            .arg(self.dir.path().join("plugins"));
        manager.arg("--root-ca-file").arg(self.api.file("ca.crt"));
        // Nodes that went silent are noticed soon; see the kubelet's lease in `files`.
        manager.args(["--node-monitor-grace-period=20s", "--node-monitor-period=2s"]);
        let scheduler = self.control_plane_command("kube-scheduler")?;
        for (mut command, name) in [(manager, "kube-controller-manager"), (scheduler, "kube-scheduler")] {
            command.arg("--kubeconfig").arg(&kubeconfig);
            command.args(["--leader-elect=false", "--secure-port=0"]);
            let log = self.dir.path().join(format!("{name}.log"));
            self.control.push(process::spawn_logged(command, &log)?);
        }
        Ok(())
    }

    fn control_plane_command(&self, name: &str) -> Result<Command> {
        Ok(self.api.netns().command(program(name)?))
    }

    fn wait_for_nodes(&self) -> Result<()> {
        let ready = "jsonpath={.items[*].status.conditions[?(@.type==\"Ready\")].status}";
        let mut seen = String::new();
        let all = process::wait_until(START, || {
            std::thread::sleep(Duration::from_millis(200));
            seen = self.api.kubectl(&["get", "nodes", "-o", ready]).unwrap_or_default();
            let count = seen.split_whitespace().filter(|status| *status == "True").count();
            let failed = self.machines.iter().any(Machine::kubelet_ended);
            (failed || count == self.machines.len()).then_some(!failed)
        });
        if all != Some(true) {
            let logs: Vec<String> = self.machines.iter().map(Machine::last_words).collect();
            bail!("the nodes do not become Ready, they are: {seen:?}\n{}", logs.join("\n"));
        }
        Ok(())
    }
}

impl Drop for Kubernetes {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for machine in &self.machines {
                eprintln!("{}", machine.last_words());
            }
        }
        // All at once: each waits for the end of what it started.
        for machine in &mut self.machines {
            machine.kill();
        }
        self.machines.clear();
        for child in &mut self.control {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Finds a command that set-up built.
fn program(name: &str) -> Result<PathBuf> {
    let cache = PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/ebpf-proxy");
    let candidates = [apiserver::KUBERNETES, CONTAINERD].map(|dir| cache.join(dir).join(name));
    let found = candidates.iter().find(|path| path.is_file());
    found
        .cloned()
        .with_context(|| format!("{name} is missing: run `cargo xtask setup` (it needs Go)"))
}
