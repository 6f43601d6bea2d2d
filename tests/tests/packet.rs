//! Packets through the real programs by program test-run: every byte that comes out is compared with a packet that was built, and
//! the output of one hook feeds the next, as it does on a node.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, with its context")]

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::IpAddr;

use etherparse::{Icmpv4Type, Icmpv6Type, icmpv4, icmpv6};
use proxy_common::addr::{Addr4, Addr6, Address, Port, Protocol};
use proxy_common::frontend::{FRONTEND_CLUSTER_IP, FRONTEND_HAS_ENDPOINTS, FRONTEND_LOCAL, Frontend, FrontendKey};
use proxy_common::link::Link;
use proxy_common::names::{TC_EGRESS, TC_INGRESS};
use proxy_common::reason::Reason;
use proxy_common::rewrite::{HOOK_EGRESS, HOOK_INGRESS, KIND_MASQUERADE, KIND_REPLY, KIND_REQUEST, KIND_UNMASQUERADE};
use proxy_tests::programs::{Constants, DROP, PASS, Programs, REDIRECT};
use proxy_tests::wire::{DST_MAC, End, L4, SRC_MAC, Tcp, assert_same, ends, headers, packet};

const SYN: L4 = L4::Tcp(Tcp::Syn);
const ACK: L4 = L4::Tcp(Tcp::Ack);

/// The interface of a test: `lo`, the only one that every network namespace has.
const LO: u32 = 1;
/// "Arrived by some interface": the packet is not the node's own.
const FORWARDED: u32 = 7;

/// Who is who in one family.
#[derive(Clone, Copy, Debug)]
struct Cast<A> {
    client: A,
    vip: A,
    other_vip: A,
    backend: A,
    other_backend: A,
    node: A,
}

fn v4() -> Cast<Addr4> {
    let a = |text: &str| Addr4::from_ip(text.parse().unwrap()).unwrap();
    Cast {
        client: a("10.244.1.5"),
        vip: a("10.96.0.10"),
        other_vip: a("10.96.0.11"),
        backend: a("10.244.2.7"),
        other_backend: a("10.244.2.8"),
        node: a("192.168.56.1"),
    }
}

fn v6() -> Cast<Addr6> {
    let a = |text: &str| Addr6::from_ip(text.parse().unwrap()).unwrap();
    Cast {
        client: a("fd00:10:244:1::5"),
        vip: a("fd00:96::a"),
        other_vip: a("fd00:96::b"),
        backend: a("fd00:10:244:2::7"),
        other_backend: a("fd00:10:244:2::8"),
        node: a("fd00:56::1"),
    }
}

fn at<A: Address>(addr: A, port: u16) -> End {
    (addr.into(), port)
}

fn load() -> Programs {
    Programs::load(Constants::default()).unwrap()
}

