//! The command line: what can be said, and the one place that reads arguments and environment. What the words mean is decided in
//! [`crate::config`].

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

use crate::config::RunConfig;
use crate::inspect::{self, Filter, Output};
use crate::{datapath, run};

/// Where the maps are pinned unless said otherwise.
const DEFAULT_BPF_DIR: &str = "/sys/fs/bpf/ebpf-proxy";
/// Says it for all commands of a container, where the BPF file system is mounted elsewhere.
const BPF_DIR_VARIABLE: &str = "EBPF_PROXY_BPF_DIR";

const TIMEOUTS: &str = "Silent connections (of the proxy's own table; netfilter's is left alone)";

/// The client reports what the watches report again, and better.
const DEFAULT_LOG: &str = "info,kube_client::client=off";

/// An eBPF service proxy for Kubernetes: does on every node what kube-proxy does, under any CNI plugin.
#[derive(Parser, Debug)]
#[command(name = "proxy-agent", version)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run the agent of this node.
    ///
    /// It keeps the maps and programs in step with the cluster until it is stopped. What is pinned goes on forwarding after
    /// that; `cleanup` removes it.
    #[command(
        after_help = "Example:\n  proxy-agent run --node-name node-a --manifests ./manifests --cluster-cidr 10.244.0.0/16,fd00:10::/56"
    )]
    Run(Box<RunArgs>),
    /// Show services as the kernel has them.
    #[command(subcommand)]
    Service(ServiceCommand),
    /// Show backends as the kernel has them.
    #[command(subcommand)]
    Backend(BackendCommand),
    /// Show translated connections.
    #[command(subcommand)]
    Connection(ConnectionCommand),
    /// Remove every program, map and pin of an agent that does not run any more.
    #[command(after_help = "Example:\n  proxy-agent cleanup --bpf-dir /sys/fs/bpf/ebpf-proxy")]
    Cleanup {
        #[command(flatten)]
        pins: Pins,
    },
}

#[derive(Subcommand, Debug)]
enum ServiceCommand {
    /// List service ports with their frontends and backends.
    #[command(after_help = "Example:\n  proxy-agent service list --namespace kube-system -o wide")]
    List {
        #[command(flatten)]
        view: View,
        #[command(flatten)]
        filter: FilterArgs,
    },
    /// Show the ports of one Service.
    #[command(after_help = "Example:\n  proxy-agent service get kube-system/kube-dns -o yaml")]
    Get {
        /// The Service, as namespace/name; without a slash in the namespace `default`.
        service: String,
        #[command(flatten)]
        view: View,
    },
}

#[derive(Subcommand, Debug)]
enum BackendCommand {
    /// List the backends of service ports.
    #[command(after_help = "Example:\n  proxy-agent backend list --service default/web")]
    List {
        #[command(flatten)]
        view: View,
        #[command(flatten)]
        filter: FilterArgs,
    },
}

#[derive(Subcommand, Debug)]
enum ConnectionCommand {
    /// List the rewrite entries of connections.
    #[command(after_help = "Example:\n  proxy-agent connection list --service default/web -o json")]
    List {
        #[command(flatten)]
        view: View,
        #[command(flatten)]
        filter: FilterArgs,
    },
}

#[derive(Args, Debug)]
struct Pins {
    /// Directory on a BPF file system where this agent's maps, programs and links are pinned.
    #[arg(long, value_name = "DIR", env = BPF_DIR_VARIABLE, default_value = DEFAULT_BPF_DIR)]
    bpf_dir: PathBuf,
}

#[derive(Args, Debug)]
struct View {
    #[command(flatten)]
    pins: Pins,
    /// How to print it.
    #[arg(short, long, value_enum, default_value = "table")]
    output: OutputArg,
}

#[derive(Args, Debug)]
struct FilterArgs {
    /// Only this namespace.
    #[arg(short, long, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// Only this Service, as namespace/name.
    #[arg(long, value_name = "NAMESPACE/NAME", conflicts_with = "namespace")]
    service: Option<String>,
}

