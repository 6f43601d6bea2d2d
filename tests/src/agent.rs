//! The real agent, one per simulated node: started in the node's namespace with a BPF file system and a cgroup of its own.
//!
//! Used by the namespace and API server tests, the demo and the latency benchmark. A guard that is dropped stops the agent, has
//! it clean up, and removes mount and cgroup; if the test failed, it prints the agent's log.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::Signal;

use crate::cgroup::Cgroup;
use crate::confine::Confinement;
use crate::http;
use crate::leftovers;
use crate::netns::Netns;
use crate::process;

const HEALTHZ: &str = "127.0.0.1:10256";
const METRICS: &str = "127.0.0.1:10249";
/// Where agents serve metrics.
pub const METRICS_PORT: u16 = 10249;
/// How long an agent may take until it is ready; a debug build on a loaded machine.
const START: Duration = Duration::from_secs(20);
const STOP: Duration = Duration::from_secs(5);

/// Where an agent gets its objects from.
#[derive(Clone, Debug)]
pub enum Source {
    /// A folder of manifests.
    Manifests(PathBuf),
    /// An API server.
    Kubeconfig(PathBuf),
}

/// An agent and everything it needs on its node.
pub struct Agent {
    node: String,
    netns: Netns,
    cgroup: Cgroup,
    state: PathBuf,
    args: Vec<String>,
    /// How many of them are not options of the caller.
    own_args: usize,
    child: Option<Child>,
    keep: bool,
    confinement: Option<Confinement>,
    /// Another program than [`binary`].
    binary: Option<PathBuf>,
}

/// The agent's binary: `PROXY_AGENT_BIN`, or the one built beside the running test.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("PROXY_AGENT_BIN") {
        return Ok(path.into());
    }
    let test = std::env::current_exe().context("finding the test's own path")?;
    let mut dirs = test.ancestors().skip(1).take(2);
    let found = dirs.find_map(|dir| Some(dir.join("proxy-agent")).filter(|p| p.is_file()));
    found.with_context(|| {
        format!(
            "no proxy-agent beside {}: set PROXY_AGENT_BIN, or use `cargo xtask test`",
            test.display()
        )
    })
}

/// An agent whose maps have another layout: `PROXY_AGENT_NEXT_BIN`, built with the feature `next-layout`.
pub fn next_binary() -> Result<PathBuf> {
    let path = std::env::var_os("PROXY_AGENT_NEXT_BIN");
    path.map(PathBuf::from).context(
        "PROXY_AGENT_NEXT_BIN is not set: it names an agent built with the feature next-layout; use `cargo xtask test`",
    )
}

impl Agent {
    /// Starts an agent for a node and waits until it is ready. `options` are further arguments of `proxy-agent run`.
    pub fn start(node: &str, netns: &Netns, source: &Source, options: &[&str]) -> Result<Self> {
        let mut agent = Self::prepare(node, netns, source, options)?;
        agent.launch()?;
        Ok(agent)
    }

    /// Everything but the process.
    pub fn prepare(node: &str, netns: &Netns, source: &Source, options: &[&str]) -> Result<Self> {
        let state = leftovers::temp_dir(node)?.keep();
        // From here on the guard removes it.
        let mut agent = Self {
            node: node.to_owned(),
            netns: netns.clone(),
            cgroup: Cgroup::new(node)?,
            state,
            args: Vec::new(),
            own_args: 0,
            child: None,
            keep: false,
            confinement: None,
            binary: None,
        };
        let bpf = agent.bpf_dir();
        fs::create_dir(&bpf)?;
        mount(Some("bpf"), &bpf, Some("bpf"), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mounting a BPF file system on {} (this needs root)", bpf.display()))?;
        let source = match source {
            Source::Manifests(dir) => ["--manifests".to_owned(), dir.display().to_string()],
            Source::Kubeconfig(file) => ["--kubeconfig".to_owned(), file.display().to_string()],
        };
        agent.args = ["run", "--node-name", node].map(String::from).into();
        agent.args.extend(source);
        agent.args.extend(["--bpf-dir".to_owned(), bpf.display().to_string()]);
        agent
            .args
            .extend(["--cgroup".to_owned(), agent.cgroup.path().display().to_string()]);
        agent
            .args
            .extend(["--healthz-bind-address", HEALTHZ, "--metrics-bind-address", METRICS].map(String::from));
        agent.own_args = agent.args.len();
        agent.set_options(options);
        Ok(agent)
    }

    /// Replaces the further arguments; they hold from the next [`Agent::launch`] on.
    pub fn set_options(&mut self, options: &[&str]) {
        self.args.truncate(self.own_args);
        self.args.extend(options.iter().map(|o| (*o).to_owned()));
    }

    /// Serves metrics on every address of the node, for somebody outside; from the next [`Agent::launch`] on.
    pub fn open_metrics(&mut self) {
        for arg in self.args.iter_mut().filter(|arg| *arg == METRICS) {
            *arg = format!("0.0.0.0:{METRICS_PORT}");
        }
    }

    /// Makes it another program, from the next [`Agent::launch`] or [`Agent::command`] on; `None` is the usual one.
    pub fn set_binary(&mut self, binary: Option<PathBuf>) {
        self.binary = binary;
    }

    fn binary(&self) -> Result<PathBuf> {
        self.binary.clone().map_or_else(binary, Ok)
    }

    /// Gives the agent no more than these capabilities, on a root file system and with a cgroup that it cannot write; from the next
    /// [`Agent::launch`] on.
    pub fn confine(&mut self, capabilities: &[String]) {
        self.confinement = Some(Confinement {
            capabilities: capabilities.to_vec(),
            read_only: vec![self.cgroup.path().to_owned()],
        });
    }

    /// Starts the process and waits until it is ready: also after [`Agent::kill`] or [`Agent::stop`].
    pub fn launch(&mut self) -> Result<()> {
        self.launch_only()?;
        let ready = process::wait_until(START, || {
            let exited = self
                .child
                .as_mut()
                .is_some_and(|c| c.try_wait().is_ok_and(|status| status.is_some()));
            (exited || self.is_ready()).then_some(!exited)
        });
        match ready {
            Some(true) => Ok(()),
            Some(false) => bail!("the agent of {} ended at once; it said\n{}", self.node, self.log()),
            None => bail!(
                "the agent of {} is not ready after {START:?}; it said\n{}",
                self.node,
                self.log()
            ),
        }
    }

    /// Starts the process without waiting.
    pub fn launch_only(&mut self) -> Result<()> {
        if self.child.is_some() {
            bail!("the agent of {} runs already", self.node);
        }
        let log = File::options().create(true).append(true).open(self.log_path())?;
        let mut command = self.netns.command(self.binary()?);
        command
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        if let Some(confinement) = &self.confinement {
            confinement.apply(&mut command)?;
        }
        let child = if self.keep {
            command.spawn()
        } else {
            process::spawn_bound(command)
        };
        self.child = Some(child.context("starting proxy-agent")?);
        Ok(())
    }

    /// The node's name.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Its namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The node's cgroup.
    pub fn cgroup(&self) -> &Path {
        self.cgroup.path()
    }

    /// What is given as `--bpf-dir`.
    pub fn bpf_dir(&self) -> PathBuf {
        self.state.join("bpf")
    }

    /// The folder that holds its mount and log.
    pub fn state_dir(&self) -> &Path {
        &self.state
    }

    /// Process id of the running agent.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// What it wrote so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_path(&self) -> PathBuf {
        self.state.join("agent.log")
    }

