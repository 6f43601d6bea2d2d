//! ICMP and ICMPv6 errors about translated packets (S152): both the error's own addresses and the packet it quotes are translated,
//! or the sender of that packet does not recognise it and path-MTU discovery fails.
//!
//! An error travels against the packet it quotes. So the entry that applies is the one for packets of the opposite direction at
//! this hook, and what it does to their source it does to the quoted destination. One rule serves all four kinds of entry.

use aya_ebpf::programs::TcContext;
use proxy_common::addr::{Addr4, Addr6, Port};
use proxy_common::checksum;
use proxy_common::rewrite::RewriteKey;

use crate::packet::{Headers, IPV4_HEADER, IPV6_HEADER};
use crate::rewrite::store_bytes;
use crate::tc::{DROP, PASS};

/// Bytes of an ICMP header; the quoted packet follows.
const ICMP_HEADER: usize = 8;

/// The header of the error itself, or of the packet that it quotes.
#[derive(Clone, Copy)]
pub(crate) struct Header<A> {
    src: A,
    dst: A,
    checksum: u16,
    protocol: u8,
    /// Offset of what follows the header.
    next: usize,
}

/// A family's headers inside and outside.
pub(crate) trait Quoted: Headers {
    /// Is this ICMP type an error that quotes a packet?
    fn is_error(kind: u8) -> bool;
    /// The header at `offset`; `None` for a later fragment or a packet that ends early.
    fn header(ctx: &TcContext, offset: usize) -> Option<Header<Self>>;
    /// Writes the addresses of the header at `offset`, and its checksum updated by `delta`.
    fn store_header(ctx: &TcContext, offset: usize, header: &Header<Self>, delta: u16) -> Result<(), ()>;
    /// How the ICMP checksum changes when the quoted addresses change by `addrs` and the error's own by `outer`.
    fn icmp_delta(addrs: u16, outer: u16) -> u32;
}

impl Quoted for Addr4 {
    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        // Destination unreachable, time exceeded, parameter problem (RFC 792).
        matches!(kind, 3 | 11 | 12)
    }

    #[inline(always)]
    fn header(ctx: &TcContext, offset: usize) -> Option<Header<Self>> {
        let bytes = ctx.load::<[u32; IPV4_HEADER / 4]>(offset).ok()?;
        let [first, fragment, protocol, src, dst] = bytes;
        let [version_ihl, ..] = first.to_ne_bytes();
        let [_, _, high, low] = fragment.to_ne_bytes();
        if u16::from_be_bytes([high, low]) & 0x1fff != 0 {
            return None;
        }
        let [_, protocol, check0, check1] = protocol.to_ne_bytes();
        Some(Header {
            src: bytemuck::cast(src),
            dst: bytemuck::cast(dst),
            checksum: u16::from_ne_bytes([check0, check1]),
            protocol,
            next: offset + usize::from(version_ihl & 0x0f) * 4,
        })
    }

    #[inline(always)]
    fn store_header(ctx: &TcContext, offset: usize, header: &Header<Self>, delta: u16) -> Result<(), ()> {
        store_bytes(ctx, offset + 10, &checksum::update(header.checksum, delta), 2)?;
        store_bytes(ctx, offset + 12, &[header.src, header.dst], 8)
    }

    #[inline(always)]
    fn icmp_delta(_addrs: u16, _outer: u16) -> u32 {
        // The quoted header's checksum makes up for its addresses, and there is no pseudo header.
        0
    }
}

impl Quoted for Addr6 {
    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        // Destination unreachable, packet too big, time exceeded, parameter problem (RFC 4443).
        matches!(kind, 1..=4)
    }

    #[inline(always)]
    fn header(ctx: &TcContext, offset: usize) -> Option<Header<Self>> {
        let next = ctx.load::<u8>(offset + 6).ok()?;
        let [src, dst] = ctx.load::<[Self; 2]>(offset + 8).ok()?;
        Some(Header {
            src,
            dst,
            checksum: 0,
            protocol: next,
            next: offset + IPV6_HEADER,
        })
    }

    #[inline(always)]
    fn store_header(ctx: &TcContext, offset: usize, header: &Header<Self>, _delta: u16) -> Result<(), ()> {
        store_bytes(ctx, offset + 8, &[header.src, header.dst], 32)
    }

    #[inline(always)]
    fn icmp_delta(addrs: u16, outer: u16) -> u32 {
        // The quoted addresses are payload, the error's own are part of the pseudo header (RFC 4443 §2.3).
        u32::from(addrs) + u32::from(outer)
    }
}

/// Translates the packet if it is an error about a connection in the table. Returns the verdict.
#[inline(never)]
pub(crate) fn translate<A: Quoted, const L2: usize, const HOOK: u8>(ctx: &TcContext) -> i32 {
    translate_known::<A, L2, HOOK>(ctx).unwrap_or(PASS)
}

/// Is the packet an error?
#[inline(always)]
pub(crate) fn is_error<A: Quoted, const L2: usize>(ctx: &TcContext) -> bool {
    A::header(ctx, L2).is_some_and(|outer| {
        outer.protocol == A::ICMP && ctx.load::<u8>(outer.next).is_ok_and(|kind| A::is_error(kind))
    })
}

#[inline(always)]
fn translate_known<A: Quoted, const L2: usize, const HOOK: u8>(ctx: &TcContext) -> Option<i32> {
    let mut outer = A::header(ctx, L2)?;
    let kind = ctx.load::<u8>(outer.next).ok()?;
    if outer.protocol != A::ICMP || !A::is_error(kind) {
        return None;
    }
    let icmp = outer.next;
    let quote = icmp + ICMP_HEADER;
    let mut inner = A::header(ctx, quote)?;
    let [src_port, dst_port] = ctx.load::<[Port; 2]>(inner.next).ok()?;
    let key = RewriteKey::new(inner.dst, dst_port, inner.src, src_port, inner.protocol, HOOK);
    // SAFETY: the slot stays allocated while the program runs, and its tuple does not change.
    let entry = A::rewrite(&key).map(|entry| unsafe { &*entry })?;

    let before = outer.src.sum() + outer.dst.sum();
    if outer.src == inner.dst {
        // The endpoint itself complains.
        outer.src = entry.src;
    }
    if outer.dst == inner.src {
        outer.dst = entry.dst;
    }
    let outer_delta = checksum::difference(before, outer.src.sum() + outer.dst.sum());
    inner.src = entry.dst;
    inner.dst = entry.src;
    let ports = [entry.dst_port, entry.src_port];
    let (addr_delta, port_delta) = (entry.addr_delta, entry.port_delta);

    let icmp_checksum = ctx.load::<u16>(icmp + 2).ok()?;
    let delta = checksum::fold(A::icmp_delta(addr_delta, outer_delta) + u32::from(port_delta));
    let icmp_checksum = if delta == 0 {
        icmp_checksum
    } else {
        checksum::update(icmp_checksum, delta)
    };
    let stored = A::store_header(ctx, quote, &inner, addr_delta)
        .and_then(|()| store_bytes(ctx, inner.next, &ports, 4))
        .and_then(|()| store_bytes(ctx, icmp + 2, &icmp_checksum, 2))
        .and_then(|()| A::store_header(ctx, L2, &outer, outer_delta));
    // A half-translated error would mislead its receiver.
    Some(if stored.is_ok() { PASS } else { DROP })
}
