//! A masqueraded connection and one of the node itself want the same source port to the same endpoint: what constant load from pods
//! and node at once runs into now and then, made to happen.

use std::net::SocketAddr;

use proxy_tests::echo::Held;
use proxy_tests::topology::{CLUSTER_CIDR, PodNetwork, Shape};
use proxy_tests::world::{Setup, World, vips};

/// S121, S147: both connections work, whichever came first, whether the endpoint is behind one egress hook of the node (another node's
/// pod, or a point-to-point link) or two (bridge and veth).
#[test]
fn a_node_and_its_masqueraded_clients_share_source_ports() {
    for network in [PodNetwork::Bridge, PodNetwork::PointToPoint] {
        let shape = Shape {
            network,
            ..Shape::default()
        };
        let world = World::new(&Setup {
            shape,
            options: vec!["--cluster-cidr", CLUSTER_CIDR, "--masquerade-all"],
            ..Setup::default()
        })
        .unwrap();
        let mut port = 40_000;
        for pod in ["pod1-2", "pod2-1"] {
            world.publish(&[pod]).unwrap();
            for vip in vips() {
                for node_first in [true, false] {
                    port += 1;
                    share(
                        &world,
                        vip,
                        port,
                        node_first,
                        &format!("{network:?}, {pod}, {vip}, node first: {node_first}"),
                    );
                }
            }
        }
    }
}

fn share(world: &World, vip: SocketAddr, port: u16, node_first: bool, what: &str) {
    let client = world.topology.pod(0, 0);
    let of_pod = || client.run(|| Held::open_from(port, vip));
    let of_node = || world.agents[0].run(|| Held::open_from(port, vip));
    let [mut first, mut second] = if node_first {
        [of_node(), of_pod()].map(|held| held.unwrap_or_else(|f| panic!("{what}: opening: {f}")))
    } else {
        [of_pod(), of_node()].map(|held| held.unwrap_or_else(|f| panic!("{what}: opening: {f}")))
    };
    for round in 0..3 {
        for (name, held) in [("first", &mut first), ("second", &mut second)] {
            let answer = held.ask();
            assert!(answer.is_ok(), "{what}: {name}, request {round}: {answer:?}");
        }
    }
}
