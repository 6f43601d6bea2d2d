//! Explanations of rows in memory.

use std::collections::HashMap;

use bytemuck::Zeroable;
use proxy_common::addr::Addr4;
use proxy_common::affinity::Affinity;
use proxy_common::backend::Backend;
use proxy_common::frontend::{FRONTEND_HAS_ENDPOINTS, FRONTEND_UNDEFINED, FrontendKey, Range};
use proxy_common::link::{Link, NODE_ADDR_NODE_PORTS, NodeAddr};
use proxy_common::settings::{Prefix, Settings};

use super::*;

const POD: &str = "10.244.1.5";
const STRANGER: &str = "192.0.2.9";

fn addr(text: &str) -> Addr4 {
    Addr4::from(text.parse::<std::net::Ipv4Addr>().unwrap())
}

/// Two endpoints in the cluster set, the first of which is the local set.
fn frontend(flags: u32) -> Frontend {
    Frontend {
        service: 7,
        flags: flags | FRONTEND_HAS_ENDPOINTS,
        cluster: Range {
            first: 0,
            count: 2,
            keep: 0,
        },
        local: Range {
            first: 0,
            count: 1,
            keep: 0,
        },
        ..Frontend::default()
    }
}

fn facts(frontends: &[(&str, u16, Frontend)]) -> Facts<'static, Addr4> {
    let prefix = |text: &str| Prefix {
        addr: addr(text),
        mask: addr("255.255.0.0"),
        set: 1,
    };
    let mut settings = Settings::<Addr4>::zeroed();
    settings.pods = prefix("10.244.0.0");
    settings.networks[0] = prefix("10.96.0.0");
    settings.node_ports = [Port::new(30_000), Port::new(30_080)];
    let backends = ["10.244.1.5", "10.244.2.5"].map(|ip| Backend {
        addr: addr(ip),
        port: Port::new(8080),
        flags: 0,
    });
    let node = NodeAddr {
        ifindex: 2,
        flags: NODE_ADDR_NODE_PORTS,
    };
    let row = |(ip, port, frontend): &(&str, u16, Frontend)| {
        let protocol = if *port == 0 { 0 } else { 6 };
        (FrontendKey::new(addr(ip), Port::new(*port), protocol), *frontend)
    };
    Facts {
        frontends: frontends.iter().map(row).collect(),
        settings,
        node_addrs: HashMap::from([(addr("192.0.2.1"), node)]),
        links: HashMap::from([
            (
                5,
                Link {
                    flags: LINK_PODS,
                    ..Link::default()
                },
            ),
            (6, Link::default()),
        ]),
        pods_by_link: false,
        masquerade_all: Some(false),
        has_sockets: true,
        now: 100,
        name: Box::new(|id| format!("default/web:http/TCP#{id}")),
        backend: Box::new(move |slot| backends.get(slot as usize).copied()),
        affinity: Box::new(|_| None),
        is_source_allowed: Box::new(|_, source| Ok(*source == addr(POD))),
    }
}

#[track_caller]
fn ask(facts: &Facts<'_, Addr4>, source: &str, destination: &str) -> Explanation {
    decide(facts, &Question::parse(source, destination, None).unwrap()).unwrap()
}

const VIP: &str = "10.96.0.10:80";

#[test]
fn a_cluster_ip_serves_pods_as_they_are_and_masquerades_others() {
    let facts = facts(&[("10.96.0.10", 80, frontend(FRONTEND_CLUSTER_IP))]);
    let pod = ask(&facts, POD, VIP);
    assert_eq!(
        (pod.verdict, pod.origin, pod.matched, pod.set),
        ("translated", "pod", Some("exact"), Some("cluster"))
    );
    assert_eq!(pod.service.as_deref(), Some("default/web:http/TCP#7"));
    assert!(!pod.masquerade);
    let masqueraded: Vec<bool> = pod.candidates.iter().map(|candidate| candidate.masqueraded).collect();
    assert_eq!(masqueraded, [true, false], "the pod is its own endpoint (S110)");
    let stranger = ask(&facts, STRANGER, VIP);
    assert_eq!(stranger.origin, "external");
    assert!(stranger.masquerade && stranger.candidates.iter().all(|candidate| candidate.masqueraded));
    let host = ask(&facts, "host", VIP);
    assert_eq!((host.origin, host.masquerade), ("host", false));
    assert_eq!(ask(&facts, "192.0.2.1", VIP).origin, "host", "an address of the node");
}