/// Runs `test` for both families.
macro_rules! both_families {
    ($($(#[$doc:meta])* $name:ident => $generic:ident;)+) => {
        $(mod $name {
            $(#[$doc])*
            #[test]
            fn ipv4() {
                super::$generic(super::v4());
            }

            $(#[$doc])*
            #[test]
            fn ipv6() {
                super::$generic(super::v6());
            }
        })+
    };
}

both_families! {
    /// S59, S108: a request to a ClusterIP goes to its backend, the reply comes from the ClusterIP; S60 with one endpoint.
    there_and_back => check_there_and_back;
    /// A port that stays the same is not part of the store nor of the checksum.
    same_port => check_same_port;
    /// S130, S196 and "unknown mid-flow TCP passes": what is not ours leaves as it came.
    not_ours => check_not_ours;
    /// S122–S124: no endpoint anywhere is answered, TCP with a RST, UDP with a port-unreachable that quotes the client's packet.
    refused => check_refused;
    /// S58: endpoints exist but not here.
    dropped => check_dropped;
    /// S121: one source port towards two services with the same endpoint.
    collision => check_collision;
    /// S154: a SYN on a closed tuple chooses anew, one on a live tuple does not.
    reuse => check_reuse;
    /// S60: every endpoint with the same probability.
    uniform => check_uniform;
    /// S108, S110, S117, S121: masquerading and its reversal.
    masquerade => check_masquerade;
    /// S119: a connection that is over masquerades nothing that comes later with its tuple.
    masquerade_ends => check_masquerade_ends;
    /// S121: no free port is a counted refusal to serve, never a shared port.
    exhaustion => check_exhaustion;
    /// S75: the node's own packets at the egress hook.
    from_the_node => check_from_the_node;
    /// S153: the fragments of a packet go where its first one went, both ways.
    fragments => check_fragments;
    /// S193, S195: SCTP with one port number is served and its checksum left alone; a changed number is dropped.
    sctp => check_sctp;
    /// S152: errors about a translated packet name the tuple that their receiver knows, at each of the four entries.
    icmp_errors => check_icmp_errors;
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

/// An ICMP or ICMPv6 error about `quoted`, which begins with its IP header.
fn icmp_error(
    macs: [[u8; 6]; 2],
    src: IpAddr,
    dst: IpAddr,
    (v4, v6): (Icmpv4Type, Icmpv6Type),
    quoted: &[u8],
) -> Vec<u8> {
    let ip = headers(macs, src, dst);
    let mut bytes = Vec::new();
    if src.is_ipv4() {
        ip.icmpv4(v4).write(&mut bytes, quoted).unwrap();
    } else {
        ip.icmpv6(v6).write(&mut bytes, quoted).unwrap();
    }
    bytes
}

/// What refuses `quoted`, with the hardware addresses turned round.
fn port_unreachable(src: IpAddr, dst: IpAddr, quoted: &[u8]) -> Vec<u8> {
    let kinds = (
        Icmpv4Type::DestinationUnreachable(icmpv4::DestUnreachableHeader::Port),
        Icmpv6Type::DestinationUnreachable(icmpv6::DestUnreachableCode::Port),
    );
    icmp_error([DST_MAC, SRC_MAC], src, dst, kinds, quoted)
}

fn check_refused<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.add_service(1, c.vip, 80, Protocol::Tcp, &[]);
    programs.add_service(2, c.vip, 80, Protocol::Udp, &[]);
    let (client, vip) = (at(c.client, 40_000), at(c.vip, 80));
    let header = if A::FAMILY == 4 { 20 } else { 40 };
    for (l4, payload) in [
        (SYN, &b""[..]),
        (L4::Udp, b""),
        (L4::Udp, b"12345"),
        (L4::Udp, &[7; 600]),
        (SYN, &[7; 600]),
    ] {
        // Both hooks: a client behind the interface, and the node itself.
        for (program, ingress_ifindex) in [(TC_INGRESS, FORWARDED), (TC_EGRESS, 0)] {
            let request = packet(l4, client, vip, payload);
            let out = programs.run(program, &request, LO, ingress_ifindex);
            assert_eq!(out.verdict, REDIRECT);
            let expected = if l4 == SYN {
                let mut bytes = Vec::new();
                let (src, dst) = (DST_MAC, SRC_MAC);
                let ethernet = etherparse::PacketBuilder::ethernet2(src, dst);
                let ip = match (vip.0, client.0) {
                    (IpAddr::V4(src), IpAddr::V4(dst)) => ethernet.ipv4(src.octets(), dst.octets(), 64),
                    (IpAddr::V6(src), IpAddr::V6(dst)) => ethernet.ipv6(src.octets(), dst.octets(), 64),
                    _ => unreachable!(),
                };
                // It acknowledges the SYN, whose sequence number is 1,000.
                ip.tcp(vip.1, client.1, 0, 0)
                    .rst()
                    .ack(1_001)
                    .write(&mut bytes, payload)
                    .unwrap();
                bytes
            } else {
                port_unreachable(vip.0, client.0, &request[14..request.len().min(14 + header + 20)])
            };
            assert_same(&out.packet, &expected);
        }
    }
    assert_eq!(programs.count(Reason::NoEndpoints), 10);
    assert_eq!(programs.count(Reason::RefuseFailed), 0);
    assert!(
        programs.rewrites::<A>().is_empty(),
        "a refused client leaves nothing behind (S144)"
    );
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

/// Runs on a thread of its own, in a new network namespace in which `lo` forwards and leads to the pods.
fn in_namespace(test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                // SAFETY: affects this thread alone, which ends with the closure; the namespace goes with it.
                assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "a network namespace needs root");
                let commands = "ip link set lo up && ip route add 10.244.0.0/16 dev lo && ip route add 192.168.57.0/24 dev lo && \
                    ip -6 route add fd00:10:244::/48 dev lo && sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1";
                assert!(std::process::Command::new("sh").args(["-c", commands]).status().unwrap().success());
                test();
            })
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

/// Programs that masquerade what does not come from the pods' networks, with `lo` as the way to them.
fn load_masquerading(ports: (u32, u32)) -> Programs {
    let mut programs = Programs::load(Constants {
        pods4: Some(([10, 244, 0, 0], [255, 255, 0, 0])),
        pods6: Some((v6_prefix("fd00:10:244::"), v6_prefix("ffff:ffff:ffff::"))),
        ports,
        ..Constants::default()
    })
    .unwrap();
    programs.set_link(
        LO,
        Link {
            flags: 1,
            addr4: v4().node,
            addr6: v6().node,
            ..Link::default()
        },
    );
    programs
}

fn v6_prefix(text: &str) -> [u8; 16] {
    text.parse::<std::net::Ipv6Addr>().unwrap().octets()
}

fn outsider<A: Address>() -> A {
    ["192.0.2.9", "2001:db8::9"]
        .iter()
        .find_map(|ip| A::from_ip(ip.parse().unwrap()))
        .unwrap()
}

fn check_masquerade<A: Address>(c: Cast<A>) {
    in_namespace(|| {
        let mut programs = load_masquerading(Constants::default().ports);
        programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
        let (vip, backend) = (at(c.vip, 80), at(c.backend, 8080));
        // From outside (S108), and from the endpoint itself (S110).
        for client in [at(outsider::<A>(), 40_000), at(c.backend, 41_000)] {
            let out = programs.run(TC_INGRESS, &packet(SYN, client, vip, b""), LO, FORWARDED);
            assert_eq!(out.verdict, PASS);
            assert_same(&out.packet, &packet(SYN, client, backend, b""));
            let out = programs.run(TC_EGRESS, &out.packet, LO, FORWARDED);
            let node = ends(&out.packet).0;
            assert_eq!(node.0, c.node.into());
            assert_same(&out.packet, &packet(SYN, node, backend, b""));
            let reply = packet(L4::Tcp(Tcp::SynAck), backend, node, b"");
            let out = programs.run(TC_INGRESS, &reply, LO, FORWARDED);
            assert_same(&out.packet, &packet(L4::Tcp(Tcp::SynAck), backend, client, b""));
            let out = programs.run(TC_EGRESS, &out.packet, LO, FORWARDED);
            assert_same(&out.packet, &packet(L4::Tcp(Tcp::SynAck), vip, client, b""));
        }
        let mut kinds: Vec<_> = programs
            .rewrites::<A>()
            .into_iter()
            .map(|(_, value)| value.kind)
            .collect();
        kinds.sort_unstable();
        let each = [KIND_REQUEST, KIND_REPLY, KIND_MASQUERADE, KIND_UNMASQUERADE];
        assert_eq!(kinds, each.into_iter().flat_map(|kind| [kind; 2]).collect::<Vec<_>>());
        // A pod's source stays (S119).
        let before = programs.rewrites::<A>().len();
        programs.run(TC_INGRESS, &packet(SYN, at(c.client, 40_000), vip, b""), LO, FORWARDED);
        assert_eq!(programs.rewrites::<A>().len(), before + 2);
    });
}

fn check_masquerade_ends<A: Address>(c: Cast<A>) {
    in_namespace(|| {
        let mut programs = load_masquerading(Constants::default().ports);
        programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
        let (client, vip, backend) = (at(outsider::<A>(), 40_000), at(c.vip, 80), at(c.backend, 8080));
        let out = programs.run(TC_INGRESS, &packet(SYN, client, vip, b""), LO, FORWARDED);
        let out = programs.run(TC_EGRESS, &out.packet, LO, FORWARDED);
        assert_eq!(ends(&out.packet).0.0, c.node.into());
        programs.run(TC_INGRESS, &packet(L4::Tcp(Tcp::Rst), client, vip, b""), LO, FORWARDED);
        // The same client port dials the endpoint itself.
        let direct = packet(SYN, client, backend, b"");
        for hook in [TC_INGRESS, TC_EGRESS] {
            let out = programs.run(hook, &direct, LO, FORWARDED);
            assert_eq!(out.verdict, PASS);
            assert_same(&out.packet, &direct);
        }
    });
}

fn check_exhaustion<A: Address>(c: Cast<A>) {
    in_namespace(|| {
        // Two ports to change to: of many clients with one source port, few can be served and nobody shares.
        let mut programs = load_masquerading((61_000, 2));
        programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
        let mut ports = BTreeMap::new();
        let mut refused = 0;
        for host in 1..=20 {
            let mut client = [0; 16];
            client[..A::LEN].copy_from_slice(outsider::<A>().octets());
            client[A::LEN - 1] = host;
            let client: A = bytemuck::pod_read_unaligned(&client[..A::LEN]);
            let request = packet(SYN, at(client, 40_000), at(c.vip, 80), b"");
            let out = programs.run(TC_INGRESS, &request, LO, FORWARDED);
            if out.verdict == DROP {
                refused += 1;
                continue;
            }
            let port = ends(&programs.run(TC_EGRESS, &out.packet, LO, FORWARDED).packet).0.1;
            assert_eq!(ports.insert(port, host), None, "two connections share port {port}");
        }
        assert_eq!(ports.len(), 3, "the clients' own port and both spare ones");
        assert_eq!(programs.count(Reason::NoSourcePort), refused);
        assert_eq!(
            programs.rewrites::<A>().len(),
            3 * 4,
            "who is not served leaves nothing behind"
        );
    });
}

fn check_from_the_node<A: Address>(c: Cast<A>) {
    in_namespace(|| {
        let mut programs = load_masquerading(Constants::default().ports);
        programs.set_node_addr(c.node);
        programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
        programs.add_service(2, c.other_vip, 80, Protocol::Tcp, &[(c.node, 8080)]);
        let (client, vip, backend) = (at(c.node, 40_000), at(c.vip, 80), at(c.backend, 8080));

        // Forwarded packets were looked up where they came in.
        let forwarded = programs.run(TC_EGRESS, &packet(SYN, client, vip, b""), LO, FORWARDED);
        assert_eq!(
            (forwarded.verdict, forwarded.packet),
            (PASS, packet(SYN, client, vip, b""))
        );

        // To a pod: routed again; the reply is made to arrive by the interface the request left by.
        let out = programs.run(TC_EGRESS, &packet(SYN, client, vip, b""), LO, 0);
        assert_eq!(out.verdict, REDIRECT);
        assert_same(&out.packet, &packet(SYN, client, backend, b""));
        let out = programs.run(TC_INGRESS, &packet(ACK, backend, client, b""), LO, FORWARDED);
        assert_eq!(out.verdict, PASS, "it is there already");
        assert_same(&out.packet, &packet(ACK, vip, client, b""));

        // To an endpoint on the node's own network, which sees the frontend's address as its client.
        let vip = at(c.other_vip, 80);
        let out = programs.run(TC_EGRESS, &packet(SYN, client, vip, b""), LO, 0);
        assert_eq!(out.verdict, REDIRECT);
        assert_same(&out.packet, &packet(SYN, (vip.0, client.1), at(c.node, 8080), b""));
        let reply = packet(ACK, at(c.node, 8080), (vip.0, client.1), b"");
        let out = programs.run(TC_EGRESS, &reply, LO, 0);
        assert_eq!(out.verdict, REDIRECT);
        assert_same(&out.packet, &packet(ACK, vip, client, b""));
    });
}

/// A UDP packet of 1,608 bytes cut in two, as its sender does it.
fn fragments_of<A: Address>(src: End, dst: End) -> [Vec<u8>; 2] {
    use etherparse::{IpFragOffset, IpNumber, Ipv4Header, Ipv6Extensions, Ipv6FragmentHeader, Ipv6Header};
    let whole = packet(L4::Udp, src, dst, &[7; 1_600]);
    let (cut, header) = (1_400, if A::FAMILY == 4 { 20 } else { 40 });
    let udp = &whole[14 + header..];
    [(0, &udp[..cut], true), (cut, &udp[cut..], false)].map(|(offset, part, more)| {
        let offset = IpFragOffset::try_new((offset / 8) as u16).unwrap();
        let mut bytes = whole[..14].to_vec();
        match (src.0, dst.0) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let mut ip = Ipv4Header::new(part.len() as u16, 64, IpNumber::UDP, src.octets(), dst.octets()).unwrap();
                (ip.identification, ip.more_fragments, ip.fragment_offset) = (0x1234, more, offset);
                ip.dont_fragment = false;
                ip.header_checksum = ip.calc_header_checksum();
                ip.write(&mut bytes).unwrap();
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let ip = Ipv6Header {
                    payload_length: part.len() as u16 + 8,
                    next_header: IpNumber::IPV6_FRAGMENTATION_HEADER,
                    hop_limit: 64,
                    source: src.octets(),
                    destination: dst.octets(),
                    ..Ipv6Header::default()
                };
                ip.write(&mut bytes).unwrap();
                let fragment = Ipv6FragmentHeader::new(IpNumber::UDP, offset, more, 0x1234_5678);
                let extensions = Ipv6Extensions {
                    fragment: Some(fragment),
                    ..Ipv6Extensions::default()
                };
                extensions
                    .write(&mut bytes, IpNumber::IPV6_FRAGMENTATION_HEADER)
                    .unwrap();
            }
            _ => unreachable!(),
        }
        bytes.extend_from_slice(part);
        bytes
    })
}

fn check_fragments<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.add_service(1, c.vip, 53, Protocol::Udp, &[(c.backend, 5353)]);
    let (client, vip, backend) = (at(c.client, 40_000), at(c.vip, 53), at(c.backend, 5353));
    // A fragment that comes before the first one is not recognised, and nothing happens to it.
    let [_, later] = fragments_of::<A>(client, vip);
    assert_same(&programs.run(TC_INGRESS, &later, LO, FORWARDED).packet, &later);
    for (program, from, to) in [
        (TC_INGRESS, (client, vip), (client, backend)),
        (TC_EGRESS, (backend, client), (vip, client)),
    ] {
        let sent = fragments_of::<A>(from.0, from.1);
        let expected = fragments_of::<A>(to.0, to.1);
        for (sent, expected) in sent.iter().zip(&expected) {
            let out = programs.run(program, sent, LO, FORWARDED);
            assert_eq!(out.verdict, PASS);
            assert_same(&out.packet, expected);
        }
    }
}