/// `proxy-agent run`, as typed.
#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    /// Name of this node as endpoints give it in `nodeName`. Default: the host's name.
    #[arg(long, value_name = "NAME", env = "NODE_NAME", default_value = "")]
    pub node_name: String,
    /// Kubeconfig file of the API server. Default: the service account of the pod.
    #[arg(long, value_name = "FILE", conflicts_with = "manifests")]
    pub kubeconfig: Option<PathBuf>,
    /// Folder of Kubernetes YAML and JSON files to use instead of an API server; it is watched.
    #[arg(long, value_name = "DIR")]
    pub manifests: Option<PathBuf>,
    /// Addresses of pods, one prefix per family: 10.244.0.0/16,fd00:10::/56. Other sources are masqueraded. For ClusterCIDR.
    #[arg(long, value_name = "CIDR[,CIDR]", default_value = "")]
    pub cluster_cidr: String,
    /// How pods are told from others, whose connections are masqueraded.
    #[arg(long, value_enum, value_name = "MODE", default_value = "ClusterCIDR")]
    pub detect_local_mode: DetectLocalModeArg,
    /// Bridge that pods are behind, for BridgeInterface.
    #[arg(long, value_name = "NAME", default_value = "")]
    pub pod_bridge_interface: String,
    /// What the names of pods' interfaces on the node begin with, for InterfaceNamePrefix.
    #[arg(long, value_name = "PREFIX", default_value = "")]
    pub pod_interface_name_prefix: String,
    /// Local addresses that serve node ports: prefixes (192.0.2.0/24,fd00::/64), `primary` for those of the Node object, `localhost`,
    /// `all`; freely mixed. All addresses of a family of which none is named. Default: all.
    #[arg(long, value_name = "CIDR|WORD[,…]", default_value = "")]
    pub nodeport_addresses: String,
    /// Whether loopback addresses serve node ports to the node itself, if they are among the others.
    #[arg(long, value_name = "BOOL", action = ArgAction::Set, default_value_t = true, default_missing_value = "true", num_args = 0..=1,
        require_equals = true)]
    pub localhost_nodeports: bool,
    /// Kubernetes feature gates, as kube-proxy has them: AllowServiceExternalIPs (default true). Others are ignored.
    #[arg(long, value_name = "NAME=BOOL[,…]", default_value = "")]
    pub feature_gates: String,
    /// Masquerade every connection to a cluster IP.
    #[arg(long)]
    pub masquerade_all: bool,
    /// Directory on a BPF file system to pin maps, programs and links in. One agent each.
    #[arg(long, value_name = "DIR", env = BPF_DIR_VARIABLE, default_value = DEFAULT_BPF_DIR)]
    pub bpf_dir: PathBuf,
    /// cgroup whose processes reach services at their sockets. Default: the cgroup2 mount.
    #[arg(long, value_name = "DIR")]
    pub cgroup: Option<PathBuf>,
    /// Interfaces to attach to: a regular expression for the whole name. Default: all but loopback.
    #[arg(long, value_name = "REGEX")]
    pub interfaces: Option<String>,
    /// Interfaces to leave alone: a regular expression for the whole name.
    #[arg(long, value_name = "REGEX")]
    pub exclude_interfaces: Option<String>,
    /// Whose connections are translated at the socket: the host's, pods' TCP as well, or nobody's.
    #[arg(long, value_enum, default_value = "host")]
    pub socket_lb: SocketLbArg,
    /// How to attach to interfaces: tcx links (Linux 6.6), classic filters, or whichever is there.
    #[arg(long, value_enum, default_value = "auto")]
    pub attach: AttachArg,
    /// What the eBPF programs log.
    #[arg(long, value_enum, value_name = "LEVEL", default_value = "off")]
    pub bpf_log_level: BpfLogLevelArg,
    /// Where /healthz, /livez and /readyz are served; empty for nowhere.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:10256")]
    pub healthz_bind_address: String,
    /// Where /metrics, /healthz, /proxyMode and /configz are served; empty for nowhere.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:10249")]
    pub metrics_bind_address: String,
    /// End with an error when one of these addresses cannot be bound at start, instead of trying again.
    #[arg(long)]
    pub bind_address_hard_fail: bool,
    /// Shortest time between two updates of the maps: the first change after quiet is applied at once, those after it together.
    #[arg(long, value_name = "DURATION", default_value = "10ms")]
    pub min_sync_period: String,
    /// Longest time between two tries of a write that fails. An agent that cannot apply a change for twice as long is unhealthy.
    #[arg(long, value_name = "DURATION", default_value = "30s")]
    pub sync_period: String,
    /// How long an established TCP connection without packets is remembered; 0 for the default.
    #[arg(long, value_name = "DURATION", default_value = "24h", help_heading = TIMEOUTS)]
    pub conntrack_tcp_timeout_established: String,
    /// How long a TCP connection that one side has ended is remembered; 0 for the default.
    #[arg(long, value_name = "DURATION", default_value = "1h", help_heading = TIMEOUTS)]
    pub conntrack_tcp_timeout_close_wait: String,
    /// How long a UDP flow that nobody answers is remembered; 0 for the default, 30s.
    #[arg(long, value_name = "DURATION", default_value = "0", help_heading = TIMEOUTS)]
    pub conntrack_udp_timeout: String,
    /// How long a UDP flow with answers is remembered; 0 for the default, 3m.
    #[arg(long, value_name = "DURATION", default_value = "0", help_heading = TIMEOUTS)]
    pub conntrack_udp_timeout_stream: String,
    /// Frontends per address family that the maps have room for.
    #[arg(long, value_name = "N", help_heading = "Map sizes (when the maps are made)")]
    pub frontends_capacity: Option<u32>,
    /// Backends per address family.
    #[arg(long, value_name = "N", help_heading = "Map sizes (when the maps are made)")]
    pub backends_capacity: Option<u32>,
    /// Rewrite entries per address family: two for a connection, four for a masqueraded one.
    #[arg(long, value_name = "N", help_heading = "Map sizes (when the maps are made)")]
    pub rewrites_capacity: Option<u32>,
    /// Service ports.
    #[arg(long, value_name = "N", help_heading = "Map sizes (when the maps are made)")]
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

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
enum OutputArg {
    Table,
    Wide,
    Json,
    Yaml,
}

