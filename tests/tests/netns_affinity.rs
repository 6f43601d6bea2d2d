//! Session affinity in real time (S132–S140). The service has many ports, each of which pins a client on its own: one client says
//! as much as many would, and what must happen by chance does.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use proxy_common::addr::Protocol;
use proxy_tests::echo::{self, Held, Outcome};
use proxy_tests::manifests::{self, Port, port};
use proxy_tests::maps;
use proxy_tests::process::wait_until;
use proxy_tests::service::{self, EXTERNAL_IP, LB, external};
use proxy_tests::topology::Host;
use proxy_tests::world::{ARRIVAL, CLUSTER_IPS, ECHO, World};
use serde_json::json;

/// With four backends, all of them agree by chance once in 4^15 cases.
const PORTS: usize = 16;
const NAMES: [&str; PORTS] = [
    "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p",
];
const FIRST_PORT: u16 = 80;
const FIRST_NODE_PORT: u16 = 30_100;
const PODS: [&str; 4] = ["pod1-1", "pod1-2", "pod2-1", "pod2-2"];
/// Far longer than a test.
const LONG: u32 = 600;
/// As short as the clock of the records, whose ticks are a little longer than a second, lets it be told from nothing.
const SHORT: u32 = 3;
/// After this a record of [`SHORT`] is over: so many whole ticks, and the one that has begun.
const OVER: Duration = Duration::from_millis(4_400);

/// Writes the service and waits until every node has it.
fn publish(world: &World, seconds: u32, pods: &[&str], policy: &str) {
    let ports =
        |number: fn(usize) -> u16| -> Vec<Port> { (0..PORTS).map(|i| port(NAMES[i], "TCP", number(i))).collect() };
    let mut object = manifests::service("web", &CLUSTER_IPS, &ports(|i| FIRST_PORT + i as u16));
    object["spec"]["type"] = json!("LoadBalancer");
    for i in 0..PORTS {
        object["spec"]["ports"][i]["nodePort"] = json!(FIRST_NODE_PORT + i as u16);
    }
    object["spec"]["externalIPs"] = json!(EXTERNAL_IP);
    object["spec"]["externalTrafficPolicy"] = json!(policy);
    object["spec"]["sessionAffinity"] = json!("ClientIP");
    object["spec"]["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": seconds}});
    object["status"] = json!({"loadBalancer": {"ingress": [{"ip": LB[0]}, {"ip": LB[1]}]}});
    let endpoints = world.endpoints_of(pods);
    let mut objects = vec![object];
    objects.extend(manifests::slices("web", &ports(|_| ECHO), &endpoints));
    world.write("web", &objects).unwrap();
    let external: [IpAddr; 2] = EXTERNAL_IP.map(|ip| ip.parse().unwrap());
    let checked = cluster_ips().into_iter().chain(external);
    for frontend in checked.flat_map(sockets) {
        let backends: Vec<_> = endpoints
            .iter()
            .filter(|(ip, _)| ip.is_ipv4() == frontend.is_ipv4())
            .collect();
        let backends: Vec<_> = backends.iter().map(|(ip, _)| SocketAddr::new(*ip, ECHO)).collect();
        // A local policy shows in the backends of external addresses, which are others on every node.
        if policy == "Cluster" || CLUSTER_IPS.contains(&frontend.ip().to_string().as_str()) {
            world.wait_for(frontend, Protocol::Tcp, Some(&backends)).unwrap();
        }
        for agent in &world.agents {
            let arrived = wait_until(ARRIVAL, || {
                let found = maps::affinity_seconds(&agent.bpf_dir(), frontend, Protocol::Tcp).ok()?;
                (found == Some(seconds)).then_some(())
            });
            assert!(arrived.is_some(), "{frontend} has an affinity of {seconds} s");
        }
    }
}

fn cluster_ips() -> [IpAddr; 2] {
    CLUSTER_IPS.map(|ip| ip.parse().unwrap())
}

fn sockets(ip: IpAddr) -> Vec<SocketAddr> {
    (0..PORTS as u16).map(|i| SocketAddr::new(ip, FIRST_PORT + i)).collect()
}

fn node_ports(node: &Host, like: IpAddr) -> Vec<SocketAddr> {
    let ip = node.address(like);
    (0..PORTS as u16)
        .map(|i| SocketAddr::new(ip, FIRST_NODE_PORT + i))
        .collect()
}

/// Who answers at each of these.
fn servers(client: &Host, targets: &[SocketAddr], request: fn(SocketAddr) -> Outcome) -> Vec<String> {
    let ask = |target: &SocketAddr| {
        let answer = request(*target).unwrap_or_else(|f| panic!("{} to {target}: {f}", client.name));
        answer.server
    };
    client.run(|| targets.iter().map(ask).collect())
}

