//! What a real kubelet and containerd make of the chart's `securityContext`: the kernel says of the agent's process what the chart
//! asks for, and no more.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;

use proxy_tests::confine;
use proxy_tests::kubernetes::Machine;
use proxy_tests::kubernetes::objects::agent_objects;
use proxy_tests::manifests;

use crate::{Cluster, SHARED};

/// What `/proc/<pid>/status` says.
type Status = BTreeMap<String, String>;

/// The capabilities that the chart adds to none, as bits.
fn asked_for() -> u64 {
    let objects = manifests::documents(&agent_objects(&[]).unwrap()).unwrap();
    let pods = objects.iter().find(|object| object["kind"] == "DaemonSet").unwrap();
    let context = &pods["spec"]["template"]["spec"]["containers"][0]["securityContext"];
    assert_eq!(context["capabilities"]["drop"], serde_json::json!(["ALL"]));
    let names: Vec<String> = serde_json::from_value(context["capabilities"]["add"].clone()).unwrap();
    names.iter().map(|name| 1 << confine::number(name).unwrap()).sum()
}

fn agent_of(machine: &Machine) -> u32 {
    machine.process("proxy-agent", "run").unwrap()
}

fn status(pid: u32) -> Status {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect()
}

fn capabilities(status: &Status, set: &str) -> u64 {
    u64::from_str_radix(&status[set], 16).unwrap()
}

/// Is this path of the process on a file system that it cannot write, whatever its rights?
fn is_read_only(pid: u32, path: &str) -> bool {
    let file = format!("/proc/{pid}/root{path}/ebpf-proxy-test");
    match File::create(&file) {
        Err(error) => error.kind() == ErrorKind::ReadOnlyFilesystem,
        Ok(_) => {
            fs::remove_file(file).unwrap();
            false
        }
    }
}

/// The default profile of the runtime holds the agent, where the kernel has AppArmor.
fn assert_profile(pid: u32) {
    let has_apparmor =
        fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.starts_with('Y'));
    if !has_apparmor {
        eprintln!("not shown: this kernel has no AppArmor");
        return;
    }
    let profile = fs::read_to_string(format!("/proc/{pid}/attr/current")).unwrap();
    assert!(profile.contains("cri-containerd.apparmor.d (enforce)"), "{profile}");
}

fn assert_confined(cluster: &Cluster) {
    let wanted = asked_for();
    for machine in &cluster.kubernetes.machines {
        let pid = agent_of(machine);
        let status = status(pid);
        // 2: system calls are filtered.
        assert_eq!(status["Seccomp"], "2", "{}", machine.name());
        assert_eq!(status["NoNewPrivs"], "1", "{}", machine.name());
        for set in ["CapEff", "CapPrm", "CapBnd"] {
            let has = capabilities(&status, set);
            assert_eq!(
                has,
                wanted,
                "{}: {set} is {has:x}, the chart asks for {wanted:x}",
                machine.name()
            );
        }
        for path in ["", "/host/cgroup"] {
            assert!(is_read_only(pid, path), "{}: {path}/ can be written", machine.name());
        }
        assert!(Path::new(&format!("/proc/{pid}/root/host/bpf/ebpf-proxy")).is_dir());
        assert_profile(pid);
    }
}

/// With `seccompProfile: RuntimeDefault` applied the agent loads and attaches its programs: every other test of this file runs so.
#[test]
fn the_kernel_holds_the_agent_to_what_the_chart_says() {
    let cluster = SHARED.turn();
    assert_confined(&cluster);
    cluster.nothing_failed(cluster.load());
}

/// `privileged: true`, and back: each is installed over the other.
#[test]
fn privileged_installs_and_runs() {
    let cluster = SHARED.turn();
    cluster.kubernetes.install_agent(&["privileged=true"]).unwrap();
    for machine in &cluster.kubernetes.machines {
        let pid = agent_of(machine);
        let status = status(pid);
        assert_eq!(status["Seccomp"], "0", "{}", machine.name());
        let (has, least) = (
            capabilities(&status, "CapEff"),
            1 << confine::number("SYS_ADMIN").unwrap() | asked_for(),
        );
        assert_eq!(has & least, least, "{}: {has:x}", machine.name());
        assert!(is_read_only(pid, ""), "{}", machine.name());
    }
    cluster.kubernetes.install_agent(&[]).unwrap();
    assert_confined(&cluster);
    cluster.nothing_failed(cluster.load());
}
