//! Services.

use std::net::IpAddr;

use ipnet::IpNet;
use proxy_common::addr::{Addr4, Addr6, Address, Port};

use super::super::lenient::Field;
use super::super::{Kind, objects};
use super::{Converter, Reporter, is_text};
use crate::model::address::parse_cidr;
use crate::model::{ObjectName, Service, ServicePort};

const DEFAULT_AFFINITY_SECONDS: u32 = 10_800;
const MAX_AFFINITY_SECONDS: i64 = 86_400;

impl Converter {
    /// The Service, or `None` if it is to be ignored (S1, S2, S5, S6).
    pub fn service(&mut self, name: &ObjectName, object: &objects::Service) -> Option<Service> {
        let (allows_external_ips, is_hidden) = (self.external_ips, self.is_hidden(&object.metadata));
        let mut report = self.reporter(Kind::Service, name);
        let spec = match &object.spec {
            Field::Given(spec) if !is_hidden => spec,
            other => {
                report.read(
                    other,
                    || "spec".to_owned(),
                    "the Service is ignored; spec must be an object",
                );
                return None;
            }
        };
        let cluster_ip = report.read(
            &spec.cluster_ip,
            || "spec.clusterIP".to_owned(),
            "the Service is ignored; write an address",
        );
        if matches!(cluster_ip.as_deref(), None | Some("" | "None")) || is_text(&spec.r#type, "ExternalName") {
            return None;
        }
        let (cluster_ip4, cluster_ip6) = cluster_ips(spec, &mut report);
        let external_ips = if allows_external_ips {
            external_ips(spec, &mut report)
        } else {
            Vec::new()
        };
        let external_local = is_external_local(spec, &external_ips);
        Some(Service {
            name: name.clone(),
            cluster_ip4,
            cluster_ip6,
            load_balancer_ips: load_balancer_ips(object, &mut report),
            external_ips,
            source_ranges: source_ranges(spec, &mut report),
            ports: service_ports(spec, &mut report),
            internal_local: is_text(&spec.internal_traffic_policy, "Local"),
            external_local,
            health_check_port: health_check_port(spec, external_local, &mut report),
            affinity_seconds: affinity_seconds(spec, &mut report),
            created: object
                .metadata
                .creation_timestamp
                .as_ref()
                .map_or(0, |time| time.0.as_second()),
        })
    }
}

/// The cluster IP of each family (S16).
fn cluster_ips(spec: &objects::ServiceSpec, report: &mut Reporter<'_>) -> (Option<Addr4>, Option<Addr6>) {
    const REMEDY: &str = "the Service has no cluster IP of this family; write an address of it";
    let families: Vec<_> = report.items(&spec.ip_families, "spec.ipFamilies");
    let ips: Vec<_> = report.items(&spec.cluster_ips, "spec.clusterIPs");
    if families.is_empty() {
        if ips.len() > 1 {
            let problem = "has several addresses but spec.ipFamilies is empty";
            report.warn(
                "spec.clusterIPs",
                problem,
                "only spec.clusterIP is used; list their families in spec.ipFamilies",
            );
        }
        let text = spec.cluster_ip.given().map_or("", String::as_str);
        let ip = report.address(text, || "spec.clusterIP".to_owned(), REMEDY);
        return (ip.and_then(Addr4::from_ip), ip.and_then(Addr6::from_ip));
    }
    let mut found: (Option<Addr4>, Option<Addr6>) = (None, None);
    for (path, family) in families {
        // The path ends in the index that pairs the two lists (S17).
        let path = path.replace("ipFamilies", "clusterIPs");
        let Some((_, text)) = ips.iter().find(|(other, _)| *other == path) else {
            report.warn(path, format!("is missing for family {family}"), REMEDY);
            continue;
        };
        let Some(ip) = report.address(text, || path.clone(), REMEDY) else {
            continue;
        };
        match (family.as_str(), ip) {
            ("IPv4", IpAddr::V4(ip)) => found.0 = found.0.or(Some(ip.into())),
            ("IPv6", IpAddr::V6(ip)) => found.1 = found.1.or(Some(ip.into())),
            _ => report.warn(path, format!("{ip} is not of family {family}"), REMEDY),
        }
    }
    found
}

fn service_ports(spec: &objects::ServiceSpec, report: &mut Reporter<'_>) -> Vec<ServicePort> {
    let mut ports: Vec<ServicePort> = Vec::new();
    for (path, object) in report.items(&spec.ports, "spec.ports") {
        if let Field::Bad(seen) = &object.name {
            report.warn(
                format!("{path}.name"),
                format!("is {seen}"),
                "the port is ignored; names are text",
            );
            continue;
        }
        let (Some(protocol), Some(port)) = (
            report.protocol(&object.protocol, &path),
            report.port(&object.port, &path),
        ) else {
            continue;
        };
        let name: Box<str> = object.name.given().map_or("", String::as_str).into();
        if ports
            .iter()
            .any(|p| p.protocol == protocol && (p.name == name || p.port == port))
        {
            let problem = "repeats the name or the number of another port of its protocol";
            report.warn(path, problem, "the port is ignored; give it its own name and number");
            continue;
        }
        let path = || format!("{path}.nodePort");
        let node_port = optional_port(&object.node_port, path, "the node port is ignored", report);
        ports.push(ServicePort {
            name,
            protocol,
            port,
            node_port,
        });
    }
    ports
}

