//! What has to be on the machine, and how it gets there. Nothing is installed that is there already, and everything that is
//! installed is named first.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::shell::{self, step};

mod go;

/// Version of bpf-linker.
const BPF_LINKER: &str = "0.13.0";
/// Versions on PyPI.
const ZIG: &str = "0.17.1";
const CARGO_ZIGBUILD: &str = "0.24.0";

/// A toolchain that can build for the BPF target.
pub(crate) struct Toolchain {
    /// For people.
    pub(crate) name: String,
    /// The compiler.
    pub(crate) rustc: PathBuf,
    /// The cargo that goes with it.
    pub(crate) cargo: PathBuf,
    /// bpf-linker, built for the compiler's LLVM.
    pub(crate) linker: PathBuf,
}

impl Toolchain {
    /// A PATH on which this toolchain comes first, for tools that look for `cargo` and `rustc` there.
    pub(crate) fn path_with_it_first(&self) -> Result<OsString> {
        let first = self.cargo.parent().map(Path::to_owned);
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::join_paths(first.into_iter().chain(std::env::split_paths(&path))).context("PATH")
    }
}

/// A linker and C compiler for every target, with its libc.
pub(crate) struct Zig {
    /// zig itself.
    pub(crate) zig: PathBuf,
    /// What makes cargo use it.
    pub(crate) cargo_zigbuild: PathBuf,
}

/// A Debian package and the file by which one sees that it is there.
struct Package {
    name: &'static str,
    file: &'static str,
}

const DEBIAN_RUST: &[Package] = &[
    Package {
        name: "rustc-web",
        file: "/usr/bin/rustc",
    },
    Package {
        name: "cargo-web",
        file: "/usr/bin/cargo",
    },
    Package {
        name: "rust-web-src",
        file: "/usr/lib/rustlib/src/rust/library/core/Cargo.toml",
    },
];

const NETWORK: &[Package] = &[
    Package {
        name: "iproute2",
        file: "/usr/sbin/ip",
    },
    Package {
        name: "ethtool",
        file: "/usr/sbin/ethtool",
    },
    Package {
        name: "nftables",
        file: "/usr/sbin/nft",
    },
    Package {
        name: "iptables",
        file: "/usr/sbin/iptables-nft",
    },
    Package {
        name: "bpftool",
        file: "/usr/sbin/bpftool",
    },
];

const ETCD: &[Package] = &[Package {
    name: "etcd-server",
    file: "/usr/bin/etcd",
}];

const CONTAINERS: &[Package] = &[
    Package {
        name: "runc",
        file: "/usr/sbin/runc",
    },
    Package {
        name: "containernetworking-plugins",
        file: "/usr/lib/cni/bridge",
    },
];

/// Everything the tests need.
pub(crate) fn for_tests() -> Result<()> {
    toolchain()?;
    go::build(&go::prometheus(&["prometheus", "promtool"])).context("alert rules and dashboard need Prometheus")?;
    for_cluster()
}

/// What scrapes the demo's agents.
pub(crate) fn prometheus() -> Result<()> {
    go::build(&go::prometheus(&["prometheus"]))
}

/// What the demo and the namespace tests need.
pub(crate) fn for_namespaces() -> Result<()> {
    if !shell::is_root() {
        bail!("this makes network namespaces and loads eBPF programs: run it as root");
    }
    install(NETWORK)?;
    if !std::fs::read_to_string("/proc/mounts")
        .unwrap_or_default()
        .contains(" /sys/fs/bpf bpf ")
    {
        step("mounting the BPF file system on /sys/fs/bpf");
        shell::run(Command::new("mount").args(["-t", "bpf", "bpf", "/sys/fs/bpf"]))?;
    }
    Ok(())
}

/// A toolchain for the BPF target: rustup's with its `rust-src` component, otherwise Debian's, which is installed if needed.
pub(crate) fn toolchain() -> Result<Toolchain> {
    let (name, rustc, cargo) = if let Some(found) = rustup_toolchain() {
        found
    } else {
        install(DEBIAN_RUST).context(
            "the eBPF programs need a Rust compiler with the source of its library; \
             `rustup component add rust-src` gives one as well",
        )?;
        (
            "Debian's rustc".to_owned(),
            PathBuf::from("/usr/bin/rustc"),
            PathBuf::from("/usr/bin/cargo"),
        )
    };
    let linker = bpf_linker(&rustc)?;
    Ok(Toolchain {
        name,
        rustc,
        cargo,
        linker,
    })
}

fn rustup_toolchain() -> Option<(String, PathBuf, PathBuf)> {
    // Run by cargo, RUSTC or the PATH lead to the toolchain that built this program.
    let rustc = shell::output(Command::new("rustup").args(["which", "rustc"])).ok()?;
    let rustc = PathBuf::from(rustc.trim());
    let sysroot = shell::output(Command::new(&rustc).args(["--print", "sysroot"])).ok()?;
    let source = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml");
    source.is_file().then(|| {
        (
            "rustup's rust-src".to_owned(),
            rustc.clone(),
            rustc.with_file_name("cargo"),
        )
    })
}

