//! One node, seen from outside: its cgroups, its folder, and the process that is its init. See [`super::init`] for the inside.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use super::cgroups::{Cgroups, entrance};
use super::init::{KUBELET, Plan};
use super::{files, program};
use crate::apiserver::ApiServer;
use crate::netns::Netns;
use crate::topology::Host;
use crate::{leftovers, process};

const START: Duration = Duration::from_secs(30);
/// What init reads.
const PLAN: &str = "plan.json";
/// Lines of a log that an error shows.
const TAIL: usize = 15;

/// A node with a kubelet and a containerd. Its processes, mounts and files go when it is dropped.
pub struct Machine {
    name: String,
    netns: Netns,
    /// `unshare`, whose only child is init; the node ends with it.
    shell: Child,
    init: u32,
    plan: Plan,
    // In this order: cgroups can be removed once their processes are gone.
    cgroups: Cgroups,
    dir: TempDir,
}

impl Machine {
    /// Starts a node on a host of the network; it registers itself when it is up.
    pub(crate) fn start(host: &Host, number: u8, helper: &Path, api: &ApiServer, images: &[&Path]) -> Result<Self> {
        let dir = leftovers::temp_dir(&host.name)?;
        let cgroups = Cgroups::new(&host.name)?;
        let plan = write_files(dir.path(), host, number, &cgroups, api, images)?;
        // util-linux's, because the first process of a PID namespace has to be forked after it was made, and has to die with its
        // parent. Mounts made inside stay inside.
        let mut command = host.netns.command("unshare");
        command.args([
            "--mount",
            "--propagation",
            "private",
            "--pid",
            "--fork",
            "--kill-child=KILL",
        ]);
        command.arg("--").arg(helper).arg("init").arg(dir.path().join(PLAN));
        let log = dir.path().join("init.log");
        let shell = process::spawn_logged(command, &log)?;
        let mut machine = Self {
            name: host.name.clone(),
            netns: host.netns.clone(),
            init: 0,
            plan,
            shell,
            cgroups,
            dir,
        };
        machine.init = machine.find_init()?;
        Ok(machine)
    }

    fn find_init(&mut self) -> Result<u32> {
        let shell = self.shell.id();
        let children = format!("/proc/{shell}/task/{shell}/children");
        let child = || {
            fs::read_to_string(&children)
                .ok()?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        };
        process::wait_until(START, child)
            .with_context(|| format!("{} does not start: {}", self.name, self.last_words()))
    }

    /// Its name in the cluster.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its network.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The process whose namespaces are the node's.
    pub fn init(&self) -> u32 {
        self.init
    }

    /// Where its logs are.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The part of the cgroup2 hierarchy that is this node's.
    pub fn cgroup(&self) -> &Path {
        self.cgroups.unified()
    }

