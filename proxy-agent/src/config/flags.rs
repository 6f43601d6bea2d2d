//! The flags of `run` and `config`: kube-proxy's names where kube-proxy has them. What they mean beside a file is decided in
//! [`super::overlay`].
//!
//! What must stay true: a flag without a value is `None`; defaults are filled in later, so that a file can be heard.

use std::path::PathBuf;

use clap::{ArgAction, Args};

use super::BPF_DIR_VARIABLE;
use super::meaningless::Meaningless;
use super::words::{AttachArg, BpfLogLevelArg, DetectLocalModeArg, SocketLbArg, XdpModeArg};

const KUBE: &str = "As kube-proxy has them (ignored with --config)";
const TIMEOUTS: &str = "Silent connections, of the proxy's own table (ignored with --config)";
const SIZES: &str = "Map sizes (when the maps are made)";

/// `proxy-agent run`, as typed.
#[derive(Args, Clone, Debug, Default)]
pub struct RunArgs {
    /// kube-proxy's configuration file (KubeProxyConfiguration v1alpha1), YAML or JSON.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Name of this node as endpoints give it in `nodeName`. [default: the host's name]
    #[arg(long, alias = "hostname-override", value_name = "NAME", env = "NODE_NAME")]
    pub node_name: Option<String>,
    /// Address of the API server, instead of the one that the kubeconfig or the pod's environment says.
    #[arg(long, value_name = "URL", conflicts_with = "manifests")]
    pub master: Option<String>,
    /// Folder of Kubernetes YAML and JSON files to use instead of an API server; it is watched.
    #[arg(long, value_name = "DIR")]
    pub manifests: Option<String>,
    /// Directory on a BPF file system to pin maps, programs and links in. One agent each. [default: /sys/fs/bpf/ebpf-proxy]
    #[arg(long, value_name = "DIR", env = BPF_DIR_VARIABLE)]
    pub bpf_dir: Option<String>,
    /// cgroup whose processes reach services at their sockets. [default: the cgroup2 mount]
    #[arg(long, value_name = "DIR")]
    pub cgroup: Option<String>,
    /// Interfaces to attach to: a regular expression for the whole name. [default: all but loopback]
    #[arg(long, value_name = "REGEX")]
    pub interfaces: Option<String>,
    /// Interfaces to leave alone: a regular expression for the whole name.
    #[arg(long, value_name = "REGEX")]
    pub exclude_interfaces: Option<String>,
    /// Whose connections are translated at the socket: the host's, pods' TCP as well, or nobody's. [default: host]
    #[arg(long, value_enum)]
    pub socket_lb: Option<SocketLbArg>,
    /// How to attach to interfaces: tcx links (Linux 6.6), classic filters, or whichever is there. [default: auto]
    #[arg(long, value_enum)]
    pub attach: Option<AttachArg>,
    /// Network cards that forward connections from outside to endpoints on other nodes at XDP: a regular expression for the whole
    /// name. [default: none]
    #[arg(long, value_name = "REGEX")]
    pub xdp_interfaces: Option<String>,
    /// Where XDP runs: in the driver if it can, in the driver, or behind it. [default: auto]
    #[arg(long, value_enum)]
    pub xdp_mode: Option<XdpModeArg>,
    /// Whether connections, packets and bytes are counted per service port, for /metrics and `top`. [default: true]
    #[arg(long, value_name = "BOOL", default_missing_value = "true", num_args = 0..=1, require_equals = true)]
    pub service_metrics: Option<bool>,
    /// Serve only Services with this value of the label service.kubernetes.io/service-proxy-name, which other proxies leave alone: a
    /// trial beside kube-proxy. [default: those without the label]
    #[arg(long, value_name = "NAME")]
    pub service_proxy_name: Option<String>,
    /// What the eBPF programs log. [default: off]
    #[arg(long, value_enum, value_name = "LEVEL")]
    pub bpf_log_level: Option<BpfLogLevelArg>,
    /// What the agent logs: 0 to 3 info, 4 and 5 debug, from 6 on trace. Counts before RUST_LOG.
    #[arg(short, long = "v", value_name = "N")]
    pub v: Option<u32>,

