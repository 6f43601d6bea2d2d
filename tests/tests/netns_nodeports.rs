//! Node ports and load-balancer addresses while what they depend on changes: addresses of the node, owners of a port, the status
//! of the service, and endpoints under running UDP flows.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::net::{IpAddr, SocketAddr};

use proxy_tests::echo::{self, Failure, Outcome, Udp};
use proxy_tests::manifests::{self, port};
use proxy_tests::process::wait_until;
use proxy_tests::service::{self, EXTERNAL_IP, LB, NODE_PORT, external, outside, to_sockets};
use proxy_tests::topology::Host;
use proxy_tests::world::{ARRIVAL, ECHO, World, vips};
use serde_json::{Value, json};

/// Further addresses of the first node, in a network that the outsider routes to it.
const MORE: [&str; 2] = ["203.0.113.77", "2001:db8:113::77"];

/// Waits until requests go as they should.
fn wait_for(client: &Host, target: SocketAddr, request: fn(SocketAddr) -> Outcome, wanted: Result<&str, Failure>) {
    let mut last = None;
    let done = wait_until(ARRIVAL, || {
        let outcome = client.run(|| request(target)).map(|answer| answer.server);
        let as_wanted = outcome.as_deref() == wanted.as_ref().map(|server| *server);
        last = Some(outcome);
        as_wanted.then_some(())
    });
    assert!(
        done.is_some(),
        "{} to {target}: {last:?} instead of {wanted:?}",
        client.name
    );
}

fn more(port: u16) -> [SocketAddr; 2] {
    MORE.map(|ip| SocketAddr::new(ip.parse().unwrap(), port))
}

fn change_addresses(world: &World, action: &str, device: &str) {
    let lines = format!(
        "addr {action} {}/32 dev {device}\naddr {action} {}/128 dev {device} nodad\n",
        MORE[0], MORE[1]
    );
    world.topology.node(0).netns.ip(&lines).unwrap();
}

/// S84: `primary` means the addresses in the Node object and no others, follows it, and is all of a family in which it names none.
#[test]
fn primary_addresses_are_those_of_the_node_object() {
    let world = service::empty_world(&["--nodeport-addresses", "primary"]).unwrap();
    change_addresses(&world, "add", "eth0");
    let host = world.topology.node(0);
    let write = |ips: &[IpAddr]| world.write("node", &[manifests::node(&host.name, "", ips)]).unwrap();
    write(&[host.v4.into(), host.v6.into()]);
    service::publish(&world, &["pod2-1"], |_| {}).unwrap();
    let client = external(&world);
    for (own, other) in host.sockets(NODE_PORT).into_iter().zip(more(NODE_PORT)) {
        wait_for(client, own, echo::tcp, Ok("pod2-1"));
        wait_for(client, other, echo::tcp, Err(Failure::Refused));
    }
    write(&MORE.map(|ip| ip.parse().unwrap()));
    for (own, other) in host.sockets(NODE_PORT).into_iter().zip(more(NODE_PORT)) {
        wait_for(client, other, echo::tcp, Ok("pod2-1"));
        wait_for(client, own, echo::tcp, Err(Failure::Refused));
    }
    write(&[host.v4.into()]);
    let ([own4, own6], [other4, other6]) = (host.sockets(NODE_PORT), more(NODE_PORT));
    wait_for(client, own4, echo::tcp, Ok("pod2-1"));
    wait_for(client, other4, echo::tcp, Err(Failure::Refused));
    for all in [own6, other6] {
        wait_for(client, all, echo::tcp, Ok("pod2-1"));
    }
}

/// S85, S171: addresses that appear while the agent runs serve node ports, and do not when they are gone: a second one of an
/// interface, and those of a new interface.
#[test]
fn new_addresses_of_the_node_serve_node_ports() {
    let world = service::world(&[], &["pod2-1"], |_| {}).unwrap();
    let client = external(&world);
    for device in ["eth0", "more"] {
        if device == "more" {
            let lines = "link add more type bridge\nlink set more up";
            world.topology.node(0).netns.ip(lines).unwrap();
        }
        change_addresses(&world, "add", device);
        for target in more(NODE_PORT) {
            for request in [echo::tcp, echo::udp] {
                wait_for(client, target, request, Ok("pod2-1"));
                wait_for(world.topology.pod(0, 1), target, request, Ok("pod2-1"));
            }
            wait_for(
                client,
                SocketAddr::new(target.ip(), NODE_PORT + 1),
                echo::tcp,
                Err(Failure::Refused),
            );
        }
        if device == "eth0" {
            change_addresses(&world, "del", device);
        } else {
            world.topology.node(0).netns.ip("link del more").unwrap();
        }
        for target in more(NODE_PORT) {
            // Nobody has the address: what becomes of packets is the routes' affair, but no backend answers.
            let gone = wait_until(ARRIVAL, || client.run(|| echo::tcp(target)).is_err().then_some(()));
            assert!(gone.is_some(), "{target} is still served");
        }
    }
}

