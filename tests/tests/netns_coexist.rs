//! Others on the same node: hostPorts, listeners on our ports, network policies, firewalls, connection tracking, foreign tc
//! filters, and processes that no socket program sees.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, Ordering};

use proxy_common::addr::Protocol;
use proxy_tests::echo::{self, CONNECTED, Client, EchoServer, Failure, Held, Outcome, PATIENCE, REQUESTS};
use proxy_tests::process::{self, wait_until};
use proxy_tests::service::{self, EXTERNAL_IP, LB, NODE_PORT, external, to_sockets};
use proxy_tests::topology::Host;
use proxy_tests::world::{ARRIVAL, World, answered_by, names, vips};
use proxy_tests::{firewall, maps};
use serde_json::json;

/// Of the hostPorts.
const HOST_PORT: u16 = 8_081;
/// Enough that both of two backends are chosen: missing one has a chance of 2^-39.
const ENOUGH: usize = 40;

fn reaches(client: &Host, target: SocketAddr, server: &str) {
    for (kind, request) in CONNECTED {
        let what = format!("{kind}, {} to {target}", client.name);
        let answers = client.run(|| answered_by(3, &what, || request(target)));
        assert_eq!(answers, names(&[server]), "{what}");
    }
}

/// S197: hostPorts as the portmap plugin makes them, one number for two protocols and pods, beside services; each has what is its
/// own.
#[test]
fn host_ports_and_services_keep_out_of_each_others_way() {
    let world = service::world(&[], &["pod2-1"], |_| {}).unwrap();
    let node = world.topology.node(0);
    let (tcp, udp) = (world.topology.pod(0, 0), world.topology.pod(0, 1));
    let dnat = format!(
        "fib daddr type local tcp dport {HOST_PORT} dnat ip to {}:8080
         fib daddr type local tcp dport {HOST_PORT} dnat ip6 to [{}]:8080
         fib daddr type local udp dport {HOST_PORT} dnat ip to {}:8080
         fib daddr type local udp dport {HOST_PORT} dnat ip6 to [{}]:8080",
        tcp.v4, tcp.v6, udp.v4, udp.v6
    );
    let rules = format!(
        "table inet hostport {{
             chain prerouting {{ type nat hook prerouting priority dstnat;\n{dnat}\n}}
             chain output {{ type nat hook output priority -100;\n{dnat}\n}}
             chain postrouting {{ type nat hook postrouting priority srcnat;
                 ip saddr 10.244.1.0/24 ct status dnat masquerade
                 ip6 saddr fd00:10:244:1::/64 ct status dnat masquerade
             }}
         }}"
    );
    firewall::load(&node.netns, &rules).unwrap();
    let remote = world.topology.pod(1, 1);
    for client in [external(&world), remote, tcp, udp, node] {
        for target in node.sockets(HOST_PORT) {
            for ((kind, request), server) in CONNECTED.into_iter().zip([tcp, udp]) {
                // That would need bridge ports in hairpin mode, which is not our affair.
                if client.name == server.name {
                    continue;
                }
                let what = format!("hostPort, {kind}, {} to {target}", client.name);
                let answers = client.run(|| answered_by(3, &what, || request(target)));
                assert_eq!(answers, names(&[&server.name]), "{what}");
            }
        }
        for vip in vips() {
            reaches(client, vip, "pod2-1");
        }
        if client.name != node.name {
            for target in node.sockets(NODE_PORT) {
                reaches(client, target, "pod2-1");
            }
        }
    }
}

/// Ports of a namespace on which somebody listens, or receives datagrams.
fn bound_ports(host: &Host) -> Vec<u16> {
    let read = |file: &str| {
        host.run(|| std::fs::read_to_string(format!("/proc/thread-self/net/{file}")))
            .unwrap()
    };
    let tables = ["tcp", "tcp6", "udp", "udp6"].map(read);
    let rows = tables.iter().flat_map(|table| table.lines().skip(1));
    rows.map(|row| {
        let local = row.split_whitespace().nth(1).unwrap();
        u16::from_str_radix(local.rsplit(':').next().unwrap(), 16).unwrap()
    })
    .collect()
}

