//! The lives of TCP connections through the proxy: silent ones, half-closed ones, new ones from the port of an old one, and
//! segments that belong to none of them.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::time::Duration;

use etherparse::TcpHeader;
use proxy_tests::echo::{self, Held, Udp};
use proxy_tests::process::wait_until;
use proxy_tests::service::{self, NODE_PORT, external};
use proxy_tests::topology::Host;
use proxy_tests::world::{World, names, vips};
use proxy_tests::{maps, sockets};

/// Far longer than anything but an open TCP connection is remembered, and than any test of the suite.
const LONG: u64 = 1_800;
/// The agent walks through the table every ten seconds, and at its start.
const WALK: Duration = Duration::from_secs(30);
/// An acknowledgement may be held back so long; after that nobody says anything unasked.
const DELAYED_ACK: Duration = Duration::from_millis(250);
/// Far longer than a child of the test takes from its beginning to the program it becomes.
const CHILD_START: Duration = Duration::from_secs(5);
/// Sequence numbers of which at most one can be near a connection's.
const STRAY: [u32; 4] = [0, 1 << 30, 2 << 30, 3 << 30];
/// Enough that both of two backends are chosen: missing one has a chance of 2^-39.
const ENOUGH: usize = 40;

/// Lets time pass for the connections of the first node, and its agent restart; when this returns, the agent has walked through the
/// table: it has removed a UDP flow.
fn let_time_pass(world: &mut World, vip: SocketAddr) {
    assert!(world.topology.pod(0, 1).run(|| echo::udp(vip)).is_ok());
    let agent = &mut world.agents[0];
    agent.stop();
    std::thread::sleep(DELAYED_ACK);
    maps::age_connections(&agent.bpf_dir(), LONG).unwrap();
    agent.launch().unwrap();
    let mut listed = String::new();
    let gone = wait_until(WALK, || {
        listed = agent.command(&["connection", "list"]).unwrap();
        (!listed.to_lowercase().contains("udp")).then_some(())
    });
    assert!(gone.is_some(), "the UDP flow is still there:\n{listed}");
}

/// S151, S154: a connection that is silent for long, and a half-closed one whose other half goes on, outlive the agent and its
/// clean-ups; whether they are masqueraded or not.
#[test]
fn silent_and_half_closed_connections_live_on() {
    const BULK: usize = 16_000_000;
    let mut world = service::world(&[], &["pod2-1"], |_| {}).unwrap();
    let [v4, v6] = vips();
    let node_ports = world.topology.node(0).sockets(NODE_PORT);
    let mut connections = Vec::new();
    for target in vips().into_iter().chain(node_ports) {
        let client = if target.port() == NODE_PORT {
            external(&world)
        } else {
            world.topology.pod(0, 0)
        };
        let mut silent = client.run(|| Held::open(target)).unwrap();
        silent.ask().unwrap();
        // The answer does not fit into any buffer, so that most of it comes after the client's FIN.
        let half = client.run(|| Held::open(target)).unwrap();
        half.stream().write_all(format!("{BULK}\n").as_bytes()).unwrap();
        half.stream().write_all(&vec![7; BULK]).unwrap();
        half.stream().shutdown(Shutdown::Write).unwrap();
        connections.push((target, silent, half));
    }
    for vip in [v4, v6] {
        let_time_pass(&mut world, vip);
    }
    for (target, mut silent, half) in connections {
        let mut data = Vec::new();
        half.stream()
            .read_to_end(&mut data)
            .unwrap_or_else(|e| panic!("{target}, half closed: {e}"));
        assert!(data == vec![7; BULK], "{target}, half closed: {} bytes", data.len());
        let answer = silent.ask().unwrap_or_else(|f| panic!("{target}, silent: {f}"));
        assert_eq!((answer.server.as_str(), answer.peer), ("pod2-1", target));
    }
}

/// S154, S61: as soon as a connection is closed, in order or by a reset, its port opens a new one, for which a backend is chosen
/// anew.
#[test]
fn the_port_of_a_closed_connection_opens_a_new_one() {
    let world = service::world(&[], &["pod1-1", "pod2-1"], |_| {}).unwrap();
    let node_ports = world.topology.node(0).sockets(NODE_PORT);
    for target in vips().into_iter().chain(node_ports) {
        for reset in [true, false] {
            let clients: [(&Host, u16); 2] = [(external(&world), 40_001), (world.topology.pod(0, 1), 40_002)];
            for (client, port) in clients {
                let what = format!("{} to {target}, reset: {reset}", client.name);
                let servers: BTreeSet<String> = client.run(|| {
                    let request =
                        |i| open_and_close(port, target, reset).unwrap_or_else(|f| panic!("{what}, turn {i}: {f}"));
                    (0..ENOUGH).map(request).collect()
                });
                assert_eq!(servers, names(&["pod1-1", "pod2-1"]), "{what}");
            }
        }
    }
}

