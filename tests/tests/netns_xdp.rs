//! Traffic from outside to an endpoint on another node, forwarded at XDP by the first node's network card; that it was XDP is seen by
//! what the stack does not see.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::net::SocketAddr;
use std::time::Duration;

use proxy_tests::echo::{self, Held, Udp};
use proxy_tests::netns::Netns;
use proxy_tests::process::{self, wait_until};
use proxy_tests::service::{self, external, outside};
use proxy_tests::traffic;
use proxy_tests::world::World;
use proxy_tests::xdp::{self, Foreign, Ready};
use proxy_tests::{attached, firewall, sockets};

const OPTIONS: [&str; 4] = ["--xdp-interfaces", "eth0", "--xdp-mode", "native"];
/// Agents look after what is attached every ten seconds.
const REPAIR: Duration = Duration::from_secs(15);
const PAUSE: Duration = Duration::from_millis(1);
/// Some hundred full segments.
const BULK: usize = 300_000;

/// A world with XDP on the nodes' cards, whose stack counts what it forwards between card and card on the first node.
fn world(options: &[&'static str]) -> (World, Ready) {
    let world = service::world(options, &["pod2-1"], |_| {}).unwrap();
    let topology = &world.topology;
    let ready = Ready::make(
        &[(&topology.underlay, "node1"), (&topology.underlay, "node2")],
        &[
            (&external(&world).netns, "eth0"),
            (&topology.pod(1, 0).netns, "eth0"),
            (&topology.pod(0, 0).netns, "eth0"),
        ],
    )
    .unwrap();
    firewall::load(
        node(&world),
        "table inet test {
            counter forwarded { }
            chain forward { type filter hook forward priority 0; iifname eth0 oifname eth0 counter name forwarded; }
        }",
    )
    .unwrap();
    (world, ready)
}

fn node(world: &World) -> &Netns {
    &world.topology.node(0).netns
}

/// Packets of the first node: forwarded by XDP, and by the stack from card to card.
fn counts(world: &World) -> (u64, u64) {
    (
        metric(world, "ebpf_proxy_xdp_packets_total"),
        firewall::packets(node(world), "forwarded").unwrap(),
    )
}

fn metric(world: &World, name: &str) -> u64 {
    let text = world.agents[0].metrics().unwrap();
    let line = text
        .lines()
        .find(|line| line.starts_with(name))
        .unwrap_or_else(|| panic!("no {name}"));
    line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() as u64
}

/// Targets of both families: node port, load-balancer address, externalIP.
fn targets(world: &World) -> Vec<SocketAddr> {
    outside(world.topology.node(0))
}

/// S76, S81, S96, S98, S108: TCP and UDP to every kind of outside address, both ways; the handshake and first packets alone are the stack's.
#[test]
fn established_traffic_is_forwarded_at_xdp() {
    let (world, _ready) = world(&OPTIONS);
    let client = external(&world);
    let data: Vec<u8> = (0..BULK).map(|i| (i % 251) as u8).collect();
    for target in targets(&world) {
        let (xdp, stack) = counts(&world);
        client.run(|| {
            let mut held = Held::open(target).unwrap_or_else(|f| panic!("{target}: {f}"));
            let answer = held.ask().unwrap();
            assert_eq!((answer.server.as_str(), answer.peer), ("pod2-1", target));
            assert_eq!(answer.client.ip(), world.topology.node(0).address(target.ip()));
            assert!(held.exchange(&data).unwrap() == data, "{target}: other bytes came back");
        });
        // The last FIN may be under way.
        std::thread::sleep(Duration::from_millis(50));
        let (xdp, stack) = (counts(&world).0 - xdp, counts(&world).1 - stack);
        assert!(xdp > 400, "{target}: {xdp} segments at XDP");
        assert_eq!(stack, 2, "{target}: SYN and its answer");

        let before = counts(&world);
        client.run(|| {
            let mut udp = Udp::connect(target).unwrap();
            for _ in 0..10 {
                let answer = udp.ask().unwrap_or_else(|f| panic!("UDP to {target}: {f}"));
                assert_eq!((answer.server.as_str(), answer.peer), ("pod2-1", target));
            }
        });
        let after = counts(&world);
        assert_eq!((after.0 - before.0, after.1 - before.1), (19, 1), "UDP to {target}");
    }
    let counted = metric(&world, "ebpf_proxy_service_packets_total{");
    assert!(counted > 0);
    for agent in &world.agents {
        verify(&world, agent.node(), 0);
    }
}

