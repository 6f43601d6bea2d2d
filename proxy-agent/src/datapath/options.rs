//! What the datapath is told at start. Made by `run` from validated arguments; nothing here reads arguments or the environment.

use std::path::PathBuf;

use proxy_common::names;
use regex::Regex;

use super::error::DatapathError;
pub use super::node_port_addresses::NodePortAddresses;

/// Everything [`super::Datapath::open`] needs to know.
#[derive(Clone, Debug)]
pub struct Options {
    /// Directory on a BPF file system for everything pinned; one agent each.
    pub bpf_dir: PathBuf,
    /// Root of the cgroup whose sockets are translated; the first cgroup2 mount if not given.
    pub cgroup: Option<PathBuf>,
    /// Whose sockets are translated.
    pub socket_lb: SocketLb,
    /// How pods are told from others.
    pub pods: PodDetection,
    /// Which interfaces carry the packet programs.
    pub interfaces: InterfaceFilter,
    /// Which local addresses serve node ports.
    pub node_port_addresses: NodePortAddresses,
    /// Every connection to a cluster IP is masqueraded (S111).
    pub masquerade_all: bool,
    /// How the packet programs are attached.
    pub attach: AttachMode,
    /// What the programs say; [`BpfLogLevel::Off`] prunes every statement at load.
    pub log_level: BpfLogLevel,
    /// Sizes of the maps when they are made.
    pub capacities: Capacities,
}

/// How the address of a pod is told from others (S114).
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PodDetection {
    /// It is in a prefix of the cluster, at most one per family; nobody is a pod in a family without (S115).
    ClusterCidr(Vec<ipnet::IpNet>),
    /// It is in a prefix of the Node object.
    NodeCidr,
    /// It comes over the bridge of this name.
    Bridge(String),
    /// It comes over an interface whose name begins so.
    InterfacePrefix(String),
}

impl PodDetection {
    /// The prefixes of pods in the whole cluster; an error for the modes that tell pods otherwise.
    pub(super) fn cluster_cidrs(&self) -> Result<&[ipnet::IpNet], DatapathError> {
        let mode = match self {
            Self::ClusterCidr(cidrs) => return Ok(cidrs),
            Self::NodeCidr => "NodeCIDR",
            Self::Bridge(_) => "BridgeInterface",
            Self::InterfacePrefix(_) => "InterfaceNamePrefix",
        };
        Err(DatapathError::Missing {
            what: format!("support for --detect-local-mode {mode}"),
            remedy: "use ClusterCIDR, with --cluster-cidr".to_owned(),
        })
    }
}

/// Whose sockets are translated at connect and send time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum SocketLb {
    /// Those of the host network namespace.
    #[default]
    Host,
    /// Pods' TCP sockets as well.
    All,
    /// None: everything goes through the packet programs.
    Off,
}

/// How the packet programs are attached to interfaces.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum AttachMode {
    /// tcx links if the kernel has them (6.6), otherwise classic filters.
    #[default]
    Auto,
    /// tcx links, or an error.
    Tcx,
    /// Filters of a clsact qdisc.
    Classic,
}

/// What the programs may say through aya-log; the numbers are aya-log's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
#[repr(u8)]
pub enum BpfLogLevel {
    /// Nothing, at no cost.
    #[default]
    Off = 0,
    /// Errors.
    Error = 1,
    /// Warnings.
    Warn = 2,
    /// New connections and refusals.
    Info = 3,
    /// Decisions.
    Debug = 4,
    /// Packets.
    Trace = 5,
}

/// Sizes of the maps that can be chosen. A map that is pinned already keeps its size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capacities {
    /// Frontends per family.
    pub frontends: u32,
    /// Backend slots per family.
    pub backends: u32,
    /// Rewrite entries per family.
    pub rewrites: u32,
    /// Service ports.
    pub services: u32,
}

impl Default for Capacities {
    fn default() -> Self {
        Self {
            frontends: names::FRONTENDS_CAPACITY as u32,
            backends: names::BACKENDS_CAPACITY as u32,
            rewrites: names::REWRITES_CAPACITY as u32,
            services: names::SERVICES_CAPACITY as u32,
        }
    }
}

/// Which interfaces carry the packet programs: every one but loopback whose whole name matches `include` (if there is one) and
/// does not match `exclude` as a whole.
#[derive(Clone, Debug, Default)]
pub struct InterfaceFilter {
    include: Option<Regex>,
    exclude: Option<Regex>,
}

impl InterfaceFilter {
    /// A filter from two regular expressions, each of which has to match a whole interface name: `eth` is not `eth0`, `eth.*` is.
    pub fn new(include: Option<&str>, exclude: Option<&str>) -> Result<Self, regex::Error> {
        let whole = |pattern: Option<&str>| {
            pattern
                .map(|pattern| {
                    // Compiled alone first: `a)(b` must not become valid by being wrapped.
                    Regex::new(pattern)?;
                    Regex::new(&format!("^(?:{pattern})$"))
                })
                .transpose()
        };
        Ok(Self {
            include: whole(include)?,
            exclude: whole(exclude)?,
        })
    }

    /// May the interface of this name carry the programs?
    pub fn accepts(&self, name: &str) -> bool {
        self.include.as_ref().is_none_or(|include| include.is_match(name))
            && !self.exclude.as_ref().is_some_and(|exclude| exclude.is_match(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detection_that_is_not_there_is_refused() {
        let cidrs = vec!["10.244.0.0/16".parse().unwrap()];
        let pods = PodDetection::ClusterCidr(cidrs.clone());
        assert_eq!(pods.cluster_cidrs().unwrap(), cidrs);
        let bridge = PodDetection::Bridge("cni0".to_owned())
            .cluster_cidrs()
            .unwrap_err()
            .to_string();
        assert!(bridge.contains("--detect-local-mode BridgeInterface"), "{bridge}");
    }

    #[test]
    fn names_match_as_a_whole() {
        let filter = InterfaceFilter::new(Some("eth0|veth.*"), Some("veth9")).unwrap();
        assert!(filter.accepts("eth0"));
        assert!(!filter.accepts("eth01"));
        assert!(filter.accepts("veth1"));
        assert!(!filter.accepts("veth9"));
        assert!(filter.accepts("veth99"));
        assert!(InterfaceFilter::default().accepts("anything"));
        assert!(InterfaceFilter::new(Some("a)(b"), None).is_err());
    }
}
