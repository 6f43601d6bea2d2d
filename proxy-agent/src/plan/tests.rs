//! Tables of objects and what a client then sees, through the packet tracer; each case names its rules.

use std::net::IpAddr;

use proxy_common::frontend::Origin;

use super::trace::{Outcome, Packet, View, trace};
use super::*;
use crate::model::fixtures::{LEAVING, LEAVING_HERE, READY, READY_HERE, service, slice, with_zones};
use crate::model::slice::{
    ENDPOINT_FOR_THIS_NODE, ENDPOINT_NODE_HINTED, ENDPOINT_READY, ENDPOINT_SERVING, ENDPOINT_TERMINATING,
};

const VIP: &str = "10.96.0.10";
const VIP6: &str = "fd00:96::10";
const TCP80: &str = "http:80/TCP";
const TCP8080: &str = "http:8080/TCP";
const NODE_HINTED: u8 = READY | ENDPOINT_NODE_HINTED;
const FOR_US: u8 = NODE_HINTED | ENDPOINT_FOR_THIS_NODE;

/// Name, endpoints, and what a client sees.
type Case<'a> = (&'a str, &'a [(&'a str, u8)], Outcome);

fn web() -> Service {
    service("web", &[VIP], &[TCP80])
}

fn local(mut service: Service) -> Service {
    service.internal_local = true;
    service
}

fn in_zone(zone: &str) -> NodeContext {
    NodeContext {
        zone: Some(zone.into()),
        ..NodeContext::default()
    }
}

fn ask_node(
    node: &NodeContext,
    service: &Service,
    slices: &[EndpointSlice],
    addr: &str,
    port: u16,
    protocol: Protocol,
) -> Outcome {
    let plans = plan_service(service, slices.iter(), node);
    let addr: IpAddr = addr.parse().unwrap();
    let outcomes = [Origin::Pod, Origin::Host, Origin::External].map(|origin| {
        let packet = Packet {
            origin,
            client: "192.0.2.200".parse().unwrap(),
            addr,
            port,
            protocol,
        };
        trace(plans.iter().map(|(name, plan)| (name, plan)), &View::default(), &packet)
    });
    assert!(
        outcomes.iter().all(|o| *o == outcomes[0]),
        "a cluster IP is the same for every source"
    );
    outcomes[0].clone()
}

fn ask(service: &Service, slices: &[EndpointSlice]) -> Outcome {
    ask_node(&NodeContext::default(), service, slices, VIP, 80, Protocol::Tcp)
}

fn backends(list: &[&str]) -> Outcome {
    Outcome::Backends(list.iter().map(|text| (text.parse().unwrap(), false)).collect())
}

#[test]
fn conditions() {
    let cases: &[Case] = &[
        ("S122 nothing", &[], Outcome::Refused),
        ("ready", &[("10.0.0.1", READY)], backends(&["10.0.0.1:8080"])),
        (
            "S47 ready while terminating",
            &[("10.0.0.1", ENDPOINT_READY | ENDPOINT_TERMINATING)],
            backends(&["10.0.0.1:8080"]),
        ),
        ("S48 fallback", &[("10.0.0.1", LEAVING)], backends(&["10.0.0.1:8080"])),
        (
            "S52 no fallback while one is ready",
            &[("10.0.0.1", LEAVING), ("10.0.0.2", READY)],
            backends(&["10.0.0.2:8080"]),
        ),
        ("S49 serving only", &[("10.0.0.1", ENDPOINT_SERVING)], Outcome::Refused),
        (
            "S50 nothing set",
            &[("10.0.0.1", 0), ("10.0.0.2", ENDPOINT_TERMINATING)],
            Outcome::Refused,
        ),
    ];
    for (name, endpoints, expected) in cases {
        assert_eq!(
            &ask(&web(), &[slice("a", "web", &[TCP8080], endpoints)]),
            expected,
            "{name}"
        );
    }
}

#[test]
fn local_policy() {
    let cases: &[Case] = &[
        (
            "S57 local only",
            &[("10.0.0.1", READY_HERE), ("10.0.0.2", READY)],
            backends(&["10.0.0.1:8080"]),
        ),
        ("S58 none here", &[("10.0.0.2", READY)], Outcome::Dropped),
        (
            "S58 only leaving, elsewhere",
            &[("10.0.0.2", LEAVING)],
            Outcome::Dropped,
        ),
        (
            "S54 leaving here, ready elsewhere",
            &[("10.0.0.1", LEAVING_HERE), ("10.0.0.2", READY)],
            backends(&["10.0.0.1:8080"]),
        ),
        (
            "S53 ready before leaving",
            &[("10.0.0.1", LEAVING_HERE), ("10.0.0.2", READY_HERE)],
            backends(&["10.0.0.2:8080"]),
        ),
        ("S55 none anywhere", &[], Outcome::Refused),
    ];
    for (name, endpoints, expected) in cases {
        assert_eq!(
            &ask(&local(web()), &[slice("a", "web", &[TCP8080], endpoints)]),
            expected,
            "{name}"
        );
    }
}

