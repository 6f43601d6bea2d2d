//! What the manual says of the memory that a size of the maps costs, held against the maps of a running agent.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, with its context")]

use std::path::Path;
use std::process::Command;

use proxy_common::names;
use proxy_tests::topology::Shape;
use proxy_tests::world::{Setup, World};
use proxy_tests::{maps, process};
use serde_json::Value;

/// An option of the manual's table, and what it says of each.
fn promised() -> Vec<(String, u64)> {
    let manual = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/operations.md");
    let text = std::fs::read_to_string(manual).unwrap();
    text.lines()
        .filter_map(|line| {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            let option = cells.get(1)?.strip_prefix("`--")?.strip_suffix("-capacity`")?;
            let (bytes, _) = cells.get(3)?.split_once(" bytes")?;
            Some((option.to_owned(), bytes.parse().ok()?))
        })
        .collect()
}

/// The maps that an option sizes.
fn sized_by(option: &str) -> Vec<&'static str> {
    match option {
        "rewrites" => names::REWRITES.to_vec(),
        "backends" => names::BACKENDS.to_vec(),
        "frontends" => names::FRONTENDS.to_vec(),
        "services" => [&names::CLUSTER_IPS[..], &[names::SERVICES]].concat(),
        "counters" => vec![names::COUNTERS],
        other => panic!("the manual has an option --{other}-capacity"),
    }
}

#[test]
fn sizes_cost_what_the_manual_says() {
    let shape = Shape {
        nodes: 1,
        pods_per_node: 1,
        ..Default::default()
    };
    let world = World::new(&Setup {
        shape,
        ..Default::default()
    })
    .unwrap();
    let agent = &world.agents[0];
    let cpus = std::fs::read_to_string("/sys/devices/system/cpu/possible").unwrap();
    let cpus: u64 = cpus.trim().rsplit(['-', ',']).next().unwrap().parse::<u64>().unwrap() + 1;
    let of = |map: &str, field: &str| -> u64 {
        let pin = maps::pins(&agent.bpf_dir()).join(map);
        let text = process::run(Command::new("bpftool").args(["-j", "map", "show", "pinned"]).arg(pin)).unwrap();
        let shown: Value = serde_json::from_str(&text).unwrap();
        shown[field]
            .as_u64()
            .unwrap_or_else(|| panic!("{map} has no {field}: {text}"))
    };
    let promised = promised();
    assert_eq!(promised.len(), 5, "{promised:?}");
    for (option, bytes) in promised {
        let maps = sized_by(&option);
        let entries = of(maps[0], "max_entries");
        let memory: u64 = maps.iter().map(|map| of(map, "bytes_memlock")).sum();
        let on_cpus = if option == "counters" { 88 * cpus } else { 0 };
        assert_eq!(memory / entries, bytes + on_cpus, "--{option}-capacity");
    }
}
