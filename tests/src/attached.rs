//! The programs on the interfaces of a network namespace, as the kernel lists them: by tcx links and by classic filters.

use std::process::Command;

use anyhow::{Context, Result};
use aya::programs::{SchedClassifier, TcAttachType};

use crate::netns::Netns;
use crate::process;

/// One `interface hook program` for each that is ours, in order. Debian's bpftool knows classic filters only.
pub fn programs(netns: &Netns) -> Result<Vec<String>> {
    netns.run(|| {
        let mut found = Vec::new();
        for interface in interfaces()? {
            for (hook, kind) in [("ingress", TcAttachType::Ingress), ("egress", TcAttachType::Egress)] {
                let (_, programs) = SchedClassifier::query_tcx(&interface, kind)
                    .with_context(|| format!("asking for the programs of {interface}"))?;
                let names = programs.iter().filter_map(|program| program.name_as_str());
                found.extend(names.map(|name| format!("{interface} {hook} {name}")));
            }
        }
        let filters = process::run(Command::new("bpftool").args(["net", "show"]))?;
        // eth0(2) clsact/ingress tc_ingress id 7
        for line in filters.lines().filter(|line| line.contains("clsact/")) {
            let words: Vec<&str> = line.split_whitespace().collect();
            if let [interface, hook, program, ..] = words[..] {
                let interface = interface.split('(').next().unwrap_or_default();
                found.push(format!("{interface} {} {program}", hook.trim_start_matches("clsact/")));
            }
        }
        found.retain(|line| line.contains(" tc_"));
        found.sort_unstable();
        Ok(found)
    })
}

/// Of this thread's namespace; `/sys` would show another one's.
fn interfaces() -> Result<Vec<String>> {
    let text = process::run(Command::new("ip").args(["-o", "link", "show"]))?;
    let names = text.lines().filter_map(|line| line.split(": ").nth(1));
    Ok(names
        .map(|name| name.split('@').next().unwrap_or_default().to_owned())
        .collect())
}