#[test]
fn ports_match_by_name_and_protocol() {
    let dns = service(
        "dns",
        &[VIP],
        &["dns:53/UDP", "dns-tcp:53/TCP", ":80/TCP", "gone:99/TCP"],
    );
    let slices = [
        slice(
            "a",
            "dns",
            &["dns:5353/UDP", "dns-tcp:5354/TCP", ":8080/TCP"],
            &[("10.0.0.1", READY)],
        ),
        // S30: another number under the same name.
        slice(
            "b",
            "dns",
            &["dns:6353/UDP", "other:99/TCP", "dns:1/TCP"],
            &[("10.0.0.2", READY)],
        ),
    ];
    let ask = |port, protocol| ask_node(&NodeContext::default(), &dns, &slices, VIP, port, protocol);
    assert_eq!(
        ask(53, Protocol::Udp),
        backends(&["10.0.0.1:5353", "10.0.0.2:6353"]),
        "S25, S30"
    );
    assert_eq!(ask(53, Protocol::Tcp), backends(&["10.0.0.1:5354"]), "S25");
    assert_eq!(ask(80, Protocol::Tcp), backends(&["10.0.0.1:8080"]), "S28");
    assert_eq!(ask(99, Protocol::Tcp), Outcome::Refused, "S31");
    assert_eq!(ask(81, Protocol::Tcp), Outcome::Refused, "S77");
    assert_eq!(ask(53, Protocol::Sctp), Outcome::Refused, "S77");
}

#[test]
fn families_are_apart() {
    let dual = service("web", &[VIP6, VIP], &[TCP80]);
    let v4 = slice("a", "web", &[TCP8080], &[("10.0.0.1", READY)]);
    let v6 = slice("b", "web", &[TCP8080], &[("fd00::1", READY)]);
    let ask = |service: &Service, slices: &[EndpointSlice], vip| {
        ask_node(&NodeContext::default(), service, slices, vip, 80, Protocol::Tcp)
    };
    assert_eq!(
        ask(&dual, &[v4.clone(), v6.clone()], VIP6),
        backends(&["[fd00::1]:8080"])
    );
    assert_eq!(ask(&dual, &[v4.clone(), v6.clone()], VIP), backends(&["10.0.0.1:8080"]));
    assert_eq!(ask(&dual, std::slice::from_ref(&v4), VIP6), Outcome::Refused, "S15");
    assert_eq!(ask(&web(), &[v4, v6], VIP6), Outcome::NotAService, "S16");
}

#[test]
fn copies_count_once() {
    let slices = [
        slice("a", "web", &[TCP8080], &[("10.0.0.1", LEAVING), ("10.0.0.2", READY)]),
        slice("b", "web", &[TCP8080], &[("10.0.0.1", READY), ("10.0.0.2", READY)]),
        slice("c", "web", &["http:8081/TCP"], &[("10.0.0.1", READY)]),
    ];
    let expected = backends(&["10.0.0.1:8080", "10.0.0.1:8081", "10.0.0.2:8080"]);
    assert_eq!(ask(&web(), &slices), expected, "S40, S41");
}

