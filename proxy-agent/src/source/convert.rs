//! From objects as the API writes them to model types: the border where everything is validated. A malformed part is reported and
//! left out, the rest of the object is used (S19, S23).

use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use proxy_common::addr::{Addr4, Addr6, Address, Port, Protocol};

use super::lenient::Field;
use super::objects::{self, List, NamedHint, TRIGGER_TIME_ANNOTATION};
use super::{Kind, Warning};
use crate::model::address::{parse_cidr, parse_ip};
use crate::model::slice::{
    ENDPOINT_FOR_THIS_NODE, ENDPOINT_LOCAL, ENDPOINT_NODE_HINTED, ENDPOINT_READY, ENDPOINT_SERVING,
    ENDPOINT_TERMINATING,
};
use crate::model::{Endpoint, EndpointSlice, Node, ObjectName, Service, ServicePort, SliceEndpoints, SlicePort};

const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
/// Their presence, with whatever value, hides an object from us (S1–S3).
const IGNORE_LABELS: [&str; 2] = [
    "service.kubernetes.io/service-proxy-name",
    "service.kubernetes.io/headless",
];
const LEAVING_TAINT: &str = "ToBeDeletedByClusterAutoscaler";
const DEFAULT_AFFINITY_SECONDS: u32 = 10_800;
const MAX_AFFINITY_SECONDS: i64 = 86_400;

/// Converts objects for one node, collecting what is wrong with them.
#[derive(Debug)]
pub struct Converter {
    node_name: Arc<str>,
    warnings: Vec<Warning>,
}

/// Where a warning belongs.
struct Reporter<'c> {
    warnings: &'c mut Vec<Warning>,
    kind: Kind,
    object: String,
}

impl Reporter<'_> {
    fn warn(&mut self, field: impl Into<String>, problem: impl Into<String>, remedy: &'static str) {
        self.warnings.push(Warning {
            kind: self.kind,
            object: self.object.clone(),
            field: field.into(),
            problem: problem.into(),
            remedy,
        });
    }

    /// The value of a field; reports one of the wrong type.
    fn read<T: Clone>(&mut self, field: &Field<T>, path: impl FnOnce() -> String, remedy: &'static str) -> Option<T> {
        if let Field::Bad(seen) = field {
            self.warn(path(), format!("is {seen}"), remedy);
        }
        field.given().cloned()
    }

    fn items<'f, T>(&mut self, list: &'f List<T>, path: &str) -> Vec<(String, &'f T)> {
        if let Field::Bad(seen) = list {
            self.warn(path, format!("is {seen}"), "must be a list");
        }
        let mut items = Vec::new();
        for (index, item) in list.given().into_iter().flatten().enumerate() {
            let path = format!("{path}[{index}]");
            match item {
                Field::Given(item) => items.push((path, item)),
                Field::Bad(seen) => self.warn(
                    path,
                    format!("is {seen}"),
                    "the entry is ignored; give it the right type",
                ),
                Field::Absent => self.warn(path, "is null", "the entry is ignored; remove it"),
            }
        }
        items
    }

    fn protocol(&mut self, field: &Field<String>, path: &str) -> Option<Protocol> {
        let remedy = "the port is ignored; use TCP, UDP or SCTP";
        let path = || format!("{path}.protocol");
        match field {
            Field::Bad(_) => self.read(field, path, remedy).and(None),
            Field::Absent => Some(Protocol::Tcp),
            Field::Given(text) => match text.as_str() {
                "" | "TCP" => Some(Protocol::Tcp),
                "UDP" => Some(Protocol::Udp),
                "SCTP" => Some(Protocol::Sctp),
                _ => {
                    self.warn(path(), format!("is {text:?}"), remedy);
                    None
                }
            },
        }
    }

    fn port(&mut self, field: &Field<i64>, path: &str) -> Option<Port> {
        let number = field
            .given()
            .and_then(|number| u16::try_from(*number).ok())
            .filter(|number| *number != 0);
        if number.is_none() {
            let seen = match field {
                Field::Absent => "is missing".to_owned(),
                Field::Given(number) => format!("is {number}"),
                Field::Bad(seen) => format!("is {seen}"),
            };
            self.warn(
                format!("{path}.port"),
                seen,
                "the port is ignored; use a number from 1 to 65535",
            );
        }
        number.map(Port::new)
    }

    fn address(&mut self, text: &str, path: impl FnOnce() -> String, remedy: &'static str) -> Option<IpAddr> {
        let address = parse_ip(text).filter(|ip| !ip.is_unspecified() && !ip.is_multicast());
        if address.is_none() {
            self.warn(path(), format!("{text:?} is not a unicast address"), remedy);
        }
        address
    }
}

