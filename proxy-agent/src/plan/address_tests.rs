//! Every kind of address against every kind of client, through the packet tracer; each case names its rules.

use std::net::IpAddr;

use proxy_common::frontend::Origin::{self, External, Host, Pod};

use super::trace::{Outcome, Packet, View, trace};
use super::*;
use crate::model::fixtures::{LEAVING, READY, READY_HERE, service, slice};

const VIP: &str = "10.96.0.10";
const NODE: &str = "192.0.2.1";
const BALANCED: &str = "203.0.113.10";
const EXTERNAL_IP: &str = "203.0.113.250";
const NODE_PORT: u16 = 30_080;
const ANYWHERE: [Origin; 3] = [Pod, Host, External];
/// One endpoint here, one elsewhere.
const SPREAD: &[(&str, u8)] = &[("10.0.1.1", READY_HERE), ("10.0.2.1", READY)];
const ELSEWHERE: &[(&str, u8)] = &[("10.0.2.1", READY)];

/// A Service with every kind of address.
fn web() -> Service {
    let mut web = service("web", &[VIP], &["http:80/TCP"]);
    web.load_balancer_ips = vec![ip(BALANCED)];
    web.external_ips = vec![ip(EXTERNAL_IP)];
    web.ports[0].node_port = Some(Port::new(NODE_PORT));
    web
}

