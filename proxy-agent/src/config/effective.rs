//! The configuration in effect as a [`Document`]: what `/configz` says, `proxy-agent config` prints and `--write-config-to`
//! writes. Read back, it gives the same configuration.

use std::net::SocketAddr;

use clap::ValueEnum;

use super::document::{
    API_VERSION, Capacities, ClientConnection, Conntrack, DetectLocal, Document, Ebpf, KIND, Logging, Xdp,
};
use super::words::{AttachArg, BpfLogLevelArg, SocketLbArg, XdpModeArg};
use super::{MODE, RunConfig, SourceConfig};
use crate::datapath::PodDetection;
use crate::duration;
use crate::inspect;

impl RunConfig {
    /// As YAML.
    pub(crate) fn to_yaml(&self) -> String {
        inspect::yaml(&self.to_document().to_value())
    }

    /// Everything, defaults as well. What belongs to one section per mode there stands in `ebpf` here.
    pub(crate) fn to_document(&self) -> Document {
        let datapath = &self.datapath;
        let timeouts = &datapath.timeouts;
        let (detect_local_mode, cidrs, detect_local) = detection(&datapath.pods);
        let bind = |address: Option<SocketAddr>| Some(address.map(|a| a.to_string()).unwrap_or_default());
        let (client_connection, master, manifests) = match &self.source {
            SourceConfig::Manifests(dir) => (ClientConnection::default(), None, Some(dir.display().to_string())),
            SourceConfig::ApiServer(server) => {
                let connection = ClientConnection {
                    kubeconfig: server.kubeconfig.as_ref().map(|path| path.display().to_string()),
                    qps: server.rate.map(|rate| rate.qps),
                    burst: server.rate.map(|rate| rate.burst.into()),
                };
                (connection, server.master.clone(), None)
            }
        };
        let xdp_interfaces = datapath.xdp.interfaces.as_ref().and_then(|filter| filter.patterns()[0]);
        let [interfaces, exclude_interfaces] = datapath.interfaces.patterns();
        Document {
            api_version: Some(API_VERSION.to_owned()),
            kind: Some(KIND.to_owned()),
            bind_address: self.node_ip.map(|ip| ip.to_string()),
            bind_address_hard_fail: Some(self.bind_address_hard_fail),
            client_connection,
            cluster_cidr: Some(cidrs),
            conntrack: Conntrack {
                tcp_close_wait_timeout: Some(duration::text(timeouts.tcp_half_closed)),
                tcp_established_timeout: Some(duration::text(timeouts.tcp_established)),
                udp_stream_timeout: Some(duration::text(timeouts.udp_answered)),
                udp_timeout: Some(duration::text(timeouts.udp_unanswered)),
            },
            detect_local,
            detect_local_mode: Some(detect_local_mode.to_owned()),
            feature_gates: Some(self.gates.to_map()),
            healthz_bind_address: bind(self.healthz),
            hostname_override: Some(self.node_name.to_string()),
            logging: Logging {
                verbosity: Some(self.verbosity),
            },
            metrics_bind_address: bind(self.metrics),
            mode: Some(MODE.to_owned()),
            node_port_addresses: Some(datapath.node_port_addresses.words()),
            ebpf: Ebpf {
                attach: word::<AttachArg, _>(datapath.attach),
                bpf_dir: Some(datapath.bpf_dir.display().to_string()),
                bpf_log_level: word::<BpfLogLevelArg, _>(datapath.log_level),
                capacities: Capacities {
                    counters: Some(datapath.capacities.counters),
                    frontends: Some(datapath.capacities.frontends),
                    backends: Some(datapath.capacities.backends),
                    rewrites: Some(datapath.capacities.rewrites),
                    services: Some(datapath.capacities.services),
                },
                cgroup: datapath.cgroup.as_ref().map(|dir| dir.display().to_string()),
                exclude_interfaces: exclude_interfaces.map(str::to_owned),
                interfaces: interfaces.map(str::to_owned),
                localhost_node_ports: Some(datapath.node_port_addresses.loopback_allowed),
                manifests,
                masquerade_all: Some(datapath.masquerade_all),
                master,
                min_sync_period: Some(duration::text(self.intervals.min_sync)),
                serve_healthz: Some(self.healthz.is_some()),
                serve_metrics: Some(self.metrics.is_some()),
                service_metrics: Some(datapath.service_metrics),
                service_proxy_name: self.service_proxy_name.as_deref().map(str::to_owned),
                socket_lb: word::<SocketLbArg, _>(datapath.socket_lb),
                sync_period: Some(duration::text(self.intervals.sync)),
                xdp: Xdp {
                    interfaces: xdp_interfaces.map(str::to_owned),
                    mode: word::<XdpModeArg, _>(datapath.xdp.mode),
                },
            },
            ..Document::default()
        }
    }
}

/// Mode, prefixes, and names.
fn detection(pods: &PodDetection) -> (&'static str, String, DetectLocal) {
    let mut names = DetectLocal::default();
    let mut prefixes = String::new();
    let mode = match pods {
        PodDetection::ClusterCidr(cidrs) => {
            let cidrs: Vec<String> = cidrs.iter().map(ToString::to_string).collect();
            prefixes = cidrs.join(",");
            "ClusterCIDR"
        }
        PodDetection::NodeCidr => "NodeCIDR",
        PodDetection::Bridge(name) => {
            names.bridge_interface = Some(name.clone());
            "BridgeInterface"
        }
        PodDetection::InterfacePrefix(prefix) => {
            names.interface_name_prefix = Some(prefix.clone());
            "InterfaceNamePrefix"
        }
    };
    (mode, prefixes, names)
}

/// How a choice is written.
fn word<A: ValueEnum + Into<T>, T: PartialEq>(value: T) -> Option<String> {
    let arg = A::value_variants().iter().find(|arg| (*arg).clone().into() == value)?;
    Some(arg.to_possible_value()?.get_name().to_owned())
}
