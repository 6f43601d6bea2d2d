//! Applying an entry of the rewrite table to a packet: the cost of every packet of an established connection.
//!
//! Both differences a rewrite makes to the checksums were computed when the entry was written. So an IPv4 packet costs one store
//! (header checksum and both addresses stand side by side, and the ports follow) and one checksum helper, two if a port
//! changes. The L4 checksum is left to the helper, because only it knows whether the checksum in the packet is complete or just
//! the pseudo header's, as in packets of local pods. There is no helper for SCTP's CRC32c, which is updated here.

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::bpf_ktime_get_coarse_ns;
use aya_ebpf::programs::TcContext;
use proxy_common::addr::{Addr4, Addr6, Port, Protocol};
use proxy_common::rewrite::{Rewrite, STATE_FIN, STATE_RST, STATE_SEEN};
use proxy_common::{checksum, clock, crc32c};

use crate::maps::HAVE_CSUM_IPV6;
use crate::packet::{Headers, IPV6_HEADER, Packet, TCP_FIN, TCP_RST};

/// Offset of the checksum in the header of a protocol.
pub(crate) const TCP_CHECKSUM: u32 = 16;
/// See [`TCP_CHECKSUM`].
pub(crate) const UDP_CHECKSUM: u32 = 6;
const SCTP_CHECKSUM: usize = 8;
/// Bytes of SCTP's common header, which every packet begins with.
const SCTP_HEADER: usize = 12;
/// `BPF_F_IPV6`, newer than the bindings (Linux 6.16): tells `bpf_l4_csum_replace` that no IP header checksum makes up for the
/// address change, so a hardware-computed sum over the whole packet (CHECKSUM_COMPLETE) must be left alone.
const BPF_F_IPV6: u64 = 1 << 7;

/// What stands side by side in an IPv4 header and the first bytes of L4, when there are no options.
#[repr(C)]
struct Stored4 {
    checksum: u16,
    // Two halves: as one word it would be aligned to 4 and leave a hole behind the checksum.
    src: [u16; 2],
    dst: [u16; 2],
    src_port: Port,
    dst_port: Port,
}

// An entry starts as an IPv6 header goes on after its first eight bytes: addresses, then ports. So it is stored as it is.
const _: () = {
    assert!(core::mem::offset_of!(Rewrite<Addr6>, src) == 0);
    assert!(core::mem::offset_of!(Rewrite<Addr6>, dst) == 16);
    assert!(core::mem::offset_of!(Rewrite<Addr6>, src_port) == 32);
    assert!(core::mem::offset_of!(Rewrite<Addr6>, dst_port) == 34);
};

/// A family's way to store the addresses (and ports) of a rewrite in one call.
pub(crate) trait Store: Headers {
    /// Offset of the length field in the IP header, and what is to be added to it for the length of the whole packet.
    const LENGTH: (usize, usize);
    /// Writes the rewritten addresses, the IP header checksum and, if `ports`, the ports.
    fn store<const L2: usize>(ctx: &TcContext, packet: &Packet<Self>, rewrite: &Rewrite<Self>) -> Result<(), ()>;
}

#[inline(always)]
pub(crate) fn store_bytes<T>(ctx: &TcContext, offset: usize, value: &T, len: usize) -> Result<(), ()> {
    // SAFETY: `len` is at most the size of `value`, which has no padding and is initialised.
    let result = unsafe {
        aya_ebpf::helpers::bpf_skb_store_bytes(
            ctx.skb.skb,
            offset as u32,
            core::ptr::from_ref(value).cast(),
            len as u32,
            0,
        )
    };
    if result == 0 { Ok(()) } else { Err(()) }
}

impl Store for Addr4 {
    const LENGTH: (usize, usize) = (2, 0);

    #[inline(always)]
    fn store<const L2: usize>(ctx: &TcContext, packet: &Packet<Self>, rewrite: &Rewrite<Self>) -> Result<(), ()> {
        let stored = Stored4 {
            checksum: checksum::update(packet.ip_checksum, rewrite.addr_delta),
            src: bytemuck::cast(rewrite.src),
            dst: bytemuck::cast(rewrite.dst),
            src_port: rewrite.src_port,
            dst_port: rewrite.dst_port,
        };
        if rewrite.port_delta == 0 || packet.is_later_fragment {
            return store_bytes(ctx, L2 + 10, &stored, 10);
        }
        if packet.l4 as usize == L2 + Self::HEADER {
            return store_bytes(ctx, L2 + 10, &stored, 14);
        }
        store_bytes(ctx, L2 + 10, &stored, 10)?;
        store_bytes(ctx, packet.l4 as usize, &[rewrite.src_port, rewrite.dst_port], 4)
    }
}

impl Store for Addr6 {
    const LENGTH: (usize, usize) = (4, IPV6_HEADER);

    #[inline(always)]
    fn store<const L2: usize>(ctx: &TcContext, packet: &Packet<Self>, rewrite: &Rewrite<Self>) -> Result<(), ()> {
        if rewrite.port_delta == 0 || packet.is_later_fragment {
            return store_bytes(ctx, L2 + 8, rewrite, 32);
        }
        if packet.l4 as usize == L2 + Self::HEADER {
            return store_bytes(ctx, L2 + 8, rewrite, 36);
        }
        store_bytes(ctx, L2 + 8, rewrite, 32)?;
        store_bytes(ctx, packet.l4 as usize, &[rewrite.src_port, rewrite.dst_port], 4)
    }
}

