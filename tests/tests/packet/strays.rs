//! What is not translated and must not be sent on: addresses of the service network that belong to nobody, and what would go back to
//! where it came from.

use std::net::IpAddr;

use etherparse::{Icmpv4Type, Icmpv6Type};
use proxy_common::addr::{Address, Port, Protocol};
use proxy_common::frontend::{FRONTEND_CLUSTER_IP, FRONTEND_UNDEFINED, Frontend, FrontendKey};
use proxy_common::link::{LINK_NO_ETHERNET, LINK_PODS, Link};
use proxy_common::names::{TC_EGRESS, TC_INGRESS};
use proxy_common::reason::Reason;
use proxy_common::rewrite::KIND_MASQUERADE;
use proxy_common::settings::{Prefix, Settings};
use proxy_tests::programs::{Constants, DROP, PASS, Programs, REDIRECT};
use proxy_tests::wire::{DST_MAC, End, L4, SRC_MAC, Tcp, assert_same, headers, packet};

use crate::errors::port_unreachable;
use crate::{ACK, Cast, FORWARDED, LO, SYN, at, in_namespace, load, outsider, v4, v6};

both_families! {
    /// S78, S79: an address of the service network that nobody translated leaves the node in no way.
    unallocated => check_unallocated;
    /// S77: with service networks known, an undefined port is refused inside of them only.
    undefined => check_undefined;
    /// An undefined port of an external address is not sent back to where it came from; elsewhere it goes its way (S99).
    returning => check_returning;
    /// S114: a pod is who comes over a pods' interface, whatever its address.
    pods_by_link => check_pods_by_link;
}

/// The /24 or /120 around an address.
fn around<A: Address>(addr: A) -> Prefix<A> {
    let mut mask = [0xff; 16];
    mask[A::LEN - 1] = 0;
    let mut network = [0; 16];
    network[..A::LEN].copy_from_slice(addr.octets());
    network[A::LEN - 1] = 0;
    Prefix {
        addr: bytemuck::pod_read_unaligned(&network[..A::LEN]),
        mask: bytemuck::pod_read_unaligned(&mask[..A::LEN]),
        set: 1,
    }
}

fn ping(src: IpAddr, dst: IpAddr) -> Vec<u8> {
    let ip = headers([SRC_MAC, DST_MAC], src, dst);
    let echo = etherparse::IcmpEchoHeader { id: 1, seq: 1 };
    let mut bytes = Vec::new();
    match dst {
        IpAddr::V4(_) => ip.icmpv4(Icmpv4Type::EchoRequest(echo)).write(&mut bytes, b"ping"),
        IpAddr::V6(_) => ip.icmpv6(Icmpv6Type::EchoRequest(echo)).write(&mut bytes, b"ping"),
    }
    .unwrap();
    bytes
}

fn marker<A: Address>(programs: &mut Programs, addr: A, flags: u32) {
    programs.set_frontend(
        FrontendKey::new(addr, Port::new(0), 0),
        Frontend {
            service: 1,
            flags: flags | FRONTEND_UNDEFINED,
            ..Frontend::default()
        },
    );
}

fn check_unallocated<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
    let client = at(c.client, 40_000);
    let strays = [
        ("a ping of a cluster IP", ping(c.client.into(), c.vip.into())),
        ("a ping of nobody", ping(c.client.into(), c.other_vip.into())),
        ("a connection to nobody", packet(SYN, client, at(c.other_vip, 80), b"")),
        (
            "a datagram to nobody",
            packet(L4::Udp, client, at(c.other_vip, 80), b""),
        ),
        (
            "the middle of a connection",
            packet(ACK, client, at(c.vip, 80), b"data"),
        ),
    ];
    let egress = |programs: &Programs, bytes: &[u8], from| {
        let out = programs.run(TC_EGRESS, bytes, LO, from);
        assert_same(&out.packet, bytes);
        out.verdict
    };
    for (what, bytes) in &strays {
        for from in [0, FORWARDED] {
            assert_eq!(
                egress(&programs, bytes, from),
                PASS,
                "{what}: no service network is known"
            );
        }
    }
    programs.change_settings(|settings: &mut Settings<A>| settings.networks[0] = around(c.vip));
    for (what, bytes) in &strays {
        for from in [0, FORWARDED] {
            assert_eq!(egress(&programs, bytes, from), DROP, "{what}");
        }
        // Another proxy on the node may still translate it (S77 aside).
        assert_eq!(programs.run(TC_INGRESS, bytes, LO, FORWARDED).verdict, PASS, "{what}");
    }
    assert_eq!(programs.count(Reason::Unallocated), 10);
    let elsewhere = ping(c.vip.into(), c.client.into());
    assert_eq!(
        egress(&programs, &elsewhere, FORWARDED),
        PASS,
        "only the destination counts"
    );
    // What is translated goes on as ever, in both directions.
    let backend = at(c.backend, 8080);
    let out = programs.run(TC_INGRESS, &packet(SYN, client, at(c.vip, 80), b""), LO, FORWARDED);
    assert_same(&out.packet, &packet(SYN, client, backend, b""));
    assert_eq!(egress(&programs, &out.packet, FORWARDED), PASS);
    let reply = packet(L4::Tcp(Tcp::SynAck), backend, client, b"");
    let out = programs.run(TC_EGRESS, &reply, LO, FORWARDED);
    assert_same(&out.packet, &packet(L4::Tcp(Tcp::SynAck), at(c.vip, 80), client, b""));
    assert_eq!(out.verdict, PASS);
}

