//! What is applied to a cluster: what the agent's chart makes of a user's values, and echo servers behind a Service.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::image::HELPER;
use super::{Kubernetes, init};
use crate::topology::{CLUSTER_CIDR, GATEWAY};
use crate::{helm, process};

/// Name of the echo servers' Deployment and Service.
pub const ECHO: &str = "echo";
/// Where they listen, and where the Service does.
const ECHO_PORT: u16 = 8080;
const SERVICE_PORT: u16 = 80;
const ADDRESSES: Duration = Duration::from_secs(20);

/// What a user of this cluster sets in the chart: the pods' networks, the API server, the place of cgroup2.
pub fn chart_values() -> Vec<String> {
    let pods = CLUSTER_CIDR.replace(',', "\\,");
    vec![
        format!("pods.clusterCIDR={pods}"),
        format!("apiServer.host={GATEWAY}"),
        format!("datapath.cgroup={}", init::CGROUP),
    ]
}

/// What the chart makes of these values and further ones.
pub fn agent_objects(further: &[&str]) -> Result<String> {
    let values = chart_values();
    let values = values.iter().map(String::as_str).chain(further.iter().copied());
    let args: Vec<&str> = values.flat_map(|value| ["--set", value]).collect();
    helm::render(&args)
}

/// A Deployment of echo servers, and a dual-stack Service with a node port in front.
pub fn echo(replicas: u8) -> Vec<Value> {
    let labels = json!({"app": ECHO});
    let field = |name: &str, path: &str| json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}});
    let port = |protocol: &str| json!({"name": protocol.to_lowercase(), "protocol": protocol, "port": SERVICE_PORT, "targetPort": ECHO_PORT});
    let deployment = json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": ECHO, "namespace": "default"},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "terminationGracePeriodSeconds": 2,
                    "dnsPolicy": "Default",
                    "topologySpreadConstraints": [{
                        "maxSkew": 1,
                        "topologyKey": "kubernetes.io/hostname",
                        "whenUnsatisfiable": "ScheduleAnyway",
                        "labelSelector": {"matchLabels": labels},
                    }],
                    "containers": [{
                        "name": ECHO,
                        "image": HELPER,
                        "args": ["serve", ECHO_PORT.to_string()],
                        "command": ["/usr/bin/cluster"],
                        "env": [field("POD_NAME", "metadata.name"), field("POD_IPS", "status.podIPs")],
                        "readinessProbe": {"tcpSocket": {"port": ECHO_PORT}, "periodSeconds": 1},
                    }],
                },
            },
        },
    });
    let service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": ECHO, "namespace": "default"},
        "spec": {
            "type": "NodePort",
            "ipFamilyPolicy": "RequireDualStack",
            "selector": labels,
            "ports": [port("TCP"), port("UDP")],
        },
    });
    vec![deployment, service]
}

/// A pod on every node that only sends: `kubectl exec` runs clients in it.
pub fn clients() -> Value {
    let labels = json!({"app": "client"});
    json!({
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": "client", "namespace": "default"},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "terminationGracePeriodSeconds": 2,
                    "dnsPolicy": "Default",
                    "containers": [{"name": "client", "image": HELPER}],
                },
            },
        },
    })
}

impl Kubernetes {
    /// Installs the chart with these values beside the cluster's own, and waits until the agent is ready on every node.
    pub fn install_agent(&self, values: &[&str]) -> Result<()> {
        self.api
            .kubectl_with_input(&["apply", "-f", "-"], &agent_objects(values)?)?;
        self.wait_for_rollout("kube-system", "daemonset/proxy-agent", super::START)
    }

    /// Applies echo servers and clients, waits for them, and gives the addresses of the Service.
    pub fn install_echo(&self, replicas: u8) -> Result<Vec<SocketAddr>> {
        let mut objects = echo(replicas);
        objects.push(clients());
        self.api.apply(&objects)?;
        self.wait_for_rollout("default", "deployment/echo", super::START)?;
        self.wait_for_rollout("default", "daemonset/client", super::START)?;
        let complete = || (self.endpoints().ok()?.len() == 2 * usize::from(replicas)).then_some(());
        process::wait_until(ADDRESSES, complete).context("the Service does not get its endpoints")?;
        let ips = self
            .api
            .kubectl(&["get", "service", ECHO, "-o", "jsonpath={.spec.clusterIPs[*]}"])?;
        ips.split_whitespace()
            .map(|ip| Ok(SocketAddr::new(ip.parse()?, SERVICE_PORT)))
            .collect()
    }

    /// Ready endpoints of the Service, as `address node`, of both families.
    pub fn endpoints(&self) -> Result<Vec<String>> {
        let slices = ["get", "endpointslices", "-l", "kubernetes.io/service-name=echo"];
        let format = "jsonpath={range .items[*].endpoints[?(@.conditions.ready==true)]}{.addresses[0]} {.nodeName}{\"\\n\"}{end}";
        let text = self.api.kubectl(&[&slices[..], &["-o", format]].concat())?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// A command that runs the helper's client in the client pod of a node. It ends when its standard input does.
    pub fn in_client_pod(&self, node: &str) -> Result<Command> {
        let pods = self.pods("default", "app=client")?;
        let (_, pod) = pods
            .iter()
            .find(|(of, _)| of == node)
            .with_context(|| format!("no client on {node}"))?;
        let mut command = self.api.kubectl_command()?;
        command.args(["exec", "--stdin", pod, "--", "/usr/bin/cluster"]);
        Ok(command)
    }

    /// Names of the pods with a label, by node.
    pub fn pods(&self, namespace: &str, label: &str) -> Result<Vec<(String, String)>> {
        let format = "jsonpath={range .items[*]}{.spec.nodeName} {.metadata.name}{\"\\n\"}{end}";
        let text = self
            .api
            .kubectl(&["-n", namespace, "get", "pods", "-l", label, "-o", format])?;
        let pair = |line: &str| {
            line.split_once(' ')
                .map(|(node, pod)| (node.to_owned(), pod.to_owned()))
        };
        let mut pods: Vec<_> = text.lines().filter_map(pair).collect();
        pods.sort();
        Ok(pods)
    }
}
