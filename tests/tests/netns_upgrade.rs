//! One version follows another under constant load: restarts, upgrades to a version whose maps have another layout, and downgrades back.
//! The other version is this one, built with the feature `next-layout`.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path as FilePath, PathBuf};
use std::time::{Duration, Instant};

use proxy_tests::agent::{self, Agent};
use proxy_tests::attached;
use proxy_tests::load::{Attempt, Client, Fault, Flows, HELD_TCP, HELD_UDP, Incident, Load, Path, Rules};
use proxy_tests::process;
use proxy_tests::service::{self, LB, NODE_PORT, external, to_sockets};
use proxy_tests::topology::CLUSTER_CIDR;
use proxy_tests::world::{World, names, vips};
use serde_json::Value;

/// How often everything happens, unless [`ROUNDS_VARIABLE`] says so: starts of an agent take a second or two each.
const ROUNDS: usize = 4;
/// For a longer run: 100 take half an hour.
const ROUNDS_VARIABLE: &str = "EBPF_PROXY_ROUNDS";
/// Small maps: a start is not to wait for the kernel to clear memory that no test needs.
const OPTIONS: [&str; 8] = [
    "--frontends-capacity",
    "1024",
    "--backends-capacity",
    "4096",
    "--rewrites-capacity",
    "65536",
    "--services-capacity",
    "1024",
];
const BACKENDS: [&str; 3] = ["pod1-2", "pod2-1", "pod2-2"];

/// S155, S169: again and again an agent is killed or stopped and starts again, is followed by one whose maps have another layout, and
/// by the first one again. No connection fails, none that exists ends, no UDP flow loses its endpoint, and one set of programs and pins is
/// left.
#[test]
fn versions_follow_each_other_under_load() {
    let next = agent::next_binary().unwrap();
    let mut world = service::world(&OPTIONS, &BACKENDS, |_| {}).unwrap();
    let load = Load::start(clients(&world), rules());
    load.round().unwrap();
    let began = Instant::now();
    let mut longest = [Duration::ZERO; 3];
    let rounds = std::env::var(ROUNDS_VARIABLE).map_or(ROUNDS, |rounds| rounds.parse().unwrap());
    for round in 0..rounds {
        let steps = [("restart", None), ("upgrade", Some(&next)), ("downgrade", None)];
        for (step, (what, binary)) in steps.into_iter().enumerate() {
            let before = Instant::now();
            let agent = &mut world.agents[0];
            if (round + step) % 2 == 0 {
                agent.kill();
            } else {
                agent.stop();
            }
            agent.set_binary(binary.cloned());
            agent
                .launch()
                .unwrap_or_else(|error| panic!("{what} {round}: {error:#}"));
            longest[step] = longest[step].max(before.elapsed());
            let incidents = forbidden(&load.incidents(0));
            assert!(incidents.is_empty(), "{what} {round}:\n{}", incidents.join("\n"));
        }
    }
    let took = began.elapsed();
    load.round().unwrap();
    let (totals, incidents) = (load.totals(), load.incidents(0));
    let rate = load.stop();
    println!(
        "{rounds} restarts, upgrades and downgrades in {:.0} s (longest {longest:.1?}): {} new connections ({rate:.0} a second), {} \
         waited for a second try, {} messages over held ones",
        took.as_secs_f64(),
        totals.made,
        incidents.len(),
        totals.messages
    );
    assert_eq!(forbidden(&incidents), Vec::<String>::new());
    assert_eq!((totals.tcp_alive, totals.udp_alive), (HELD_TCP, HELD_UDP));
    assert_alone(&world.agents[0], "v1");
    assert_same(&world);
}

/// The programs of a version that is gone, here the later one, are found and removed with all else that is left of it: also where they
/// are filters, and on an interface that is not to have any.
#[test]
fn what_another_version_left_is_found_and_removed() {
    let next = agent::next_binary().unwrap();
    for mode in ["tcx", "classic"] {
        let mut options = OPTIONS.to_vec();
        options.extend(["--attach", mode]);
        let mut world = service::world(&options, &BACKENDS, |_| {}).unwrap();
        let agent = &mut world.agents[0];
        agent.stop();
        agent.set_binary(Some(next.clone()));
        agent.launch().unwrap();
        assert_alone(agent, "v2");
        agent.kill();
        agent.set_binary(None);
        let without = [
            &["--cluster-cidr", CLUSTER_CIDR][..],
            &options,
            &["--exclude-interfaces", "eth0"],
        ]
        .concat();
        agent.set_options(&without);
        agent.launch().unwrap();
        assert_alone(agent, "v1");
        let programs = attached::programs(agent.netns()).unwrap();
        assert!(
            !programs.is_empty() && !programs.iter().any(|program| program.starts_with("eth0 ")),
            "{mode}: {programs:?}"
        );
    }
}