/// What an endpoint on the node itself serves is rewritten by tc, as are packets from pods; XDP has no part in it.
#[test]
fn local_endpoints_and_pods_are_left_to_tc() {
    let (world, _ready) = world(&OPTIONS);
    service::publish(&world, &["pod1-1"], |_| {}).unwrap();
    let xdp = counts(&world).0;
    for target in targets(&world) {
        for request in [echo::tcp, echo::udp] {
            assert_eq!(external(&world).run(|| request(target)).unwrap().server, "pod1-1");
            assert_eq!(
                world.topology.pod(0, 1).run(|| request(target)).unwrap().server,
                "pod1-1"
            );
        }
    }
    assert_eq!(counts(&world).0, xdp);
}

/// S152, S153: what does not fit the next link is told to its sender by the stack, and fragments go their way through it.
#[test]
fn what_xdp_cannot_do_the_stack_does() {
    const NARROW: i32 = 1_300;
    let (world, _ready) = world(&OPTIONS);
    let client = external(&world);
    for target in targets(&world) {
        let large: Vec<u8> = (0..8_000).map(|i| (i % 251) as u8).collect();
        let answer = client.run(|| {
            let socket = sockets::udp_to(target).unwrap();
            socket.send(&large).unwrap();
            let mut buffer = vec![0; 65_536];
            let length = socket
                .recv(&mut buffer)
                .unwrap_or_else(|error| panic!("8,000 bytes to {target}: {error}"));
            buffer.truncate(length);
            buffer
        });
        assert!(answer.ends_with(&large), "{target}");
    }
    let second = world.topology.node(1);
    node(&world)
        .ip(&format!(
            "route replace 10.244.2.0/24 via {} mtu lock {NARROW}
             route replace fd00:10:244:2::/64 via {} mtu lock {NARROW}",
            second.v4, second.v6
        ))
        .unwrap();
    for target in targets(&world) {
        let before = counts(&world).0;
        client.run(|| {
            let mut held = Held::open(target).unwrap();
            let data = vec![7; BULK];
            assert!(held.exchange(&data).unwrap() == data);
            assert_eq!(sockets::path_mtu(held.stream(), target).unwrap(), NARROW, "{target}");
        });
        assert!(counts(&world).0 > before + 400, "{target}: what fits is XDP's");
    }
}

