//! Answering a packet for a service without endpoints (S122–S124). TCP gets a RST; everything else an ICMP or ICMPv6
//! port-unreachable that comes from the dialled address and quotes the client's own packet, which Linux turns into ECONNREFUSED for
//! connected UDP sockets.
//!
//! Not ICMP for TCP as well: Linux drops an ICMP error for a socket that is in use at that moment, as it still is in the call
//! that sent the SYN when the answer comes from the same machine, and the client would wait for its retransmission. A RST is kept
//! until the socket is free.
//!
//! The packet itself becomes the answer and is sent back where it came from.

use core::mem::MaybeUninit;

use aya_ebpf::bindings::{BPF_F_INGRESS, TC_ACT_SHOT, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC};
use aya_ebpf::helpers::{
    bpf_redirect, bpf_skb_adjust_room, bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_store_bytes,
};
use aya_ebpf::programs::TcContext;
use proxy_common::addr::{Addr4, Addr6, Address as _, Protocol};
use proxy_common::checksum;
use proxy_common::reason::Reason;
use proxy_common::rewrite::{HOOK_EGRESS, RewriteKey};

use crate::maps::{self, Family, Scratch};
use crate::packet::{ETHERNET, Packet, TCP_ACK, TCP_RST};
use crate::rewrite::store_bytes;
use crate::route::zero;

/// The longest quotation: the longest IPv4 header and 20 bytes of L4. RFC 792 asks for 8 bytes of L4; a whole TCP header also
/// satisfies the kernel, which does not cut a packet inside a checksum it still has to fill in.
const QUOTE_MAX: usize = 80;
const QUOTE_L4: usize = 20;
/// Room for the headers of an error message, [`Error6`] being the longer one.
pub(crate) type Headers = MaybeUninit<[u64; size_of::<Error6>() / 8]>;
/// Room for a quotation.
pub(crate) type Quote = MaybeUninit<[u64; QUOTE_MAX / 8]>;
const HOP_LIMIT: u8 = 64;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// IPv4 header and ICMP header, in wire order.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Error4 {
    version_ihl: u8,
    tos: u8,
    total_len: [u8; 2],
    id: [u8; 2],
    fragment: [u8; 2],
    ttl: u8,
    protocol: u8,
    header_checksum: u16,
    src: Addr4,
    dst: Addr4,
    icmp_type: u8,
    icmp_code: u8,
    icmp_checksum: u16,
    unused: [u8; 4],
}

/// IPv6 header and ICMPv6 header, in wire order.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Error6 {
    version_class_flow: [u8; 4],
    payload_len: [u8; 2],
    next_header: u8,
    hop_limit: u8,
    src: Addr6,
    dst: Addr6,
    icmp_type: u8,
    icmp_code: u8,
    icmp_checksum: u16,
    unused: [u8; 4],
}

/// The family's error message.
pub(crate) trait Refuse: Family {
    /// IP and ICMP header.
    type Error: bytemuck::Pod;
    /// The headers of the error for `quote`, whose ones'-complement sum is `quote_sum` and whose length is `quote_len`.
    fn error(src: Self, dst: Self, quote_len: u16, quote_sum: u32) -> Self::Error;
    /// Exchanges source and destination in the IP header.
    fn exchange_addresses<const L2: usize>(ctx: &TcContext, key: &RewriteKey<Self>) -> Result<(), ()>;
}

impl Refuse for Addr4 {
    type Error = Error4;

    #[inline(always)]
    fn error(src: Self, dst: Self, quote_len: u16, quote_sum: u32) -> Error4 {
        let mut error = Error4 {
            version_ihl: 0x45,
            tos: 0,
            total_len: (quote_len + 28).to_be_bytes(),
            id: [0; 2],
            fragment: [0x40, 0],
            ttl: HOP_LIMIT,
            protocol: ICMP,
            header_checksum: 0,
            src,
            dst,
            // Destination unreachable, port unreachable (RFC 792).
            icmp_type: 3,
            icmp_code: 3,
            icmp_checksum: 0,
            unused: [0; 4],
        };
        let header = src.sum()
            + dst.sum()
            + word([0x45, 0])
            + word(error.total_len)
            + word(error.fragment)
            + word([HOP_LIMIT, ICMP]);
        error.header_checksum = !checksum::fold(header);
        error.icmp_checksum = !checksum::fold(quote_sum + word([3, 3]));
        error
    }

