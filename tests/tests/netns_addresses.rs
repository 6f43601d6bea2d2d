//! Every kind of address a Service has, against everybody who may dial it: nodePort, load-balancer address, externalIP; traffic
//! policies, source ranges, affinity, undefined ports. Two nodes with two pods each, and a host outside.
#![expect(clippy::unwrap_used, reason = "helpers of tests; a panic is how a test fails")]

use std::net::SocketAddr;

use proxy_tests::echo::{self, Failure};
use proxy_tests::service::{self, EXTERNAL_IP, LB, NODE_PORT, outside, to_sockets};
use proxy_tests::world::{World, answered_by, names, vips};
use serde_json::{Value, json};

/// Enough that each of up to four backends is chosen: missing one has a chance of 2^-24 or less.
const ENOUGH: usize = 60;

fn world(options: &[&'static str], pods: &[&str], change: impl Fn(&mut Value)) -> World {
    service::world(options, pods, change).unwrap()
}

fn publish(world: &World, pods: &[&str], change: impl Fn(&mut Value)) {
    service::publish(world, pods, change).unwrap();
}

/// S80, S86, S94, S96, S98, S109: with the policy Cluster every kind of address leads to every endpoint, from everywhere, through
/// any node; pods and outsiders are masqueraded.
#[test]
fn outside_addresses_reach_the_whole_cluster() {
    let world = world(&[], &["pod1-1", "pod2-1"], |_| {});
    let external = world.topology.external.as_ref().unwrap();
    let pod = world.topology.pod(0, 1);
    let everybody = names(&["pod1-1", "pod2-1"]);
    for target in outside(world.topology.node(0)) {
        for (who, host) in [("external", external), ("pod", pod)] {
            let what = format!("{who} to {target}");
            assert_eq!(
                host.run(|| answered_by(ENOUGH, &what, || echo::tcp(target))),
                everybody,
                "{what}"
            );
            let answer = host.run(|| echo::tcp(target)).unwrap();
            assert_eq!(answer.peer, target, "{what}");
            assert_ne!(
                answer.client.ip(),
                host.address(target.ip()),
                "{what}: masqueraded (S109)"
            );
            assert_eq!(
                host.run(|| answered_by(ENOUGH, &what, || echo::udp(target))),
                everybody,
                "UDP {what}"
            );
        }
        let what = format!("the node to {target}");
        assert_eq!(
            world.agents[0].run(|| answered_by(ENOUGH, &what, || echo::tcp(target))),
            everybody,
            "{what}"
        );
        assert_eq!(
            world.agents[0].run(|| answered_by(ENOUGH, &what, || echo::udp(target))),
            everybody,
            "UDP {what}"
        );
    }
    // Through the other node, whatever it has (S80).
    for target in world.topology.node(1).sockets(NODE_PORT) {
        let what = format!("external to {target}");
        assert_eq!(
            external.run(|| answered_by(ENOUGH, &what, || echo::tcp(target))),
            everybody,
            "{what}"
        );
    }
    // A node's other ports are its own (S93, S99).
    for target in world.topology.node(0).sockets(NODE_PORT + 1) {
        assert_eq!(
            external.run(|| echo::tcp(target)),
            Err(Failure::Refused),
            "nobody listens at {target}"
        );
    }
}

/// S51, S87, S88, S125: with the policy Local outsiders reach this node's endpoints only and are seen as they are, and nothing
/// where there are none; pods and the node itself reach the whole cluster.
#[test]
fn a_local_policy_binds_outsiders_only() {
    let world = world(&[], &["pod1-1", "pod2-1"], |service| {
        service["spec"]["externalTrafficPolicy"] = json!("Local");
    });
    let external = world.topology.external.as_ref().unwrap();
    let pod = world.topology.pod(0, 1);
    for target in outside(world.topology.node(0)) {
        let what = format!("external to {target}");
        let local = external.run(|| answered_by(20, &what, || echo::tcp(target)));
        assert_eq!(local, names(&["pod1-1"]), "{what}");
        let answer = external.run(|| echo::tcp(target)).unwrap();
        assert_eq!(
            answer.client.ip(),
            external.address(target.ip()),
            "{what}: the client's address stays"
        );
        let what = format!("pod to {target}");
        let all = pod.run(|| answered_by(ENOUGH, &what, || echo::tcp(target)));
        assert_eq!(all, names(&["pod1-1", "pod2-1"]), "{what}");
        assert_eq!(
            pod.run(|| echo::tcp(target)).unwrap().client.ip(),
            pod.address(target.ip()),
            "{what}"
        );
        let what = format!("the node to {target}");
        let all = world.agents[0].run(|| answered_by(ENOUGH, &what, || echo::tcp(target)));
        assert_eq!(all, names(&["pod1-1", "pod2-1"]), "{what}");
    }
    publish(&world, &["pod2-1"], |service| {
        service["spec"]["externalTrafficPolicy"] = json!("Local");
    });
    let target = world.topology.node(0).sockets(NODE_PORT)[0];
    assert_eq!(
        external.run(|| echo::tcp(target)),
        Err(Failure::Timeout),
        "dropped, not refused (S125)"
    );
    assert!(pod.run(|| echo::tcp(target)).is_ok(), "S88");
}

/// S122, S77: without endpoints every address refuses, and so do the ports that a service address does not define.
#[test]
fn nothing_behind_an_address_refuses() {
    let world = world(&[], &[], |_| {});
    let external = world.topology.external.as_ref().unwrap();
    let pod = world.topology.pod(0, 1);
    for target in outside(world.topology.node(0)).into_iter().chain(vips()) {
        for (who, host) in [("external", external), ("pod", pod)] {
            assert_eq!(
                host.run(|| echo::tcp(target)),
                Err(Failure::Refused),
                "TCP {who} to {target}"
            );
            assert_eq!(
                host.run(|| echo::udp(target)),
                Err(Failure::Refused),
                "UDP {who} to {target}"
            );
        }
        assert_eq!(
            world.agents[0].run(|| echo::tcp(target)),
            Err(Failure::Refused),
            "the node to {target}"
        );
    }
    for vip in vips() {
        let undefined = SocketAddr::new(vip.ip(), 81);
        for (who, host) in [("external", external), ("pod", pod)] {
            assert_eq!(
                host.run(|| echo::tcp(undefined)),
                Err(Failure::Refused),
                "TCP {who} to {undefined}"
            );
            assert_eq!(
                host.run(|| echo::udp(undefined)),
                Err(Failure::Refused),
                "UDP {who} to {undefined}"
            );
        }
    }
}

/// S92, S101–S103: source ranges hold for load-balancer addresses only, are judged by the source as it arrives, and drop.
#[test]
fn source_ranges_guard_load_balancer_addresses() {
    let world = world(&[], &["pod1-1", "pod2-1"], |service| {
        // Pods of the first node are allowed, nobody else.
        service["spec"]["loadBalancerSourceRanges"] = json!([" 10.244.1.0/24", "fd00:10:244:1::/64"]);
    });
    let external = world.topology.external.as_ref().unwrap();
    let allowed = world.topology.pod(0, 1);
    for target in to_sockets(LB) {
        assert!(allowed.run(|| echo::tcp(target)).is_ok(), "{target}");
        assert_eq!(external.run(|| echo::tcp(target)), Err(Failure::Timeout), "{target}");
        assert_eq!(
            world.topology.pod(1, 1).run(|| echo::tcp(target)),
            Err(Failure::Timeout),
            "{target}"
        );
    }
    let others = [
        world.topology.node(0).sockets(NODE_PORT).to_vec(),
        to_sockets(EXTERNAL_IP).to_vec(),
    ]
    .concat();
    for target in others {
        assert!(
            external.run(|| echo::tcp(target)).is_ok(),
            "{target} has no ranges (S92)"
        );
    }
}

/// S132, S134, S136, S138: a client stays with one endpoint, whichever address of the service it dials; another may get another.
#[test]
fn affinity_pins_a_client() {
    let sticky = |service: &mut Value| {
        service["spec"]["sessionAffinity"] = json!("ClientIP");
        service["spec"]["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": 60}});
    };
    let world = world(&[], &["pod1-1", "pod1-2", "pod2-1", "pod2-2"], sticky);
    let external = world.topology.external.as_ref().unwrap();
    for (who, host) in [("external", external), ("pod", world.topology.pod(0, 1))] {
        let node_port = world.topology.node(0).sockets(NODE_PORT)[0];
        let first = host.run(|| answered_by(20, who, || echo::tcp(vips()[0])));
        assert_eq!(first.len(), 1, "{who}");
        assert_eq!(
            host.run(|| answered_by(20, who, || echo::tcp(node_port))),
            first,
            "{who}"
        );
        assert_eq!(
            host.run(|| answered_by(20, who, || echo::udp(vips()[0]))).len(),
            1,
            "UDP {who}"
        );
    }
    let what = "the node";
    assert_eq!(
        world.agents[0]
            .run(|| answered_by(20, what, || echo::tcp(vips()[0])))
            .len(),
        1
    );
    publish(&world, &["pod1-1", "pod1-2", "pod2-1", "pod2-2"], |_| {});
    std::thread::sleep(std::time::Duration::from_millis(200));
    let free = external.run(|| answered_by(ENOUGH, "external", || echo::tcp(vips()[0])));
    assert_eq!(free.len(), 4, "switched off at once (S136)");
}

/// S81, S128: node ports only on the addresses asked for; elsewhere the port is the node's own.
#[test]
fn node_ports_on_chosen_addresses() {
    let world = world(&["--nodeport-addresses", "198.51.100.0/24"], &["pod1-1"], |_| {});
    let external = world.topology.external.as_ref().unwrap();
    let [v4, v6] = world.topology.node(0).sockets(NODE_PORT);
    assert_eq!(external.run(|| echo::tcp(v4)), Err(Failure::Refused), "not in the list");
    assert!(
        external.run(|| echo::tcp(v6)).is_ok(),
        "no prefix of this family in the list means all (S82)"
    );
}
