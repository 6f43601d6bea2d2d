//! The configuration file (`--config`): kube-proxy's own, YAML or JSON, as kubeadm writes it into the ConfigMap `kube-proxy`.
//! Called once by [`super::RunConfig::from_args`]; the values are checked there.
//!
//! What must stay true: a file that kube-proxy starts with, this starts with. So what is not known is named and left out, and
//! only a value of the wrong type ends the reading.

use std::path::Path;

use serde_json::Value;

use super::ConfigError;
use super::document::{API_VERSION, Document, KIND, prune};
use crate::source::document_values;

/// What kube-proxy has and what has no meaning here: settings of netfilter, IPVS and Windows, of Go's log, HTTP and profiler.
const MEANINGLESS: &[&str] = &[
    "clientConnection.acceptContentTypes",
    "clientConnection.contentType",
    "configSyncPeriod",
    "conntrack.maxPerCore",
    "conntrack.min",
    "conntrack.tcpBeLiberal",
    "enableProfiling",
    "iptables.masqueradeBit",
    "iptables.snatNodeInternalIP",
    "ipvs.excludeCIDRs",
    "ipvs.scheduler",
    "ipvs.strictARP",
    "ipvs.tcpFinTimeout",
    "ipvs.tcpTimeout",
    "ipvs.udpTimeout",
    "logging.flushFrequency",
    "logging.format",
    "logging.options.json.infoBufferSize",
    "logging.options.json.splitStream",
    "logging.options.text.infoBufferSize",
    "logging.options.text.splitStream",
    "logging.vmodule",
    "nftables.masqueradeBit",
    "oomScoreAdj",
    "portRange",
    "showHiddenMetricsForVersion",
    "udpIdleTimeout",
    "windowsRunAsService",
    "winkernel.enableDSR",
    "winkernel.forwardHealthCheckVip",
    "winkernel.networkName",
    "winkernel.rootHnsEndpointName",
    "winkernel.sourceVip",
];

/// A file as it was read.
#[derive(Debug)]
pub(super) struct File {
    pub(super) document: Document,
    /// What a user should know.
    pub(super) warnings: Vec<String>,
    /// Fields that were set to something and mean nothing here.
    pub(super) meaningless: Vec<&'static str>,
}

/// Reads the file.
pub(super) fn read(path: &Path) -> Result<File, ConfigError> {
    let name = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|error| ConfigError::File {
        place: format!("--config {name}"),
        problem: format!("{error}; give a file that can be read"),
    })?;
    parse(&name, &text)
}

/// Reads the text of the file of this name.
pub(super) fn parse(name: &str, text: &str) -> Result<File, ConfigError> {
    let fail = |place: &str, problem: String| ConfigError::File {
        place: format!("{name}{place}"),
        problem,
    };
    let mut warnings = Vec::new();
    let mut found = None;
    let is_json = text.trim_start().starts_with('{');
    for (index, value) in document_values(text, is_json).into_iter().enumerate() {
        let number = index + 1;
        let value = value.map_err(|error| fail(&format!(", document {number}"), error))?;
        let kind = value["kind"].as_str().unwrap_or_default();
        if kind != KIND {
            warnings.push(format!(
                "{name}: document {number} is skipped: its kind is {kind:?}, not {KIND}"
            ));
        } else if found.replace(value).is_some() {
            let problem = format!("document {number} is a second {KIND}; leave one of them");
            return Err(fail("", problem));
        }
    }
    let Some(mut value) = found else {
        let problem = format!(
            "there is no {KIND} in it; give kube-proxy's configuration file (the key config.conf of kubeadm's ConfigMap)"
        );
        return Err(fail("", problem));
    };
    let version = value["apiVersion"].as_str().unwrap_or_default();
    if version != API_VERSION {
        return Err(fail(
            ": apiVersion",
            format!("{version:?} is not known; write {API_VERSION}"),
        ));
    }
    let meaningless = MEANINGLESS
        .iter()
        .copied()
        .filter(|path| take(&mut value, path))
        .collect();
    prune(&mut value);
    let mut unknown = Vec::new();
    let mut track = serde_path_to_error::Track::new();
    let deserializer = serde_path_to_error::Deserializer::new(value, &mut track);
    let document = serde_ignored::deserialize(deserializer, |path| unknown.push(path.to_string()));
    let document = document.map_err(|error| fail(&format!(": {}", track.path()), error.to_string()))?;
    let unknown = unknown
        .into_iter()
        .map(|path| format!("{name}: {path} is not a field that is known, ignored"));
    warnings.extend(unknown);
    Ok(File {
        document,
        warnings,
        meaningless,
    })
}

/// Takes a field out. Was it set to something, other than what Go writes for nothing?
fn take(value: &mut Value, path: &str) -> bool {
    let (name, rest) = path
        .split_once('.')
        .map_or((path, None), |(name, rest)| (name, Some(rest)));
    let Some(fields) = value.as_object_mut() else {
        return false;
    };
    match rest {
        Some(rest) => fields.get_mut(name).is_some_and(|section| take(section, rest)),
        None => fields.remove(name).is_some_and(|taken| match taken {
            Value::Null => false,
            Value::Bool(set) => set,
            Value::Number(number) => number.as_f64() != Some(0.0),
            Value::String(text) => !matches!(text.as_str(), "" | "0" | "0s"),
            Value::Array(items) => !items.is_empty(),
            Value::Object(fields) => !fields.is_empty(),
        }),
    }
}