/// An SCTP packet: ports, then bytes that stand for tag, CRC32c and chunks; no rewrite may change them.
fn sctp_packet(src: End, dst: End) -> Vec<u8> {
    let mut sctp = [src.1.to_be_bytes(), dst.1.to_be_bytes()].concat();
    sctp.extend_from_slice(&[0xab; 24]);
    let mut bytes = Vec::new();
    headers([SRC_MAC, DST_MAC], src.0, dst.0)
        .write(&mut bytes, etherparse::IpNumber::SCTP, &sctp)
        .unwrap();
    bytes
}

fn check_sctp<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.add_service(1, c.vip, 80, Protocol::Sctp, &[(c.backend, 80)]);
    programs.add_service(2, c.other_vip, 80, Protocol::Sctp, &[(c.backend, 8080)]);
    let (client, vip, backend) = (at(c.client, 40_000), at(c.vip, 80), at(c.backend, 80));
    let out = programs.run(TC_INGRESS, &sctp_packet(client, vip), LO, FORWARDED);
    assert_eq!(out.verdict, PASS);
    assert_same(&out.packet, &sctp_packet(client, backend));
    let out = programs.run(TC_EGRESS, &sctp_packet(backend, client), LO, FORWARDED);
    assert_same(&out.packet, &sctp_packet(vip, client));
    let out = programs.run(TC_INGRESS, &sctp_packet(client, at(c.other_vip, 80)), LO, FORWARDED);
    assert_eq!(out.verdict, DROP);
    assert_eq!(programs.count(Reason::RewriteFailed), 1);
}

