//! What happens to traffic while things change: endpoints, interfaces, and the agent itself.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use proxy_common::addr::Protocol;
use proxy_tests::attached;
use proxy_tests::echo::{self, Failure, Held, Udp};
use proxy_tests::process::wait_until;
use proxy_tests::topology::{CLUSTER_CIDR, PodNetwork, Shape};
use proxy_tests::traffic::{self, Running};
use proxy_tests::world::{Setup, World, answered_by, names, vips};

const OPTIONS: [&str; 2] = ["--cluster-cidr", CLUSTER_CIDR];
/// Until flows have moved that existed before a change.
const SETTLE: Duration = Duration::from_millis(250);
const PAUSE: Duration = Duration::from_millis(1);
const PATIENCE: Duration = Duration::from_secs(10);

fn world() -> World {
    World::new(&Setup {
        options: OPTIONS.to_vec(),
        ..Default::default()
    })
    .unwrap()
}

/// Requests of every kind, from a pod and from its node.
fn everything_running(world: &World) -> Vec<Running> {
    let agent = &world.agents[0];
    let pod = &world.topology.pod(0, 0).netns;
    let mut running = Vec::new();
    for vip in vips() {
        running.push(traffic::repeat(|body| pod.spawn(body), PAUSE, move || echo::tcp(vip)));
        running.push(traffic::repeat(|body| pod.spawn(body), PAUSE, move || echo::udp(vip)));
        running.push(traffic::repeat(|body| agent.spawn(body), PAUSE, move || echo::tcp(vip)));
        running.push(traffic::repeat(|body| agent.spawn(body), PAUSE, move || echo::udp(vip)));
    }
    running
}

fn wait_for_more(running: &[Running], count: usize) {
    assert!(
        running.iter().all(|r| r.wait_for(count, PATIENCE)),
        "requests came to a halt"
    );
}

fn assert_none_failed(running: Vec<Running>) {
    for (i, running) in running.into_iter().enumerate() {
        let samples = running.stop();
        let failed = traffic::failures(&samples);
        assert!(
            failed.is_empty(),
            "client {i}: {} of {} failed: {:?}",
            failed.len(),
            samples.len(),
            failed[0]
        );
    }
}

/// S62, S63, S127, S147: an established TCP connection stays with its backend when the endpoint goes, even the last one.
#[test]
fn established_tcp_survives_the_removal_of_its_endpoint() {
    let world = world();
    world.publish(&["pod2-1"]).unwrap();
    let pod = world.topology.pod(0, 0);
    for vip in vips() {
        let open = || {
            (
                pod.run(|| Held::open(vip)).unwrap(),
                world.agents[0].run(|| Held::open(vip)).unwrap(),
            )
        };
        let (mut of_pod, mut of_node) = open();
        for pods in [&["pod1-2"][..], &[]] {
            world.publish(pods).unwrap();
            for held in [&mut of_pod, &mut of_node] {
                assert_eq!(held.ask().unwrap().server, "pod2-1");
                assert_eq!(held.exchange(&[7; 100_000]).unwrap(), [7; 100_000]);
            }
        }
        assert_eq!(pod.run(|| echo::tcp(vip)), Err(Failure::Refused));
        world.publish(&["pod2-1"]).unwrap();
    }
}

/// S141, S142: a UDP socket that keeps its port is moved to another backend, from pods and from the node, connected or not.
#[test]
fn udp_moves_when_its_endpoint_goes() {
    let world = world();
    let pod = world.topology.pod(0, 0);
    for vip in vips() {
        world.publish(&["pod2-1"]).unwrap();
        let mut connected = [
            pod.run(|| Udp::connect(vip)).unwrap(),
            world.agents[0].run(|| Udp::connect(vip)).unwrap(),
        ];
        let mut unconnected = [
            pod.run(|| Udp::open(vip)).unwrap(),
            world.agents[0].run(|| Udp::open(vip)).unwrap(),
        ];
        for socket in &mut connected {
            assert_eq!(socket.ask().unwrap().server, "pod2-1");
        }
        for socket in &mut unconnected {
            assert_eq!(socket.ask_at(vip).unwrap().server, "pod2-1");
        }
        world.publish(&["pod1-2"]).unwrap();
        std::thread::sleep(SETTLE);
        for (i, socket) in connected.iter_mut().enumerate() {
            let answer = socket
                .ask()
                .unwrap_or_else(|f| panic!("connected socket {i} to {vip}: {f}"));
            assert_eq!(
                (answer.server.as_str(), answer.peer),
                ("pod1-2", vip),
                "connected socket {i}"
            );
        }
        for (i, socket) in unconnected.iter_mut().enumerate() {
            let answer = socket
                .ask_at(vip)
                .unwrap_or_else(|f| panic!("unconnected socket {i} to {vip}: {f}"));
            assert_eq!(
                (answer.server.as_str(), answer.peer),
                ("pod1-2", vip),
                "unconnected socket {i}"
            );
        }
    }
}

