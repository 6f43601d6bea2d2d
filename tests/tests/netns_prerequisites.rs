//! Every prerequisite, broken on purpose: the agent says in one sentence what is wrong and what to do, and `doctor` says it
//! beforehand. What concerns rights in an API server: `apiserver/prerequisites.rs`.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use proxy_tests::agent::{self, Agent, Source};
use proxy_tests::confine::{self, Confinement};
use proxy_tests::manifests::Manifests;
use proxy_tests::netns::Netns;
use proxy_tests::{leftovers, process};
use serde_json::Value;
use tempfile::TempDir;

/// How long an agent may take to notice.
const PATIENCE: Duration = Duration::from_secs(30);
const HEALTHZ: &str = "127.0.0.1:10256";

/// A node where everything is as it should be.
struct Node {
    agent: Agent,
    netns: Netns,
    dir: TempDir,
}

/// Options by name; one with an empty value is left out.
type Changes<'a> = &'a [(&'a str, &'a str)];

impl Node {
    fn new() -> Self {
        let netns = Netns::new("prerequisites").unwrap();
        netns
            .ip("link add eth0 type veth peer name eth1\nlink set lo up\nlink set eth0 up")
            .unwrap();
        let dir = leftovers::temp_dir("prerequisites").unwrap();
        let manifests = Manifests::new(dir.path()).unwrap().dir().to_owned();
        let agent = Agent::prepare("node1", &netns, &Source::Manifests(manifests), &[]).unwrap();
        Self { agent, netns, dir }
    }

    fn options(&self, changes: Changes) -> Vec<String> {
        let text = |path: &Path| path.display().to_string();
        let mut options = BTreeMap::from([
            ("--node-name", "node1".to_owned()),
            ("--manifests", text(&self.dir.path().join("manifests"))),
            ("--bpf-dir", text(&self.agent.bpf_dir())),
            ("--cgroup", text(self.agent.cgroup())),
            ("--healthz-bind-address", HEALTHZ.to_owned()),
            ("--metrics-bind-address", "127.0.0.1:10249".to_owned()),
        ]);
        options.extend(changes.iter().map(|(name, value)| (*name, (*value).to_owned())));
        let given = options.into_iter().filter(|(_, value)| !value.is_empty());
        given.flat_map(|(name, value)| [name.to_owned(), value]).collect()
    }

    /// What agents made on the BPF file system, which has two files of the kernel's from the beginning.
    fn pins(&self) -> Vec<String> {
        let entries = fs::read_dir(self.agent.bpf_dir()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| !name.ends_with(".debug")).collect()
    }

    /// The agent with one of its commands, started by something else if need be.
    fn command(&self, before: &[&str], program: &Path, command: &[&str], changes: Changes) -> Command {
        let words = before.iter().map(PathBuf::from).chain([program.to_owned()]);
        let words: Vec<PathBuf> = words.collect();
        let mut made = self.netns.command(&words[0]);
        made.args(&words[1..]).args(command).args(self.options(changes));
        made
    }

    /// It ends by itself, with an error: what it says.
    fn refuses(&self, mut command: Command) -> String {
        let log = self.dir.path().join("said");
        let file = File::create(&log).unwrap();
        command
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file);
        let mut child = command.spawn().unwrap();
        let status = process::wait_or_kill(&mut child, PATIENCE).unwrap();
        let said = fs::read_to_string(log).unwrap();
        assert_eq!(
            status.code(),
            Some(1),
            "it goes on, or dies of something else: {status}\n{said}"
        );
        said
    }

    /// `run` refuses with these words, and `doctor` has them in this check.
    #[track_caller]
    fn both_say(&self, what: &str, make: impl Fn(&[&str]) -> Command, check: &str, words: &[&str]) {
        let said = self.refuses(make(&["run"]));
        let last = said.lines().last().unwrap_or_default();
        for word in words {
            assert!(
                last.contains(word),
                "{what}: `run` does not say {word:?} in its last line:\n{said}"
            );
        }
        let output = make(&["doctor", "-o", "json"]).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{what}");
        assert_said(what, &output.stdout, check, "fail", words);
    }

    /// The agent goes on, and its log has these words; `doctor` has them too.
    #[track_caller]
    fn goes_on_saying(&mut self, what: &str, changes: Changes, check: (&str, &str), words: &[&str]) {
        let before = self.agent.log().len();
        let options: Vec<String> = changes
            .iter()
            .flat_map(|(name, value)| [(*name).to_owned(), (*value).to_owned()])
            .collect();
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        self.agent.set_options(&options);
        self.agent.launch_only().unwrap();
        let all = || {
            let log = self.agent.log();
            words
                .iter()
                .all(|word| log[before..].lines().any(|line| line.contains(word)))
                .then_some(())
        };
        let said = process::wait_until(PATIENCE, all);
        assert!(
            said.is_some(),
            "{what}: not all of {words:?} in\n{}",
            &self.agent.log()[before..]
        );
        assert!(self.agent.is_running(), "{what}");
        self.agent.stop();
        let output = self
            .command(&[], &agent::binary().unwrap(), &["doctor", "-o", "json"], changes)
            .output()
            .unwrap();
        assert_said(what, &output.stdout, check.0, check.1, words);
    }
}

