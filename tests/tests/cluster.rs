//! The agent as users run it: the image of `cargo xtask image` in the DaemonSet of the Helm chart, on nodes with real kubelets and
//! containerds, a real control plane, no kube-proxy. What a kubelet does to pods must not be noticed by those that use services;
//! what the container is allowed: `cluster/rights.rs`.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use proxy_tests::kubernetes::client::Load;
use proxy_tests::kubernetes::{Kubernetes, Machine, image};
use proxy_tests::process;
use proxy_tests::shared::{Fixture, Shared};

#[path = "cluster/rights.rs"]
mod rights;

const NODES: u8 = 3;
const REPLICAS: u8 = 6;
/// A bound for what a kubelet or a controller does in seconds on an idle machine.
const PATIENCE: Duration = Duration::from_secs(180);
const AGENTS: &str = "app.kubernetes.io/name=proxy-agent";
/// Requests of each kind that are made after a change is over.
const ENOUGH: usize = 100;

struct Cluster {
    kubernetes: Kubernetes,
    addresses: Vec<SocketAddr>,
}

static SHARED: Shared<Cluster> = Shared::new();

impl Fixture for Cluster {
    fn build() -> Self {
        let kubernetes = Kubernetes::start(NODES, helper()).unwrap();
        kubernetes.load(&image::agent_archive().unwrap()).unwrap();
        kubernetes.install_agent(&[]).unwrap();
        let addresses = kubernetes.install_echo(REPLICAS).unwrap();
        Self { kubernetes, addresses }
    }

    fn after_failure(&mut self) {
        let pods = self.kubernetes.api.kubectl(&["get", "pods,nodes", "-A", "-o", "wide"]);
        eprintln!("{}", pods.unwrap_or_else(|error| format!("{error:#}")));
    }
}

fn helper() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_cluster"))
}

impl Cluster {
    /// Requests from a pod, and from a process of every node.
    fn load(&self) -> Vec<(String, Load)> {
        self.load_of(&self.kubernetes.machines)
    }

    fn load_of(&self, machines: &[Machine]) -> Vec<(String, Load)> {
        let with_addresses = |mut command: std::process::Command| {
            command.arg("load").args(self.addresses.iter().map(ToString::to_string));
            Load::start(command).unwrap()
        };
        let pod = self.kubernetes.in_client_pod("node1").unwrap();
        let mut loads = vec![("a pod of node1".to_owned(), with_addresses(pod))];
        for machine in machines {
            let command = machine.command(helper()).unwrap();
            loads.push((machine.name().to_owned(), with_addresses(command)));
        }
        loads
    }

    /// Ends the load when enough requests were made: nothing may have failed.
    fn nothing_failed(&self, loads: Vec<(String, Load)>) {
        let mut wrong = Vec::new();
        for (from, load) in loads {
            let tallies = load.stop(ENOUGH).unwrap();
            wrong.extend(
                tallies
                    .into_iter()
                    .filter(|tally| tally.failed > 0)
                    .map(|tally| (from.clone(), tally)),
            );
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    fn agents(&self) -> Vec<(String, String)> {
        self.kubernetes.pods("kube-system", AGENTS).unwrap()
    }

    fn rolled_out(&self) {
        self.kubernetes
            .wait_for_rollout("kube-system", "daemonset/proxy-agent", PATIENCE)
            .unwrap();
    }

    /// Waits until the endpoints on a node are as many as `right` accepts.
    fn endpoints(&self, node: &str, right: impl Fn(usize) -> bool) -> bool {
        let found = process::wait_until(PATIENCE, || {
            let endpoints = self.kubernetes.endpoints().ok()?;
            let here = endpoints.iter().filter(|endpoint| endpoint.ends_with(node)).count();
            right(here).then_some(())
        });
        found.is_some()
    }

    /// Waits until the maps of `node` have no backend in the pod networks of a machine.
    fn forgotten(&self, node: &str, machine: u8) -> bool {
        let networks = [format!("10.244.{machine}."), format!("fd00:10:244:{machine}::")];
        let (_, agent) = self.agents().into_iter().find(|(of, _)| of == node).unwrap();
        let list = ["proxy-agent", "backend", "list", "--service", "default/echo"];
        let exec = [&["-n", "kube-system", "exec", &agent, "--"][..], &list].concat();
        let forgotten = process::wait_until(PATIENCE, || {
            let text = self.kubernetes.api.kubectl(&exec).ok()?;
            (text.contains("10.244.") && !networks.iter().any(|network| text.contains(network))).then_some(())
        });
        forgotten.is_some()
    }
}

/// S155, S169: a rolling update replaces every agent, one node after the other.
#[test]
fn a_rolling_update_of_the_daemonset_loses_nothing() {
    let cluster = SHARED.turn();
    let before = cluster.agents();
    let loads = cluster.load();
    let restart = ["-n", "kube-system", "rollout", "restart", "daemonset/proxy-agent"];
    cluster.kubernetes.api.kubectl(&restart).unwrap();
    cluster.rolled_out();
    cluster.nothing_failed(loads);
    let after = cluster.agents();
    assert_eq!(after.len(), usize::from(NODES));
    assert!(
        after.iter().all(|agent| !before.contains(agent)),
        "{before:?} {after:?}"
    );
}

/// S155, S169: an agent that is killed with its pod comes back to the programs and maps that it left.
#[test]
fn a_deleted_pod_of_the_agent_loses_nothing() {
    let cluster = SHARED.turn();
    let before = cluster.agents();
    let (_, victim) = &before[0];
    let loads = cluster.load();
    let now = ["--grace-period=0", "--force"];
    let delete = ["-n", "kube-system", "delete", "pod", victim];
    cluster.kubernetes.api.kubectl(&[&delete[..], &now].concat()).unwrap();
    let replaced = process::wait_until(PATIENCE, || {
        let agents = cluster.agents();
        (agents.len() == before.len() && agents.iter().all(|(_, agent)| agent != victim)).then_some(())
    });
    assert!(replaced.is_some(), "{:?}", cluster.agents());
    cluster.rolled_out();
    cluster.nothing_failed(loads);
}

/// A node that falls silent and is deleted takes its endpoints with it, though no agent looks at Node objects of others; when it
/// is back, so is its agent, with the programs and maps that were left there.
#[test]
fn a_node_that_leaves_is_sent_nothing() {
    let cluster = SHARED.turn();
    let (leaving, staying) = cluster.kubernetes.machines.split_last().unwrap();
    let name = leaving.name();
    assert!(cluster.endpoints(name, |count| count > 0));
    leaving.stop_kubelet().unwrap();
    cluster.kubernetes.api.kubectl(&["delete", "node", name]).unwrap();
    assert!(cluster.endpoints(name, |count| count == 0), "its endpoints stay");
    assert!(cluster.forgotten("node1", NODES), "node1 still sends to {name}");
    cluster.nothing_failed(cluster.load_of(staying));
    leaving.start_kubelet().unwrap();
    let back = process::wait_until(PATIENCE, || {
        cluster.agents().iter().any(|(node, _)| node == name).then_some(())
    });
    assert!(back.is_some(), "{name} does not come back");
    cluster.rolled_out();
    cluster
        .kubernetes
        .wait_for_rollout("default", "daemonset/client", PATIENCE)
        .unwrap();
    cluster.nothing_failed(cluster.load());
}
