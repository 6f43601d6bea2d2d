//! Packets that are not simply an IP header followed by an L4 header: fragments and IPv6 extension headers. Rare, so they are read
//! with helper calls, out of the way of the others.
//!
//! The ports of a first fragment are remembered for the others, which then go the same way (S153). Fragments that overtake their
//! first one pass untouched.

use aya_ebpf::programs::TcContext;
use proxy_common::addr::{Addr4, Addr6, Port, Protocol};
use proxy_common::fragment::{FragmentKey, Ports};
use proxy_common::rewrite::RewriteKey;

use crate::maps::Family;
use crate::packet::{Headers, IPV4_HEADER, IPV6_HEADER, Packet, field, linear};

/// What an unusual packet is.
#[derive(Clone, Copy)]
#[repr(u32)]
pub(crate) enum Unusual {
    /// Nothing for us.
    NotOurs = 0,
    /// TCP, UDP or SCTP; it was written to the caller's place.
    Packet = 1,
    /// ICMP of the family.
    Icmp = 2,
}

/// Which part of a packet this is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Whole,
    FirstFragment,
    LaterFragment,
}

/// What stands before the L4 header.
pub(crate) struct Walked<A> {
    src: A,
    dst: A,
    protocol: u8,
    checksum: u16,
    l4: usize,
    part: Part,
    more_fragments: u8,
    id: u32,
}

/// A family's way to its L4 header.
pub(crate) trait Walk: Headers {
    /// Follows the headers to L4; `None` if the packet ends before.
    fn walk<const L2: usize>(ctx: &TcContext) -> Option<Walked<Self>>;
}

impl Walk for Addr4 {
    #[inline(always)]
    fn walk<const L2: usize>(ctx: &TcContext) -> Option<Walked<Self>> {
        let ip: *const u8 = linear(ctx, L2, IPV4_HEADER)?;
        // SAFETY: the twenty bytes of an IPv4 header are there.
        unsafe {
            let fragment = u16::from_be(field(ip, 6));
            let part = match (fragment & 0x1fff, fragment & 0x2000) {
                (0, 0) => Part::Whole,
                (0, _) => Part::FirstFragment,
                _ => Part::LaterFragment,
            };
            Some(Walked {
                src: field(ip, 12),
                dst: field(ip, 16),
                protocol: field(ip, 9),
                checksum: field(ip, 10),
                l4: L2 + usize::from(field::<u8>(ip, 0) & 0x0f) * 4,
                part,
                more_fragments: field::<u8>(ip, 6) & 0x20,
                id: u32::from(field::<u16>(ip, 4)),
            })
        }
    }
}

/// Extension headers that are followed; more than anybody sends (RFC 8200 §4.1).
const EXTENSIONS: u32 = 5;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;

impl Walk for Addr6 {
    #[inline(always)]
    fn walk<const L2: usize>(ctx: &TcContext) -> Option<Walked<Self>> {
        let ip: *const u8 = linear(ctx, L2, IPV6_HEADER)?;
        // SAFETY: the forty bytes of an IPv6 header are there.
        let mut walked = unsafe {
            Walked {
                src: field(ip, 8),
                dst: field(ip, 24),
                protocol: field(ip, 6),
                checksum: 0,
                l4: L2 + IPV6_HEADER,
                part: Part::Whole,
                more_fragments: 0,
                id: 0,
            }
        };
        let mut turn = 0;
        while turn < EXTENSIONS {
            match walked.protocol {
                HOP_BY_HOP | ROUTING | DESTINATION => {
                    let [next, len] = ctx.load::<[u8; 2]>(walked.l4).ok()?;
                    walked.protocol = next;
                    walked.l4 += (usize::from(len) + 1) * 8;
                }
                FRAGMENT => {
                    let [next, _, high, low, a, b, c, d] = ctx.load::<[u8; 8]>(walked.l4).ok()?;
                    walked.protocol = next;
                    walked.l4 += 8;
                    walked.id = u32::from_ne_bytes([a, b, c, d]);
                    let fragment = u16::from_be_bytes([high, low]);
                    walked.more_fragments = low & 1;
                    walked.part = match (fragment & 0xfff8, fragment & 1) {
                        (0, 0) => Part::Whole,
                        (0, _) => Part::FirstFragment,
                        _ => Part::LaterFragment,
                    };
                    if walked.part == Part::LaterFragment {
                        break;
                    }
                }
                _ => break,
            }
            turn += 1;
        }
        Some(walked)
    }
}

/// Reads an unusual packet. If the answer is [`Unusual::Packet`], it was written to `packet`.
#[inline(never)]
pub(crate) fn parse<A: Walk, const L2: usize, const HOOK: u8>(ctx: &TcContext, packet: *mut Packet<A>) -> Unusual {
    let Some(walked) = A::walk::<L2>(ctx) else {
        return Unusual::NotOurs;
    };
    if walked.protocol == A::ICMP && walked.part == Part::Whole {
        return Unusual::Icmp;
    }
    if Protocol::from_number(walked.protocol).is_none() {
        return Unusual::NotOurs;
    }
    match read::<A, HOOK>(ctx, &walked) {
        Some(read) => {
            // SAFETY: the caller's place for a packet.
            unsafe { packet.write(read) };
            Unusual::Packet
        }
        None => Unusual::NotOurs,
    }
}

#[inline(always)]
fn read<A: Family, const HOOK: u8>(ctx: &TcContext, walked: &Walked<A>) -> Option<Packet<A>> {
    let protocol = walked.protocol;
    let fragments = FragmentKey {
        src: walked.src,
        dst: walked.dst,
        id: walked.id,
        protocol,
        hook: HOOK,
        pad: [0; 2],
    };
    let is_later_fragment = walked.part == Part::LaterFragment;
    let mut tcp_flags = 0;
    let ports = if is_later_fragment {
        A::recall_ports(&fragments)?
    } else {
        let [src, dst] = ctx.load::<[Port; 2]>(walked.l4).ok()?;
        if protocol == Protocol::Tcp.number() {
            tcp_flags = ctx.load::<u8>(walked.l4 + 13).ok()?;
        }
        Ports { src, dst }
    };
    if walked.part == Part::FirstFragment {
        A::remember_ports(&fragments, &ports);
    }
    Some(Packet {
        key: RewriteKey::new(walked.src, ports.src, walked.dst, ports.dst, protocol, HOOK),
        l4: walked.l4 as u32,
        ip_checksum: walked.checksum,
        tcp_flags,
        is_later_fragment,
        more_fragments: walked.more_fragments,
    })
}
