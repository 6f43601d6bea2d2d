//! Removes kube-proxy's rules: its tables of nftables, its chains of iptables and what leads to them. In one transaction, so that
//! no packet meets half of them. Nothing of others is touched.
//!
//! Connections that netfilter translates go on without rules as long as there is some chain of address translation at the hooks, and
//! some rule of the family for which connections are followed. The chains of iptables are there anyway; of nftables mode the empty
//! ones stay, and in both modes a rule that nobody comes to, until no connection needs them.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::kube_proxy::{self, Frontend, Mode, Rules, TABLE};
use super::{OldConnection, frontends, old_connections};
use crate::doctor;
use crate::netfilter::nftables::{self as nft, ChainName, Change, ListedChain};

/// How often connections are counted while waiting.
const INTERVAL: Duration = Duration::from_secs(1);
/// The chain with the rule for which connections are followed.
const KEEPER: &str = "running-connections";
/// Tables of iptables that kube-proxy has chains in.
const IPTABLES: [&str; 3] = ["nat", "filter", "mangle"];
/// Its chains; the kubelet's `KUBE-FIREWALL`, `KUBE-KUBELET-CANARY` and `KUBE-IPTABLES-HINT` are none of them.
const CHAINS: [&str; 8] = [
    "KUBE-SERVICES",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-NODEPORTS",
    "KUBE-POSTROUTING",
    "KUBE-MARK-MASQ",
    "KUBE-FORWARD",
    "KUBE-PROXY-FIREWALL",
    "KUBE-PROXY-CANARY",
];
/// Its chains of Services and endpoints.
const PREFIXES: [&str; 6] = [
    "KUBE-SVC-",
    "KUBE-SVL-",
    "KUBE-EXT-",
    "KUBE-FW-",
    "KUBE-SEP-",
    "KUBE-XLB-",
];
/// How many are named of what is missing.
const NAMED: usize = 5;

/// How it is done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RemovalOptions {
    /// Where the agent's maps are pinned.
    pub bpf_dir: PathBuf,
    /// How long to wait for connections that netfilter translates, before what they need goes too.
    pub wait: Option<Duration>,
    /// Whatever is lost by it.
    pub force: bool,
}

/// What was removed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Removal {
    /// Chains, those of removed tables included.
    pub chains: usize,
    /// Tables that are gone.
    pub tables: usize,
    /// Connections that netfilter still translates.
    pub old_connections: Vec<OldConnection>,
    /// Empty chains of address translation stay for those.
    pub kept: bool,
}

/// Removes kube-proxy's rules. Nothing there is success.
pub fn remove_rules(options: &RemovalOptions) -> anyhow::Result<Removal> {
    if let Some(pid) = doctor::kube_proxy() {
        bail!("kube-proxy is running (process {pid}) and would write its rules again: take it off this node first");
    }
    let rules = kube_proxy::read().context("kube-proxy's rules cannot be read")?;
    if rules.iter().any(|rules| rules.mode == Mode::LegacyIptables) {
        bail!(
            "the rules are in legacy iptables tables, which are only replaced as a whole: run `kube-proxy --cleanup` with the \
             image of your kube-proxy, or restart the node"
        );
    }
    // Without the agent's maps there is nobody to go by but kube-proxy itself.
    let mut served = match frontends(&options.bpf_dir) {
        Ok(served) => served,
        Err(_) if options.force => BTreeSet::new(),
        Err(error) => {
            return Err(error.context("nobody serves instead of kube-proxy (--force removes its rules anyway)"));
        }
    };
    if !options.force {
        refuse_unserved(&rules, &served)?;
    }
    served.extend(rules.iter().flat_map(|rules| rules.frontends.keys().copied()));
    let mut removal = Removal {
        old_connections: old_connections(&served)?,
        ..Removal::default()
    };
    let listed = nft::chains().context("chains cannot be listed")?;
    remove(
        &listed,
        options.force || removal.old_connections.is_empty(),
        &mut removal,
    )?;
    if let Some(wait) = options.wait.filter(|_| removal.kept) {
        let deadline = Instant::now() + wait;
        while !removal.old_connections.is_empty() && Instant::now() < deadline {
            std::thread::sleep(INTERVAL);
            removal.old_connections = old_connections(&served)?;
        }
        if removal.old_connections.is_empty() {
            remove(&nft::chains().context("chains cannot be listed")?, true, &mut removal)?;
        }
    }
    Ok(removal)
}

