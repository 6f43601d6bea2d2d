//! What the rules say of some rows, written by hand: the second opinion about the tracer. Each stands for both families, and for all
//! ways in which its source may ask.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::cluster::Cluster;
use super::expect::Expected;
use super::flow::Source::{Host, OtherHost, Outsider, Pod};
use super::flow::Via::{Balancer, BridgePort, ClusterIp, ExternalIp, NodePort, SecondaryPort, Undefined, Unregistered};
use super::flow::{Flow, Source, Via};

/// Under which address servers see the client.
#[derive(Clone, Copy, Debug)]
enum Seen {
    /// Its own.
    Kept,
    /// One of this node's.
    Node(usize),
    /// Its own or one of this node's: nobody asks for either (S118).
    Either(usize),
}

/// What happens.
#[derive(Clone, Copy, Debug)]
enum Then {
    By(&'static [&'static str], Seen),
    Refused,
    Dropped,
}

use Seen::{Either, Kept, Node};
use Then::{By, Dropped, Refused};

type Rule = (&'static str, Source, &'static str, Via, Then);

const ALL: &[&str] = &["pod1-1", "pod2-1", "pod3-1"];
const P11: Source = Pod("pod1-1");
const P12: Source = Pod("pod1-2");
const P21: Source = Pod("pod2-1");
const P22: Source = Pod("pod2-2");
const P31: Source = Pod("pod3-1");

