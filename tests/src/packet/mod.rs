//! Builds packets byte by byte, with lengths and checksums computed from scratch, and explains packets to people.
//!
//! Used by the packet tests to build what a program gets and what it must have made of it. Checksums come from `etherparse` and
//! `crc32c`, never from `proxy-common`: an expectation must not share the arithmetic of the code under test.

mod describe;

use std::net::{IpAddr, SocketAddr};

use etherparse::checksum::Sum16BitWords;
use etherparse::{
    EtherType, Ethernet2Header, IpDscp, IpEcn, IpFragOffset, IpNumber, Ipv4Header, Ipv4Options, Ipv6FlowLabel,
    Ipv6Header,
};

pub use describe::{assert_packet_eq, describe, describe_ip};

/// TCP flag bits, as they stand in the header's 14th byte.
pub mod flags {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Opens a connection.
    pub const SYN: u8 = 0x02;
    /// Aborts a connection.
    pub const RST: u8 = 0x04;
    /// Deliver at once.
    pub const PSH: u8 = 0x08;
    /// The acknowledgement number is valid.
    pub const ACK: u8 = 0x10;
}

/// Hardware address of whoever sends, unless [`Packet::macs`] says otherwise.
pub const SENDER_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x01];
/// Hardware address of whoever receives, unless [`Packet::macs`] says otherwise.
pub const RECEIVER_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x02];

/// IPv6 extension headers and what they are called in `next header`.
pub mod extension {
    /// Hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// Routing header.
    pub const ROUTING: u8 = 43;
    /// Destination options.
    pub const DESTINATION: u8 = 60;
}

/// ICMP types and codes used by the tests.
pub mod icmp {
    /// Destination unreachable.
    pub const UNREACHABLE: u8 = 3;
    /// Port unreachable, a code of [`UNREACHABLE`].
    pub const PORT_UNREACHABLE: u8 = 3;
    /// Fragmentation needed, a code of [`UNREACHABLE`].
    pub const FRAGMENTATION_NEEDED: u8 = 4;
    /// ICMPv6 destination unreachable.
    pub const V6_UNREACHABLE: u8 = 1;
    /// ICMPv6 port unreachable, a code of [`V6_UNREACHABLE`].
    pub const V6_PORT_UNREACHABLE: u8 = 4;
    /// ICMPv6 packet too big.
    pub const V6_PACKET_TOO_BIG: u8 = 2;
}

const TCP_MIN_HEADER: usize = 20;
const FRAGMENT_HEADER: u8 = 44;

#[derive(Clone, Debug)]
enum L4 {
    Tcp {
        flags: u8,
        seq: u32,
        ack: u32,
        window: u16,
        options: Vec<u8>,
    },
    Udp {
        no_checksum: bool,
    },
    Sctp {
        tag: u32,
    },
    Icmp {
        kind: u8,
        code: u8,
        rest: [u8; 4],
    },
    Raw {
        protocol: u8,
    },
}

#[derive(Clone, Copy, Debug)]
struct Fragment {
    offset: usize,
    more: bool,
}

/// A packet to be built. Change one thing of a request and build it again to get the expected result of a rewrite.
#[derive(Clone, Debug)]
pub struct Packet {
    ethernet: Option<([u8; 6], [u8; 6])>,
    src: SocketAddr,
    dst: SocketAddr,
    ttl: u8,
    tos: u8,
    id: u16,
    flow_label: u32,
    dont_fragment: bool,
    fragment: Option<Fragment>,
    options: Vec<u8>,
    extensions: Vec<(u8, Vec<u8>)>,
    l4: L4,
    payload: Vec<u8>,
    l4_checksum: Option<u16>,
}

fn socket(text: &str) -> SocketAddr {
    text.parse()
        .unwrap_or_else(|e| panic!("{text:?} is not an address with a port (10.0.0.1:80, [fd00::1]:80): {e}"))
}

fn ip(text: &str) -> SocketAddr {
    let ip: IpAddr = text
        .parse()
        .unwrap_or_else(|e| panic!("{text:?} is not an IP address: {e}"));
    SocketAddr::new(ip, 0)
}

impl Packet {
    fn new(src: SocketAddr, dst: SocketAddr, l4: L4) -> Self {
        assert_eq!(
            src.is_ipv4(),
            dst.is_ipv4(),
            "{src} and {dst} are of different families"
        );
        Self {
            ethernet: Some((SENDER_MAC, RECEIVER_MAC)),
            src,
            dst,
            ttl: 64,
            tos: 0,
            id: 0,
            flow_label: 0,
            dont_fragment: true,
            fragment: None,
            options: Vec::new(),
            extensions: Vec::new(),
            l4,
            payload: Vec::new(),
            l4_checksum: None,
        }
    }

