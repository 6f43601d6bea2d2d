//! The words that options choose from: spelled here once for flags, files and what is written, and turned into what they mean.

use clap::ValueEnum;

use crate::datapath::{AttachMode, BpfLogLevel, SocketLb, XdpMode};

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

/// `--xdp-mode`.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum XdpModeArg {
    /// In drivers that have XDP; where one has none, tc forwards alone.
    Auto,
    /// In the driver; one without XDP is reported as a failure, again and again.
    Native,
    /// Behind the driver, which works everywhere but is hardly faster than tc.
    Generic,
}

impl From<XdpModeArg> for XdpMode {
    fn from(arg: XdpModeArg) -> Self {
        match arg {
            XdpModeArg::Auto => Self::Auto,
            XdpModeArg::Native => Self::Native,
            XdpModeArg::Generic => Self::Generic,
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

/// How a choice is written.
pub(super) fn word(arg: impl ValueEnum) -> Option<String> {
    Some(arg.to_possible_value()?.get_name().to_owned())
}
