//! Pods reach ClusterIPs through the packet programs: every way of connecting pods, both ways of attaching, both families, both
//! protocols, checksum offload and segmentation offload as the kernel has them.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use proxy_tests::echo::{self, CONNECTED, Failure, Held, REQUESTS};
use proxy_tests::manifests;
use proxy_tests::topology::{CLUSTER_CIDR, PodNetwork, Shape};
use proxy_tests::world::{CLUSTER_IPS, ECHO, SERVICE_PORTS, Setup, World, answered_by, names, vips};

/// What a person calls at once; a lost refusal costs a second, the first retransmission of a SYN.
const PROMPT: Duration = Duration::from_millis(500);
/// Enough that both of two backends are chosen: missing one has a chance of 2^-59.
const ENOUGH: usize = 60;

fn world(network: PodNetwork, options: &[&'static str]) -> World {
    let shape = Shape {
        network,
        external: true,
        ..Default::default()
    };
    World::new(&Setup {
        shape,
        options: options.to_vec(),
        ..Default::default()
    })
    .unwrap()
}

/// S59, S60, S119: a local and a remote backend both serve; the client sees the VIP, the server sees the client.
fn pods_reach_local_and_remote_backends(network: PodNetwork, attach: &'static str) {
    let world = world(network, &["--cluster-cidr", CLUSTER_CIDR, "--attach", attach]);
    world.publish(&["pod1-2", "pod2-1"]).unwrap();
    let client = world.topology.pod(0, 0);
    for vip in vips() {
        for (what, request) in REQUESTS {
            let answers = client.run(|| answered_by(ENOUGH, &format!("{what} to {vip}"), || request(vip)));
            assert_eq!(answers, names(&["pod1-2", "pod2-1"]), "{what} to {vip}");
            let answer = client.run(|| request(vip)).unwrap();
            assert_eq!(answer.peer, vip, "{what}: the answer comes from where it was sent");
            assert_eq!(
                answer.client.ip(),
                client.address(vip.ip()),
                "{what}: the pod's own address is kept"
            );
        }
    }
}

#[test]
fn bridged_pods_reach_backends_with_tcx() {
    pods_reach_local_and_remote_backends(PodNetwork::Bridge, "tcx");
}

#[test]
fn bridged_pods_reach_backends_with_classic_filters() {
    pods_reach_local_and_remote_backends(PodNetwork::Bridge, "classic");
}

#[test]
fn routed_pods_reach_backends_with_tcx() {
    pods_reach_local_and_remote_backends(PodNetwork::PointToPoint, "tcx");
}

#[test]
fn routed_pods_reach_backends_with_classic_filters() {
    pods_reach_local_and_remote_backends(PodNetwork::PointToPoint, "classic");
}

/// S110: a pod that is its own backend reaches itself, and sees a node's address as the client, with or without `--cluster-cidr`.
fn a_pod_reaches_itself(network: PodNetwork) {
    for options in [&["--cluster-cidr", CLUSTER_CIDR][..], &[]] {
        let world = world(network, options);
        world.publish(&["pod1-1"]).unwrap();
        let pod = world.topology.pod(0, 0);
        for vip in vips() {
            for (what, request) in REQUESTS {
                let answer = pod
                    .run(|| request(vip))
                    .unwrap_or_else(|f| panic!("{what} to {vip}: {f}"));
                assert_eq!((answer.server.as_str(), answer.peer), ("pod1-1", vip), "{what}");
                assert_ne!(
                    answer.client.ip(),
                    pod.address(vip.ip()),
                    "{what}: a pod drops packets from itself"
                );
            }
        }
    }
}

#[test]
fn a_bridged_pod_reaches_itself_through_its_service() {
    a_pod_reaches_itself(PodNetwork::Bridge);
}

#[test]
fn a_routed_pod_reaches_itself_through_its_service() {
    a_pod_reaches_itself(PodNetwork::PointToPoint);
}

/// S108, S116, S117: a source outside the cluster comes to the backend with the address of the node it came through.
#[test]
fn external_sources_are_masqueraded() {
    for network in [PodNetwork::Bridge, PodNetwork::PointToPoint] {
        let world = world(network, &["--cluster-cidr", CLUSTER_CIDR]);
        world.publish(&["pod1-1", "pod2-1"]).unwrap();
        let external = world.topology.external.as_ref().unwrap();
        for vip in vips() {
            for (what, request) in REQUESTS {
                let answers = external.run(|| answered_by(ENOUGH, &format!("{what} to {vip}"), || request(vip)));
                assert_eq!(
                    answers,
                    names(&["pod1-1", "pod2-1"]),
                    "{what} to {vip} over {network:?}"
                );
                let answer = external.run(|| request(vip)).unwrap();
                assert_eq!(answer.peer, vip);
                assert_ne!(
                    answer.client.ip(),
                    external.address(vip.ip()),
                    "{what} to {vip} over {network:?}"
                );
            }
        }
    }
}

/// S121: clients that happen to use the same source port towards the same backend do not disturb each other.
#[test]
fn two_external_connections_to_one_backend_are_kept_apart() {
    let world = world(PodNetwork::Bridge, &["--cluster-cidr", CLUSTER_CIDR]);
    world.publish(&["pod2-1"]).unwrap();
    let external = world.topology.external.as_ref().unwrap();
    for vip in vips() {
        external.run(|| {
            let mut held: Vec<Held> = (0..200).map(|_| Held::open(vip).unwrap()).collect();
            for connection in &mut held {
                assert_eq!(connection.ask().unwrap().server, "pod2-1");
            }
        });
    }
}

/// S122, S123, S124: no endpoint means ECONNREFUSED, promptly; S15: in one family whatever the other has.
#[test]
fn a_service_without_endpoints_refuses() {
    let world = world(PodNetwork::Bridge, &["--cluster-cidr", CLUSTER_CIDR]);
    world.publish(&[]).unwrap();
    let clients = [world.topology.pod(0, 0), world.topology.external.as_ref().unwrap()];
    for client in clients {
        for vip in vips() {
            for (what, request) in CONNECTED {
                let begin = Instant::now();
                assert_eq!(
                    client.run(|| request(vip)),
                    Err(Failure::Refused),
                    "{} to {vip}",
                    client.name
                );
                let took = begin.elapsed();
                assert!(
                    took < PROMPT,
                    "{what} from {} to {vip} was refused after {took:?}",
                    client.name
                );
            }
        }
    }
    let mut objects = vec![manifests::service("web", &CLUSTER_IPS, &SERVICE_PORTS)];
    let v4_only: Vec<_> = world
        .endpoints_of(&["pod1-2"])
        .into_iter()
        .filter(|(ip, _)| ip.is_ipv4())
        .collect();
    objects.extend(manifests::slices("web", &proxy_tests::world::ENDPOINT_PORTS, &v4_only));
    world.write("web", &objects).unwrap();
    let [v4, v6] = vips();
    let backend = [SocketAddr::new(v4_only[0].0, ECHO)];
    world
        .wait_for(v4, proxy_common::addr::Protocol::Tcp, Some(&backend))
        .unwrap();
    let client = world.topology.pod(0, 0);
    assert_eq!(client.run(|| echo::tcp(v4)).unwrap().server, "pod1-2");
    assert_eq!(client.run(|| echo::tcp(v6)), Err(Failure::Refused));
}

/// Large packets with partial checksums, built by segmentation offload, arrive intact both ways, from backends near and far.
#[test]
fn megabytes_arrive_intact_with_offloads_on() {
    let data: Vec<u8> = (0..5_000_000u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    for network in [PodNetwork::Bridge, PodNetwork::PointToPoint] {
        let world = world(network, &["--cluster-cidr", CLUSTER_CIDR]);
        for backend in ["pod1-2", "pod2-1"] {
            world.publish(&[backend]).unwrap();
            for client in [world.topology.pod(0, 0), world.topology.external.as_ref().unwrap()] {
                for vip in vips() {
                    let back = client.run(|| Held::open(vip)?.exchange(&data));
                    let back = back.unwrap_or_else(|f| panic!("{} to {vip} at {backend}: {f}", client.name));
                    assert!(back == data, "{} to {vip} at {backend}", client.name);
                }
            }
        }
    }
}

/// Whoever dials a pod or a node directly is none of our business, also while its address is an endpoint (S93, S197).
#[test]
fn traffic_to_others_passes_untouched() {
    let world = world(PodNetwork::Bridge, &["--cluster-cidr", CLUSTER_CIDR]);
    world.publish(&["pod1-2", "pod2-1"]).unwrap();
    let client = world.topology.pod(0, 0);
    let external = world.topology.external.as_ref().unwrap();
    for (host, from) in [(client, client), (external, external)] {
        for target in world.topology.pod(1, 0).sockets(ECHO) {
            for (what, request) in REQUESTS {
                let answer = from
                    .run(|| request(target))
                    .unwrap_or_else(|f| panic!("{what} to {target}: {f}"));
                assert_eq!(
                    (answer.peer, answer.client.ip()),
                    (target, host.address(target.ip())),
                    "{what}"
                );
            }
        }
    }
    let node = world.topology.node(1).sockets(ECHO);
    assert!(
        node.iter()
            .all(|target| client.run(|| echo::tcp(*target)) == Err(Failure::Refused)),
        "nobody listens there"
    );
}

/// Strict reverse path filtering sees symmetric traffic only, so it has nothing to drop.
#[test]
fn reverse_path_filters_have_nothing_to_drop() {
    let shape = Shape {
        rp_filter: 1,
        ..Default::default()
    };
    let options = vec!["--cluster-cidr", CLUSTER_CIDR];
    let world = World::new(&Setup {
        shape,
        options,
        ..Default::default()
    })
    .unwrap();
    world.publish(&["pod1-2", "pod2-1"]).unwrap();
    for vip in vips() {
        for (what, request) in REQUESTS {
            let answers = world
                .topology
                .pod(0, 0)
                .run(|| answered_by(ENOUGH, &format!("{what} to {vip}"), || request(vip)));
            assert_eq!(answers, names(&["pod1-2", "pod2-1"]), "{what} to {vip}");
        }
    }
}

/// S186: where the node has no IPv6, IPv4 is served as ever.
#[test]
fn a_node_without_ipv6_serves_ipv4() {
    let mut world = World::new(&Setup {
        options: vec!["--cluster-cidr", CLUSTER_CIDR],
        without_agents: true,
        ..Default::default()
    })
    .unwrap();
    for netns in world.topology.namespaces() {
        netns.sysctl("net/ipv6/conf/all/disable_ipv6", "1").unwrap();
    }
    world.start_agents().unwrap();
    world.publish(&["pod1-2", "pod2-1"]).unwrap();
    let [v4, v6] = vips();
    for (what, request) in REQUESTS {
        for (who, answers) in [
            (
                "a pod",
                world
                    .topology
                    .pod(0, 0)
                    .run(|| answered_by(ENOUGH, what, || request(v4))),
            ),
            (
                "the node",
                world.agents[0].run(|| answered_by(ENOUGH, what, || request(v4))),
            ),
        ] {
            assert_eq!(answers, names(&["pod1-2", "pod2-1"]), "{what} from {who}");
        }
    }
    assert!(world.topology.pod(0, 0).run(|| echo::tcp(v6)).is_err());
}
