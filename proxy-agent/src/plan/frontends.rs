//! The addresses and ports under which clients may dial a service port: its cluster IP of each family (S16), load-balancer addresses
//! (S94), externalIPs (S98) and node port (S9); and who may dial the load-balancer addresses (S101).
//!
//! Only in families in which the Service has a cluster IP: without, it does not exist there (S16, S18).

use std::net::IpAddr;

use proxy_common::addr::{Address, Port};
use proxy_common::frontend::{FRONTEND_CLUSTER_IP, FRONTEND_LOCAL, FRONTEND_SOURCE_RANGES, FRONTEND_UNDEFINED};

use super::{FrontendPlan, NodeContext};
use crate::model::{Service, ServicePort};

/// The frontends of one port in one family. Of several kinds that share an address the first here has it: a load-balancer address
/// that is an externalIP as well keeps its source ranges.
pub fn frontends<A: Address>(service: &Service, port: &ServicePort, has_source_ranges: bool) -> Vec<FrontendPlan<A>> {
    let Some(cluster_ip) = service.cluster_ip::<A>() else {
        return Vec::new();
    };
    let policy = |is_local| if is_local { FRONTEND_LOCAL } else { 0 };
    let internal = FRONTEND_CLUSTER_IP | policy(service.internal_local);
    let external = policy(service.external_local);
    let balanced = external | if has_source_ranges { FRONTEND_SOURCE_RANGES } else { 0 };

    let mut frontends: Vec<FrontendPlan<A>> = Vec::new();
    let mut add = |addr: A, port: Port, flags: u32| {
        if !frontends.iter().any(|known| (known.addr, known.port) == (addr, port)) {
            frontends.push(FrontendPlan { addr, port, flags });
        }
    };
    add(cluster_ip, port.port, internal);
    for addr in of_family(&service.load_balancer_ips) {
        add(addr, port.port, balanced);
    }
    for addr in of_family(&service.external_ips) {
        add(addr, port.port, external);
    }
    if let Some(node_port) = port.node_port {
        add(A::zeroed(), node_port, external);
    }
    // Every port of the Service says so: the markers stay as long as one of them does.
    let undefined = Port::new(0);
    add(cluster_ip, undefined, FRONTEND_CLUSTER_IP | FRONTEND_UNDEFINED);
    for addr in of_family(&service.load_balancer_ips).chain(of_family(&service.external_ips)) {
        add(addr, undefined, FRONTEND_UNDEFINED);
    }
    frontends
}

/// Who may dial the load-balancer addresses of a family. Nothing: everybody, be it that no entry is of this family (S105).
pub fn source_ranges<A: Address>(service: &Service, node: &NodeContext) -> Vec<(A, u8)> {
    let vips: Vec<A> = of_family(&service.load_balancer_ips).collect();
    if vips.is_empty() {
        return Vec::new();
    }
    let mut ranges: Vec<(A, u8)> = service
        .source_ranges
        .iter()
        .filter_map(|range| Some((A::from_ip(range.network())?, range.prefix_len())))
        .collect();
    // S106: a node that holds the address itself talks to itself with it.
    let node_is_allowed = service.source_ranges.iter().any(|range| {
        node.ips
            .iter()
            .any(|ip| A::from_ip(*ip).is_some() && range.contains(ip))
    });
    if node_is_allowed {
        ranges.extend(vips.into_iter().map(|vip| (vip, A::BITS)));
    }
    ranges.sort_unstable();
    ranges.dedup();
    ranges
}

/// Does some frontend choose from the local set (S56)?
pub fn uses_local<A>(frontends: &[FrontendPlan<A>]) -> bool {
    frontends.iter().any(|frontend| frontend.flags & FRONTEND_LOCAL != 0)
}

fn of_family<A: Address>(ips: &[IpAddr]) -> impl Iterator<Item = A> {
    ips.iter().filter_map(|ip| A::from_ip(*ip))
}