/// "Too big" from `router` to `to`, quoting the beginning of a packet.
fn too_big(router: IpAddr, to: IpAddr, quoted: &[u8]) -> Vec<u8> {
    let needed = icmpv4::DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: 1_300 };
    let kinds = (
        Icmpv4Type::DestinationUnreachable(needed),
        Icmpv6Type::PacketTooBig { mtu: 1_300 },
    );
    icmp_error([SRC_MAC, DST_MAC], router, to, kinds, quoted)
}

fn check_icmp_errors<A: Address>(c: Cast<A>) {
    in_namespace(|| {
        let mut programs = load_masquerading(Constants::default().ports);
        programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
        let (client, vip, backend) = (at(outsider::<A>(), 40_000), at(c.vip, 80), at(c.backend, 8080));
        let request = programs
            .run(TC_INGRESS, &packet(SYN, client, vip, b""), LO, FORWARDED)
            .packet;
        let node = ends(&programs.run(TC_EGRESS, &request, LO, FORWARDED).packet).0;
        let router: IpAddr = c.other_backend.into();
        let header = if A::FAMILY == 4 { 20 } else { 40 };
        // The quoted L4 checksum stays as it is: only ports and sequence number are certain to be there, and nobody verifies it.
        let quote = |src: End, dst: End, seen: (End, End)| {
            let mut bytes = packet(ACK, src, dst, b"")[14..].to_vec();
            let original = packet(ACK, seen.0, seen.1, b"");
            bytes[header + 16..header + 18].copy_from_slice(&original[14 + header + 16..14 + header + 18]);
            bytes
        };
        let plain = |src, dst| quote(src, dst, (src, dst));

        // About a request, on its way back: at the endpoint's interface, then at the client's.
        let sent = (node, backend);
        let error = too_big(router, node.0, &plain(node, backend));
        let out = programs.run(TC_INGRESS, &error, LO, FORWARDED).packet;
        assert_same(&out, &too_big(router, client.0, &quote(client, backend, sent)));
        let out = programs.run(TC_EGRESS, &out, LO, FORWARDED).packet;
        assert_same(&out, &too_big(router, client.0, &quote(client, vip, sent)));

        // About a reply: at the client's interface, then at the endpoint's.
        let sent = (vip, client);
        let error = too_big(router, vip.0, &plain(vip, client));
        let out = programs.run(TC_INGRESS, &error, LO, FORWARDED).packet;
        assert_same(&out, &too_big(router, backend.0, &quote(backend, client, sent)));
        let out = programs.run(TC_EGRESS, &out, LO, FORWARDED).packet;
        assert_same(&out, &too_big(router, backend.0, &quote(backend, node, sent)));

        // From the endpoint itself: the client knows only the frontend.
        let error = too_big(backend.0, client.0, &plain(client, backend));
        let out = programs.run(TC_EGRESS, &error, LO, FORWARDED).packet;
        assert_same(&out, &too_big(vip.0, client.0, &quote(client, vip, (client, backend))));

        // About somebody else's packet: untouched.
        let error = too_big(router, client.0, &plain(client, at(c.other_backend, 1)));
        assert_same(&programs.run(TC_EGRESS, &error, LO, FORWARDED).packet, &error);
    });
}

