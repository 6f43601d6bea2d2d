//! Packets as bytes, built and taken apart by a library that shares no code with the programs: the expected side of byte-exact
//! tests.

use std::net::IpAddr;

use etherparse::{
    IpHeaders, IpNumber, Ipv4Header, NetSlice, PacketBuilder, PacketBuilderStep, SlicedPacket, TransportSlice,
};

/// Hardware addresses of every built packet.
pub const SRC_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// See [`SRC_MAC`].
pub const DST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// TCP flags of a built packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tcp {
    /// First packet of a handshake.
    Syn,
    /// Its answer.
    SynAck,
    /// Anything in the middle.
    Ack,
    /// A sender's last packet.
    FinAck,
    /// A reset.
    Rst,
}

/// Protocol and flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L4 {
    /// TCP.
    Tcp(Tcp),
    /// UDP.
    Udp,
}

/// Address and port.
pub type End = (IpAddr, u16);

/// The beginning of a packet: Ethernet and IP header of the addresses' family.
pub fn headers(macs: [[u8; 6]; 2], src: IpAddr, dst: IpAddr) -> PacketBuilderStep<IpHeaders> {
    let ethernet = PacketBuilder::ethernet2(macs[0], macs[1]);
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => ethernet.ipv4(src.octets(), dst.octets(), 64),
        (IpAddr::V6(src), IpAddr::V6(dst)) => ethernet.ipv6(src.octets(), dst.octets(), 64),
        _ => panic!("{src} and {dst} are of different families"),
    }
}

/// An Ethernet packet with correct checksums.
pub fn packet(l4: L4, src: End, dst: End, payload: &[u8]) -> Vec<u8> {
    let ip = headers([SRC_MAC, DST_MAC], src.0, dst.0);
    let mut bytes = Vec::new();
    match l4 {
        L4::Udp => ip.udp(src.1, dst.1).write(&mut bytes, payload),
        L4::Tcp(flags) => {
            let tcp = ip.tcp(src.1, dst.1, 1_000, 4_096);
            match flags {
                Tcp::Syn => tcp.syn(),
                Tcp::SynAck => tcp.syn().ack(2_000),
                Tcp::Ack => tcp.ack(2_000),
                Tcp::FinAck => tcp.fin().ack(2_000),
                Tcp::Rst => tcp.rst(),
            }
            .write(&mut bytes, payload)
        }
    }
    .expect("a packet in memory");
    bytes
}

/// A packet without IP options with another number of hops left.
pub fn with_hops(packet: &[u8], hops: u8) -> Vec<u8> {
    let mut bytes = packet.to_vec();
    match Ipv4Header::from_slice(&packet[14..]) {
        Ok((mut ip, _)) => {
            ip.time_to_live = hops;
            ip.header_checksum = ip.calc_header_checksum();
            bytes[14..34].copy_from_slice(&ip.to_bytes());
        }
        Err(_) => bytes[14 + 7] = hops,
    }
    bytes
}

/// CRC32c (RFC 9260, appendix A), bit by bit.
pub fn crc32c(data: &[u8]) -> u32 {
    !data.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 }
        })
    })
}

/// SCTP as it follows an IP header, with a correct checksum; `chunks` follow the common header.
pub fn sctp_message(src_port: u16, dst_port: u16, chunks: &[u8]) -> Vec<u8> {
    let mut sctp = [src_port.to_be_bytes(), dst_port.to_be_bytes()].concat();
    sctp.extend_from_slice(&[0xab, 0xcd, 0xef, 0x01, 0, 0, 0, 0]);
    sctp.extend_from_slice(chunks);
    let crc = crc32c(&sctp);
    sctp[8..12].copy_from_slice(&crc.to_le_bytes());
    sctp
}

/// An SCTP packet.
pub fn sctp(src: End, dst: End, chunks: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    headers([SRC_MAC, DST_MAC], src.0, dst.0)
        .write(&mut bytes, IpNumber::SCTP, &sctp_message(src.1, dst.1, chunks))
        .expect("a packet in memory");
    bytes
}

/// The source and destination of a packet.
pub fn ends(packet: &[u8]) -> (End, End) {
    let sliced = SlicedPacket::from_ethernet(packet).expect("a packet");
    let net = sliced.net.expect("an IP packet");
    let payload = net.ip_payload_ref().expect("an IP packet");
    let (src, dst): (IpAddr, IpAddr) = match &net {
        NetSlice::Ipv4(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        NetSlice::Ipv6(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        NetSlice::Arp(_) => panic!("ARP has no ports"),
    };
    let (src_port, dst_port) = match sliced.transport {
        Some(TransportSlice::Tcp(tcp)) => (tcp.source_port(), tcp.destination_port()),
        Some(TransportSlice::Udp(udp)) => (udp.source_port(), udp.destination_port()),
        None if payload.ip_number == IpNumber::SCTP => {
            let port = |at: usize| u16::from_be_bytes([payload.payload[at], payload.payload[at + 1]]);
            (port(0), port(2))
        }
        other => panic!("{other:?} has no ports"),
    };
    ((src, src_port), (dst, dst_port))
}

/// Fails with both packets taken apart if they are not the same bytes.
#[track_caller]
pub fn assert_same(got: &[u8], want: &[u8]) {
    assert!(
        got == want,
        "\n got: {got:02x?}\nwant: {want:02x?}\n got: {:#?}\nwant: {:#?}",
        SlicedPacket::from_ethernet(got),
        SlicedPacket::from_ethernet(want)
    );
}
