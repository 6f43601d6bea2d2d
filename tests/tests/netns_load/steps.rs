//! The kinds of change, each a named step that leaves things as it found them.

use std::net::SocketAddr;
use std::time::Duration;

use proxy_common::addr::Protocol;
use proxy_tests::echo;
use proxy_tests::manifests::{self, port};
use proxy_tests::process::wait_until;
use proxy_tests::world::{CLUSTER_IPS, ECHO, vips};
use serde_json::{Value, json};

use crate::objects::{Backend, LB, NODE_PORT, Objects, State};
use crate::site::{OPTIONS, Site};

/// Addresses that come and go beside those under load.
const OTHER_LB: [&str; 2] = ["203.0.113.20", "203.0.113.30"];
const OTHER_LB6: [&str; 2] = ["2001:db8:113::20", "2001:db8:113::30"];
const EXTERNAL_IPS: [&str; 2] = ["203.0.113.250", "2001:db8:113::250"];

/// Section F: which endpoints there are, and in what state.
pub(crate) fn endpoints(site: &mut Site) {
    let spare = Backend::new(site.world.topology.pod(1, 2), 1);
    let again = spare.clone();
    site.change("endpoint added", |o| o.backends.push(spare));
    site.change("endpoint removed, its server stays", |o| o.remove("pod2-3"));
    site.change("endpoint added again", |o| o.backends.push(again));
    site.change("endpoint unready", |o| o.backend("pod1-2").state = State::Unready);
    site.change("endpoint ready", |o| o.backend("pod1-2").state = State::Ready);
    site.change("endpoint terminating", |o| {
        o.backend("pod2-3").state = State::Terminating
    });
    site.change("endpoint stopped", |o| o.backend("pod2-3").state = State::Stopped);
    site.change("endpoint gone", |o| o.remove("pod2-3"));
    site.change("one slice becomes three", |o| o.slices = (3, 0));
    site.change("endpoints change slices", |o| o.slices = (3, 1));
    site.change("endpoints in all slices", |o| o.doubled = true);
    site.change("endpoints in one slice each", |o| o.doubled = false);
    site.change("three slices become one", |o| o.slices = (1, 0));
    site.act("a thousand endpoints swapped", |s| s.swap_many(1));
    site.act("and swapped back", |s| s.swap_many(0));
}

/// Sections F and G: which of them are used.
pub(crate) fn policies(site: &mut Site) {
    for policy in ["internalTrafficPolicy", "externalTrafficPolicy"] {
        site.change(&format!("{policy} Local"), |o| o.policy(policy, "Local"));
        site.change(&format!("{policy} Cluster"), |o| o.policy(policy, "Cluster"));
    }
    site.change("hints on", |o| o.hints = true);
    site.change("zone of node 1 changed", |o| o.zones = [1, 1]);
    site.change("zone of node 1 as it was", |o| o.zones = [0, 1]);
    site.change("hints off", |o| o.hints = false);
    site.change("session affinity on", |o| o.policy("sessionAffinity", "ClientIP"));
    site.change("session affinity off", |o| o.policy("sessionAffinity", "None"));
}

/// Section J and ports: addresses of the service come and go beside those under load.
pub(crate) fn addresses(site: &mut Site) {
    let all = |other: &[&str]| ingress([&LB[..], other].concat());
    site.change("LB address added", |o| {
        o.web["status"] = all(&[OTHER_LB[0], OTHER_LB6[0]])
    });
    served(site, &[(OTHER_LB[0], true), (OTHER_LB6[0], true)]);
    site.change("LB address replaced", |o| {
        o.web["status"] = all(&[OTHER_LB[1], OTHER_LB6[1]])
    });
    served(site, &[(OTHER_LB[0], false), (OTHER_LB[1], true), (OTHER_LB6[1], true)]);
    for (mode, is_served) in [("Proxy", false), ("VIP", true)] {
        site.change(&format!("ipMode {mode} of another LB address"), |o| {
            for index in [2, 3] {
                o.web["status"]["loadBalancer"]["ingress"][index]["ipMode"] = json!(mode);
            }
        });
        served(site, &[(OTHER_LB[1], is_served), (OTHER_LB6[1], is_served)]);
    }
    site.change("LB address removed", |o| o.web["status"] = all(&[]));
    served(site, &[(OTHER_LB[1], false), (OTHER_LB6[1], false), (LB[0], true)]);
    site.change("externalIPs added", |o| {
        o.web["spec"]["externalIPs"] = json!(EXTERNAL_IPS)
    });
    served(site, &[(EXTERNAL_IPS[0], true), (EXTERNAL_IPS[1], true)]);
    site.change("externalIPs removed", |o| o.web["spec"]["externalIPs"] = json!([]));
    served(site, &[(EXTERNAL_IPS[0], false), (EXTERNAL_IPS[1], false)]);
    let ranges = |o: &mut Objects, ranges: &[&str]| o.web["spec"]["loadBalancerSourceRanges"] = json!(ranges);
    let pods = ["10.244.0.0/16", "fd00:10:244::/48"];
    let hosts = ["192.168.56.0/24", "fd00:56::/64"];
    site.change("source ranges added", |o| ranges(o, &[pods, hosts].concat()));
    let exact = ["192.168.56.0/25", "192.168.56.128/25", "fd00:56::/80"];
    site.change("source ranges changed", |o| ranges(o, &[&pods[..], &exact].concat()));
    site.change("source ranges removed", |o| ranges(o, &[]));
    ports(site);
}