#[test]
fn hints() {
    let zone = |name: &str, addr: &str, flags, zones: &[&str]| {
        let plain = slice(name, "web", &[TCP8080], &[(addr, flags)]);
        if zones.is_empty() {
            plain
        } else {
            with_zones(plain, zones)
        }
    };
    let ask = |node: &NodeContext, service: &Service, slices: &[EndpointSlice]| {
        ask_node(node, service, slices, VIP, 80, Protocol::Tcp)
    };
    let zoned = [
        zone("a", "10.0.0.1", READY, &["x"]),
        zone("b", "10.0.0.2", READY, &["y", "z"]),
    ];
    let all = backends(&["10.0.0.1:8080", "10.0.0.2:8080"]);
    assert_eq!(ask(&in_zone("z"), &web(), &zoned), backends(&["10.0.0.2:8080"]), "S67");
    assert_eq!(
        ask(&in_zone("other"), &web(), &zoned),
        all,
        "S69 no endpoint for this zone"
    );
    assert_eq!(ask(&NodeContext::default(), &web(), &zoned), all, "S69 no zone");

    let unhinted = [zoned[0].clone(), zone("b", "10.0.0.2", READY, &[])];
    assert_eq!(ask(&in_zone("x"), &web(), &unhinted), all, "S68");

    let leaving = [zoned[0].clone(), zone("b", "10.0.0.2", LEAVING, &[])];
    assert_eq!(
        ask(&in_zone("x"), &web(), &leaving),
        backends(&["10.0.0.1:8080"]),
        "S65, S72"
    );

    let nodes = [
        zone("a", "10.0.0.1", FOR_US, &["y"]),
        zone("b", "10.0.0.2", NODE_HINTED, &["x"]),
    ];
    assert_eq!(
        ask(&in_zone("x"), &web(), &nodes),
        backends(&["10.0.0.1:8080"]),
        "S66 before S67"
    );

    let others = [
        zone("a", "10.0.0.1", NODE_HINTED, &["y"]),
        zone("b", "10.0.0.2", NODE_HINTED, &["x"]),
    ];
    assert_eq!(
        ask(&in_zone("x"), &web(), &others),
        backends(&["10.0.0.2:8080"]),
        "S69 to the zone level"
    );

    let mixed = [zone("a", "10.0.0.1", FOR_US, &[]), zone("b", "10.0.0.2", READY, &[])];
    assert_eq!(ask(&in_zone("x"), &web(), &mixed), all, "S68 for nodes");

    let here = [
        zone("a", "10.0.0.1", READY_HERE | ENDPOINT_NODE_HINTED, &["y"]),
        zone("b", "10.0.0.2", FOR_US, &["y"]),
    ];
    assert_eq!(
        ask(&in_zone("x"), &local(web()), &here),
        backends(&["10.0.0.1:8080"]),
        "S53 no hints for the local set"
    );
}

#[test]
fn kept_flows_and_flags() {
    let slices = [slice(
        "a",
        "web",
        &[TCP8080],
        &[
            ("10.0.0.4", 0),
            ("10.0.0.3", ENDPOINT_SERVING),
            ("10.0.0.2", LEAVING_HERE),
            ("10.0.0.1", READY),
        ],
    )];
    let plans = plan_service(&local(web()), slices.iter(), &NodeContext::default());
    let plan = &plans[0].1.v4;
    let list =
        |set: &[Backend<Addr4>]| -> Vec<(String, u16)> { set.iter().map(|b| (b.addr.to_string(), b.flags)).collect() };
    assert_eq!(list(&plan.cluster.selectable), [("10.0.0.1".to_owned(), 0)]);
    assert_eq!(
        list(&plan.cluster.keep),
        [("10.0.0.2".to_owned(), 3), ("10.0.0.3".to_owned(), 0)],
        "S145, S148"
    );
    assert_eq!(list(&plan.local.selectable), [("10.0.0.2".to_owned(), 3)]);
    assert_eq!(
        list(&plan.local.keep),
        [("10.0.0.1".to_owned(), 0), ("10.0.0.3".to_owned(), 0)]
    );
    assert!(plan.has_endpoints);

    let cluster = plan_service(&web(), slices.iter(), &NodeContext::default());
    assert_eq!(cluster[0].1.v4.local, Endpoints::default(), "no policy is Local");
}

#[test]
fn a_thousand_endpoints_in_ten_slices() {
    let slices: Vec<EndpointSlice> = (0..10)
        .map(|n| {
            let names: Vec<String> = (0..100).map(|host| format!("10.0.{n}.{host}")).collect();
            let endpoints: Vec<(&str, u8)> = names.iter().map(|name| (name.as_str(), READY)).collect();
            slice(&format!("s{n}"), "web", &[TCP8080], &endpoints)
        })
        .collect();
    let Outcome::Backends(found) = ask(&web(), &slices) else {
        panic!("no backends")
    };
    assert_eq!(found.len(), 1000, "S39");
}

#[test]
fn the_older_service_has_a_shared_frontend() {
    let mut young = service("a", &[VIP], &[TCP80]);
    young.created = 2;
    let mut old = service("b", &[VIP], &[TCP80]);
    old.created = 1;
    let slices = [slice("x", "b", &[TCP8080], &[("10.0.0.1", READY)])];
    let mut plans = plan_service(&young, [].iter(), &NodeContext::default());
    plans.extend(plan_service(&old, slices.iter(), &NodeContext::default()));
    let plans = plans.iter().map(|(name, plan)| (name, plan));
    let packet = Packet {
        origin: Origin::Pod,
        client: "10.0.0.9".parse().unwrap(),
        addr: VIP.parse().unwrap(),
        port: 80,
        protocol: Protocol::Tcp,
    };
    let outcome = trace(plans, &View::default(), &packet);
    assert_eq!(outcome, backends(&["10.0.0.1:8080"]), "S37");
}