/// The verifier takes every program; what it counted is printed, because it grows unnoticed (the limit is a million).
#[test]
fn verifier_accepts_every_program() {
    // The handle itself: what the macros print, the test runner keeps for failures.
    let mut out = std::io::stderr().lock();
    writeln!(out).unwrap();
    for (name, info) in load().infos().unwrap() {
        let verified = info.verified_instruction_count().unwrap_or_default();
        let size = info.size_jitted();
        writeln!(
            out,
            "{name:14} {verified:7} instructions verified, {size:6} bytes of machine code"
        )
        .unwrap();
        assert!(
            verified < 500_000,
            "{name} is close to the verifier's limit: {verified}"
        );
    }
}

/// A log level of "off" is not a test at run time: the verifier removes the statements.
#[test]
fn logging_that_is_off_is_pruned() {
    let size = |log_level| {
        let programs = Programs::load(Constants {
            log_level,
            ..Constants::default()
        })
        .unwrap();
        let infos = programs.infos().unwrap();
        let (_, ingress) = infos.iter().find(|(name, _)| name == TC_INGRESS).unwrap();
        ingress.size_jitted()
    };
    let (off, debug) = (size(0), size(4));
    assert!(
        off + 1_000 < debug,
        "{off} bytes of machine code with logging off, {debug} with it on"
    );
}