fn ports(site: &mut Site) {
    let set = |o: &mut Objects, node_port: u16| {
        o.web["spec"]["ports"][2] = json!({"name": "tcp2", "protocol": "TCP", "port": 81, "nodePort": node_port});
    };
    let add = |o: &mut Objects| {
        o.web["spec"]["ports"].as_array_mut().unwrap().push(json!(null));
        set(o, NODE_PORT + 1);
    };
    let node = site.world.topology.node(0).v4.to_string();
    let agent_has = |site: &Site, port: u16| {
        let address = SocketAddr::new(node.parse().unwrap(), port);
        let refused = site
            .world
            .topology
            .external
            .as_ref()
            .unwrap()
            .run(|| echo::tcp(address));
        // No endpoint has a port of this name, so the service refuses, as an unused port does: what counts is that it is prompt.
        assert_eq!(
            refused.map(|answer| answer.server),
            Err(echo::Failure::Refused),
            "{address}"
        );
    };
    site.change("port added", add);
    site.assert_served(CLUSTER_IPS[0], 81, true);
    site.change("nodePort of another port changed", |o| set(o, NODE_PORT + 2));
    agent_has(site, NODE_PORT + 2);
    site.change("port removed", |o| {
        o.web["spec"]["ports"].as_array_mut().unwrap().pop();
    });
    site.assert_served(CLUSTER_IPS[0], 81, false);
}

fn ingress(ips: Vec<&str>) -> Value {
    let entries: Vec<_> = ips.iter().map(|ip| json!({"ip": ip})).collect();
    json!({"loadBalancer": {"ingress": entries}})
}

fn served(site: &Site, addresses: &[(&str, bool)]) {
    for (address, served) in addresses {
        site.assert_served(address, 80, *served);
    }
}

/// The type of a service changes while its cluster IP is used.
pub(crate) fn service_types(site: &mut Site) {
    const PORT: u16 = 30_090;
    let to_node_port = |o: &mut Objects| {
        o.turn["spec"]["type"] = json!("NodePort");
        o.turn["spec"]["ports"][0]["nodePort"] = json!(PORT);
        o.turn["status"] = json!({});
    };
    let to_cluster_ip = |o: &mut Objects| {
        o.turn["spec"]["type"] = json!("ClusterIP");
        o.turn["spec"]["ports"][0].as_object_mut().unwrap().remove("nodePort");
    };
    let dial = |site: &Site| {
        let address = site.world.topology.node(0).sockets(PORT)[0];
        site.world
            .topology
            .external
            .as_ref()
            .unwrap()
            .run(|| echo::tcp(address))
            .is_ok()
    };
    site.change("ClusterIP becomes NodePort", to_node_port);
    assert!(dial(site), "the node port is served");
    site.change("NodePort becomes LoadBalancer", |o| {
        o.turn["spec"]["type"] = json!("LoadBalancer");
        o.turn["status"] = ingress(OTHER_LB.into());
    });
    served(site, &[(OTHER_LB[0], true)]);
    site.change("LoadBalancer becomes NodePort", to_node_port);
    served(site, &[(OTHER_LB[0], false)]);
    site.change("NodePort becomes ClusterIP", to_cluster_ip);
    assert!(!dial(site), "the node port is the node's own");
}