/// A nodePort service with one port.
fn node_port_service(name: &str, cluster_ip: &str, protocol: &'static str, node_port: Option<u16>) -> Value {
    let mut service = manifests::service(name, &[cluster_ip], &[port("main", protocol, 80)]);
    service["spec"]["type"] = json!("NodePort");
    if let Some(number) = node_port {
        service["spec"]["ports"][0]["nodePort"] = json!(number);
    }
    service
}

/// Two services with their endpoints, in one batch.
fn write_two(world: &World, services: [Value; 2], pods: [&str; 2]) {
    let mut objects = Vec::new();
    for (service, pod) in services.into_iter().zip(pods) {
        let endpoint = world.endpoints_of(&[pod]);
        let protocol = if service["spec"]["ports"][0]["protocol"] == "UDP" {
            "UDP"
        } else {
            "TCP"
        };
        let name = service["metadata"]["name"].as_str().unwrap().to_owned();
        objects.push(service);
        objects.extend(manifests::slices(&name, &[port("main", protocol, ECHO)], &endpoint));
    }
    world.write("two", &objects).unwrap();
}

/// S34, S35: one number serves TCP of one service and UDP of another; it moves between services in one step, back and forth.
#[test]
fn a_node_port_is_shared_by_protocols_and_moves_between_services() {
    let world = service::empty_world(&[]).unwrap();
    let client = external(&world);
    for (ips, target) in [["10.96.1.1", "10.96.1.2"], ["fd00:96::1:1", "fd00:96::1:2"]]
        .into_iter()
        .zip(world.topology.node(0).sockets(NODE_PORT))
    {
        let two = |protocol, ports: [Option<u16>; 2]| {
            [
                node_port_service("first", ips[0], "TCP", ports[0]),
                node_port_service("second", ips[1], protocol, ports[1]),
            ]
        };
        write_two(&world, two("UDP", [Some(NODE_PORT); 2]), ["pod1-1", "pod2-1"]);
        wait_for(client, target, echo::tcp, Ok("pod1-1"));
        wait_for(client, target, echo::udp, Ok("pod2-1"));
        write_two(&world, two("TCP", [Some(NODE_PORT), None]), ["pod1-1", "pod2-1"]);
        wait_for(client, target, echo::udp, Err(Failure::Refused));
        for _ in 0..3 {
            write_two(&world, two("TCP", [None, Some(NODE_PORT)]), ["pod1-1", "pod2-1"]);
            wait_for(client, target, echo::tcp, Ok("pod2-1"));
            write_two(&world, two("TCP", [Some(NODE_PORT), None]), ["pod1-1", "pod2-1"]);
            wait_for(client, target, echo::tcp, Ok("pod1-1"));
        }
    }
}

/// S89: with the policy Local, another node's nodePort is that node's affair: where it has no endpoint, nobody on this node gets
/// an answer, whether sockets are translated here or not.
#[test]
fn another_nodes_node_port_is_not_answered_here() {
    for socket_lb in ["host", "all", "off"] {
        let world = service::world(&["--socket-lb", socket_lb], &["pod1-1"], |service| {
            service["spec"]["externalTrafficPolicy"] = json!("Local");
        })
        .unwrap();
        // All at once: each takes as long as a client waits.
        std::thread::scope(|scope| {
            for target in world.topology.node(1).sockets(NODE_PORT) {
                for (kind, request) in echo::REQUESTS {
                    let agent = &world.agents[0];
                    scope.spawn(move || {
                        let outcome = agent.run(|| request(target));
                        assert_eq!(
                            outcome,
                            Err(Failure::Timeout),
                            "{kind} to {target}, --socket-lb {socket_lb}"
                        );
                    });
                }
            }
        });
        for target in world.topology.node(0).sockets(NODE_PORT) {
            let outcome = world.agents[1].run(|| echo::tcp(target)).map(|answer| answer.server);
            assert_eq!(outcome.as_deref(), Ok("pod1-1"), "the node that has one answers");
        }
    }
}

