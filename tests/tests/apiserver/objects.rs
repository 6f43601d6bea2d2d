//! Objects come, change and go: what kubectl writes is what connections meet.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};

use proxy_tests::manifests;
use proxy_tests::topology::ANY_ADDRESS;
use serde_json::{Value, json};

use crate::cluster::{ALPHA, BETA, Cluster, ECHO, HTTP, TARGET, turn, vip};

#[test]
fn a_service_comes_changes_and_goes() {
    let cluster = turn();
    let vip = vip(1);
    cluster.publish("life", vip, &[ALPHA, BETA]);
    let kubectl = |args: &[&str]| cluster.api.kubectl(args).unwrap();

    // An endpoint leaves, and comes back.
    cluster.api.apply(&[cluster.slice("life", &[BETA])]).unwrap();
    cluster.wait_for_pods(vip, &[BETA]);
    cluster.assert_answered_by(vip, &[BETA]);
    cluster.api.apply(&[cluster.slice("life", &[ALPHA, BETA])]).unwrap();
    cluster.wait_for_pods(vip, &[ALPHA, BETA]);

    // The last slice goes (refused), another one comes.
    kubectl(&["delete", "endpointslice/life-1"]);
    cluster.wait_for(vip, Some(&[]));
    cluster.request(vip).unwrap_err();
    cluster.api.apply(&[cluster.slice("life", &[ALPHA])]).unwrap();
    cluster.wait_for_pods(vip, &[ALPHA]);
    cluster.assert_answered_by(vip, &[ALPHA]);

    // A service that is deleted before its slices leaves nothing (S12), and comes back with them under another address (S24).
    kubectl(&["delete", "service/life"]);
    cluster.wait_for(vip, None);
    cluster.request(vip).unwrap_err();
    cluster.wait_until_forgotten("life");
    let other = crate::cluster::vip(2);
    cluster
        .api
        .apply(&[manifests::service("life", &[&other.ip().to_string()], &[HTTP])])
        .unwrap();
    cluster.wait_for_pods(other, &[ALPHA]);
    cluster.assert_answered_by(other, &[ALPHA]);
    assert_eq!(cluster.backends(vip), None);
    cluster.unpublish("life", other);
}

/// Both families from one Service, as the API server completes it.
#[test]
fn a_dual_stack_service_answers_in_both_families() {
    let cluster = turn();
    let ips = ["10.96.1.3", "fd00:96::103"];
    let alpha = cluster.pod(ALPHA);
    let endpoints = [(alpha.v4.into(), "node1"), (alpha.v6.into(), "node1")];
    let mut objects = vec![manifests::service("dual", &ips, &[HTTP])];
    objects.extend(manifests::slices("dual", &[TARGET], &endpoints));
    cluster.api.apply(&objects).unwrap();
    for (ip, target) in ips.iter().zip(alpha.sockets(ECHO)) {
        let vip = SocketAddr::new(ip.parse().unwrap(), HTTP.number);
        cluster.wait_for(vip, Some(&[target]));
        cluster.assert_answered_by(vip, &[ALPHA]);
    }
    cluster.api.kubectl(&["delete", "service/dual"]).unwrap();
    for ip in ips {
        cluster.wait_for(SocketAddr::new(ip.parse().unwrap(), HTTP.number), None);
    }
}

/// S1–S4: the labels that say "not ours", on live objects, both ways.
#[test]
fn labels_take_objects_away_and_give_them_back() {
    let cluster = turn();
    let vip = vip(4);
    cluster.publish("label", vip, &[ALPHA]);
    let label = |object: &str, label: &str| cluster.api.kubectl(&["label", object, label]).unwrap();
    for key in [
        "service.kubernetes.io/service-proxy-name",
        "service.kubernetes.io/headless",
    ] {
        for value in ["", "other"] {
            // The Service: no frontend.
            label("service/label", &format!("{key}={value}"));
            cluster.wait_for(vip, None);
            cluster.request(vip).unwrap_err();
            label("service/label", &format!("{key}-"));
            cluster.wait_for_pods(vip, &[ALPHA]);
            cluster.request(vip).unwrap();
        }
        // The slice: no endpoints.
        label("endpointslice/label-1", &format!("{key}="));
        cluster.wait_for(vip, Some(&[]));
        cluster.request(vip).unwrap_err();
        label("endpointslice/label-1", &format!("{key}-"));
        cluster.wait_for_pods(vip, &[ALPHA]);
        cluster.request(vip).unwrap();
    }
    cluster.unpublish("label", vip);
}

