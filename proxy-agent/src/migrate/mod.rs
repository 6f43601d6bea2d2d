//! The way from kube-proxy to this proxy on one node: checks and a shadow comparison before, a look at what still goes through
//! netfilter after the agent has taken over, and the removal of kube-proxy's rules. Called by `cli`; only [`remove_rules`] changes
//! something. The way back is `cleanup --drain`.

mod kube_proxy;
mod remove;
mod shadow;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use proxy_common::addr::{Addr4, Addr6, Address, Protocol};
use serde::Serialize;
use tokio::time::sleep;

use self::kube_proxy::Frontend;
pub use self::remove::{Removal, RemovalOptions, remove_rules};
pub use self::shadow::ShadowDifference;
use crate::config::{RunArgs, RunConfig};
use crate::datapath::tables::{BpfTables, FamilyTables};
use crate::datapath::{self, Difference};
use crate::doctor::{self, Check, Status};
use crate::inspect::Columns;
use crate::netfilter::conntrack;
use crate::{run, verify};

/// What differs must still differ after this: kube-proxy and the cluster go on meanwhile.
const SECOND_LOOK: Duration = Duration::from_secs(1);
/// Checks of `doctor` that a node with kube-proxy cannot pass yet.
const EXPECTED: [&str; 3] = ["kube-proxy process", "kube-proxy iptables", "kube-proxy nftables"];
/// Checks of ports that kube-proxy has by default, too.
const PORTS: [&str; 2] = ["healthz port", "metrics port"];

/// What `migrate check` found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Readiness {
    /// As `doctor` has them; that kube-proxy is there is no failure here.
    pub checks: Vec<Check>,
    /// kube-proxy's modes of which there are rules.
    pub modes: Vec<String>,
    /// Addresses and ports in kube-proxy's rules.
    pub compared: usize,
    /// What would change for clients.
    pub differences: Vec<ShadowDifference>,
    /// What differs and is meant to.
    pub by_design: Vec<ShadowDifference>,
    /// What to do next.
    pub next: String,
}

impl Readiness {
    /// Nothing is in the way, and nothing would change.
    pub fn is_ready(&self) -> bool {
        let fails = self.checks.iter().any(|check| check.status == Status::Fail);
        !fails && self.differences.is_empty() && !self.modes.is_empty()
    }
}

/// Looks whether the node is fit for the agent, and compares kube-proxy's rules with what the agent would do.
pub fn check(args: &RunArgs) -> anyhow::Result<Readiness> {
    let checks = expect_kube_proxy(doctor::examine(args));
    let (config, _) = RunConfig::from_args(args)?;
    let (modes, compared, found) = run::block_on(async {
        let (modes, compared, first) = compare(&config).await?;
        if first.iter().all(|one| !one.reason.is_empty()) {
            return Ok((modes, compared, first));
        }
        sleep(SECOND_LOOK).await;
        let (modes, compared, mut second) = compare(&config).await?;
        second.retain(|one| first.contains(one));
        Ok::<_, anyhow::Error>((modes, compared, second))
    })?;
    let (by_design, differences): (Vec<_>, Vec<_>) = found.into_iter().partition(|one| !one.reason.is_empty());
    let mut readiness = Readiness {
        checks,
        modes,
        compared,
        differences,
        by_design,
        next: String::new(),
    };
    let agent_runs = datapath::remains(&config.datapath.bpf_dir).is_locked;
    readiness.next = next(&readiness, agent_runs).to_owned();
    Ok(readiness)
}

fn next(readiness: &Readiness, agent_runs: bool) -> &'static str {
    let fails = |check: &Check| check.status == Status::Fail;
    if readiness.modes.is_empty() {
        "no rules of kube-proxy are here: there is nothing to compare with, and nothing to migrate from"
    } else if readiness.checks.iter().any(fails) {
        "do what the failed checks say, then look again"
    } else if !readiness.differences.is_empty() {
        "find out about every difference: it is traffic that the switch changes"
    } else if agent_runs {
        "the agent serves new connections: take kube-proxy off this node, look with `proxy-agent migrate verify`, then run \
         `proxy-agent migrate remove-rules`"
    } else {
        "start the agent on this node beside kube-proxy, with health and metrics ports of its own"
    }
}

/// That kube-proxy is there is what a migration begins with.
fn expect_kube_proxy(mut checks: Vec<Check>) -> Vec<Check> {
    let kube_proxy_runs = doctor::kube_proxy().is_some();
    for check in checks.iter_mut().filter(|check| check.status == Status::Fail) {
        if EXPECTED.contains(&check.check) {
            check.status = Status::Ok;
            check.found += ", as it should before a migration";
            check.remedy.clear();
        } else if kube_proxy_runs && PORTS.contains(&check.check) {
            check.status = Status::Warn;
            check.remedy = "give the agent another port for as long as kube-proxy runs".to_owned();
        }
    }
    checks
}

