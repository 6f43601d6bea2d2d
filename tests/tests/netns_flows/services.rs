//! The services of the table: traffic policies against where endpoints are and in what state, source ranges, hints, and addresses
//! that are somebody's own. Each has every kind of address in both families, and one port for TCP and UDP.

use std::net::IpAddr;

use proxy_tests::manifests;
use proxy_tests::topology::Topology;
use proxy_tests::world::{ENDPOINT_PORTS, SERVICE_PORTS};
use serde_json::{Value, json};

/// The port of every service address.
pub(crate) const PORT: u16 = 80;
/// The zones of the nodes.
pub(crate) const ZONES: [&str; 3] = ["zone-a", "zone-a", "zone-b"];

const BOTH_LOCAL: [bool; 2] = [true, true];

/// Where an endpoint is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Ready,
    /// Serving and terminating (S48).
    Terminating,
    /// Serving, neither ready nor terminating (S49).
    Serving,
    /// Neither (S50).
    Dead,
}

/// A pod, or a node for an endpoint on its host network.
#[derive(Clone, Debug)]
struct Endpoint {
    name: &'static str,
    state: State,
    zones: &'static [&'static str],
    nodes: &'static [&'static str],
}

/// A service of the table.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    pub(crate) name: &'static str,
    /// `internalTrafficPolicy` and `externalTrafficPolicy` are Local.
    local: [bool; 2],
    endpoints: Vec<Endpoint>,
    ranges: &'static [&'static str],
    /// The load balancer's address is for outside use only (S95).
    pub(crate) is_proxied: bool,
    /// The externalIP is the first node's own address (S99).
    is_own_ip: bool,
    number: u8,
}

/// Addresses of a service of one family.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Addresses {
    pub(crate) cluster: IpAddr,
    pub(crate) balancer: IpAddr,
    pub(crate) external: IpAddr,
}

