//! What is answered on a Service's `healthCheckNodePort` (S156, S159).

use std::collections::BTreeSet;

use proxy_common::addr::{Addr4, Addr6, Port};

use super::categorize;
use crate::model::slice::ENDPOINT_LOCAL;
use crate::model::{EndpointSlice, Family, Service};

/// A port to answer on, and what to say there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HealthCheck {
    /// The port.
    pub port: Port,
    /// Local ready endpoints in IPv4 and IPv6; `None`: the Service does not exist there.
    pub local_ready: [Option<usize>; 2],
}

/// The health check of a Service, if it has one.
pub fn health_check<'a>(
    service: &Service,
    slices: impl Iterator<Item = &'a EndpointSlice> + Clone,
) -> Option<HealthCheck> {
    Some(HealthCheck {
        port: service.health_check_port?,
        local_ready: [
            local_ready::<Addr4>(service, slices.clone()),
            local_ready::<Addr6>(service, slices),
        ],
    })
}

/// Addresses, not ports: a pod that serves three ports counts once.
fn local_ready<'a, A: Family>(
    service: &Service,
    slices: impl Iterator<Item = &'a EndpointSlice> + Clone,
) -> Option<usize> {
    service.cluster_ip::<A>()?;
    let mut addrs = BTreeSet::new();
    for port in &service.ports {
        let candidates = categorize::candidates::<A>(port, slices.clone());
        let ready = candidates
            .iter()
            .map(|candidate| candidate.endpoint)
            .filter(|endpoint| endpoint.is_ready() && endpoint.has(ENDPOINT_LOCAL));
        addrs.extend(ready.map(|endpoint| endpoint.addr));
    }
    Some(addrs.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::fixtures::{LEAVING_HERE, READY, READY_HERE, service, slice};

    #[test]
    fn endpoints_are_counted_once() {
        let ports = ["a:80/TCP", "b:81/TCP"];
        let mut web = service("web", &["10.96.0.1"], &ports);
        let slices = [slice(
            "x",
            "web",
            &ports,
            &[
                ("10.0.0.1", READY_HERE),
                ("10.0.0.2", LEAVING_HERE),
                ("10.0.0.3", READY),
            ],
        )];
        assert_eq!(health_check(&web, slices.iter()), None, "S156");
        web.health_check_port = Some(Port::new(30_999));
        let check = health_check(&web, slices.iter()).unwrap();
        assert_eq!(check.local_ready, [Some(1), None], "S159");
    }
}
