//! `docs/performance.md` and the plots beside it, written as a whole.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use proxy_tests::results::Case;

use super::{base, direction, plot, ratio, relation, size, spread, target_lines};
use crate::machine::Machine;

/// Below the folder of documents.
const PLOTS: &str = "performance";

/// Writes document and plots, and removes plots that are no more.
pub(crate) fn write_document(docs: &Path, cases: &[Case], machine: &Machine) -> Result<()> {
    let plots = docs.join(PLOTS);
    fs::create_dir_all(&plots).with_context(|| format!("making {}", plots.display()))?;
    for entry in fs::read_dir(&plots)?
        .flatten()
        .filter(|entry| entry.path().extension().is_some_and(|e| e == "svg"))
    {
        fs::remove_file(entry.path())?;
    }
    for case in cases {
        let path = plots.join(format!("{}.svg", case.name));
        fs::write(&path, plot::svg(case)?).with_context(|| format!("writing {}", path.display()))?;
    }
    let path = docs.join("performance.md");
    fs::write(&path, document(cases, machine)).with_context(|| format!("writing {}", path.display()))
}

fn document(cases: &[Case], machine: &Machine) -> String {
    let mut text = introduction(machine);
    text += "\n## Targets\n\nRatios are formed round by round; what counts is their median, and in brackets are the smallest and the largest. So are the values.\n\n";
    text += "| what : in relation to what | target | reached | |\n|---|---|---|---|\n";
    for line in cases.iter().flat_map(target_lines) {
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} |",
            line.what, line.bound, line.reached, line.verdict
        );
    }
    for case in cases {
        section(&mut text, case);
    }
    text
}

fn introduction(machine: &Machine) -> String {
    let kind = if machine.is_virtual {
        "a virtual machine"
    } else {
        "a machine"
    };
    let Machine {
        kernel,
        processor,
        cores,
        gigabytes,
        date,
        ..
    } = machine;
    format!(
        "# Performance

This page is written by `cargo xtask bench all`, all of it; nothing here was measured otherwise. Measured on {date} on {kind} with
{cores} cores ({processor}), {gigabytes} GB of memory and {kernel}. What counts are ratios within one run on one machine: absolute figures
are those of this one.

How it is done: one cluster of network namespaces, in which each contender has a node of its own with a pod for the client and one for the
server, veths with the kernel's own offloads, and nothing in netfilter but what the contender puts there. All nodes stand at the same
time and read the same objects from a stand-in for an API server. The contenders take short turns, each round with another one first, and
while one is measured the processes of the others are stopped. Agent and kube-proxy are release builds; kube-proxy is the real one, its
iptables mode with iptables over nftables. Namespaces on one machine stand for machines: there is no wire, so there is nothing but
processor time, and the load is on the same processors.

| name | is |
|---|---|
| no proxy | the client dials the pod itself; no program is attached, netfilter is empty |
| ours, socket-lb all | the agent with `--socket-lb all`: TCP of pods is translated at the socket |
| ours, tc only | the agent with `--socket-lb off`: every packet is translated by the tc programs |
| ours, XDP | the same with `--xdp-interfaces` for the node's uplink |
| kube-proxy nftables, kube-proxy iptables | the real kube-proxy in this mode |
| XDP swap | an XDP program on the uplink that only swaps the packet's addresses and sends it back |

To run it, as root on Linux with two cores or more: `cargo xtask bench all`, which takes about 25 minutes and writes this page anew.
`--quick` takes a few minutes and prints a first impression; `--cases NAME,NAME` measures some cases, by the names in the headings.
"
    )
}

fn section(text: &mut String, case: &Case) {
    let (axis, unit) = (case.axis.as_deref().unwrap_or("size"), &case.unit);
    let _ = writeln!(text, "\n## {} (`{}`)\n\n{}\n", case.title, case.name, case.about);
    let base = base(case).unwrap_or_default();
    let _ = writeln!(
        text,
        "| | {axis} | {unit}; {} | : {base} |\n|---|---|---|---|",
        direction(case.better)
    );
    for row in &case.rows {
        let value = row.spread().map(spread).unwrap_or_default();
        let value = [value.as_str(), row.note.as_deref().unwrap_or_default()].join(" ");
        let relation = relation(case, row).map(ratio).unwrap_or_default();
        let _ = writeln!(
            text,
            "| {} | {} | {} | {relation} |",
            row.contender,
            size(row.at),
            value.trim()
        );
    }
    let _ = writeln!(text, "\n![{}]({PLOTS}/{}.svg)", case.title, case.name);
}
