//! An agent with kube-proxy's configuration file and command line: what is in effect, what is written, and what exits at once.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proxy_tests::agent::Agent;
use proxy_tests::topology::Shape;
use proxy_tests::world::{Setup, World};
use proxy_tests::{http, process};
use serde_json::Value;

/// As kubeadm writes it.
const KUBEADM: &str = include_str!("../../proxy-agent/src/config/fixtures/kubeadm-1.36.yaml");
/// Above what anything here takes on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(20);

fn world() -> World {
    let shape = Shape {
        nodes: 1,
        pods_per_node: 1,
        ..Default::default()
    };
    let setup = Setup {
        shape,
        ..Default::default()
    };
    World::new(&setup).unwrap()
}

fn configz(agent: &Agent) -> Value {
    let get = || http::get("127.0.0.1:10249".parse()?, "/configz");
    let answer = agent.netns().run(get).unwrap();
    serde_json::from_str(&answer.body).unwrap()
}

fn restart(agent: &mut Agent, options: &[&str]) {
    agent.stop();
    agent.set_options(options);
    agent.launch().unwrap();
}

/// S191, S192: kubeadm's file as it is, and what is in effect written out and read back.
#[test]
fn kubeadm_s_file_and_what_is_in_effect() {
    let mut world = world();
    let agent = &mut world.agents[0];
    let [file, written] = ["config.conf", "written.yaml"].map(|name| agent.state_dir().join(name));
    fs::write(&file, KUBEADM).unwrap();
    restart(agent, &["--config", text(&file)]);
    let in_effect = configz(agent);
    let config = &in_effect["kubeproxy.config.k8s.io"];
    assert_eq!(config["clusterCIDR"], "10.244.0.0/16");
    assert_eq!(config["hostnameOverride"], "node1", "the flag counts before the file");
    assert_eq!(config["healthzBindAddress"], "0.0.0.0:10256", "the flag does not");
    let warning = "--healthz-bind-address, --metrics-bind-address ignored: --config ";
    assert!(agent.log().contains(warning), "{}", agent.log());

    agent.stop();
    agent.set_options(&["--config", text(&file), "--write-config-to", text(&written)]);
    agent.launch_only().unwrap();
    let ended = process::wait_until(PATIENCE, || (!agent.is_running()).then_some(()));
    ended.expect("it writes and ends");
    agent.stop();
    restart(agent, &["--config", text(&written)]);
    assert_eq!(configz(agent), in_effect);
    let printed = agent
        .command(&["config", "--config", text(&written), "--node-name=node1"])
        .unwrap();
    assert_eq!(printed, fs::read_to_string(&written).unwrap());
}

/// S170, S191: without a subcommand, as kube-proxy is called.
#[test]
fn what_kube_proxy_does_and_exits() {
    let mut world = world();
    let agent = &mut world.agents[0];
    agent.stop();
    let removed = agent.command(&["--cleanup"]).unwrap();
    assert!(
        removed.starts_with("removed ") && removed.contains(" links"),
        "{removed}"
    );
    assert_eq!(pins(agent, "maps"), Vec::<PathBuf>::new());
    agent.command(&["--init-only=true"]).unwrap();
    assert_ne!(pins(agent, "maps"), Vec::<PathBuf>::new());
    assert_eq!(pins(agent, "links"), Vec::<PathBuf>::new(), "nothing is attached");
    agent.launch().unwrap();
    agent.stop();
    agent.command(&["cleanup"]).unwrap();
}

/// S191: an agent ends when its file has changed, unless it could not be started with it.
#[test]
fn a_changed_file_ends_the_agent() {
    let mut world = world();
    let agent = &mut world.agents[0];
    let file = agent.state_dir().join("config.conf");
    fs::write(&file, KUBEADM).unwrap();
    restart(agent, &["--config", text(&file)]);
    fs::write(&file, KUBEADM.replace("10.244.0.0/16", "10.244.0.0/99")).unwrap();
    let complaint = "cannot be used: going on with the old one";
    let complained = process::wait_until(PATIENCE, || agent.log().contains(complaint).then_some(()));
    assert!(complained.is_some() && agent.is_running(), "{}", agent.log());
    fs::write(&file, KUBEADM.replace("10.244.0.0/16", "10.245.0.0/16")).unwrap();
    let ended = process::wait_until(PATIENCE, || (!agent.is_running()).then_some(()));
    assert!(ended.is_some(), "{}", agent.log());
    agent.stop();
    agent.launch().unwrap();
    assert_eq!(
        configz(agent)["kubeproxy.config.k8s.io"]["clusterCIDR"],
        "10.245.0.0/16"
    );
}

/// Nothing is pinned, and what is printed is there.
#[test]
fn a_dry_run_leaves_no_trace() {
    let mut world = world();
    let agent = &mut world.agents[0];
    agent.stop();
    agent.command(&["cleanup"]).unwrap();
    let folder = agent.state_dir().join("objects");
    fs::create_dir(&folder).unwrap();
    let mut service = proxy_tests::manifests::service("web", &["10.96.0.7"], &[]);
    service["spec"]["ports"] = serde_json::json!([{"name": "http", "port": 80, "protocol": "TCP"}]);
    fs::write(folder.join("web.json"), service.to_string()).unwrap();
    let options = [
        "run",
        "--dry-run",
        "-o",
        "json",
        "--manifests",
        text(&folder),
        "--node-name=node1",
    ];
    let rows: Value = serde_json::from_str(&agent.command(&options).unwrap()).unwrap();
    assert_eq!(rows[0]["frontends"][0]["address"], "10.96.0.7", "{rows}");
    assert_eq!(pins(agent, ""), Vec::<PathBuf>::new());
    agent.launch().unwrap();
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// What is pinned in a folder of every layout; with an empty name, the layouts.
fn pins(agent: &Agent, folder: &str) -> Vec<PathBuf> {
    let list =
        |dir: &Path| fs::read_dir(dir).map_or(Vec::new(), |entries| entries.map(|e| e.unwrap().path()).collect());
    let layouts: Vec<PathBuf> = list(&agent.bpf_dir());
    match folder {
        // The file system has files of its own.
        "" => layouts.into_iter().filter(|layout| layout.is_dir()).collect(),
        folder => layouts.iter().flat_map(|layout| list(&layout.join(folder))).collect(),
    }
}
