//! The choice of a backend is uniform, and large services use all they have.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::collections::BTreeSet;
use std::net::SocketAddr;

use proxy_common::addr::Protocol;
use proxy_tests::echo::{self, EchoServer};
use proxy_tests::manifests::{self, port};
use proxy_tests::stats;
use proxy_tests::topology::{CLUSTER_CIDR, Shape};
use proxy_tests::world::{ECHO, Setup, World, vips};

/// One wrong alarm in a thousand runs of each case.
const IMPROBABLE: f64 = 0.001;

fn world() -> World {
    World::new(&Setup {
        options: vec!["--cluster-cidr", CLUSTER_CIDR],
        ..Default::default()
    })
    .unwrap()
}

/// S60: over 10,000 connections to four backends, from a pod and from the node, the shares are what chance gives.
#[test]
fn ten_thousand_connections_are_spread_evenly() {
    let world = world();
    let pods = ["pod1-1", "pod1-2", "pod2-1", "pod2-2"];
    world.publish(&pods).unwrap();
    let client = world.topology.pod(0, 0);
    for vip in vips() {
        let send = || echo::names(10_000, || echo::tcp(vip));
        for (from, answers) in [("a pod", client.run(send)), ("the node", world.agents[0].run(send))] {
            let answers = answers.unwrap_or_else(|error| panic!("from {from} to {vip}: {error}"));
            let counts = stats::count(&pods, &answers);
            let result = stats::uniform(&counts);
            assert!(result.p > IMPROBABLE, "from {from} to {vip}: {counts:?}, {result:?}");
        }
    }
}

/// S39: a service with 1,000 endpoints in ten slices uses them all.
#[test]
fn a_thousand_endpoints_in_ten_slices_are_all_used() {
    const SLICES: u32 = 10;
    const PER_SLICE: u32 = 100;
    /// Times the number of endpoints: each is missed by a run with a chance of e^-12, any of them with 0.6 %.
    const TRIES: usize = 12;
    let shape = Shape {
        pods_per_node: 1,
        ..Default::default()
    };
    let options = vec!["--cluster-cidr", CLUSTER_CIDR];
    let mut world = World::new(&Setup {
        shape,
        options,
        ..Default::default()
    })
    .unwrap();
    world.topology.give_network(1, 0).unwrap();
    let any = ["0.0.0.0:9090".parse().unwrap()];
    world
        .servers
        .push(EchoServer::start(&world.topology.pod(1, 0).netns, "many", &any).unwrap());
    let vip: SocketAddr = "10.96.0.99:80".parse().unwrap();
    let mut objects = vec![manifests::service("many", &["10.96.0.99"], &[port("", "TCP", 80)])];
    let mut all = Vec::new();
    for slice in 0..SLICES {
        let addresses = (0..PER_SLICE).map(|i| format!("10.250.{}.{}", slice, i + 1));
        let endpoints = addresses.map(|address| {
            all.push(SocketAddr::new(address.parse().unwrap(), 9090));
            manifests::endpoint(address, "node2")
        });
        let endpoints = endpoints.collect();
        objects.push(manifests::slice(
            &format!("many-{slice}"),
            "many",
            "IPv4",
            &[port("", "TCP", 9090)],
            endpoints,
        ));
    }
    world.write("many", &objects).unwrap();
    world.wait_for(vip, Protocol::Tcp, Some(&all)).unwrap();
    let client = world.topology.pod(0, 0);
    let mut missing: BTreeSet<SocketAddr> = all.iter().copied().collect();
    client.run(|| {
        for _ in 0..TRIES * all.len() {
            missing.remove(&echo::tcp(vip).unwrap().local);
            if missing.is_empty() {
                break;
            }
        }
    });
    assert!(
        missing.is_empty(),
        "{} of {} endpoints were never chosen",
        missing.len(),
        all.len()
    );
}

/// S25: one number under two protocols is two service ports with their own endpoints; S33: two ports may share an endpoint port.
#[test]
fn ports_are_told_apart_by_protocol() {
    let world = world();
    let service = manifests::service(
        "mixed",
        &["10.96.0.50"],
        &[port("t", "TCP", 53), port("u", "UDP", 53), port("t2", "TCP", 54)],
    );
    let slice = |name: &str, ports: &[manifests::Port], pod: &str| {
        let endpoints = world.endpoints_of(&[pod]).into_iter().filter(|(ip, _)| ip.is_ipv4());
        let endpoints = endpoints.map(|(ip, node)| manifests::endpoint(ip, node)).collect();
        manifests::slice(name, "mixed", "IPv4", ports, endpoints)
    };
    let tcp = slice("mixed-1", &[port("t", "TCP", ECHO), port("t2", "TCP", ECHO)], "pod2-1");
    let udp = slice("mixed-2", &[port("u", "UDP", ECHO)], "pod2-2");
    world.write("mixed", &[service, tcp, udp]).unwrap();
    let [dns, other]: [SocketAddr; 2] = ["10.96.0.50:53", "10.96.0.50:54"].map(|a| a.parse().unwrap());
    let backend = |node, pod: usize| [world.topology.pod(node, pod).sockets(ECHO)[0]];
    world.wait_for(dns, Protocol::Tcp, Some(&backend(1, 0))).unwrap();
    world.wait_for(dns, Protocol::Udp, Some(&backend(1, 1))).unwrap();
    let client = world.topology.pod(0, 0);
    for _ in 0..10 {
        assert_eq!(client.run(|| echo::tcp(dns)).unwrap().server, "pod2-1");
        assert_eq!(client.run(|| echo::udp(dns)).unwrap().server, "pod2-2");
        assert_eq!(client.run(|| echo::tcp(other)).unwrap().server, "pod2-1");
    }
}
