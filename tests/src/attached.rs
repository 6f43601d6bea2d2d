//! The programs on the interfaces of a network namespace, as the kernel lists them: by tcx links, by classic
//! filters and at XDP.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use aya::programs::{SchedClassifier, TcAttachType, loaded_programs};
use serde_json::Value;

use crate::maps;
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

/// One `interface mode program` for each XDP program of the namespace, whoever's it is.
pub fn xdp(netns: &Netns) -> Result<Vec<String>> {
    let text = process::run(netns.command("ip").args(["-j", "-d", "link", "show"]))?;
    let links: Vec<Value> = serde_json::from_str(&text).context("what ip says of links")?;
    let mut found = Vec::new();
    for link in &links {
        let Some(id) = link["xdp"]["prog"]["id"].as_u64() else {
            continue;
        };
        // IFLA_XDP_ATTACHED.
        let mode = match link["xdp"]["mode"].as_u64() {
            Some(1) => "native",
            Some(2) => "generic",
            _ => "otherwise",
        };
        let programs = loaded_programs().filter_map(Result::ok);
        let name = programs
            .filter(|program| u64::from(program.id()) == id)
            .find_map(|program| program.name_as_str().map(str::to_owned));
        let interface = link["ifname"].as_str().unwrap_or_default();
        found.push(format!("{interface} {mode} {}", name.unwrap_or_default()));
    }
    found.sort_unstable();
    Ok(found)
}

/// Id of the one XDP link that an agent has pinned.
pub fn xdp_link(bpf_dir: &Path) -> Result<u64> {
    let pins = maps::pins(bpf_dir).with_file_name("links");
    let mut links = fs::read_dir(&pins)?.flatten().map(|pin| pin.path());
    let link = links.find(|pin| pin.to_string_lossy().ends_with("-xdp"));
    let link = link.with_context(|| format!("no XDP link in {}", pins.display()))?;
    let text = process::run(
        Command::new("bpftool")
            .args(["-j", "link", "show", "pinned"])
            .arg(&link),
    )?;
    let shown: Value = serde_json::from_str(&text).context("what bpftool says of a link")?;
    shown["id"].as_u64().with_context(|| format!("no id in {text}"))
}

/// Of this thread's namespace; `/sys` would show another one's.
fn interfaces() -> Result<Vec<String>> {
    let text = process::run(Command::new("ip").args(["-o", "link", "show"]))?;
    let names = text.lines().filter_map(|line| line.split(": ").nth(1));
    Ok(names
        .map(|name| name.split('@').next().unwrap_or_default().to_owned())
        .collect())
}