#[rustfmt::skip]
const RULES: &[Rule] = &[
    // The matrix of section K: policy Cluster.
    ("S119", P12, "everywhere", ClusterIp, By(&["pod1-1", "pod2-1", "pod3-1"], Kept)),
    ("S108", Host(0), "everywhere", ClusterIp, By(ALL, Node(0))),
    ("S108", OtherHost(2), "everywhere", ClusterIp, By(ALL, Node(2))),
    ("S108", Outsider(0), "everywhere", ClusterIp, By(ALL, Node(0))),
    ("S108", Outsider(1), "everywhere", ClusterIp, By(ALL, Node(1))),
    ("S109", P12, "everywhere", NodePort(0), By(ALL, Node(0))),
    ("S109", P22, "everywhere", Balancer, By(ALL, Node(1))),
    ("S109", P22, "only-routed", ExternalIp, By(&["pod2-1"], Node(1))),
    ("S109", Outsider(0), "everywhere", Balancer, By(ALL, Node(0))),
    ("S109", Outsider(1), "everywhere", ExternalIp, By(ALL, Node(1))),
    ("S80", Outsider(0), "only-bridged", NodePort(2), By(&["pod1-1"], Node(2))),
    ("S85", Outsider(0), "everywhere", SecondaryPort, By(ALL, Node(0))),
    ("S85", P31, "everywhere", BridgePort, By(ALL, Node(0))),
    // Policy Local.
    ("S87", P12, "everywhere-local", NodePort(0), By(ALL, Kept)),
    ("S87", P22, "everywhere-local", Balancer, By(ALL, Kept)),
    ("S87", Host(1), "everywhere-local", Balancer, By(ALL, Node(1))),
    ("S87", OtherHost(0), "everywhere-local", ExternalIp, By(ALL, Node(0))),
    ("S87", Host(0), "everywhere-local", NodePort(0), By(ALL, Node(0))),
    ("S75", Host(1), "everywhere", NodePort(1), By(ALL, Node(1))),
    ("S87", Outsider(0), "everywhere-local", NodePort(0), By(&["pod1-1"], Kept)),
    ("S87", Outsider(0), "everywhere-local", NodePort(1), By(&["pod2-1"], Kept)),
    ("S87", Outsider(1), "everywhere-local", Balancer, By(&["pod2-1"], Kept)),
    ("S87", Outsider(0), "everywhere-local", ExternalIp, By(&["pod1-1"], Kept)),
    ("S88", P12, "only-routed-local", NodePort(0), By(&["pod2-1"], Kept)),
    ("S89", Host(2), "only-routed-local", NodePort(0), Dropped),
    ("S89", OtherHost(2), "only-routed-local", NodePort(0), Dropped),
    ("S89", Host(0), "everywhere-local", NodePort(1), By(&["pod2-1"], Kept)),
    ("S125", Outsider(0), "only-routed-local", Balancer, Dropped),
    ("S125", Outsider(0), "only-routed-local", NodePort(0), Dropped),
    ("S125", Outsider(1), "only-routed-local", Balancer, By(&["pod2-1"], Kept)),
    // internalTrafficPolicy binds everybody, and changes no address.
    ("S57", P12, "everywhere-local", ClusterIp, By(&["pod1-1"], Kept)),
    ("S57", P22, "everywhere-local", ClusterIp, By(&["pod2-1"], Kept)),
    ("S57", Host(0), "everywhere-local", ClusterIp, By(&["pod1-1"], Node(0))),
    ("S57", OtherHost(2), "everywhere-local", ClusterIp, By(&["pod3-1"], Node(2))),
    ("S113", Outsider(1), "everywhere-local", ClusterIp, By(&["pod2-1"], Node(1))),
    ("S58", P12, "only-routed-local", ClusterIp, Dropped),
    ("S126", Host(0), "only-routed-local", ClusterIp, Dropped),
    ("S126", OtherHost(0), "only-routed-local", ClusterIp, Dropped),
    ("S126", Outsider(0), "only-routed-local", ClusterIp, Dropped),
    ("S56", P31, "internal-local", ClusterIp, Dropped),
    ("S56", P31, "internal-local", Balancer, By(&["pod1-2", "pod2-2"], Node(2))),
    ("S56", P31, "external-local", ClusterIp, By(&["pod1-2", "pod2-2"], Kept)),
    ("S56", Outsider(0), "external-local", Balancer, By(&["pod1-2"], Kept)),
    // A pod that is its own backend.
    ("S110", P11, "only-bridged", ClusterIp, By(&["pod1-1"], Node(0))),
    ("S110", P11, "only-bridged", NodePort(0), By(&["pod1-1"], Node(0))),
    ("S110", P11, "only-bridged", Balancer, By(&["pod1-1"], Node(0))),
    ("S110", P11, "only-bridged-local", ClusterIp, By(&["pod1-1"], Node(0))),
    ("S110", P11, "only-bridged-local", NodePort(0), By(&["pod1-1"], Node(0))),
    ("S110", P11, "only-bridged-local", Balancer, By(&["pod1-1"], Node(0))),
    ("S110", P21, "only-routed", ClusterIp, By(&["pod2-1"], Node(1))),
    ("S110", P21, "only-routed", NodePort(1), By(&["pod2-1"], Node(1))),
    ("S110", P21, "only-routed", Balancer, By(&["pod2-1"], Node(1))),
    ("S110", P21, "only-routed-local", ClusterIp, By(&["pod2-1"], Node(1))),
    ("S110", P21, "only-routed-local", NodePort(1), By(&["pod2-1"], Node(1))),
    ("S110", P21, "only-routed-local", Balancer, By(&["pod2-1"], Node(1))),
    ("S110", P11, "only-bridged", NodePort(2), By(&["pod1-1"], Node(2))),
    // Nothing there.
    ("S122", P12, "none", ClusterIp, Refused),
    ("S122", P22, "none", NodePort(1), Refused),
    ("S122", P12, "none-local", Balancer, Refused),
    ("S122", Host(0), "none", ClusterIp, Refused),
    ("S122", OtherHost(2), "none", Balancer, Refused),
    ("S122", Outsider(0), "none", ClusterIp, Refused),
    ("S122", Outsider(1), "none-local", ExternalIp, Refused),
    ("S122", Outsider(1), "none-local", NodePort(2), Refused),
    ("S128", Outsider(0), "none", SecondaryPort, Refused),
    ("S77", P12, "everywhere", Undefined, Refused),
    ("S77", Host(1), "everywhere", Undefined, Refused),
    ("S77", Outsider(0), "everywhere", Undefined, Refused),
    ("S93", Outsider(0), "everywhere", Unregistered(1), Refused),
    // Conditions.
    ("S48", P31, "terminating", ClusterIp, By(&["pod1-1", "pod2-1"], Kept)),
    ("S49", P31, "unready", ClusterIp, Refused),
    ("S50", Outsider(0), "unready", Balancer, Refused),
    ("S52", P12, "terminating-one", ClusterIp, By(&["pod3-1"], Kept)),
    ("S53", Outsider(1), "terminating-local", Balancer, By(&["pod2-1"], Kept)),
    ("S54", P22, "terminating-local", Balancer, By(&["pod3-1"], Kept)),
    ("S55", Outsider(0), "terminating-local", Balancer, Dropped),
    ("S58", P12, "one-ready", ClusterIp, Dropped),
    // Endpoints on the host network.
    ("S118", P12, "host-network", ClusterIp, By(&["node1", "node2"], Kept)),
    ("S118", Outsider(0), "host-network-local", NodePort(0), By(&["node1"], Either(0))),
    ("S118", Outsider(1), "host-network-local", Balancer, By(&["node2"], Either(1))),
    // Who may ask.
    ("S102", P12, "ranges", Balancer, By(ALL, Node(0))),
    ("S102", P22, "ranges", Balancer, Dropped),
    ("S102", P22, "ranges-local", Balancer, Dropped),
    ("S101", Outsider(0), "ranges", Balancer, By(ALL, Node(0))),
    ("S103", Outsider(1), "ranges", Balancer, Dropped),
    ("S103", Host(0), "ranges", Balancer, Dropped),
    ("S101", Outsider(1), "ranges", ExternalIp, By(ALL, Node(1))),
    ("S101", Outsider(1), "ranges", ClusterIp, By(ALL, Node(1))),
    ("S92", Outsider(1), "ranges", NodePort(1), By(ALL, Node(1))),
    ("S107", Outsider(1), "ranges-none", Balancer, Dropped),
    ("S107", Outsider(0), "ranges-none", Balancer, Refused),
    // Hints.
    ("S67", P12, "hints-zone", ClusterIp, By(&["pod1-1", "pod2-1"], Kept)),
    ("S67", P22, "hints-zone", ClusterIp, By(&["pod1-1", "pod2-1"], Kept)),
    ("S74", Host(2), "hints-zone", ClusterIp, By(&["pod2-1", "pod3-1"], Node(2))),
    ("S73", Outsider(0), "hints-zone", Balancer, By(&["pod1-1", "pod2-1"], Node(0))),
    ("S73", Outsider(0), "hints-zone", NodePort(2), By(&["pod2-1", "pod3-1"], Node(2))),
    ("S66", P12, "hints-node", ClusterIp, By(&["pod1-1", "pod2-1"], Kept)),
    ("S66", P21, "hints-node", NodePort(1), By(&["pod2-1", "pod1-2"], Node(1))),
    ("S69", P31, "hints-node", ClusterIp, By(&["pod1-2"], Kept)),
    ("S68", P12, "hints-partial", ClusterIp, By(ALL, Kept)),
    ("S69", P31, "hints-elsewhere", ClusterIp, By(&["pod1-1"], Kept)),
    ("S53", Outsider(0), "hints-local", Balancer, By(&["pod1-1"], Kept)),
    ("S73", P12, "hints-local", Balancer, By(&["pod2-1", "pod3-1"], Kept)),
    // Load-balancer addresses that are for outside use, and an externalIP that a node has.
    ("S95", P12, "proxied", Balancer, By(&["balancer"], Kept)),
    ("S95", P22, "proxied", Balancer, By(&["balancer"], Kept)),
    ("S95", Host(0), "proxied", Balancer, By(&["balancer"], Kept)),
    ("S99", Outsider(0), "own-ip", ExternalIp, By(ALL, Node(0))),
    ("S99", Host(0), "own-ip", ExternalIp, By(ALL, Node(0))),
    ("S99", P22, "own-ip", ExternalIp, By(ALL, Node(1))),
];

