//! Commands that are built from their Go modules, once: Kubernetes, containerd, Helm and Prometheus. Called by set-up.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::shell::{self, step};

/// What the tests run; the `go.mod` files below `tests` name the same.
const KUBERNETES: &str = "1.36.3";
const CONTAINERD: &str = "2.3.7";
const HELM: &str = "4.3.1";
/// The version of its Go module is 0.316.0.
const PROMETHEUS: &str = "3.16.0";

/// Commands of one module.
pub(crate) struct Commands {
    name: &'static str,
    version: &'static str,
    /// The folder of the repository whose `go.mod` has the module.
    folder: &'static str,
    /// Where the module has its commands.
    package: &'static str,
    commands: Vec<&'static str>,
    linker: String,
    tags: &'static str,
}

/// Commands of Kubernetes.
pub(crate) fn kubernetes(commands: &[&'static str]) -> Commands {
    let (major, minor) = KUBERNETES.split_once('.').unwrap_or((KUBERNETES, ""));
    let minor = minor.split('.').next().unwrap_or_default();
    let version = "-X k8s.io/component-base/version.";
    Commands {
        name: "kubernetes",
        version: KUBERNETES,
        folder: "tests/kubernetes",
        package: "k8s.io/kubernetes/cmd",
        commands: commands.to_vec(),
        linker: format!("{version}gitVersion=v{KUBERNETES} {version}gitMajor={major} {version}gitMinor={minor}"),
        tags: "",
    }
}

/// containerd with what it starts, and its command line. Debian's is too old for this kubelet.
pub(crate) fn containerd() -> Commands {
    Commands {
        name: "containerd",
        version: CONTAINERD,
        folder: "tests/containerd",
        package: "github.com/containerd/containerd/v2/cmd",
        commands: vec!["containerd", "containerd-shim-runc-v2", "ctr"],
        linker: format!("-X github.com/containerd/containerd/v2/version.Version=v{CONTAINERD}"),
        // They need headers of C libraries, and nobody uses them here.
        tags: "no_btrfs no_devmapper no_zfs",
    }
}

/// Helm, for the tests of the chart.
pub(crate) fn helm() -> Commands {
    Commands {
        name: "helm",
        version: HELM,
        folder: "tests/helm",
        package: "helm.sh/helm/v4/cmd",
        commands: vec!["helm"],
        linker: String::new(),
        tags: "",
    }
}

/// Prometheus and promtool, for the tests of the alert rules and the dashboard.
pub(crate) fn prometheus(commands: &[&'static str]) -> Commands {
    Commands {
        name: "prometheus",
        version: PROMETHEUS,
        folder: "tests/prometheus",
        package: "github.com/prometheus/prometheus/cmd",
        commands: commands.to_vec(),
        linker: format!("-X github.com/prometheus/common/version.Version={PROMETHEUS}"),
        // Agents are named one by one, so no cloud's library is needed to find them.
        tags: "remove_all_sd",
    }
}

/// Builds those that are not in the cache.
pub(crate) fn build(what: &Commands) -> Result<()> {
    let bin = shell::cache()?.join(format!("{}-{}", what.name, what.version));
    for command in &what.commands {
        let file = bin.join(command);
        if !file.is_file() {
            build_one(what, command, &file)?;
        }
    }
    Ok(())
}

fn build_one(what: &Commands, command: &str, file: &Path) -> Result<()> {
    if shell::which("go").is_none() {
        bail!("{command} is built from its Go module: install Go 1.26 or newer");
    }
    let version = what.version;
    step(&format!(
        "building {command} {version} from its Go module (a few minutes, once)"
    ));
    shell::run(
        Command::new("go")
            .args(["build", "-trimpath", "-tags", what.tags, "-ldflags"])
            .arg(format!("-s -w {}", what.linker))
            .arg("-o")
            .arg(file)
            .arg(format!("{}/{command}", what.package))
            .env("CGO_ENABLED", "0")
            .current_dir(shell::repository().join(what.folder)),
    )
}