/// Are there rules of kube-proxy, as far as that can be seen?
pub fn has_kube_proxy_rules() -> bool {
    kube_proxy::read().is_ok_and(|rules| !rules.is_empty())
}

type Compared = (Vec<String>, usize, Vec<ShadowDifference>);

async fn compare(config: &RunConfig) -> anyhow::Result<Compared> {
    let mut state = verify::cluster(config).await?;
    state.settle();
    let changes = state.take_changes();
    let plans: Vec<_> = changes
        .into_iter()
        .filter_map(|(name, plan)| Some((name, plan?)))
        .collect();
    let planned = shadow::planned(&plans);
    let rules = kube_proxy::read().context("kube-proxy's rules cannot be read")?;
    let found = rules
        .iter()
        .flat_map(|rules| shadow::compare(rules, &planned, config.service_proxy_name.as_deref()));
    let mut found: Vec<_> = found.collect();
    found.sort();
    Ok((
        rules.iter().map(|rules| rules.mode.to_string()).collect(),
        rules.iter().map(|rules| rules.frontends.len()).sum(),
        found,
    ))
}

/// A connection that netfilter still translates, of an address that the agent serves.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OldConnection {
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// Who dialled.
    pub client: SocketAddr,
    /// What.
    pub frontend: SocketAddr,
    /// Who answers.
    pub backend: SocketAddr,
}

impl Columns for OldConnection {
    const HEADINGS: &'static [&'static str] = &["PROTOCOL", "CLIENT", "FRONTEND", "BACKEND"];
    const NARROW: usize = 4;

    fn cells(&self) -> Vec<String> {
        vec![
            self.protocol.clone(),
            self.client.to_string(),
            self.frontend.to_string(),
            self.backend.to_string(),
        ]
    }
}

/// What `migrate verify` found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Takeover {
    /// As `verify` has them.
    pub differences: Vec<Difference>,
    /// Connections from before, which end by themselves.
    pub old_connections: Vec<OldConnection>,
    /// What to do next.
    pub next: String,
}

/// Does the agent do everything, and what does kube-proxy's translation still carry?
pub fn verify_takeover(config: &RunConfig) -> anyhow::Result<Takeover> {
    let differences = verify::differences(config)?;
    let old_connections = old_connections(&frontends(&config.datapath.bpf_dir)?)?;
    let next = if !differences.is_empty() {
        "the agent does not do all it should: find out about every difference"
    } else if doctor::kube_proxy().is_some() {
        "every new connection is the agent's: take kube-proxy off this node, then run `proxy-agent migrate remove-rules`"
    } else if old_connections.is_empty() {
        "nothing goes through kube-proxy's rules any more: `proxy-agent migrate remove-rules`"
    } else {
        "`proxy-agent migrate remove-rules`: old connections go on, and `--wait` waits for their end"
    };
    Ok(Takeover {
        differences,
        old_connections,
        next: next.to_owned(),
    })
}

/// What the pinned maps serve.
fn frontends(bpf_dir: &Path) -> anyhow::Result<BTreeSet<Frontend>> {
    let tables = datapath::open_tables(bpf_dir).with_context(|| {
        format!(
            "the maps in {} cannot be read: has an agent run here?",
            bpf_dir.display()
        )
    })?;
    let mut found = BTreeSet::new();
    add_frontends::<Addr4>(&tables, &mut found)?;
    add_frontends::<Addr6>(&tables, &mut found)?;
    Ok(found)
}

fn add_frontends<A: Address>(tables: &BpfTables, found: &mut BTreeSet<Frontend>) -> anyhow::Result<()>
where
    BpfTables: FamilyTables<A>,
{
    for (key, _) in FamilyTables::<A>::frontends(tables)? {
        // Without a protocol it stands for the ports that are not defined.
        if let Some(protocol) = Protocol::from_number(key.protocol) {
            found.insert(Frontend {
                address: key.addr.into(),
                port: key.port.get(),
                protocol,
            });
        }
    }
    Ok(())
}

/// The connections to these that netfilter translates.
fn old_connections(frontends: &BTreeSet<Frontend>) -> anyhow::Result<Vec<OldConnection>> {
    let translated = conntrack::translated().context("the tracked connections cannot be listed")?;
    let is_ours = |address: IpAddr, port: u16, protocol: Protocol| {
        frontends.contains(&Frontend {
            address,
            port,
            protocol,
        })
    };
    let ours = translated.into_iter().filter(|one| {
        let any = kube_proxy::any(one.dialled.is_ipv4());
        [one.dialled.ip(), any]
            .into_iter()
            .any(|address| is_ours(address, one.dialled.port(), one.protocol))
    });
    Ok(ours
        .map(|one| OldConnection {
            protocol: one.protocol.to_string(),
            client: one.client,
            frontend: one.dialled,
            backend: one.server,
        })
        .collect())
}