/// Now, as a tick of the clock that entries carry.
#[inline(always)]
pub(crate) fn now() -> u32 {
    // SAFETY: the helper has no arguments and no preconditions.
    clock::ticks(unsafe { bpf_ktime_get_coarse_ns() })
}

/// Notes in an entry that a packet with these TCP flags went through it.
#[inline(always)]
pub(crate) fn touch<A: Headers>(entry: *mut Rewrite<A>, tcp_flags: u8, now: u32) {
    // SAFETY: `entry` points into a map slot that stays allocated while the program runs. Other CPUs may write the same words;
    // each is written as a whole, a lost update costs a tick or is repeated by the peer's next FIN, and nothing is derived from
    // two of them together. Volatile, because the compiler must not merge or split the accesses.
    unsafe {
        let seen = core::ptr::addr_of_mut!((*entry).last_seen);
        if seen.read_volatile() != now {
            seen.write_volatile(now);
        }
        let state = core::ptr::addr_of_mut!((*entry).state);
        let old = state.read_volatile();
        let mut new = old | STATE_SEEN;
        if tcp_flags & TCP_FIN != 0 {
            new |= STATE_FIN;
        }
        if tcp_flags & TCP_RST != 0 {
            new |= STATE_RST;
        } else {
            // Who goes on after a reset has not sent it, or not in this connection: its receiver ignores one that is out of window,
            // which cannot be told from here (S150).
            new &= !STATE_RST;
        }
        if new != old {
            state.write_volatile(new);
        }
    }
}

/// Changes the packet into the entry's tuple. On an error the packet may be half changed and must be dropped.
#[inline(always)]
pub(crate) fn apply<A: Store, const L2: usize>(
    ctx: &TcContext,
    packet: &Packet<A>,
    rewrite: &Rewrite<A>,
) -> Result<(), ()> {
    A::store::<L2>(ctx, packet, rewrite)?;
    if packet.is_later_fragment {
        return Ok(());
    }
    let (field, mangled) = if packet.key.protocol == Protocol::Tcp.number() {
        (packet.l4 + TCP_CHECKSUM, 0)
    } else if packet.key.protocol == Protocol::Udp.number() {
        // A UDP checksum of zero means "none" and stays (RFC 768); a computed zero becomes 0xffff.
        (packet.l4 + UDP_CHECKSUM, u64::from(BPF_F_MARK_MANGLED_0))
    } else {
        // SCTP's CRC32c has no pseudo header, so addresses do not matter (S195).
        if rewrite.port_delta == 0 {
            return Ok(());
        }
        let old = ports_word(packet.key.src_port, packet.key.dst_port);
        let new = ports_word(rewrite.src_port, rewrite.dst_port);
        return replace_crc32c::<A, L2>(ctx, packet.l4, old ^ new, packet.more_fragments);
    };
    if rewrite.addr_delta != 0 {
        let ipv6 = if A::IS_V6 && HAVE_CSUM_IPV6.load() != 0 {
            BPF_F_IPV6
        } else {
            0
        };
        replace(
            ctx,
            field,
            rewrite.addr_delta,
            u64::from(BPF_F_PSEUDO_HDR) | mangled | ipv6,
        )?;
    }
    if rewrite.port_delta != 0 {
        replace(ctx, field, rewrite.port_delta, mangled)?;
    }
    Ok(())
}

/// An SCTP packet's first four bytes, as a number of the CRC's byte order.
#[inline(always)]
fn ports_word(src: Port, dst: Port) -> u32 {
    u32::from_le(bytemuck::cast([src, dst]))
}

/// Makes up for `changed` bits of the ports in the CRC32c of a whole SCTP packet. Out of the way of the other protocols.
#[inline(never)]
fn replace_crc32c<A: Store, const L2: usize>(
    ctx: &TcContext,
    l4: u32,
    changed: u32,
    more_fragments: u8,
) -> Result<(), ()> {
    // The length of a fragmented packet is in its last fragment. Few send one: SCTP fits its packets to the path's MTU.
    if more_fragments != 0 {
        return Err(());
    }
    let field = l4 as usize + SCTP_CHECKSUM;
    let crc = u32::from_le(ctx.load(field).map_err(|_errno| ())?);
    // A local pod's packet whose sum the device computes later (CHECKSUM_PARTIAL): it does so over a field that is still zero. One
    // in 2^32 packets has this sum by chance; its receiver drops it.
    if crc == 0 {
        return Ok(());
    }
    // From the IP header, because a short Ethernet frame is padded.
    let (offset, added) = A::LENGTH;
    let end = L2 + added + usize::from(u16::from_be(ctx.load(L2 + offset).map_err(|_errno| ())?));
    let start = l4 as usize;
    if end < start + SCTP_HEADER {
        return Err(());
    }
    let crc = crc ^ crc32c::difference(changed, (end - start) as u16);
    store_bytes(ctx, field, &crc.to_le(), 4)
}

/// Adds a precomputed difference to the L4 checksum: a size of 0 in the flags says that `to` is a difference.
#[inline(always)]
fn replace(ctx: &TcContext, field: u32, delta: u16, flags: u64) -> Result<(), ()> {
    ctx.l4_csum_replace(field as usize, 0, u64::from(delta), flags)
        .map_err(|_errno| ())
}