fn local() -> Service {
    Service {
        external_local: true,
        ..web()
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn view() -> View {
    View {
        node_port_addresses: vec![ip(NODE), ip("fd00:ffff::1")],
        has_pods: [true, true],
        masquerade_all: false,
    }
}

fn client(origin: Origin) -> IpAddr {
    ip(match origin {
        Pod => "10.0.1.9",
        Host => NODE,
        External => "198.51.100.7",
    })
}

fn plan(services: &[Service], endpoints: &[(&str, u8)]) -> Vec<(ServicePortName, ServicePortPlan)> {
    let node = NodeContext {
        ips: vec![ip(NODE)],
        ..NodeContext::default()
    };
    let plan_one = |service: &Service| {
        let ports = ["http:8080/TCP"];
        let slices = [slice("a", &service.name.name, &ports, endpoints)];
        plan_service(service, slices.iter(), &node)
    };
    services.iter().flat_map(plan_one).collect()
}

fn dial(
    plans: &[(ServicePortName, ServicePortPlan)],
    view: &View,
    (origin, client): (Origin, IpAddr),
    addr: &str,
    port: u16,
    protocol: Protocol,
) -> Outcome {
    let packet = Packet {
        origin,
        client,
        addr: ip(addr),
        port,
        protocol,
    };
    trace(plans.iter().map(|(name, plan)| (name, plan)), view, &packet)
}

/// What a client of the usual address sees over TCP.
fn ask(service: &Service, endpoints: &[(&str, u8)], origin: Origin, addr: &str, port: u16) -> Outcome {
    let plans = plan(std::slice::from_ref(service), endpoints);
    dial(&plans, &view(), (origin, client(origin)), addr, port, Protocol::Tcp)
}

fn backends(list: &[(&str, u8)], masqueraded: bool) -> Outcome {
    let backend = |(addr, _): &(&str, u8)| (format!("{addr}:8080").parse().unwrap(), masqueraded);
    Outcome::Backends(list.iter().map(backend).collect())
}

/// The external addresses, and the port to dial there.
const EXTERNAL_ADDRESSES: [(&str, u16); 3] = [(BALANCED, 80), (EXTERNAL_IP, 80), (NODE, NODE_PORT)];

#[test]
fn external_addresses_with_cluster_policy() {
    for (addr, port) in EXTERNAL_ADDRESSES {
        for origin in ANYWHERE {
            // The node's own connections carry its address already.
            let masqueraded = origin != Host;
            let expected = backends(SPREAD, masqueraded);
            assert_eq!(
                ask(&web(), SPREAD, origin, addr, port),
                expected,
                "S86, S94, S98 {addr} {origin:?}"
            );
            assert_eq!(
                ask(&web(), &[], origin, addr, port),
                Outcome::Refused,
                "S122 {addr} {origin:?}"
            );
        }
    }
}

#[test]
fn external_addresses_with_local_policy() {
    for (addr, port) in EXTERNAL_ADDRESSES {
        for origin in [Pod, Host] {
            assert_eq!(
                ask(&local(), SPREAD, origin, addr, port),
                backends(SPREAD, false),
                "S87 {addr} {origin:?}"
            );
            let short = ask(&local(), ELSEWHERE, origin, addr, port);
            assert_eq!(short, backends(ELSEWHERE, false), "S88, S125 {addr} {origin:?}");
        }
        let here = backends(&SPREAD[..1], false);
        assert_eq!(ask(&local(), SPREAD, External, addr, port), here, "S87 {addr}");
        assert_eq!(
            ask(&local(), ELSEWHERE, External, addr, port),
            Outcome::Dropped,
            "S55, S125 {addr}"
        );
        let leaving = [("10.0.2.1", LEAVING)];
        assert_eq!(
            ask(&local(), &leaving, External, addr, port),
            Outcome::Dropped,
            "S55 {addr}"
        );
        for origin in ANYWHERE {
            assert_eq!(
                ask(&local(), &[], origin, addr, port),
                Outcome::Refused,
                "S55, S122 {addr}"
            );
        }
    }
}

#[test]
fn the_policies_do_not_mix() {
    let internal = Service {
        internal_local: true,
        ..web()
    };
    for origin in ANYWHERE {
        let masqueraded = origin == External;
        let all = backends(SPREAD, masqueraded);
        assert_eq!(ask(&local(), SPREAD, origin, VIP, 80), all, "S56, S108 {origin:?}");
        let here = backends(&SPREAD[..1], masqueraded);
        assert_eq!(ask(&internal, SPREAD, origin, VIP, 80), here, "S57, S113 {origin:?}");
        assert_eq!(
            ask(&internal, ELSEWHERE, origin, VIP, 80),
            Outcome::Dropped,
            "S58, S126 {origin:?}"
        );
        let outside = ask(&internal, ELSEWHERE, origin, BALANCED, 80);
        assert_eq!(outside, backends(ELSEWHERE, origin != Host), "S56 {origin:?}");
    }
}

#[test]
fn masquerading_follows_the_options() {
    let plans = plan(&[web()], ELSEWHERE);
    let local = plan(&[local()], ELSEWHERE);
    let ask = |plans: &[_], view: &View, from: &str, addr| dial(plans, view, (Pod, ip(from)), addr, 80, Protocol::Tcp);
    let all = View {
        masquerade_all: true,
        ..view()
    };
    assert_eq!(ask(&plans, &all, "10.0.1.9", VIP), backends(ELSEWHERE, true), "S111");
    assert_eq!(
        ask(&local, &all, "10.0.1.9", BALANCED),
        backends(ELSEWHERE, false),
        "S111"
    );
    assert_eq!(ask(&plans, &view(), "10.0.2.1", VIP), backends(ELSEWHERE, true), "S110");
    assert_eq!(
        ask(&local, &view(), "10.0.2.1", BALANCED),
        backends(ELSEWHERE, true),
        "S110"
    );
    let blind = View {
        has_pods: [false, true],
        ..view()
    };
    let outcome = dial(&plans, &blind, (External, ip("10.0.1.9")), VIP, 80, Protocol::Tcp);
    assert_eq!(outcome, backends(ELSEWHERE, false), "S112");
}

#[test]
fn node_ports_are_on_addresses_of_the_node() {
    let served = backends(SPREAD, true);
    assert_eq!(ask(&web(), SPREAD, External, NODE, NODE_PORT), served, "S26");
    for (addr, port, rule) in [
        (NODE, NODE_PORT + 1, "S93"),
        (NODE, 80, "S99"),
        ("192.0.2.2", NODE_PORT, "S81"),
        ("fd00:ffff::1", NODE_PORT, "S18"),
    ] {
        assert_eq!(
            ask(&web(), SPREAD, External, addr, port),
            Outcome::NotAService,
            "{rule}"
        );
    }
    let plans = plan(&[web()], SPREAD);
    let udp = dial(
        &plans,
        &view(),
        (External, client(External)),
        NODE,
        NODE_PORT,
        Protocol::Udp,
    );
    assert_eq!(udp, Outcome::NotAService, "S34");
}

#[test]
fn an_exact_address_comes_before_a_node_port() {
    // Younger and later by name, and still first: its frontend is the better match.
    let mut claims = service("zebra", &["10.96.0.11"], &["http:30080/TCP"]);
    claims.external_ips = vec![ip(NODE)];
    claims.external_local = true;
    claims.created = 9;
    let plans = plan(&[web(), claims], ELSEWHERE);
    let ask = |port| dial(&plans, &view(), (External, client(External)), NODE, port, Protocol::Tcp);
    assert_eq!(
        ask(NODE_PORT),
        Outcome::Dropped,
        "S38: the Local policy of the externalIP"
    );
    assert_eq!(ask(22), Outcome::NotAService, "S99");
}

#[test]
fn source_ranges_guard_load_balancer_addresses_alone() {
    let guarded = Service {
        source_ranges: vec!["10.0.0.0/16".parse().unwrap(), "2001:db8::/32".parse().unwrap()],
        ..web()
    };
    assert_eq!(ask(&guarded, SPREAD, Pod, BALANCED, 80), backends(SPREAD, true), "S102");
    for origin in [Host, External] {
        assert_eq!(
            ask(&guarded, SPREAD, origin, BALANCED, 80),
            Outcome::Dropped,
            "S101, S103 {origin:?}"
        );
        assert_eq!(
            ask(&guarded, &[], origin, BALANCED, 80),
            Outcome::Dropped,
            "S107 {origin:?}"
        );
    }
    for (addr, port) in [(NODE, NODE_PORT), (EXTERNAL_IP, 80), (VIP, 80)] {
        let outcome = ask(&guarded, SPREAD, External, addr, port);
        assert_eq!(outcome, backends(SPREAD, true), "S92, S101 {addr}");
    }
    let other_family = Service {
        source_ranges: vec!["2001:db8::/32".parse().unwrap()],
        ..web()
    };
    assert_eq!(
        ask(&other_family, SPREAD, External, BALANCED, 80),
        backends(SPREAD, true),
        "S105"
    );
    let both = Service {
        external_ips: vec![ip(BALANCED)],
        ..guarded
    };
    assert_eq!(
        ask(&both, SPREAD, External, BALANCED, 80),
        Outcome::Dropped,
        "S101: an externalIP opens nothing"
    );
}

#[test]
fn a_node_in_the_ranges_may_ask_with_the_address_itself() {
    let guarded = |range: &str| Service {
        source_ranges: vec![range.parse().unwrap(), "10.1.0.0/16".parse().unwrap()],
        ..web()
    };
    let ask = |service: &Service| {
        let plans = plan(std::slice::from_ref(service), ELSEWHERE);
        dial(&plans, &view(), (Host, ip(BALANCED)), BALANCED, 80, Protocol::Tcp)
    };
    assert_eq!(ask(&guarded("192.0.2.0/24")), backends(ELSEWHERE, false), "S106");
    assert_eq!(ask(&guarded("192.0.3.0/24")), Outcome::Dropped, "S106");
    let ranges = plan(&[guarded("192.0.2.0/24")], &[])[0].1.v4.source_ranges.clone();
    let ranges: Vec<_> = ranges.iter().map(|(addr, len)| format!("{addr}/{len}")).collect();
    assert_eq!(ranges, ["10.1.0.0/16", "192.0.2.0/24", "203.0.113.10/32"]);
}

#[test]
fn other_ports_of_a_cluster_ip_are_refused() {
    let plans = plan(&[web()], SPREAD);
    for origin in ANYWHERE {
        for (port, protocol) in [(81, Protocol::Tcp), (80, Protocol::Udp), (NODE_PORT, Protocol::Tcp)] {
            let outcome = dial(&plans, &view(), (origin, client(origin)), VIP, port, protocol);
            assert_eq!(outcome, Outcome::Refused, "S77 {port} {protocol}");
        }
        let elsewhere = dial(&plans, &view(), (origin, client(origin)), BALANCED, 81, Protocol::Tcp);
        assert_eq!(elsewhere, Outcome::NotAService, "S77 is about cluster IPs");
    }
}

#[test]
fn a_family_without_cluster_ip_has_no_address_at_all() {
    let mut single = web();
    single.external_ips.push(ip("2001:db8::250"));
    single.load_balancer_ips.push(ip("2001:db8::10"));
    let plans = plan(&[single], SPREAD);
    assert!(plans[0].1.v6.frontends.is_empty(), "S18, S19");
    assert_eq!(plans[0].1.v4.frontends.len(), 7);
}
