//! ServiceCIDRs: those that the API server makes itself, others, and servers that do not tell about them (S78).

use std::time::Duration;

use proxy_tests::apiserver::AGENT_USER;
use proxy_tests::process;
use serde_json::{Value, json};

use crate::cluster::{ALPHA, assert_undisturbed, set_rules, turn, vip};

const MORE: &str = "10.98.7.0/24";

#[test]
fn service_networks_come_and_go() {
    let cluster = turn();
    let list = |networks: &[&str]| format!("service networks networks=[{}]", networks.join(", "));
    // What the server itself was started with.
    cluster.wait_for_log(0, &list(&["10.96.0.0/16", "fd00:96::/112"]));
    let said = cluster.agent.log().len();
    let object = json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "more"},
        "spec": {"cidrs": [MORE]}});
    cluster.api.apply(&[object]).unwrap();
    cluster.wait_for_log(said, &list(&["10.96.0.0/16", MORE, "fd00:96::/112"]));
    let said = cluster.agent.log().len();
    cluster.api.kubectl(&["delete", "servicecidr/more"]).unwrap();
    cluster.wait_for_log(said, &list(&["10.96.0.0/16", "fd00:96::/112"]));
}

/// S78, S160: an agent that may not see them goes on without, says once why, and finds them when it may.
#[test]
fn service_networks_may_be_forbidden() {
    let mut cluster = turn();
    let vip = vip(30);
    cluster.publish("forbidden", vip, &[ALPHA]);
    let running = cluster.traffic(vip);
    cluster.agent.kill();
    let args = ["get", "clusterrole/proxy-agent", "-o", "jsonpath={.rules}"];
    let rules: Vec<Value> = serde_json::from_str(&cluster.api.kubectl(&args).unwrap()).unwrap();
    let of_networks = |rule: &Value| rule["resources"][0] == "servicecidrs";
    let fewer: Vec<Value> = rules.iter().filter(|rule| !of_networks(rule)).cloned().collect();
    assert!(fewer.len() < rules.len());
    set_rules(&cluster, &fewer);
    let may = [
        "auth",
        "can-i",
        "list",
        "servicecidrs.networking.k8s.io",
        "--as",
        AGENT_USER,
    ];
    process::wait_until(Duration::from_secs(10), || {
        cluster.api.kubectl(&may).is_err().then_some(())
    })
    .expect("the server forgets the right");
    let said = cluster.agent.log().len();
    cluster.agent.launch().unwrap();
    cluster.wait_for_log(said, "add servicecidrs of networking.k8s.io to the agent's ClusterRole");
    assert!(!cluster.agent.log()[said..].contains("service networks"));
    set_rules(&cluster, &rules);
    cluster.wait_for_log(said, "service networks networks=[10.96.0.0/16");
    assert_eq!(cluster.agent.log()[said..].matches("may not be listed").count(), 1);
    cluster.assert_answered_by(vip, &[ALPHA]);
    assert_undisturbed(running);
    cluster.unpublish("forbidden", vip);
}
