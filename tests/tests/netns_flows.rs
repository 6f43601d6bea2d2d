//! A table of packet flows, run twice: through the tracer over the plans of each node, and through the kernel with real programs.
//! Three nodes in two zones, one of them with point-to-point pods, a router that sends back what nobody translated, and hosts
//! behind it; pods, host processes in and out of the agent's cgroup and outsiders dial every kind of address of two dozen services
//! over TCP and UDP, IPv4 and IPv6.
//!
//! What must be answered by whom and under which address, refused or dropped is not written down here but computed; a list of
//! rules by hand ([`rules`]) beside it shows a mistake that tracer and kernel share.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

#[path = "netns_flows/changes.rs"]
mod changes;
#[path = "netns_flows/cluster.rs"]
mod cluster;
#[path = "netns_flows/expect.rs"]
mod expect;
#[path = "netns_flows/flow.rs"]
mod flow;
#[path = "netns_flows/reuse.rs"]
mod reuse;
#[path = "netns_flows/rules.rs"]
mod rules;
#[path = "netns_flows/services.rs"]
mod services;
#[path = "netns_flows/wire.rs"]
mod wire;

use cluster::Cluster;
use expect::Expected;
use flow::{Flow, SOURCES, Source};
use wire::Tally;

/// Runs rows, every source on its own thread, and prints a summary.
fn run(cluster: &Cluster, rows: Vec<(Flow, Expected)>) {
    let of_source = |source: Source| -> Vec<_> { rows.iter().filter(|(f, _)| f.source == source).cloned().collect() };
    let tallies: Vec<(Source, Tally)> = std::thread::scope(|scope| {
        let running: Vec<_> = SOURCES
            .map(|source| (source, of_source(source)))
            .into_iter()
            .map(|(source, rows)| (source, scope.spawn(move || wire::run(cluster, source, &rows))))
            .collect();
        running
            .into_iter()
            .map(|(source, t)| (source, t.join().unwrap()))
            .collect()
    });
    let mut all = Tally::default();
    for (source, tally) in tallies {
        println!("{:20} {tally}", format!("{source:?}"));
        all.add(tally);
    }
    println!("{:20} {all}", "all");
    let wrong = &all.wrong;
    assert!(
        wrong.is_empty(),
        "{} rows are wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

/// S25–S36, S47–S58, S64–S74, S80–S99, S101–S119, S122–S128: the kernel does what the plans say.
#[test]
fn the_kernel_does_what_the_tracer_says() {
    let cluster = cluster::turn();
    let flows = SOURCES.iter().flat_map(|source| flow::table(&cluster, *source));
    let rows = flows.map(|flow| (flow.clone(), cluster.expect(&flow))).collect();
    run(&cluster, rows);
}

/// The same table where the rules say it in so many words: the matrix of source addresses (S108–S113) and policies (S56–S58, S87–S89,
/// S125, S126), hairpins (S110), refusals (S77, S122), conditions (S48–S55), source ranges (S92, S101–S107), hints (S64–S74), and
/// addresses of others (S95, S99).
#[test]
fn the_rules_hold() {
    let cluster = cluster::turn();
    run(&cluster, rules::rows(&cluster));
}