/// bpf-linker from the cache or the PATH, otherwise built for the LLVM of `rustc`.
fn bpf_linker(rustc: &Path) -> Result<PathBuf> {
    let llvm = llvm_major(rustc)?;
    let root = shell::cache()?.join(format!("bpf-linker-{BPF_LINKER}-llvm-{llvm}"));
    let cached = root.join("bin/bpf-linker");
    if cached.is_file() {
        return Ok(cached);
    }
    let prefix = PathBuf::from(format!("/usr/lib/llvm-{llvm}"));
    if !prefix.join("lib").is_dir() {
        let package = format!("llvm-{llvm}-dev");
        apt(&[package.as_str()])
            .with_context(|| format!("bpf-linker needs LLVM {llvm}, the version of {}", rustc.display()))?;
    }
    step(&format!(
        "building bpf-linker {BPF_LINKER} for LLVM {llvm} (a minute or two, once)"
    ));
    shell::run(
        Command::new("cargo")
            .args(["install", "--locked", "--quiet", "--no-default-features"])
            .args(["--features", &format!("llvm-{llvm}"), "--root"])
            .arg(&root)
            .arg(format!("bpf-linker@{BPF_LINKER}"))
            .env("LLVM_PREFIX", prefix)
            .env_remove("RUSTC")
            .env_remove("RUSTFLAGS")
            .env("CARGO_TARGET_DIR", root.join("target")),
    )?;
    let _only_disk_space = std::fs::remove_dir_all(root.join("target"));
    Ok(cached)
}

fn llvm_major(rustc: &Path) -> Result<u32> {
    let version = shell::output(Command::new(rustc).arg("-vV"))?;
    version
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: ")?.split('.').next()?.parse().ok())
        .with_context(|| format!("{} does not say which LLVM it has", rustc.display()))
}

/// The API server, etcd, kubectl and kube-proxy: from KUBEBUILDER_ASSETS if it is set, otherwise built once with Go, with Debian's etcd.
pub(crate) fn kubernetes() -> Result<()> {
    if std::env::var_os("KUBEBUILDER_ASSETS").is_some() {
        return Ok(());
    }
    install(ETCD)?;
    go::build(&go::kubernetes(&["kube-apiserver", "kubectl", "kube-proxy"])).context(
        "the tests need a Kubernetes API server and kube-proxy; instead of building them you can set KUBEBUILDER_ASSETS to a \
         folder with kube-apiserver, etcd, kubectl and kube-proxy",
    )
}

/// What a whole cluster needs: the control plane, the kubelet, containers, and how the agent gets there: image and chart.
pub(crate) fn for_cluster() -> Result<()> {
    for_namespaces()?;
    install(CONTAINERS)?;
    kubernetes()?;
    go::build(&go::kubernetes(&[
        "kubelet",
        "kube-controller-manager",
        "kube-scheduler",
    ]))?;
    go::build(&go::containerd())?;
    go::build(&go::helm()).context("the chart needs helm")?;
    zig().map(drop)
}

/// zig and cargo-zigbuild, from PyPI into the cache: they build static programs for every processor.
pub(crate) fn zig() -> Result<Zig> {
    let root = shell::cache()?.join(format!("zig-{ZIG}-zigbuild-{CARGO_ZIGBUILD}"));
    let found = Zig {
        zig: root.join("ziglang/zig"),
        cargo_zigbuild: root.join("bin/cargo-zigbuild"),
    };
    // pip moves the scripts there last.
    if found.cargo_zigbuild.is_file() {
        return Ok(found);
    }
    if shell::output(Command::new("python3").args(["-m", "pip", "--version"])).is_err() {
        apt(&["python3-pip"])?;
    }
    step(&format!(
        "installing zig {ZIG} and cargo-zigbuild {CARGO_ZIGBUILD} from PyPI below {} (0.4 GB)",
        root.display()
    ));
    shell::run(
        Command::new("python3")
            .args([
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--upgrade",
                "--disable-pip-version-check",
            ])
            .args(["--root-user-action", "ignore", "--target"])
            .arg(&root)
            .args([format!("ziglang=={ZIG}"), format!("cargo-zigbuild=={CARGO_ZIGBUILD}")]),
    )
    .context("the image needs zig, which makes the agent a static program")?;
    Ok(found)
}

fn install(packages: &[Package]) -> Result<()> {
    let missing: Vec<_> = packages
        .iter()
        .filter(|package| !Path::new(package.file).exists() && shell::which(package.name).is_none())
        .map(|package| package.name)
        .collect();
    if missing.is_empty() { Ok(()) } else { apt(&missing) }
}

fn apt(packages: &[&str]) -> Result<()> {
    let names = packages.join(" ");
    if !shell::is_root() || shell::which("apt-get").is_none() {
        bail!("missing: {names} (names of Debian's packages); install them, or run this as root on Debian");
    }
    step(&format!("installing Debian packages: {names}"));
    let quiet = ["-qq", "-o=Dpkg::Use-Pty=0"];
    shell::run(Command::new("apt-get").args(quiet).arg("update"))?;
    shell::run(
        Command::new("apt-get")
            .args(quiet)
            .args(["install", "-y", "--no-install-recommends"])
            .args(packages)
            .env("DEBIAN_FRONTEND", "noninteractive"),
    )
}