/// A port that may be left out; 0 means the same.
fn optional_port(
    field: &Field<i64>,
    path: impl Fn() -> String,
    consequence: &'static str,
    report: &mut Reporter<'_>,
) -> Option<Port> {
    let number = report.read(field, &path, consequence)?;
    match u16::try_from(number) {
        Ok(0) => None,
        Ok(number) => Some(Port::new(number)),
        Err(_) => {
            report.warn(path(), format!("is {number}"), consequence);
            None
        }
    }
}

/// `spec.externalIPs` (S98), each once.
fn external_ips(spec: &objects::ServiceSpec, report: &mut Reporter<'_>) -> Vec<IpAddr> {
    let mut ips = Vec::new();
    for (path, text) in report.items(&spec.external_ips, "spec.externalIPs") {
        let ip = report.address(text, || path, "the entry is ignored; write an address");
        ips.extend(ip.filter(|ip| !ips.contains(ip)));
    }
    ips
}

/// The addresses under which the load balancer's packets arrive at the node as they are (S94, S95), each once.
fn load_balancer_ips(object: &objects::Service, report: &mut Reporter<'_>) -> Vec<IpAddr> {
    const PATH: &str = "status.loadBalancer.ingress";
    let status = object.status.given().and_then(|status| status.load_balancer.given());
    let mut ips = Vec::new();
    let Some(status) = status else { return ips };
    for (path, ingress) in report.items(&status.ingress, PATH) {
        let text = report.read(
            &ingress.ip,
            || format!("{path}.ip"),
            "the entry is ignored; write an address",
        );
        let (Some(text), true) = (
            text.filter(|text| !text.is_empty()),
            ingress.ip_mode.given().is_none_or(|mode| mode == "VIP"),
        ) else {
            continue;
        };
        let ip = report.address(&text, || format!("{path}.ip"), "the entry is ignored; write an address");
        ips.extend(ip.filter(|ip| !ips.contains(ip)));
    }
    ips
}

/// `spec.loadBalancerSourceRanges` (S104).
fn source_ranges(spec: &objects::ServiceSpec, report: &mut Reporter<'_>) -> Vec<IpNet> {
    let mut ranges = Vec::new();
    for (path, text) in report.items(&spec.load_balancer_source_ranges, "spec.loadBalancerSourceRanges") {
        match parse_cidr(text) {
            Some(range) => ranges.push(range.trunc()),
            None => report.warn(
                path,
                format!("{text:?} is not a prefix"),
                "the entry is ignored; write an address and a prefix length",
            ),
        }
    }
    ranges
}

/// Is the external policy Local, and is the Service reachable from outside at all (S51)?
fn is_external_local(spec: &objects::ServiceSpec, external_ips: &[IpAddr]) -> bool {
    let is_reachable =
        is_text(&spec.r#type, "NodePort") || is_text(&spec.r#type, "LoadBalancer") || !external_ips.is_empty();
    is_reachable && is_text(&spec.external_traffic_policy, "Local")
}

/// S156: the port is served for local load balancers only.
fn health_check_port(spec: &objects::ServiceSpec, external_local: bool, report: &mut Reporter<'_>) -> Option<Port> {
    let path = || "spec.healthCheckNodePort".to_owned();
    optional_port(&spec.health_check_node_port, path, "the port is not served", report)
        .filter(|_| external_local && is_text(&spec.r#type, "LoadBalancer"))
}

fn affinity_seconds(spec: &objects::ServiceSpec, report: &mut Reporter<'_>) -> u32 {
    if !is_text(&spec.session_affinity, "ClientIP") {
        return 0;
    }
    let config = spec
        .session_affinity_config
        .given()
        .and_then(|config| config.client_ip.given());
    let path = || "spec.sessionAffinityConfig.clientIP.timeoutSeconds".to_owned();
    let remedy = "three hours are used; write a number from 1 to 86400";
    let Some(seconds) = config.and_then(|config| report.read(&config.timeout_seconds, path, remedy)) else {
        return DEFAULT_AFFINITY_SECONDS;
    };
    match u32::try_from(seconds) {
        Ok(valid) if valid > 0 && seconds <= MAX_AFFINITY_SECONDS => valid,
        _ => {
            report.warn(path(), format!("is {seconds}"), remedy);
            DEFAULT_AFFINITY_SECONDS
        }
    }
}

#[cfg(test)]
#[path = "service_tests.rs"]
mod tests;
