//! What the agents are told, and who may therefore answer whom: the services under load as one value that steps change.
//!
//! `web` has every kind of address, `turn` shares its endpoints and changes its type, `many` has a thousand endpoints per family.

use std::collections::BTreeSet;
use std::net::IpAddr;

use proxy_tests::load::{Path, Rules};
use proxy_tests::manifests::{self, Port, port};
use proxy_tests::topology::Host;
use proxy_tests::world::{CLUSTER_IPS, ENDPOINT_PORTS, SERVICE_PORTS};
use serde_json::{Value, json};

pub(crate) const NODE_PORT: u16 = 30_080;
pub(crate) const LB: [&str; 2] = ["203.0.113.10", "2001:db8:113::10"];
pub(crate) const TURN: [&str; 2] = ["10.96.0.20", "fd00:96::20"];
pub(crate) const MANY: [&str; 2] = ["10.96.0.99", "fd00:96::99"];
pub(crate) const MANY_PORT: u16 = 9090;
/// A service whose port tells which version of the objects has arrived.
pub(crate) const MARKER: &str = "10.96.0.200";

const ZONES: [&str; 2] = ["zone-a", "zone-b"];
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// What an endpoint's conditions say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Ready,
    /// Neither ready nor serving.
    Unready,
    /// Terminating, still serving.
    Terminating,
    /// Terminating, not serving any more.
    Stopped,
}

/// An endpoint of `web` and `turn`.
#[derive(Clone, Debug)]
pub(crate) struct Backend {
    pub(crate) pod: String,
    pub(crate) ips: [IpAddr; 2],
    pub(crate) node: usize,
    pub(crate) state: State,
}

impl Backend {
    pub(crate) fn new(host: &Host, node: usize) -> Self {
        Self {
            pod: host.name.clone(),
            ips: [host.v4.into(), host.v6.into()],
            node,
            state: State::Ready,
        }
    }

    fn is_serving(&self) -> bool {
        matches!(self.state, State::Ready | State::Terminating)
    }

    fn value(&self, ip: IpAddr, hints: bool) -> Value {
        let (ready, serving, terminating) = match self.state {
            State::Ready => (true, true, false),
            State::Unready => (false, false, false),
            State::Terminating => (false, true, true),
            State::Stopped => (false, false, true),
        };
        let mut value = manifests::endpoint(ip, &format!("node{}", self.node + 1));
        value["conditions"] = json!({"ready": ready, "serving": serving, "terminating": terminating});
        if hints {
            value["hints"] = json!({"forZones": [{"name": ZONES[self.node]}]});
        }
        value
    }
}

/// Everything that steps change.
#[derive(Clone, Debug)]
pub(crate) struct Objects {
    pub(crate) backends: Vec<Backend>,
    /// The service with every kind of address.
    pub(crate) web: Value,
    /// The service that changes its type.
    pub(crate) turn: Value,
    /// Number of slices per family, and by how many the endpoints are shifted among them.
    pub(crate) slices: (usize, usize),
    /// Put every endpoint into two slices.
    pub(crate) doubled: bool,
    pub(crate) hints: bool,
    /// Index of the zone of each node.
    pub(crate) zones: [usize; 2],
    /// Names and addresses of the nodes.
    nodes: Vec<(String, [IpAddr; 2])>,
}

impl Objects {
    pub(crate) fn new(backends: Vec<Backend>, nodes: [&Host; 2]) -> Self {
        let mut web = manifests::service("web", &CLUSTER_IPS, &SERVICE_PORTS);
        web["spec"]["type"] = json!("LoadBalancer");
        for index in 0..SERVICE_PORTS.len() {
            web["spec"]["ports"][index]["nodePort"] = json!(NODE_PORT);
        }
        web["status"] = json!({"loadBalancer": {"ingress": [{"ip": LB[0]}, {"ip": LB[1]}]}});
        Self {
            backends,
            web,
            turn: manifests::service("turn", &TURN, &SERVICE_PORTS),
            slices: (1, 0),
            doubled: false,
            hints: false,
            zones: [0, 1],
            nodes: nodes
                .map(|host| (host.name.clone(), [host.v4.into(), host.v6.into()]))
                .into(),
        }
    }

    pub(crate) fn backend(&mut self, pod: &str) -> &mut Backend {
        self.backends.iter_mut().find(|backend| backend.pod == pod).unwrap()
    }

