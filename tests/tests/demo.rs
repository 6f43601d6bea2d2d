//! The demo, as a user runs it: it works, it leaves nothing, and what is kept can be removed.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use proxy_tests::apiserver::ApiServer;
use proxy_tests::netns::Netns;
use proxy_tests::{agent, http};

const DEMO: &str = env!("CARGO_BIN_EXE_demo");

fn demo(command: &mut Command, args: &[&str]) -> (String, u32) {
    let command = command.args(args).env("PROXY_AGENT_BIN", agent::binary().unwrap());
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = child.id();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    (text, pid)
}

/// Namespaces, folders and cgroups that name this process as their maker.
fn made_by(pid: u32) -> Vec<PathBuf> {
    let places = [
        PathBuf::from("/run/netns"),
        std::env::temp_dir(),
        proxy_tests::cgroup::base().unwrap(),
    ];
    let entries = places
        .iter()
        .flat_map(|dir| std::fs::read_dir(dir).unwrap().flatten().map(|e| e.path()));
    let named = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with("ebpf-proxy-") && name.contains(&format!("-{pid}-"))
    };
    entries.filter(named).collect()
}

#[test]
fn works_twice_and_leaves_nothing() {
    for _ in 0..2 {
        let (text, pid) = demo(&mut Command::new(DEMO), &[]);
        assert!(text.contains("Everything as promised."), "{text}");
        assert_eq!(made_by(pid), Vec::<PathBuf>::new());
    }
}

#[test]
fn what_is_kept_stays_until_it_is_removed() {
    let (text, pid) = demo(&mut Command::new(DEMO), &["--keep"]);
    assert!(text.contains(&format!("--remove {pid}")), "{text}");
    assert!(!made_by(pid).is_empty());
    demo(&mut Command::new(DEMO), &["--remove", &pid.to_string()]);
    assert_eq!(made_by(pid), Vec::<PathBuf>::new());
}

/// The API server listens in a namespace of its own, and the demo is started there: for it, that is the machine.
#[test]
fn objects_may_come_from_an_api_server() {
    let netns = Netns::new("machine").unwrap();
    let api = ApiServer::start(&netns, "127.0.0.1".parse().unwrap()).unwrap();
    let kubeconfig = api.kubeconfig();
    let (text, pid) = demo(
        &mut netns.command(DEMO),
        &["--kubeconfig", kubeconfig.to_str().unwrap()],
    );
    assert!(text.contains("Everything as promised."), "{text}");
    assert_eq!(made_by(pid), Vec::<PathBuf>::new());
    let left = api
        .kubectl(&["get", "services,endpointslices", "-o", "name", "--all-namespaces"])
        .unwrap();
    assert!(!left.contains("ebpf-proxy-demo"), "{left}");
}

/// Every panel of the dashboard and every alert: while traffic of all kinds flows at a known pace, and when everything goes wrong that an
/// alert is about. What is true is known from what was sent, from what was written, and from the kernel. Then Prometheus stays.
#[test]
fn prometheus_shows_what_is_true() {
    let (text, pid) = demo(&mut Command::new(DEMO), &["--prometheus", "--keep"]);
    println!("{text}");
    assert!(text.contains("every panel and every alert says what is true"), "{text}");
    let address = text.split_once("http://").and_then(|(_, rest)| rest.split_once('/'));
    let address: SocketAddr = address.map(|(address, _)| address.parse().unwrap()).unwrap();
    let answer = http::get(address, "/api/v1/query?query=ebpf_proxy_map_entries").unwrap();
    assert!(answer.body.contains("\"instance\":\"node2\""), "{}", answer.body);
    demo(&mut Command::new(DEMO), &["--remove", &pid.to_string()]);
    assert_eq!(made_by(pid), Vec::<PathBuf>::new());
    http::get(address, "/").unwrap_err();
}