/// S36, S93, S99: node ports and externalIPs need no socket and leave none; who listens on the same port, or on the same address
/// that is an externalIP, has the other ports, and everything again when the service is gone.
#[test]
fn listeners_on_the_node_have_what_no_service_has() {
    let world = service::empty_world(&[]).unwrap();
    let node = world.topology.node(0);
    let own = node.sockets(80);
    let ips = own.map(|address| address.ip().to_string());
    service::publish(&world, &["pod2-1"], |service| {
        service["spec"]["externalIPs"] = json!(ips);
    })
    .unwrap();
    let bound = bound_ports(node);
    assert!(
        !bound.contains(&NODE_PORT) && !bound.contains(&80),
        "sockets of ours: {bound:?}"
    );
    let everywhere: SocketAddr = format!("[::]:{NODE_PORT}").parse().unwrap();
    let addresses = [vec![everywhere], own.to_vec(), node.sockets(81).to_vec()].concat();
    let _listener = EchoServer::start(&node.netns, "listener", &addresses).unwrap();
    let pod = world.topology.pod(0, 1);
    for client in [external(&world), pod] {
        for target in node.sockets(NODE_PORT).into_iter().chain(own) {
            reaches(client, target, "pod2-1");
        }
        for target in node.sockets(81) {
            reaches(client, target, "listener");
        }
    }
    for target in node.sockets(NODE_PORT).into_iter().chain(own) {
        for (kind, request) in REQUESTS {
            let answer = world.agents[0].run(|| request(target)).unwrap();
            assert_eq!(
                (answer.server.as_str(), answer.peer),
                ("pod2-1", target),
                "{kind}, the node"
            );
        }
    }
    world.manifests.remove("web").unwrap();
    for target in node.sockets(NODE_PORT).into_iter().chain(own) {
        let back = wait_until(ARRIVAL, || {
            let answer = external(&world).run(|| echo::tcp(target)).ok()?;
            (answer.server == "listener").then_some(())
        });
        assert!(back.is_some(), "{target} is the node's again");
    }
}

/// Everything goes into table `inet test`: counters, and a chain at each hook that counts what connection tracking finds invalid.
fn tracking(forward: &str) -> String {
    let invalid = "ct state invalid counter name invalid";
    format!(
        "table inet test {{
             counter invalid {{ }}\ncounter vip {{ }}\ncounter allowed {{ }}
             chain prerouting {{ type filter hook prerouting priority 0; {invalid}; }}
             chain input {{ type filter hook input priority 0; {invalid}; }}
             chain output {{ type filter hook output priority 0; {invalid}; }}
             chain forward {{ type filter hook forward priority 0; {forward}
             }}
         }}"
    )
}

/// S196: rules about pods see the pod and the endpoint, at every node of the way, and never the service.
#[test]
fn network_policies_see_pods_and_endpoints() {
    let world = service::world(&[], &["pod2-1"], |_| {}).unwrap();
    let (allowed, other, server) = (
        world.topology.pod(0, 0),
        world.topology.pod(0, 1),
        world.topology.pod(1, 0),
    );
    let forward = format!(
        "policy drop;
         ip daddr {{ 10.96.0.0/16, 203.0.113.0/24 }} counter name vip
         ip6 daddr {{ fd00:96::/112, 2001:db8:113::/64 }} counter name vip
         ip saddr {{ 10.96.0.0/16, 203.0.113.0/24 }} counter name vip
         ip6 saddr {{ fd00:96::/112, 2001:db8:113::/64 }} counter name vip
         ct state established,related accept
         ip saddr {} ip daddr {} counter name allowed accept
         ip6 saddr {} ip6 daddr {} counter name allowed accept",
        allowed.v4, server.v4, allowed.v6, server.v6
    );
    let nodes = [world.topology.node(0), world.topology.node(1)];
    for node in nodes {
        firewall::load(&node.netns, &tracking(&forward)).unwrap();
    }
    for vip in vips() {
        reaches(allowed, vip, "pod2-1");
        for (kind, request) in CONNECTED {
            assert_eq!(
                other.run(|| request(vip)),
                Err(Failure::Timeout),
                "{kind} to {vip} is not allowed"
            );
        }
    }
    for node in nodes {
        assert!(firewall::packets(&node.netns, "allowed").unwrap() > 0, "{}", node.name);
        assert_eq!(
            firewall::packets(&node.netns, "vip").unwrap(),
            0,
            "{}: nobody sees the service",
            node.name
        );
        assert_eq!(firewall::packets(&node.netns, "invalid").unwrap(), 0, "{}", node.name);
    }
}

