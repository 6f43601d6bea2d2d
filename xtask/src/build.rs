//! `build-ebpf` and `build`: the object with the programs, then the agent that carries it.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::setup;
use crate::shell::{self, step};

const TARGET: &str = "bpfel-unknown-none";

/// The folder of host builds, below the home directory unless the user chose another.
pub(crate) fn target_dir() -> Result<PathBuf> {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => std::path::absolute(dir).context("CARGO_TARGET_DIR"),
        None => Ok(shell::cache()?.join("target")),
    }
}

/// A cargo command in the repository with the shared target folder.
pub(crate) fn cargo() -> Result<Command> {
    let mut command = Command::new("cargo");
    command
        .current_dir(shell::repository())
        .env("CARGO_TARGET_DIR", target_dir()?);
    command.env("EBPF_PROXY_OBJECT", object()?);
    Ok(command)
}

/// cargo, told to build and run a program of the `tests` crate with this profile; what the program is told can be added.
pub(crate) fn tests_program(name: &str, release: bool) -> Result<Command> {
    let mut command = cargo()?;
    command.args(["run", "--quiet", "--locked", "--package", "proxy-tests", "--bin", name]);
    if release {
        command.arg("--release");
    }
    command.arg("--");
    Ok(command)
}

/// Where `build-ebpf` leaves the object, and where the agent's build finds it.
pub(crate) fn object() -> Result<PathBuf> {
    Ok(shell::cache()?.join("ebpf/proxy-ebpf"))
}

/// What tests upgrade to: the feature that gives the maps another layout.
const NEXT: &str = "next-layout";

/// Compiles the programs. The object is only touched when it changes, so that the agent is not rebuilt for nothing.
pub(crate) fn ebpf() -> Result<PathBuf> {
    ebpf_with(None, object()?)
}

fn ebpf_with(feature: Option<&str>, object: PathBuf) -> Result<PathBuf> {
    let toolchain = setup::toolchain()?;
    step(&format!(
        "building the eBPF programs with {} ({})",
        toolchain.name,
        toolchain.rustc.display()
    ));
    let target_dir = shell::cache()?.join("target-bpf");
    shell::run(
        Command::new(&toolchain.cargo)
            .current_dir(shell::repository())
            .args([
                "build",
                "--quiet",
                "--locked",
                "--package",
                "proxy-ebpf",
                "--profile",
                "ebpf",
            ])
            .args(["--target", TARGET, "-Z", "build-std=core"])
            .args(feature.iter().flat_map(|feature| ["--features", feature]))
            .env("CARGO_TARGET_DIR", &target_dir)
            .env("RUSTC", &toolchain.rustc)
            // The target is tier 3, and aya-ebpf uses unstable features: both need what only nightly allows otherwise.
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &toolchain.linker)
            .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_RUSTFLAGS", "-Clink-arg=--btf")
            .env_remove("RUSTFLAGS")
            .env_remove("RUSTUP_TOOLCHAIN"),
    )?;
    let built = target_dir.join(TARGET).join("ebpf/proxy-ebpf");
    let fresh = std::fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
    if std::fs::read(&object).ok().as_ref() != Some(&fresh) {
        std::fs::create_dir_all(object.parent().context("object path")?)?;
        std::fs::write(&object, &fresh).with_context(|| format!("cannot write {}", object.display()))?;
    }
    eprintln!("    {} ({} KiB)", object.display(), fresh.len() / 1024);
    Ok(object)
}

/// Compiles the agent with the programs inside; returns the executable.
pub(crate) fn agent(release: bool) -> Result<PathBuf> {
    ebpf()?;
    step("building the agent");
    let mut command = cargo()?;
    command.args(["build", "--quiet", "--locked", "--package", "proxy-agent"]);
    if release {
        command.arg("--release");
    }
    shell::run(&mut command)?;
    Ok(target_dir()?
        .join(if release { "release" } else { "debug" })
        .join("proxy-agent"))
}

/// Compiles an agent whose maps have another layout, for the tests of upgrades. To be called before [`agent`]: cargo puts both in the
/// same place. All they depend on is shared.
pub(crate) fn next_agent() -> Result<PathBuf> {
    let object = ebpf_with(Some(NEXT), shell::cache()?.join("ebpf/proxy-ebpf-next"))?;
    step("building an agent with another layout of maps");
    shell::run(
        cargo()?
            .args([
                "build",
                "--quiet",
                "--locked",
                "--package",
                "proxy-agent",
                "--features",
                NEXT,
            ])
            .env("EBPF_PROXY_OBJECT", object),
    )?;
    let [built, kept] =
        ["proxy-agent", "proxy-agent-next"].map(|name| target_dir().map(|dir| dir.join("debug").join(name)));
    let (built, kept) = (built?, kept?);
    // Copied, not linked: cargo writes into the file that it has put there.
    std::fs::copy(&built, &kept).with_context(|| format!("cannot copy {}", built.display()))?;
    Ok(kept)
}