#[track_caller]
fn assert_said(what: &str, output: &[u8], check: &str, status: &str, words: &[&str]) {
    let found: Vec<Value> = serde_json::from_slice(output).unwrap();
    let said = found.iter().find(|one| one["check"] == check);
    let said = said.unwrap_or_else(|| panic!("{what}: doctor has no {check}: {found:#?}"));
    let sentence = format!(
        "{}: {}",
        said["found"].as_str().unwrap(),
        said["remedy"].as_str().unwrap()
    );
    assert_eq!(said["status"], status, "{what}: {sentence}");
    for word in words {
        assert!(
            sentence.contains(word),
            "{what}: doctor does not say {word:?} but {sentence:?}"
        );
    }
}

#[test]
fn options_and_places_that_cannot_be_used() {
    let node = Node::new();
    let binary = agent::binary().unwrap();
    let elsewhere = node.dir.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let elsewhere = elsewhere.display().to_string();
    let file = node.dir.path().join("config.yaml");
    let text =
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nconntrack:\n  udpTimeout: soon\n";
    fs::write(&file, text).unwrap();
    let file = file.display().to_string();
    let below = format!("{elsewhere}/not/made/yet");
    let cases: [(&str, Changes, &str, &[&str]); 8] = [
        (
            "no BPF file system",
            &[("--bpf-dir", &below)],
            "BPF file system",
            &["a BPF file system at --bpf-dir", &below, "mount -t bpf bpf /sys/fs/bpf"],
        ),
        (
            "a folder of another file system",
            &[("--bpf-dir", &elsewhere)],
            "BPF file system",
            &["a BPF file system at --bpf-dir", &elsewhere, "name a folder on one"],
        ),
        (
            "a cgroup that is none",
            &[("--cgroup", &elsewhere)],
            "cgroup2",
            &["a cgroup2 directory at --cgroup", &elsewhere, "--socket-lb off"],
        ),
        (
            "a cgroup that is not there",
            &[("--cgroup", "/nowhere")],
            "options",
            &["--cgroup \"/nowhere\"", "give a directory that exists"],
        ),
        (
            "a kubeconfig that is not there",
            &[("--manifests", ""), ("--kubeconfig", "/nowhere/kubeconfig")],
            "API server",
            &["/nowhere/kubeconfig", "No such file", "give a kubeconfig file"],
        ),
        (
            "a pattern that is none",
            &[("--interfaces", "eth[")],
            "options",
            &[
                "--interfaces \"eth[\"",
                "write a regular expression for interface names",
            ],
        ),
        (
            "a way to tell pods that needs a name",
            &[("--detect-local-mode", "BridgeInterface")],
            "options",
            &[
                "--detect-local-mode",
                "name the bridge that pods are behind with --pod-bridge-interface",
            ],
        ),
        (
            "a value in the file",
            &[("--config", &file)],
            "options",
            &[&file, "conntrack.udpTimeout", "soon", "such as 30s"],
        ),
    ];
    for (what, changes, check, words) in cases {
        node.both_say(
            what,
            |command| node.command(&[], &binary, command, changes),
            check,
            words,
        );
    }
    assert_eq!(
        node.pins(),
        Vec::<String>::new(),
        "something was made before it was refused"
    );
}

#[test]
fn rights_and_mounts_that_are_missing() {
    let node = Node::new();
    let binary = agent::binary().unwrap();
    let documented = ["NET_ADMIN", "BPF", "PERFMON"].map(str::to_owned);
    for missing in &documented {
        let kept = Confinement {
            capabilities: documented.iter().filter(|name| *name != missing).cloned().collect(),
            read_only: Vec::new(),
        };
        let make = |command: &[&str]| {
            let mut command = node.command(&[], &binary, command, &[]);
            kept.apply(&mut command).unwrap();
            command
        };
        let name = format!("the capability CAP_{missing} is missing");
        node.both_say(
            missing,
            make,
            "capabilities",
            &[&name, "securityContext.capabilities.add"],
        );
    }

    // Where another user may go; its folder may be one where root alone may.
    let folder = node.dir.path().join("public");
    fs::create_dir(&folder).unwrap();
    for path in [node.dir.path(), &folder] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let public = folder.join("proxy-agent");
    if fs::hard_link(&binary, &public).is_err() {
        fs::copy(&binary, &public).unwrap();
    }
    let nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    let as_nobody = |command: &[&str]| node.command(&nobody, &public, command, &[]);
    node.both_say(
        "not root",
        as_nobody,
        "capabilities",
        &["CAP_NET_ADMIN is missing", "run it as root"],
    );

    let without_bpf = |command: &[&str]| {
        let mut command = node.command(&[], &binary, command, &[]);
        confine::forbid_bpf(&mut command);
        command
    };
    node.both_say(
        "a seccomp profile",
        without_bpf,
        "bpf()",
        &["the right to call bpf()", "make the container privileged"],
    );

    let unmount = "for place in $(findmnt -n -l -t cgroup2 -o TARGET); do umount -l $place; done; exec \"$@\"";
    let before = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        unmount,
        "sh",
    ];
    let without_cgroup2 = |command: &[&str]| node.command(&before, &binary, command, &[("--cgroup", "")]);
    let words = ["a cgroup2 mount is missing", "mount -t cgroup2", "--socket-lb off"];
    node.both_say("no cgroup2", without_cgroup2, "cgroup2", &words);
    assert_eq!(
        node.pins(),
        Vec::<String>::new(),
        "something was made before it was refused"
    );
}

