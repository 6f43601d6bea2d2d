//! What `proxy-agent run` was told, checked and with defaults filled in. Made once from the arguments; nothing else reads them.

mod times;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ipnet::IpNet;

use crate::cli::{AttachArg, BpfLogLevelArg, DetectLocalModeArg, RunArgs, SocketLbArg};
use crate::datapath::{
    AttachMode, BpfLogLevel, Capacities, InterfaceFilter, NodePortAddresses, Options, PodDetection, SocketLb,
};
use crate::gates::FeatureGates;
use crate::model::address::parse_cidr;

pub use self::times::Intervals;
/// What the kernel takes as the name of an interface.
const LONGEST_INTERFACE_NAME: usize = 15;

/// A value that cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{flag} {value:?}: {problem}; {remedy}")]
pub struct ConfigError {
    flag: &'static str,
    value: String,
    problem: String,
    remedy: &'static str,
}

/// Everything an agent needs to know to run.
#[derive(Clone, Debug)]
pub struct RunConfig {
    /// Name of this node (S172).
    pub node_name: Arc<str>,
    /// Where objects come from.
    pub source: SourceConfig,
    /// Kubernetes features that are switched.
    pub gates: FeatureGates,
    /// What the datapath is told.
    pub datapath: Options,
    /// Where health is served.
    pub healthz: Option<SocketAddr>,
    /// Where metrics are served.
    pub metrics: Option<SocketAddr>,
    /// An address of these two that cannot be bound is fatal (S179).
    pub bind_address_hard_fail: bool,
    /// When changes are applied.
    pub intervals: Intervals,
}

/// Where objects come from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SourceConfig {
    /// An API server; `None`: as the pod's service account says.
    ApiServer(Option<PathBuf>),
    /// A folder of manifests.
    Manifests(PathBuf),
}

impl RunConfig {
    /// Checks the arguments.
    pub fn from_args(args: &RunArgs) -> Result<Self, ConfigError> {
        let bad_pattern = |flag, value: &Option<String>| {
            let value = value.clone().unwrap_or_default();
            move |error: regex::Error| ConfigError {
                flag,
                value,
                problem: error.to_string().replace('\n', " "),
                remedy: "write a regular expression for interface names, such as eth.*|veth.*",
            }
        };
        let include = args.interfaces.as_deref();
        let exclude = args.exclude_interfaces.as_deref();
        InterfaceFilter::new(include, None).map_err(bad_pattern("--interfaces", &args.interfaces))?;
        let interfaces = InterfaceFilter::new(include, exclude)
            .map_err(bad_pattern("--exclude-interfaces", &args.exclude_interfaces))?;
        for (flag, capacity) in [
            ("--frontends-capacity", args.frontends_capacity),
            ("--backends-capacity", args.backends_capacity),
            ("--rewrites-capacity", args.rewrites_capacity),
            ("--services-capacity", args.services_capacity),
            ("--counters-capacity", args.counters_capacity),
        ] {
            if capacity == Some(0) {
                let problem = "a map needs room for something".to_owned();
                return Err(error(flag, "0", problem, "write a number above 0, or leave it out"));
            }
        }
        let capacities = Capacities::default();
        Ok(Self {
            node_name: node_name(&args.node_name)?.into(),
            source: match &args.manifests {
                Some(dir) => SourceConfig::Manifests(directory("--manifests", dir)?),
                None => SourceConfig::ApiServer(args.kubeconfig.clone()),
            },
            gates: feature_gates(&args.feature_gates)?,
            datapath: Options {
                bpf_dir: args.bpf_dir.clone(),
                cgroup: args
                    .cgroup
                    .as_deref()
                    .map(|dir| directory("--cgroup", dir))
                    .transpose()?,
                socket_lb: match args.socket_lb {
                    SocketLbArg::Host => SocketLb::Host,
                    SocketLbArg::All => SocketLb::All,
                    SocketLbArg::Off => SocketLb::Off,
                },
                pods: pods(args)?,
                interfaces,
                node_port_addresses: node_port_addresses(&args.nodeport_addresses, args.localhost_nodeports)?,
                masquerade_all: args.masquerade_all,
                attach: match args.attach {
                    AttachArg::Auto => AttachMode::Auto,
                    AttachArg::Tcx => AttachMode::Tcx,
                    AttachArg::Classic => AttachMode::Classic,
                },
                log_level: match args.bpf_log_level {
                    BpfLogLevelArg::Off => BpfLogLevel::Off,
                    BpfLogLevelArg::Error => BpfLogLevel::Error,
                    BpfLogLevelArg::Warn => BpfLogLevel::Warn,
                    BpfLogLevelArg::Info => BpfLogLevel::Info,
                    BpfLogLevelArg::Debug => BpfLogLevel::Debug,
                    BpfLogLevelArg::Trace => BpfLogLevel::Trace,
                },
                service_metrics: args.service_metrics,
                capacities: Capacities {
                    frontends: args.frontends_capacity.unwrap_or(capacities.frontends),
                    backends: args.backends_capacity.unwrap_or(capacities.backends),
                    rewrites: args.rewrites_capacity.unwrap_or(capacities.rewrites),
                    services: args.services_capacity.unwrap_or(capacities.services),
                    counters: args.counters_capacity.unwrap_or(capacities.counters),
                },
                timeouts: times::timeouts(args)?,
            },
            healthz: bind_address("--healthz-bind-address", &args.healthz_bind_address)?,
            metrics: bind_address("--metrics-bind-address", &args.metrics_bind_address)?,
            bind_address_hard_fail: args.bind_address_hard_fail,
            intervals: times::intervals(&args.min_sync_period, &args.sync_period)?,
        })
    }
}

