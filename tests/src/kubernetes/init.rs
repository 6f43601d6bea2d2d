//! A node from inside: the first process of its PID namespace, with mounts of its own. It starts containerd, gives it the images,
//! starts the kubelet, and buries whoever loses its parent. Started by [`super::Machine`], in the node's network namespace, through
//! the hidden `init` of the `cluster` program; whatever it mounts and starts ends with it.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use serde::{Deserialize, Serialize};

use super::cgroups::entrance;
use super::files::CONTAINERD_SOCKET;
use crate::{leftovers, process};

const START: Duration = Duration::from_secs(180);
/// Where pods find the node's part of the cgroup2 hierarchy, as if that were all there is.
pub const CGROUP: &str = "/run/cgroup2";
/// The kubelet's cgroup below the node's, and the name of its log.
pub(crate) const KUBELET: &str = "kubelet";
/// Kernel settings that a kubelet writes, with the values it wants. They belong to the whole machine, which is not its own here:
/// it gets files in their place.
const SYSCTLS: &[(&str, &str)] = &[
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// What init has to know.
#[derive(Serialize, Deserialize)]
pub struct Plan {
    pub(crate) node: String,
    /// Of both families, with a comma between.
    pub(crate) addresses: String,
    /// The node's folder, with `run`, `lib`, `log`, `sysctls` and the configuration files.
    pub(crate) dir: PathBuf,
    /// Its directory in the cgroup2 hierarchy.
    pub(crate) cgroup: PathBuf,
    /// Its path below the root of every hierarchy.
    pub(crate) cgroup_name: String,
    pub(crate) kubeconfig: PathBuf,
    pub(crate) containerd: PathBuf,
    pub(crate) ctr: PathBuf,
    pub(crate) kubelet: PathBuf,
    pub(crate) images: Vec<PathBuf>,
}

impl Plan {
    pub(crate) fn kubelet_arguments(&self) -> Vec<OsString> {
        let (config, kubeconfig) = (self.dir.join("kubelet.json"), &self.kubeconfig);
        let paths: [OsString; 4] = [
            "--config".into(),
            config.into(),
            "--kubeconfig".into(),
            kubeconfig.into(),
        ];
        let names = ["--hostname-override", &self.node, "--node-ip", &self.addresses].map(OsString::from);
        paths.into_iter().chain(names).collect()
    }
}

/// Does not return unless something fails.
pub fn run(plan: &Path) -> Result<()> {
    let plan: Plan = serde_json::from_slice(&fs::read(plan).with_context(|| format!("reading {}", plan.display()))?)?;
    ensure!(
        std::process::id() == 1,
        "this is for the first process of a PID namespace"
    );
    enter_cgroups(&plan)?;
    mount_all(&plan)?;
    start_containerd(&plan)?;
    start_kubelet(&plan)?;
    loop {
        match nix::sys::wait::wait() {
            Ok(status) => eprintln!("{status:?}"),
            Err(Errno::EINTR) => {}
            Err(Errno::ECHILD) => std::thread::sleep(Duration::from_secs(1)),
            Err(error) => return Err(error).context("waiting for children"),
        }
    }
}

/// In the hierarchies of the first version all are beside one another; in the second nobody may be where there are children.
fn enter_cgroups(plan: &Plan) -> Result<()> {
    for (kind, mount) in leftovers::cgroup_mounts() {
        let dir = mount.join(plan.cgroup_name.trim_start_matches('/'));
        let child = if kind == "cgroup2" { "init" } else { "" };
        entrance(&dir, child)
            .and_then(|mut enter| enter())
            .with_context(|| format!("entering {}", dir.display()))?;
    }
    Ok(())
}

fn mount_all(plan: &Plan) -> Result<()> {
    mount_new("proc", Path::new("/proc"))?;
    for (name, target) in [("run", "/run"), ("lib", "/var/lib"), ("log", "/var/log")] {
        bind(&plan.dir.join(name), Path::new(target))?;
    }
    mount_new("bpf", Path::new("/sys/fs/bpf"))?;
    fs::create_dir(CGROUP)?;
    bind(&plan.cgroup, Path::new(CGROUP))?;
    for (number, (name, value)) in SYSCTLS.iter().enumerate() {
        let (file, target) = (
            plan.dir.join("sysctls").join(number.to_string()),
            Path::new("/proc/sys").join(name),
        );
        if target.exists() {
            fs::write(&file, value)?;
            bind(&file, &target)?;
        }
    }
    // Mounts that pods make reach the node, as they do on a machine that systemd started.
    let shared = MsFlags::MS_REC | MsFlags::MS_SHARED;
    mount(None::<&str>, "/", None::<&str>, shared, None::<&str>).context("sharing mounts with pods")
}

fn mount_new(kind: &str, target: &Path) -> Result<()> {
    mount(Some(kind), target, Some(kind), MsFlags::empty(), None::<&str>)
        .with_context(|| format!("mounting {kind} on {}", target.display()))
}

fn bind(source: &Path, target: &Path) -> Result<()> {
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("mounting {} on {}", source.display(), target.display()))
}

fn start_containerd(plan: &Plan) -> Result<()> {
    let mut command = Command::new(&plan.containerd);
    command.arg("--config").arg(plan.dir.join("containerd.toml"));
    // Its shim lies beside it.
    let beside = plan.containerd.parent().map(Path::as_os_str).unwrap_or_default();
    let mut path = beside.to_owned();
    path.push(":/usr/sbin:/usr/bin:/sbin:/bin");
    command.env("PATH", path);
    spawn(command, plan, "containerd")?;
    let ctr = || {
        let mut command = Command::new(&plan.ctr);
        command.args(["--address", CONTAINERD_SOCKET, "--namespace", "k8s.io"]);
        command
    };
    process::wait_until(START, || process::run(ctr().args(["images", "list", "--quiet"])).ok())
        .context("containerd does not come up")?;
    for image in &plan.images {
        process::run(ctr().args(["images", "import", "--local"]).arg(image))?;
    }
    Ok(())
}

fn start_kubelet(plan: &Plan) -> Result<()> {
    let mut command = Command::new(&plan.kubelet);
    command.args(plan.kubelet_arguments());
    spawn(command, plan, KUBELET).map(drop)
}

/// Starts a daemon in a cgroup of its own, by which it can be ended.
fn spawn(mut command: Command, plan: &Plan, name: &str) -> Result<Child> {
    let log = File::create(plan.dir.join(format!("{name}.log")))?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let enter = entrance(&plan.cgroup, name)?;
    // SAFETY: what runs there is a write to an open file.
    unsafe { command.pre_exec(enter) };
    command
        .spawn()
        .with_context(|| format!("starting {}", command.get_program().display()))
}
