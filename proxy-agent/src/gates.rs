//! `--feature-gates` and `featureGates`: Kubernetes' switches for features, as far as they concern a service proxy. Read once by
//! [`crate::config`].

use std::collections::BTreeMap;

/// The gates that are known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FeatureGates {
    /// `AllowServiceExternalIPs`: `spec.externalIPs` of Services are served (S100).
    pub service_external_ips: bool,
}

impl Default for FeatureGates {
    fn default() -> Self {
        Self {
            service_external_ips: true,
        }
    }
}

const EXTERNAL_IPS: &str = "AllowServiceExternalIPs";

impl FeatureGates {
    /// `name=value,…`. An error says what is wrong.
    pub(crate) fn parse(text: &str) -> Result<BTreeMap<String, bool>, String> {
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        parts
            .map(|part| {
                let (name, value) = part.split_once('=').ok_or_else(|| format!("{part:?} has no value"))?;
                let value = parse_bool(value.trim()).ok_or_else(|| format!("{value:?} is neither true nor false"))?;
                Ok((name.trim().to_owned(), value))
            })
            .collect()
    }

    /// The gates with these set, and the names that nobody here knows.
    pub(crate) fn from_map(map: &BTreeMap<String, bool>) -> (Self, Vec<&str>) {
        let mut gates = Self::default();
        let mut unknown = Vec::new();
        for (name, value) in map {
            match name.as_str() {
                EXTERNAL_IPS => gates.service_external_ips = *value,
                name => unknown.push(name),
            }
        }
        (gates, unknown)
    }

    /// All of them.
    pub(crate) fn to_map(self) -> BTreeMap<String, bool> {
        BTreeMap::from([(EXTERNAL_IPS.to_owned(), self.service_external_ips)])
    }
}

/// What Kubernetes' components take for a boolean.
fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_by_name() {
        let parse = |text| {
            FeatureGates::parse(text).map(|map| {
                let (gates, unknown) = FeatureGates::from_map(&map);
                (gates.service_external_ips, unknown.join(" "))
            })
        };
        assert_eq!(parse(""), Ok((true, String::new())), "S100: on by default");
        assert_eq!(parse("AllowServiceExternalIPs=false"), Ok((false, String::new())));
        let several = " TopologyAwareHints=true, AllowServiceExternalIPs = F,B=0,";
        assert_eq!(parse(several), Ok((false, "B TopologyAwareHints".to_owned())));
        for bad in ["AllowServiceExternalIPs", "A=yes", "A="] {
            assert!(FeatureGates::parse(bad).is_err(), "{bad}");
        }
    }
}
