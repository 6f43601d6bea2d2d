//! The own Node.

use std::net::IpAddr;

use ipnet::IpNet;

use super::super::lenient::Field;
use super::super::{Kind, objects};
use super::{Converter, Reporter, is_text, label};
use crate::model::address::{parse_cidr, parse_ip};
use crate::model::{Node, ObjectName};

const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
const LEAVING_TAINT: &str = "ToBeDeletedByClusterAutoscaler";

impl Converter {
    /// The Node if it is this one.
    pub fn node(&mut self, object: &objects::Node) -> Option<Node> {
        if object.metadata.name.as_deref() != Some(&*self.node_name) {
            return None;
        }
        let node_ip = self.node_ip;
        let mut report = self.reporter(Kind::Node, &ObjectName::new("", self.node_name.clone()));
        let taints = object.spec.given().and_then(|spec| spec.taints.given());
        let tainted = taints
            .into_iter()
            .flatten()
            .any(|taint| taint.given().is_some_and(|t| is_text(&t.key, LEAVING_TAINT)));
        Some(Node {
            zone: label(&object.metadata, ZONE_LABEL)
                .filter(|zone| !zone.is_empty())
                .map(Into::into),
            ips: node_ips(object, node_ip),
            pod_cidrs: pod_cidrs(object, &mut report),
            leaving: tainted || object.metadata.deletion_timestamp.is_some(),
        })
    }
}

/// The node's address of each family (S184): the one that was given, internal ones before external ones, in the order of the object.
fn node_ips(object: &objects::Node, given: Option<IpAddr>) -> Vec<IpAddr> {
    let addresses = object.status.given().and_then(|status| status.addresses.given());
    let mut ips: Vec<IpAddr> = given.into_iter().collect();
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

/// Addresses of the node's pods (S183): of each family the first prefix.
fn pod_cidrs(object: &objects::Node, report: &mut Reporter<'_>) -> Vec<IpNet> {
    const REMEDY: &str = "the entry is ignored; write an address and a prefix length";
    let Some(spec) = object.spec.given() else {
        return Vec::new();
    };
    let mut texts: Vec<(String, &str)> = report
        .items(&spec.pod_cidrs, "spec.podCIDRs")
        .into_iter()
        .map(|(path, text)| (path, text.as_str()))
        .collect();
    if texts.is_empty() {
        let single = spec.pod_cidr.given().filter(|text| !text.is_empty());
        texts.extend(single.map(|text| ("spec.podCIDR".to_owned(), text.as_str())));
    }
    let mut cidrs: Vec<IpNet> = Vec::new();
    for (path, text) in texts {
        match parse_cidr(text) {
            Some(cidr)
                if cidrs
                    .iter()
                    .all(|other| other.addr().is_ipv4() != cidr.addr().is_ipv4()) =>
            {
                cidrs.push(cidr.trunc());
            }
            Some(_) => {}
            None => report.warn(path, format!("{text:?} is not a prefix"), REMEDY),
        }
    }
    cidrs
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn the_own_node() {
        let node = |value: Value| Converter::new("node-a").node(&serde_json::from_value(value).unwrap());
        let zone = json!({"topology.kubernetes.io/zone": "x"});
        assert_eq!(
            node(json!({"metadata": {"name": "node-b", "labels": zone.clone()}})),
            None
        );
        let plain = node(json!({"metadata": {"name": "node-a", "labels": zone}})).unwrap();
        assert_eq!((plain.zone.as_deref(), plain.leaving), (Some("x"), false), "S70");
        let tainted = json!({"metadata": {"name": "node-a"}, "spec": {"taints": [{"key": "other"}, 5, {"key": "ToBeDeletedByClusterAutoscaler"}]}});
        assert!(node(tainted).unwrap().leaving, "S175");
        let deleted = json!({"metadata": {"name": "node-a", "deletionTimestamp": "2026-01-01T00:00:00Z"}});
        assert!(node(deleted).unwrap().leaving, "S175");
    }

    #[test]
    fn addresses_of_the_own_node() {
        let addresses = json!([{"type": "ExternalIP", "address": "198.51.100.1"}, {"type": "Hostname", "address": "node-a"},
            {"type": "InternalIP", "address": "192.0.2.1"}, {"type": "InternalIP", "address": "192.0.2.2"}, 5,
            {"type": "ExternalIP", "address": "2001:db8::1"}]);
        let value = json!({"metadata": {"name": "node-a"}, "status": {"addresses": addresses}});
        let ips = |given: Option<&str>| -> Vec<String> {
            let mut converter = Converter::new("node-a").with_node_ip(given.map(|ip| ip.parse().unwrap()));
            let node = converter.node(&serde_json::from_value(value.clone()).unwrap()).unwrap();
            node.ips.iter().map(ToString::to_string).collect()
        };
        assert_eq!(ips(None), ["192.0.2.1", "2001:db8::1"], "S184");
        assert_eq!(ips(Some("192.0.2.9")), ["192.0.2.9", "2001:db8::1"], "S184");
        assert_eq!(ips(Some("2001:db8::9")), ["2001:db8::9", "192.0.2.1"], "S184: primary");
    }

    #[test]
    fn addresses_of_the_pods_of_the_own_node() {
        let decode = |spec: Value| {
            let value = json!({"metadata": {"name": "node-a"}, "spec": spec});
            let mut converter = Converter::new("node-a");
            let node = converter.node(&serde_json::from_value(value).unwrap()).unwrap();
            let cidrs: Vec<_> = node.pod_cidrs.iter().map(ToString::to_string).collect();
            (cidrs.join(" "), converter.take_warnings().len())
        };
        let both = json!({"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:10:0:1::/64"]});
        assert_eq!(decode(both), ("10.244.1.0/24 fd00:10:0:1::/64".to_owned(), 0), "S183");
        let old = json!({"podCIDR": "fd00:10:0:1::1/64"});
        assert_eq!(decode(old), ("fd00:10:0:1::/64".to_owned(), 0), "S183");
        let odd = json!({"podCIDRs": ["nonsense", 5, "10.244.1.0/24", "10.244.2.0/24"]});
        assert_eq!(
            decode(odd),
            ("10.244.1.0/24".to_owned(), 2),
            "S114: the first of a family"
        );
        assert_eq!(decode(json!({"podCIDR": ""})), (String::new(), 0));
    }
}