#[test]
fn another_agent_in_the_same_directory() {
    let mut node = Node::new();
    node.agent.launch().unwrap();
    let other = [
        ("--healthz-bind-address", "127.0.0.1:10356"),
        ("--metrics-bind-address", "127.0.0.1:10349"),
    ];
    let said = node.refuses(node.command(&[], &agent::binary().unwrap(), &["run"], &other));
    let dir = node.agent.bpf_dir().display().to_string();
    for word in [
        "another agent is running with --bpf-dir",
        &dir,
        "a directory of its own",
    ] {
        assert!(said.contains(word), "{said}");
    }
    assert!(node.agent.is_running());
}

/// What may pass, or is not for the agent to decide: it goes on, and says what does not fit.
#[test]
fn what_an_agent_goes_on_with() {
    let mut node = Node::new();
    let netns = node.netns.clone();
    let taken = netns.run(|| std::net::TcpListener::bind(HEALTHZ).unwrap());
    let words = [HEALTHZ, "--healthz-bind-address", "ss -ltnp"];
    node.goes_on_saying("a port that is taken", &[], ("healthz port", "fail"), &words);
    drop(taken);

    let words = ["no interface is chosen by --interfaces wlan.*", "eth0", "whole name"];
    node.goes_on_saying(
        "a pattern of no interface",
        &[("--interfaces", "wlan.*")],
        ("interfaces", "fail"),
        &words,
    );

    let bridge = [
        ("--detect-local-mode", "BridgeInterface"),
        ("--pod-bridge-interface", "br-pods"),
    ];
    let words = ["there is no bridge br-pods", "choose --pod-bridge-interface among"];
    node.goes_on_saying(
        "a bridge that is not there",
        &bridge,
        ("interfaces of pods", "warn"),
        &words,
    );
    let prefix = [
        ("--detect-local-mode", "InterfaceNamePrefix"),
        ("--pod-interface-name-prefix", "cali"),
    ];
    let words = [
        "no interface begins with cali",
        "choose --pod-interface-name-prefix among",
    ];
    node.goes_on_saying(
        "a prefix of no interface",
        &prefix,
        ("interfaces of pods", "warn"),
        &words,
    );
}

/// The agent tries again for ever; commands say at once what is wrong.
#[test]
fn an_api_server_that_is_not_reachable() {
    let node = Node::new();
    let kubeconfig = node.dir.path().join("kubeconfig");
    let text = r#"{"apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:6443", "insecure-skip-tls-verify": true}}],
        "users": [{"name": "c", "user": {"token": "t"}}], "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}]}"#;
    fs::write(&kubeconfig, text).unwrap();
    let source = Source::Kubeconfig(kubeconfig.clone());
    let kubeconfig = kubeconfig.display().to_string();
    let words = ["Connection refused", "is reachable without this proxy"];

    let mut agent = Agent::prepare("node1", &node.netns, &source, &[]).unwrap();
    agent.launch_only().unwrap();
    let waits = || {
        words
            .iter()
            .chain(&["not listed yet, trying again"])
            .all(|word| agent.log().contains(word))
            .then_some(())
    };
    assert!(process::wait_until(PATIENCE, waits).is_some(), "{}", agent.log());
    assert!(agent.is_running() && agent.healthz("/livez").is_ok() && agent.healthz("/readyz").is_err());
    agent.stop();

    let changes = [("--manifests", ""), ("--kubeconfig", kubeconfig.as_str())];
    let binary = agent::binary().unwrap();
    for (command, code) in [(&["verify"][..], 2), (&["run", "--dry-run"], 1)] {
        let output = node.command(&[], &binary, command, &changes).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{command:?}: {said}");
        assert!(words.iter().all(|word| said.contains(word)), "{command:?}: {said}");
    }
    let output = node
        .command(&[], &binary, &["doctor", "-o", "json"], &changes)
        .output()
        .unwrap();
    assert_said("doctor", &output.stdout, "API server", "fail", &words);
}