/// S132, S133, S134: each port pins on its own; new connections prolong a pin, and what an open connection carries does not.
#[test]
fn new_connections_alone_prolong_a_pin() {
    let world = service::empty_world(&[]).unwrap();
    publish(&world, SHORT, &PODS, "Cluster");
    let client = world.topology.pod(0, 1);
    let all: Vec<SocketAddr> = cluster_ips().into_iter().flat_map(sockets).collect();
    let first = servers(client, &all, echo::tcp);
    for family in first.chunks(PORTS) {
        assert!(
            family.iter().any(|server| *server != family[0]),
            "every port has a record: {family:?}"
        );
    }
    let begin = Instant::now();
    while begin.elapsed() < OVER {
        std::thread::sleep(Duration::from_millis(700));
        assert_eq!(servers(client, &all, echo::tcp), first, "after {:?}", begin.elapsed());
    }
    let mut held: Vec<Held> = client.run(|| all.iter().map(|target| Held::open(*target).unwrap()).collect());
    let begin = Instant::now();
    while begin.elapsed() < OVER {
        for (connection, server) in held.iter_mut().zip(&first) {
            assert_eq!(connection.ask().unwrap().server, *server, "an open connection stays");
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    for (old, new) in first.chunks(PORTS).zip(servers(client, &all, echo::tcp).chunks(PORTS)) {
        assert_ne!(old, new, "the pins are over");
    }
}

/// S132, S134, S139: one record for every address of the service on a node; another node has its own.
#[test]
fn every_address_of_a_node_follows_one_record() {
    let world = service::empty_world(&[]).unwrap();
    publish(&world, LONG, &PODS, "Cluster");
    let client = external(&world);
    for (family, cluster_ip) in cluster_ips().into_iter().enumerate() {
        let first = servers(client, &sockets(LB[family].parse().unwrap()), echo::tcp);
        assert_eq!(servers(client, &sockets(cluster_ip), echo::tcp), first, "cluster IP");
        assert_eq!(
            servers(client, &sockets(EXTERNAL_IP[family].parse().unwrap()), echo::tcp),
            first,
            "externalIP"
        );
        let [here, there] = [0, 1].map(|i| node_ports(world.topology.node(i), cluster_ip));
        assert_eq!(servers(client, &here, echo::tcp), first, "nodePort");
        let other = servers(client, &there, echo::tcp);
        assert_ne!(other, first, "another node's nodePort");
        assert_eq!(servers(client, &there, echo::tcp), other, "which pins as well");
    }
}

/// S135: a record leads only to endpoints that are valid on the path: pinned to another node's endpoint through the cluster IP, a
/// client gets one of this node through a local policy, and stays there.
#[test]
fn a_pin_outside_of_the_local_set_is_replaced() {
    let world = service::empty_world(&[]).unwrap();
    publish(&world, LONG, &PODS, "Local");
    let client = external(&world);
    for cluster_ip in cluster_ips() {
        let vip = sockets(cluster_ip);
        let pinned = servers(client, &vip, echo::tcp);
        let node_ports = node_ports(world.topology.node(0), cluster_ip);
        let local = servers(client, &node_ports, echo::tcp);
        for (pinned, local) in pinned.iter().zip(&local) {
            assert!(local.starts_with("pod1-"), "{local} is not here");
            if pinned.starts_with("pod1-") {
                assert_eq!(pinned, local, "a valid record is followed");
            }
        }
        assert_ne!(pinned, local, "some were elsewhere");
        assert_eq!(servers(client, &vip, echo::tcp), local, "the new choice is recorded");
    }
}

/// S140: whose endpoint goes gets another one at once, and stays there when the old one is back.
#[test]
fn nobody_is_stranded_by_a_pin() {
    let world = service::empty_world(&[]).unwrap();
    publish(&world, LONG, &PODS, "Cluster");
    let (pod, outside) = (world.topology.pod(0, 1), external(&world));
    let vips: Vec<SocketAddr> = cluster_ips().into_iter().flat_map(sockets).collect();
    let before = [pod, outside].map(|client| servers(client, &vips, echo::tcp));
    publish(&world, LONG, &PODS[..3], "Cluster");
    let after = [pod, outside].map(|client| servers(client, &vips, echo::tcp));
    for (before, after) in before.iter().flatten().zip(after.iter().flatten()) {
        assert_ne!(after, PODS[3], "it is gone");
        if before != PODS[3] {
            assert_eq!(before, after, "the others stay");
        }
    }
    publish(&world, LONG, &PODS, "Cluster");
    assert_eq!([pod, outside].map(|client| servers(client, &vips, echo::tcp)), after);
}

/// S137: another timeout keeps every pin, and holds from now on.
#[test]
fn another_timeout_keeps_the_pins() {
    let world = service::empty_world(&[]).unwrap();
    publish(&world, LONG, &PODS, "Cluster");
    let client = world.topology.pod(0, 1);
    let vips: Vec<SocketAddr> = cluster_ips().into_iter().flat_map(sockets).collect();
    let first = servers(client, &vips, echo::tcp);
    publish(&world, 2 * LONG, &PODS, "Cluster");
    assert_eq!(servers(client, &vips, echo::tcp), first, "a longer one");
    publish(&world, SHORT, &PODS, "Cluster");
    assert_eq!(servers(client, &vips, echo::tcp), first, "a shorter one");
    std::thread::sleep(OVER);
    assert_ne!(servers(client, &vips, echo::tcp), first, "which is over now");
}