    /// A TCP segment, by default a SYN: `Packet::tcp("10.244.1.2:40000", "10.96.0.10:80")`.
    pub fn tcp(src: &str, dst: &str) -> Self {
        let l4 = L4::Tcp {
            flags: flags::SYN,
            seq: 1,
            ack: 0,
            window: 64_240,
            options: Vec::new(),
        };
        Self::new(socket(src), socket(dst), l4)
    }

    /// A UDP datagram.
    pub fn udp(src: &str, dst: &str) -> Self {
        Self::new(socket(src), socket(dst), L4::Udp { no_checksum: false })
    }

    /// An SCTP packet: common header, then the payload as its chunks.
    pub fn sctp(src: &str, dst: &str) -> Self {
        Self::new(socket(src), socket(dst), L4::Sctp { tag: 0x1234_5678 })
    }

    /// An ICMP or ICMPv6 message (by the family of the addresses); `rest` are the bytes 5 to 8 of its header.
    pub fn icmp(src: &str, dst: &str, kind: u8, code: u8, rest: [u8; 4]) -> Self {
        Self::new(ip(src), ip(dst), L4::Icmp { kind, code, rest })
    }

    /// Any other protocol, or a later fragment: the payload follows the IP header directly.
    pub fn raw(src: &str, dst: &str, protocol: u8) -> Self {
        Self::new(ip(src), ip(dst), L4::Raw { protocol })
    }

    /// Sent from this address and port.
    pub fn from(mut self, src: &str) -> Self {
        self.src = socket(src);
        self
    }

    /// Sent to this address and port.
    pub fn to(mut self, dst: &str) -> Self {
        self.dst = socket(dst);
        self
    }

    /// The way back: addresses, ports and hardware addresses exchanged.
    pub fn reversed(mut self) -> Self {
        std::mem::swap(&mut self.src, &mut self.dst);
        self.ethernet = self.ethernet.map(|(src, dst)| (dst, src));
        self
    }

    /// TCP flags, of [`flags`].
    pub fn flags(mut self, bits: u8) -> Self {
        let L4::Tcp { flags, .. } = &mut self.l4 else {
            panic!("flags belong to TCP")
        };
        *flags = bits;
        self
    }

    /// TCP sequence and acknowledgement numbers.
    pub fn seq_ack(mut self, seq_number: u32, ack_number: u32) -> Self {
        let L4::Tcp { seq, ack, .. } = &mut self.l4 else {
            panic!("sequence numbers belong to TCP")
        };
        *seq = seq_number;
        *ack = ack_number;
        self
    }

    /// TCP options; the length must be a multiple of four.
    pub fn tcp_options(mut self, bytes: &[u8]) -> Self {
        assert!(
            bytes.len().is_multiple_of(4) && bytes.len() <= 40,
            "TCP options come in words, up to 40 bytes"
        );
        let L4::Tcp { options, .. } = &mut self.l4 else {
            panic!("these are options of TCP")
        };
        *options = bytes.to_vec();
        self
    }

    /// What follows the L4 header.
    pub fn payload(mut self, bytes: &[u8]) -> Self {
        self.payload = bytes.to_vec();
        self
    }

    /// Time to live, or hop limit.
    pub fn ttl(mut self, ttl: u8) -> Self {
        self.ttl = ttl;
        self
    }

    /// The type-of-service byte (IPv4) or traffic class (IPv6).
    pub fn tos(mut self, tos: u8) -> Self {
        self.tos = tos;
        self
    }

    /// IPv4 identification, and that of the fragments this packet is cut into.
    pub fn id(mut self, id: u16) -> Self {
        self.id = id;
        self
    }

    /// IPv6 flow label.
    pub fn flow_label(mut self, label: u32) -> Self {
        self.flow_label = label;
        self
    }

    /// The IPv4 "don't fragment" bit, which is set by default.
    pub fn dont_fragment(mut self, set: bool) -> Self {
        self.dont_fragment = set;
        self
    }

    /// IPv4 options; the length must be a multiple of four.
    pub fn ip_options(mut self, bytes: &[u8]) -> Self {
        self.options = bytes.to_vec();
        self
    }

