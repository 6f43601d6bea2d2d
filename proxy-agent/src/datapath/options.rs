//! What the datapath is told at start. Made by `run` from validated arguments; nothing here reads arguments or the environment.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use proxy_common::names;
use regex::Regex;

/// Everything [`super::Datapath::open`] needs to know.
#[derive(Clone, Debug)]
pub struct Options {
    /// Directory on a BPF file system for everything pinned; one agent each.
    pub bpf_dir: PathBuf,
    /// Root of the cgroup whose sockets are translated; the first cgroup2 mount if not given.
    pub cgroup: Option<PathBuf>,
    /// Whose sockets are translated.
    pub socket_lb: SocketLb,
    /// Addresses of pods, at most one prefix per family (S114 ClusterCIDR).
    pub pod_cidrs: Vec<ipnet::IpNet>,
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
    /// How long silent connections are remembered.
    pub timeouts: Timeouts,
}

/// Which of the node's addresses serve node ports (S81).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum NodePortAddresses {
    /// All of them, whenever they appear (S85).
    #[default]
    All,
    /// The Node object's address of each family; all of them in a family in which it has none (S84).
    Primary,
    /// Those in a prefix; all of them in a family of which there is no prefix (S82).
    Prefixes(Vec<ipnet::IpNet>),
}

impl NodePortAddresses {
    /// Does a local address serve node ports, on a node with these addresses in its Node object?
    pub fn accepts(&self, ip: IpAddr, node_ips: &[IpAddr]) -> bool {
        !self.is_restricted(ip.is_ipv4(), node_ips)
            || match self {
                Self::All => true,
                Self::Primary => !ip.is_loopback() && node_ips.contains(&ip),
                Self::Prefixes(prefixes) => prefixes.iter().any(|prefix| prefix.contains(&ip)),
            }
    }

    /// Do only some of a family's addresses serve them?
    pub fn is_restricted(&self, is_v4: bool, node_ips: &[IpAddr]) -> bool {
        match self {
            Self::All => false,
            Self::Primary => node_ips.iter().any(|ip| ip.is_ipv4() == is_v4 && !ip.is_loopback()),
            Self::Prefixes(prefixes) => prefixes.iter().any(|prefix| prefix.addr().is_ipv4() == is_v4),
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
    fn node_ports_are_served_on_chosen_addresses() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let node = [ip("192.0.2.1"), ip("fd00::1")];
        let prefixes = NodePortAddresses::Prefixes(vec!["192.0.2.0/25".parse().unwrap()]);
        for (choice, text, expected) in [
            (&NodePortAddresses::All, "198.51.100.1", true),
            (&NodePortAddresses::Primary, "192.0.2.1", true),
            (&NodePortAddresses::Primary, "192.0.2.2", false),
            (&NodePortAddresses::Primary, "fd00::2", false),
            (&prefixes, "192.0.2.127", true),
            (&prefixes, "192.0.2.128", false),
            (&prefixes, "fd00::2", true),
        ] {
            assert_eq!(
                choice.accepts(ip(text), &node),
                expected,
                "S81, S82, S84: {choice:?} {text}"
            );
        }
        assert!(!NodePortAddresses::Primary.is_restricted(true, &node[1..]), "S84");
        assert!(!prefixes.is_restricted(false, &node), "S82");
        assert!(
            NodePortAddresses::Primary.accepts(ip("192.0.2.9"), &[ip("127.0.0.1"), node[1]]),
            "S84"
        );
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
