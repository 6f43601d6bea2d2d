//! The flags of `run` and `config`: kube-proxy's names where kube-proxy has them, and how they are laid over the configuration
//! file. Called once by [`super::RunConfig::from_args`].
//!
//! What must stay true: every flag is a field of [`Document`], so whatever a flag says a file can say. With `--config`, flags for
//! what kube-proxy's own fields say are ignored and named, as kube-proxy ignores them; what kube-proxy takes from the command
//! line all the same, and what it does not have, counts before the file.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::{ArgAction, Args, ValueEnum};

use super::document::Document;
use super::{ConfigError, Origin};
use crate::datapath::{AttachMode, BpfLogLevel, SocketLb};
use crate::gates::FeatureGates;

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
    #[arg(long, value_name = "DIR")]
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
}

/// `--socket-lb`.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum SocketLbArg {
    /// Processes of the host network namespace.
    Host,
    /// Pods' TCP as well.
    All,
    /// Nobody; everything is translated packet by packet.
    Off,
}

impl From<SocketLbArg> for SocketLb {
    fn from(arg: SocketLbArg) -> Self {
        match arg {
            SocketLbArg::Host => Self::Host,
            SocketLbArg::All => Self::All,
            SocketLbArg::Off => Self::Off,
        }
    }
}

/// `--detect-local-mode`, spelled as kube-proxy does.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum DetectLocalModeArg {
    /// By the addresses of --cluster-cidr; without them, nobody is a pod.
    #[value(name = "ClusterCIDR")]
    ClusterCidr,
    /// By the pod addresses in the Node object.
    #[value(name = "NodeCIDR")]
    NodeCidr,
    /// By the bridge of --pod-bridge-interface.
    #[value(name = "BridgeInterface")]
    BridgeInterface,
    /// By the interfaces of --pod-interface-name-prefix.
    #[value(name = "InterfaceNamePrefix")]
    InterfaceNamePrefix,
}

/// `--attach`.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum AttachArg {
    /// tcx where the kernel has it.
    Auto,
    /// tcx links.
    Tcx,
    /// Filters of a clsact qdisc.
    Classic,
}

impl From<AttachArg> for AttachMode {
    fn from(arg: AttachArg) -> Self {
        match arg {
            AttachArg::Auto => Self::Auto,
            AttachArg::Tcx => Self::Tcx,
            AttachArg::Classic => Self::Classic,
        }
    }
}

/// `--bpf-log-level`.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the names say it")]
pub enum BpfLogLevelArg {
    Off,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl From<BpfLogLevelArg> for BpfLogLevel {
    fn from(arg: BpfLogLevelArg) -> Self {
        match arg {
            BpfLogLevelArg::Off => Self::Off,
            BpfLogLevelArg::Error => Self::Error,
            BpfLogLevelArg::Warn => Self::Warn,
            BpfLogLevelArg::Info => Self::Info,
            BpfLogLevelArg::Debug => Self::Debug,
            BpfLogLevelArg::Trace => Self::Trace,
        }
    }
}

/// `--proxy-mode` and `mode`.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the names say it")]
pub enum ModeArg {
    Ebpf,
    Iptables,
    Nftables,
    Ipvs,
}

/// Lays flags over what the file says.
struct Overlay {
    has_file: bool,
    given: BTreeMap<&'static str, &'static str>,
    ignored: Vec<&'static str>,
}

impl Overlay {
    /// A flag that counts in any case.
    fn own<T>(&mut self, flag: &'static str, field: &'static str, value: Option<T>, slot: &mut Option<T>) {
        if value.is_some() {
            self.given.insert(field, flag);
            *slot = value;
        }
    }

