//! What the plans say of a row: the tracer's answer at each node that the packet passes. Routing between nodes is known here, and
//! nothing of services.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use proxy_agent::plan::trace::{Outcome, Packet, trace};
use proxy_common::frontend::Origin;

use super::cluster::{BALANCER, Cluster};
use super::flow::{Flow, Source};

/// What must happen to a row's connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    /// Each of these servers answers some, nobody else does; with the addresses under which it may see the client.
    Answered(BTreeMap<String, BTreeSet<IpAddr>>),
    Refused,
    Dropped,
    /// These answer, or nobody does: replies may miss the node that translated the request (S87a).
    Perhaps(BTreeMap<String, BTreeSet<IpAddr>>),
}

impl Cluster {
    /// What the plans say.
    pub(crate) fn expect(&self, flow: &Flow) -> Expected {
        let (host, own) = flow.source.host(self);
        let client = host.address(flow.target.ip());
        let owner = self.owner(flow.target.ip());
        if flow.is_over_loopback(own, owner) {
            return Expected::Refused;
        }
        let (first, origin) = match (flow.source, own) {
            (Source::Outsider(number), _) => (owner.unwrap_or(number), Origin::External),
            (Source::Pod(_), Some(node)) => (node, Origin::Pod),
            (_, node) => (node.unwrap_or_default(), Origin::Host),
        };
        let packet = Packet {
            origin,
            client,
            addr: flow.target.ip(),
            port: flow.target.port(),
            protocol: flow.request.protocol(),
        };
        let mut node = first;
        let mut outcome = self.trace_at(node, &packet);
        // Whoever has the address gets what nobody translated.
        if let (Outcome::NotAService, Some(owner)) = (&outcome, owner)
            && owner != node
        {
            node = owner;
            let origin = if origin == Origin::Host {
                Origin::External
            } else {
                origin
            };
            outcome = self.trace_at(node, &Packet { origin, ..packet });
        }
        match outcome {
            Outcome::Refused => Expected::Refused,
            Outcome::Dropped => Expected::Dropped,
            Outcome::NotAService if owner.is_some() => Expected::Refused,
            Outcome::NotAService => {
                let balancer = self.servers.get(&flow.target.ip()).filter(|name| *name == BALANCER);
                let name = balancer
                    .unwrap_or_else(|| panic!("{flow}: nobody has the address"))
                    .clone();
                Expected::Answered([(name, self.all_addresses(client))].into())
            }
            Outcome::Backends(backends) => {
                let is_far = |ip: IpAddr| !self.is_behind(node, ip);
                let returns_elsewhere = origin == Origin::Pod
                    && own != Some(node)
                    && backends.iter().any(|(ip, masquerades)| !masquerades && is_far(ip.ip()));
                let seen = |(backend, masquerades): (&SocketAddr, &bool)| {
                    let name = self.servers[&backend.ip()].clone();
                    (name, self.seen(flow, node, client, backend.ip(), *masquerades))
                };
                let servers = backends.iter().map(seen).collect();
                if returns_elsewhere {
                    Expected::Perhaps(servers)
                } else {
                    Expected::Answered(servers)
                }
            }
        }
    }

    fn trace_at(&self, node: usize, packet: &Packet) -> Outcome {
        let node = &self.nodes[node];
        trace(node.plans.iter().map(|(name, plan)| (name, plan)), &node.view, packet)
    }

    /// Is the address the node's or one of its pods'?
    fn is_behind(&self, node: usize, ip: IpAddr) -> bool {
        let node = &self.world.topology.nodes[node];
        let pods = node.pods.iter().map(|pod| &pod.host);
        pods.chain([&node.host]).any(|host| host.address(ip) == ip)
    }

    /// The addresses of whoever has this one. A node uses whichever it likes.
    pub(crate) fn all_addresses(&self, ip: IpAddr) -> BTreeSet<IpAddr> {
        let of_node = |node: usize| {
            let addresses = self.nodes[node].view.node_port_addresses.iter();
            addresses
                .copied()
                .filter(|other| other.is_ipv4() == ip.is_ipv4())
                .collect()
        };
        self.owner(ip).map_or_else(|| [ip].into(), of_node)
    }

    /// The addresses under which a backend may see the client, if `node` translated.
    fn seen(&self, flow: &Flow, node: usize, client: IpAddr, backend: IpAddr, masquerades: bool) -> BTreeSet<IpAddr> {
        let of_client = self.all_addresses(client);
        let of_node = self.all_addresses(self.world.topology.node(node).address(client));
        if self.owner(backend) == Some(node) {
            // S118: towards the node itself either is fine; and what the node sends itself has to have some other address, which is
            // the one that packet was sent to: what was dialled, or the cluster IP past the loopback interface.
            let spec = self.spec(flow.service);
            let cluster_ip = spec.addresses(client.is_ipv4(), &self.world.topology).cluster;
            let dialled = [flow.target.ip(), cluster_ip];
            return of_node.into_iter().chain(of_client).chain(dialled).collect();
        }
        if masquerades { of_node } else { of_client }
    }
}

impl Flow {
    /// Does it go from a node to an address of this very node, untranslated by the socket programs? Such a packet uses the loopback
    /// interface, which has no programs: nobody serves it (see the known limits in `docs/operations.md`).
    fn is_over_loopback(&self, own: Option<usize>, owner: Option<usize>) -> bool {
        own == owner && matches!(self.source, Source::OtherHost(_))
    }
}