impl From<OutputArg> for Output {
    fn from(arg: OutputArg) -> Self {
        match arg {
            OutputArg::Table => Self::Table,
            OutputArg::Wide => Self::Wide,
            OutputArg::Json => Self::Json,
            OutputArg::Yaml => Self::Yaml,
        }
    }
}

/// Does what the command line says.
pub fn main() -> ExitCode {
    match execute(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("proxy-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(command: Command) -> anyhow::Result<()> {
    let text = match command {
        Command::Run(args) => {
            init_log();
            return run::run(RunConfig::from_args(&args)?);
        }
        Command::Cleanup { pins } => {
            let report = datapath::cleanup(&pins.bpf_dir)?;
            format!(
                "removed {} links, {} filters, {} maps\n",
                report.links, report.filters, report.maps
            )
        }
        Command::Service(ServiceCommand::List { view, filter }) => {
            inspect::services(&view.pins.bpf_dir, &filter.filter()?, view.output.into())?
        }
        Command::Service(ServiceCommand::Get { service, view }) => {
            let (namespace, name) = one_service(&service)?;
            inspect::service(&view.pins.bpf_dir, namespace, name, view.output.into())?
        }
        Command::Backend(BackendCommand::List { view, filter }) => {
            inspect::backends(&view.pins.bpf_dir, &filter.filter()?, view.output.into())?
        }
        Command::Connection(ConnectionCommand::List { view, filter }) => {
            inspect::connections(&view.pins.bpf_dir, &filter.filter()?, view.output.into())?
        }
    };
    print(&text)
}

/// A reader that has seen enough (`| head`) is no error.
fn print(text: &str) -> anyhow::Result<()> {
    use std::io::{ErrorKind, Write};
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error).context("writing to standard output"),
        _ => Ok(()),
    }
}

impl FilterArgs {
    fn filter(&self) -> anyhow::Result<Filter> {
        match &self.service {
            Some(service) => {
                let (namespace, name) = one_service(service)?;
                Ok(Filter {
                    namespace: Some(namespace.to_owned()),
                    service: Some(name.to_owned()),
                    protocol: None,
                })
            }
            None => Ok(Filter {
                namespace: self.namespace.clone(),
                ..Filter::default()
            }),
        }
    }
}

fn one_service(text: &str) -> anyhow::Result<(&str, &str)> {
    let (namespace, name) = text.split_once('/').unwrap_or(("default", text));
    if namespace.is_empty() || name.is_empty() || name.contains('/') {
        bail!("{text:?} is not a Service: write namespace/name, such as kube-system/kube-dns");
    }
    Ok((namespace, name))
}

fn init_log() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT_LOG));
    // A log that is already there (tests) stays.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .try_init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn services_by_name() {
        assert_eq!(
            one_service("kube-system/kube-dns").unwrap(),
            ("kube-system", "kube-dns")
        );
        assert_eq!(one_service("web").unwrap(), ("default", "web"));
        for text in ["", "/", "a/", "/b", "a/b/c"] {
            assert!(one_service(text).is_err(), "{text}");
        }
    }
}
