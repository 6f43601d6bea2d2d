//! SCTP: served as UDP is, without a handshake of its own, but its checksum is a CRC32c of the whole packet (S193, S195). Every
//! packet that is expected has one computed over all its bytes.

use proxy_common::addr::{Address, Port, Protocol};
use proxy_common::frontend::{FRONTEND_HAS_ENDPOINTS, Frontend, FrontendKey, Range};
use proxy_common::names::{TC_EGRESS, TC_INGRESS};
use proxy_common::reason::Reason;
use proxy_tests::programs::{Constants, DROP, PASS, REDIRECT};
use proxy_tests::wire::{End, assert_same, crc32c, ends, sctp};

use crate::errors::{port_unreachable, too_big};
use crate::unusual::cut;
use crate::{Cast, FORWARDED, LO, at, in_namespace, load, load_masquerading, outsider};

both_families! {
    /// S193, S195: SCTP with one port number is served and its checksum left alone.
    same_port => check_sctp;
    /// S193, S195: the endpoint has another port number; every length of packet has a correct checksum both ways.
    other_port => check_other_port;
    /// S195: a checksum that the device is to compute stays zero.
    zero => check_zero;
    /// S195: the length is that of the IP header, not of the frame.
    padded => check_padded;
    /// S121, S195: one source port towards two services with the same endpoint.
    collision => check_collision;
    /// S76, S108, S121, S195: clients with one source port are masqueraded, to a ClusterIP and to an external address.
    masquerade => check_masquerade;
    /// S195: a first fragment whose checksum cannot be known is dropped; without a change of ports all are served.
    fragments => check_fragments;
    /// S122: port unreachable.
    refused => check_refused;
    /// S152: an error that quotes eight bytes of SCTP.
    quoted => check_quoted;
}

/// An INIT chunk (RFC 9260 §3.3.2): tag, window, streams, TSN.
const INIT: &[u8] = &[1, 0, 0, 20, 1, 2, 3, 4, 0, 1, 0, 0, 0, 10, 0, 10, 5, 6, 7, 8];
/// An INIT ACK, which would carry a cookie.
const INIT_ACK: &[u8] = &[2, 0, 0, 20, 8, 7, 6, 5, 0, 1, 0, 0, 0, 10, 0, 10, 4, 3, 2, 1];
const SCTP: u8 = 132;

#[test]
fn reference_gives_the_published_value() {
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
}

/// Bytes of the headers before SCTP.
fn before_sctp<A: Address>() -> usize {
    14 + if A::FAMILY == 4 { 20 } else { 40 }
}

fn check_sctp<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.add_service(1, c.vip, 80, Protocol::Sctp, &[(c.backend, 80)]);
    let (client, vip, backend) = (at(c.client, 40_000), at(c.vip, 80), at(c.backend, 80));
    let out = programs.run(TC_INGRESS, &sctp(client, vip, INIT), LO, FORWARDED);
    assert_eq!(out.verdict, PASS);
    assert_same(&out.packet, &sctp(client, backend, INIT));
    let out = programs.run(TC_EGRESS, &sctp(backend, client, INIT_ACK), LO, FORWARDED);
    assert_same(&out.packet, &sctp(vip, client, INIT_ACK));
}

fn check_other_port<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.add_service(1, c.vip, 80, Protocol::Sctp, &[(c.backend, 8080)]);
    let (client, vip, backend) = (at(c.client, 40_000), at(c.vip, 80), at(c.backend, 8080));
    let lengths = (0..40).chain([243, 244, 245, 1_000, 1_439]);
    let data: Vec<Vec<u8>> = lengths.map(|len| (0..len).map(|i| (i * 7) as u8).collect()).collect();
    for chunks in [INIT, INIT_ACK].into_iter().chain(data.iter().map(Vec::as_slice)) {
        let out = programs.run(TC_INGRESS, &sctp(client, vip, chunks), LO, FORWARDED);
        assert_eq!(out.verdict, PASS);
        assert_same(&out.packet, &sctp(client, backend, chunks));
        let out = programs.run(TC_EGRESS, &sctp(backend, client, chunks), LO, FORWARDED);
        assert_eq!(out.verdict, PASS);
        assert_same(&out.packet, &sctp(vip, client, chunks));
    }
    assert_eq!(programs.count(Reason::RewriteFailed), 0);
    // Shorter than the common header: whatever it is, it has no checksum to make right.
    let mut short = sctp(client, vip, b"");
    if A::FAMILY == 4 {
        short[16..18].copy_from_slice(&31u16.to_be_bytes());
    } else {
        short[18..20].copy_from_slice(&11u16.to_be_bytes());
    }
    assert_eq!(programs.run(TC_INGRESS, &short, LO, FORWARDED).verdict, DROP);
    assert_eq!(programs.count(Reason::RewriteFailed), 1);
}