    /// A flag that does not count if there is a file.
    fn kube<T>(&mut self, flag: &'static str, field: &'static str, value: Option<T>, slot: &mut Option<T>) {
        match value {
            Some(_) if self.has_file => self.ignored.push(flag),
            value => self.own(flag, field, value, slot),
        }
    }
}

/// Lays the flags over the document. Gives which field comes from which flag, and the flags that did not count.
pub(super) fn lay_over(args: &RunArgs, document: &mut Document) -> Result<(Origin, Vec<&'static str>), ConfigError> {
    let mut over = Overlay {
        has_file: args.config.is_some(),
        given: BTreeMap::new(),
        ignored: Vec::new(),
    };
    own_flags(args, document, &mut over);
    kube_flags(args, document, &mut over)?;
    let origin = Origin {
        file: args.config.as_ref().map(|path| path.display().to_string()),
        given: over.given,
    };
    Ok((origin, over.ignored))
}

fn own_flags(args: &RunArgs, document: &mut Document, over: &mut Overlay) {
    let args = args.clone();
    let ebpf = &mut document.ebpf;
    // An environment variable that is set to nothing says nothing.
    let node_name = args.node_name.filter(|name| !name.trim().is_empty());
    over.own(
        "--node-name",
        "hostnameOverride",
        node_name,
        &mut document.hostname_override,
    );
    over.own("--master", "ebpf.master", args.master, &mut ebpf.master);
    over.own("--manifests", "ebpf.manifests", args.manifests, &mut ebpf.manifests);
    over.own("--bpf-dir", "ebpf.bpfDir", args.bpf_dir, &mut ebpf.bpf_dir);
    over.own("--cgroup", "ebpf.cgroup", args.cgroup, &mut ebpf.cgroup);
    over.own("--interfaces", "ebpf.interfaces", args.interfaces, &mut ebpf.interfaces);
    let exclude = args.exclude_interfaces;
    over.own(
        "--exclude-interfaces",
        "ebpf.excludeInterfaces",
        exclude,
        &mut ebpf.exclude_interfaces,
    );
    over.own(
        "--socket-lb",
        "ebpf.socketLB",
        args.socket_lb.and_then(word),
        &mut ebpf.socket_lb,
    );
    over.own("--attach", "ebpf.attach", args.attach.and_then(word), &mut ebpf.attach);
    let level = args.bpf_log_level.and_then(word);
    over.own("--bpf-log-level", "ebpf.bpfLogLevel", level, &mut ebpf.bpf_log_level);
    over.own("-v", "logging.verbosity", args.v, &mut document.logging.verbosity);
    let sizes = &mut ebpf.capacities;
    for (flag, field, value, slot) in [
        (
            "--frontends-capacity",
            "ebpf.capacities.frontends",
            args.frontends_capacity,
            &mut sizes.frontends,
        ),
        (
            "--backends-capacity",
            "ebpf.capacities.backends",
            args.backends_capacity,
            &mut sizes.backends,
        ),
        (
            "--rewrites-capacity",
            "ebpf.capacities.rewrites",
            args.rewrites_capacity,
            &mut sizes.rewrites,
        ),
        (
            "--services-capacity",
            "ebpf.capacities.services",
            args.services_capacity,
            &mut sizes.services,
        ),
    ] {
        over.own(flag, field, value, slot);
    }
}

fn kube_flags(args: &RunArgs, document: &mut Document, over: &mut Overlay) -> Result<(), ConfigError> {
    let args = args.clone();
    let (ebpf, client) = (&mut document.ebpf, &mut document.client_connection);
    let (tracked, local) = (&mut document.conntrack, &mut document.detect_local);
    // Here, and not in a file, an empty address means nowhere.
    let is_served = |address: &Option<String>| address.as_ref().map(|address| !address.trim().is_empty());
    let [serve_healthz, serve_metrics] = [&args.healthz_bind_address, &args.metrics_bind_address].map(is_served);
    let addresses = args.nodeport_addresses.as_deref().map(list);
    for (flag, field, value, slot) in [
        (
            "--kubeconfig",
            "clientConnection.kubeconfig",
            args.kubeconfig,
            &mut client.kubeconfig,
        ),
        ("--proxy-mode", "mode", args.proxy_mode, &mut document.mode),
        (
            "--bind-address",
            "bindAddress",
            args.bind_address,
            &mut document.bind_address,
        ),
        (
            "--cluster-cidr",
            "clusterCIDR",
            args.cluster_cidr,
            &mut document.cluster_cidr,
        ),
        (
            "--detect-local-mode",
            "detectLocalMode",
            args.detect_local_mode.and_then(word),
            &mut document.detect_local_mode,
        ),
        (
            "--pod-bridge-interface",
            "detectLocal.bridgeInterface",
            args.pod_bridge_interface,
            &mut local.bridge_interface,
        ),
        (
            "--pod-interface-name-prefix",
            "detectLocal.interfaceNamePrefix",
            args.pod_interface_name_prefix,
            &mut local.interface_name_prefix,
        ),
        (
            "--healthz-bind-address",
            "healthzBindAddress",
            args.healthz_bind_address,
            &mut document.healthz_bind_address,
        ),
        (
            "--metrics-bind-address",
            "metricsBindAddress",
            args.metrics_bind_address,
            &mut document.metrics_bind_address,
        ),
        (
            "--min-sync-period",
            "ebpf.minSyncPeriod",
            args.min_sync_period,
            &mut ebpf.min_sync_period,
        ),
        (
            "--sync-period",
            "ebpf.syncPeriod",
            args.sync_period,
            &mut ebpf.sync_period,
        ),
        (
            "--conntrack-tcp-timeout-established",
            "conntrack.tcpEstablishedTimeout",
            args.conntrack_tcp_timeout_established,
            &mut tracked.tcp_established_timeout,
        ),
        (
            "--conntrack-tcp-timeout-close-wait",
            "conntrack.tcpCloseWaitTimeout",
            args.conntrack_tcp_timeout_close_wait,
            &mut tracked.tcp_close_wait_timeout,
        ),
        (
            "--conntrack-udp-timeout",
            "conntrack.udpTimeout",
            args.conntrack_udp_timeout,
            &mut tracked.udp_timeout,
        ),
        (
            "--conntrack-udp-timeout-stream",
            "conntrack.udpStreamTimeout",
            args.conntrack_udp_timeout_stream,
            &mut tracked.udp_stream_timeout,
        ),
    ] {
        over.kube(flag, field, value, slot);
    }
    let hard_fail = args.bind_address_hard_fail;
    for (flag, field, value, slot) in [
        (
            "--localhost-nodeports",
            "ebpf.localhostNodePorts",
            args.localhost_nodeports,
            &mut ebpf.localhost_node_ports,
        ),
        (
            "--masquerade-all",
            "ebpf.masqueradeAll",
            args.masquerade_all,
            &mut ebpf.masquerade_all,
        ),
        (
            "--bind-address-hard-fail",
            "bindAddressHardFail",
            hard_fail,
            &mut document.bind_address_hard_fail,
        ),
    ] {
        over.kube(flag, field, value, slot);
    }
    over.kube(
        "--kube-api-qps",
        "clientConnection.qps",
        args.kube_api_qps,
        &mut client.qps,
    );
    over.kube(
        "--kube-api-burst",
        "clientConnection.burst",
        args.kube_api_burst,
        &mut client.burst,
    );
    over.kube(
        "--nodeport-addresses",
        "nodePortAddresses",
        addresses,
        &mut document.node_port_addresses,
    );
    if over.has_file {
        over.ignored.extend(args.feature_gates.map(|_| "--feature-gates"));
        return Ok(());
    }
    ebpf.serve_healthz = serve_healthz;
    ebpf.serve_metrics = serve_metrics;
    if let Some(text) = &args.feature_gates {
        let remedy = "write name=true or name=false, separated by commas";
        let gates = FeatureGates::parse(text);
        let gates = gates.map_err(|problem| ConfigError::value("--feature-gates", text, problem, remedy))?;
        over.own(
            "--feature-gates",
            "featureGates",
            Some(gates),
            &mut document.feature_gates,
        );
    }
    Ok(())
}

/// The parts of a list with commas; none of an empty text.
fn list(text: &str) -> Vec<String> {
    let parts = text.split(',').filter(|_| !text.trim().is_empty());
    parts.map(|part| part.trim().to_owned()).collect()
}

/// How a choice is written.
fn word(arg: impl ValueEnum) -> Option<String> {
    Some(arg.to_possible_value()?.get_name().to_owned())
}
