//! Node ports at the loopback address (S90, S91): for the node's own sockets, TCP and UDP, in both families, unless forbidden.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use proxy_tests::echo::{self, Failure, Held, REQUESTS};
use proxy_tests::service::{self, NODE_PORT, external};
use proxy_tests::world::{World, answered_by, names};
use serde_json::json;
use socket2::{Domain, Socket, Type};

/// Enough that both of two backends are chosen: missing one has a chance of 2^-39.
const ENOUGH: usize = 40;

fn localhost() -> [SocketAddr; 2] {
    ["127.0.0.1", "::1"].map(|ip| SocketAddr::new(ip.parse().unwrap(), NODE_PORT))
}

fn world(options: &[&'static str], pods: &[&str]) -> World {
    service::world(options, pods, |service| {
        service["spec"]["externalTrafficPolicy"] = json!("Cluster");
    })
    .unwrap()
}

/// S90: every endpoint is reached, and the application sees the address it dialled (Z9).
#[test]
fn the_node_reaches_node_ports_at_localhost() {
    let world = world(&[], &["pod1-1", "pod2-1"]);
    let node = &world.agents[0];
    for target in localhost() {
        for (what, request) in REQUESTS {
            let what = format!("{what} to {target}");
            let all = node.run(|| answered_by(ENOUGH, &what, || request(target)));
            assert_eq!(all, names(&["pod1-1", "pod2-1"]), "{what}");
            assert_eq!(node.run(|| request(target)).unwrap().peer, target, "{what}");
        }
    }
    // To a pod it is the pod's own address, and nobody reaches it from elsewhere.
    let pod = world.topology.pod(0, 1);
    for target in localhost() {
        let failure = node.run_in_pod(&pod.netns, || echo::tcp(target));
        assert_eq!(failure, Err(Failure::Refused), "{target} of a pod");
        assert_eq!(
            external(&world).run(|| echo::tcp(target)),
            Err(Failure::Refused),
            "{target} of another host"
        );
    }
    // A socket that is bound to the loopback address could not be answered by an endpoint.
    for target in localhost() {
        let bound = node.run(|| dial_bound(target));
        assert_eq!(bound.err(), Some(Failure::Refused), "{target} from itself");
    }
}

fn dial_bound(target: SocketAddr) -> Result<Held, Failure> {
    let socket = Socket::new(Domain::for_address(target), Type::STREAM, None)?;
    socket.bind(&SocketAddr::new(target.ip(), 0).into())?;
    socket.connect_timeout(&target.into(), Duration::from_secs(1))?;
    Held::over(TcpStream::from(socket))
}

/// S91, S122: without endpoints it refuses; and S128, S81: it is served only where that is asked for.
#[test]
fn localhost_serves_where_it_is_asked_for() {
    let empty = world(&[], &[]);
    for target in localhost() {
        for (what, request) in REQUESTS {
            let outcome = empty.agents[0].run(|| request(target));
            assert_eq!(outcome, Err(Failure::Refused), "{what} to {target} without endpoints");
        }
    }
    drop(empty);
    for (options, expected) in [
        (&["--localhost-nodeports=false"][..], [false; 2]),
        (&["--nodeport-addresses", "192.168.56.0/24"], [false, true]),
        (&["--nodeport-addresses", "192.168.56.0/24,localhost"], [true; 2]),
    ] {
        let world = world(options, &["pod1-1"]);
        let served = localhost().map(|target| world.agents[0].run(|| echo::tcp(target)).is_ok());
        assert_eq!(served, expected, "{options:?}");
        let node: IpAddr = world.topology.node(0).v4.into();
        let outside = external(&world).run(|| echo::tcp(SocketAddr::new(node, NODE_PORT)));
        assert!(outside.is_ok(), "{options:?}: {outside:?}");
    }
}