/// S164, S169: an agent that is killed, restarted, or loses its links; traffic does not notice, and at the end nothing is left.
#[test]
fn xdp_survives_the_agent_and_is_removed_with_it() {
    let (mut world, _ready) = world(&OPTIONS);
    let target = targets(&world)[0];
    let netns = external(&world).netns.clone();
    let mut held = netns.run(|| Held::open(target)).unwrap();
    let asking = traffic::repeat(|body| netns.spawn(body), PAUSE, move || held.ask());
    let dialling = traffic::repeat(|body| netns.spawn(body), PAUSE, move || echo::tcp(target));
    let more = |world: &World| {
        assert!(
            asking.wait_for(50, REPAIR) && dialling.wait_for(20, REPAIR),
            "requests came to a halt"
        );
        assert_eq!(attached::xdp(node(world)).unwrap(), ["eth0 native xdp_forward"]);
    };
    more(&world);
    let before = attached::xdp_link(&world.agents[0].bpf_dir()).unwrap();
    world.agents[0].kill();
    more(&world);
    world.agents[0].launch().unwrap();
    more(&world);
    assert_eq!(
        attached::xdp_link(&world.agents[0].bpf_dir()).unwrap(),
        before,
        "the program was replaced in its link"
    );
    // Taken away by somebody: tc goes on alone until the agent has repaired it.
    process::run(
        node(&world)
            .command("bpftool")
            .args(["link", "detach", "id", &before.to_string()]),
    )
    .unwrap();
    verify(&world, "node1", 1);
    let repaired = wait_until(REPAIR, || {
        (!attached::xdp(node(&world)).unwrap().is_empty()).then_some(())
    });
    assert!(repaired.is_some());
    more(&world);
    let packets = counts(&world).0;
    assert!(asking.wait_for(50, REPAIR));
    assert!(counts(&world).0 >= packets + 50);
    // Without the option it is taken off.
    let options = ["--cluster-cidr", proxy_tests::topology::CLUSTER_CIDR];
    world.agents[0].stop();
    world.agents[0].set_options(&options);
    world.agents[0].launch().unwrap();
    let gone = wait_until(REPAIR, || attached::xdp(node(&world)).unwrap().is_empty().then_some(()));
    assert!(gone.is_some());
    assert!(asking.wait_for(50, REPAIR) && dialling.wait_for(20, REPAIR));
    for running in [asking, dialling] {
        let samples = running.stop();
        assert_eq!(
            traffic::failures(&samples).len(),
            0,
            "{:?}",
            traffic::failures(&samples).first()
        );
    }
    // And `cleanup` takes it off where the agent left it.
    let second = &mut world.agents[1];
    second.stop();
    assert_eq!(attached::xdp(second.netns()).unwrap(), ["eth0 native xdp_forward"]);
    second.command(&["cleanup"]).unwrap();
    assert!(attached::xdp(second.netns()).unwrap().is_empty());
}

/// Somebody else's XDP program stays, services are served by tc, and the agent and `doctor` say so; when it is gone, the agent's comes.
#[test]
fn a_foreign_program_is_left_alone() {
    let world = {
        let mut world = service::world_without_agents(&OPTIONS).unwrap();
        let pass = Foreign::pass().unwrap();
        let foreign = node(&world).run(|| pass.attach(xdp::index("eth0").unwrap()).unwrap());
        world.start_agents().unwrap();
        service::publish(&world, &["pod2-1"], |_| {}).unwrap();
        for target in targets(&world) {
            assert_eq!(external(&world).run(|| echo::tcp(target)).unwrap().server, "pod2-1");
        }
        assert_eq!(attached::xdp(node(&world)).unwrap(), ["eth0 native foreign"]);
        let log = world.agents[0].log();
        assert!(log.contains("somebody else's XDP program"), "{log}");
        let doctor = world.agents[0].tool(&[&["doctor"][..], &OPTIONS].concat()).unwrap();
        let said = String::from_utf8_lossy(&doctor.stdout).into_owned();
        assert!(said.contains("eth0 has somebody else's XDP program"), "{said}");
        drop(foreign);
        world
    };
    let attached = wait_until(REPAIR, || {
        (attached::xdp(node(&world)).unwrap() == ["eth0 native xdp_forward"]).then_some(())
    });
    assert!(attached.is_some());
}

/// Runs `verify` on a node; fails if its exit code is another.
#[track_caller]
fn verify(world: &World, node: &str, wanted: i32) {
    let agent = world.agents.iter().find(|agent| agent.node() == node).unwrap();
    let manifests = world.manifests.dir().display().to_string();
    let bpf_dir = agent.bpf_dir().display().to_string();
    let cgroup = agent.cgroup().display().to_string();
    let options = [
        &[
            "verify",
            "--manifests",
            &manifests,
            "--node-name",
            node,
            "--bpf-dir",
            &bpf_dir,
            "--cgroup",
            &cgroup,
            "--cluster-cidr",
            proxy_tests::topology::CLUSTER_CIDR,
        ][..],
        &OPTIONS,
    ]
    .concat();
    let output = agent.tool(&options).unwrap();
    assert_eq!(
        output.status.code(),
        Some(wanted),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
