//! Who is a pod, in each of the four ways to tell (S114): pods keep their address towards a ClusterIP, everybody else is masqueraded.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::time::Duration;

use proxy_tests::echo;
use proxy_tests::manifests;
use proxy_tests::process::wait_until;
use proxy_tests::service::external;
use proxy_tests::topology::{Host, PodNetwork, Shape};
use proxy_tests::world::{Setup, World, vips};
use serde_json::json;

/// Two nodes and a host outside, with the usual service behind the first pod.
fn world(network: PodNetwork, options: &[&'static str]) -> World {
    let shape = Shape {
        network,
        external: true,
        ..Default::default()
    };
    let options = options.to_vec();
    let world = World::new(&Setup {
        shape,
        options,
        ..Default::default()
    })
    .unwrap();
    world.publish(&["pod1-1"]).unwrap();
    world
}

/// Does the endpoint see the client's own address, in IPv4 and in IPv6?
fn is_kept(client: &Host) -> [bool; 2] {
    vips().map(|vip| client.run(|| echo::tcp(vip)).unwrap().client.ip() == client.address(vip.ip()))
}

fn own_pods_are_told_from_others(network: PodNetwork, options: &[&'static str]) {
    let world = world(network, options);
    assert_eq!(is_kept(world.topology.pod(0, 1)), [true; 2], "{options:?}: a pod");
    assert_eq!(is_kept(external(&world)), [false; 2], "{options:?}: somebody outside");
}

/// S114, S119: by the bridge that pods are behind.
#[test]
fn pods_behind_a_bridge() {
    let options = [
        "--detect-local-mode",
        "BridgeInterface",
        "--pod-bridge-interface",
        "cni0",
    ];
    own_pods_are_told_from_others(PodNetwork::Bridge, &options);
}

/// S114, S119: by the names of their interfaces.
#[test]
fn pods_by_the_names_of_their_interfaces() {
    let options = [
        "--detect-local-mode",
        "InterfaceNamePrefix",
        "--pod-interface-name-prefix",
        "veth",
    ];
    for network in [PodNetwork::Bridge, PodNetwork::PointToPoint] {
        own_pods_are_told_from_others(network, &options);
    }
}

/// S114, S183: by the Node object's prefixes, which may become known while the agent runs, and change.
#[test]
fn pods_by_the_node_object() {
    let world = world(PodNetwork::Bridge, &["--detect-local-mode", "NodeCIDR"]);
    let (pod, outsider) = (world.topology.pod(0, 1), external(&world));
    assert_eq!(
        is_kept(outsider),
        [true; 2],
        "S115: no prefix is known, so nobody is masqueraded"
    );
    for (cidrs, expected) in [
        (json!(["10.244.1.0/24", "fd00:10:244:1::/64"]), [false; 2]),
        (json!(["10.244.1.0/24"]), [false, true]),
    ] {
        let mut node = manifests::node("node1", "zone-a", &[]);
        node["spec"] = json!({"podCIDRs": cidrs});
        world.write("node1", &[node]).unwrap();
        let arrived = wait_until(Duration::from_secs(5), || (is_kept(outsider) == expected).then_some(()));
        assert!(arrived.is_some(), "{cidrs}: somebody outside");
        assert_eq!(is_kept(pod), [true; 2], "{cidrs}: a pod");
    }
}

/// S112, S115: a family without a prefix has no pods, the other one has.
#[test]
fn a_family_without_prefix_masquerades_nobody() {
    let world = world(PodNetwork::Bridge, &["--cluster-cidr", "10.244.0.0/16"]);
    assert_eq!(is_kept(world.topology.pod(0, 1)), [true; 2]);
    assert_eq!(is_kept(external(&world)), [false, true]);
}

/// S111: every connection to a ClusterIP.
#[test]
fn everybody_is_masqueraded_if_asked_for() {
    let world = world(
        PodNetwork::Bridge,
        &["--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48", "--masquerade-all"],
    );
    assert_eq!(is_kept(world.topology.pod(0, 1)), [false; 2]);
    assert_eq!(is_kept(external(&world)), [false; 2]);
}