/// S150, S196: where connection tracking is active, it understands every packet of ours: translated at arrival, masqueraded on
/// the way out, from pods, from outside and from the node, through large transfers and closed connections.
fn connection_tracking_follows(socket_lb: &'static str) {
    let world = service::world(&["--socket-lb", socket_lb], &["pod2-1"], |_| {}).unwrap();
    let nodes = [world.topology.node(0), world.topology.node(1)];
    for node in nodes {
        firewall::load(&node.netns, &tracking("ct state invalid counter name invalid")).unwrap();
    }
    let use_all = |targets: Vec<SocketAddr>, run: &dyn Fn(&(dyn Fn() + Sync))| {
        for target in targets {
            run(&|| {
                for (kind, request) in REQUESTS {
                    request(target).unwrap_or_else(|f| panic!("{kind} to {target}: {f}"));
                }
                let mut held = Held::open(target).unwrap();
                assert!(held.exchange(&[7; 200_000]).unwrap() == [7; 200_000]);
            });
        }
    };
    let everything = || [vips().to_vec(), service::outside(world.topology.node(0))].concat();
    use_all(everything(), &|body| world.topology.pod(0, 1).run(body));
    use_all(everything(), &|body| external(&world).run(body));
    let beyond = [vips(), to_sockets(LB), to_sockets(EXTERNAL_IP)].concat();
    use_all(beyond, &|body| world.agents[0].run(body));
    for node in nodes {
        assert_eq!(
            firewall::packets(&node.netns, "invalid").unwrap(),
            0,
            "{}, --socket-lb {socket_lb}",
            node.name
        );
    }
}

#[test]
fn connection_tracking_finds_nothing_invalid() {
    connection_tracking_follows("host");
}

#[test]
fn connection_tracking_finds_nothing_invalid_without_socket_programs() {
    connection_tracking_follows("off");
}

/// S200: forwarded packets of services pass the node's firewall as pod traffic. One that drops by default needs what pods need
/// anyway: rules that accept the pod networks.
#[test]
fn a_firewall_that_drops_needs_rules_for_the_pod_networks() {
    let world = service::world(&[], &["pod2-1"], |_| {}).unwrap();
    let nodes = [world.topology.node(0), world.topology.node(1)];
    let pod = world.topology.pod(0, 1);
    for node in nodes {
        firewall::load(&node.netns, &tracking("policy drop;")).unwrap();
    }
    assert_eq!(pod.run(|| echo::tcp(vips()[0])), Err(Failure::Timeout));
    for node in nodes {
        let accept = "table inet test { chain forward {
            ip saddr 10.244.0.0/16 accept
            ip daddr 10.244.0.0/16 accept
            ip6 saddr fd00:10:244::/48 accept
            ip6 daddr fd00:10:244::/48 accept
        }
}";
        firewall::load(&node.netns, accept).unwrap();
    }
    let outside = service::outside(world.topology.node(0));
    for target in vips().into_iter().chain(outside) {
        reaches(pod, target, "pod2-1");
        reaches(external(&world), target, "pod2-1");
    }
}

/// Packets that a filter of the first pod's interface has counted, there and back.
fn filtered(world: &World, interface: &str) -> [u64; 2] {
    ["ingress", "egress"].map(|hook| {
        let mut command = world.topology.node(0).netns.command("tc");
        let listed = process::run(command.args(["-s", "filter", "show", "dev", interface, hook])).unwrap();
        let after = listed
            .split(" bytes ")
            .nth(1)
            .unwrap_or_else(|| panic!("no counter in {listed}"));
        after.split(' ').next().unwrap().parse().unwrap()
    })
}

fn add_filters(world: &World, interface: &str) {
    let tc = |line: &str| process::run(world.topology.node(0).netns.command("tc").args(line.split(' '))).unwrap();
    tc(&format!("qdisc replace dev {interface} clsact"));
    world
        .topology
        .node(0)
        .netns
        .ip("link add copies type bridge\nlink set copies up")
        .unwrap();
    for hook in ["ingress", "egress"] {
        // A copy for somebody who listens; the packet goes its way.
        let copy = "u32 match u32 0 0 action mirred egress mirror dev copies";
        tc(&format!("filter add dev {interface} {hook} prio 7 protocol all {copy}"));
    }
}

