//! What `/configz` of the metrics server says: the configuration in effect, with the names of `KubeProxyConfiguration` (v1alpha1) for
//! what kube-proxy has too. What is the same for every mode there but belongs to one section per mode stands in `ebpf` here.

use std::net::SocketAddr;

use serde_json::{Value, json};

use crate::config::RunConfig;
use crate::datapath::NodePortAddresses;
use crate::duration;

/// Our `--proxy-mode`, as `/proxyMode` says it.
pub(crate) const MODE: &str = "ebpf";

/// The whole answer.
pub(crate) fn configz(config: &RunConfig) -> Value {
    let datapath = &config.datapath;
    let timeouts = &datapath.timeouts;
    let cidrs: Vec<String> = datapath.pod_cidrs.iter().map(ToString::to_string).collect();
    let node_ports = match &datapath.node_port_addresses {
        NodePortAddresses::All => Vec::new(),
        NodePortAddresses::Primary => vec!["primary".to_owned()],
        NodePortAddresses::Prefixes(prefixes) => prefixes.iter().map(ToString::to_string).collect(),
    };
    let address = |address: Option<SocketAddr>| address.map(|a| a.to_string()).unwrap_or_default();
    json!({"kubeproxy.config.k8s.io": {
        "bindAddressHardFail": config.bind_address_hard_fail,
        "clusterCIDR": cidrs.join(","),
        "conntrack": {
            "tcpCloseWaitTimeout": duration::text(timeouts.tcp_half_closed),
            "tcpEstablishedTimeout": duration::text(timeouts.tcp_established),
            "udpStreamTimeout": duration::text(timeouts.udp_answered),
            "udpTimeout": duration::text(timeouts.udp_unanswered),
        },
        "healthzBindAddress": address(config.healthz),
        "hostnameOverride": &*config.node_name,
        "metricsBindAddress": address(config.metrics),
        "mode": MODE,
        "nodePortAddresses": node_ports,
        "ebpf": {
            "masqueradeAll": datapath.masquerade_all,
            "minSyncPeriod": duration::text(config.intervals.min_sync),
            "syncPeriod": duration::text(config.intervals.sync),
        },
    }})
}