/// Section P: other objects, broken ones, interfaces.
pub(crate) fn synchronisation(site: &mut Site) {
    const OTHERS: u8 = 200;
    let last = SocketAddr::new([10, 96, 2, OTHERS].into(), 80);
    let backend = site.world.topology.pod(1, 0).sockets(ECHO)[0];
    site.act("200 other services created", |s| {
        let mut objects = Vec::new();
        for number in 1..=OTHERS {
            let name = format!("other{number}");
            let endpoints = vec![manifests::endpoint(backend.ip(), "node2")];
            objects.push(manifests::service(
                &name,
                &[&format!("10.96.2.{number}")],
                &[port("", "TCP", 80)],
            ));
            objects.push(manifests::slice(
                &format!("{name}-1"),
                &name,
                "IPv4",
                &[port("", "TCP", ECHO)],
                endpoints,
            ));
        }
        s.world.write("others", &objects).unwrap();
        s.world.wait_for(last, Protocol::Tcp, Some(&[backend])).unwrap();
    });
    site.act("200 other services deleted", |s| {
        s.world.manifests.remove("others").unwrap();
        s.world.wait_for(last, Protocol::Tcp, None).unwrap();
    });
    site.act("broken objects added", |s| {
        let mut broken = manifests::service("broken", &["10.96.0.66"], &[port("", "TCP", 80)]);
        broken["spec"]["clusterIPs"] = json!(["10.96.0.666"]);
        broken["spec"]["ports"] = json!([{"port": 70_000}, {"port": "http"}]);
        s.world.write("broken", &[broken]).unwrap();
        s.world
            .manifests
            .write_text("text.yaml", "apiVersion: v1\nkind: Service\nmetadata: [")
            .unwrap();
        s.tell(|_| {});
    });
    site.act("broken objects removed", |s| {
        s.world.manifests.remove("broken").unwrap();
        std::fs::remove_file(s.world.manifests.dir().join("text.yaml")).unwrap();
        s.tell(|_| {});
    });
    site.act("pod added to the node", |s| {
        s.world.topology.nodes[0].add_pod().unwrap();
        let newest = s.world.topology.nodes[0].pods.len() - 1;
        wait_served(s, 0, newest);
    });
    site.act("pod removed from the node", |s| {
        s.world.topology.nodes[0].remove_pod().unwrap()
    });
}

/// A new pod is ready when the node serves it.
fn wait_served(site: &Site, node: usize, pod: usize) {
    let pod = site.world.topology.pod(node, pod);
    for vip in vips() {
        let answer = wait_until(Duration::from_secs(5), || pod.run(|| echo::tcp(vip)).ok());
        assert!(answer.is_some(), "{} cannot reach {vip}", pod.name);
    }
}

/// Section P: agents go and come back, and attach otherwise.
pub(crate) fn restarts(site: &mut Site) {
    site.act("agents killed", |s| {
        s.world.agents.iter_mut().for_each(|agent| agent.kill())
    });
    site.act("agents started", launch);
    site.act("agents stopped", |s| {
        s.world.agents.iter_mut().for_each(|agent| agent.stop())
    });
    site.act("agents started again", launch);
    let mode = |attach: &'static str| {
        move |site: &mut Site| {
            let agent = &mut site.world.agents[0];
            agent.stop();
            agent.set_options(&[&OPTIONS[..], &["--attach", attach]].concat());
            agent.launch().unwrap();
        }
    };
    // The kernel stops a device's queues while a clsact qdisc is put in or taken out, and loses what is sent meanwhile, programs or
    // not.
    site.may_lose_packets(true);
    site.act("tcx becomes classic", mode("classic"));
    site.act("classic becomes tcx", mode("tcx"));
    site.may_lose_packets(false);
}

fn launch(site: &mut Site) {
    std::thread::scope(|scope| {
        for agent in &mut site.world.agents {
            scope.spawn(|| agent.launch().unwrap());
        }
    });
}

/// Every backend is replaced as a Deployment does it: the new pod is ready, the old one terminates, stops serving, and goes.
pub(crate) fn rolling_restart(site: &mut Site) {
    let old: Vec<_> = site.objects.backends.iter().map(|b| (b.pod.clone(), b.node)).collect();
    for (old, node) in old {
        site.act(&format!("{old}: another is ready, it terminates"), |s| {
            s.world.topology.nodes[node].add_pod().unwrap();
            let newest = s.world.topology.nodes[node].pods.len() - 1;
            s.world.serve(node, newest).unwrap();
            wait_served(s, node, newest);
            let backend = Backend::new(s.world.topology.pod(node, newest), node);
            s.tell(|o| o.backends.push(backend));
            s.tell(|o| o.backend(&old).state = State::Terminating);
        });
        site.change(&format!("{old}: serves no more"), |o| {
            o.backend(&old).state = State::Stopped
        });
        site.act(&format!("{old}: its server and namespace end"), |s| {
            s.may_end(&old);
            s.world.servers.retain(|server| server.name() != old);
            s.load.left(&old).unwrap();
            s.tell(|o| o.remove(&old));
            s.world.topology.nodes[node].remove_pod_named(&old).unwrap();
        });
    }
}
