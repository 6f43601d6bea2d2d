//! The demonstration behind `cargo xtask demo`: two nodes, four backend pods and a client pod made of namespaces, one real agent
//! per node, real traffic, and a table of who answered. Ends with an error if anything was not as promised.

mod cluster;
mod figures;
mod objects;
mod report;
mod standing;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use proxy_common::addr::Protocol;
use proxy_tests::monitoring::stage::{Cast, Stage};
use proxy_tests::{echo, leftovers, maps, process, traffic};

use cluster::Cluster;
use figures::Sent;
use report::Row;

/// Requests per row of the table.
const REQUESTS: usize = 1_000;
/// Far above what a change takes to arrive: a bound for a broken agent only.
const ARRIVAL: Duration = Duration::from_secs(10);

/// From the write of a change until nobody is sent to an endpoint that left. New connections move at once; a UDP flow that was
/// there before (a reused source port is enough) moves when the agent has gone through the rewrite table, milliseconds later.
const SETTLE: Duration = Duration::from_millis(250);

/// Two nodes, four pods, real traffic through the real datapath.
#[derive(Parser)]
#[command(name = "demo")]
struct Args {
    /// Leave everything standing, and say how to look around.
    #[arg(long)]
    keep: bool,
    /// Take the objects from this API server instead of a folder of manifests.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Have Prometheus scrape both nodes, and show instead what every panel of the dashboard and every alert says.
    #[arg(long, conflicts_with = "kubeconfig")]
    prometheus: bool,
    /// Remove what earlier runs with `--keep` left standing; one of them, if it is named by its process id.
    #[arg(long, value_name = "PID", conflicts_with_all = ["keep", "kubeconfig", "prometheus"])]
    remove: Option<Option<u32>>,
    #[command(subcommand)]
    helper: Option<standing::Helper>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let result = match args.helper {
        Some(helper) => helper.run(),
        None => match args.remove {
            Some(of) => {
                println!("removed {} namespaces, folders and cgroups", leftovers::remove_kept(of));
                Ok(())
            }
            None => demo(&args),
        },
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\n\x1b[1;31mThe demo failed:\x1b[0m {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn demo(args: &Args) -> Result<()> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, interrupted.clone())?;
    }
    if args.keep {
        leftovers::keep_everything();
    }
    let mut cluster = Cluster::build(args.keep, args.kubeconfig.as_deref(), args.prometheus)?;
    let result = show(&mut cluster, &interrupted);
    if args.keep && !interrupted.load(Ordering::Relaxed) {
        cluster.explain()?;
        return result;
    }
    step("Removing everything");
    cluster.remove();
    let left = leftovers::owned_by_this_process();
    ensure!(left.is_empty(), "something was left behind: {left:?}");
    println!("  nothing is left: no namespace, mount, pinned map, cgroup or folder");
    result?;
    println!("\n\x1b[1;32mEverything as promised.\x1b[0m");
    Ok(())
}

fn show(cluster: &mut Cluster, interrupted: &AtomicBool) -> Result<()> {
    if let Some(cast) = cluster.stage() {
        return watch(cast, interrupted);
    }
    let vips = cluster.publish()?;
    let vip_names: Vec<String> = vips.iter().map(ToString::to_string).collect();
    println!(
        "  Service demo is live on both nodes at {} (TCP and UDP)",
        vip_names.join(" and ")
    );
    balance(cluster, &vips, interrupted)?;
    remove_one(cluster, &vips, interrupted)
}

/// What Prometheus has to say, while all is well and while nothing is.
fn watch(cast: Cast<'_>, interrupted: &AtomicBool) -> Result<()> {
    step("Sending traffic of all kinds at a steady pace, for as long as the panels look back");
    let mut stage = Stage::open(cast)?;
    let healthy = stage.healthy()?;
    println!("{}", healthy.table("nothing is wrong"));
    ensure!(!interrupted.load(Ordering::Relaxed), "interrupted");
    step(
        "Making everything happen that an alert is about: a bad object, misdirected packets, full tables, no programs, slow changes",
    );
    let troubled = stage.troubled()?;
    println!("{}", troubled.table("a lot is wrong"));
    let wrong = [healthy.wrong, troubled.wrong].concat();
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    println!("  every panel and every alert says what is true");
    Ok(())
}

/// The first half: a thousand requests of each kind, and the table.
fn balance(cluster: &Cluster, vips: &[SocketAddr], interrupted: &AtomicBool) -> Result<()> {
    step(&format!("Sending {REQUESTS} requests of each kind"));
    let names = cluster.backend_names();
    let mut rows = Vec::new();
    for vip in vips {
        for (from, protocol) in [
            ("client pod", Protocol::Tcp),
            ("node1 itself", Protocol::Tcp),
            ("client pod", Protocol::Udp),
            ("node1 itself", Protocol::Udp),
        ] {
            let request = match protocol {
                Protocol::Udp => echo::udp,
                _ => echo::tcp,
            };
            let send = || {
                let requests = (0..REQUESTS).take_while(|_| !interrupted.load(Ordering::Relaxed));
                requests
                    .map(|_| request(*vip).map(|answer| answer.server))
                    .collect::<Vec<_>>()
            };
            let begin = Instant::now();
            let outcomes = if from == "client pod" {
                cluster.client().run(send)
            } else {
                cluster.agents[0].run(send)
            };
            ensure!(!interrupted.load(Ordering::Relaxed), "interrupted");
            let row = Row::new(from, protocol, *vip, &names, &outcomes);
            println!(
                "  {:<13} {protocol} {vip:<18} {:>6.0} ms",
                from,
                begin.elapsed().as_secs_f64() * 1e3
            );
            rows.push(row);
        }
    }
    println!("\n{}", report::table(&names, &rows));
    let wrong: Vec<String> = rows.iter().filter_map(Row::verdict).collect();
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    println!("  every request was answered, and the shares are what a uniform choice gives");
    tell(cluster, vips)
}

/// What the agent of the node says that everything was sent on.
fn tell(cluster: &Cluster, vips: &[SocketAddr]) -> Result<()> {
    let agent = &cluster.agents[0];
    step(&format!("Asking {}'s agent what it saw of that", agent.node()));
    // Two clients, each with every address.
    let each = (REQUESTS * vips.len() * 2) as u64;
    figures::compare(agent, objects::NAME, &Sent { tcp: each, udp: each })
}

/// The second half: an endpoint goes while requests keep running.
fn remove_one(cluster: &Cluster, vips: &[SocketAddr], interrupted: &AtomicBool) -> Result<()> {
    let names = cluster.backend_names();
    let Some((gone, rest)) = names.split_last() else {
        bail!("there are backends")
    };
    step(&format!("Deleting the endpoint {gone} while requests keep running"));
    let mut running = Vec::new();
    for vip in vips.iter().copied() {
        let pause = Duration::from_micros(500);
        let client = &cluster.client().netns;
        let tcp = traffic::repeat(|body| client.spawn(body), pause, move || echo::tcp(vip));
        running.push((format!("client pod TCP {vip}"), tcp));
        let udp = traffic::repeat(|body| client.spawn(body), pause, move || echo::udp(vip));
        running.push((format!("client pod UDP {vip}"), udp));
        let node = traffic::repeat(|body| cluster.agents[0].spawn(body), pause, move || echo::tcp(vip));
        running.push((format!("node TCP {vip}"), node));
    }
    let enough = |what: &str| -> Result<()> {
        let reached = running.iter().all(|(_, r)| r.wait_for(300, ARRIVAL));
        ensure!(!interrupted.load(Ordering::Relaxed), "interrupted");
        ensure!(reached, "requests came to a halt {what} the change");
        Ok(())
    };
    enough("before")?;
    let changed = Instant::now();
    cluster.set_endpoints(rest)?;
    wait_until_live(cluster, vips, rest.len())?;
    let live = Instant::now();
    println!(
        "  live on both nodes {:.0} ms after it was written",
        (live - changed).as_secs_f64() * 1e3
    );
    std::thread::sleep(SETTLE);
    enough("after")?;
    let ended: Vec<_> = running.into_iter().map(|(what, r)| (what, r.stop())).collect();
    let samples: Vec<_> = ended.iter().flat_map(|(_, samples)| samples.clone()).collect();
    let failed = traffic::failures(&samples);
    let to_gone = ended
        .iter()
        .flat_map(|(what, samples)| samples.iter().map(move |sample| (what, sample)))
        .filter(|(_, sample)| sample.outcome.as_ref() == Ok(gone));
    let last = to_gone.max_by_key(|(_, sample)| sample.began);
    let settled = traffic::answers_after(&samples, changed + SETTLE).len();
    println!(
        "  {} requests around the change, {} failed",
        samples.len(),
        failed.len()
    );
    if let Some((what, sample)) = last {
        let late = (sample.began.saturating_duration_since(changed)).as_secs_f64() * 1e3;
        println!("  the last one sent to {gone} began {late:.1} ms after the change was written ({what})");
    }
    if let Some(first) = failed.first() {
        bail!(
            "{} requests failed during the change, the first with: {:?}",
            failed.len(),
            first.outcome
        );
    }
    let moved = last.is_none_or(|(_, sample)| sample.began < changed + SETTLE);
    ensure!(
        moved,
        "requests were still sent to {gone} {SETTLE:?} after it was deleted"
    );
    println!(
        "  none of the {settled} that began {} ms after it or later",
        SETTLE.as_millis()
    );
    Ok(())
}

/// Waits until every node's maps have `count` backends behind each address.
fn wait_until_live(cluster: &Cluster, vips: &[SocketAddr], count: usize) -> Result<()> {
    for agent in &cluster.agents {
        for vip in vips {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let mut last = None;
                let live = process::wait_until(ARRIVAL, || {
                    last = Some(maps::backends(&agent.bpf_dir(), *vip, protocol));
                    matches!(&last, Some(Ok(Some(backends))) if backends.len() == count).then_some(())
                });
                live.with_context(|| format!("{} has {last:?} behind {vip}; its log:\n{}", agent.node(), agent.log()))?;
            }
        }
    }
    Ok(())
}

fn step(what: &str) {
    println!("\n\x1b[1m{what}\x1b[0m");
}
