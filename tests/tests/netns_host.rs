//! Processes of a node reach ClusterIPs: through the socket programs (`--socket-lb host`, `all`), and through the packet programs
//! when those are off.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::time::{Duration, Instant};

use proxy_tests::echo::{self, CONNECTED, Failure, Held, REQUESTS, Udp, mapped};
use proxy_tests::topology::{CLUSTER_CIDR, Host, PodNetwork, Shape};
use proxy_tests::world::{Setup, World, answered_by, names, vips};

/// What a person calls at once; a lost refusal costs a second, the first retransmission of a SYN.
const PROMPT: Duration = Duration::from_millis(500);
/// Enough that both of two backends are chosen: missing one has a chance of 2^-59.
const ENOUGH: usize = 60;

fn world(socket_lb: &'static str, network: PodNetwork) -> World {
    let options = vec!["--cluster-cidr", CLUSTER_CIDR, "--socket-lb", socket_lb];
    let shape = Shape {
        network,
        ..Default::default()
    };
    World::new(&Setup {
        shape,
        options,
        ..Default::default()
    })
    .unwrap()
}

/// S59, Z9: local and remote backends serve, and whatever the socket is asked, it knows the VIP only.
fn the_node_reaches_backends(socket_lb: &'static str, network: PodNetwork) {
    let world = world(socket_lb, network);
    world.publish(&["pod1-1", "pod2-1"]).unwrap();
    let node = &world.agents[0];
    for vip in vips() {
        for address in [vip, mapped(vip)] {
            for (what, request) in REQUESTS {
                let answers = node.run(|| answered_by(ENOUGH, &format!("{what} to {address}"), || request(address)));
                assert_eq!(answers, names(&["pod1-1", "pod2-1"]), "{what} to {address}");
                assert_eq!(
                    node.run(|| request(address)).unwrap().peer,
                    address,
                    "{what}: the answer comes from the VIP"
                );
            }
        }
    }
}

#[test]
fn a_node_with_host_sockets_translated() {
    the_node_reaches_backends("host", PodNetwork::Bridge);
    the_node_reaches_backends("host", PodNetwork::PointToPoint);
}

#[test]
fn a_node_with_all_sockets_translated() {
    the_node_reaches_backends("all", PodNetwork::Bridge);
}

#[test]
fn a_node_with_no_sockets_translated() {
    the_node_reaches_backends("off", PodNetwork::Bridge);
    the_node_reaches_backends("off", PodNetwork::PointToPoint);
}

/// Z9: `getpeername` of a held connection and of a connected UDP socket tells the VIP.
#[test]
fn sockets_know_the_service_as_their_peer() {
    for socket_lb in ["host", "off"] {
        let world = world(socket_lb, PodNetwork::Bridge);
        world.publish(&["pod2-1"]).unwrap();
        for vip in vips() {
            for address in [vip, mapped(vip)] {
                world.agents[0].run(|| {
                    assert_eq!(
                        Held::open(address).unwrap().peer(),
                        Ok(address),
                        "TCP, --socket-lb {socket_lb}"
                    );
                    assert_eq!(
                        Udp::connect(address).unwrap().peer(),
                        Ok(address),
                        "UDP, --socket-lb {socket_lb}"
                    );
                });
            }
        }
    }
}

/// Translated at the socket, no packet to the VIP ever exists: a direct connection to the backend is all there is.
#[test]
fn translation_happens_where_the_option_says() {
    for (socket_lb, host_at_socket, pod_at_socket) in
        [("host", true, false), ("all", true, true), ("off", false, false)]
    {
        let world = world(socket_lb, PodNetwork::Bridge);
        world.publish(&["pod2-1"]).unwrap();
        let vip = vips()[0];
        let (agent, pod) = (&world.agents[0], world.topology.pod(0, 0));
        let connections = |held: Held| {
            let listed = agent.command(&["connection", "list"]).unwrap();
            drop(held);
            listed.matches(&vip.to_string()).count()
        };
        let of_host = connections(agent.run(|| Held::open(vip)).unwrap());
        assert_eq!(
            of_host == 0,
            host_at_socket,
            "--socket-lb {socket_lb}: connections of the host in the rewrite table: {of_host}"
        );
        let of_pod = connections(agent.run_in_pod(&pod.netns, || Held::open(vip)).unwrap()) - of_host;
        assert_eq!(
            of_pod == 0,
            pod_at_socket,
            "--socket-lb {socket_lb}: connections of a pod in the rewrite table: {of_pod}"
        );
    }
}

/// S122: refused at once, for host processes as well, with and without socket programs, also over IPv4-mapped addresses.
#[test]
fn a_service_without_endpoints_refuses_host_processes() {
    for socket_lb in ["host", "off"] {
        let world = world(socket_lb, PodNetwork::Bridge);
        world.publish(&[]).unwrap();
        for vip in vips() {
            for address in [vip, mapped(vip)] {
                for (what, request) in CONNECTED {
                    let begin = Instant::now();
                    let outcome = world.agents[0].run(|| request(address));
                    assert_eq!(
                        outcome,
                        Err(Failure::Refused),
                        "{what} to {address}, --socket-lb {socket_lb}"
                    );
                    let took = begin.elapsed();
                    assert!(
                        took < PROMPT,
                        "{what} to {address}, --socket-lb {socket_lb}, was refused after {took:?}"
                    );
                }
            }
        }
    }
}

/// With `all`, a pod's TCP is translated at the socket and its UDP is not; both work.
#[test]
fn pods_with_their_sockets_translated() {
    let world = world("all", PodNetwork::Bridge);
    world.publish(&["pod1-2", "pod2-1"]).unwrap();
    let client: &Host = world.topology.pod(0, 0);
    for vip in vips() {
        for (what, request) in REQUESTS {
            let answers = world.agents[0].run_in_pod(&client.netns, || {
                answered_by(ENOUGH, &format!("{what} to {vip}"), || request(vip))
            });
            assert_eq!(answers, names(&["pod1-2", "pod2-1"]), "{what} to {vip}");
            let answer = world.agents[0].run_in_pod(&client.netns, || request(vip)).unwrap();
            assert_eq!(
                (answer.peer, answer.client.ip()),
                (vip, client.address(vip.ip())),
                "{what}"
            );
        }
    }
}

/// S121: source ports that masqueraded connections have used, and closed, are free for the node's own connections to the same
/// backend. Two thousand of each make it certain that some ports coincide, if they are taken from the same range at all.
#[test]
fn masqueraded_connections_do_not_take_the_ports_of_the_node() {
    const EACH: usize = 2_000;
    let world = world("host", PodNetwork::Bridge);
    world.publish(&["pod1-1"]).unwrap();
    let pod = world.topology.pod(0, 0);
    for vip in vips() {
        // A pod that reaches itself is always masqueraded (S110).
        pod.run(|| {
            answered_by(EACH, &format!("TCP from the pod to itself over {vip}"), || {
                echo::tcp(vip)
            })
        });
        world.agents[0].run(|| answered_by(EACH, &format!("TCP from the node to {vip}"), || echo::tcp(vip)));
    }
}