/// IPv4 options move the L4 header.
#[test]
fn ipv4_options_are_skipped() {
    let c = v4();
    let mut programs = load();
    programs.add_service(1, c.vip, 80, Protocol::Tcp, &[(c.backend, 8080)]);
    let with_options = |dst: Addr4, port: u16| {
        let (IpAddr::V4(src), IpAddr::V4(dst)) = (c.client.into(), dst.into()) else {
            unreachable!()
        };
        let mut ip = etherparse::Ipv4Header::new(0, 64, etherparse::IpNumber::TCP, src.octets(), dst.octets()).unwrap();
        ip.options = [1u8; 8].into();
        let mut bytes = Vec::new();
        etherparse::PacketBuilder::ethernet2(SRC_MAC, DST_MAC)
            .ip(etherparse::IpHeaders::Ipv4(ip, etherparse::Ipv4Extensions::default()))
            .tcp(40_000, port, 1_000, 4_096)
            .syn()
            .write(&mut bytes, b"payload")
            .unwrap();
        bytes
    };
    let out = programs.run(TC_INGRESS, &with_options(c.vip, 80), LO, FORWARDED);
    assert_same(&out.packet, &with_options(c.backend, 8080));
}

/// RFC 768: a UDP checksum of zero means "none", and stays.
#[test]
fn udp_without_checksum_stays_without() {
    let c = v4();
    let mut programs = load();
    programs.add_service(1, c.vip, 53, Protocol::Udp, &[(c.backend, 5353)]);
    let without = |dst| {
        let mut bytes = packet(L4::Udp, at(c.client, 40_000), dst, b"query");
        bytes[40..42].fill(0);
        bytes
    };
    let out = programs.run(TC_INGRESS, &without(at(c.vip, 53)), LO, FORWARDED);
    assert_same(&out.packet, &without(at(c.backend, 5353)));
}