fn error(flag: &'static str, value: &str, problem: String, remedy: &'static str) -> ConfigError {
    ConfigError {
        flag,
        value: value.to_owned(),
        problem,
        remedy,
    }
}

/// The given name, else the host's, lower-cased and trimmed (S172).
fn node_name(given: &str) -> Result<String, ConfigError> {
    const REMEDY: &str = "give the name of this node's Node object";
    let given = match given.trim() {
        "" => std::fs::read_to_string("/proc/sys/kernel/hostname").map_err(|reason| {
            error(
                "--node-name",
                given,
                format!("the host's name cannot be read ({reason})"),
                REMEDY,
            )
        })?,
        given => given.to_owned(),
    };
    match given.trim().to_lowercase() {
        name if name.is_empty() => Err(error("--node-name", "", "the host has no name".to_owned(), REMEDY)),
        name => Ok(name),
    }
}

fn directory(flag: &'static str, path: &Path) -> Result<PathBuf, ConfigError> {
    let problem = match std::fs::metadata(path) {
        Ok(meta) if meta.is_dir() => return Ok(path.to_owned()),
        Ok(_) => "is not a directory".to_owned(),
        Err(reason) => reason.to_string(),
    };
    Err(error(
        flag,
        &path.display().to_string(),
        problem,
        "give a directory that exists",
    ))
}

/// At most one prefix per family (S114, S115).
fn cluster_cidrs(text: &str) -> Result<Vec<IpNet>, ConfigError> {
    const REMEDY: &str = "write one prefix per family, such as 10.244.0.0/16,fd00:10::/56";
    let fail = |problem: String| error("--cluster-cidr", text, problem, REMEDY);
    let mut cidrs: Vec<IpNet> = Vec::new();
    for part in text.split(',').map(str::trim).filter(|_| !text.trim().is_empty()) {
        let cidr = parse_cidr(part)
            .ok_or_else(|| fail(format!("{part:?} is not a prefix")))?
            .trunc();
        if cidrs
            .iter()
            .any(|other| other.addr().is_ipv4() == cidr.addr().is_ipv4())
        {
            return Err(fail("two prefixes are of one family".to_owned()));
        }
        cidrs.push(cidr);
    }
    Ok(cidrs)
}