fn check_zero<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.add_service(1, c.vip, 80, Protocol::Sctp, &[(c.backend, 8080)]);
    let (client, vip, backend) = (at(c.client, 40_000), at(c.vip, 80), at(c.backend, 8080));
    let unfinished = |src: End, dst: End| {
        let mut bytes = sctp(src, dst, INIT);
        let field = before_sctp::<A>() + 8;
        bytes[field..field + 4].fill(0);
        bytes
    };
    let out = programs.run(TC_INGRESS, &unfinished(client, vip), LO, FORWARDED);
    assert_eq!(out.verdict, PASS);
    assert_same(&out.packet, &unfinished(client, backend));
    let out = programs.run(TC_EGRESS, &unfinished(backend, client), LO, FORWARDED);
    assert_same(&out.packet, &unfinished(vip, client));
}

fn check_padded<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.add_service(1, c.vip, 80, Protocol::Sctp, &[(c.backend, 8080)]);
    let (client, vip, backend) = (at(c.client, 40_000), at(c.vip, 80), at(c.backend, 8080));
    let padded = |dst: End| [sctp(client, dst, b"abc"), vec![0; 13]].concat();
    let out = programs.run(TC_INGRESS, &padded(vip), LO, FORWARDED);
    assert_eq!(out.verdict, PASS);
    assert_same(&out.packet, &padded(backend));

    // What stands between the IP header and SCTP does not count.
    let extended = |dst: End| {
        let mut bytes = sctp(client, dst, INIT);
        let l4 = before_sctp::<A>();
        if A::FAMILY == 4 {
            // Four bytes of "no operation": header length, total length, header checksum.
            bytes.splice(l4..l4, [1; 4]);
            bytes[14] += 1;
            bytes[17] += 4;
            bytes[24..26].fill(0);
            let words = bytes[14..l4 + 4]
                .chunks(2)
                .map(|w| u32::from(w[0]) << 8 | u32::from(w[1]));
            let sum: u32 = words.sum();
            let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
            bytes[24..26].copy_from_slice(&sum.to_be_bytes());
        } else {
            // Destination options, padding only.
            bytes.splice(l4..l4, [SCTP, 0, 1, 4, 0, 0, 0, 0]);
            bytes[19] += 8;
            bytes[20] = 60;
        }
        bytes
    };
    let out = programs.run(TC_INGRESS, &extended(vip), LO, FORWARDED);
    assert_eq!(out.verdict, PASS);
    assert_same(&out.packet, &extended(backend));
}

fn check_collision<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.add_service(1, c.vip, 80, Protocol::Sctp, &[(c.backend, 80)]);
    programs.add_service(2, c.other_vip, 80, Protocol::Sctp, &[(c.backend, 80)]);
    let (client, backend) = (at(c.client, 40_000), at(c.backend, 80));
    let mut sources = Vec::new();
    for vip in [c.vip, c.other_vip] {
        let out = programs.run(TC_INGRESS, &sctp(client, at(vip, 80), INIT), LO, FORWARDED);
        assert_eq!(out.verdict, PASS);
        let (src, dst) = ends(&out.packet);
        assert_eq!((src.0, dst), (client.0, backend), "the client's address stays");
        assert_same(&out.packet, &sctp(src, backend, INIT));
        sources.push((vip, src.1));
    }
    assert_eq!(sources[0].1, client.1, "the first connection keeps its port");
    assert_ne!(sources[0].1, sources[1].1, "the second gets another one");
    for (vip, port) in sources {
        let reply = sctp(backend, (client.0, port), INIT_ACK);
        let out = programs.run(TC_EGRESS, &reply, LO, FORWARDED);
        assert_same(&out.packet, &sctp(at(vip, 80), client, INIT_ACK));
    }
}

