//! Names and default capacities of the maps, and the layout version in the pin path. The programs declare the maps with these,
//! the agent opens them with these; at most 15 characters, the kernel cuts the rest.

/// Bumped whenever a key or value layout changes; the last part of the pin directory's path (`<bpf-dir>/v<LAYOUT_VERSION>`).
pub const LAYOUT_VERSION: u32 = if cfg!(feature = "next-layout") { 2 } else { 1 };

/// Frontends per family: 10,000 services with a few ports and addresses each.
pub const FRONTENDS_CAPACITY: usize = 65_536;
/// Backend slots per family: 250,000 endpoints, and room to write a changed service's range beside the old one.
pub const BACKENDS_CAPACITY: usize = 524_288;
/// Rewrite entries per family: 131,072 connections that are not masqueraded.
pub const REWRITES_CAPACITY: usize = 262_144;
/// Fragmented packets under way, per family.
pub const FRAGMENTS_CAPACITY: usize = 8_192;
/// Clients with session affinity, per family.
pub const AFFINITY_CAPACITY: usize = 65_536;
/// Source ranges, per family.
pub const SRC_RANGES_CAPACITY: usize = 65_536;
/// Service ports.
pub const SERVICES_CAPACITY: usize = 65_536;
/// Service ports whose traffic is counted. Less than there may be: every slot takes room on every CPU.
pub const COUNTERS_CAPACITY: usize = 16_384;
/// Flows that XDP remembers for a moment, on every CPU and per family; a power of two.
pub const PATHS_CAPACITY: usize = 4_096;
/// Interfaces.
pub const LINKS_CAPACITY: usize = 4_096;
/// Bytes of the ring buffer for events, a power of two: two thousand events that nobody has read yet.
pub const EVENTS_CAPACITY: usize = 256 * 1024;
/// Pods that keep the socket hooks off, and one entry that says whether there are any: many times what a node runs.
pub const SOCKET_OPT_OUT_CAPACITY: usize = 4_096;
/// Local addresses per family.
pub const NODE_ADDRS_CAPACITY: usize = 4_096;

/// `FRONTENDS4`, `FRONTENDS6`: [`crate::frontend::FrontendKey`] → [`crate::frontend::Frontend`].
pub const FRONTENDS: [&str; 2] = ["FRONTENDS4", "FRONTENDS6"];
/// `BACKENDS4`, `BACKENDS6`: index → [`crate::backend::Backend`].
pub const BACKENDS: [&str; 2] = ["BACKENDS4", "BACKENDS6"];
/// `REWRITES4`, `REWRITES6`: [`crate::rewrite::RewriteKey`] → [`crate::rewrite::Rewrite`].
pub const REWRITES: [&str; 2] = ["REWRITES4", "REWRITES6"];
/// `NODE_ADDRS4`, `NODE_ADDRS6`: address → [`crate::link::NodeAddr`].
pub const NODE_ADDRS: [&str; 2] = ["NODE_ADDRS4", "NODE_ADDRS6"];
/// `AFFINITY4`, `AFFINITY6`: [`crate::affinity::AffinityKey`] → [`crate::affinity::Affinity`].
pub const AFFINITY: [&str; 2] = ["AFFINITY4", "AFFINITY6"];
/// `SRC_RANGES4`, `SRC_RANGES6`: prefix trie of [`crate::source_range::SourceRangeKey`] → `u32`, always 1.
pub const SRC_RANGES: [&str; 2] = ["SRC_RANGES4", "SRC_RANGES6"];
/// `FRAGMENTS4`, `FRAGMENTS6`: [`crate::fragment::FragmentKey`] → [`crate::fragment::Ports`].
pub const FRAGMENTS: [&str; 2] = ["FRAGMENTS4", "FRAGMENTS6"];
/// `SOCKETS4`, `SOCKETS6`: socket → [`crate::socket::SocketFlows`].
pub const SOCKETS: [&str; 2] = ["SOCKETS4", "SOCKETS6"];
/// `SETTINGS4`, `SETTINGS6`: one [`crate::settings::Settings`].
pub const SETTINGS: [&str; 2] = ["SETTINGS4", "SETTINGS6"];
/// `CLUSTER_IPS4`, `CLUSTER_IPS6`: service id → [`crate::frontend::FrontendKey`] of its cluster IP.
pub const CLUSTER_IPS: [&str; 2] = ["CLUSTER_IPS4", "CLUSTER_IPS6"];
/// `PATHS4`, `PATHS6`: what XDP found out about a flow a moment ago, per CPU. Not pinned: nobody else reads it.
pub const PATHS: [&str; 2] = ["PATHS4", "PATHS6"];
/// ifindex → [`crate::link::Link`].
pub const LINKS: &str = "LINKS";
/// service id → [`crate::service::ServiceInfo`].
pub const SERVICES: &str = "SERVICES";
/// [`crate::reason::Reason`] → count, per CPU.
pub const REASONS: &str = "REASONS";
/// service id → [`crate::counters::Counters`], per CPU.
pub const COUNTERS: &str = "COUNTERS";
/// One [`crate::trace::Trace`].
pub const TRACE: &str = "TRACE";
/// Id of a pod's cgroup → `u32`, always 1: its sockets are left to the packet programs. [`crate::socket::ANY_OPTED_OUT`] stands for
/// all of them.
pub const SOCKET_OPT_OUT: &str = "SOCKET_OPT_OUT";
/// Ring buffer of [`crate::trace::Event`]s.
pub const EVENTS: &str = "EVENTS";

/// A family's part of a pair.
#[inline(always)]
pub fn of_family<A: crate::addr::Address, T: Copy>([v4, v6]: [T; 2]) -> T {
    if A::FAMILY == 4 { v4 } else { v6 }
}
/// Pinned beside the others, for the agent alone: what their keys and values consist of. See `docs/architecture.md`, "Upgrades".
pub const LAYOUTS: &str = "LAYOUTS";

/// Name of one of the family pairs above for a family.
pub const fn for_family<A: crate::addr::Address>(pair: [&'static str; 2]) -> &'static str {
    if A::FAMILY == 4 { pair[0] } else { pair[1] }
}

/// tc programs: interfaces with an Ethernet header, and those without.
pub const TC_INGRESS: &str = "tc_ingress";
/// See [`TC_INGRESS`].
pub const TC_EGRESS: &str = "tc_egress";
/// See [`TC_INGRESS`].
pub const TC_INGRESS_L3: &str = "tc_ingress_l3";
/// See [`TC_INGRESS`].
pub const TC_EGRESS_L3: &str = "tc_egress_l3";

/// XDP program.
pub const XDP_FORWARD: &str = "xdp_forward";

/// The cgroup socket programs.
pub const SOCKET_PROGRAMS: [&str; 8] = [
    "connect4",
    "connect6",
    "sendmsg4",
    "sendmsg6",
    "recvmsg4",
    "recvmsg6",
    "getpeername4",
    "getpeername6",
];
