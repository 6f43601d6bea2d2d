//! ICMP and ICMPv6 errors: those that refuse a client, and those of others about translated packets.

use std::net::IpAddr;

use etherparse::{Icmpv4Type, Icmpv6Type, icmpv4, icmpv6};
use proxy_common::addr::{Address, Protocol};
use proxy_common::names::{TC_EGRESS, TC_INGRESS};
use proxy_common::reason::Reason;
use proxy_tests::programs::{Constants, REDIRECT};
use proxy_tests::wire::{DST_MAC, End, L4, SRC_MAC, assert_same, ends, headers, packet};

use crate::{ACK, Cast, FORWARDED, LO, SYN, at, in_namespace, load, load_masquerading, outsider};

both_families! {
    /// S122–S124: no endpoint anywhere is answered, TCP with a RST, UDP with a port-unreachable that quotes the client's packet.
    refused => check_refused;
    /// S152: errors about a translated packet name the tuple that their receiver knows, at each of the four entries.
    icmp_errors => check_icmp_errors;
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
pub(crate) fn port_unreachable(src: IpAddr, dst: IpAddr, quoted: &[u8]) -> Vec<u8> {
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

/// "Too big" from `router` to `to`, quoting the beginning of a packet.
pub(crate) fn too_big(router: IpAddr, to: IpAddr, quoted: &[u8]) -> Vec<u8> {
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