impl Converter {
    /// A converter for the node of this name.
    pub fn new(node_name: impl Into<Arc<str>>) -> Self {
        Self {
            node_name: node_name.into(),
            warnings: Vec::new(),
        }
    }

    /// What was found wrong since the last call.
    pub fn take_warnings(&mut self) -> Vec<Warning> {
        std::mem::take(&mut self.warnings)
    }

    fn reporter(&mut self, kind: Kind, name: &ObjectName) -> Reporter<'_> {
        Reporter {
            warnings: &mut self.warnings,
            kind,
            object: name.to_string(),
        }
    }

    /// The Service, or `None` if it is to be ignored (S1, S2, S5, S6).
    pub fn service(&mut self, name: &ObjectName, object: &objects::Service) -> Option<Service> {
        let mut report = self.reporter(Kind::Service, name);
        let spec = match &object.spec {
            Field::Given(spec) if !is_hidden(&object.metadata) => spec,
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
        let external_ips = external_ips(spec, &mut report);
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

    /// The EndpointSlice, or `None` if it is to be ignored (S3, S10, S21).
    pub fn slice(&mut self, name: &ObjectName, object: &objects::EndpointSlice) -> Option<EndpointSlice> {
        let node_name = self.node_name.clone();
        let mut report = self.reporter(Kind::EndpointSlice, name);
        if is_hidden(&object.metadata) {
            return None;
        }
        let service = label(&object.metadata, SERVICE_NAME_LABEL).unwrap_or_default();
        if service.is_empty() {
            let field = format!("metadata.labels[{SERVICE_NAME_LABEL}]");
            report.warn(
                field,
                "is missing or empty",
                "the slice is ignored; name the Service it belongs to",
            );
            return None;
        }
        let endpoints = match object.address_type.given().map(String::as_str) {
            Some("IPv4") => SliceEndpoints::V4(endpoints(object, &node_name, &mut report)),
            Some("IPv6") => SliceEndpoints::V6(endpoints(object, &node_name, &mut report)),
            Some("FQDN") => return None,
            _ => {
                report.warn(
                    "addressType",
                    "is neither IPv4 nor IPv6",
                    "the slice is ignored; set its address type",
                );
                return None;
            }
        };
        Some(EndpointSlice {
            name: name.clone(),
            service: service.into(),
            ports: slice_ports(object, &mut report),
            endpoints,
        })
    }

    /// The Node if it is this one.
    pub fn node(&mut self, object: &objects::Node) -> Option<Node> {
        if object.metadata.name.as_deref() != Some(&*self.node_name) {
            return None;
        }
        let taints = object.spec.given().and_then(|spec| spec.taints.given());
        let tainted = taints
            .into_iter()
            .flatten()
            .any(|taint| taint.given().is_some_and(|t| is_text(&t.key, LEAVING_TAINT)));
        Some(Node {
            zone: label(&object.metadata, ZONE_LABEL)
                .filter(|zone| !zone.is_empty())
                .map(Into::into),
            ips: node_ips(object),
            leaving: tainted || object.metadata.deletion_timestamp.is_some(),
        })
    }
}

/// When the change was made that led to this version of a slice (S188).
pub fn trigger_time(metadata: &ObjectMeta) -> Option<SystemTime> {
    let time: Timestamp = metadata
        .annotations
        .as_ref()?
        .get(TRIGGER_TIME_ANNOTATION)?
        .parse()
        .ok()?;
    Some(time.into())
}

fn label<'m>(metadata: &'m ObjectMeta, key: &str) -> Option<&'m str> {
    metadata.labels.as_ref()?.get(key).map(String::as_str)
}

fn is_hidden(metadata: &ObjectMeta) -> bool {
    IGNORE_LABELS.iter().any(|key| label(metadata, key).is_some())
}

