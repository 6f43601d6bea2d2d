//! `image`: the agent as a static program, alone in a container image that is written as a file. No registry and no daemon takes
//! part; `docker load` and `ctr images import` read the file. What the file looks like is [`oci`]'s business.

mod oci;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::shell::{self, step};
use crate::{build, setup};

/// What the README promises.
const LARGEST: u64 = 25 << 20;
/// The name that the manifests use.
const NAME: &str = "ebpf-proxy/proxy-agent";

/// Arguments of `image`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Processor to build for; more than once for more images. Default: this machine's.
    #[arg(long, value_enum)]
    arch: Vec<Arch>,
    /// Where the images are written. Default: `images` below the build cache.
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

/// A processor, by the name its users know.
#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
enum Arch {
    Amd64,
    Arm64,
}

impl Arch {
    fn host() -> Result<Self> {
        match std::env::consts::ARCH {
            "x86_64" => Ok(Self::Amd64),
            "aarch64" => Ok(Self::Arm64),
            other => bail!("there are no images for {other}: choose one with --arch"),
        }
    }

    /// As OCI has it.
    fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    fn target(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-unknown-linux-musl",
            Self::Arm64 => "aarch64-unknown-linux-musl",
        }
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let archs = if args.arch.is_empty() {
        vec![Arch::host()?]
    } else {
        args.arch.clone()
    };
    build::ebpf()?;
    for arch in archs {
        let path = write(arch, args.output.as_deref())?;
        println!("{}", path.display());
    }
    Ok(())
}

/// The image of this machine's processor, for the tests.
pub(crate) fn for_tests() -> Result<PathBuf> {
    write(Arch::host()?, None)
}

fn write(arch: Arch, output: Option<&Path>) -> Result<PathBuf> {
    let program = static_agent(arch)?;
    let dir = match output {
        Some(dir) => dir.to_owned(),
        None => shell::cache()?.join("images"),
    };
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let version = env!("CARGO_PKG_VERSION");
    let path = dir.join(format!("proxy-agent-{version}-{}.tar", arch.name()));
    step(&format!("writing the image {NAME}:{version} for {}", arch.name()));
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let mut files = vec![oci::File {
        path: "proxy-agent".to_owned(),
        mode: 0o755,
        bytes: read(&program)?,
    }];
    for licence in ["LICENSE-APACHE", "LICENSE-MIT", "LICENSE-GPL2"] {
        files.push(oci::File {
            path: format!("licenses/{licence}"),
            mode: 0o644,
            bytes: read(&shell::repository().join(licence))?,
        });
    }
    let unpacked: usize = files.iter().map(|file| file.bytes.len()).sum();
    if unpacked as u64 >= LARGEST {
        bail!(
            "the image has {unpacked} bytes, and is to stay below {LARGEST}: look at what the agent's binary has grown by"
        );
    }
    let image = oci::image(
        &oci::About {
            name: NAME,
            version,
            arch: arch.name(),
        },
        &files,
    )?;
    fs::write(&path, &image.archive).with_context(|| format!("cannot write {}", path.display()))?;
    eprintln!("    {}", path.display());
    eprintln!("    digest {}", image.digest);
    eprintln!(
        "    {} KiB packed, {} KiB on a node",
        image.archive.len() / 1024,
        unpacked / 1024
    );
    Ok(path)
}

/// Compiles the agent for musl with everything in it, the standard library too: no toolchain with that target is needed.
fn static_agent(arch: Arch) -> Result<PathBuf> {
    let toolchain = setup::toolchain()?;
    let zig = setup::zig()?;
    step(&format!(
        "building the static agent for {} (the first time about six minutes on two cores)",
        arch.target()
    ));
    let target_dir = shell::cache()?.join("target-musl");
    let path = toolchain.path_with_it_first()?;
    shell::run(
        Command::new(&zig.cargo_zigbuild)
            .current_dir(shell::repository())
            .args([
                "zigbuild",
                "--quiet",
                "--locked",
                "--release",
                "--package",
                "proxy-agent",
            ])
            .args(["--target", arch.target(), "-Z", "build-std=std,panic_abort"])
            .env("PATH", path)
            .env("RUSTC", &toolchain.rustc)
            .env("CARGO", &toolchain.cargo)
            // build-std is unstable, and there is no other way to a library for musl where rustup is not.
            .env("RUSTC_BOOTSTRAP", "1")
            // The start files of musl come from zig.
            .env("RUSTFLAGS", "-Clink-self-contained=no")
            .env("CARGO_TARGET_DIR", &target_dir)
            .env("CARGO_ZIGBUILD_ZIG_PATH", &zig.zig)
            .env("EBPF_PROXY_OBJECT", build::object()?)
            .env_remove("RUSTUP_TOOLCHAIN"),
    )?;
    Ok(target_dir.join(arch.target()).join("release/proxy-agent"))
}