    /// Adds an IPv6 extension header of this number; `body` is what follows its two leading bytes, `8 n - 2` bytes long.
    pub fn extension(mut self, number: u8, body: &[u8]) -> Self {
        assert!(
            (body.len() + 2).is_multiple_of(8),
            "an extension header is a multiple of 8 bytes long"
        );
        self.extensions.push((number, body.to_vec()));
        self
    }

    /// Hardware addresses of sender and receiver.
    pub fn macs(mut self, src: [u8; 6], dst: [u8; 6]) -> Self {
        self.ethernet = Some((src, dst));
        self
    }

    /// As on an interface without Ethernet header (WireGuard, IPIP, tun).
    pub fn no_ethernet(mut self) -> Self {
        self.ethernet = None;
        self
    }

    /// A wrong (or deliberately chosen) L4 checksum, in place of the correct one.
    pub fn l4_checksum(mut self, checksum: u16) -> Self {
        self.l4_checksum = Some(checksum);
        self
    }

    /// An IPv4 UDP datagram without checksum (RFC 768 allows it).
    pub fn no_udp_checksum(mut self) -> Self {
        self.l4 = L4::Udp { no_checksum: true };
        self
    }

    /// Marks the packet as this fragment of something larger, contents unchanged; see [`Packet::fragments`] for real ones.
    pub fn fragment(mut self, offset: usize, more: bool) -> Self {
        assert!(offset.is_multiple_of(8), "fragments start at multiples of 8");
        self.fragment = Some(Fragment { offset, more });
        self.dont_fragment = false;
        self
    }

    /// The datagram cut into fragments of at most `size` bytes of IP payload, as a router or sender would.
    pub fn fragments(&self, size: usize) -> Vec<Vec<u8>> {
        let whole = self.l4_bytes();
        let pieces = whole.chunks(size - size % 8);
        let last = pieces.len() - 1;
        let mut offset = 0;
        pieces
            .enumerate()
            .map(|(i, piece)| {
                let packet = self.clone().fragment(offset, i != last);
                offset += piece.len();
                packet.frame(piece)
            })
            .collect()
    }

    /// The bytes of the packet.
    pub fn build(&self) -> Vec<u8> {
        self.frame(&self.l4_bytes())
    }

    fn protocol(&self) -> u8 {
        match self.l4 {
            L4::Tcp { .. } => 6,
            L4::Udp { .. } => 17,
            L4::Sctp { .. } => 132,
            L4::Icmp { .. } if self.src.is_ipv4() => 1,
            L4::Icmp { .. } => 58,
            L4::Raw { protocol } => protocol,
        }
    }

    /// L4 header and payload with the checksum in place.
    fn l4_bytes(&self) -> Vec<u8> {
        let mut ports = [0; 4];
        ports[..2].copy_from_slice(&self.src.port().to_be_bytes());
        ports[2..].copy_from_slice(&self.dst.port().to_be_bytes());
        let mut bytes = Vec::new();
        let checksum_at = match &self.l4 {
            L4::Tcp {
                flags,
                seq,
                ack,
                window,
                options,
            } => {
                bytes.extend(ports);
                bytes.extend(seq.to_be_bytes());
                bytes.extend(ack.to_be_bytes());
                bytes.push((((TCP_MIN_HEADER + options.len()) / 4) as u8) << 4);
                bytes.push(*flags);
                bytes.extend(window.to_be_bytes());
                bytes.extend([0; 4]);
                bytes.extend(options);
                Some(16)
            }
            L4::Udp { no_checksum } => {
                bytes.extend(ports);
                bytes.extend(((8 + self.payload.len()) as u16).to_be_bytes());
                bytes.extend([0; 2]);
                (!no_checksum).then_some(6)
            }
            L4::Sctp { tag } => {
                bytes.extend(ports);
                bytes.extend(tag.to_be_bytes());
                bytes.extend([0; 4]);
                None
            }
            L4::Icmp { kind, code, rest } => {
                bytes.extend([*kind, *code, 0, 0]);
                bytes.extend(rest);
                Some(2)
            }
            L4::Raw { .. } => None,
        };
        bytes.extend(&self.payload);
        if let L4::Sctp { .. } = self.l4 {
            // RFC 9260 appendix A: CRC32c of the packet with a zero checksum field, least significant byte first.
            let crc = crc32c::crc32c(&bytes);
            bytes[8..12].copy_from_slice(&crc.to_le_bytes());
        }
        if let Some(at) = checksum_at {
            let correct = l4_checksum(self.src.ip(), self.dst.ip(), self.protocol(), &bytes);
            bytes[at..at + 2].copy_from_slice(&self.l4_checksum.unwrap_or(correct).to_be_bytes());
        }
        bytes
    }