/// S144: a UDP socket that was refused works, with the same port, as soon as there is an endpoint.
#[test]
fn udp_that_was_refused_works_once_there_is_an_endpoint() {
    let world = world();
    world.publish(&[]).unwrap();
    for vip in vips() {
        let mut socket = world.topology.pod(0, 0).run(|| Udp::connect(vip)).unwrap();
        assert_eq!(socket.ask(), Err(Failure::Refused));
        world.publish(&["pod2-1"]).unwrap();
        assert_eq!(socket.ask().unwrap().server, "pod2-1");
        world.publish(&[]).unwrap();
    }
}

/// S146, S149: without endpoints a UDP flow is refused, whoever took them away; whatever comes back has the same flow.
#[test]
fn udp_follows_a_service_that_is_made_again() {
    let world = world();
    for vip in vips() {
        world.publish(&["pod1-2"]).unwrap();
        let mut socket = world.topology.pod(0, 0).run(|| Udp::connect(vip)).unwrap();
        assert_eq!(socket.ask().unwrap().server, "pod1-2");
        world.publish(&[]).unwrap();
        let refused = wait_until(PATIENCE, || (socket.ask() == Err(Failure::Refused)).then_some(()));
        assert!(refused.is_some(), "{vip}: refused (S146)");
        world.publish(&["pod1-2"]).unwrap();
        assert_eq!(socket.ask().unwrap().server, "pod1-2", "{vip}");

        world.manifests.remove("web").unwrap();
        for vip in vips() {
            world.wait_for(vip, Protocol::Udp, None).unwrap();
        }
        world.publish(&["pod2-1"]).unwrap();
        let moved = wait_until(PATIENCE, || {
            socket.ask().ok().filter(|answer| answer.server == "pod2-1")
        });
        assert!(
            moved.is_some(),
            "{vip}: the same 5-tuple reaches the new endpoint (S149)"
        );
    }
}

/// S165: a change of endpoints costs no request, and afterwards nobody is sent to those that left.
#[test]
fn endpoints_change_under_load_without_a_failure() {
    let world = world();
    world.publish(&["pod1-2", "pod2-1", "pod2-2"]).unwrap();
    let running = everything_running(&world);
    wait_for_more(&running, 50);
    world.publish(&["pod1-2", "pod2-1"]).unwrap();
    std::thread::sleep(SETTLE);
    let settled = Instant::now();
    wait_for_more(&running, 50);
    for running in running {
        let samples = running.stop();
        assert!(
            traffic::failures(&samples).is_empty(),
            "{:?}",
            traffic::failures(&samples)
        );
        let after = traffic::answers_after(&samples, settled);
        assert!(!after.contains(&"pod2-2".to_owned()), "sent to an endpoint that left");
    }
}

/// S155, S169: killed without warning, nothing is disturbed; restarted, it adopts what is there, and no connection fails.
#[test]
fn kill_and_restart_disturb_nothing() {
    for attach in ["tcx", "classic"] {
        let mut options = OPTIONS.to_vec();
        options.extend(["--attach", attach]);
        let mut world = World::new(&Setup {
            options,
            ..Default::default()
        })
        .unwrap();
        world.publish(&["pod1-2", "pod2-1"]).unwrap();
        let vip = vips()[0];
        let mut held = world.topology.pod(0, 0).run(|| Held::open(vip)).unwrap();
        let server = held.ask().unwrap().server;
        let running = everything_running(&world);
        wait_for_more(&running, 20);
        world.agents[0].kill();
        wait_for_more(&running, 50);
        assert_eq!(held.ask().unwrap().server, server);
        world.agents[0].launch().unwrap();
        wait_for_more(&running, 50);
        assert_eq!(held.ask().unwrap().server, server);
        assert_none_failed(running);
    }
}

