//! What is wrong between an agent and its API server is told in one sentence, by the commands that do not try again for ever.

use std::process::Output;
use std::time::Duration;

use proxy_tests::apiserver::AGENT_USER;
use proxy_tests::process;
use serde_json::Value;

use crate::cluster::{Cluster, set_rules, turn};

/// The server caches what an account may do.
const CACHED: Duration = Duration::from_secs(10);

fn tool(cluster: &Cluster, command: &[&str], node: &str) -> Output {
    let kubeconfig = cluster.api.agent_kubeconfig().display().to_string();
    let (bpf_dir, cgroup) = (
        cluster.agent.bpf_dir().display().to_string(),
        cluster.agent.cgroup().display().to_string(),
    );
    let options = [
        "--kubeconfig",
        &kubeconfig,
        "--node-name",
        node,
        "--bpf-dir",
        &bpf_dir,
        "--cgroup",
        &cgroup,
    ];
    cluster.agent.tool(&[command, &options].concat()).unwrap()
}

/// What `doctor` says of a check: status, and everything else.
fn doctor(cluster: &Cluster, node: &str, check: &str) -> (String, String) {
    let output = tool(cluster, &["doctor", "-o", "json"], node);
    let found: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let said = found.iter().find(|one| one["check"] == check);
    let said = said.unwrap_or_else(|| panic!("{check}: {found:#?}"));
    let text = |field: &str| said[field].as_str().unwrap().to_owned();
    (text("status"), format!("{}: {}", text("found"), text("remedy")))
}

/// Every kind in turn. An agent goes on without ServiceCIDRs; what it says then: `networks.rs`, and of the others: `outage.rs`.
#[test]
fn rights_that_are_missing_are_named() {
    let cluster = turn();
    let node = &cluster.node().name;
    let args = ["get", "clusterrole/proxy-agent", "-o", "jsonpath={.rules}"];
    let rules: Vec<Value> = serde_json::from_str(&cluster.api.kubectl(&args).unwrap()).unwrap();
    for (resource, check, status) in [
        ("services", "access to Services", "fail"),
        ("endpointslices", "access to EndpointSlices", "fail"),
        ("nodes", "access to Nodes", "fail"),
        ("servicecidrs", "access to ServiceCIDRs", "warn"),
    ] {
        assert_eq!(doctor(&cluster, node, check).0, "ok", "{check}");
        let fewer: Vec<Value> = rules
            .iter()
            .filter(|rule| rule["resources"][0] != resource)
            .cloned()
            .collect();
        assert!(fewer.len() < rules.len());
        set_rules(&cluster, &fewer);
        let said = process::wait_until(CACHED, || {
            Some(doctor(&cluster, node, check)).filter(|said| said.0 != "ok")
        });
        let verified = tool(&cluster, &["verify"], node);
        set_rules(&cluster, &rules);
        let (found, sentence) = said.unwrap_or_else(|| panic!("{check} is still ok"));
        assert_eq!(found, status, "{sentence}");
        for part in [resource, AGENT_USER, "allow list and watch in the ClusterRole"] {
            assert!(sentence.contains(part), "{part}: {sentence}");
        }
        if status == "fail" {
            let error = String::from_utf8_lossy(&verified.stderr).into_owned();
            assert_eq!(verified.status.code(), Some(2), "{error}");
            assert!(
                error.contains(check) && error.contains("allow list and watch"),
                "{error}"
            );
        }
        process::wait_until(CACHED, || (doctor(&cluster, node, check).0 == "ok").then_some(())).expect("rights again");
    }
}

#[test]
fn a_name_that_no_node_has_is_noticed() {
    let cluster = turn();
    let sentence = "what `kubectl get nodes` shows";
    let (status, said) = doctor(&cluster, "nobody", "Node object");
    assert_eq!(status, "warn");
    assert!(
        said.contains("there is no Node nobody") && said.contains(sentence),
        "{said}"
    );
    // What an agent logs when it has listed everything.
    let output = tool(&cluster, &["run", "--dry-run"], "nobody");
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{log}");
    assert!(
        log.contains("no object of this name") && log.contains("nobody") && log.contains(sentence),
        "{log}"
    );
    let node = &cluster.node().name;
    assert_eq!(doctor(&cluster, node, "Node object").0, "ok");
    let output = tool(&cluster, &["run", "--dry-run"], node);
    assert!(!String::from_utf8_lossy(&output.stderr).contains("no object of this name"));
}
