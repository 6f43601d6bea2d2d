//! The builder against packets whose bytes are known from elsewhere, and against its own reader.

use super::*;

fn from_hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

/// The IPv4 header that the literature uses to explain the header checksum, 0xb861.
#[test]
fn ipv4_header_checksum_of_the_textbook_example() {
    let built = Packet::raw("192.168.0.1", "192.168.0.199", 17)
        .no_ethernet()
        .payload(&[0; 95])
        .build();
    assert_eq!(built[..20], from_hex("45000073 00004000 4011b861 c0a80001 c0a800c7"));
}

/// Addresses 0x0a00+0x0001+0x0a00+0x0002, protocol 6, length 0x14, ports 0x01+0x50, sequence 1, offset and SYN 0x5002, window
/// 0xfaf0 sum to 0x15f61; with the carry 0x5f62, complement 0xa09d.
#[test]
fn tcp_checksum_computed_by_hand() {
    let built = Packet::tcp("10.0.0.1:1", "10.0.0.2:80").no_ethernet().build();
    assert_eq!(built[32..36], [0x50, 0x02, 0xfa, 0xf0]);
    assert_eq!(built[36..38], [0xa0, 0x9d]);
}

/// RFC 1071 arithmetic done by hand: 0x0a00+0x0001+0x0a00+0x0002 (addresses) + 0x0011+0x000a (protocol, length)
/// + 0x0035+0x0035+0x000a+0x6869 ("hi") = 0x7cfb, complement 0x8304.
#[test]
fn udp_checksum_computed_by_hand() {
    let built = Packet::udp("10.0.0.1:53", "10.0.0.2:53")
        .payload(b"hi")
        .no_ethernet()
        .build();
    assert_eq!(built[26..28], [0x83, 0x04]);
}

/// The same over IPv6: fd00::1, fd00::2 sum to 0x1fa03 -> with 17, 10, ports, length, "hi" 0x1fa03+0x68f8 = 0x262fb -> 0x62fd,
/// complement 0x9d02.
#[test]
fn udp_over_ipv6_checksum_computed_by_hand() {
    let built = Packet::udp("[fd00::1]:53", "[fd00::2]:53")
        .payload(b"hi")
        .no_ethernet()
        .build();
    assert_eq!(built[..8], from_hex("60000000 000a1140"));
    assert_eq!(built[46..48], [0x9d, 0x02]);
}

/// CRC32c of "123456789" is 0xe3069283 in every catalogue of checksums.
#[test]
fn sctp_uses_crc32c() {
    assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
    let built = Packet::sctp("10.0.0.1:1", "10.0.0.2:2").payload(&[1; 8]).build();
    assert!(
        describe(&built).contains("sctp 1 > 2 tag 0x12345678 checksum ok"),
        "{}",
        describe(&built)
    );
}

#[test]
fn every_shape_is_read_back_intact() {
    let quoted = Packet::udp("10.244.1.2:4000", "10.96.0.10:53")
        .payload(b"x")
        .no_ethernet()
        .build();
    let quoted6 = Packet::tcp("[fd00::1]:4000", "[fd00:96::a]:80").no_ethernet().build();
    let error = [0; 4];
    let shapes = [
        Packet::tcp("10.244.1.2:40000", "10.96.0.10:80")
            .ip_options(&[1, 1, 1, 0])
            .payload(b"odd"),
        Packet::tcp("[fd00::1]:40000", "[fd00::2]:80").extension(extension::HOP_BY_HOP, &[1, 4, 0, 0, 0, 0]),
        Packet::udp("[fd00::1]:1", "[fd00::2]:2")
            .extension(extension::DESTINATION, &[0; 14])
            .payload(b"hello"),
        Packet::icmp("10.0.0.1", "10.0.0.2", icmp::UNREACHABLE, icmp::PORT_UNREACHABLE, error).payload(&quoted),
        Packet::icmp(
            "fd00::1",
            "fd00::2",
            icmp::V6_UNREACHABLE,
            icmp::V6_PORT_UNREACHABLE,
            error,
        )
        .payload(&quoted6),
        Packet::udp("10.0.0.1:1", "10.0.0.2:2")
            .tos(0xb8)
            .id(7)
            .dont_fragment(false),
    ];
    for packet in shapes {
        let text = describe(&packet.build());
        assert!(
            !text.contains("BAD") && text.contains("checksum ok"),
            "{packet:?}\n{text}"
        );
    }
}

#[test]
fn a_broken_checksum_is_seen() {
    let built = Packet::tcp("10.0.0.1:1", "10.0.0.2:2").l4_checksum(0xdead).build();
    assert!(describe(&built).contains("BAD (0xdead"), "{}", describe(&built));
}

#[test]
fn fragments_carry_the_whole_datagram() {
    for (src, dst, headers) in [
        ("10.0.0.1:1", "10.0.0.2:2", 14 + 20),
        ("[fd00::1]:1", "[fd00::2]:2", 14 + 40 + 8),
    ] {
        let packet = Packet::udp(src, dst).payload(&[7; 100]).id(9);
        let fragments = packet.fragments(50);
        assert_eq!(fragments.len(), 3);
        let joined: Vec<u8> = fragments.iter().flat_map(|f| f[headers..].to_vec()).collect();
        assert_eq!(joined, packet.l4_bytes());
        assert!(
            describe(&fragments[2]).contains("fragment of 12 bytes"),
            "{}",
            describe(&fragments[2])
        );
    }
}

#[test]
fn the_way_back_is_the_way_there_reversed() {
    let there = Packet::udp("10.0.0.1:1", "10.0.0.2:2").payload(b"x");
    let back = Packet::udp("10.0.0.2:2", "10.0.0.1:1")
        .payload(b"x")
        .macs(RECEIVER_MAC, SENDER_MAC);
    assert_packet_eq(&there.reversed().build(), &back.build());
}

#[test]
#[should_panic(expected = "packets differ, first at byte 33")]
fn a_difference_is_named() {
    let one = Packet::udp("10.0.0.1:1", "10.0.0.2:2").build();
    let mut other = one.clone();
    other[33] = 3;
    assert_packet_eq(&one, &other);
}