fn check_undefined<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
    marker(&mut programs, c.vip, FRONTEND_CLUSTER_IP);
    marker(&mut programs, c.node, FRONTEND_CLUSTER_IP);
    let dial = |programs: &Programs, addr: A| {
        let bytes = packet(SYN, at(c.client, 40_000), at(addr, 81), b"");
        programs.run(TC_INGRESS, &bytes, LO, FORWARDED).verdict
    };
    assert_eq!(
        [dial(&programs, c.vip), dial(&programs, c.node)],
        [REDIRECT; 2],
        "none is known"
    );
    programs.change_settings(|settings: &mut Settings<A>| settings.networks[0] = around(c.vip));
    assert_eq!([dial(&programs, c.vip), dial(&programs, c.node)], [REDIRECT, PASS]);
}

fn check_returning<A: Address>(c: Cast<A>) {
    let mut programs = load();
    marker(&mut programs, c.vip, 0);
    let client: End = at(outsider::<A>(), 40_000);
    for bytes in [
        packet(SYN, client, at(c.vip, 81), b""),
        packet(L4::Udp, client, at(c.vip, 81), b""),
        ping(client.0, c.vip.into()),
    ] {
        assert_eq!(
            programs.run(TC_INGRESS, &bytes, LO, FORWARDED).verdict,
            PASS,
            "not refused"
        );
        assert_eq!(
            programs.run(TC_EGRESS, &bytes, LO, FORWARDED).verdict,
            PASS,
            "it may be another node's"
        );
        assert_eq!(programs.run(TC_EGRESS, &bytes, LO, 0).verdict, PASS, "the node's own");
        assert_eq!(
            programs.run(TC_EGRESS, &bytes, LO, LO).verdict,
            DROP,
            "back to where it came from"
        );
    }
    assert_eq!(programs.count(Reason::Loop), 3);
    // Nobody answers an answer: the address may be a node that was refused something here.
    for bytes in [
        packet(L4::Tcp(Tcp::Rst), client, at(c.vip, 81), b""),
        port_unreachable(
            client.0,
            c.vip.into(),
            &packet(L4::Udp, at(c.vip, 81), client, b"")[14..],
        ),
    ] {
        assert_eq!(programs.run(TC_EGRESS, &bytes, LO, LO).verdict, PASS);
    }
    let foreign = packet(SYN, client, at(c.other_vip, 81), b"");
    assert_eq!(programs.run(TC_EGRESS, &foreign, LO, LO).verdict, PASS);
}

fn check_pods_by_link<A: Address>(c: Cast<A>) {
    in_namespace(|| {
        for (flags, expected) in [(LINK_PODS, 0), (0, 1)] {
            let mut programs = Programs::load(Constants {
                pods_by_link: true,
                ..Constants::default()
            })
            .unwrap();
            programs.set_link(
                LO,
                Link {
                    flags: LINK_NO_ETHERNET | flags,
                    addr4: v4().node,
                    addr6: v6().node,
                    ..Link::default()
                },
            );
            programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
            programs.run(
                TC_INGRESS,
                &packet(SYN, at(c.client, 40_000), at(c.vip, 80), b""),
                LO,
                FORWARDED,
            );
            let masqueraded = programs
                .rewrites::<A>()
                .iter()
                .filter(|(_, entry)| entry.kind == KIND_MASQUERADE)
                .count();
            assert_eq!(masqueraded, expected, "flags {flags}");
        }
    });
}
