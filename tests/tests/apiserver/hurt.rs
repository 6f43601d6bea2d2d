//! Objects that the API server accepts and that are bad, odd or huge: each is skipped as far as it must be, and its neighbours,
//! changed while it is there, do not notice. Addresses that do not parse the server refuses; those come from manifests (`netns_hurtful`).

use std::net::SocketAddr;

use proxy_tests::manifests::{self, port};
use serde_json::{Value, json};

use crate::cluster::{ALPHA, BETA, Cluster, HTTP, TARGET, assert_undisturbed, turn, vip};

/// Two thirds of what etcd accepts in one request. The server takes at most 256 KiB of it as annotations.
const MEGABYTE: usize = 1_000_000;

#[test]
fn one_bad_object_harms_no_other() {
    let cluster = turn();
    let (good, bad) = (vip(20), vip(21));
    cluster.publish("good", good, &[ALPHA]);
    let running = cluster.traffic(good);

    // A slice that says no service (S10), and one of a service that nobody ever makes (S12).
    let mut orphan = cluster.slice("orphan", &[ALPHA]);
    orphan["metadata"]["labels"] = json!({});
    hurt(&cluster, good, "orphan", &[orphan, cluster.slice("nobody", &[ALPHA])]);

    // An address kind that is not for us (S21), with a service that is ours.
    let ip = bad.ip().to_string();
    let names = manifests::slice(
        "bad-names",
        "bad",
        "FQDN",
        &[TARGET],
        vec![manifests::endpoint("a.example.com", "node1")],
    );
    hurt(
        &cluster,
        good,
        "FQDN",
        &[manifests::service("bad", &[&ip], &[HTTP]), names],
    );
    cluster.wait_for(bad, Some(&[]));

    // Endpoints twice, without conditions, without a node, in slices with the same port under other numbers; ports without a
    // number or of a protocol that nobody asked for. One usable endpoint among them is used.
    let alpha = cluster.endpoint(ALPHA);
    let bare = json!({"addresses": [alpha["addresses"][0]]});
    let odd = manifests::slice(
        "bad-odd",
        "bad",
        "IPv4",
        &[TARGET, port("other", "UDP", 1)],
        vec![alpha.clone(), alpha, bare],
    );
    let mut numberless = manifests::slice("bad-port", "bad", "IPv4", &[TARGET], vec![cluster.endpoint(BETA)]);
    numberless["ports"] = json!([{"name": "http", "protocol": "TCP"}]);
    let mut portless = manifests::slice("bad-all", "bad", "IPv4", &[TARGET], vec![cluster.endpoint(BETA)]);
    portless["ports"] = json!([]);
    hurt(&cluster, good, "odd", &[odd, numberless, portless]);
    cluster.wait_for_pods(bad, &[ALPHA]);
    cluster.assert_answered_by(bad, &[ALPHA]);

    // As large as the server takes it: a megabyte that we have no use for.
    let mut large = manifests::service("large", &["10.96.1.22"], &[HTTP]);
    large["metadata"]["annotations"] = json!({"note": "x".repeat(200_000)});
    large["spec"]["selector"] = huge_selector();
    cluster
        .api
        .kubectl_with_input(
            &["create", "-f", "-"],
            &manifests::list(&[large, cluster.slice("large", &[BETA])]),
        )
        .unwrap();
    cluster.wait_for_pods(vip(22), &[BETA]);
    cluster.assert_answered_by(vip(22), &[BETA]);

    assert_undisturbed(running);
    let delete = [
        "delete",
        "endpointslice",
        "bad-names",
        "bad-odd",
        "bad-port",
        "bad-all",
        "orphan-1",
        "nobody-1",
    ];
    cluster.api.kubectl(&delete).unwrap();
    cluster.api.kubectl(&["delete", "service", "bad"]).unwrap();
    cluster.wait_for(bad, None);
    cluster.unpublish("large", vip(22));
    cluster.unpublish("good", good);
}

/// A selector is a map of labels of any number: room for what annotations have no room for.
fn huge_selector() -> Value {
    let labels = (0..MEGABYTE / 80).map(|number| (format!("label-{number:06}"), json!("v".repeat(60))));
    Value::Object(labels.collect())
}

/// Applies bad objects, then changes the good service, which must arrive.
fn hurt(cluster: &Cluster, good: SocketAddr, what: &str, objects: &[Value]) {
    cluster
        .api
        .apply(objects)
        .unwrap_or_else(|error| panic!("{what}: {error:#}"));
    for pods in [&[ALPHA, BETA][..], &[ALPHA]] {
        cluster.api.apply(&[cluster.slice("good", pods)]).unwrap();
        cluster.wait_for_pods(good, pods);
    }
}