/// `cleanup` removes what a later version left.
#[test]
fn cleanup_removes_later_versions() {
    let mut world = service::world(&OPTIONS, &BACKENDS, |_| {}).unwrap();
    let agent = &mut world.agents[0];
    agent.stop();
    agent.set_binary(Some(agent::next_binary().unwrap()));
    agent.launch().unwrap();
    agent.stop();
    agent.set_binary(None);
    agent.command(&["cleanup"]).unwrap();
    assert_eq!(directories(&agent.bpf_dir()), [] as [PathBuf; 0]);
    assert_eq!(attached::programs(agent.netns()).unwrap(), Vec::<String>::new());
}

/// Everybody who asks, and everything that can be asked: at the socket, at the interface of a pod, from outside with and without being
/// masqueraded.
fn clients(world: &World) -> Vec<Client<'_>> {
    let targets = [
        ("cluster IP", vips()),
        ("nodePort", world.topology.node(0).sockets(NODE_PORT)),
        ("load balancer", to_sockets(LB)),
    ];
    let paths = |client: &'static str| -> Vec<Path> {
        let of = |(to, targets): (&'static str, [SocketAddr; 2])| {
            targets.map(|target| Path {
                client,
                to,
                target,
                // A connected UDP socket of the node is not served at an address of the node.
                udp: if (client, to) == ("host", "nodePort") {
                    Flows::Unconnected
                } else {
                    Flows::All
                },
            })
        };
        targets.into_iter().flat_map(of).collect()
    };
    let (pod, outside, host) = (
        &world.topology.pod(0, 0).netns,
        &external(world).netns,
        &world.agents[0],
    );
    vec![
        Client {
            start: Box::new(|body| pod.spawn(body)),
            paths: paths("pod"),
        },
        Client {
            start: Box::new(|body| host.spawn(body)),
            paths: paths("host"),
        },
        Client {
            start: Box::new(|body| outside.spawn(body)),
            paths: paths("external"),
        },
    ]
}

fn rules() -> Rules {
    let all: BTreeSet<String> = names(&BACKENDS);
    Rules {
        serving: all.clone(),
        keep: all,
        ..Rules::default()
    }
}

/// What must not happen. A new connection may have to try twice, because new ones are held back while connections are copied.
fn forbidden(incidents: &[Incident]) -> Vec<String> {
    let waited = |incident: &&Incident| incident.attempt == Attempt::New && matches!(incident.fault, Fault::Slow(_));
    incidents
        .iter()
        .filter(|i| !waited(i))
        .map(Incident::to_string)
        .collect()
}

/// Exactly one version has pins, and every hook runs one set of programs.
fn assert_alone(agent: &Agent, version: &str) {
    let found = directories(&agent.bpf_dir());
    assert_eq!(found, [agent.bpf_dir().join(version)]);
    let programs = attached::programs(agent.netns()).unwrap();
    let hooks: BTreeSet<&str> = programs
        .iter()
        .filter_map(|program| Some(program.split_once(" tc_")?.0))
        .collect();
    assert!(
        !hooks.is_empty() && hooks.len() == programs.len(),
        "two sets of programs: {programs:?}"
    );
    let cgroup = agent.cgroup().display().to_string();
    let sockets = process::run(agent.netns().command("bpftool").args(["cgroup", "show", &cgroup])).unwrap();
    assert_eq!(sockets.lines().count() - 1, 8, "{sockets}");
}

/// What is pinned, but for what the kernel puts into every BPF file system.
fn directories(bpf_dir: &FilePath) -> Vec<PathBuf> {
    let entries = fs::read_dir(bpf_dir).unwrap().flatten().map(|entry| entry.path());
    entries
        .filter(|path| path.extension().is_none_or(|e| e != "debug"))
        .collect()
}

/// The maps hold what they should.
fn assert_same(world: &World) {
    let agent = &world.agents[0];
    let (manifests, bpf_dir, cgroup) = (
        world.manifests.dir().display().to_string(),
        agent.bpf_dir().display().to_string(),
        agent.cgroup().display().to_string(),
    );
    let mut arguments = vec![
        "verify",
        "--manifests",
        &manifests,
        "--node-name",
        agent.node(),
        "--bpf-dir",
        &bpf_dir,
    ];
    arguments.extend(["--cgroup", &cgroup, "--cluster-cidr", CLUSTER_CIDR, "-o", "json"]);
    let output = agent.tool(&arguments).unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(
        output.status.code(),
        Some(0),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(serde_json::from_str::<Vec<Value>>(&text).unwrap(), [] as [Value; 0]);
}
