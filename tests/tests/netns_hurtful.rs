//! Objects made to hurt: none of them stops the agent or harms another service.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::net::SocketAddr;

use proxy_common::addr::Protocol;
use proxy_tests::echo::{self, Failure};
use proxy_tests::manifests::{self, port};
use proxy_tests::topology::{CLUSTER_CIDR, Shape};
use proxy_tests::world::{ECHO, Setup, World, answered_by, names, vips};
use serde_json::{Value, json};

const VICTIM: &str = "10.96.0.66";
const HTTP: [manifests::Port; 1] = [port("http", "TCP", 80)];
const BACK: [manifests::Port; 1] = [port("http", "TCP", ECHO)];

fn world() -> World {
    let shape = Shape {
        nodes: 1,
        pods_per_node: 3,
        ..Default::default()
    };
    let world = World::new(&Setup {
        shape,
        options: vec!["--cluster-cidr", CLUSTER_CIDR],
        ..Default::default()
    })
    .unwrap();
    world.publish(&["pod1-2"]).unwrap();
    world
}

fn victim() -> SocketAddr {
    SocketAddr::new(VICTIM.parse().unwrap(), 80)
}

fn address(world: &World, pod: usize) -> String {
    world.topology.pod(0, pod).v4.to_string()
}

/// The neighbouring service still works, new services still arrive, and the agent lives.
#[track_caller]
fn assert_unharmed(world: &mut World, round: u16) {
    let client = world.topology.pod(0, 0);
    for vip in vips() {
        assert_eq!(
            client.run(|| answered_by(5, "TCP to the service", || echo::tcp(vip))),
            names(&["pod1-2"])
        );
    }
    let fresh = SocketAddr::new("10.96.0.77".parse().unwrap(), round);
    let objects = [
        manifests::service("fresh", &["10.96.0.77"], &[port("http", "TCP", round)]),
        manifests::slice(
            "fresh-1",
            "fresh",
            "IPv4",
            &BACK,
            vec![manifests::endpoint(address(world, 1), "node1")],
        ),
    ];
    world.write("fresh", &objects).unwrap();
    world
        .wait_for(
            fresh,
            Protocol::Tcp,
            Some(&[SocketAddr::new(world.topology.pod(0, 1).v4.into(), ECHO)]),
        )
        .unwrap();
    assert!(world.agents[0].is_running(), "{}", world.agents[0].log());
}

fn service() -> Value {
    manifests::service("victim", &[VICTIM], &HTTP)
}

/// S19, S20, S22, S23, S29: what cannot be used is skipped, the rest of the same objects is used.
#[test]
fn broken_endpoints_are_skipped_one_by_one() {
    let mut world = world();
    let good = address(&world, 2);
    let endpoints = vec![
        json!({"addresses": ["not an address"], "nodeName": "node1"}),
        json!({"addresses": ["fd00:10:244:1::2"], "nodeName": "node1"}),
        json!({"addresses": []}),
        json!({"addresses": ["10.244.1.999"]}),
        json!({"addresses": [""], "conditions": {}}),
        json!({"addresses": ["999.1.1.1", good]}),
        manifests::endpoint(&good, "node1"),
    ];
    let slice = manifests::slice("victim-1", "victim", "IPv4", &BACK, endpoints);
    world.write("victim", &[service(), slice]).unwrap();
    let backend = SocketAddr::new(good.parse().unwrap(), ECHO);
    world.wait_for(victim(), Protocol::Tcp, Some(&[backend])).unwrap();
    assert_eq!(
        world.topology.pod(0, 0).run(|| echo::tcp(victim())).unwrap().server,
        "pod1-3"
    );
    assert_unharmed(&mut world, 81);
}

/// S46: conditions that are absent or null mean ready.
#[test]
fn absent_conditions_mean_ready() {
    let mut world = world();
    let shapes = [
        json!({}),
        json!({"conditions": null}),
        json!({"conditions": {"ready": null, "serving": null}}),
    ];
    for (i, shape) in shapes.into_iter().enumerate() {
        let mut endpoint = shape;
        endpoint["addresses"] = json!([address(&world, 2)]);
        let slice = manifests::slice("victim-1", "victim", "IPv4", &BACK, vec![endpoint]);
        world.write("victim", &[service(), slice]).unwrap();
        let backend = SocketAddr::new(world.topology.pod(0, 2).v4.into(), ECHO);
        world.wait_for(victim(), Protocol::Tcp, Some(&[backend])).unwrap();
        assert_unharmed(&mut world, 90 + i as u16);
        world.manifests.remove("victim").unwrap();
        world.wait_for(victim(), Protocol::Tcp, None).unwrap();
    }
}

/// S12: slices before their Service, Services before their slices, and either gone first.
#[test]
fn slices_and_services_come_in_any_order() {
    let mut world = world();
    let slice = manifests::slice(
        "victim-1",
        "victim",
        "IPv4",
        &BACK,
        vec![manifests::endpoint(address(&world, 2), "node1")],
    );
    let backend = SocketAddr::new(world.topology.pod(0, 2).v4.into(), ECHO);
    world.write("slices", &[slice]).unwrap();
    assert_unharmed(&mut world, 81);
    world.write("services", &[service()]).unwrap();
    world.wait_for(victim(), Protocol::Tcp, Some(&[backend])).unwrap();
    world.manifests.remove("slices").unwrap();
    world.wait_for(victim(), Protocol::Tcp, Some(&[])).unwrap();
    assert_eq!(
        world.topology.pod(0, 0).run(|| echo::tcp(victim())),
        Err(Failure::Refused)
    );
    world.manifests.remove("services").unwrap();
    world.wait_for(victim(), Protocol::Tcp, None).unwrap();
    assert_unharmed(&mut world, 82);
}

