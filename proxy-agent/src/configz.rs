//! What `/configz` of the metrics server says: the configuration in effect, with the names of `KubeProxyConfiguration` (v1alpha1) for
//! what kube-proxy has too. What is the same for every mode there but belongs to one section per mode stands in `ebpf` here.

use std::net::SocketAddr;

use serde_json::{Value, json};

use crate::config::RunConfig;
use crate::datapath::PodDetection;
use crate::duration;

/// Our `--proxy-mode`, as `/proxyMode` says it.
pub(crate) const MODE: &str = "ebpf";

/// The whole answer.
pub(crate) fn configz(config: &RunConfig) -> Value {
    let datapath = &config.datapath;
    let timeouts = &datapath.timeouts;
    let (mode, cidrs, bridge, prefix) = match &datapath.pods {
        PodDetection::ClusterCidr(cidrs) => ("ClusterCIDR", cidrs.as_slice(), "", ""),
        PodDetection::NodeCidr => ("NodeCIDR", &[][..], "", ""),
        PodDetection::Bridge(name) => ("BridgeInterface", &[][..], name.as_str(), ""),
        PodDetection::InterfacePrefix(prefix) => ("InterfaceNamePrefix", &[][..], "", prefix.as_str()),
    };
    let cidrs: Vec<String> = cidrs.iter().map(ToString::to_string).collect();
    let node_ports = datapath.node_port_addresses.words();
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
        "detectLocal": {"bridgeInterface": bridge, "interfaceNamePrefix": prefix},
        "detectLocalMode": mode,
        "healthzBindAddress": address(config.healthz),
        "hostnameOverride": &*config.node_name,
        "metricsBindAddress": address(config.metrics),
        "mode": MODE,
        "nodePortAddresses": node_ports,
        "ebpf": {
            "localhostNodePorts": datapath.node_port_addresses.loopback_allowed,
            "masqueradeAll": datapath.masquerade_all,
            "minSyncPeriod": duration::text(config.intervals.min_sync),
            "serviceMetrics": datapath.service_metrics,
            "syncPeriod": duration::text(config.intervals.sync),
        },
    }})
}