#[test]
fn node_ports_follow_the_policy() {
    let facts = facts(&[("0.0.0.0", 30_080, frontend(FRONTEND_LOCAL))]);
    let stranger = ask(&facts, STRANGER, "192.0.2.1:30080");
    assert_eq!(
        (stranger.matched, stranger.set),
        (Some("nodePort"), Some("local")),
        "S87"
    );
    assert_eq!(stranger.candidates.len(), 1);
    assert_eq!(ask(&facts, POD, "192.0.2.1:30080").set, Some("cluster"), "S88");
    assert_eq!(
        ask(&facts, STRANGER, "192.0.2.2:30080").verdict,
        "notAService",
        "not the node's address"
    );
    assert_eq!(ask(&facts, STRANGER, "192.0.2.1:30079").verdict, "notAService");
}

#[test]
fn what_is_not_served_names_the_rule() {
    let empty = |flags| Frontend {
        service: 7,
        flags,
        ..Frontend::default()
    };
    let facts = facts(&[
        ("10.96.0.10", 80, empty(FRONTEND_CLUSTER_IP)),
        (
            "10.96.0.11",
            80,
            empty(FRONTEND_CLUSTER_IP | FRONTEND_LOCAL | FRONTEND_HAS_ENDPOINTS),
        ),
        ("10.96.0.11", 0, empty(FRONTEND_CLUSTER_IP | FRONTEND_UNDEFINED)),
        ("192.0.2.200", 80, frontend(FRONTEND_SOURCE_RANGES)),
    ]);
    for (source, destination, verdict, rule) in [
        (POD, "10.96.0.10:80", "refused", Some("S122")),
        (POD, "10.96.0.11:80", "dropped", Some("S58")),
        (POD, "10.96.0.11:81", "refused", Some("S77")),
        (POD, "10.96.0.12:80", "dropped", Some("S78")),
        (STRANGER, "192.0.2.200:80", "dropped", Some("S103")),
        (POD, "192.0.2.200:80", "translated", None),
        (POD, "198.51.100.1:80", "notAService", None),
    ] {
        let said = ask(&facts, source, destination);
        assert_eq!((said.verdict, said.rule), (verdict, rule), "{said}");
    }
    let question = Question::parse("host", "192.0.2.200:80", None).unwrap();
    assert!(matches!(decide(&facts, &question), Err(InspectError::WhichAddress)));
}

#[test]
fn interfaces_tell_pods_where_they_are_asked() {
    let mut facts = facts(&[("10.96.0.10", 80, frontend(FRONTEND_CLUSTER_IP))]);
    facts.pods_by_link = true;
    let mut question = Question::parse(POD, VIP, None).unwrap();
    for (interface, origin) in [(Some(5), "pod"), (Some(6), "external"), (None, "external")] {
        question.interface = interface;
        assert_eq!(decide(&facts, &question).unwrap().origin, origin, "{interface:?}");
    }
}

#[test]
fn affinity_is_followed_while_it_is_fresh() {
    let sticky = Frontend {
        affinity_seconds: 10,
        ..frontend(FRONTEND_CLUSTER_IP)
    };
    let mut facts = facts(&[("10.96.0.10", 80, sticky)]);
    for (ip, last_used, expected) in [
        ("10.244.2.5", 99, Some("10.244.2.5:8080")),
        ("10.244.2.5", 50, None),
        ("10.244.9.9", 99, None),
    ] {
        let record = Affinity {
            addr: addr(ip),
            port: Port::new(8080),
            pad: [0; 2],
            last_used,
        };
        facts.affinity = Box::new(move |key| (key.service == 7 && key.client == addr(POD)).then_some(record));
        let said = ask(&facts, POD, VIP);
        assert_eq!(said.affinity.map(|a| a.to_string()).as_deref(), expected, "{said}");
    }
}

#[test]
fn a_node_reaches_its_own_address_by_sockets_only() {
    let mut facts = facts(&[("0.0.0.0", 30_080, frontend(0))]);
    assert_eq!(ask(&facts, "host", "192.0.2.1:30080").verdict, "translated");
    facts.has_sockets = false;
    assert_eq!(ask(&facts, "host", "192.0.2.1:30080").verdict, "notAService");
}

#[test]
fn questions_are_parsed() {
    let question = Question::parse("host", "[fd00::a]:80/udp", None).unwrap();
    assert_eq!(
        (question.source, question.protocol.to_string()),
        (Source::Host, "UDP".to_owned())
    );
    for (source, destination) in [
        ("10.0.0.1", "10.0.0.2"),
        ("10.0.0.1", "10.0.0.2:80/icmp"),
        ("10.0.0.1", "[fd00::1]:80"),
        ("web", "10.0.0.2:80"),
    ] {
        assert!(
            Question::parse(source, destination, None).is_err(),
            "{source} {destination}"
        );
    }
}
