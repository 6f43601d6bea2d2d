//! ServiceCIDRs.

use super::super::{Kind, objects};
use super::Converter;
use crate::model::address::parse_cidr;
use crate::model::{ObjectName, ServiceCidr};

impl Converter {
    /// The ServiceCIDR with those of its prefixes that are some (S78).
    pub fn service_cidr(&mut self, name: &ObjectName, object: &objects::ServiceCIDR) -> ServiceCidr {
        const REMEDY: &str = "the entry is ignored; write an address and a prefix length";
        let mut report = self.reporter(Kind::ServiceCidr, name);
        let spec = report.read(&object.spec, || "spec".to_owned(), "spec must be an object");
        let mut networks = Vec::new();
        for (path, text) in report.items(&spec.unwrap_or_default().cidrs, "spec.cidrs") {
            match parse_cidr(text) {
                Some(network) => networks.push(network.trunc()),
                None => report.warn(path, format!("{text:?} is not a prefix"), REMEDY),
            }
        }
        ServiceCidr {
            name: name.name.clone(),
            networks,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn prefixes_of_service_networks() {
        let decode = |spec: Value| {
            let decoded: objects::ServiceCIDR = serde_json::from_value(json!({"spec": spec})).unwrap();
            let mut converter = Converter::new("node-a");
            let cidr = converter.service_cidr(&ObjectName::new("", "kubernetes"), &decoded);
            let networks: Vec<String> = cidr.networks.iter().map(ToString::to_string).collect();
            let warnings: Vec<String> = converter.take_warnings().iter().map(ToString::to_string).collect();
            (networks.join(" "), warnings)
        };
        let both = json!({"cidrs": ["10.96.0.0/16", "fd00:96::/108"]});
        assert_eq!(decode(both), ("10.96.0.0/16 fd00:96::/108".to_owned(), vec![]), "S78");
        assert_eq!(decode(json!(null)), (String::new(), vec![]));
        let (networks, warnings) = decode(json!({"cidrs": ["10.96.0.0", 7, "10.97.0.1/16"]}));
        assert_eq!(networks, "10.97.0.0/16");
        let expected = "ServiceCIDR kubernetes: spec.cidrs[0]: \"10.96.0.0\" is not a prefix; the entry is ignored; write an address and a prefix length";
        assert_eq!((warnings.len(), warnings[1].as_str()), (2, expected));
        assert_eq!(decode(json!(5)).1.len(), 1);
    }
}
