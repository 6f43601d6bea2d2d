//! The real kube-proxy, in the network namespace of a node. Used by the tests of the way from it and back to it.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::apiserver::program;
use crate::netns::Netns;
use crate::topology::CLUSTER_CIDR;
use crate::{http, leftovers, process};

/// Not the agent's.
const HEALTHZ: &str = "127.0.0.1:20256";
const METRICS: &str = "127.0.0.1:20249";
const START: Duration = Duration::from_secs(60);

/// How it writes its rules.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Tables of its own.
    Nftables,
    /// iptables over nftables, Debian's usual one.
    Iptables,
    /// iptables with the kernel's old tables.
    LegacyIptables,
}

/// A running kube-proxy. When dropped, it ends and leaves its rules, as a real one does; they go with the namespace.
pub struct KubeProxy {
    child: Child,
    dir: TempDir,
}

impl KubeProxy {
    /// Starts it and waits until it has written its rules for the first time.
    pub fn start(netns: &Netns, node: &str, kubeconfig: &Path, mode: Mode) -> Result<Self> {
        let mut proxy = Self::launch(netns, node, kubeconfig, mode, &[])?;
        let is_up = || {
            netns.run(|| {
                http::get(HEALTHZ.parse().ok()?, "/healthz")
                    .ok()
                    .filter(|answer| answer.status == 200)
            })
        };
        let ready = process::wait_until(START, || {
            let exited = proxy.has_exited();
            (exited || is_up().is_some()).then_some(!exited)
        });
        if ready != Some(true) {
            bail!("kube-proxy does not come up; it says\n{}", proxy.log());
        }
        Ok(proxy)
    }

    /// Starts it with further options and does not wait.
    pub fn launch(netns: &Netns, node: &str, kubeconfig: &Path, mode: Mode, options: &[&str]) -> Result<Self> {
        let dir = leftovers::temp_dir("kube-proxy")?;
        let word = if mode == Mode::Nftables { "nftables" } else { "iptables" };
        let mut command = netns.command(program("kube-proxy")?);
        command.args([
            "--proxy-mode",
            word,
            "--hostname-override",
            node,
            "--cluster-cidr",
            CLUSTER_CIDR,
        ]);
        command.arg("--kubeconfig").arg(kubeconfig);
        command.args(["--healthz-bind-address", HEALTHZ, "--metrics-bind-address", METRICS]);
        // Settings of the whole machine stay as they are.
        command.args([
            "--conntrack-max-per-core",
            "0",
            "--conntrack-tcp-timeout-established",
            "0",
        ]);
        command.args(["--conntrack-tcp-timeout-close-wait", "0"]);
        command.env("PATH", path(dir.path(), mode)?);
        command.args(options);
        let child = process::spawn_logged(command, &dir.path().join("log"))?;
        Ok(Self { child, dir })
    }

    /// Has it ended by itself?
    pub fn has_exited(&mut self) -> bool {
        self.child.try_wait().is_ok_and(|status| status.is_some())
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where its metrics are, within its namespace.
    pub fn metrics_address() -> SocketAddr {
        METRICS.parse().expect("a constant")
    }

    /// What it wrote so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }
}

impl Drop for KubeProxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where it finds `iptables`: a folder with the variant of the mode comes first.
fn path(dir: &Path, mode: Mode) -> Result<String> {
    let variant = match mode {
        Mode::Nftables => None,
        Mode::Iptables => Some("xtables-nft-multi"),
        Mode::LegacyIptables => Some("xtables-legacy-multi"),
    };
    let system = "/usr/sbin:/usr/bin:/sbin:/bin";
    let Some(variant) = variant else {
        return Ok(system.to_owned());
    };
    let program = PathBuf::from("/usr/sbin").join(variant);
    if !program.is_file() {
        bail!("{} is missing: install the Debian package iptables", program.display());
    }
    let bin = dir.join("bin");
    fs::create_dir(&bin)?;
    for name in ["iptables", "ip6tables"] {
        for suffix in ["", "-save", "-restore"] {
            let link = bin.join(format!("{name}{suffix}"));
            symlink(&program, &link).with_context(|| format!("linking {}", link.display()))?;
        }
    }
    Ok(format!("{}:{system}", bin.display()))
}
