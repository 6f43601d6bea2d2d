//! Short ways to write Services and EndpointSlices, for the tests of this crate.

use std::net::IpAddr;
use std::sync::Arc;

use proxy_common::addr::{Addr4, Addr6, Address, Port, Protocol};

use super::slice::{ENDPOINT_LOCAL, ENDPOINT_READY, ENDPOINT_SERVING, ENDPOINT_TERMINATING};
use super::{Endpoint, EndpointSlice, ObjectName, Service, ServicePort, SliceEndpoints, SlicePort};

/// Ready.
pub(crate) const READY: u8 = ENDPOINT_READY | ENDPOINT_SERVING;
/// Ready on this node.
pub(crate) const READY_HERE: u8 = READY | ENDPOINT_LOCAL;
/// Terminating but serving.
pub(crate) const LEAVING: u8 = ENDPOINT_SERVING | ENDPOINT_TERMINATING;
/// Terminating but serving, on this node.
pub(crate) const LEAVING_HERE: u8 = LEAVING | ENDPOINT_LOCAL;

/// `default/<name>`.
pub(crate) fn object(name: &str) -> ObjectName {
    ObjectName::new("default", name)
}

/// A Service with cluster IPs of either family and ports written as `name:number/PROTOCOL`.
pub(crate) fn service(name: &str, ips: &[&str], ports: &[&str]) -> Service {
    let ips: Vec<IpAddr> = ips.iter().map(|ip| ip.parse().unwrap()).collect();
    Service {
        name: object(name),
        cluster_ip4: ips.iter().copied().find_map(Addr4::from_ip),
        cluster_ip6: ips.iter().copied().find_map(Addr6::from_ip),
        ports: ports
            .iter()
            .map(|text| {
                let (name, protocol, port) = port(text);
                ServicePort {
                    name,
                    protocol,
                    port,
                    node_port: None,
                }
            })
            .collect(),
        load_balancer_ips: Vec::new(),
        external_ips: Vec::new(),
        source_ranges: Vec::new(),
        internal_local: false,
        external_local: false,
        health_check_port: None,
        affinity_seconds: 0,
        created: 0,
    }
}

/// A slice `name` of `service` with ports as in [`service`] and endpoints of one family.
pub(crate) fn slice(name: &str, service: &str, ports: &[&str], endpoints: &[(&str, u8)]) -> EndpointSlice {
    let ipv6 = endpoints.first().is_some_and(|(addr, _)| addr.contains(':'));
    EndpointSlice {
        name: object(name),
        service: service.into(),
        ports: ports
            .iter()
            .map(|text| {
                let (name, protocol, port) = port(text);
                SlicePort { name, protocol, port }
            })
            .collect(),
        endpoints: if ipv6 {
            SliceEndpoints::V6(endpoints.iter().map(endpoint).collect())
        } else {
            SliceEndpoints::V4(endpoints.iter().map(endpoint).collect())
        },
    }
}

/// Gives every endpoint of an IPv4 slice these zone hints.
pub(crate) fn with_zones(mut slice: EndpointSlice, zones: &[&str]) -> EndpointSlice {
    if let SliceEndpoints::V4(endpoints) = &mut slice.endpoints {
        for endpoint in endpoints {
            endpoint.zones = Some(Arc::new(zones.iter().map(|zone| (*zone).into()).collect()));
        }
    }
    slice
}

fn endpoint<A: Address>((addr, flags): &(&str, u8)) -> Endpoint<A> {
    Endpoint {
        addr: A::from_ip(addr.parse().unwrap()).unwrap(),
        flags: *flags,
        zones: None,
    }
}

fn port(text: &str) -> (Box<str>, Protocol, Port) {
    let (name, rest) = text.split_once(':').unwrap();
    let (number, protocol) = rest.split_once('/').unwrap();
    let protocol = match protocol {
        "TCP" => Protocol::Tcp,
        "UDP" => Protocol::Udp,
        _ => Protocol::Sctp,
    };
    (name.into(), protocol, Port::new(number.parse().unwrap()))
}
