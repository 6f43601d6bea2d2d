//! A client port that is used again at once: connections that lead to the same endpoint by different addresses, some masqueraded and
//! some not, must not inherit anything from those before them. Elsewhere in this table every connection has a port of its own.

use std::time::Duration;

use proxy_tests::echo::{Client, PATIENCE};

use super::cluster;
use super::flow::Source::{self, Outsider, Pod};
use super::flow::Via::{self, Balancer, ClusterIp, ExternalIp, NodePort};

/// Ports that no other test of this file gets to.
const FIRST_PORT: u16 = 64_700;

/// Who dials what one after the other, and is seen as itself or as a node.
type Case = (Source, &'static [(&'static str, Via, bool)]);

/// All lead to the pod `pod1-1`. True: the client's address stays.
const CASES: [Case; 4] = [
    // Through one node.
    (
        Pod("pod1-2"),
        &[
            ("only-bridged", Balancer, false),
            ("only-bridged", ClusterIp, true),
            ("only-bridged", NodePort(0), false),
            ("only-bridged-local", ExternalIp, true),
            ("only-bridged", ExternalIp, false),
        ],
    ),
    // From another node: one masquerades, the other only forwards.
    (
        Pod("pod3-1"),
        &[
            ("only-bridged", NodePort(0), false),
            ("only-bridged", ClusterIp, true),
            ("only-bridged", NodePort(2), false),
            ("only-bridged-local", Balancer, true),
        ],
    ),
    (
        Pod("pod2-2"),
        &[
            ("only-bridged", NodePort(0), false),
            ("only-bridged", ClusterIp, true),
            ("only-bridged", Balancer, false),
        ],
    ),
    (
        Outsider(0),
        &[
            ("only-bridged", Balancer, false),
            ("only-bridged-local", Balancer, true),
            ("only-bridged", ClusterIp, false),
            ("only-bridged-local", NodePort(0), true),
        ],
    ),
];

/// S87, S109, S119, S154: what a closed connection was says nothing about the next one.
#[test]
fn a_port_that_is_used_again_starts_afresh() {
    let cluster = cluster::turn();
    for (number, (source, steps)) in CASES.into_iter().enumerate() {
        for is_v4 in [true, false] {
            let client = Client {
                port: FIRST_PORT + number as u16,
                patience: PATIENCE,
            };
            for (step, (service, via, is_kept)) in steps.iter().enumerate() {
                let target = via.target(&cluster, cluster.spec(service), is_v4);
                let what = format!("step {step}: {source:?} to {service} {via:?} {target}");
                let answer = source
                    .run(&cluster, || client.tcp(target))
                    .unwrap_or_else(|failure| panic!("{what}: {failure}"));
                assert_eq!(answer.server, "pod1-1", "{what}");
                let own = source.host(&cluster).0.address(target.ip());
                assert_eq!(
                    answer.client.ip() == own,
                    *is_kept,
                    "{what} was seen as {}",
                    answer.client
                );
                // The server closes a moment after the client has.
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}