/// How pods are told from others (S114), with what the mode needs.
fn pods(args: &RunArgs) -> Result<PodDetection, ConfigError> {
    let cluster_cidrs = cluster_cidrs(&args.cluster_cidr)?;
    match args.detect_local_mode {
        DetectLocalModeArg::ClusterCidr => Ok(PodDetection::ClusterCidr(cluster_cidrs)),
        DetectLocalModeArg::NodeCidr => Ok(PodDetection::NodeCidr),
        DetectLocalModeArg::BridgeInterface => {
            let remedy = "name the bridge that pods are behind, such as cni0";
            interface_name("--pod-bridge-interface", &args.pod_bridge_interface, remedy).map(PodDetection::Bridge)
        }
        DetectLocalModeArg::InterfaceNamePrefix => {
            let remedy = "write what the names of pods' interfaces begin with, such as veth";
            interface_name("--pod-interface-name-prefix", &args.pod_interface_name_prefix, remedy)
                .map(PodDetection::InterfacePrefix)
        }
    }
}

/// The name of an interface, or the beginning of one, that a mode cannot do without.
fn interface_name(flag: &'static str, text: &str, remedy: &'static str) -> Result<String, ConfigError> {
    let fail = |problem: &str| Err(error(flag, text, problem.to_owned(), remedy));
    match text.trim() {
        "" => fail("is needed by this --detect-local-mode"),
        name if name.len() > LONGEST_INTERFACE_NAME => fail("is longer than a name can be"),
        name if name.contains(|c: char| c == '/' || c.is_whitespace()) => fail("cannot be in a name"),
        name => Ok(name.to_owned()),
    }
}

/// Prefixes and words (S81).
fn node_port_addresses(text: &str, loopback_allowed: bool) -> Result<NodePortAddresses, ConfigError> {
    const REMEDY: &str = "write prefixes such as 192.0.2.0/24,fd00::/64 and the words all, primary and localhost, or nothing for all addresses";
    let mut addresses = NodePortAddresses {
        loopback_allowed,
        ..NodePortAddresses::default()
    };
    for part in text.split(',').map(str::trim).filter(|_| !text.trim().is_empty()) {
        match part {
            "all" => addresses.all = true,
            "primary" => addresses.primary = true,
            "localhost" => addresses.prefixes.extend(NodePortAddresses::LOCALHOST),
            part => {
                let problem = || format!("{part:?} is neither a prefix nor a word that is known");
                let prefix = parse_cidr(part).ok_or_else(|| error("--nodeport-addresses", text, problem(), REMEDY))?;
                addresses.prefixes.push(prefix.trunc());
            }
        }
    }
    Ok(addresses)
}

/// Gates that nobody here knows are another component's, or older or newer than this one.
fn feature_gates(text: &str) -> Result<FeatureGates, ConfigError> {
    let remedy = "write name=true or name=false, separated by commas";
    let (gates, unknown) =
        FeatureGates::parse(text).map_err(|problem| error("--feature-gates", text, problem, remedy))?;
    for gate in unknown {
        tracing::warn!(gate, "unknown feature gate, ignored");
    }
    Ok(gates)
}