    fn frame(&self, l4: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        if let Some((source, destination)) = self.ethernet {
            let ether_type = if self.src.is_ipv4() {
                EtherType::IPV4
            } else {
                EtherType::IPV6
            };
            bytes.extend(
                Ethernet2Header {
                    source,
                    destination,
                    ether_type,
                }
                .to_bytes(),
            );
        }
        match (self.src.ip(), self.dst.ip()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => bytes.extend(self.ipv4_header(src.octets(), dst.octets(), l4.len())),
            (IpAddr::V6(src), IpAddr::V6(dst)) => bytes.extend(self.ipv6_headers(src.octets(), dst.octets(), l4.len())),
            _ => unreachable!("both addresses are of one family"),
        }
        bytes.extend(l4);
        bytes
    }

    fn ipv4_header(&self, source: [u8; 4], destination: [u8; 4], payload: usize) -> Vec<u8> {
        assert!(self.extensions.is_empty(), "extension headers belong to IPv6");
        let mut header = Ipv4Header {
            dscp: IpDscp::try_new(self.tos >> 2).expect("six bits"),
            ecn: IpEcn::try_new(self.tos & 3).expect("two bits"),
            identification: self.id,
            dont_fragment: self.dont_fragment,
            more_fragments: self.fragment.is_some_and(|f| f.more),
            fragment_offset: IpFragOffset::try_new(self.fragment.map_or(0, |f| f.offset / 8) as u16).expect("13 bits"),
            time_to_live: self.ttl,
            protocol: IpNumber(self.protocol()),
            source,
            destination,
            options: Ipv4Options::try_from(&self.options[..]).expect("IPv4 options come in words, up to 40 bytes"),
            ..Default::default()
        };
        header.set_payload_len(payload).expect("fits into one packet");
        header.header_checksum = header.calc_header_checksum();
        header.to_bytes().to_vec()
    }

    fn ipv6_headers(&self, source: [u8; 16], destination: [u8; 16], payload: usize) -> Vec<u8> {
        assert!(self.options.is_empty(), "these options belong to IPv4");
        let mut chain = self.extensions.clone();
        if let Some(Fragment { offset, more }) = self.fragment {
            let mut body = ((offset as u16) | u16::from(more)).to_be_bytes().to_vec();
            body.extend(u32::from(self.id).to_be_bytes());
            chain.push((FRAGMENT_HEADER, body));
        }
        let mut extensions = Vec::new();
        for (i, (number, body)) in chain.iter().enumerate() {
            let next = chain.get(i + 1).map_or(self.protocol(), |(number, _)| *number);
            let length = if *number == FRAGMENT_HEADER {
                0
            } else {
                (body.len() + 2) / 8 - 1
            };
            extensions.extend([next, length as u8]);
            extensions.extend(body);
        }
        let header = Ipv6Header {
            traffic_class: self.tos,
            flow_label: Ipv6FlowLabel::try_new(self.flow_label).expect("20 bits"),
            payload_length: (extensions.len() + payload) as u16,
            next_header: IpNumber(chain.first().map_or(self.protocol(), |(number, _)| *number)),
            hop_limit: self.ttl,
            source,
            destination,
        };
        let mut bytes = header.to_bytes().to_vec();
        bytes.extend(extensions);
        bytes
    }
}

/// The L4 checksum that belongs into `bytes`, whose checksum field is zero; over a zero-checksum-included packet it gives 0 when
/// the packet is intact.
fn l4_checksum(src: IpAddr, dst: IpAddr, protocol: u8, bytes: &[u8]) -> u16 {
    const ICMP: u8 = 1;
    const UDP: u8 = 17;
    let mut sum = Sum16BitWords::new();
    if protocol != ICMP {
        sum = match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => sum.add_slice(&src.octets()).add_slice(&dst.octets()),
            (IpAddr::V6(src), IpAddr::V6(dst)) => sum.add_slice(&src.octets()).add_slice(&dst.octets()),
            _ => unreachable!("both addresses are of one family"),
        };
        sum = sum
            .add_2bytes([0, protocol])
            .add_4bytes((bytes.len() as u32).to_be_bytes());
    }
    let sum = sum.add_slice(bytes);
    // RFC 768: a computed zero is sent as all ones, since zero means "no checksum".
    let checksum = if protocol == UDP {
        sum.to_ones_complement_with_no_zero()
    } else {
        sum.ones_complement()
    };
    // etherparse sums words in memory order.
    checksum.to_be()
}

#[cfg(test)]
mod tests;
