//! The two that are measured: started without waiting, and asked whether they have written everything.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use proxy_tests::agent::{Agent, Source};
use proxy_tests::kube_proxy::{KubeProxy, Mode};
use proxy_tests::topology::CLUSTER_CIDR;
use proxy_tests::{http, maps};

use crate::bed::{Bed, first_yes};

/// The agent has no excuse.
const LIMIT: Duration = Duration::from_secs(120);
/// What has not been programmed by then is not going to be waited for.
const KUBE_PROXY_LIMIT: Duration = Duration::from_secs(900);
/// Metric of kube-proxy: set when rules have been written, which it does for the first time when everything has been listed.
const WRITTEN: &str = "kubeproxy_sync_proxy_rules_last_timestamp_seconds";
/// Metric of kube-proxy.
const FAILED: &str = "kubeproxy_sync_proxy_rules_nftables_sync_failures_total";

/// A start, seen from outside.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Start {
    pub(crate) began: Instant,
    pub(crate) listed: Instant,
    pub(crate) done: Instant,
    /// Time of processors.
    pub(crate) cpu: Duration,
}

/// Starts an agent; it is done when it says it is ready, and its maps hold every Service and endpoint.
pub(crate) fn agent(bed: &Bed) -> Result<(Agent, Start)> {
    let node = bed.node();
    let source = Source::Kubeconfig(bed.standin.kubeconfig());
    let mut options = vec!["--cluster-cidr".to_owned(), CLUSTER_CIDR.to_owned()];
    // Two for each Service: its port, and all others.
    let frontends = (2 * bed.size.services).next_power_of_two();
    if frontends > 65_536 {
        options.extend(["--frontends-capacity".to_owned(), frontends.to_string()]);
    }
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let mut agent = Agent::prepare(&node.name, &node.netns, &source, &options)?;
    bed.standin.forget_lists();
    let began = Instant::now();
    agent.launch_only()?;
    let pid = agent.pid().context("it has just been started")?;
    let done = first_yes(LIMIT, Duration::from_millis(2), || {
        if !agent.is_running() {
            bail!("the agent has ended; it said\n{}", agent.log());
        }
        Ok(agent.healthz("/readyz").is_ok())
    })?;
    let done = done.with_context(|| format!("the agent is not ready after {LIMIT:?}; it said\n{}", agent.log()))?;
    let cpu = cpu(pid)?;
    let held = maps::Frontends4::open(&agent.bpf_dir())?.held()?;
    // All of them as they are at first, but the last.
    let expected = (
        bed.size.services as usize,
        ((bed.size.services - 1) * bed.size.endpoints + 1) as usize,
    );
    if held != expected {
        bail!("the maps should hold {expected:?} services and endpoints and hold {held:?}");
    }
    let listed = bed.standin.listed_at().context("it is ready without a list")?;
    let start = Start {
        began,
        listed,
        done,
        cpu,
    };
    Ok((agent, start))
}

/// Starts kube-proxy; it is done when it says it has written its rules, and the last Service answers. `None`: not within the limit.
pub(crate) fn kube_proxy(bed: &Bed) -> Result<Option<(KubeProxy, Start)>> {
    let node = bed.node();
    bed.standin.forget_lists();
    let began = Instant::now();
    // Its usual encoding is not what the stand-in speaks.
    let options = ["--kube-api-content-type", "application/json"];
    let mut proxy = KubeProxy::launch(
        &node.netns,
        &node.name,
        &bed.standin.kubeconfig(),
        Mode::Nftables,
        &options,
    )?;
    let pid = proxy.pid();
    let done = first_yes(KUBE_PROXY_LIMIT, Duration::from_millis(20), || {
        if proxy.has_exited() {
            bail!("kube-proxy has ended; it said\n{}", proxy.log());
        }
        let Ok(metrics) = node.run(|| http::get(KubeProxy::metrics_address(), "/metrics")) else {
            return Ok(false);
        };
        let value = |name: &str| -> f64 {
            let line = metrics.body.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.rsplit(' ').next()?.parse().ok())
                .unwrap_or_default()
        };
        if value(FAILED) > 0.0 {
            bail!("kube-proxy could not write its rules; it said\n{}", proxy.log());
        }
        Ok(value(WRITTEN) > 0.0)
    })?;
    let Some(done) = done else { return Ok(None) };
    let cpu = cpu(pid)?;
    if !bed.answers(bed.last()) {
        bail!(
            "kube-proxy has written its rules, and the last Service does not answer; it said\n{}",
            proxy.log()
        );
    }
    let listed = bed.standin.listed_at().context("it has written rules without a list")?;
    let start = Start {
        began,
        listed,
        done,
        cpu,
    };
    Ok(Some((proxy, start)))
}

/// Time of processors that a process and the children it has waited for have used.
fn cpu(pid: u32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("reading what a process has used")?;
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    // utime, stime, cutime, cstime: fields 14 to 17, counted from 1; the first two are before the bracket.
    let ticks: u64 = after_name
        .split_whitespace()
        .skip(11)
        .take(4)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    // SAFETY: no pointers.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) }.max(1) as u64;
    Ok(Duration::from_millis(ticks * 1000 / per_second))
}

/// Memory of a process in MiB.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    pub(crate) resident: f64,
    pub(crate) anonymous: f64,
    pub(crate) peak: f64,
    /// Of the maps that it has open, in the kernel.
    pub(crate) maps: f64,
}

pub(crate) fn memory(pid: u32) -> Result<Memory> {
    let proc = Path::new("/proc").join(pid.to_string());
    let status = fs::read_to_string(proc.join("status")).context("reading the memory of a process")?;
    let field = |text: &str, name: &str| -> Option<u64> {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse().ok()
    };
    let mib = |name: &str| field(&status, name).unwrap_or_default() as f64 / 1024.0;
    let mut maps = BTreeMap::new();
    for entry in fs::read_dir(proc.join("fdinfo"))?.flatten() {
        let info = fs::read_to_string(entry.path()).unwrap_or_default();
        if let (Some(id), Some(bytes)) = (field(&info, "map_id"), field(&info, "memlock")) {
            maps.insert(id, bytes);
        }
    }
    Ok(Memory {
        resident: mib("VmRSS"),
        anonymous: mib("RssAnon"),
        peak: mib("VmHWM"),
        maps: maps.values().sum::<u64>() as f64 / 1024.0 / 1024.0,
    })
}