/// The rows that the rules are about, with what they say.
pub(crate) fn rows(cluster: &Cluster) -> Vec<(Flow, Expected)> {
    let mut rows = Vec::new();
    for (_, source, service, via, then) in RULES {
        for is_v4 in [true, false] {
            let target = via.target(cluster, cluster.spec(service), is_v4);
            for request in source.requests() {
                let flow = Flow {
                    source: *source,
                    service,
                    via: *via,
                    request: *request,
                    target,
                };
                rows.push((flow.clone(), then.expected(cluster, &flow)));
            }
        }
    }
    rows
}

impl Then {
    fn expected(self, cluster: &Cluster, flow: &Flow) -> Expected {
        let ip = flow.target.ip();
        let own = cluster.all_addresses(flow.source.host(cluster).0.address(ip));
        let of_node = |node: usize| cluster.all_addresses(cluster.world.topology.node(node).address(ip));
        let addresses: BTreeSet<IpAddr> = match self {
            Refused => return Expected::Refused,
            Dropped => return Expected::Dropped,
            By(_, Kept) => own,
            By(_, Node(node)) => of_node(node),
            By(_, Either(node)) => own.union(&of_node(node)).copied().collect(),
        };
        let By(servers, _) = self else {
            unreachable!("handled above")
        };
        let servers = servers.iter().map(|name| ((*name).to_owned(), addresses.clone()));
        Expected::Answered(servers.collect())
    }
}