    /// Runs `body` as a process of the node: in its network namespace and its cgroup.
    pub fn run<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        self.netns.run(|| {
            self.cgroup.enter().expect("the cgroup exists as long as its guard");
            body()
        })
    }

    /// Like [`Agent::run`], without waiting for the end. The guard waits a moment for the thread, not for ever.
    pub fn spawn<T: Send + 'static>(&self, body: impl FnOnce() -> T + Send + 'static) -> std::thread::JoinHandle<T> {
        self.spawn_in_pod(&self.netns, body)
    }

    /// A process of `netns` whose sockets belong to this node's cgroup, as a pod's do.
    pub fn run_in_pod<T: Send>(&self, netns: &Netns, body: impl FnOnce() -> T + Send) -> T {
        netns.run(|| {
            self.cgroup.enter().expect("the cgroup exists as long as its guard");
            body()
        })
    }

    /// [`Agent::run_in_pod`] without waiting for the end.
    pub fn spawn_in_pod<T: Send + 'static>(
        &self,
        netns: &Netns,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> std::thread::JoinHandle<T> {
        let enter = self.cgroup.entrance();
        netns.spawn(move || {
            enter().expect("the cgroup exists as long as its guard");
            body()
        })
    }

    /// Body of an HTTP answer of the health server, if it is 200.
    pub fn healthz(&self, path: &str) -> Result<String> {
        self.netns.run(|| http_get(HEALTHZ, path))
    }

    /// The metrics in text form.
    pub fn metrics(&self) -> Result<String> {
        self.netns.run(|| http_get(METRICS, "/metrics"))
    }

    fn is_ready(&self) -> bool {
        self.healthz("/readyz").is_ok()
    }

    /// Runs another command of the binary on this node: `service list`, `cleanup`, …; `--bpf-dir` is added.
    pub fn command(&self, args: &[&str]) -> Result<String> {
        let mut command: Command = self.netns.command(self.binary()?);
        if let Some(confinement) = &self.confinement {
            confinement.apply(&mut command)?;
        }
        process::run(command.args(args).arg("--bpf-dir").arg(self.bpf_dir()))
    }

    /// Runs a tool of the binary on this node, whatever its exit code; nothing is added to the arguments.
    pub fn tool(&self, args: &[&str]) -> Result<Output> {
        let mut command: Command = self.netns.command(self.binary()?);
        command.args(args).stdin(Stdio::null());
        command.output().context("starting proxy-agent")
    }

    /// Is the process still there?
    pub fn is_running(&mut self) -> bool {
        self.child
            .as_mut()
            .is_some_and(|c| c.try_wait().is_ok_and(|status| status.is_none()))
    }

    /// Ends it without warning.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Asks it to end, and waits.
    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            process::signal(&child, Signal::SIGTERM);
            let _ = process::wait_or_kill(&mut child, STOP);
        }
    }

    /// Leaves agent, mount and cgroup standing when the guard is dropped. To be called before the start, since a child that
    /// shall outlive this process is started differently.
    pub fn keep(&mut self) {
        self.keep = true;
        self.cgroup.keep();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if std::thread::panicking() {
            let _ = writeln!(
                std::io::stderr(),
                "--- log of the agent of {}\n{}---",
                self.node,
                self.log()
            );
        }
        let started = self.log_path().exists();
        self.stop();
        if started && let Err(error) = self.command(&["cleanup"]) {
            let _ = writeln!(
                std::io::stderr(),
                "cleaning up after the agent of {}: {error:#}",
                self.node
            );
        }
        leftovers::remove_dir_with_mounts(&self.state);
    }
}

fn http_get(server: &str, path: &str) -> Result<String> {
    let answer = http::get(server.parse()?, path)?;
    if answer.status != 200 {
        bail!("{path}: {}", answer.head);
    }
    Ok(answer.body)
}
