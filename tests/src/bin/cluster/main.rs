//! The cluster behind `cargo xtask cluster`: three nodes with real kubelets and containerds, the agent's DaemonSet instead of
//! kube-proxy, a Deployment behind a Service. Stays up until Ctrl-C; nothing is left then.
//!
//! The same program is init on the nodes and all that runs in pods beside the agent; see [`inside`].

mod inside;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proxy_tests::kubernetes::objects::chart_values;
use proxy_tests::kubernetes::{Kubernetes, image};
use proxy_tests::{helm, leftovers, process};

const NODES: u8 = 3;
const REPLICAS: u8 = 4;
/// Label of the folder by which a running cluster is found.
const MARK: &str = "standing-cluster";
/// How long a running cluster may take to remove itself.
const REMOVAL: Duration = Duration::from_secs(60);

/// Three real nodes on this machine, with this proxy instead of kube-proxy.
#[derive(Parser)]
#[command(name = "cluster")]
struct Args {
    /// Take it down again once everything was shown to work.
    #[arg(long)]
    once: bool,
    /// End the clusters that run on this machine, and remove what killed ones left.
    #[arg(long, conflicts_with = "once")]
    remove: bool,
    #[command(subcommand)]
    inside: Option<inside::Role>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let result = match &args.inside {
        Some(role) => role.run(),
        None if args.remove => remove(),
        None => stand(args.once),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\n\x1b[1;31mThe cluster failed:\x1b[0m {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn stand(once: bool) -> Result<()> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, interrupted.clone())?;
    }
    let mark = leftovers::temp_dir(MARK)?;
    let result = build_and_show(once, &interrupted);
    drop(mark);
    let left = leftovers::owned_by_this_process();
    ensure!(left.is_empty(), "something was left behind: {left:?}");
    println!("  nothing is left: no process, namespace, mount, cgroup or folder");
    result
}

fn build_and_show(once: bool, interrupted: &AtomicBool) -> Result<()> {
    let begin = Instant::now();
    let step = |what: &str| -> Result<()> {
        ensure!(!interrupted.load(Ordering::Relaxed), "interrupted");
        println!("\n\x1b[1m{what}\x1b[0m  ({:.0} s)", begin.elapsed().as_secs_f64());
        Ok(())
    };
    step("Starting etcd, API server, controller-manager, scheduler, and three nodes with containerd and kubelet")?;
    let kubernetes = Kubernetes::start(NODES, &std::env::current_exe()?)?;
    print!("{}", kubernetes.api.kubectl(&["get", "nodes", "-o", "wide"])?);
    step("Loading the agent's image on every node, and applying what the Helm chart makes")?;
    kubernetes.load(&image::agent_archive()?)?;
    kubernetes.install_agent(&[])?;
    print!(
        "{}",
        kubernetes
            .api
            .kubectl(&["-n", "kube-system", "get", "pods", "-o", "wide"])?
    );
    step("A Deployment behind a Service")?;
    let addresses = kubernetes.install_echo(REPLICAS)?;
    print!("{}", kubernetes.api.kubectl(&["get", "pods,services", "-o", "wide"])?);
    step("Who answers, asked from a pod and from the node itself")?;
    ask(&kubernetes, &addresses)?;
    if !once {
        step("It stays up until Ctrl-C, or `cargo xtask cluster --remove`. To look around:")?;
        explain(&kubernetes, &addresses)?;
        while !interrupted.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(200));
        }
    }
    println!("\n\x1b[1mRemoving everything\x1b[0m");
    Ok(())
}

fn ask(kubernetes: &Kubernetes, addresses: &[SocketAddr]) -> Result<()> {
    let helper = std::env::current_exe()?;
    let clients = kubernetes.pods("default", "app=client")?;
    for (node, pod) in &clients {
        for address in addresses {
            let address = address.to_string();
            let said = kubernetes
                .api
                .kubectl(&["exec", pod, "--", "/usr/bin/cluster", "ask", &address])?;
            print!("  pod on {node}  {said}");
        }
    }
    for machine in &kubernetes.machines {
        for address in addresses {
            let said = process::run(machine.command(&helper)?.arg("ask").arg(address.to_string()))?;
            print!("  {} itself  {said}", machine.name());
        }
    }
    Ok(())
}

fn explain(kubernetes: &Kubernetes, addresses: &[SocketAddr]) -> Result<()> {
    let machine = kubernetes.machines.first().context("a cluster has a node")?;
    println!("  alias k='{}'", kubernetes.api.kubectl_line()?);
    println!("  k get pods -A -o wide");
    println!("  # the agent's commands");
    println!("  alias agent='k -n kube-system exec daemonset/proxy-agent -- proxy-agent'");
    println!("  agent service list; agent backend list; agent connection list -o wide; agent top --once");
    for address in addresses {
        println!("  agent explain host {address}/tcp");
    }
    println!("  # traffic, and what changes it");
    println!("  k scale deployment echo --replicas=7");
    println!("  k -n kube-system rollout restart daemonset/proxy-agent");
    for address in addresses {
        println!("  k exec daemonset/client -- /usr/bin/cluster ask {address}");
    }
    println!("  # another version of the chart or other values: change --set, and apply again");
    let values = chart_values().join(" --set ");
    println!(
        "  {} template ebpf-proxy {} -n kube-system --set {values} | k apply -f -",
        helm::program()?.display(),
        helm::deploy("chart/ebpf-proxy"),
    );
    println!("  # Prometheus alerts and the Grafana dashboard, which this cluster has nobody to read");
    println!("  ls {}", helm::deploy("chart/ebpf-proxy/monitoring"));
    println!(
        "  nsenter --target {} --net curl -s http://127.0.0.1:10249/metrics",
        machine.init()
    );
    println!("  # a shell on {}: its network, mounts and processes", machine.name());
    println!("  nsenter --target {} --net --mount --pid bash", machine.init());
    println!("  # logs of {}'s containerd and kubelet", machine.name());
    println!("  ls {}", machine.dir().display());
    Ok(())
}

fn remove() -> Result<()> {
    let owners = leftovers::living_owners(MARK);
    for pid in &owners {
        kill(Pid::from_raw(*pid as i32), Signal::SIGTERM).with_context(|| format!("ending process {pid}"))?;
    }
    let gone = || leftovers::living_owners(MARK).is_empty().then_some(());
    if process::wait_until(REMOVAL, gone).is_none() {
        bail!(
            "still there after {REMOVAL:?}: processes {:?}",
            leftovers::living_owners(MARK)
        );
    }
    leftovers::sweep();
    println!("removed {} clusters", owners.len());
    Ok(())
}
