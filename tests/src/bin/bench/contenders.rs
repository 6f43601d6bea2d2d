//! Who is measured, and how each is started on a node of its own.

use std::path::Path;
use std::process::Command;
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proxy_tests::agent::{self, Agent, Source};
use proxy_tests::kube_proxy::{KubeProxy, Mode};
use proxy_tests::netns::Netns;
use proxy_tests::results::contender;
use proxy_tests::topology::{CLUSTER_CIDR, Host};

/// The interface to other machines.
pub(crate) const UPLINK: &str = "eth0";

/// Who.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Direct,
    Socket,
    Tc,
    Xdp,
    Nftables,
    Iptables,
    XdpSwap,
}

impl Kind {
    /// Everybody that this machine and this agent can run, in the order of the tables.
    pub(crate) fn all() -> Result<Vec<Self>> {
        let all = [
            Self::Direct,
            Self::Socket,
            Self::Tc,
            Self::Xdp,
            Self::Nftables,
            Self::Iptables,
            Self::XdpSwap,
        ];
        let has_xdp = agent_has_option("--xdp-interfaces")?;
        Ok(all.into_iter().filter(|kind| *kind != Self::Xdp || has_xdp).collect())
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Direct => contender::DIRECT,
            Self::Socket => contender::SOCKET,
            Self::Tc => contender::TC,
            Self::Xdp => contender::XDP,
            Self::Nftables => contender::NFTABLES,
            Self::Iptables => contender::IPTABLES,
            Self::XdpSwap => contender::XDP_SWAP,
        }
    }

    /// The client has to dial the pod, because nothing translates.
    pub(crate) fn has_no_proxy(self) -> bool {
        matches!(self, Self::Direct | Self::XdpSwap)
    }
}

fn agent_has_option(option: &str) -> Result<bool> {
    let output = Command::new(agent::binary()?).args(["run", "--help"]).output();
    let output = output.context("asking the agent for its options")?;
    Ok(String::from_utf8_lossy(&output.stdout).contains(option))
}

/// What runs on a node.
pub(crate) enum Proxy {
    None,
    Agent(Box<Agent>),
    KubeProxy(KubeProxy),
}

impl Proxy {
    /// Starts it. Whether it serves already is for the caller to find out.
    pub(crate) fn start(kind: Kind, host: &Host, kubeconfig: &Path) -> Result<Self> {
        let options: &[&str] = match kind {
            Kind::Direct | Kind::XdpSwap => return Ok(Self::None),
            Kind::Nftables => return kube_proxy(host, kubeconfig, Mode::Nftables),
            Kind::Iptables => return kube_proxy(host, kubeconfig, Mode::Iptables),
            Kind::Socket => &["--socket-lb", "all"],
            Kind::Tc => &["--socket-lb", "off"],
            Kind::Xdp => &["--socket-lb", "off", "--xdp-interfaces", UPLINK],
        };
        let options = [&["--cluster-cidr", CLUSTER_CIDR], options].concat();
        let source = Source::Kubeconfig(kubeconfig.to_owned());
        let agent = Agent::start(&host.name, &host.netns, &source, &options)?;
        Ok(Self::Agent(Box::new(agent)))
    }

    /// Runs `body` as a process of a pod on the node, on a thread of its own.
    pub(crate) fn spawn_in_pod<T: Send + 'static>(
        &self,
        pod: &Netns,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        match self {
            Self::Agent(agent) => agent.spawn_in_pod(pod, body),
            _ => pod.spawn(body),
        }
    }

    /// Stops the process where it is, or lets it go on: who is not measured takes no time of the processors.
    pub(crate) fn freeze(&self, frozen: bool) {
        let signal = if frozen { Signal::SIGSTOP } else { Signal::SIGCONT };
        if let Some(pid) = self.pid() {
            let _ = kill(Pid::from_raw(pid as i32), signal);
        }
    }

    /// What it said so far.
    pub(crate) fn log(&self) -> String {
        match self {
            Self::None => String::new(),
            Self::Agent(agent) => agent.log(),
            Self::KubeProxy(proxy) => proxy.log(),
        }
    }

    fn pid(&self) -> Option<u32> {
        match self {
            Self::None => None,
            Self::Agent(agent) => agent.pid(),
            Self::KubeProxy(proxy) => Some(proxy.pid()),
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Whoever is asked to end must be able to hear it.
        self.freeze(false);
    }
}

fn kube_proxy(host: &Host, kubeconfig: &Path, mode: Mode) -> Result<Proxy> {
    Ok(Proxy::KubeProxy(KubeProxy::launch(
        &host.netns,
        &host.name,
        kubeconfig,
        mode,
        &[],
    )?))
}
