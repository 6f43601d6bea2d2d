//! Packets with unusual headers: fragments, IPv4 options, UDP without a checksum.

use std::net::IpAddr;

use proxy_common::addr::{Addr4, Address, Protocol};
use proxy_common::names::{TC_EGRESS, TC_INGRESS};
use proxy_tests::programs::PASS;
use proxy_tests::wire::{DST_MAC, End, L4, SRC_MAC, assert_same, ends, packet};

use crate::{Cast, FORWARDED, LO, at, load, v4};

both_families! {
    /// S153: the fragments of a packet go where its first one went, both ways.
    fragments => check_fragments;
}

/// A UDP packet of 1,608 bytes cut in two, as its sender does it.
fn fragments_of(src: End, dst: End) -> [Vec<u8>; 2] {
    cut(&packet(L4::Udp, src, dst, &[7; 1_600]))
}

/// A packet of more than 1,400 bytes without IP options cut in two.
pub(crate) fn cut(whole: &[u8]) -> [Vec<u8>; 2] {
    use etherparse::{IpFragOffset, IpNumber, Ipv4Header, Ipv6Extensions, Ipv6FragmentHeader, Ipv6Header};
    let (src, dst) = ends(whole);
    let (cut, header, protocol) = match src.0 {
        IpAddr::V4(_) => (1_400, 20, IpNumber(whole[23])),
        IpAddr::V6(_) => (1_400, 40, IpNumber(whole[20])),
    };
    let l4 = &whole[14 + header..];
    [(0, &l4[..cut], true), (cut, &l4[cut..], false)].map(|(offset, part, more)| {
        let offset = IpFragOffset::try_new((offset / 8) as u16).unwrap();
        let mut bytes = whole[..14].to_vec();
        match (src.0, dst.0) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let mut ip = Ipv4Header::new(part.len() as u16, 64, protocol, src.octets(), dst.octets()).unwrap();
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
                let fragment = Ipv6FragmentHeader::new(protocol, offset, more, 0x1234_5678);
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
    let [_, later] = fragments_of(client, vip);
    assert_same(&programs.run(TC_INGRESS, &later, LO, FORWARDED).packet, &later);
    for (program, from, to) in [
        (TC_INGRESS, (client, vip), (client, backend)),
        (TC_EGRESS, (backend, client), (vip, client)),
    ] {
        let sent = fragments_of(from.0, from.1);
        let expected = fragments_of(to.0, to.1);
        for (sent, expected) in sent.iter().zip(&expected) {
            let out = programs.run(program, sent, LO, FORWARDED);
            assert_eq!(out.verdict, PASS);
            assert_same(&out.packet, expected);
        }
    }
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
