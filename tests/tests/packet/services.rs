//! Requests to a service and their replies: which endpoint is chosen, for how long, and what is left alone.

use std::collections::BTreeMap;

use proxy_common::addr::{Address, Port, Protocol};
use proxy_common::frontend::{FRONTEND_CLUSTER_IP, FRONTEND_HAS_ENDPOINTS, FRONTEND_LOCAL, Frontend, FrontendKey};
use proxy_common::names::{self, TC_EGRESS, TC_INGRESS};
use proxy_common::reason::Reason;
use proxy_common::rewrite::{HOOK_EGRESS, HOOK_INGRESS, KIND_REPLY, KIND_REQUEST};
use proxy_tests::programs::{Constants, DROP, PASS, Programs};
use proxy_tests::wire::{L4, Tcp, assert_same, ends, packet};

use crate::{ACK, Cast, FORWARDED, LO, SYN, at, load};

both_families! {
    /// S59, S108: a request to a ClusterIP goes to its backend, the reply comes from the ClusterIP; S60 with one endpoint.
    there_and_back => check_there_and_back;
    /// A port that stays the same is not part of the store nor of the checksum.
    same_port => check_same_port;
    /// S130, S196 and "unknown mid-flow TCP passes": what is not ours leaves as it came.
    not_ours => check_not_ours;
    /// S58: endpoints exist but not here.
    dropped => check_dropped;
    /// S121: one source port towards two services with the same endpoint.
    collision => check_collision;
    /// S121: both ports change, and by chance not their sum.
    equal_sums => check_equal_sums;
    /// S154: a SYN on a closed tuple chooses anew, one on a live tuple does not.
    reuse => check_reuse;
    /// S60: every endpoint with the same probability.
    uniform => check_uniform;
    /// S140: more clients than there is room for are served all the same, and the oldest records go.
    affinity_is_bounded => check_affinity_is_bounded;
}

fn check_there_and_back<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
    programs.add_service(2, c.vip, 53, Protocol::Udp, &[(c.backend, 5353)]);
    for (l4, then, protocol, vip_port, backend_port) in [(SYN, ACK, 6, 80, 8080), (L4::Udp, L4::Udp, 17, 53, 5353)] {
        let (client, vip, backend) = (at(c.client, 40_000), at(c.vip, vip_port), at(c.backend, backend_port));
        for (l4, payload) in [(l4, &b""[..]), (then, b"odd"), (then, b"even")] {
            let out = programs.run(TC_INGRESS, &packet(l4, client, vip, payload), LO, FORWARDED);
            assert_eq!(out.verdict, PASS);
            assert_same(&out.packet, &packet(l4, client, backend, payload));
            let out = programs.run(TC_EGRESS, &packet(then, backend, client, payload), LO, FORWARDED);
            assert_eq!(out.verdict, PASS);
            assert_same(&out.packet, &packet(then, vip, client, payload));
        }
        // What a rewrite made passes the same hook of the next interface (bridge and port) untouched.
        let rewritten = packet(l4, client, backend, b"");
        assert_same(&programs.run(TC_INGRESS, &rewritten, LO, FORWARDED).packet, &rewritten);
        let mut kinds: Vec<_> = programs
            .rewrites::<A>()
            .into_iter()
            .filter(|(key, _)| key.protocol == protocol)
            .map(|(key, value)| (value.kind, key.hook))
            .collect();
        kinds.sort_unstable();
        assert_eq!(kinds, [(KIND_REQUEST, HOOK_INGRESS), (KIND_REPLY, HOOK_EGRESS)]);
    }
}

fn check_same_port<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 80)]);
    let (client, vip, backend) = (at(c.client, 40_000), at(c.vip, 80), at(c.backend, 80));
    let out = programs.run(TC_INGRESS, &packet(SYN, client, vip, b"x"), LO, FORWARDED);
    assert_same(&out.packet, &packet(SYN, client, backend, b"x"));
    let out = programs.run(TC_EGRESS, &packet(ACK, backend, client, b"x"), LO, FORWARDED);
    assert_same(&out.packet, &packet(ACK, vip, client, b"x"));
}