/// What only kube-proxy serves would not be served any more.
fn refuse_unserved(rules: &[Rules], served: &BTreeSet<Frontend>) -> anyhow::Result<()> {
    let all = rules.iter().flat_map(|rules| &rules.frontends);
    let unserved: Vec<_> = all.filter(|(frontend, _)| !served.contains(frontend)).collect();
    if unserved.is_empty() {
        return Ok(());
    }
    let some = unserved.iter().take(NAMED);
    let some: Vec<String> = some
        .map(|(frontend, (_, service))| format!("{service} at {frontend}"))
        .collect();
    bail!(
        "the agent does not serve {} addresses that kube-proxy serves, such as {}: see `proxy-agent migrate check` (--force \
         removes the rules anyway, and nobody serves these)",
        unserved.len(),
        some.join("; ")
    )
}

/// One transaction. `whole`: what old connections need goes too.
fn remove(listed: &[ListedChain], whole: bool, removal: &mut Removal) -> anyhow::Result<()> {
    let keepers = [true, false].map(|is_v4| ChainName {
        is_v4,
        table: TABLE.to_owned(),
        name: KEEPER.to_owned(),
    });
    let mut changes = Vec::new();
    removal.kept = false;
    for (is_v4, keeper) in [true, false].into_iter().zip(&keepers) {
        let of_table = |table: &str| {
            let table = table.to_owned();
            listed
                .iter()
                .filter(move |one| one.chain.is_v4 == is_v4 && one.chain.table == table)
        };
        let chains: Vec<_> = of_table(TABLE).collect();
        let kept: Vec<_> = chains
            .iter()
            .filter(|one| !whole && one.is_base() && one.is_nat())
            .collect();
        if !chains.is_empty() {
            changes.push(Change::DeleteTable { is_v4, table: TABLE });
            removal.chains += chains.len() - kept.len();
            removal.tables += usize::from(whole);
        }
        let of_iptables = IPTABLES
            .into_iter()
            .flat_map(of_table)
            .any(|one| is_kube_proxys(&one.chain.name));
        if !whole && (of_iptables || !chains.is_empty()) {
            removal.kept = true;
            changes.push(Change::NewTable { is_v4, table: TABLE });
            changes.extend(kept.into_iter().map(|one| Change::NewChain(one)));
            changes.extend([Change::NewPlainChain(keeper), Change::NewTrackingRule(keeper)]);
        }
        for table in IPTABLES {
            let (ours, others): (Vec<_>, Vec<_>) = of_table(table).partition(|one| is_kube_proxys(&one.chain.name));
            if ours.is_empty() {
                continue;
            }
            removal.chains += ours.len();
            changes.extend(jumps(is_v4, table, &others)?);
            // All are emptied before the first one goes, since they lead to each other.
            changes.extend(ours.iter().map(|one| Change::FlushChain(&one.chain)));
            changes.extend(ours.iter().map(|one| Change::DeleteChain(&one.chain)));
        }
    }
    nft::change(&changes).context("kube-proxy's rules cannot be removed; nothing was changed")
}

fn is_kube_proxys(chain: &str) -> bool {
    CHAINS.contains(&chain) || PREFIXES.iter().any(|prefix| chain.starts_with(prefix))
}

/// The rules of the hooks' chains that lead to kube-proxy's.
fn jumps<'a>(is_v4: bool, table: &str, others: &[&'a ListedChain]) -> anyhow::Result<Vec<Change<'a>>> {
    let read = nft::table(is_v4, table).with_context(|| format!("table {table} cannot be read"))?;
    let mut found = Vec::new();
    for listed in others {
        let chain: &ChainName = &listed.chain;
        let rules = read.as_ref().and_then(|read| read.chains.get(&chain.name));
        for rule in rules.iter().flat_map(|chain| &chain.rules) {
            if !rule.targets().iter().any(|target| is_kube_proxys(target)) {
                continue;
            }
            if !listed.is_base() {
                bail!(
                    "chain {} of table {table}, which is not kube-proxy's, leads to one of its chains: remove that rule first",
                    chain.name
                );
            }
            found.extend(rule.handle.map(|handle| Change::DeleteRule(chain, handle)));
        }
    }
    Ok(found)
}