    #[inline(always)]
    fn exchange_addresses<const L2: usize>(ctx: &TcContext, key: &RewriteKey<Self>) -> Result<(), ()> {
        store_bytes(ctx, L2 + 12, &[key.dst, key.src], 8)
    }
}

impl Refuse for Addr6 {
    type Error = Error6;

    #[inline(always)]
    fn error(src: Self, dst: Self, quote_len: u16, quote_sum: u32) -> Error6 {
        let payload_len = (quote_len + 8).to_be_bytes();
        // Destination unreachable, port unreachable (RFC 4443); the checksum covers the pseudo header.
        let sum = src.sum() + dst.sum() + word(payload_len) + word([0, ICMPV6]) + word([1, 4]) + quote_sum;
        Error6 {
            version_class_flow: [0x60, 0, 0, 0],
            payload_len,
            next_header: ICMPV6,
            hop_limit: HOP_LIMIT,
            src,
            dst,
            icmp_type: 1,
            icmp_code: 4,
            icmp_checksum: !checksum::fold(sum),
            unused: [0; 4],
        }
    }

    #[inline(always)]
    fn exchange_addresses<const L2: usize>(ctx: &TcContext, key: &RewriteKey<Self>) -> Result<(), ()> {
        // Two stores: a copy of both through the stack becomes a call to memmove, which the verifier rejects.
        store_bytes(ctx, L2 + 8, &key.dst, 16)?;
        store_bytes(ctx, L2 + 24, &key.src, 16)
    }
}

/// Ones'-complement sum of a quotation, folded. Not longer than it is: the rest is zero.
#[inline(always)]
fn quote_sum(quote: &Quote) -> u32 {
    let first = quote.as_ptr().cast::<u32>();
    let mut sum = 0u64;
    let mut i = 0;
    while i < QUOTE_MAX / 4 {
        // SAFETY: `i` is below the number of words, and all of them were zeroed or loaded.
        sum += u64::from(unsafe { *first.add(i) });
        i += 1;
    }
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    u32::from(checksum::fold(
        (sum & 0xffff) as u32 + ((sum >> 16) & 0xffff) as u32 + (sum >> 32) as u32,
    ))
}

/// Two bytes of a header as a word of a sum.
#[inline(always)]
fn word(bytes: [u8; 2]) -> u32 {
    u32::from(u16::from_ne_bytes(bytes))
}

/// Turns the packet into its own refusal and sends it back; drops it if that is not possible. Returns the verdict.
#[inline(never)]
pub(crate) fn refuse<A: Refuse, const L2: usize, const HOOK: u8>(ctx: &TcContext, packet: &Packet<A>) -> i32 {
    let built = if packet.key.protocol == Protocol::Tcp.number() {
        reset::<A, L2>(ctx, packet)
    } else {
        // SAFETY: this CPU's slot, used by this program run alone (see `Scratch`).
        A::scratch()
            .ok_or(())
            .and_then(|scratch| unreachable::<A, L2>(ctx, packet, unsafe { &mut *scratch }))
    };
    if built.and_then(|()| turn_round::<L2>(ctx)).is_err() {
        maps::count(Reason::RefuseFailed);
        return TC_ACT_SHOT;
    }
    // The node's own packets are answered at the interface they were about to leave by.
    let flags = if HOOK == HOOK_EGRESS {
        u64::from(BPF_F_INGRESS)
    } else {
        0
    };
    // SAFETY: no memory is passed; a context field is read at its declared width.
    unsafe { bpf_redirect((*ctx.skb.skb).ifindex, flags) as i32 }
}

/// Exchanges the hardware addresses.
#[inline(always)]
fn turn_round<const L2: usize>(ctx: &TcContext) -> Result<(), ()> {
    if L2 != ETHERNET {
        return Ok(());
    }
    let [dst, src] = ctx.load::<[[u16; 3]; 2]>(0).map_err(|_errno| ())?;
    store_bytes(ctx, 0, &[src, dst], 12)
}