fn check_masquerade<A: Address>(c: Cast<A>) {
    in_namespace(|| {
        let mut programs = load_masquerading(Constants::default().ports);
        programs.add_service(1, c.vip, 80, Protocol::Sctp, &[(c.backend, 8080)]);
        // An external address of the service, with a port of its own.
        let cluster = Range {
            first: 0,
            count: 1,
            keep: 0,
        };
        let external = Frontend {
            service: 1,
            flags: FRONTEND_HAS_ENDPOINTS,
            cluster,
            ..Frontend::default()
        };
        let key = FrontendKey::new(c.other_vip, Port::new(8_000), SCTP);
        programs.set_frontend(key, external);
        let backend = at(c.backend, 8080);
        let mut ports = Vec::new();
        // The endpoint itself is a client too (S110).
        for client in [outsider::<A>(), c.backend] {
            let client = at(client, 40_000);
            for dialled in [at(c.vip, 80), at(c.other_vip, 8_000)] {
                let out = programs.run(TC_INGRESS, &sctp(client, dialled, INIT), LO, FORWARDED);
                assert_eq!(out.verdict, PASS);
                let between = ends(&out.packet).0;
                assert_same(&out.packet, &sctp(between, backend, INIT));
                let out = programs.run(TC_EGRESS, &out.packet, LO, FORWARDED);
                let node = ends(&out.packet).0;
                assert_eq!(node.0, c.node.into());
                assert_same(&out.packet, &sctp(node, backend, INIT));
                let reply = sctp(backend, node, INIT_ACK);
                let out = programs.run(TC_INGRESS, &reply, LO, FORWARDED);
                assert_same(&out.packet, &sctp(backend, between, INIT_ACK));
                let out = programs.run(TC_EGRESS, &out.packet, LO, FORWARDED);
                assert_same(&out.packet, &sctp(dialled, client, INIT_ACK));
                ports.push(node.1);
            }
        }
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), 4, "every association has a port of its own");
    });
}

fn check_fragments<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.add_service(1, c.vip, 80, Protocol::Sctp, &[(c.backend, 80)]);
    programs.add_service(2, c.other_vip, 80, Protocol::Sctp, &[(c.backend, 8080)]);
    let (client, vip, backend) = (at(c.client, 40_000), at(c.vip, 80), at(c.backend, 80));
    let fragments = |dst: End| cut(&sctp(client, dst, &[7; 1_600]));
    for (sent, expected) in fragments(vip).iter().zip(&fragments(backend)) {
        let out = programs.run(TC_INGRESS, sent, LO, FORWARDED);
        assert_eq!(out.verdict, PASS);
        assert_same(&out.packet, expected);
    }
    assert_eq!(programs.count(Reason::RewriteFailed), 0);
    let [first, _] = fragments(at(c.other_vip, 80));
    assert_eq!(programs.run(TC_INGRESS, &first, LO, FORWARDED).verdict, DROP);
    assert_eq!(programs.count(Reason::RewriteFailed), 1);
}

fn check_refused<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.add_service(1, c.vip, 80, Protocol::Sctp, &[]);
    let (client, vip) = (at(c.client, 40_000), at(c.vip, 80));
    for (program, ingress_ifindex) in [(TC_INGRESS, FORWARDED), (TC_EGRESS, 0)] {
        let request = sctp(client, vip, INIT);
        let out = programs.run(program, &request, LO, ingress_ifindex);
        assert_eq!(out.verdict, REDIRECT);
        let quoted = &request[14..before_sctp::<A>() + 20];
        assert_same(&out.packet, &port_unreachable(vip.0, client.0, quoted));
    }
    assert_eq!(programs.count(Reason::NoEndpoints), 2);
}

fn check_quoted<A: Address>(c: Cast<A>) {
    let mut programs = load();
    programs.add_service(1, c.vip, 80, Protocol::Sctp, &[(c.backend, 8080)]);
    let (client, vip, backend) = (at(c.client, 40_000), at(c.vip, 80), at(c.backend, 8080));
    programs.run(TC_INGRESS, &sctp(client, vip, INIT), LO, FORWARDED);
    let router = c.other_backend.into();
    // Ports and tag; with the whole common header the sum stays as its sender saw it, for nobody can verify it.
    for l4 in [8, 12] {
        let end = before_sctp::<A>() + l4;
        let seen = sctp(client, backend, INIT);
        let mut known = sctp(client, vip, INIT);
        let field = before_sctp::<A>() + 8;
        known[field..field + 4].copy_from_slice(&seen[field..field + 4]);
        let error = too_big(router, client.0, &seen[14..end]);
        let out = programs.run(TC_EGRESS, &error, LO, FORWARDED);
        assert_same(&out.packet, &too_big(router, client.0, &known[14..end]));
    }
}
