//! The own Node appears, changes and goes while the agent runs (S171): it never waits for it and never has to be started again.

use proxy_tests::echo::{self, Failure};
use proxy_tests::manifests;
use proxy_tests::process;
use serde_json::{Value, json};

use crate::cluster::{ALPHA, ARRIVAL, BETA, CLIENT, Cluster, HTTP, TARGET, assert_undisturbed, turn, vip};

const NODE_PORT: u16 = 30_171;
/// An address that the node does not have.
const ELSEWHERE: &str = "192.0.2.171";

#[test]
fn the_agent_is_there_before_its_node() {
    let mut cluster = turn();
    let vip = vip(31);
    let node = cluster.node().name.clone();
    let mut endpoints = [ALPHA, BETA].map(|pod| cluster.endpoint(pod));
    for (endpoint, zone) in endpoints.iter_mut().zip(["near", "far"]) {
        endpoint["hints"] = json!({"forZones": [{"name": zone}]});
    }
    let mut service = manifests::service("early", &[&vip.ip().to_string()], &[HTTP]);
    service["spec"]["type"] = json!("NodePort");
    service["spec"]["ports"][0]["nodePort"] = json!(NODE_PORT);
    let slice = manifests::slice("early-1", "early", "IPv4", &[TARGET], endpoints.into());
    cluster.agent.kill();
    cluster.api.kubectl(&["delete", "node", &node]).unwrap();
    cluster.api.apply(&[service, slice]).unwrap();

    // No Node: services work all the same, on every address, without zones.
    cluster.agent.launch().unwrap();
    cluster.wait_for_pods(vip, &[ALPHA, BETA]);
    cluster.assert_answered_by(vip, &[ALPHA, BETA]);
    expect_node_port(&cluster, true);
    let running = cluster.traffic(vip);

    // The Node appears: its zone and its primary address count from now on.
    let labels = json!({"topology.kubernetes.io/zone": "near"});
    cluster
        .api
        .apply(&[json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node, "labels": labels}})])
        .unwrap();
    cluster.wait_for_pods(vip, &[ALPHA]);
    set_addresses(&cluster, json!([{"type": "InternalIP", "address": ELSEWHERE}]));
    expect_node_port(&cluster, false);

    // Its address changes (S184: an internal one before an external one).
    let own = cluster.node().v4.to_string();
    set_addresses(
        &cluster,
        json!([{"type": "ExternalIP", "address": ELSEWHERE}, {"type": "InternalIP", "address": own}]),
    );
    expect_node_port(&cluster, true);

    // It is moved to another zone, and deleted: as before it was there.
    let zone = ["label", "node", &node, "--overwrite", "topology.kubernetes.io/zone=far"];
    cluster.api.kubectl(&zone).unwrap();
    cluster.wait_for_pods(vip, &[BETA]);
    set_addresses(&cluster, json!([{"type": "InternalIP", "address": ELSEWHERE}]));
    expect_node_port(&cluster, false);
    cluster.api.kubectl(&["delete", "node", &node]).unwrap();
    cluster.wait_for_pods(vip, &[ALPHA, BETA]);
    expect_node_port(&cluster, true);

    assert_undisturbed(running);
    cluster.unpublish("early", vip);
    cluster
        .api
        .apply(&[json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}})])
        .unwrap();
}

fn set_addresses(cluster: &Cluster, addresses: Value) {
    let node = cluster.node().name.clone();
    // As a whole: the API merges addresses by type otherwise.
    let patch = json!({"status": {"addresses": addresses}}).to_string();
    let args = [
        "patch",
        "node",
        &node,
        "--subresource=status",
        "--type=merge",
        "-p",
        &patch,
    ];
    cluster.api.kubectl(&args).unwrap();
}

/// Waits until the node's own address serves the node port, or refuses it.
fn expect_node_port(cluster: &Cluster, served: bool) {
    let [address, _] = cluster.node().sockets(NODE_PORT);
    let ask = || cluster.pod(CLIENT).run(|| echo::tcp(address));
    let expected = process::wait_until(ARRIVAL, || match ask() {
        Ok(_) => served.then_some(()),
        Err(Failure::Refused) => (!served).then_some(()),
        Err(_) => None,
    });
    assert!(
        expected.is_some(),
        "served: {served}, but it answers {:?}",
        ask().map(|answer| answer.server)
    );
}