    /// A command as a process of the node: its network, mounts, processes and cgroup.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        self.command_in("visitors", program)
    }

    fn command_in(&self, cgroup: &str, program: impl AsRef<OsStr>) -> Result<Command> {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.init.to_string(), "--net", "--mount", "--pid", "--"]);
        command.arg(program);
        let enter = entrance(self.cgroup(), cgroup).context("entering the node's cgroup")?;
        // SAFETY: what runs there is a write to an open file.
        unsafe { command.pre_exec(enter) };
        Ok(command)
    }

    /// The process of this node that runs `program` with `argument` first.
    pub fn process(&self, program: &str, argument: &str) -> Result<u32> {
        let all = fs::read_dir("/proc").context("reading /proc")?.flatten();
        let mut numbers = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let is_it = |pid: &u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut words = line.split(|byte| *byte == 0);
            words
                .next()
                .is_some_and(|path| Path::new(OsStr::from_bytes(path)).ends_with(program))
                && words.next() == Some(argument.as_bytes())
                && self.has(*pid)
        };
        let found = numbers.find(is_it);
        found.with_context(|| format!("no `{program} {argument}` runs on {}", self.name))
    }

    /// Does a process descend from the node's init?
    fn has(&self, mut pid: u32) -> bool {
        let parent = |pid: u32| -> Option<u32> {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            status
                .lines()
                .find_map(|line| line.strip_prefix("PPid:"))?
                .trim()
                .parse()
                .ok()
        };
        while pid != self.init {
            match parent(pid) {
                Some(next) => pid = next,
                None => return false,
            }
        }
        true
    }

    /// Makes an image known to it.
    pub(crate) fn load(&self, archive: &Path) -> Result<()> {
        let mut command = self.command(program("ctr")?)?;
        command.args(["--address", files::CONTAINERD_SOCKET, "--namespace", "k8s.io"]);
        command.args(["images", "import", "--local"]).arg(archive);
        process::run(&mut command).with_context(|| format!("loading {} on {}", archive.display(), self.name))?;
        Ok(())
    }

    /// Did its kubelet start and end?
    pub(crate) fn kubelet_ended(&self) -> bool {
        let spoke = fs::metadata(self.dir.path().join("kubelet.log")).is_ok_and(|log| log.len() > 0);
        let processes = fs::read_to_string(self.cgroup().join(KUBELET).join("cgroup.procs"));
        spoke && processes.is_ok_and(|processes| processes.is_empty())
    }

    /// Ends the kubelet, without a word to anybody; what runs in pods goes on.
    pub fn stop_kubelet(&self) -> Result<()> {
        let kill = self.cgroup().join(KUBELET).join("cgroup.kill");
        fs::write(&kill, "1").with_context(|| format!("writing {}", kill.display()))
    }

    /// Starts the kubelet again.
    pub fn start_kubelet(&self) -> Result<()> {
        let mut command = self.command_in(KUBELET, &self.plan.kubelet)?;
        command.args(self.plan.kubelet_arguments());
        // It ends with the node's PID namespace.
        process::spawn_logged(command, &self.dir.path().join("kubelet.log")).map(drop)
    }

    /// Ends everything on the node at once.
    pub(crate) fn kill(&mut self) {
        let _ = fs::write(self.cgroup().join("cgroup.kill"), "1");
        let _ = self.shell.kill();
    }

    /// The last lines of its logs.
    pub(crate) fn last_words(&self) -> String {
        let mut words = String::new();
        for name in ["init.log", "containerd.log", "kubelet.log"] {
            let log = fs::read_to_string(self.dir.path().join(name)).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            let tail = &lines[lines.len().saturating_sub(TAIL)..];
            words += &format!("--- {} of {}\n{}\n", name, self.name, tail.join("\n"));
        }
        words
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill();
        let _ = self.shell.wait();
        // The kernel ends a PID namespace with its init; only then are its mounts gone.
        let init = PathBuf::from(format!("/proc/{}", self.init));
        process::wait_until(START, || (!init.exists()).then_some(()));
    }
}

fn write_files(
    dir: &Path,
    host: &Host,
    number: u8,
    cgroups: &Cgroups,
    api: &ApiServer,
    images: &[&Path],
) -> Result<Plan> {
    let cni = dir.join("cni");
    for sub in ["run", "lib", "log", "cni", "sysctls"] {
        fs::create_dir(dir.join(sub))?;
    }
    fs::write(cni.join("10-pods.conflist"), files::cni(number).to_string())?;
    let Some(cni) = cni.to_str() else {
        bail!("{} is not text", cni.display())
    };
    fs::write(dir.join("containerd.toml"), files::containerd(cni))?;
    fs::write(dir.join("kubelet.json"), files::kubelet(&cgroups.root()).to_string())?;
    let plan = Plan {
        node: host.name.clone(),
        addresses: format!("{},{}", host.v4, host.v6),
        dir: dir.to_owned(),
        cgroup: cgroups.unified().to_owned(),
        cgroup_name: cgroups.root(),
        kubeconfig: api.kubeconfig(),
        containerd: program("containerd")?,
        ctr: program("ctr")?,
        kubelet: program("kubelet")?,
        images: images.iter().map(|path| path.to_path_buf()).collect(),
    };
    fs::write(dir.join(PLAN), serde_json::to_vec(&plan)?)?;
    Ok(plan)
}