/// A tc filter of somebody else, there before us or added after us, sees the traffic of services and of others, whichever way our
/// programs are attached; and nobody takes the other's away.
fn foreign_filters_see_traffic(attach: &'static str, first: bool) {
    let mut world = World::new(&proxy_tests::world::Setup {
        options: vec!["--attach", attach, "--exclude-interfaces", "copies"],
        without_agents: true,
        ..Default::default()
    })
    .unwrap();
    let interface = world.topology.nodes[0].pods[0].node_interface.clone();
    if first {
        add_filters(&world, &interface);
    }
    world.start_agents().unwrap();
    if !first {
        add_filters(&world, &interface);
    }
    world.publish(&["pod2-1"]).unwrap();
    let pod = world.topology.pod(0, 0);
    let direct = world.topology.pod(1, 1).sockets(8080);
    for (target, server) in vips()
        .into_iter()
        .map(|v| (v, "pod2-1"))
        .chain(direct.map(|d| (d, "pod2-2")))
    {
        let before = filtered(&world, &interface);
        pod.run(|| echo::udp(target)).unwrap();
        let after = filtered(&world, &interface);
        for hook in [0, 1] {
            assert!(
                after[hook] > before[hook],
                "{attach}, {target}, hook {hook}: {before:?}, {after:?}"
            );
        }
        reaches(pod, target, server);
    }
    let agent = &mut world.agents[0];
    agent.stop();
    agent.command(&["cleanup"]).unwrap();
    let before = filtered(&world, &interface);
    reaches(world.topology.pod(0, 0), direct[0], "pod2-2");
    assert_ne!(
        filtered(&world, &interface),
        before,
        "{attach}: the foreign filter outlives us"
    );
}

#[test]
fn foreign_filters_see_traffic_beside_tcx_links() {
    foreign_filters_see_traffic("tcx", true);
    foreign_filters_see_traffic("tcx", false);
}

#[test]
fn foreign_filters_see_traffic_beside_classic_filters() {
    foreign_filters_see_traffic("classic", true);
    foreign_filters_see_traffic("classic", false);
}

/// S75: what the kernel itself dials, and processes outside of the agent's cgroup, reach every address that is not the node's
/// own, are pinned by affinity and refused at once, with nothing but packet programs.
#[test]
fn sockets_outside_the_cgroup_are_served_packet_by_packet() {
    let world = service::world(&[], &["pod1-1", "pod2-1"], |_| {}).unwrap();
    let node = world.topology.node(0);
    let other_node = world.topology.node(1).sockets(NODE_PORT);
    let targets = [vips(), to_sockets(LB), to_sockets(EXTERNAL_IP), other_node].concat();
    for target in &targets {
        for (kind, request) in REQUESTS {
            let what = format!("{kind} to {target}");
            let answers = node.run(|| answered_by(ENOUGH, &what, || request(*target)));
            assert_eq!(answers, names(&["pod1-1", "pod2-1"]), "{what}");
            assert_eq!(node.run(|| request(*target)).unwrap().peer, *target, "{what}");
        }
    }
    service::publish(&world, &["pod1-1", "pod2-1"], |service| {
        service["spec"]["sessionAffinity"] = json!("ClientIP");
        service["spec"]["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": 60}});
    })
    .unwrap();
    let pinned = [vips(), to_sockets(LB), to_sockets(EXTERNAL_IP)].concat();
    for (target, protocol) in pinned.iter().flat_map(|t| [(t, Protocol::Tcp), (t, Protocol::Udp)]) {
        let bpf_dir = world.agents[0].bpf_dir();
        let arrived = wait_until(ARRIVAL, || {
            let seconds = maps::affinity_seconds(&bpf_dir, *target, protocol).ok()?;
            (seconds == Some(60)).then_some(())
        });
        assert!(arrived.is_some(), "{target} {protocol} has affinity");
    }
    // From ports that none of the flows above has had: those stay where they are.
    let port = AtomicU16::new(20_000);
    let fresh = || Client {
        port: port.fetch_add(1, Ordering::Relaxed),
        patience: PATIENCE,
    };
    type Ask = fn(&Client, SocketAddr) -> Outcome;
    let kinds: [(&str, Ask); 3] = [
        ("TCP", Client::tcp),
        ("UDP", Client::udp),
        ("unconnected UDP", Client::udp_unconnected),
    ];
    for target in pinned {
        for (kind, ask) in kinds {
            let what = format!("{kind} to {target}, with affinity");
            let answers = node.run(|| answered_by(20, &what, || ask(&fresh(), target)));
            assert_eq!(answers.len(), 1, "{what}");
        }
    }
    service::publish(&world, &[], |_| {}).unwrap();
    for target in targets {
        for (kind, request) in CONNECTED {
            assert_eq!(
                node.run(|| request(target)),
                Err(Failure::Refused),
                "{kind} to {target}"
            );
        }
    }
}
