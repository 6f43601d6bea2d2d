//! SCTP: like UDP, but for its checksum.

use proxy_common::addr::{Address, Protocol};
use proxy_common::names::{TC_EGRESS, TC_INGRESS};
use proxy_common::reason::Reason;
use proxy_tests::programs::{DROP, PASS};
use proxy_tests::wire::{DST_MAC, End, SRC_MAC, assert_same, headers};

use crate::{Cast, FORWARDED, LO, at, load};

both_families! {
    /// S193, S195: SCTP with one port number is served and its checksum left alone; a changed number is dropped.
    sctp => check_sctp;
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