/// S95, S97: addresses of the status come, go, are replaced, and are left alone in mode Proxy, while the others stay.
#[test]
fn changes_of_the_status_apply() {
    let world = service::world(&[], &["pod2-1"], |_| {}).unwrap();
    let client = external(&world);
    // An address that nobody serves is sent back to the gateway, and the outsider would be told to go there from now on.
    for file in ["ipv4/conf/all", "ipv4/conf/eth0", "ipv6/conf/all", "ipv6/conf/eth0"] {
        client
            .netns
            .sysctl(&format!("net/{file}/accept_redirects"), "0")
            .unwrap();
    }
    let publish = |ingress: Value| {
        service::publish(&world, &["pod2-1"], |service| {
            service["status"] = json!({"loadBalancer": {"ingress": ingress}});
        })
        .unwrap();
    };
    let unserved = |target: SocketAddr| {
        let gone = wait_until(ARRIVAL, || client.run(|| echo::tcp(target)).is_err().then_some(()));
        assert!(gone.is_some(), "{target} is still served");
    };
    for ((first, second), other) in LB.into_iter().zip(MORE).zip(to_sockets(EXTERNAL_IP)) {
        let [one, two] = [first, second].map(|ip| SocketAddr::new(ip.parse().unwrap(), 80));
        publish(json!([{"ip": first}]));
        wait_for(client, one, echo::tcp, Ok("pod2-1"));
        publish(json!([{"ip": first}, {"ip": second}]));
        wait_for(client, two, echo::tcp, Ok("pod2-1"));
        wait_for(client, one, echo::tcp, Ok("pod2-1"));
        publish(json!([{"ip": second}]));
        unserved(one);
        wait_for(client, two, echo::tcp, Ok("pod2-1"));
        publish(json!([{"ip": second, "ipMode": "Proxy"}]));
        unserved(two);
        publish(json!([{"ip": second, "ipMode": "VIP"}]));
        wait_for(client, two, echo::tcp, Ok("pod2-1"));
        publish(json!([]));
        unserved(two);
        wait_for(client, other, echo::tcp, Ok("pod2-1"));
    }
}

/// S106: a node in the source ranges that has the load balancer's address itself, from which it then sends, may ask; not so where
/// the node is not in the ranges.
#[test]
fn a_node_with_the_address_of_the_load_balancer_reaches_it() {
    let world = service::empty_world(&[]).unwrap();
    let host = world.topology.node(0);
    let ranges = |ranges: Vec<String>| {
        service::publish(&world, &["pod2-1"], |service| {
            service["spec"]["loadBalancerSourceRanges"] = json!(ranges);
        })
        .unwrap();
    };
    world
        .write(
            "node",
            &[manifests::node(&host.name, "", &[host.v4.into(), host.v6.into()])],
        )
        .unwrap();
    ranges(vec![format!("{}/32", host.v4), format!("{}/128", host.v6)]);
    let lines = format!(
        "addr add {}/32 dev eth0\naddr add {}/128 dev eth0 nodad\n",
        LB[0], LB[1]
    );
    host.netns.ip(&lines).unwrap();
    for target in to_sockets(LB) {
        // The address is local now, so the kernel takes it for the source as well; a pod is not in the ranges.
        let answer = wait_until(ARRIVAL, || world.agents[0].run(|| echo::udp_unconnected(target)).ok());
        assert!(
            answer.is_some() || world.agents[0].run(|| echo::tcp(target)).is_ok(),
            "{target}"
        );
        assert_eq!(
            world.topology.pod(0, 1).run(|| echo::tcp(target)),
            Err(Failure::Timeout),
            "{target}"
        );
    }
}

/// S142: UDP sockets that keep their port move when their endpoint goes, whichever address they use: from outside, from a pod,
/// and from the node.
#[test]
fn udp_moves_through_every_kind_of_address() {
    let world = service::world(&[], &["pod2-1"], |_| {}).unwrap();
    let (pod, client) = (world.topology.pod(0, 1), external(&world));
    let targets = [outside(world.topology.node(0)), vips().to_vec()].concat();
    let mut sockets = Vec::new();
    for target in &targets {
        for host in [pod, client] {
            sockets.push((
                &host.name,
                *target,
                host.run(|| Udp::open(*target)).unwrap(),
                host.run(|| Udp::connect(*target)).unwrap(),
            ));
        }
    }
    for target in &targets {
        let agent = &world.agents[0];
        let name = &world.topology.node(0).name;
        let connected = agent.run(|| Udp::connect(*target)).unwrap();
        assert_eq!(
            connected.peer().unwrap(),
            *target,
            "{name}: whatever it is connected to"
        );
        sockets.push((name, *target, agent.run(|| Udp::open(*target)).unwrap(), connected));
    }
    for backend in ["pod2-1", "pod1-1", "pod2-2"] {
        service::publish(&world, &[backend], |_| {}).unwrap();
        for (who, target, unconnected, connected) in &mut sockets {
            let moved = wait_until(ARRIVAL, || {
                let answers = [unconnected.ask_at(*target), connected.ask()];
                let all = answers.iter().all(|a| a.as_ref().is_ok_and(|a| a.server == backend));
                all.then_some(())
            });
            assert!(moved.is_some(), "{who} to {target}: not with {backend}");
        }
    }
}