fn check_not_ours<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
    let client = at(c.client, 40_000);
    let mut arp = packet(L4::Udp, client, at(c.backend, 1), b"");
    arp[12..14].copy_from_slice(&[0x08, 0x06]);
    let mut icmp = packet(L4::Udp, client, at(c.vip, 80), b"");
    icmp[if A::FAMILY == 4 { 23 } else { 20 }] = if A::FAMILY == 4 { 1 } else { 58 };
    let foreign = [
        (
            "mid-flow TCP of an unknown connection",
            packet(ACK, client, at(c.vip, 80), b"data"),
        ),
        ("SYN-ACK", packet(L4::Tcp(Tcp::SynAck), client, at(c.vip, 80), b"")),
        ("another port", packet(SYN, client, at(c.vip, 81), b"")),
        ("another protocol", packet(L4::Udp, client, at(c.vip, 80), b"")),
        ("another address", packet(SYN, client, at(c.backend, 8080), b"")),
        ("ARP", arp),
        ("ICMP", icmp),
    ];
    for (what, bytes) in foreign {
        for program in [TC_INGRESS, TC_EGRESS] {
            let out = programs.run(program, &bytes, LO, FORWARDED);
            assert_eq!(out.verdict, PASS, "{what} at {program}");
            assert_eq!(out.packet, bytes, "{what} at {program}");
        }
    }
    assert!(programs.rewrites::<A>().is_empty());
}

fn check_dropped<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.set_frontend(
        FrontendKey::new(c.vip, Port::new(80), 6),
        Frontend {
            service: 1,
            flags: FRONTEND_CLUSTER_IP | FRONTEND_LOCAL | FRONTEND_HAS_ENDPOINTS,
            ..Frontend::default()
        },
    );
    let out = programs.run(
        TC_INGRESS,
        &packet(SYN, at(c.client, 40_000), at(c.vip, 80), b""),
        LO,
        FORWARDED,
    );
    assert_eq!(out.verdict, DROP);
    assert_eq!(programs.count(Reason::NoLocalEndpoints), 1);
}

fn check_collision<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
    programs.add_service(2, c.other_vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
    let (client, backend) = (at(c.client, 40_000), at(c.backend, 8080));
    let mut sources = Vec::new();
    for vip in [c.vip, c.other_vip] {
        let out = programs.run(TC_INGRESS, &packet(SYN, client, at(vip, 80), b""), LO, FORWARDED);
        assert_eq!(out.verdict, PASS);
        let (src, dst) = ends(&out.packet);
        assert_eq!((src.0, dst), (client.0, backend), "the client's address stays");
        assert_same(&out.packet, &packet(SYN, src, backend, b""));
        sources.push((vip, src.1));
    }
    assert_eq!(sources[0].1, client.1, "the first connection keeps its port");
    assert_ne!(sources[0].1, sources[1].1, "the second gets another one");
    assert_eq!(programs.count(Reason::SourcePortChanged), 1);
    for (vip, port) in sources {
        let out = programs.run(TC_EGRESS, &packet(ACK, backend, (client.0, port), b""), LO, FORWARDED);
        assert_same(&out.packet, &packet(ACK, at(vip, 80), client, b""));
    }
}