fn ready(names: &[&'static str]) -> Vec<Endpoint> {
    names.iter().map(|name| endpoint(name, State::Ready)).collect()
}

fn endpoint(name: &'static str, state: State) -> Endpoint {
    Endpoint {
        name,
        state,
        zones: &[],
        nodes: &[],
    }
}

fn hinted(name: &'static str, zones: &'static [&'static str], nodes: &'static [&'static str]) -> Endpoint {
    Endpoint {
        zones,
        nodes,
        ..endpoint(name, State::Ready)
    }
}

/// All services.
pub(crate) fn all() -> Vec<Spec> {
    let everywhere = ready(&["pod1-1", "pod2-1", "pod3-1"]);
    let terminating = |names: &[&'static str]| -> Vec<_> {
        let all = names.iter().map(|name| endpoint(name, State::Terminating));
        all.collect()
    };
    let mut specs: Vec<Spec> = Vec::new();
    let mut add = |name, local, endpoints: Vec<Endpoint>| {
        specs.push(Spec {
            name,
            local,
            endpoints,
            ranges: &[],
            is_proxied: false,
            is_own_ip: false,
            number: 10 + specs.len() as u8,
        });
    };
    add("everywhere", [false, false], everywhere.clone());
    add("everywhere-local", BOTH_LOCAL, everywhere.clone());
    // A pod that is its own only backend is a client of these two: over a bridge, and over a point-to-point link.
    for (name, local_name, pod) in [
        ("only-bridged", "only-bridged-local", "pod1-1"),
        ("only-routed", "only-routed-local", "pod2-1"),
    ] {
        add(name, [false, false], ready(&[pod]));
        add(local_name, BOTH_LOCAL, ready(&[pod]));
    }
    add("none", [false, false], vec![]);
    add("none-local", BOTH_LOCAL, vec![]);
    add("internal-local", [true, false], ready(&["pod1-2", "pod2-2"]));
    add("external-local", [false, true], ready(&["pod1-2", "pod2-2"]));
    add("terminating", [false, false], terminating(&["pod1-1", "pod2-1"]));
    // S54: a ready endpoint elsewhere for everybody, a terminating one here for those that a Local policy binds.
    let mut mixed = terminating(&["pod2-1"]);
    mixed.extend(ready(&["pod3-1"]));
    add("terminating-local", BOTH_LOCAL, mixed.clone());
    add("terminating-one", [false, false], mixed);
    let unready = vec![endpoint("pod1-1", State::Serving), endpoint("pod2-1", State::Dead)];
    add("unready", [false, false], unready.clone());
    let with_unready = [unready, ready(&["pod3-1"])].concat();
    add("one-ready", BOTH_LOCAL, with_unready);
    add("host-network", [false, false], ready(&["node1", "node2"]));
    add("host-network-local", BOTH_LOCAL, ready(&["node1", "node2"]));
    add("ranges", [false, false], everywhere.clone());
    add("ranges-local", BOTH_LOCAL, everywhere.clone());
    add("ranges-none", [false, false], vec![]);
    add("ranges-one-family", [false, false], everywhere.clone());
    add(
        "hints-zone",
        [false, false],
        vec![
            hinted("pod1-1", &["zone-a"], &[]),
            hinted("pod2-1", &["zone-a", "zone-b"], &[]),
            hinted("pod3-1", &["zone-b"], &[]),
        ],
    );
    add(
        "hints-node",
        [false, false],
        vec![
            hinted("pod1-1", &["zone-a"], &["node1"]),
            hinted("pod2-1", &["zone-a"], &["node2", "node1"]),
            hinted("pod1-2", &["zone-b"], &["node2"]),
        ],
    );
    add(
        "hints-partial",
        [false, false],
        vec![
            hinted("pod1-1", &["zone-a"], &["node1"]),
            hinted("pod3-1", &["zone-b"], &[]),
            hinted("pod2-1", &[], &[]),
        ],
    );
    add(
        "hints-local",
        BOTH_LOCAL,
        vec![
            hinted("pod1-1", &["zone-b"], &[]),
            hinted("pod2-1", &["zone-a"], &[]),
            hinted("pod3-1", &["zone-a"], &[]),
        ],
    );
    add(
        "hints-elsewhere",
        [false, false],
        vec![hinted("pod1-1", &["zone-c"], &[])],
    );
    add("proxied", [false, false], everywhere.clone());
    add("own-ip", [false, false], everywhere);
    for spec in &mut specs {
        match spec.name {
            // The first outsider, and the pods of the first node but not the second (S102).
            "ranges" | "ranges-local" | "ranges-none" => {
                spec.ranges = &[
                    "198.51.100.11/32",
                    " 10.244.1.0/24",
                    "2001:db8:51::b/128",
                    "fd00:10:244:1::/64",
                ];
            }
            "ranges-one-family" => spec.ranges = &["2001:db8:51::b/128"],
            "proxied" => spec.is_proxied = true,
            "own-ip" => spec.is_own_ip = true,
            _ => {}
        }
    }
    specs
}

impl Spec {
    /// Its node port, for both protocols (S34).
    pub(crate) fn node_port(&self) -> u16 {
        30_000 + u16::from(self.number)
    }

    /// Its addresses of one family.
    pub(crate) fn addresses(&self, is_v4: bool, topology: &Topology) -> Addresses {
        let n = self.number;
        let [cluster, balancer, external] = if is_v4 {
            [
                format!("10.96.1.{n}"),
                format!("203.0.113.{n}"),
                format!("203.0.113.{}", 100 + n),
            ]
        } else {
            [
                format!("fd00:96::1{n:02x}"),
                format!("2001:db8:113::{n:x}"),
                format!("2001:db8:113::e:{n:x}"),
            ]
        }
        .map(|ip| ip.parse().unwrap());
        let external = if self.is_own_ip {
            topology.node(0).address(external)
        } else {
            external
        };
        Addresses {
            cluster,
            balancer,
            external,
        }
    }

    /// The Service and its slices.
    pub(crate) fn objects(&self, topology: &Topology) -> Vec<Value> {
        let families = [true, false].map(|is_v4| self.addresses(is_v4, topology));
        let cluster = families.map(|a| a.cluster.to_string());
        let mut service = manifests::service(self.name, &[&cluster[0], &cluster[1]], &SERVICE_PORTS);
        let spec = &mut service["spec"];
        spec["type"] = json!("LoadBalancer");
        spec["ports"][0]["nodePort"] = json!(self.node_port());
        spec["ports"][1]["nodePort"] = json!(self.node_port());
        spec["externalIPs"] = json!(families.map(|a| a.external));
        spec["loadBalancerSourceRanges"] = json!(self.ranges);
        let policy = |is_local| if is_local { "Local" } else { "Cluster" };
        spec["internalTrafficPolicy"] = json!(policy(self.local[0]));
        spec["externalTrafficPolicy"] = json!(policy(self.local[1]));
        let mode = if self.is_proxied { "Proxy" } else { "VIP" };
        let ingress = families.map(|a| json!({"ip": a.balancer, "ipMode": mode}));
        service["status"] = json!({"loadBalancer": {"ingress": ingress}});
        let slice = |family: &str, is_v4| {
            let endpoints = self.endpoints.iter().map(|e| e.value(topology, is_v4)).collect();
            let name = format!("{}-{}", self.name, family.to_lowercase());
            manifests::slice(&name, self.name, family, &ENDPOINT_PORTS, endpoints)
        };
        vec![service, slice("IPv4", true), slice("IPv6", false)]
    }
}

impl Endpoint {
    fn value(&self, topology: &Topology, is_v4: bool) -> Value {
        let nodes = topology.nodes.iter();
        let mut hosts = nodes.flat_map(|node| {
            let pods = node.pods.iter().map(|pod| &pod.host);
            pods.chain([&node.host]).map(|host| (host, &node.host.name))
        });
        let (host, node) = hosts.find(|(host, _)| host.name == self.name).unwrap();
        let address = if is_v4 { IpAddr::from(host.v4) } else { host.v6.into() };
        let mut value = manifests::endpoint(address, node);
        let (is_ready, is_serving, is_terminating) = match self.state {
            State::Ready => (true, true, false),
            State::Terminating => (false, true, true),
            State::Serving => (false, true, false),
            State::Dead => (false, false, false),
        };
        value["conditions"] = json!({"ready": is_ready, "serving": is_serving, "terminating": is_terminating});
        let named = |names: &[&str]| names.iter().map(|name| json!({"name": name})).collect::<Vec<_>>();
        if !self.zones.is_empty() || !self.nodes.is_empty() {
            value["hints"] = json!({"forZones": named(self.zones), "forNodes": named(self.nodes)});
        }
        value
    }
}
