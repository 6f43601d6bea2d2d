//! Images without a registry: the agent's as `cargo xtask image` wrote it, and one of a program and the libraries it asks for, packed
//! as `docker save` packs one. Needs GNU tar and `sha256sum`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::process;

/// Name of the image with the `cluster` program: what pods run for tests, and what keeps a pod's namespaces (`pause`).
pub const HELPER: &str = "ebpf-proxy/cluster-helper:1";
/// Folder of the programs inside.
const BIN: &str = "usr/bin";

/// What is packed.
pub struct Image {
    name: &'static str,
    program: PathBuf,
    entrypoint: Vec<String>,
}

/// The image that users install: `PROXY_AGENT_IMAGE`, or where `cargo xtask image` leaves it.
pub fn agent_archive() -> Result<PathBuf> {
    let path = match std::env::var_os("PROXY_AGENT_IMAGE") {
        Some(path) => PathBuf::from(path),
        None => {
            let home = PathBuf::from(std::env::var_os("HOME").unwrap_or_default());
            let file = format!("proxy-agent-{}-{}.tar", env!("CARGO_PKG_VERSION"), architecture());
            home.join(".cache/ebpf-proxy/images").join(file)
        }
    };
    ensure!(
        path.is_file(),
        "no image at {}: run `cargo xtask image`",
        path.display()
    );
    Ok(path)
}

/// The image of the `cluster` program.
pub fn helper(program: &Path) -> Result<Image> {
    Ok(Image::new(HELPER, program, "cluster", &["pause"]))
}

impl Image {
    fn new(name: &'static str, program: &Path, called: &str, args: &[&str]) -> Self {
        let entrypoint = [format!("/{BIN}/{called}")]
            .into_iter()
            .chain(args.iter().map(|arg| (*arg).to_owned()));
        Self {
            name,
            program: program.to_owned(),
            entrypoint: entrypoint.collect(),
        }
    }

    /// Packs it in `dir`; gives the archive.
    pub fn write(&self, dir: &Path) -> Result<PathBuf> {
        let label = self.name.replace(['/', ':'], "-");
        let (root, parts) = (dir.join(format!("{label}-root")), dir.join(format!("{label}-parts")));
        fs::create_dir_all(&parts)?;
        let target = root.join(self.entrypoint[0].trim_start_matches('/'));
        copy(&self.program, &target)?;
        for library in libraries(&self.program)? {
            copy(&library, &root.join(library.strip_prefix("/")?))?;
        }
        // Where runc and the manifest mount things.
        for folder in ["proc", "sys", "dev", "etc", "tmp"] {
            fs::create_dir_all(root.join(folder))?;
        }
        let layer = parts.join("layer.tar");
        tar(&root, &layer)?;
        let sum = process::run(Command::new("sha256sum").arg(&layer))?;
        let sum = sum.split_whitespace().next().context("sha256sum says nothing")?;
        let config = json!({
            "architecture": architecture(),
            "os": "linux",
            "config": {"Entrypoint": self.entrypoint, "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{sum}")]},
        });
        let manifest = json!([{"Config": "config.json", "RepoTags": [self.name], "Layers": ["layer.tar"]}]);
        fs::write(parts.join("config.json"), config.to_string())?;
        fs::write(parts.join("manifest.json"), manifest.to_string())?;
        let archive = dir.join(format!("{label}.tar"));
        tar(&parts, &archive)?;
        fs::remove_dir_all(&root)?;
        fs::remove_dir_all(&parts)?;
        Ok(archive)
    }
}

/// This machine's, as images name it.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// What the dynamic linker would load, and itself; nothing for a static program.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("starting ldd")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let words = text
        .split_whitespace()
        .filter(|word| word.starts_with('/') && !word.ends_with(':'));
    Ok(words.map(PathBuf::from).collect())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to.parent().context("a file is in a folder")?)?;
    fs::copy(from, to).with_context(|| format!("copying {} to {}", from.display(), to.display()))?;
    Ok(())
}

fn tar(folder: &Path, archive: &Path) -> Result<()> {
    let mut command = Command::new("tar");
    command.args([
        "--owner=0",
        "--group=0",
        "--numeric-owner",
        "--mtime=@0",
        "--sort=name",
        "--create",
        "--file",
    ]);
    process::run(command.arg(archive).arg("--directory").arg(folder).arg("."))?;
    Ok(())
}