/// S161: what changed while the agent was away is applied when it returns.
#[test]
fn changes_made_while_the_agent_was_away_are_applied() {
    let mut world = world();
    world.publish(&["pod1-2"]).unwrap();
    world.agents[0].stop();
    let vip = vips()[0];
    let pod = || world.topology.pod(0, 0);
    assert_eq!(
        pod().run(|| echo::tcp(vip)).unwrap().server,
        "pod1-2",
        "forwarding goes on while the agent is stopped"
    );
    world.manifests.remove("web").unwrap();
    world.agents[0].launch().unwrap();
    for vip in vips() {
        world.wait_for(vip, Protocol::Tcp, None).unwrap();
    }
    world.publish(&["pod2-1"]).unwrap();
    assert_eq!(
        world.topology.pod(0, 0).run(|| echo::tcp(vip)).unwrap().server,
        "pod2-1"
    );
}

/// Unknown mid-flow TCP passes: connections that were there before the agent are not touched by its start.
#[test]
fn connections_older_than_the_agent_go_on() {
    let mut world = World::new(&Setup {
        options: OPTIONS.to_vec(),
        without_agents: true,
        ..Default::default()
    })
    .unwrap();
    let direct = world.topology.pod(1, 0).sockets(8080);
    let mut held: Vec<Held> = direct
        .iter()
        .map(|a| world.topology.pod(0, 0).run(|| Held::open(*a)).unwrap())
        .collect();
    world.start_agents().unwrap();
    world.publish(&["pod2-1"]).unwrap();
    for connection in &mut held {
        assert_eq!(connection.ask().unwrap().server, "pod2-1");
        assert_eq!(connection.exchange(&[1; 1_000_000]).unwrap(), [1; 1_000_000]);
    }
}

/// Pods that come later are served at once; those that go take their programs along.
#[test]
fn interfaces_come_and_go() {
    for network in [PodNetwork::Bridge, PodNetwork::PointToPoint] {
        let shape = Shape {
            network,
            ..Default::default()
        };
        let mut world = World::new(&Setup {
            shape,
            options: OPTIONS.to_vec(),
            ..Default::default()
        })
        .unwrap();
        world.publish(&["pod2-1"]).unwrap();
        for _ in 0..3 {
            world.topology.nodes[0].add_pod().unwrap();
            let pods = world.topology.nodes[0].pods.len();
            let newest = world.topology.pod(0, pods - 1);
            for vip in vips() {
                let first = wait_until(Duration::from_secs(2), || newest.run(|| echo::tcp(vip)).ok());
                assert_eq!(first.expect("served within two seconds").server, "pod2-1");
            }
            world.topology.nodes[0].remove_pod().unwrap();
        }
        assert!(world.agents[0].is_running(), "{}", world.agents[0].log());
        let vip: SocketAddr = vips()[0];
        assert_eq!(
            world
                .topology
                .pod(0, 0)
                .run(|| answered_by(5, "TCP to the service", || echo::tcp(vip))),
            names(&["pod2-1"])
        );
    }
}

/// S170: `cleanup` leaves the node as it was found.
#[test]
fn cleanup_leaves_nothing() {
    for attach in ["tcx", "classic"] {
        let mut options = OPTIONS.to_vec();
        options.extend(["--attach", attach]);
        let mut world = World::new(&Setup {
            options,
            ..Default::default()
        })
        .unwrap();
        world.publish(&["pod2-1"]).unwrap();
        let vip = vips()[0];
        assert!(world.topology.pod(0, 0).run(|| echo::tcp(vip)).is_ok());
        let agent = &mut world.agents[0];
        agent.stop();
        agent.command(&["cleanup"]).unwrap();
        let left: Vec<_> = std::fs::read_dir(agent.bpf_dir())
            .unwrap()
            .flatten()
            .map(|e| e.path())
            .collect();
        // The kernel puts its own `maps.debug` and `progs.debug` into every BPF file system.
        let ours: Vec<_> = left
            .iter()
            .filter(|path| path.extension().is_none_or(|e| e != "debug"))
            .collect();
        assert!(ours.is_empty(), "pins left: {ours:?}");
        let show = |program: &str, args: &[&str]| {
            proxy_tests::process::run(agent.netns().command(program).args(args)).unwrap()
        };
        let programs = attached::programs(agent.netns()).unwrap();
        assert!(programs.is_empty(), "packet programs left with {attach}: {programs:?}");
        assert!(
            !show("tc", &["qdisc", "show"]).contains("clsact"),
            "a qdisc of ours is left with {attach}"
        );
        let cgroup = agent.cgroup().display().to_string();
        let attached = show("bpftool", &["cgroup", "show", &cgroup]);
        assert!(attached.lines().count() <= 1, "socket programs left: {attached}");
        assert!(
            world.topology.pod(0, 0).run(|| echo::tcp(vip)).is_err(),
            "nobody serves the address any more"
        );
    }
}
