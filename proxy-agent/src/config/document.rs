//! `KubeProxyConfiguration` (kubeproxy.config.k8s.io/v1alpha1) as far as it means something here, and the section `ebpf`, which
//! is ours. The one form of the configuration: the file is read into it ([`super::file`]), flags are laid over it
//! ([`super::overlay`]), [`super::RunConfig`] is checked from it, and what is in effect is written with it ([`super::effective`]).
//!
//! What must stay true: nothing here is a default; `None` is what nobody said. Fields that kube-proxy has and that mean nothing
//! here are in [`super::file`].

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub(crate) const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
pub(crate) const KIND: &str = "KubeProxyConfiguration";

/// A whole document. Texts are checked where they are used; an empty one is as good as none, unless it says otherwise.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Document {
    pub(crate) api_version: Option<String>,
    pub(crate) kind: Option<String>,
    pub(crate) bind_address: Option<String>,
    pub(crate) bind_address_hard_fail: Option<bool>,
    pub(crate) client_connection: ClientConnection,
    #[serde(rename = "clusterCIDR")]
    pub(crate) cluster_cidr: Option<String>,
    pub(crate) conntrack: Conntrack,
    pub(crate) detect_local: DetectLocal,
    pub(crate) detect_local_mode: Option<String>,
    pub(crate) feature_gates: Option<BTreeMap<String, bool>>,
    pub(crate) healthz_bind_address: Option<String>,
    pub(crate) hostname_override: Option<String>,
    pub(crate) iptables: Iptables,
    pub(crate) ipvs: Ipvs,
    pub(crate) logging: Logging,
    pub(crate) metrics_bind_address: Option<String>,
    pub(crate) mode: Option<String>,
    pub(crate) nftables: Nftables,
    pub(crate) node_port_addresses: Option<Vec<String>>,
    pub(crate) ebpf: Ebpf,
}

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ClientConnection {
    pub(crate) kubeconfig: Option<String>,
    pub(crate) qps: Option<f64>,
    pub(crate) burst: Option<i64>,
}

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Conntrack {
    pub(crate) tcp_close_wait_timeout: Option<String>,
    pub(crate) tcp_established_timeout: Option<String>,
    pub(crate) udp_stream_timeout: Option<String>,
    pub(crate) udp_timeout: Option<String>,
}

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct DetectLocal {
    pub(crate) bridge_interface: Option<String>,
    pub(crate) interface_name_prefix: Option<String>,
}

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Iptables {
    pub(crate) masquerade_all: Option<bool>,
    pub(crate) localhost_node_ports: Option<bool>,
    pub(crate) min_sync_period: Option<String>,
    pub(crate) sync_period: Option<String>,
}

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Nftables {
    pub(crate) masquerade_all: Option<bool>,
    pub(crate) min_sync_period: Option<String>,
    pub(crate) sync_period: Option<String>,
}

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Ipvs {
    pub(crate) min_sync_period: Option<String>,
    pub(crate) sync_period: Option<String>,
}

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Logging {
    pub(crate) verbosity: Option<u32>,
}

/// Our own section: what kube-proxy does not have, and what it has once for each of its modes. It counts before those.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Ebpf {
    pub(crate) attach: Option<String>,
    pub(crate) bpf_dir: Option<String>,
    pub(crate) bpf_log_level: Option<String>,
    pub(crate) capacities: Capacities,
    pub(crate) cgroup: Option<String>,
    pub(crate) exclude_interfaces: Option<String>,
    pub(crate) interfaces: Option<String>,
    pub(crate) localhost_node_ports: Option<bool>,
    pub(crate) manifests: Option<String>,
    pub(crate) masquerade_all: Option<bool>,
    pub(crate) master: Option<String>,
    pub(crate) min_sync_period: Option<String>,
    pub(crate) service_metrics: Option<bool>,
    pub(crate) service_proxy_name: Option<String>,
    /// An empty address means the default in a file, so this is how a file says nowhere.
    pub(crate) serve_healthz: Option<bool>,
    pub(crate) serve_metrics: Option<bool>,
    #[serde(rename = "socketLB")]
    pub(crate) socket_lb: Option<String>,
    pub(crate) sync_period: Option<String>,
    pub(crate) xdp: Xdp,
}

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Xdp {
    pub(crate) interfaces: Option<String>,
    pub(crate) mode: Option<String>,
}

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Capacities {
    pub(crate) counters: Option<u32>,
    pub(crate) frontends: Option<u32>,
    pub(crate) backends: Option<u32>,
    pub(crate) rewrites: Option<u32>,
    pub(crate) services: Option<u32>,
}

impl Document {
    /// What was said, as JSON.
    pub(crate) fn to_value(&self) -> Value {
        // Only texts as keys and finite numbers: this cannot fail.
        let mut value = serde_json::to_value(self).unwrap_or_default();
        prune(&mut value);
        value
    }
}

/// Takes out what says nothing: nulls, which are Go's unset pointers, and sections without fields.
pub(super) fn prune(value: &mut Value) {
    if let Value::Object(fields) = value {
        fields.values_mut().for_each(prune);
        fields.retain(|_, field| !field.is_null() && field.as_object().is_none_or(|section| !section.is_empty()));
    }
}