fn check_equal_sums<A: Address>(c: Cast<A>) {
    // 40,000 + 80 = 32,000 + 8,080: the one port that a connection may change to.
    let constants = Constants {
        ports: (32_000, 1),
        ..Constants::default()
    };
    let mut programs = Programs::load(constants).unwrap();
    programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
    programs.add_service(2, c.other_vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
    let (client, vip, backend) = (at(c.client, 40_000), at(c.other_vip, 80), at(c.backend, 8080));
    programs.run(TC_INGRESS, &packet(SYN, client, at(c.vip, 80), b""), LO, FORWARDED);
    let out = programs.run(TC_INGRESS, &packet(SYN, client, vip, b""), LO, FORWARDED);
    let between = (client.0, 32_000);
    assert_same(&out.packet, &packet(SYN, between, backend, b""));
    let out = programs.run(TC_EGRESS, &packet(ACK, backend, between, b"x"), LO, FORWARDED);
    assert_same(&out.packet, &packet(ACK, vip, client, b"x"));
}

fn check_reuse<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
    let (client, vip, old) = (at(c.client, 40_000), at(c.vip, 80), at(c.backend, 8080));
    let request = |programs: &Programs, flags| {
        ends(
            &programs
                .run(TC_INGRESS, &packet(L4::Tcp(flags), client, vip, b""), LO, FORWARDED)
                .packet,
        )
        .1
    };
    let reply = |programs: &Programs, from, flags| {
        programs.run(TC_EGRESS, &packet(L4::Tcp(flags), from, client, b""), LO, FORWARDED);
    };
    assert_eq!(request(&programs, Tcp::Syn), old);
    // The service moves to another endpoint; the running connection does not (S62).
    programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.other_backend, 9090)]);
    let new = at(c.other_backend, 9090);
    assert_eq!(request(&programs, Tcp::Syn), old, "a repeated SYN");
    reply(&programs, old, Tcp::SynAck);
    assert_eq!(request(&programs, Tcp::Ack), old);
    assert_eq!(request(&programs, Tcp::FinAck), old);
    assert_eq!(request(&programs, Tcp::Syn), old, "half-closed is not over");
    reply(&programs, old, Tcp::FinAck);
    assert_eq!(request(&programs, Tcp::Ack), old, "the last ACK");
    assert_eq!(request(&programs, Tcp::Syn), new, "both sides have closed");
    assert_eq!(programs.rewrites::<A>().len(), 2, "the old connection is gone");
    reply(&programs, new, Tcp::Rst);
    programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
    assert_eq!(request(&programs, Tcp::Syn), old, "after a reset");
    // S127: without any endpoint the running connection goes on.
    programs.add_service(1, c.vip, 80, Protocol::Tcp, &[]);
    assert_eq!(request(&programs, Tcp::Ack), old);
}

fn check_uniform<A: Address>(c: Cast<A>) {
    const CONNECTIONS: u16 = 10_000;
    let mut programs = load();
    let backends: Vec<_> = (1..=4).map(|port| (c.backend, 8080 + port)).collect();
    programs.add_service(1, c.vip, 80, Protocol::Tcp, &backends);
    let mut counts: BTreeMap<u16, u32> = BTreeMap::new();
    for port in 0..CONNECTIONS {
        let out = programs.run(
            TC_INGRESS,
            &packet(SYN, at(c.client, 20_000 + port), at(c.vip, 80), b""),
            LO,
            FORWARDED,
        );
        *counts.entry(ends(&out.packet).1.1).or_default() += 1;
    }
    let expected = f64::from(CONNECTIONS) / 4.0;
    let chi_square: f64 = counts
        .values()
        .map(|n| (f64::from(*n) - expected).powi(2) / expected)
        .sum();
    // Three degrees of freedom: p = 0.001 is 16.27.
    assert!(
        counts.len() == 4 && chi_square < 16.27,
        "{counts:?}, chi-square {chi_square}"
    );
}

fn check_affinity_is_bounded<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.add_service(1, c.vip, 80, Protocol::Udp, &[(c.backend, 8080)]);
    let key = FrontendKey::new(c.vip, Port::new(80), Protocol::Udp.number());
    let mut frontend = programs.frontend(&key);
    frontend.affinity_seconds = 60;
    programs.set_frontend(key, frontend);
    let room = names::AFFINITY_CAPACITY;
    for number in 0..(room + room / 8) as u32 {
        let mut client = [0; 16];
        client[..A::LEN].copy_from_slice(c.client.octets());
        client[A::LEN - 3..A::LEN].copy_from_slice(&number.to_be_bytes()[1..]);
        let client: A = bytemuck::pod_read_unaligned(&client[..A::LEN]);
        let request = packet(L4::Udp, at(client, 40_000), at(c.vip, 80), b"");
        let out = programs.run(TC_INGRESS, &request, LO, FORWARDED);
        assert_same(
            &out.packet,
            &packet(L4::Udp, at(client, 40_000), at(c.backend, 8080), b""),
        );
    }
    let records = programs.affinity_records::<A>();
    assert!(
        records <= room && records > room / 2,
        "{records} records, room for {room}"
    );
}
