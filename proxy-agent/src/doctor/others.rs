//! Other proxies on the node: two that translate the same service get into each other's way.

use std::path::Path;

use super::{Check, Machine};
use crate::datapath::Options;
use crate::netfilter::legacy;
use crate::netfilter::nftables::{self as nft, ChainName};

/// The remedy for whatever kube-proxy left.
const LEFTOVERS: &str = "proxy-agent migrate remove-rules, after kube-proxy has been removed";
/// The chain that kube-proxy's iptables mode begins with.
const SERVICES_CHAIN: &str = "KUBE-SERVICES";
/// The table of its nftables mode.
const TABLE: &str = "kube-proxy";

pub(super) fn checks(machine: &Machine, options: &Options) -> Vec<Check> {
    vec![
        process(machine),
        iptables(machine),
        nftables(nft::chains().map(|chains| chains.into_iter().map(|listed| listed.chain).collect())),
        ipvs(&machine.proc("net/ip_vs")),
        cilium(&options.bpf_dir),
    ]
}

/// The process of a kube-proxy of this network namespace.
pub(super) fn kube_proxy(machine: &Machine) -> Option<u32> {
    // One in another network namespace, such as a cluster's in a container, is not in the way.
    let namespace = |process: &str| std::fs::read_link(machine.proc.join(process).join("ns/net")).ok();
    let here = namespace("self");
    let entries = std::fs::read_dir(&machine.proc).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| machine.proc(format!("{pid}/comm")).trim() == "kube-proxy")
        .find(|pid| namespace(&pid.to_string()) == here)
}

fn process(machine: &Machine) -> Check {
    match kube_proxy(machine) {
        Some(pid) => Check::fail(
            "kube-proxy process",
            format!("kube-proxy is running (process {pid})"),
            "remove it from the cluster: kubectl -n kube-system delete daemonset kube-proxy",
        ),
        None => Check::ok("kube-proxy process", "none is seen here"),
    }
}

fn iptables(machine: &Machine) -> Check {
    let check = "kube-proxy iptables";
    let families = [("net/ip_tables_names", true), ("net/ip6_tables_names", false)];
    for (names, is_v4) in families {
        match legacy::table(is_v4, "nat", &machine.proc(names)) {
            Ok(Some(table)) if table.chains.contains_key(SERVICES_CHAIN) => {
                return Check::fail(
                    check,
                    format!("chain {SERVICES_CHAIN} is in the legacy nat table"),
                    LEFTOVERS,
                );
            }
            Ok(_) => {}
            Err(error) => {
                return Check::warn(
                    check,
                    format!("the legacy nat table cannot be read: {error}"),
                    "run as root",
                );
            }
        }
    }
    Check::ok(check, "no chains in legacy tables")
}

fn nftables(chains: std::io::Result<Vec<ChainName>>) -> Check {
    let check = "kube-proxy nftables";
    let chains = match chains {
        Ok(chains) => chains,
        Err(error) => return Check::ok(check, format!("the kernel lists no nftables: {error}")),
    };
    let ours = |chain: &&ChainName| chain.table == TABLE || chain.name == SERVICES_CHAIN;
    match chains.iter().find(ours) {
        Some(ChainName { table, name, .. }) => {
            Check::fail(check, format!("chain {name} is in table {table}"), LEFTOVERS)
        }
        None => Check::ok(check, "no chains in nftables"),
    }
}

fn ipvs(table: &str) -> Check {
    let services = table
        .lines()
        .filter(|line| ["TCP ", "UDP ", "SCTP "].iter().any(|kind| line.starts_with(kind)));
    match services.count() {
        0 => Check::ok("IPVS", "no virtual services"),
        count => Check::fail("IPVS", format!("{count} virtual services"), LEFTOVERS),
    }
}

fn cilium(bpf_dir: &Path) -> Check {
    let roots = [bpf_dir.parent().unwrap_or(bpf_dir), Path::new("/sys/fs/bpf")];
    let found = roots
        .iter()
        .flat_map(|root| [root.join("cilium"), root.join("tc/globals/cilium_lb4_services_v2")]);
    match found.into_iter().find(|path| path.exists()) {
        Some(path) => Check::warn(
            "Cilium",
            format!("Cilium has pins at {}", path.display()),
            "set kubeProxyReplacement=false there: one proxy per node",
        ),
        None => Check::ok("Cilium", "no pins"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    #[test]
    fn a_running_kube_proxy_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let machine = Machine {
            proc: dir.path().to_owned(),
            sys: dir.path().to_owned(),
        };
        assert_eq!(process(&machine).status, Status::Ok);
        std::fs::create_dir(dir.path().join("77")).unwrap();
        std::fs::write(dir.path().join("77/comm"), "kube-proxy\n").unwrap();
        let check = process(&machine);
        assert!(
            check.status == Status::Fail && check.found.contains("process 77"),
            "{check:?}"
        );
    }

    #[test]
    fn tables_of_others_are_seen() {
        let header = "IP Virtual Server version 1.2.1 (size=4096)\nProt LocalAddress:Port Scheduler Flags\n";
        assert_eq!(ipvs(header).status, Status::Ok);
        assert_eq!(ipvs("").status, Status::Ok);
        assert_eq!(ipvs(&format!("{header}TCP  0A60000A:0050 rr\n")).status, Status::Fail);
        let chain = |table: &str, name: &str| ChainName {
            is_v4: true,
            table: table.to_owned(),
            name: name.to_owned(),
        };
        assert_eq!(nftables(Ok(vec![chain("filter", "forward")])).status, Status::Ok);
        for found in [chain("kube-proxy", "services"), chain("nat", "KUBE-SERVICES")] {
            assert_eq!(nftables(Ok(vec![found])).status, Status::Fail);
        }
    }
}
