//! The cluster as the proxy sees it: our own Service, EndpointSlice and Node, reduced to the fields that forwarding depends on,
//! and [`ClusterState`], which holds them and knows what changed.
//!
//! `source` makes these values and sends them as [`Change`]s; `plan` reads them. Nothing here knows of kube, aya or tokio, and
//! everything here has been validated: addresses are addresses, ports are ports, and what was malformed is not here (S19).

pub mod address;
#[cfg(test)]
pub(crate) mod fixtures;
mod networks;
pub mod slice;
mod slices;
pub mod state;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use ipnet::IpNet;
use proxy_common::addr::{Addr4, Addr6, Address, Port, Protocol};

pub use slice::{Endpoint, EndpointSlice, Family, SliceEndpoints, SlicePort};
pub use state::{ClusterState, PendingChanges};

/// Namespace and name of an object; a Node or ServiceCIDR has no namespace. Cheap to clone: the same name stands in several tables.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ObjectName {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

impl ObjectName {
    /// The name from its two parts.
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl std::fmt::Display for ObjectName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &*self.namespace {
            "" => f.write_str(&self.name),
            namespace => write!(f, "{namespace}/{}", self.name),
        }
    }
}

/// A Service that is to be proxied. Those that S1, S2, S5 and S6 tell us to ignore never become one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    /// Namespace and name.
    pub name: ObjectName,
    /// The cluster IP of the IPv4 data plane (S16); `None`: the service does not exist there.
    pub cluster_ip4: Option<Addr4>,
    /// The same for IPv6.
    pub cluster_ip6: Option<Addr6>,
    /// Load-balancer addresses that the node serves itself, of both families (S94).
    pub load_balancer_ips: Vec<IpAddr>,
    /// `externalIPs`, of both families (S98).
    pub external_ips: Vec<IpAddr>,
    /// `loadBalancerSourceRanges`, of both families (S101).
    pub source_ranges: Vec<IpNet>,
    /// Ports, in the order of the object.
    pub ports: Vec<ServicePort>,
    /// `internalTrafficPolicy: Local` (S57).
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local`, where it is honoured (S51).
    pub external_local: bool,
    /// `healthCheckNodePort`, where it is to be served (S156).
    pub health_check_port: Option<Port>,
    /// Session affinity timeout in seconds, 0 for none (S132).
    pub affinity_seconds: u32,
    /// Creation time in seconds since 1970, for the precedence of S37.
    pub created: i64,
}

/// One port of a Service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServicePort {
    /// Name, empty for an unnamed one.
    pub name: Box<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// The port that clients dial.
    pub port: Port,
    /// The port that they dial on the node's own addresses (S9).
    pub node_port: Option<Port>,
}

impl Service {
    /// The cluster IP of one family.
    pub fn cluster_ip<A: Address>(&self) -> Option<A> {
        let ip = match A::FAMILY {
            4 => self.cluster_ip4.map(Into::into),
            _ => self.cluster_ip6.map(Into::into),
        };
        ip.and_then(A::from_ip)
    }
}

/// The own Node, as far as it matters.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Node {
    /// Label `topology.kubernetes.io/zone` (S70).
    pub zone: Option<Box<str>>,
    /// Its address of each family, the primary one first (S184).
    pub ips: Vec<IpAddr>,
    /// Addresses of its pods, one prefix per family (S183).
    pub pod_cidrs: Vec<IpNet>,
    /// The node is about to go away (S175): load balancers should look elsewhere.
    pub leaving: bool,
}

/// A network that cluster IPs are taken from (S78).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceCidr {
    /// Name of the object.
    pub name: Arc<str>,
    /// Its prefixes without host bits.
    pub networks: Vec<IpNet>,
}

/// One thing that happened to the cluster.
#[derive(Clone, PartialEq, Debug)]
pub enum Change {
    /// The first list of Services, or a new full one: whatever is not in it is gone.
    Services(Vec<Service>),
    /// The same for EndpointSlices.
    Slices(Vec<EndpointSlice>),
    /// A Service as it is now; `None` if it was deleted or is to be ignored from now on (S4, S7).
    Service(ObjectName, Option<Service>),
    /// An EndpointSlice as it is now; `None` if it was deleted or is to be ignored from now on. With it, when the change that led
    /// to it was made (S188).
    Slice(ObjectName, Option<EndpointSlice>, Option<SystemTime>),
    /// The own Node as it is now. `None`: there is none.
    Node(Option<Node>),
    /// The first list of ServiceCIDRs, or a new full one; an empty one if there is no such kind.
    ServiceCidrs(Vec<ServiceCidr>),
    /// A ServiceCIDR as it is now; `None` if it was deleted.
    ServiceCidr(Arc<str>, Option<ServiceCidr>),
}