/// S6, S7: ExternalName and back.
#[test]
fn a_service_changes_its_type() {
    let cluster = turn();
    let vip = vip(5);
    cluster.publish("kind", vip, &[ALPHA]);
    let patch = |patch: Value| {
        let patch = patch.to_string();
        cluster
            .api
            .kubectl(&["patch", "service/kind", "--type=merge", "-p", &patch])
            .unwrap();
    };
    for _ in 0..2 {
        patch(
            json!({"spec": {"type": "ExternalName", "externalName": "example.com", "clusterIP": null, "clusterIPs": null,
            "ipFamilies": null, "ipFamilyPolicy": null}}),
        );
        cluster.wait_for(vip, None);
        cluster.request(vip).unwrap_err();
        let ip = vip.ip().to_string();
        patch(json!({"spec": {"type": "ClusterIP", "externalName": null, "clusterIP": ip, "clusterIPs": [ip]}}));
        cluster.wait_for_pods(vip, &[ALPHA]);
        cluster.assert_answered_by(vip, &[ALPHA]);
    }
    cluster.unpublish("kind", vip);
}

/// S32: a port comes and goes; the other one does not notice.
#[test]
fn ports_come_and_go_on_a_live_service() {
    let cluster = turn();
    let vip = vip(6);
    cluster.publish("ports", vip, &[ALPHA]);
    let running = cluster.traffic(vip);
    let second = SocketAddr::new(vip.ip(), 81);
    let ip = vip.ip().to_string();
    let more = manifests::port("more", "TCP", 81);
    cluster
        .api
        .apply(&[manifests::service("ports", &[&ip], &[HTTP, more])])
        .unwrap();
    cluster.wait_for(second, Some(&[]));
    let mut slice = cluster.slice("ports", &[ALPHA]);
    slice["ports"] = json!([
        {"name": "http", "protocol": "TCP", "port": ECHO},
        {"name": "more", "protocol": "TCP", "port": ECHO},
    ]);
    cluster.api.apply(&[slice]).unwrap();
    cluster.wait_for_pods(second, &[ALPHA]);
    cluster.assert_answered_by(second, &[ALPHA]);
    cluster
        .api
        .apply(&[manifests::service("ports", &[&ip], &[HTTP])])
        .unwrap();
    cluster.wait_for(second, None);
    crate::cluster::assert_undisturbed(running);
    cluster.unpublish("ports", vip);
}

/// S39: no maximum; ten slices of a hundred endpoints each, written in one go.
#[test]
fn a_thousand_endpoints_in_ten_slices_are_all_used() {
    let cluster = turn();
    let vip = vip(7);
    let all: Vec<Ipv4Addr> = (0..1000u16).map(many).collect();
    let mut objects = vec![manifests::service("many", &[&vip.ip().to_string()], &[HTTP])];
    for (number, part) in all.chunks(100).enumerate() {
        let endpoints = part.iter().map(|ip| manifests::endpoint(ip, "node1")).collect();
        objects.push(manifests::slice(
            &format!("many-{number}"),
            "many",
            "IPv4",
            &[TARGET],
            endpoints,
        ));
    }
    cluster.api.apply(&objects).unwrap();
    let targets: Vec<_> = all.iter().map(|ip| SocketAddr::new((*ip).into(), ECHO)).collect();
    cluster.wait_for(vip, Some(&targets));
    assert_eq!(listed(&cluster, "default/many"), targets.iter().copied().collect());
    assert_eq!(cluster.request(vip).unwrap(), "many");

    // One slice less: a hundred less, and the rest stays.
    cluster.api.kubectl(&["delete", "endpointslice/many-3"]).unwrap();
    let rest: Vec<_> = [&targets[..300], &targets[400..]].concat();
    cluster.wait_for(vip, Some(&rest));
    assert_eq!(listed(&cluster, "default/many").len(), 900);
    assert_eq!(cluster.request(vip).unwrap(), "many");
    cluster.api.kubectl(&["delete", "service/many"]).unwrap();
    cluster.wait_for(vip, None);
    let of_many = "kubernetes.io/service-name=many";
    cluster
        .api
        .kubectl(&["delete", "endpointslices", "-l", of_many])
        .unwrap();
}

/// An address of [`ANY_ADDRESS`].
fn many(number: u16) -> Ipv4Addr {
    let first: Ipv4Addr = ANY_ADDRESS.split('/').next().unwrap().parse().unwrap();
    Ipv4Addr::from(u32::from(first) + 1 + u32::from(number))
}

/// The backends of a service as the agent's own command shows them.
fn listed(cluster: &Cluster, service: &str) -> BTreeSet<SocketAddr> {
    let text = cluster
        .agent
        .command(&["backend", "list", "-o", "json", "--service", service])
        .unwrap();
    let rows: Vec<Value> = serde_json::from_str(&text).unwrap();
    let address = |row: &Value| -> SocketAddr {
        let ip = row["address"].as_str().unwrap().parse().unwrap();
        SocketAddr::new(ip, row["port"].as_u64().unwrap() as u16)
    };
    rows.iter().map(address).collect()
}
