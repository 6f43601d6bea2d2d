//! What is counted per service port: known packets, exact numbers.

use proxy_common::addr::{Address, Port, Protocol};
use proxy_common::counters::{Counters, DropClass, TOTAL};
use proxy_common::frontend::{FRONTEND_CLUSTER_IP, FRONTEND_HAS_ENDPOINTS, Frontend, FrontendKey};
use proxy_common::names::{TC_EGRESS, TC_INGRESS};
use proxy_tests::programs::{Constants, DROP, PASS, Programs};
use proxy_tests::wire::{L4, packet};

use crate::{ACK, Cast, FORWARDED, LO, SYN, at, in_namespace, load, load_masquerading, outsider};

/// Bytes of an Ethernet header, which are not counted.
const ETHERNET: u64 = 14;

both_families! {
    /// Every packet once, in its direction, with its length from the IP header on; connections by what opened them.
    exact => check_exact;
    /// A masqueraded packet passes two hooks and is counted at one of them.
    masqueraded_once => check_masqueraded_once;
    /// Refusals and drops belong to the service that was dialled.
    not_served => check_not_served;
    /// `--service-metrics=false`: nothing but the number of all connections.
    off => check_off;
}

fn check_exact<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
    programs.add_service(2, c.other_vip, 53, Protocol::Udp, &[(c.backend, 5353)]);
    let mut expected = [Counters::default(); 3];
    for (service, first, then, vip, port, backend_port) in [
        (1, SYN, ACK, c.vip, 80, 8080),
        (2, L4::Udp, L4::Udp, c.other_vip, 53, 5353),
    ] {
        for client_port in [40_000, 40_001] {
            let (client, vip, backend) = (at(c.client, client_port), at(vip, port), at(c.backend, backend_port));
            let requests = [
                packet(first, client, vip, b""),
                packet(then, client, vip, &[0; 100]),
                packet(then, client, vip, &[0; 7]),
            ];
            let replies = [packet(then, backend, client, &[0; 1_000])];
            for (direction, program, packets) in [(0, TC_INGRESS, &requests[..]), (1, TC_EGRESS, &replies[..])] {
                for bytes in packets {
                    assert_eq!(programs.run(program, bytes, LO, FORWARDED).verdict, PASS);
                    expected[service].packets[direction] += 1;
                    expected[service].bytes[direction] += bytes.len() as u64 - ETHERNET;
                }
            }
            expected[service].connections[0] += 1;
            expected[TOTAL as usize].connections[0] += 1;
        }
    }
    // What is not ours is not counted.
    let foreign = packet(ACK, at(c.client, 1), at(c.vip, 80), b"");
    programs.run(TC_INGRESS, &foreign, LO, FORWARDED);
    for (service, expected) in (0..).zip(expected) {
        assert_eq!(programs.counters(service), expected, "service {service}");
    }
}

fn check_masqueraded_once<A: Address>(c: Cast<A>) {
    in_namespace(|| {
        let mut programs = load_masquerading((61_000, 10));
        programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
        let client = at(outsider::<A>(), 40_000);
        let syn = packet(SYN, client, at(c.vip, 80), b"");
        let inside = programs.run(TC_INGRESS, &syn, LO, FORWARDED).packet;
        let outside = programs.run(TC_EGRESS, &inside, LO, FORWARDED).packet;
        assert_ne!(inside, outside, "its source is rewritten");
        let answer = packet(ACK, at(c.backend, 8080), at(c.node, 40_000), b"");
        let inside = programs.run(TC_INGRESS, &answer, LO, FORWARDED).packet;
        assert_ne!(inside, answer, "its destination is rewritten");
        programs.run(TC_EGRESS, &inside, LO, FORWARDED);
        let counters = programs.counters(1);
        assert_eq!((counters.packets, counters.connections), ([1, 1], [1, 0]));
    });
}

fn check_not_served<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.add_service(1, c.vip, 80, Protocol::Tcp, &[]);
    let elsewhere = Frontend {
        service: 2,
        flags: FRONTEND_CLUSTER_IP | FRONTEND_HAS_ENDPOINTS,
        ..Frontend::default()
    };
    programs.set_frontend(FrontendKey::new(c.other_vip, Port::new(80), 6), elsewhere);
    for port in 0..3 {
        let syn = packet(SYN, at(c.client, 40_000 + port), at(c.vip, 80), b"");
        assert_ne!(programs.run(TC_INGRESS, &syn, LO, FORWARDED).verdict, DROP);
        let syn = packet(SYN, at(c.client, 40_000 + port), at(c.other_vip, 80), b"");
        assert_eq!(programs.run(TC_INGRESS, &syn, LO, FORWARDED).verdict, DROP);
    }
    let refused = Counters {
        refused: [3, 0],
        ..Counters::default()
    };
    let mut dropped = Counters::default();
    dropped.dropped[DropClass::Policy as usize] = 3;
    assert_eq!(programs.counters(1), refused);
    assert_eq!(programs.counters(2), dropped);
}

fn check_off<A: Address>(c: Cast<A>) {
    let mut programs = Programs::load(Constants {
        count_services: false,
        ..Constants::default()
    })
    .unwrap();
    programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
    let syn = packet(SYN, at(c.client, 40_000), at(c.vip, 80), b"");
    programs.run(TC_INGRESS, &syn, LO, FORWARDED);
    assert!(programs.counters(1).is_zero());
    assert_eq!(programs.counters(TOTAL).connections, [1, 0]);
}
