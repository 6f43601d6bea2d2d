//! From objects as the API writes them to model types: the border where everything is validated. A malformed part is reported and
//! left out, the rest of the object is used (S19, S23). One file per kind; here is what they share. Called by the two sources.

mod node;
mod service;
mod service_cidr;
mod slice;

use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use proxy_common::addr::{Port, Protocol};

use super::lenient::Field;
use super::objects::List;
use super::{Kind, Warning};
use crate::model::ObjectName;
use crate::model::address::parse_ip;

pub use slice::trigger_time;

/// Its presence, with whatever value, hides an object from every proxy (S2).
const HEADLESS: &str = "service.kubernetes.io/headless";
/// Its value names the proxy that serves the object, in place of those that have no name (S1).
const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";

/// Converts objects for one node, collecting what is wrong with them.
#[derive(Clone, Debug)]
pub struct Converter {
    node_name: Arc<str>,
    external_ips: bool,
    proxy_name: Option<Arc<str>>,
    node_ip: Option<IpAddr>,
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
            external_ips: true,
            proxy_name: None,
            node_ip: None,
            warnings: Vec::new(),
        }
    }

    /// The same, with `spec.externalIPs` of Services honoured or not (S100).
    pub fn with_external_ips(self, external_ips: bool) -> Self {
        Self { external_ips, ..self }
    }

    /// The same for a proxy of this name, which serves what is labelled with it and nothing else; without one, what has no such label.
    pub fn with_proxy_name(self, proxy_name: Option<Arc<str>>) -> Self {
        Self { proxy_name, ..self }
    }

    /// The same, with this address of the own node before those of its object (S184).
    pub fn with_node_ip(self, node_ip: Option<IpAddr>) -> Self {
        Self { node_ip, ..self }
    }

    /// Name of the own node.
    pub fn node_name(&self) -> &str {
        &self.node_name
    }

    /// What was found wrong since the last call.
    pub fn take_warnings(&mut self) -> Vec<Warning> {
        std::mem::take(&mut self.warnings)
    }

    /// Is a Service another proxy's, or nobody's?
    fn is_hidden(&self, metadata: &ObjectMeta) -> bool {
        label(metadata, HEADLESS).is_some() || label(metadata, PROXY_NAME) != self.proxy_name.as_deref()
    }

    /// The same of a slice. Its labels follow those of its Service, but later, so one without a name may be anybody's who has one.
    fn is_slice_hidden(&self, metadata: &ObjectMeta) -> bool {
        let is_unnamed = label(metadata, HEADLESS).is_none() && label(metadata, PROXY_NAME).is_none();
        self.is_hidden(metadata) && !(is_unnamed && self.proxy_name.is_some())
    }

    fn reporter(&mut self, kind: Kind, name: &ObjectName) -> Reporter<'_> {
        Reporter {
            warnings: &mut self.warnings,
            kind,
            object: name.to_string(),
        }
    }
}

fn label<'m>(metadata: &'m ObjectMeta, key: &str) -> Option<&'m str> {
    metadata.labels.as_ref()?.get(key).map(String::as_str)
}

fn is_text(field: &Field<String>, text: &str) -> bool {
    field.given().is_some_and(|given| given == text)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::Converter;
    use crate::model::fixtures::object;
    use crate::source::objects;

    #[test]
    fn any_json_object_decodes() {
        for value in [
            json!({"metadata": 5, "spec": [], "ports": {}, "endpoints": "x"}),
            json!({"metadata": {"name": [], "labels": [], "annotations": 3, "creationTimestamp": 4}, "spec": {"ports": {"a": []}}}),
            json!({"metadata": {"labels": {"a": null, "b": {"c": 1}}}, "endpoints": [[], {"addresses": {}, "hints": {"forZones": [{}]}}]}),
        ] {
            let decoded: objects::Service = serde_json::from_value(value.clone()).unwrap();
            Converter::new("n").service(&object("x"), &decoded);
            let decoded: objects::EndpointSlice = serde_json::from_value(value.clone()).unwrap();
            Converter::new("n").slice(&object("x"), &decoded);
            let decoded: objects::Node = serde_json::from_value(value).unwrap();
            Converter::new("n").node(&decoded);
        }
    }
}
