//! A health-check port that somebody else has: an Event on the Service says so, everything else goes on, and once it is free it is
//! served.

use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use proxy_tests::{http, manifests, process};
use serde_json::{Value, json};

use crate::cluster::{ALPHA, Cluster, HTTP, turn, vip};

const TAKEN: u16 = 31_159;
const FREE: u16 = 31_160;
/// The longest time between two tries, and some more for a loaded machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// S159.
#[test]
fn a_port_that_is_taken_is_reported_and_tried_again() {
    let cluster = turn();
    let (vip1, vip2) = (vip(30), vip(31));
    let node = cluster.agent.netns();
    let taken = node
        .run(|| TcpListener::bind(SocketAddr::from(([0, 0, 0, 0], TAKEN))))
        .unwrap();
    for (name, vip, port) in [("taken", vip1, TAKEN), ("free", vip2, FREE)] {
        cluster
            .api
            .apply(&[checked(name, vip, port), cluster.slice(name, &[ALPHA])])
            .unwrap();
    }
    // The other one, and the data path of both, are not held up.
    let ask = |port: u16| node.run(|| http::get(([127, 0, 0, 1], port).into(), "/"));
    let is_served = |port: u16| {
        let answered = || ask(port).is_ok_and(|answer| answer.status == 200).then_some(());
        assert!(
            process::wait_until(PATIENCE, answered).is_some(),
            "S157: {port} says {:?}",
            ask(port)
        );
    };
    is_served(FREE);
    cluster.wait_for_pods(vip1, &[ALPHA]);
    cluster.assert_answered_by(vip1, &[ALPHA]);

    let event = process::wait_until(PATIENCE, || event_of(&cluster, "taken")).expect("an Event on the Service");
    let uid = cluster
        .api
        .kubectl(&["get", "service/taken", "-o", "jsonpath={.metadata.uid}"]);
    assert_eq!(
        event["regarding"]["uid"],
        uid.unwrap(),
        "`kubectl describe` looks for it"
    );
    assert_eq!(event["type"], "Warning");
    assert_eq!(event["reportingController"], "ebpf-proxy");
    assert_eq!(event["reportingInstance"], "node1");
    let note = event["note"].as_str().unwrap();
    assert!(note.contains(&TAKEN.to_string()) && note.contains("in use"), "{note}");
    assert_eq!(event_of(&cluster, "free"), None);

    drop(taken);
    is_served(TAKEN);
    cluster.unpublish("taken", vip1);
    cluster.unpublish("free", vip2);
    assert!(
        process::wait_until(PATIENCE, || ask(TAKEN).is_err().then_some(())).is_some(),
        "a deleted Service's port is closed"
    );
}

fn checked(name: &str, vip: SocketAddr, port: u16) -> Value {
    let mut service = manifests::service(name, &[&vip.ip().to_string()], &[HTTP]);
    service["spec"]["type"] = json!("LoadBalancer");
    service["spec"]["externalTrafficPolicy"] = json!("Local");
    service["spec"]["healthCheckNodePort"] = json!(port);
    service
}

/// The Event about a service's health-check port.
fn event_of(cluster: &Cluster, service: &str) -> Option<Value> {
    let text = cluster
        .api
        .kubectl(&["get", "events.events.k8s.io", "-o", "json"])
        .unwrap();
    let list: Value = serde_json::from_str(&text).unwrap();
    let is_it = |event: &&Value| {
        event["reason"] == "FailedToStartServiceHealthcheck"
            && event["regarding"]["kind"] == "Service"
            && event["regarding"]["name"] == service
    };
    list["items"].as_array().unwrap().iter().find(is_it).cloned()
}