fn open_and_close(port: u16, target: SocketAddr, reset: bool) -> Result<String, echo::Failure> {
    // Where another test of this process starts a program at this moment, the former socket is open in its child too, until that has
    // become the program: the kernel does not give the port away before.
    let connect = || match sockets::tcp_from(port, target) {
        Err(echo::Failure::Other(ErrorKind::AddrNotAvailable)) => None,
        answer => Some(answer),
    };
    let stream = wait_until(CHILD_START, connect).unwrap_or_else(|| sockets::tcp_from(port, target))?;
    let mut held = Held::over(stream)?;
    let answer = held.ask()?;
    if reset {
        sockets::reset_at_close(held.stream())?;
    } else {
        // No text: the server ends the connection. It waits out the rest, and the client's port is free at once.
        held.stream().write_all(b"\xff\n")?;
        assert_eq!(held.stream().read(&mut [0; 1])?, 0, "the server closes");
    }
    Ok(answer.server)
}

/// Sends a segment of somebody's connection that is far outside of the window.
fn send_stray(from: SocketAddr, to: SocketAddr, sequence: u32, reset: bool) {
    let mut header = TcpHeader::new(from.port(), to.port(), sequence, 1_000);
    header.acknowledgment_number = 1;
    (header.ack, header.rst) = (!reset, reset);
    header.checksum = match (from, to) {
        (SocketAddr::V4(from), SocketAddr::V4(to)) => {
            header.calc_checksum_ipv4_raw(from.ip().octets(), to.ip().octets(), &[])
        }
        (SocketAddr::V6(from), SocketAddr::V6(to)) => {
            header.calc_checksum_ipv6_raw(from.ip().octets(), to.ip().octets(), &[])
        }
        _ => panic!("{from} and {to} are of different families"),
    }
    .unwrap();
    sockets::send_segment(from, to, &header.to_bytes()).unwrap();
}

/// A counter of the kernel's TCP in a namespace.
fn count(host: &Host, name: &str) -> u64 {
    let text = host
        .run(|| std::fs::read_to_string("/proc/thread-self/net/snmp"))
        .unwrap();
    let rows: Vec<Vec<&str>> = text
        .lines()
        .filter(|l| l.starts_with("Tcp:"))
        .map(|l| l.split(' ').collect())
        .collect();
    let column = rows[0].iter().position(|column| *column == name).unwrap();
    rows[1][column].parse().unwrap()
}

/// S150: segments outside of the window, data and resets, in both directions, are translated like all others and disturb nobody:
/// neither the ends, nor what this node remembers of the connection.
#[test]
fn stray_segments_end_no_connection() {
    let mut world = service::world(&[], &["pod2-1"], |_| {}).unwrap();
    for vip in vips() {
        let client = world.topology.pod(0, 0);
        let server = world.topology.pod(1, 0);
        let mut held = client.run(|| Held::open(vip)).unwrap();
        let answer = held.ask().unwrap();
        let before = [client, server].map(|host| count(host, "OutRsts"));
        for reset in [false, true] {
            let arrived = || [client, server].map(|host| count(host, "InSegs"));
            let before = arrived();
            for sequence in STRAY {
                server.run(|| send_stray(answer.local, answer.client, sequence, reset));
                client.run(|| send_stray(answer.client, vip, sequence, reset));
            }
            let all = wait_until(WALK, || {
                let now = arrived();
                let enough = |i: usize| now[i] >= before[i] + STRAY.len() as u64;
                (enough(0) && enough(1)).then_some(())
            });
            assert!(
                all.is_some(),
                "{vip}, reset: {reset}: {before:?} and now {:?}",
                arrived()
            );
            assert_eq!(held.ask().unwrap().server, "pod2-1", "{vip}");
        }
        assert_eq!(
            [client, server].map(|host| count(host, "OutRsts")),
            before,
            "{vip}: nobody was reset"
        );
        let_time_pass(&mut world, vip);
        let answer = held.ask().unwrap_or_else(|f| panic!("{vip}, after some time: {f}"));
        assert_eq!(answer.server, "pod2-1", "{vip}");
    }
}

/// S151, S154: a UDP flow of the node itself goes on after a pause that is longer than the one behind which a SYN opens a connection,
/// and shorter than the one behind which a flow is forgotten. Its translated packets leave by an interface as well: there they must
/// not be taken for a stranger's, in whose way the flow's own entries are.
#[test]
fn udp_flows_of_the_node_outlive_a_pause() {
    const PAUSE: u64 = 150;
    let world = service::world(&[], &["pod1-1", "pod2-1"], |_| {}).unwrap();
    let agent = &world.agents[0];
    let mut flows: Vec<(SocketAddr, Udp)> = agent.run(|| {
        let open = |_| vips().map(|vip| (vip, Udp::connect(vip).unwrap()));
        (0..ENOUGH / 4).flat_map(open).collect()
    });
    let mut before = Vec::new();
    for (vip, flow) in &mut flows {
        let answer = flow.ask();
        before.push(answer.unwrap_or_else(|failure| panic!("{vip}: {failure}")).server);
    }
    maps::age_connections(&agent.bpf_dir(), PAUSE).unwrap();
    for ((vip, flow), server) in flows.iter_mut().zip(before) {
        let answer = flow.ask();
        let after = answer
            .unwrap_or_else(|failure| panic!("{vip} after a pause: {failure}"))
            .server;
        assert_eq!(after, server, "{vip}");
    }
}
