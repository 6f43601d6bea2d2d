//! What the path does to packets: links that are too narrow for them, and fragments.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use proxy_tests::echo::{self, Failure, Held};
use proxy_tests::process::{self, wait_until};
use proxy_tests::service::{self, LB, NODE_PORT, external, to_sockets};
use proxy_tests::sockets;
use proxy_tests::topology::Host;
use proxy_tests::world::{World, vips};
use serde_json::json;

/// Of every link.
const WIDE: i32 = 1500;
/// Of the narrow one; IPv6 allows nothing below 1280.
const NARROW: i32 = 1300;
/// Some hundred full segments.
const BULK: usize = 300_000;
/// A lost segment that is sent again on a timer costs 200 ms at the least; a path that swallows large ones never ends.
const BOUND: Duration = Duration::from_secs(5);

/// Lets a node, counted from 1, forward nothing larger than [`NARROW`], in any direction, and complain of what is.
fn narrow(world: &World, node: u8) {
    let other = 3 - node;
    let (host, next) = (
        world.topology.node(usize::from(node) - 1),
        world.topology.node(usize::from(other) - 1),
    );
    let mtu = format!("mtu lock {NARROW}");
    host.netns
        .ip(&format!(
            "route replace 10.244.{other}.0/24 via {} {mtu}
             route replace 10.244.{node}.0/24 dev cni0 proto kernel scope link src 10.244.{node}.1 {mtu}
             route replace 192.168.56.0/24 dev eth0 proto kernel scope link src {} {mtu}
             route replace fd00:10:244:{other}::/64 via {} {mtu}
             route replace fd00:10:244:{node}::/64 dev cni0 proto kernel metric 256 {mtu}
             route replace fd00:56::/64 dev eth0 proto kernel metric 256 {mtu}",
            next.v4, host.v4, next.v6
        ))
        .unwrap();
}

fn forget_paths(world: &World) {
    for netns in world.topology.namespaces() {
        process::run(netns.command("ip").args(["route", "flush", "cache"])).unwrap();
        process::run(netns.command("ip").args(["-6", "route", "flush", "cache"])).unwrap();
    }
}

/// Did an ICMP error about this destination arrive: does the route cache have a path MTU for it?
fn knows_narrow(host: &Host, peer: SocketAddr) -> bool {
    let ip = peer.ip().to_string();
    let route = process::run(host.netns.command("ip").args(["route", "get", &ip])).unwrap();
    route.contains(&format!("mtu {NARROW}"))
}

/// Large amounts both ways, and both ends learn the path MTU for the address that they themselves see.
fn bulk(world: &World, client: &Host, target: SocketAddr, server: &Host) {
    let what = format!("{} to {target}", client.name);
    forget_paths(world);
    let begin = Instant::now();
    let (seen, answer) = client.run(|| {
        let mut held = Held::open(target).unwrap_or_else(|f| panic!("{what}: {f}"));
        assert_eq!(sockets::path_mtu(held.stream(), target).unwrap(), WIDE, "{what}");
        let data: Vec<u8> = (0..BULK).map(|i| (i % 251) as u8).collect();
        let back = held.exchange(&data).unwrap_or_else(|f| panic!("{what}: {f}"));
        assert!(back == data, "{what}: other bytes came back");
        (sockets::path_mtu(held.stream(), target).unwrap(), held.ask().unwrap())
    });
    assert!(begin.elapsed() < BOUND, "{what}: took {:?}", begin.elapsed());
    assert_eq!(answer.server, server.name, "{what}");
    assert_eq!(seen, NARROW, "{what}: the client's socket");
    assert!(knows_narrow(client, target), "{what}: the client's route cache");
    assert!(
        knows_narrow(server, answer.client),
        "{what}: the server's route cache, for {}",
        answer.client
    );
}

/// A UDP socket that must not fragment is told.
fn datagrams(world: &World, run: impl Fn(&mut (dyn FnMut() + Send)), who: &str, target: SocketAddr) {
    let what = format!("UDP, {who} to {target}");
    forget_paths(world);
    run(&mut || {
        let socket = sockets::udp_unfragmented(target).unwrap();
        let told = wait_until(BOUND, || socket.send(&[7; 1_400]).err().and_then(|e| e.raw_os_error()));
        assert_eq!(told, Some(libc::EMSGSIZE), "{what}");
        assert_eq!(sockets::path_mtu(&socket, target).unwrap(), NARROW, "{what}");
        // What fits passes, once every error that came in was told.
        assert!(wait_until(BOUND, || socket.send(&[7; 1_000]).ok()).is_some(), "{what}");
        let mut answer = [0; 2_000];
        assert!(socket.recv(&mut answer).unwrap() > 1_000, "{what}");
    });
}