    pub(crate) fn remove(&mut self, pod: &str) {
        self.backends.retain(|backend| backend.pod != pod);
    }

    pub(crate) fn policy(&mut self, field: &str, value: &str) {
        self.web["spec"][field] = json!(value);
    }

    /// All objects but `many`, with the marker of this version.
    pub(crate) fn values(&self, version: u16) -> Vec<Value> {
        let mut values = vec![self.web.clone(), self.turn.clone()];
        values.extend(self.slices_of("web"));
        values.extend(self.slices_of("turn"));
        for ((name, ips), zone) in self.nodes.iter().zip(self.zones) {
            let addresses: Vec<_> = ips
                .iter()
                .map(|ip| json!({"type": "InternalIP", "address": ip}))
                .collect();
            values.push(json!({
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": name, "labels": {ZONE_LABEL: ZONES[zone]}},
                "status": {"addresses": addresses},
            }));
        }
        values.push(manifests::service("marker", &[MARKER], &[port("", "TCP", version)]));
        values
    }

    fn slices_of(&self, service: &str) -> Vec<Value> {
        let (count, shift) = self.slices;
        let mut values = Vec::new();
        for (family, address_type) in ["IPv4", "IPv6"].into_iter().enumerate() {
            for slice in 0..count {
                let belongs = |index: usize| self.doubled || (index + shift) % count == slice;
                let all = self.backends.iter().enumerate();
                let own = all.filter(|(index, _)| belongs(*index));
                let endpoints = own.map(|(_, b)| b.value(b.ips[family], self.hints)).collect();
                let name = format!("{service}-{}-{slice}", address_type.to_lowercase());
                values.push(manifests::slice(
                    &name,
                    service,
                    address_type,
                    &ENDPOINT_PORTS,
                    endpoints,
                ));
            }
        }
        values
    }

    /// Who may answer on these paths. A small model of sections F and G for the objects that occur here: at least one endpoint is
    /// ready everywhere, so no fallback is ever used.
    pub(crate) fn rules(&self, paths: &[Path]) -> Rules {
        let names = |keep: &dyn Fn(&Backend) -> bool| -> BTreeSet<String> {
            let kept = self.backends.iter().filter(|backend| keep(backend));
            kept.map(|backend| backend.pod.clone()).collect()
        };
        let ready = |backend: &Backend| backend.state == State::Ready;
        let is_local = |field: &str| self.web["spec"][field] == json!("Local");
        let serving = names(&Backend::is_serving);
        let mut rules = Rules {
            keep: serving.clone(),
            serving,
            ..Rules::default()
        };
        for path in paths.iter().filter(|path| path.to != "many") {
            let node = usize::from(path.to == "nodePort of node 2");
            let local = match path.to {
                "cluster IP" => is_local("internalTrafficPolicy"),
                "turn" => false,
                _ => path.client == "external" && is_local("externalTrafficPolicy"),
            };
            let allowed = names(&|backend| {
                let near = !self.hints || self.zones[node] == backend.node;
                ready(backend) && if local { backend.node == node } else { near }
            });
            assert!(!allowed.is_empty(), "{path}: a step must leave an endpoint");
            rules.answers.insert(*path, allowed);
        }
        rules
    }
}

/// The thousand endpoints per family of one generation, in ten slices each.
pub(crate) fn many(generation: u8) -> (Vec<Value>, [Vec<IpAddr>; 2]) {
    const SLICES: u8 = 10;
    const PORT: [Port; 1] = [port("", "TCP", MANY_PORT)];
    let mut values = vec![manifests::service("many", &MANY, &[port("", "TCP", 80)])];
    let mut addresses = [Vec::new(), Vec::new()];
    for (family, address_type) in ["IPv4", "IPv6"].into_iter().enumerate() {
        for slice in 0..SLICES {
            let third = generation * SLICES + slice;
            let ips = (1..=100).map(|i: u8| match family {
                0 => IpAddr::from([10, 250, third, i]),
                _ => format!("fd00:250::{third:x}:{i:x}").parse().unwrap(),
            });
            let ips: Vec<IpAddr> = ips.collect();
            let endpoints = ips.iter().map(|ip| manifests::endpoint(ip, "node2")).collect();
            let name = format!("many-{}-{slice}", address_type.to_lowercase());
            values.push(manifests::slice(&name, "many", address_type, &PORT, endpoints));
            addresses[family].extend(ips);
        }
    }
    (values, addresses)
}
