//! `--feature-gates`: Kubernetes' switches for features, as far as they concern a service proxy. Read once by [`crate::config`].

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

impl FeatureGates {
    /// The gates with `name=value,…` set, and the names that nobody here knows. An error says what is wrong.
    pub fn parse(text: &str) -> Result<(Self, Vec<String>), String> {
        let mut gates = Self::default();
        let mut unknown = Vec::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (name, value) = part.split_once('=').ok_or_else(|| format!("{part:?} has no value"))?;
            let value = parse_bool(value.trim()).ok_or_else(|| format!("{value:?} is neither true nor false"))?;
            match name.trim() {
                "AllowServiceExternalIPs" => gates.service_external_ips = value,
                name => unknown.push(name.to_owned()),
            }
        }
        Ok((gates, unknown))
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
        let parse =
            |text| FeatureGates::parse(text).map(|(gates, unknown)| (gates.service_external_ips, unknown.join(" ")));
        assert_eq!(parse(""), Ok((true, String::new())), "S100: on by default");
        assert_eq!(parse("AllowServiceExternalIPs=false"), Ok((false, String::new())));
        let several = " TopologyAwareHints=true, AllowServiceExternalIPs = F,B=0,";
        assert_eq!(parse(several), Ok((false, "TopologyAwareHints B".to_owned())));
        for bad in ["AllowServiceExternalIPs", "A=yes", "A="] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