    /// Remove every program, map and pin, and exit: like `cleanup`.
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false,
        hide_default_value = true, value_name = "BOOL")]
    pub cleanup: bool,
    /// Make and pin the maps, have the kernel verify the programs, and exit. Nothing is attached.
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false,
        hide_default_value = true, value_name = "BOOL")]
    pub init_only: bool,
    /// Write the configuration in effect to this file, and exit.
    #[arg(long, value_name = "FILE")]
    pub write_config_to: Option<PathBuf>,

    /// Kubeconfig file of the API server. [default: the service account of the pod]
    #[arg(long, value_name = "FILE", conflicts_with = "manifests", help_heading = KUBE)]
    pub kubeconfig: Option<String>,
    /// Requests a second to the API server, on average; no limit unless one of these two is given.
    #[arg(long, value_name = "N", allow_negative_numbers = true, help_heading = KUBE)]
    pub kube_api_qps: Option<f64>,
    /// Requests to the API server at once.
    #[arg(long, value_name = "N", help_heading = KUBE)]
    pub kube_api_burst: Option<i64>,
    /// `ebpf`. kube-proxy's iptables, nftables and ipvs are taken for it, with a warning.
    #[arg(long, value_name = "MODE", help_heading = KUBE)]
    pub proxy_mode: Option<String>,
    /// Address of this node, before those of its Node object. An IPv6 one makes the servers listen on IPv6.
    #[arg(long, value_name = "ADDRESS", help_heading = KUBE)]
    pub bind_address: Option<String>,
    /// Addresses of pods, one prefix per family: 10.244.0.0/16,fd00:10::/56. Other sources are masqueraded. For ClusterCIDR.
    #[arg(long, value_name = "CIDR[,CIDR]", help_heading = KUBE)]
    pub cluster_cidr: Option<String>,
    /// How pods are told from others, whose connections are masqueraded. [default: ClusterCIDR]
    #[arg(long, value_enum, value_name = "MODE", help_heading = KUBE)]
    pub detect_local_mode: Option<DetectLocalModeArg>,
    /// Bridge that pods are behind, for BridgeInterface.
    #[arg(long, value_name = "NAME", help_heading = KUBE)]
    pub pod_bridge_interface: Option<String>,
    /// What the names of pods' interfaces on the node begin with, for InterfaceNamePrefix.
    #[arg(long, value_name = "PREFIX", help_heading = KUBE)]
    pub pod_interface_name_prefix: Option<String>,
    /// Local addresses that serve node ports: prefixes (192.0.2.0/24,fd00::/64), `primary` for those of the Node object, `localhost`,
    /// `all`; freely mixed. All addresses of a family of which none is named. [default: all]
    #[arg(long, value_name = "CIDR|WORD[,…]", help_heading = KUBE)]
    pub nodeport_addresses: Option<String>,
    /// Whether loopback addresses serve node ports to the node itself, if they are among the others. [default: true]
    #[arg(long, alias = "iptables-localhost-nodeports", value_name = "BOOL", default_missing_value = "true", num_args = 0..=1,
        require_equals = true, help_heading = KUBE)]
    pub localhost_nodeports: Option<bool>,
    /// Masquerade every connection to a cluster IP.
    #[arg(long, value_name = "BOOL", default_missing_value = "true", num_args = 0..=1, require_equals = true, help_heading = KUBE)]
    pub masquerade_all: Option<bool>,
    /// Kubernetes feature gates: AllowServiceExternalIPs (default true). Others are ignored.
    #[arg(long, value_name = "NAME=BOOL[,…]", help_heading = KUBE)]
    pub feature_gates: Option<String>,
    /// Where /healthz, /livez and /readyz are served; empty for nowhere. [default: 0.0.0.0:10256]
    #[arg(long, value_name = "ADDRESS:PORT", help_heading = KUBE)]
    pub healthz_bind_address: Option<String>,
    /// Where /metrics, /healthz, /proxyMode and /configz are served; empty for nowhere. [default: 127.0.0.1:10249]
    #[arg(long, value_name = "ADDRESS:PORT", help_heading = KUBE)]
    pub metrics_bind_address: Option<String>,
    /// End with an error when one of these addresses cannot be bound at start, instead of trying again.
    #[arg(long, value_name = "BOOL", default_missing_value = "true", num_args = 0..=1, require_equals = true, help_heading = KUBE)]
    pub bind_address_hard_fail: Option<bool>,
    /// Shortest time between two updates of the maps: the first change after quiet is applied at once, those after it together.
    /// [default: 10ms]
    #[arg(long, aliases = ["iptables-min-sync-period", "ipvs-min-sync-period"], value_name = "DURATION", help_heading = KUBE)]
    pub min_sync_period: Option<String>,
    /// Longest time between two tries of a write that fails. An agent that cannot apply a change for twice as long is unhealthy.
    /// [default: 30s]
    #[arg(long, aliases = ["iptables-sync-period", "ipvs-sync-period"], value_name = "DURATION", help_heading = KUBE)]
    pub sync_period: Option<String>,
    /// How long an established TCP connection without packets is remembered; 0 for the default, 24h.
    #[arg(long, value_name = "DURATION", help_heading = TIMEOUTS)]
    pub conntrack_tcp_timeout_established: Option<String>,
    /// How long a TCP connection that one side has ended is remembered; 0 for the default, 1h.
    #[arg(long, value_name = "DURATION", help_heading = TIMEOUTS)]
    pub conntrack_tcp_timeout_close_wait: Option<String>,
    /// How long a UDP flow that nobody answers is remembered; 0 for the default, 30s.
    #[arg(long, value_name = "DURATION", help_heading = TIMEOUTS)]
    pub conntrack_udp_timeout: Option<String>,
    /// How long a UDP flow with answers is remembered; 0 for the default, 3m.
    #[arg(long, value_name = "DURATION", help_heading = TIMEOUTS)]
    pub conntrack_udp_timeout_stream: Option<String>,
    /// Frontends per address family that the maps have room for.
    #[arg(long, value_name = "N", help_heading = SIZES)]
    pub frontends_capacity: Option<u32>,
    /// Backends per address family.
    #[arg(long, value_name = "N", help_heading = SIZES)]
    pub backends_capacity: Option<u32>,
    /// Rewrite entries per address family: two for a connection, four for a masqueraded one.
    #[arg(long, value_name = "N", help_heading = SIZES)]
    pub rewrites_capacity: Option<u32>,
    /// Service ports.
    #[arg(long, value_name = "N", help_heading = SIZES)]
    pub services_capacity: Option<u32>,
    /// Service ports whose traffic is counted; 88 bytes each on every CPU.
    #[arg(long, value_name = "N", help_heading = SIZES)]
    pub counters_capacity: Option<u32>,
    /// What kube-proxy has beside these.
    #[command(flatten)]
    pub meaningless: Meaningless,
}
