//! What the kernel should hold for each service port: the contract between planning and the datapath.
//!
//! Planning is a pure function of the model, without clock or I/O, run for one Service at a time. `datapath::sync` takes the
//! plans of the services that changed and writes the difference.

pub mod categorize;
pub mod frontends;
pub mod health_check;
pub mod no_local;
pub mod topology;
pub mod trace;

use std::fmt;
use std::net::IpAddr;

use proxy_common::addr::{Addr4, Addr6, Port, Protocol};
use proxy_common::backend::Backend;

pub use self::health_check::{HealthCheck, health_check};
pub use self::no_local::NoLocal;
use crate::model::state::service_port_name;
use crate::model::{EndpointSlice, Family, Node, Service, ServicePort};

/// What planning needs to know of this node, beside what the endpoints already say.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NodeContext {
    /// Its zone (S70).
    pub zone: Option<Box<str>>,
    /// Its addresses (S106).
    pub ips: Vec<IpAddr>,
}

impl From<&Node> for NodeContext {
    fn from(node: &Node) -> Self {
        Self {
            zone: node.zone.clone(),
            ips: node.ips.clone(),
        }
    }
}

/// Plans every port of a service from the slices attached to it, in whatever order they come. A port without any address to dial
/// is not planned.
pub fn plan_service<'a>(
    service: &Service,
    slices: impl Iterator<Item = &'a EndpointSlice> + Clone,
    node: &NodeContext,
) -> Vec<(ServicePortName, ServicePortPlan)> {
    let mut plans = Vec::with_capacity(service.ports.len());
    for port in &service.ports {
        let plan = ServicePortPlan {
            v4: plan_family(service, port, slices.clone(), node),
            v6: plan_family(service, port, slices.clone(), node),
            affinity_seconds: service.affinity_seconds,
            created: service.created,
        };
        if plan.v4.frontends.is_empty() && plan.v6.frontends.is_empty() {
            continue;
        }
        plans.push((service_port_name(&service.name, &port.name, port.protocol), plan));
    }
    plans
}

fn plan_family<'a, A: Family>(
    service: &Service,
    port: &ServicePort,
    slices: impl Iterator<Item = &'a EndpointSlice>,
    node: &NodeContext,
) -> FamilyPlan<A> {
    let source_ranges = frontends::source_ranges(service, node);
    let frontends = frontends::frontends(service, port, !source_ranges.is_empty());
    if frontends.is_empty() {
        return FamilyPlan::default();
    }
    let candidates = categorize::candidates(port, slices);
    let sets = categorize::categorize(&candidates, node, frontends::uses_local(&frontends));
    FamilyPlan {
        frontends,
        cluster: sets.cluster,
        local: sets.local,
        has_endpoints: sets.has_endpoints,
        source_ranges,
    }
}

/// (namespace/name, port name, protocol): what the rules call a service port. It owns one service id in the kernel.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ServicePortName {
    /// Namespace of the Service.
    pub namespace: String,
    /// Name of the Service.
    pub name: String,
    /// Name of the port, empty for an unnamed one (S28).
    pub port: String,
    /// Protocol of the port.
    pub protocol: Protocol,
}

impl fmt::Display for ServicePortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}:{}/{}", self.namespace, self.name, self.port, self.protocol)
    }
}

/// Everything the kernel should hold for one service port, both families (S15: they never influence each other).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ServicePortPlan {
    /// IPv4 part.
    pub v4: FamilyPlan<Addr4>,
    /// IPv6 part.
    pub v6: FamilyPlan<Addr6>,
    /// Session affinity timeout in seconds, 0 for none.
    pub affinity_seconds: u32,
    /// Precedence when two services claim one frontend (S37): the smaller wins, then the name decides.
    pub created: i64,
}

/// One family of a service port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FamilyPlan<A> {
    /// Addresses and ports a client may dial. No frontend: the service port does not exist in this family.
    pub frontends: Vec<FrontendPlan<A>>,
    /// The cluster set (S52).
    pub cluster: Endpoints<A>,
    /// The local set (S53); empty unless some policy of the service is Local.
    pub local: Endpoints<A>,
    /// Some endpoint is usable anywhere in the cluster (S55).
    pub has_endpoints: bool,
    /// Who may dial the frontends with `FRONTEND_SOURCE_RANGES`: network address and prefix length, sorted, each once (S101).
    pub source_ranges: Vec<(A, u8)>,
}

/// One address and port a client may dial. With `FRONTEND_UNDEFINED`: every other port of the address, of whatever protocol (S77).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrontendPlan<A> {
    /// Address; unspecified for a node port, which stands for every address of the node that serves them (S26).
    pub addr: A,
    /// Port; 0 with `FRONTEND_UNDEFINED`.
    pub port: Port,
    /// `FRONTEND_*` bits of `proxy_common::frontend`, without `FRONTEND_HAS_ENDPOINTS`, which the sync derives.
    pub flags: u32,
}

/// A set of endpoints as it will stand in a range: both parts sorted by (address, port), without duplicates, disjoint.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoints<A> {
    /// May be chosen for a new connection.
    pub selectable: Vec<Backend<A>>,
    /// Not chosen any more, but still serving: running UDP flows stay with them (S145).
    pub keep: Vec<Backend<A>>,
}

impl<A> Default for FamilyPlan<A> {
    fn default() -> Self {
        Self {
            frontends: Vec::new(),
            cluster: Endpoints::default(),
            local: Endpoints::default(),
            has_endpoints: false,
            source_ranges: Vec::new(),
        }
    }
}

impl<A> Default for Endpoints<A> {
    fn default() -> Self {
        Self {
            selectable: Vec::new(),
            keep: Vec::new(),
        }
    }
}

#[cfg(test)]
mod address_tests;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