fn path_mtu_is_discovered(narrow_node: u8) {
    let world = service::world(&[], &["pod2-1"], |_| {}).unwrap();
    narrow(&world, narrow_node);
    let outside = external(&world);
    let pod = world.topology.pod(0, 1);
    for vip in vips() {
        bulk(&world, pod, vip, world.topology.pod(1, 0));
        datagrams(&world, |body| pod.run(body), "pod", vip);
        // A process of the node, whose UDP is translated packet by packet.
        if narrow_node == 2 {
            datagrams(&world, |body| world.agents[0].run(body), "host", vip);
        }
    }
    for target in world
        .topology
        .node(0)
        .sockets(NODE_PORT)
        .into_iter()
        .chain(to_sockets(LB))
    {
        bulk(&world, outside, target, world.topology.pod(1, 0));
        datagrams(&world, |body| outside.run(body), "external", target);
    }
    if narrow_node == 1 {
        service::publish(&world, &["pod1-1"], |service| {
            service["spec"]["externalTrafficPolicy"] = json!("Local");
        })
        .unwrap();
        for target in world
            .topology
            .node(0)
            .sockets(NODE_PORT)
            .into_iter()
            .chain(to_sockets(LB))
        {
            bulk(&world, outside, target, world.topology.pod(0, 0));
            datagrams(&world, |body| outside.run(body), "external", target);
        }
    }
}

/// S152: the node that translates is the one that cannot forward: it complains about packets that it translated, or will
/// translate on their way out.
#[test]
fn path_mtu_is_discovered_where_packets_are_translated() {
    path_mtu_is_discovered(1);
}

/// S152: a router behind the translation complains: about translated packets, to the translating node.
#[test]
fn path_mtu_is_discovered_behind_the_translation() {
    path_mtu_is_discovered(2);
}

/// One datagram there and back.
fn large(target: SocketAddr, length: usize) -> Result<String, Failure> {
    let socket = sockets::udp_to(target)?;
    let request: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
    socket.send(&request)?;
    let mut buffer = vec![0; 65_536];
    let received = socket.recv(&mut buffer)?;
    let end = buffer.iter().position(|byte| *byte == b'\n').unwrap();
    assert!(
        buffer[end + 1..received] == request,
        "{length} bytes to {target}: others came back"
    );
    let line = String::from_utf8_lossy(&buffer[..end]);
    Ok(line.split(' ').next().unwrap_or_default().to_owned())
}

/// S153: requests and answers that are fragmented, through every kind of address, from everybody; also as the first packet of a
/// flow, when only the first fragment says whose it is.
#[test]
fn large_datagrams_pass_both_ways() {
    let world = service::world(&[], &["pod2-1"], |_| {}).unwrap();
    let pod = world.topology.pod(0, 1);
    for backend in ["pod2-1", "pod1-1"] {
        service::publish(&world, &[backend], |_| {}).unwrap();
        for length in [2_000, 20_000] {
            for target in service::outside(world.topology.node(0)).into_iter().chain(vips()) {
                for (who, host) in [("external", external(&world)), ("pod", pod)] {
                    let answer = host.run(|| large(target, length));
                    assert_eq!(answer.as_deref(), Ok(backend), "{length} bytes, {who} to {target}");
                }
                let answer = world.agents[0].run(|| large(target, length));
                assert_eq!(answer.as_deref(), Ok(backend), "{length} bytes, the node to {target}");
                assert!(external(&world).run(|| echo::udp(target)).is_ok());
            }
        }
    }
}

/// S109, S153: the first packet of a flow may be too large for the interface towards its backend; that is no reason to forget the
/// masquerade.
#[test]
fn a_flow_begins_with_a_datagram_too_large_for_its_link() {
    let world = service::world(&[], &["pod1-1"], |_| {}).unwrap();
    let outside = external(&world);
    world
        .topology
        .node(0)
        .netns
        .ip(&format!("link set cni0 mtu {NARROW}"))
        .unwrap();
    for target in service::outside(world.topology.node(0)) {
        let client = outside.run(|| {
            let socket = sockets::udp_to(target).unwrap();
            sockets::let_routers_fragment(&socket, target).unwrap();
            // Routers never fragment IPv6: the first one is lost, and the kernel knows better with the next.
            let mut buffer = [0; 2_000];
            let received = wait_until(BOUND, || {
                socket.send(&[b'x'; 1_400]).unwrap();
                socket.recv(&mut buffer).ok()
            });
            let line = String::from_utf8_lossy(&buffer[..received.unwrap_or_else(|| panic!("{target}: no answer"))]);
            line.split(' ').nth(1).unwrap().parse::<SocketAddr>().unwrap()
        });
        assert_ne!(client.ip(), outside.address(target.ip()), "{target}: masqueraded");
    }
}
