//! Constants that the agent sets when it loads the programs (`Global<T>` in proxy-ebpf, `override_global` in the agent): the
//! verifier then prunes what is switched off. The names are those of the statics.

/// `u32`: 1 if pods are told from others by the interface they arrive over ([`crate::link::LINK_PODS`]) and not by their address
/// (S114 BridgeInterface, InterfaceNamePrefix).
pub const PODS_BY_LINK: &str = "PODS_BY_LINK";
/// `u64`: cookie of the host network namespace (`SO_NETNS_COOKIE`), to tell the node's own sockets from those of pods.
pub const HOST_NETNS: &str = "HOST_NETNS";
/// `u32`: 1 if pods' TCP sockets are translated too (`--socket-lb all`).
pub const SOCKET_PODS: &str = "SOCKET_PODS";
/// `u32`: 1 if the kernel has `bpf_set_retval` for these hooks (5.18), so that a refused connect says ECONNREFUSED.
pub const HAVE_SET_RETVAL: &str = "HAVE_SET_RETVAL";
/// `u32`: 1 if `bpf_l4_csum_replace` knows `BPF_F_IPV6` (6.16, commit ead7f9b8de65).
pub const HAVE_CSUM_IPV6: &str = "HAVE_CSUM_IPV6";
/// `u32`: 1 if every connection to a cluster IP is masqueraded (S111).
pub const MASQUERADE_ALL: &str = "MASQUERADE_ALL";
/// `u32`: 1 if every service port's traffic is counted (`--service-metrics`).
pub const COUNT_SERVICES: &str = "COUNT_SERVICES";
/// `u32`: first source port for masqueraded connections whose own port is taken.
pub const PORT_FIRST: &str = "PORT_FIRST";
/// `u32`: how many ports from [`PORT_FIRST`] on may be used.
pub const PORT_COUNT: &str = "PORT_COUNT";

/// Default of [`PORT_FIRST`]: clear of `ip_local_port_range` (32768–60999) and of the nodePort range (30000–32767).
pub const DEFAULT_PORT_FIRST: u32 = 61_000;
/// Default of [`PORT_COUNT`].
pub const DEFAULT_PORT_COUNT: u32 = 4_536;