/// An empty text means nowhere (S174).
fn bind_address(flag: &'static str, text: &str) -> Result<Option<SocketAddr>, ConfigError> {
    if text.trim().is_empty() {
        return Ok(None);
    }
    let address = text.trim().parse();
    address.map(Some).map_err(|_| {
        let remedy = "write an IP address and a port, such as 0.0.0.0:10256 or [::]:10256, or nothing to switch it off";
        error(flag, text, "is not an address with a port".to_owned(), remedy)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cidrs_one_per_family() {
        let texts = |text| cluster_cidrs(text).map(|cidrs| cidrs.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(texts(""), Ok(vec![]));
        assert_eq!(texts("10.244.1.0/16").unwrap(), ["10.244.0.0/16"]);
        assert_eq!(
            texts("fd00::/56, 10.244.0.0/16").unwrap(),
            ["fd00::/56", "10.244.0.0/16"]
        );
        for bad in ["10.244.0.0", ",", "10.0.0.0/8,", "10.0.0.0/8,10.1.0.0/16"] {
            let text = texts(bad).unwrap_err().to_string();
            assert!(text.starts_with(&format!("--cluster-cidr {bad:?}: ")), "{text}");
        }
    }

    /// A command line with these options of `run`.
    fn config(options: &[&str]) -> Result<RunConfig, String> {
        use clap::Parser;
        #[derive(Parser)]
        struct Line {
            #[command(flatten)]
            run: RunArgs,
        }
        let line = Line::try_parse_from([&["run"], options].concat()).map_err(|error| error.to_string())?;
        RunConfig::from_args(&line.run).map_err(|error| error.to_string())
    }

    #[test]
    fn addresses_of_node_ports() {
        let everything = NodePortAddresses::default();
        assert_eq!(node_port_addresses(" ", true), Ok(everything.clone()), "S83");
        let prefixes = ["192.0.2.0/24", "fd00::/64"].map(|text| text.parse().unwrap());
        let chosen = NodePortAddresses {
            prefixes: prefixes.to_vec(),
            ..everything.clone()
        };
        assert_eq!(node_port_addresses("192.0.2.7/24, fd00::/64", true), Ok(chosen), "S81");
        let mixed = NodePortAddresses {
            all: true,
            primary: true,
            prefixes: [&NodePortAddresses::LOCALHOST[..], &prefixes[..1]].concat(),
            loopback_allowed: false,
        };
        let text = "primary,localhost, all,192.0.2.0/24";
        assert_eq!(node_port_addresses(text, false), Ok(mixed), "S81: words and prefixes");
        for bad in ["192.0.2.1", "primary,,192.0.2.0/24", ",", "Primary"] {
            assert!(node_port_addresses(bad, true).is_err(), "{bad}");
        }
        let loopback = |options: &[&str]| config(options).unwrap().datapath.node_port_addresses.loopback_allowed;
        assert!(loopback(&[]) && loopback(&["--localhost-nodeports"]));
        assert!(!loopback(&["--localhost-nodeports=false"]));
    }

    #[test]
    fn ways_to_tell_pods() {
        let pods = |options: &[&str]| config(options).map(|config| config.datapath.pods);
        assert_eq!(pods(&[]), Ok(PodDetection::ClusterCidr(vec![])), "S115: no detection");
        let cidr = ["--cluster-cidr", "10.244.0.0/16"];
        let cidrs = vec!["10.244.0.0/16".parse().unwrap()];
        assert_eq!(pods(&cidr), Ok(PodDetection::ClusterCidr(cidrs)), "S114");
        assert_eq!(pods(&["--detect-local-mode", "NodeCIDR"]), Ok(PodDetection::NodeCidr));
        let bridge = ["--detect-local-mode", "BridgeInterface", "--pod-bridge-interface"];
        let prefix = [
            "--detect-local-mode",
            "InterfaceNamePrefix",
            "--pod-interface-name-prefix",
        ];
        assert_eq!(
            pods(&[&bridge[..], &["cni0"]].concat()),
            Ok(PodDetection::Bridge("cni0".to_owned()))
        );
        let veth = PodDetection::InterfacePrefix("veth".to_owned());
        assert_eq!(pods(&[&prefix[..], &["veth"]].concat()), Ok(veth));
        for (mode, bad) in [
            (bridge, ""),
            (prefix, ""),
            (bridge, "a/b"),
            (prefix, "abcdefghijklmnop"),
        ] {
            let text = pods(&[&mode[..], &[bad]].concat()).unwrap_err();
            assert!(text.starts_with(&format!("{} {bad:?}: ", mode[2])), "{text}");
        }
        assert!(pods(&["--detect-local-mode", "BridgeInterface"]).is_err());
        assert!(pods(&["--detect-local-mode", "clustercidr"]).is_err());
    }

    #[test]
    fn gates_are_read() {
        let gate = |text: &str| config(&["--feature-gates", text]).map(|config| config.gates.service_external_ips);
        assert_eq!(gate("AllowServiceExternalIPs=false,Other=true"), Ok(false), "S100");
        let text = gate("AllowServiceExternalIPs").unwrap_err();
        assert!(
            text.starts_with("--feature-gates \"AllowServiceExternalIPs\": "),
            "{text}"
        );
    }

    #[test]
    fn bind_addresses() {
        assert_eq!(bind_address("--x", ""), Ok(None));
        assert_eq!(bind_address("--x", "[::]:1"), Ok(Some("[::]:1".parse().unwrap())));
        assert!(bind_address("--x", "localhost:1").is_err());
        assert!(bind_address("--x", "0.0.0.0").is_err());
    }

    #[test]
    fn names_are_lower_case() {
        assert_eq!(node_name(" Node-A\n").unwrap(), "node-a");
        assert!(!node_name("").unwrap().is_empty());
    }
}
