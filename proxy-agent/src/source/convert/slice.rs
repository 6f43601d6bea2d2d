//! EndpointSlices.

use std::sync::Arc;
use std::time::SystemTime;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use proxy_common::addr::Address;

use super::super::Kind;
use super::super::lenient::Field;
use super::super::objects::{self, List, NamedHint, TRIGGER_TIME_ANNOTATION};
use super::{Converter, Reporter, is_text, label};
use crate::model::slice::{
    ENDPOINT_FOR_THIS_NODE, ENDPOINT_LOCAL, ENDPOINT_NODE_HINTED, ENDPOINT_READY, ENDPOINT_SERVING,
    ENDPOINT_TERMINATING,
};
use crate::model::{Endpoint, EndpointSlice, ObjectName, SliceEndpoints, SlicePort};

const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

impl Converter {
    /// The EndpointSlice, or `None` if it is to be ignored (S3, S10, S21).
    pub fn slice(&mut self, name: &ObjectName, object: &objects::EndpointSlice) -> Option<EndpointSlice> {
        let node_name = self.node_name.clone();
        if self.is_slice_hidden(&object.metadata) {
            return None;
        }
        let mut report = self.reporter(Kind::EndpointSlice, name);
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
#[path = "slice_tests.rs"]
mod tests;
