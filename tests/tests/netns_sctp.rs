//! SCTP from pod to pod and from outside, through nodes with the real agent. Both ends are raw sockets, so that neither needs the
//! kernel's SCTP, which nothing here may load (S194).
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::path::Path;
use std::time::Duration;

use proxy_common::addr::Protocol;
use proxy_tests::manifests::{self, Port, port};
use proxy_tests::topology::{CLUSTER_CIDR, Host, Shape};
use proxy_tests::wire::sctp_message;
use proxy_tests::world::{CLUSTER_IPS, Setup, World, vips};
use serde_json::json;

const SERVICE: Port = port("sctp", "SCTP", 80);
const TARGET: u16 = 8080;
const NODE_PORT: u16 = 30_080;
const CLIENT: u16 = 40_000;
/// Far above what a packet takes through three namespaces.
const PATIENCE: Duration = Duration::from_secs(5);

/// A raw socket of a host: all SCTP of one family that reaches it.
struct Raw(UdpSocket);

impl Raw {
    fn open(host: &Host, like: IpAddr) -> Self {
        host.run(|| {
            let family = if like.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
            // SAFETY: no memory is passed.
            let fd = unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_SCTP) };
            assert!(fd >= 0, "a raw socket: {}", std::io::Error::last_os_error());
            // SAFETY: the descriptor was just opened and belongs to nobody else.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            // Not UDP, but a socket whose datagrams are sent and received with the same calls.
            let socket = UdpSocket::from(fd);
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            Self(socket)
        })
    }

    /// Sends to an address; the kernel writes the IP header.
    fn send(&self, to: IpAddr, message: &[u8]) {
        self.0.send_to(message, (to, 0)).unwrap();
    }

    /// The next message and its sender.
    #[track_caller]
    fn receive(&self, what: &str) -> (IpAddr, Vec<u8>) {
        let mut bytes = [0; 2_048];
        let (len, from) = self
            .0
            .recv_from(&mut bytes)
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        // IPv4 alone hands out its header.
        let header = if from.is_ipv4() {
            usize::from(bytes[0] & 0x0f) * 4
        } else {
            0
        };
        (from.ip(), bytes[header..len].to_vec())
    }
}

fn source_port(message: &[u8]) -> u16 {
    u16::from_be_bytes([message[0], message[1]])
}

/// One message to `dialled` and one back. Gives the client as the endpoint saw it.
fn exchange(client: &Raw, dialled: SocketAddr, endpoint: &Raw, chunks: &[u8]) -> IpAddr {
    let what = format!("SCTP to {dialled}, {} bytes", chunks.len());
    client.send(dialled.ip(), &sctp_message(CLIENT, dialled.port(), chunks));
    let (from, request) = endpoint.receive(&what);
    let seen = source_port(&request);
    assert_eq!(
        request,
        sctp_message(seen, TARGET, chunks),
        "{what}: ports and checksum"
    );
    endpoint.send(from, &sctp_message(TARGET, seen, chunks));
    let (peer, reply) = client.receive(&what);
    assert_eq!(peer, dialled.ip(), "{what}: the reply comes from where it was sent");
    assert_eq!(
        reply,
        sctp_message(dialled.port(), CLIENT, chunks),
        "{what}: ports and checksum"
    );
    from
}

/// Is SCTP part of this kernel, as a module or built in?
fn kernel_has_sctp() -> bool {
    let protocols = std::fs::read_to_string("/proc/net/protocols").unwrap();
    Path::new("/sys/module/sctp").exists() || protocols.lines().any(|line| line.starts_with("SCTP"))
}

/// S193–S195: an endpoint with another port serves a pod (which it sees) and an outsider through a nodePort (which is masqueraded);
/// and the kernel needs no SCTP for it.
#[test]
fn associations_reach_the_endpoint() {
    let had_sctp = kernel_has_sctp();
    let shape = Shape {
        external: true,
        ..Default::default()
    };
    let options = vec!["--cluster-cidr", CLUSTER_CIDR];
    let world = World::new(&Setup {
        shape,
        options,
        ..Default::default()
    })
    .unwrap();
    let mut service = manifests::service("sctp", &CLUSTER_IPS, &[SERVICE]);
    service["spec"]["type"] = json!("NodePort");
    service["spec"]["ports"][0]["nodePort"] = json!(NODE_PORT);
    let endpoints = world.endpoints_of(&["pod2-1"]);
    let mut objects = vec![service];
    objects.extend(manifests::slices("sctp", &[port("sctp", "SCTP", TARGET)], &endpoints));
    world.write("sctp", &objects).unwrap();

    let (pod, server) = (world.topology.pod(0, 0), world.topology.pod(1, 0));
    let (node, external) = (world.topology.node(0), world.topology.external.as_ref().unwrap());
    for vip in vips() {
        let backend = SocketAddr::new(server.address(vip.ip()), TARGET);
        world.wait_for(vip, Protocol::Sctp, Some(&[backend])).unwrap();
        let node_port = SocketAddr::new(node.address(vip.ip()), NODE_PORT);
        // All addresses of a node share one entry.
        let any = if vip.is_ipv4() {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        };
        let entry = SocketAddr::new(any, NODE_PORT);
        world.wait_for(entry, Protocol::Sctp, Some(&[backend])).unwrap();
        let (inside, outside) = (Raw::open(pod, vip.ip()), Raw::open(external, vip.ip()));
        let endpoint = Raw::open(server, vip.ip());
        for chunks in [&b"even"[..], b"odd", &[7; 1_400]] {
            let seen = exchange(&inside, vip, &endpoint, chunks);
            assert_eq!(seen, pod.address(vip.ip()), "the pod's own address is kept");
            let seen = exchange(&outside, node_port, &endpoint, chunks);
            assert_ne!(seen, external.address(vip.ip()), "masqueraded (S109)");
        }
    }

    if had_sctp {
        // The module says nothing then; a socket would.
        for agent in &world.agents {
            for table in ["eps", "assocs"] {
                let table = agent
                    .run(|| std::fs::read_to_string(format!("/proc/thread-self/net/sctp/{table}")))
                    .unwrap();
                assert_eq!(
                    table.lines().count(),
                    1,
                    "{}: no SCTP socket, only the heading: {table}",
                    agent.node()
                );
            }
        }
    } else {
        assert!(!kernel_has_sctp(), "the kernel's SCTP was loaded");
    }
}