/// S40, S42: an endpoint that stands in several slices counts once.
#[test]
fn duplicates_count_once() {
    let mut world = world();
    let endpoint = || manifests::endpoint(address(&world, 2), "node1");
    let slice = |name: &str| manifests::slice(name, "victim", "IPv4", &BACK, vec![endpoint(), endpoint()]);
    world
        .write("victim", &[service(), slice("victim-1"), slice("victim-2")])
        .unwrap();
    let backend = SocketAddr::new(world.topology.pod(0, 2).v4.into(), ECHO);
    world.wait_for(victim(), Protocol::Tcp, Some(&[backend])).unwrap();
    assert_unharmed(&mut world, 81);
}

/// S31: a port renamed on one side only has no endpoints and refuses until the other side follows.
#[test]
fn a_renamed_port_refuses_until_slices_follow() {
    let mut world = world();
    let endpoint = manifests::endpoint(address(&world, 2), "node1");
    let slice = |port_name| {
        manifests::slice(
            "victim-1",
            "victim",
            "IPv4",
            &[port(port_name, "TCP", ECHO)],
            vec![endpoint.clone()],
        )
    };
    let renamed = manifests::service("victim", &[VICTIM], &[port("web", "TCP", 80)]);
    let backend = SocketAddr::new(world.topology.pod(0, 2).v4.into(), ECHO);
    world.write("victim", &[service(), slice("http")]).unwrap();
    world.wait_for(victim(), Protocol::Tcp, Some(&[backend])).unwrap();
    world.write("victim", &[renamed.clone(), slice("http")]).unwrap();
    world.wait_for(victim(), Protocol::Tcp, Some(&[])).unwrap();
    assert_eq!(
        world.topology.pod(0, 0).run(|| echo::tcp(victim())),
        Err(Failure::Refused)
    );
    world.write("victim", &[renamed, slice("web")]).unwrap();
    world.wait_for(victim(), Protocol::Tcp, Some(&[backend])).unwrap();
    assert_unharmed(&mut world, 81);
}

/// Empty slices, slices without ports or labels, addresses that are none, and files that are no YAML (S5, S10, S19, S29).
#[test]
fn useless_objects_are_passed_over() {
    let mut world = world();
    let mut unlabelled = manifests::slice("lost", "x", "IPv4", &BACK, vec![]);
    unlabelled["metadata"]["labels"] = Value::Null;
    let mut null_port = manifests::slice(
        "null-port",
        "victim",
        "IPv4",
        &BACK,
        vec![manifests::endpoint("10.244.1.2", "node1")],
    );
    null_port["ports"] = json!([{"name": null, "port": null}, {"name": "http", "port": 0, "protocol": "TCP"}]);
    let mut bad_ip = manifests::service("bad-ip", &["10.96.0.300"], &HTTP);
    bad_ip["spec"]["externalIPs"] = json!(["nonsense"]);
    let objects = [
        service(),
        manifests::slice("empty", "victim", "IPv4", &[], vec![]),
        manifests::slice(
            "fqdn",
            "victim",
            "FQDN",
            &BACK,
            vec![manifests::endpoint("example.org", "node1")],
        ),
        null_port,
        unlabelled,
        bad_ip,
        manifests::service("headless", &["None"], &HTTP),
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "nothing", "namespace": "default"}}),
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "other", "namespace": "default"}}),
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": {"name": "bare"}}),
        json!({"kind": "Service"}),
    ];
    for (i, object) in objects.iter().enumerate() {
        world
            .write(&format!("useless-{i}"), std::slice::from_ref(object))
            .unwrap();
    }
    world
        .manifests
        .write_text("broken.yaml", "kind: Service\n  metadata: [\n")
        .unwrap();
    world.manifests.write_text("binary.json", "\u{0}\u{1}\u{2}{").unwrap();
    world.manifests.write_text("README.txt", "not an object").unwrap();
    world
        .manifests
        .write_text(
            "many.yaml",
            "---\n---\n# nothing\n---\nkind: 7\n---\napiVersion: v1\nkind: List\nitems: 3\n",
        )
        .unwrap();
    world.wait_for(victim(), Protocol::Tcp, Some(&[])).unwrap();
    assert_unharmed(&mut world, 81);
}

/// An object of five megabytes, far beyond what an API server takes.
#[test]
fn a_huge_object_is_survived() {
    let mut world = world();
    let mut huge = service();
    huge["metadata"]["annotations"] = json!({"example.org/blob": "x".repeat(5_000_000)});
    let endpoints = (0..20_000u32).map(|i| manifests::endpoint(format!("10.250.{}.{}", i / 250, i % 250 + 1), "node1"));
    let slice = manifests::slice("victim-1", "victim", "IPv4", &BACK, endpoints.collect());
    assert!(slice.to_string().len() > 2_000_000);
    world.write("victim", &[huge, slice]).unwrap();
    let all: Vec<SocketAddr> = (0..20_000u32)
        .map(|i| format!("10.250.{}.{}:{ECHO}", i / 250, i % 250 + 1).parse().unwrap())
        .collect();
    world.wait_for(victim(), Protocol::Tcp, Some(&all)).unwrap();
    assert_unharmed(&mut world, 81);
}