/// Makes the RST that answers a SYN (RFC 9293 §3.10.7.1): it acknowledges the SYN and has no sequence number.
///
/// The segment keeps its length and options: whether its checksum is complete cannot be seen, so only differences are applied.
/// Exchanging addresses and ports makes none. No option of a SYN means anything in a RST.
#[inline(always)]
fn reset<A: Refuse, const L2: usize>(ctx: &TcContext, packet: &Packet<A>) -> Result<(), ()> {
    const SEQUENCE: usize = 4;
    const CHECKSUM: usize = 16;
    let l4 = packet.l4 as usize;
    let old = ctx.load::<[u32; 3]>(l4 + SEQUENCE).map_err(|_errno| ())?;
    let [data_offset, ..] = old[2].to_ne_bytes();
    let new = [
        0,
        u32::from_be(old[0]).wrapping_add(1).to_be(),
        u32::from_ne_bytes([data_offset & 0xf0, TCP_RST | TCP_ACK, 0, 0]),
    ];
    store_bytes(ctx, l4 + SEQUENCE, &new, 12)?;
    store_bytes(ctx, l4, &[packet.key.dst_port, packet.key.src_port], 4)?;
    A::exchange_addresses::<L2>(ctx, &packet.key)?;
    let delta = checksum::difference(words(old), words(new));
    ctx.l4_csum_replace(l4 + CHECKSUM, 0, u64::from(delta), 0)
        .map_err(|_errno| ())
}

/// Ones'-complement sum of three words.
#[inline(always)]
fn words([a, b, c]: [u32; 3]) -> u32 {
    (a & 0xffff) + (a >> 16) + (b & 0xffff) + (b >> 16) + (c & 0xffff) + (c >> 16)
}

/// Makes the port-unreachable: cuts the packet to what is quoted and puts the new headers before it.
#[inline(always)]
fn unreachable<A: Refuse, const L2: usize>(
    ctx: &TcContext,
    packet: &Packet<A>,
    scratch: &mut Scratch<A>,
) -> Result<(), ()> {
    let quote = &mut scratch.quote;
    let skb = ctx.skb.skb;
    let len = ctx.len() as usize;
    let wanted = if packet.l4 as usize <= L2 + QUOTE_MAX - QUOTE_L4 {
        packet.l4 as usize + QUOTE_L4
    } else {
        L2 + QUOTE_MAX
    };
    let end = if len < wanted { len } else { wanted };
    // The verifier has to see both bounds of this very number. Linux 6.1 does not if the compiler compares `end` instead, or makes
    // one comparison of the two; the black box and the stores between them prevent that. The packet was parsed: an IP header
    // and eight bytes are there.
    let quote_len = core::hint::black_box(end.wrapping_sub(L2));
    if quote_len > QUOTE_MAX {
        return Err(());
    }
    // What a shorter quotation leaves over counts as zero.
    zero(quote);
    if quote_len < 28 {
        return Err(());
    }
    // SAFETY: `quote` has room for `quote_len` bytes, checked above.
    let loaded = unsafe { bpf_skb_load_bytes(skb.cast(), L2 as u32, quote.as_mut_ptr().cast(), quote_len as u32) };
    if loaded != 0 {
        return Err(());
    }
    let quote_sum = quote_sum(quote);
    let error = scratch.error.as_mut_ptr().cast::<A::Error>();
    // SAFETY: there is room for either family's headers.
    unsafe { *error = A::error(packet.key.dst, packet.key.src, quote_len as u16, quote_sum) };

    // SAFETY: lengths are those of the buffers, and every buffer is initialised; a failed call ends the function.
    unsafe {
        if end < len && bpf_skb_change_tail(skb, end as u32, 0) != 0 {
            return Err(());
        }
        if bpf_skb_adjust_room(skb, size_of::<A::Error>() as i32, BPF_ADJ_ROOM_MAC, 0) != 0 {
            return Err(());
        }
        if bpf_skb_store_bytes(skb, L2 as u32, error.cast(), size_of::<A::Error>() as u32, 0) != 0 {
            return Err(());
        }
    }
    Ok(())
}