fn is_text(field: &Field<String>, text: &str) -> bool {
    field.given().is_some_and(|given| given == text)
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

/// The node's address of each family (S184): internal ones before external ones, in the order of the object.
fn node_ips(object: &objects::Node) -> Vec<IpAddr> {
    let addresses = object.status.given().and_then(|status| status.addresses.given());
    let mut ips: Vec<IpAddr> = Vec::new();
    for kind in ["InternalIP", "ExternalIP"] {
        let of_kind = addresses
            .into_iter()
            .flatten()
            .filter_map(Field::given)
            .filter(|address| is_text(&address.r#type, kind));
        for ip in of_kind.filter_map(|address| parse_ip(address.address.given()?)) {
            if ips.iter().all(|other| other.is_ipv4() != ip.is_ipv4()) {
                ips.push(ip);
            }
        }
    }
    ips
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

fn slice_ports(object: &objects::EndpointSlice, report: &mut Reporter<'_>) -> Vec<SlicePort> {
    let mut ports = Vec::new();
    for (path, object) in report.items(&object.ports, "ports") {
        // S29: an API server fills in an empty name, so only a hand-written slice can be without.
        let Some(name) = object.name.given() else {
            let remedy = "the port is ignored; write the Service's port name, or \"\" for an unnamed port";
            report.warn(format!("{path}.name"), "is missing", remedy);
            continue;
        };
        if let (Some(protocol), Some(port)) = (
            report.protocol(&object.protocol, &path),
            report.port(&object.port, &path),
        ) {
            ports.push(SlicePort {
                name: name.as_str().into(),
                protocol,
                port,
            });
        }
    }
    ports
}

fn endpoints<A: Address>(
    object: &objects::EndpointSlice,
    node_name: &str,
    report: &mut Reporter<'_>,
) -> Box<[Endpoint<A>]> {
    const REMEDY: &str = "the endpoint is ignored; write an address of the slice's addressType";
    let mut endpoints = Vec::new();
    let mut zone_sets: Vec<Arc<Vec<Box<str>>>> = Vec::new();
    for (place, object) in report.items(&object.endpoints, "endpoints") {
        // S22: only the first address counts, and an endpoint without any is ignored.
        let path = || format!("{place}.addresses[0]");
        let text = match object.addresses.given().and_then(|addresses| addresses.first()) {
            Some(Field::Given(text)) => text,
            seen => {
                let problem = if seen.is_none() { "is missing" } else { "is not text" };
                report.warn(path(), problem, REMEDY);
                continue;
            }
        };
        let Some(ip) = report.address(text, path, REMEDY) else {
            continue;
        };
        let Some(addr) = A::from_ip(ip) else {
            report.warn(path(), format!("{ip} is of the other family"), REMEDY);
            continue;
        };
        endpoints.push(Endpoint {
            addr,
            flags: endpoint_flags(object, node_name, &place, report),
            zones: zones(object, &mut zone_sets),
        });
    }
    endpoints.into_boxed_slice()
}

fn endpoint_flags(object: &objects::Endpoint, node_name: &str, place: &str, report: &mut Reporter<'_>) -> u8 {
    // S46: what is absent, or cannot be read, has its default.
    const REMEDY: &str = "the default is used; write true or false";
    let conditions = report
        .read(&object.conditions, || format!("{place}.conditions"), REMEDY)
        .unwrap_or_default();
    let mut condition = |name: &str, field: &Field<bool>, default: bool| {
        report
            .read(field, || format!("{place}.conditions.{name}"), REMEDY)
            .unwrap_or(default)
    };
    let ready = condition("ready", &conditions.ready, true);
    let serving = condition("serving", &conditions.serving, true);
    let terminating = condition("terminating", &conditions.terminating, false);
    let for_nodes = hint_names(object, |hints| &hints.for_nodes);
    let flags = [
        (ENDPOINT_READY, ready),
        (ENDPOINT_SERVING, serving),
        (ENDPOINT_TERMINATING, terminating),
        (ENDPOINT_LOCAL, is_text(&object.node_name, node_name)),
        (ENDPOINT_NODE_HINTED, !for_nodes.is_empty()),
        (ENDPOINT_FOR_THIS_NODE, for_nodes.contains(&node_name)),
    ];
    flags
        .iter()
        .filter(|(_, set)| *set)
        .fold(0, |flags, (flag, _)| flags | flag)
}

/// The zone hints of an endpoint, shared with the endpoints before it that have the same.
fn zones(object: &objects::Endpoint, sets: &mut Vec<Arc<Vec<Box<str>>>>) -> Option<Arc<Vec<Box<str>>>> {
    let names = hint_names(object, |hints| &hints.for_zones);
    if names.is_empty() {
        return None;
    }
    if let Some(set) = sets
        .iter()
        .find(|set| set.iter().map(|zone| &**zone).eq(names.iter().copied()))
    {
        return Some(set.clone());
    }
    let set = Arc::new(names.into_iter().map(Into::into).collect::<Vec<_>>());
    sets.push(set.clone());
    Some(set)
}

fn hint_names(object: &objects::Endpoint, get: fn(&objects::Hints) -> &List<NamedHint>) -> Vec<&str> {
    let hints = object.hints.given().and_then(|hints| get(hints).given());
    hints
        .into_iter()
        .flatten()
        .filter_map(|hint| hint.given()?.name.given().map(String::as_str))
        .collect()
}

#[cfg(test)]
#[path = "convert_tests.rs"]
mod tests;
