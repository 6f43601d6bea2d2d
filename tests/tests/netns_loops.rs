//! What no service answers must not travel between nodes and router until its hop limit ends it (S77–S79): undefined ports of every
//! kind of service address, addresses of the service network that nobody has, and pings. The router sends all service networks
//! back to the nodes, as real networks do, and counts what it forwards.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use proxy_tests::echo::{self, Client, Failure};
use proxy_tests::manifests;
use proxy_tests::sniff::Counter;
use proxy_tests::topology::{CLUSTER_CIDR, Host, PodNetwork, Shape};
use proxy_tests::world::{CLUSTER_IPS, ENDPOINT_PORTS, SERVICE_PORTS, Setup, World};
use serde_json::json;

/// Load-balancer and external addresses, which nobody has on an interface.
const LB: [&str; 2] = ["203.0.113.10", "2001:db8:113::10"];
const EXTERNAL_IP: [&str; 2] = ["203.0.113.250", "2001:db8:113::250"];
/// Addresses of the service networks that no Service has.
const UNALLOCATED: [&str; 2] = ["10.96.77.7", "fd00:96::7777"];
const UNDEFINED: u16 = 81;
/// Shorter than the first retransmission of a SYN.
const PATIENCE: Duration = Duration::from_millis(300);
/// How often the router may forward one packet: from a sender to a node, and if that node has sent it on, once back.
const MOST: usize = 2;

/// Two nodes with different pod networks behind a router, one service with all kinds of addresses.
fn world() -> World {
    let mut world = World::new(&Setup {
        shape: Shape {
            networks: vec![PodNetwork::Bridge, PodNetwork::PointToPoint],
            router: true,
            ..Default::default()
        },
        options: vec!["--cluster-cidr", CLUSTER_CIDR],
        without_agents: true,
    })
    .unwrap();
    let router = world.topology.router.as_ref().unwrap();
    for network in ["10.96.0.0/16", "fd00:96::/112", "203.0.113.0/24", "2001:db8:113::/64"] {
        router.serve(network).unwrap();
    }
    let mut service = manifests::service("web", &CLUSTER_IPS, &SERVICE_PORTS);
    service["spec"]["type"] = json!("LoadBalancer");
    service["spec"]["externalIPs"] = json!(EXTERNAL_IP);
    service["status"] = json!({"loadBalancer": {"ingress": [{"ip": LB[0]}, {"ip": LB[1]}]}});
    let mut objects = vec![service];
    objects.extend(manifests::slices(
        "web",
        &ENDPOINT_PORTS,
        &world.endpoints_of(&["pod1-1"]),
    ));
    objects.push(json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": ["10.96.0.0/16", "fd00:96::/112"]},
    }));
    world.write("web", &objects).unwrap();
    world.start_agents().unwrap();
    world
}

/// Everybody who may send: pods on both kinds of links, nodes, and outsiders whose packets enter at either node.
fn senders(world: &World) -> Vec<&Host> {
    let topology = &world.topology;
    let mut senders = vec![
        topology.pod(0, 1),
        topology.pod(1, 1),
        topology.node(0),
        topology.node(1),
    ];
    senders.extend(&topology.router.as_ref().unwrap().outsiders);
    senders
}

/// Lets everybody send one packet to an address, and gives what travelled too often.
fn travels(world: &World, address: IpAddr, what: &str, send: impl Fn() + Sync) -> Vec<String> {
    let router = &world.topology.router.as_ref().unwrap().host.netns;
    let mut wrong = Vec::new();
    for sender in senders(world) {
        let counter = Counter::start(router, address).unwrap();
        sender.run(&send);
        // A packet in a loop needs no time for its sixty hops, but the counter may.
        std::thread::sleep(Duration::from_millis(50));
        let count = counter.count();
        if count > MOST {
            wrong.push(format!(
                "{what} from {} to {address}: forwarded {count} times",
                sender.name
            ));
        }
    }
    wrong
}

/// TCP and UDP packets to a port that nobody serves.
fn dialling_does_not_loop(addresses: &[[&str; 2]], may_be_refused: bool) {
    let world = world();
    let client = Client {
        port: 0,
        patience: PATIENCE,
    };
    let mut wrong = Vec::new();
    for address in addresses.concat().iter().map(|ip| ip.parse().unwrap()) {
        let target = SocketAddr::new(address, UNDEFINED);
        let check = |outcome: echo::Outcome| {
            let silent = matches!(outcome, Err(Failure::Timeout | Failure::Unreachable));
            let refused = may_be_refused && outcome == Err(Failure::Refused);
            assert!(silent || refused, "{target}: {outcome:?}");
        };
        wrong.extend(travels(&world, address, "TCP", || check(client.tcp(target))));
        wrong.extend(travels(&world, address, "UDP", || check(client.udp(target))));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// S77: for a ClusterIP, whose other ports are refused.
#[test]
fn undefined_ports_of_a_cluster_ip_do_not_loop() {
    dialling_does_not_loop(&[CLUSTER_IPS], true);
}

/// The same for load-balancer addresses and externalIPs, whose other ports may be somebody else's.
#[test]
fn undefined_ports_of_outside_addresses_do_not_loop() {
    dialling_does_not_loop(&[LB, EXTERNAL_IP], true);
}

/// S78: addresses of the service network that no Service has.
#[test]
fn unallocated_service_addresses_do_not_loop() {
    dialling_does_not_loop(&[UNALLOCATED], false);
}

/// S79: a ping of a service address need not be answered.
#[test]
fn pings_of_service_addresses_do_not_loop() {
    let world = world();
    for sender in senders(&world) {
        // Everybody may ping.
        sender
            .netns
            .sysctl("net/ipv4/ping_group_range", "0 2147483647")
            .unwrap();
    }
    let mut wrong = Vec::new();
    for address in [CLUSTER_IPS, LB, EXTERNAL_IP, UNALLOCATED].concat() {
        let address = address.parse().unwrap();
        wrong.extend(travels(&world, address, "ping", || Client::ping(address).unwrap()));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
