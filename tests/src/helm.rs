//! The real helm, which renders and checks the chart. Used by the tests of what users install.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::{leftovers, process};

/// Version that `cargo xtask setup` builds; `tests/helm/go.mod` names the same.
const HELM: &str = "helm-4.3.1";

/// Where set-up leaves it.
pub fn program() -> Result<PathBuf> {
    let cache = PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/ebpf-proxy");
    let program = Some(cache.join(HELM).join("helm")).filter(|file| file.is_file());
    program.context("helm is missing: run `cargo xtask setup` (it needs Go)")
}

/// Runs helm with homes of its own, so that nothing of the user's plays a part.
pub fn helm(args: &[&str]) -> Result<String> {
    let home = leftovers::temp_dir("helm")?;
    let mut command = Command::new(program()?);
    for name in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
        command.env(name, home.path());
    }
    process::run(command.args(args))
}

/// A file of the folder `deploy`.
pub fn deploy(path: &str) -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(path);
    file.display().to_string()
}

/// The chart as it comes out for namespace kube-system, with further arguments.
pub fn render(args: &[&str]) -> Result<String> {
    let chart = deploy("chart/ebpf-proxy");
    helm(&[&["template", "ebpf-proxy", &chart, "--namespace", "kube-system"], args].concat())
}
