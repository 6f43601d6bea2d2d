//! What `/configz` of the metrics server says: the configuration in effect, under kube-proxy's name for it.

use serde_json::{Value, json};

use crate::config::RunConfig;

/// The whole answer.
pub(crate) fn configz(config: &RunConfig) -> Value {
    json!({"kubeproxy.config.k8s.io": config.to_document().to_value()})
}
