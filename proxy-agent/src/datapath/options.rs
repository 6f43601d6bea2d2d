//! What the datapath is told at start. Made by `run` from validated arguments; nothing here reads arguments or the environment.

use std::path::PathBuf;
use std::time::Duration;

use proxy_common::names;
use regex::Regex;

use super::node_port_addresses::NodePortAddresses;
use crate::netlink::{LinkInfo, Network};

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
    /// Where XDP forwards.
    pub xdp: XdpOptions,
    /// What the programs say; [`BpfLogLevel::Off`] prunes every statement at load.
    pub log_level: BpfLogLevel,
    /// Traffic is counted per service port.
    pub service_metrics: bool,
    /// Sizes of the maps when they are made.
    pub capacities: Capacities,
    /// How long silent connections are remembered.
    pub timeouts: Timeouts,
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
    /// Are pods told by the interface they arrive over?
    pub fn is_by_link(&self) -> bool {
        matches!(self, Self::Bridge(_) | Self::InterfacePrefix(_))
    }

    /// Does what arrives over the interface come from a pod? A port of the bridge is where the programs see it first.
    pub fn is_pod_link(&self, info: &LinkInfo, network: &Network) -> bool {
        match self {
            Self::ClusterCidr(_) | Self::NodeCidr => false,
            Self::Bridge(name) => {
                let bridge = info.controller.and_then(|ifindex| network.links.get(&ifindex));
                info.name == *name || bridge.is_some_and(|bridge| bridge.name == *name)
            }
            Self::InterfacePrefix(prefix) => info.name.starts_with(prefix),
        }
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

/// Which network cards forward at XDP, and where in them.
#[derive(Clone, Debug, Default)]
pub struct XdpOptions {
    /// Those of [`Options::interfaces`] that it accepts too; none if there is no filter.
    pub interfaces: Option<InterfaceFilter>,
    /// Where the program runs.
    pub mode: XdpMode,
}

impl XdpOptions {
    /// Does this interface, which carries the packet programs, get the XDP program? Ones without an Ethernet header do not.
    pub(crate) fn accepts(&self, info: &LinkInfo) -> bool {
        info.has_ethernet && self.interfaces.as_ref().is_some_and(|filter| filter.accepts_link(info))
    }
}

/// Where the XDP program runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum XdpMode {
    /// In the driver; without XDP where that has none.
    #[default]
    Auto,
    /// In the driver; where that has none it is a failure.
    Native,
    /// In the kernel's common code, behind the driver: for trials, hardly faster than tc.
    Generic,
}

impl XdpMode {
    /// `native` or `generic`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto | Self::Native => "native",
            Self::Generic => "generic",
        }
    }
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
    /// Service ports whose traffic is counted.
    pub counters: u32,
}

impl Default for Capacities {
    fn default() -> Self {
        Self {
            frontends: names::FRONTENDS_CAPACITY as u32,
            backends: names::BACKENDS_CAPACITY as u32,
            rewrites: names::REWRITES_CAPACITY as u32,
            services: names::SERVICES_CAPACITY as u32,
            counters: names::COUNTERS_CAPACITY as u32,
        }
    }
}

/// How long connections without packets are remembered, as far as it can be chosen (S151).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timeouts {
    /// Established TCP connections.
    pub tcp_established: Duration,
    /// TCP connections that one side has ended.
    pub tcp_half_closed: Duration,
    /// UDP flows nobody answered.
    pub udp_unanswered: Duration,
    /// UDP flows with answers.
    pub udp_answered: Duration,
}

impl Default for Timeouts {
    /// TCP: kube-proxy's `tcpEstablishedTimeout` and `tcpCloseWaitTimeout`. UDP: nf_conntrack's `udp_timeout`, and its
    /// `udp_timeout_stream` as of Linux 4.x (120 s since): the longer one spares slow name servers' clients.
    fn default() -> Self {
        Self {
            tcp_established: Duration::from_secs(24 * 3_600),
            tcp_half_closed: Duration::from_secs(3_600),
            udp_unanswered: Duration::from_secs(30),
            udp_answered: Duration::from_secs(180),
        }
    }
}

/// What is put around a pattern to make it match a whole name.
const WHOLE: (&str, &str) = ("^(?:", ")$");

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
                    Regex::new(&[WHOLE.0, pattern, WHOLE.1].concat())
                })
                .transpose()
        };
        Ok(Self {
            include: whole(include)?,
            exclude: whole(exclude)?,
        })
    }

    /// What it was made from: which to take, which to leave out.
    pub fn patterns(&self) -> [Option<&str>; 2] {
        [&self.include, &self.exclude]
            .map(|regex| regex.as_ref()?.as_str().strip_prefix(WHOLE.0)?.strip_suffix(WHOLE.1))
    }

    /// Does this interface carry the programs?
    pub(crate) fn accepts_link(&self, info: &LinkInfo) -> bool {
        !info.loopback && self.accepts(&info.name)
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
    fn pods_by_the_interface_they_arrive_over() {
        let link = |name: &str, controller| LinkInfo {
            name: name.to_owned(),
            controller,
            ..LinkInfo::default()
        };
        let mut network = Network::default();
        for (ifindex, info) in [
            (1, link("eth0", None)),
            (2, link("cni0", None)),
            (3, link("veth1", Some(2))),
            (4, link("veth2", None)),
            (5, link("veth3", Some(1))),
        ] {
            network.links.insert(ifindex, info);
        }
        for (pods, expected) in [
            (PodDetection::NodeCidr, &[][..]),
            (PodDetection::Bridge("cni0".to_owned()), &[2, 3]),
            (PodDetection::InterfacePrefix("veth".to_owned()), &[3, 4, 5]),
        ] {
            let found = network
                .links
                .iter()
                .filter(|(_, info)| pods.is_pod_link(info, &network));
            let found: Vec<u32> = found.map(|(ifindex, _)| *ifindex).collect();
            assert_eq!(found, expected, "S114: {pods:?}");
        }
    }

    #[test]
    fn names_match_as_a_whole() {
        let filter = InterfaceFilter::new(Some("eth0|veth.*"), Some("veth9")).unwrap();
        assert!(filter.accepts("eth0"));
        assert!(!filter.accepts("eth01"));
        assert!(filter.accepts("veth1"));
        assert!(!filter.accepts("veth9"));
        assert!(filter.accepts("veth99"));
        assert_eq!(filter.patterns(), [Some("eth0|veth.*"), Some("veth9")]);
        assert!(InterfaceFilter::default().accepts("anything"));
        assert!(InterfaceFilter::new(Some("a)(b"), None).is_err());
    }
}
