//! Forwarding at XDP, before the kernel makes anything of a packet: established connections to endpoints elsewhere, both
//! directions, on the network cards that the configuration names.
//!
//! What leaves here has had done to it what `tc_ingress`, the kernel's forwarding and `tc_egress` would have done: the entries of
//! both hooks are applied in one step, and both are kept alive and counted as they are there. Everything else goes on to tc as it
//! came. So nothing is written before everything is decided.
//!
//! The rewrite table and the kernel's routes are the only source of truth. What they said of a flow counts for a moment
//! ([`clock::moment`]), because asking the routes costs several times what all the rest does.
//!
//! Only masqueraded connections, because their replies come back through here. Of another connection netfilter would see the
//! replies alone, which its connection tracking takes for invalid. Packets with SYN are tc's: they open connections, and each side's
//! answer has the stack look for its neighbour.

use core::mem::MaybeUninit;

use aya_ebpf::bindings::xdp_action::{XDP_PASS, XDP_REDIRECT, XDP_TX};
use aya_ebpf::bindings::{BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup, xdp_md};
use aya_ebpf::helpers::{bpf_fib_lookup as fib_lookup, bpf_jiffies64, bpf_redirect};
use aya_ebpf::programs::XdpContext;
use proxy_common::addr::{Addr4, Addr6, Port, Protocol};
use proxy_common::link::LINK_XDP;
use proxy_common::reason::XDP_FORWARDED;
use proxy_common::rewrite::{HOOK_EGRESS, HOOK_INGRESS, REWRITE_MASQUERADED, Rewrite, RewriteKey};
use proxy_common::{checksum, clock, names};

use crate::maps::{self, LINKS};
use crate::packet::{ETHERNET, Headers, L4_HEADER, Packet, TCP_FIN, TCP_HEADER, TCP_RST, TCP_SYN, field, linear};
use crate::rewrite::{self, TCP_CHECKSUM, UDP_CHECKSUM};
use crate::route::{self, Route, Words};

/// Offset of the type in an Ethernet header.
const ETHERTYPE: usize = 12;
/// What a time to live of one less adds to the sum of an IPv4 header.
const TTL_DELTA: u16 = checksum::difference(u16::from_ne_bytes([1, 0]) as u32, 0);

// An entry starts as an IPv6 header goes on after its first eight bytes, and an IPv4 header after its first twelve: addresses, then
// the ports of L4. So it is stored as it is, word by word.
const _: () = {
    assert!(core::mem::offset_of!(Rewrite<Addr4>, dst) == 4);
    assert!(core::mem::offset_of!(Rewrite<Addr4>, src_port) == 8);
    assert!(core::mem::offset_of!(Rewrite<Addr6>, dst) == 16);
    assert!(core::mem::offset_of!(Rewrite<Addr6>, src_port) == 32);
    assert!(core::mem::offset_of!(Path<Addr4>, src_port) == 8);
    assert!(core::mem::offset_of!(Path<Addr6>, src_port) == 32);
};

/// The entry point: the program's verdict.
#[inline(always)]
pub(crate) fn run(ctx: &XdpContext) -> u32 {
    let Some(ethertype) = linear::<u16>(ctx, ETHERTYPE, 2) else {
        return XDP_PASS;
    };
    // SAFETY: two bytes are there.
    let ethertype = u16::from_be(unsafe { *ethertype });
    let verdict = if ethertype == Addr4::ETHERTYPE {
        forward::<Addr4>(ctx)
    } else if ethertype == Addr6::ETHERTYPE {
        forward::<Addr6>(ctx)
    } else {
        None
    };
    verdict.unwrap_or(XDP_PASS)
}

/// What forwarding needs to know of an IP header.
struct Ip {
    /// Length of the whole packet as the header says it, which leaves out what pads a short frame.
    len: u16,
    /// Type of service without its last two bits, which routers change on the way, or the flow label's word without them: as a
    /// route look-up wants it.
    class: u32,
}

/// What was found out about a flow, valid for a moment: the look-ups of a packet that comes soon after are saved. In a slot of this CPU,
/// which a flow keeps to.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Path<A> {
    /// How its packets leave: addresses, then ports, as they stand in a packet.
    src: A,
    dst: A,
    src_port: Port,
    dst_port: Port,
    /// As its packets come: the key of the ingress hook, interface and class, and the hardware address that they are sent to.
    key: RewriteKey<A>,
    here: u32,
    class: u32,
    own: Mac,
    /// The next hop, the interface towards it and what fits that.
    smac: Mac,
    dmac: Mac,
    mtu: u16,
    out: u32,
    /// Sums of both entries' checksum differences.
    addrs: u32,
    ports: u32,
    /// Service and kind of both entries, for the counters.
    services: [u32; 2],
    kinds: [u8; 2],
    /// Nothing.
    pad: [u8; 2],
    /// When it was found out; 0: it was not, or holds no more.
    moment: u32,
}

/// A hardware address in parts that compare without a call.
type Mac = [u16; 3];

/// A family's part of forwarding.
trait Forward: Route {
    /// An address as one word.
    fn mix(&self) -> u32;
    /// Reads the header if the packet may be forwarded: without options, complete, and with a hop left.
    fn ip(ctx: &XdpContext) -> Option<Ip>;
    /// One hop less, and the header's checksum for that and for addresses that differ by `delta`.
    ///
    /// # Safety
    /// `header` points to the bytes of an IP header without options that has a hop left.
    unsafe fn pass_hop(header: *mut u8, delta: u32);
}

impl Forward for Addr4 {
    #[inline(always)]
    fn mix(&self) -> u32 {
        bytemuck::cast(*self)
    }

    #[inline(always)]
    fn ip(ctx: &XdpContext) -> Option<Ip> {
        let header: *const u8 = linear(ctx, ETHERNET, Self::HEADER)?;
        // SAFETY: the twenty bytes of an IPv4 header are there.
        let (version, class, len, ttl): (u8, u8, u16, u8) =
            unsafe { (field(header, 0), field(header, 1), field(header, 2), field(header, 8)) };
        (version == 0x45 && ttl > 1).then_some(Ip {
            len: u16::from_be(len),
            class: u32::from(class & 0xfc),
        })
    }

    #[inline(always)]
    unsafe fn pass_hop(header: *mut u8, delta: u32) {
        // SAFETY: promised by the caller.
        unsafe {
            *header.add(8) -= 1;
            let sum = header.add(10).cast::<u16>();
            *sum = update(*sum, delta + u32::from(TTL_DELTA));
        }
    }
}

impl Forward for Addr6 {
    #[inline(always)]
    fn mix(&self) -> u32 {
        let [a, b, c, d]: [u32; 4] = bytemuck::cast(*self);
        a ^ b ^ c ^ d
    }

    #[inline(always)]
    fn ip(ctx: &XdpContext) -> Option<Ip> {
        let header: *const u8 = linear(ctx, ETHERNET, Self::HEADER)?;
        // SAFETY: the forty bytes of an IPv6 header are there.
        let (class, payload, hops): (u32, u16, u8) = unsafe { (field(header, 0), field(header, 4), field(header, 7)) };
        let len = u16::from_be(payload).checked_add(Self::HEADER as u16)?;
        (u32::from_be(class) >> 28 == 6 && hops > 1).then_some(Ip {
            len,
            class: class & u32::to_be(0x0fcf_ffff),
        })
    }

    #[inline(always)]
    unsafe fn pass_hop(header: *mut u8, _delta: u32) {
        // SAFETY: promised by the caller.
        unsafe { *header.add(7) -= 1 };
    }
}

/// A checksum field after changes whose differences add up to `delta`.
#[inline(always)]
fn update(field: u16, delta: u32) -> u16 {
    !checksum::fold(u32::from(!field) + delta)
}

/// Forwards the packet if that can be done here; `None` is for tc, and the packet is as it was.
#[inline(always)]
fn forward<A: Forward>(ctx: &XdpContext) -> Option<u32> {
    let packet = A::parse::<ETHERNET>(ctx, HOOK_INGRESS)?;
    let protocol = packet.key.protocol;
    let is_tcp = protocol == Protocol::Tcp.number();
    let ip = A::ip(ctx)?;
    let l4_len = if is_tcp { TCP_HEADER } else { L4_HEADER };
    let frame_len = ctx.data_end() - ctx.data();
    if usize::from(ip.len) < A::HEADER + l4_len || usize::from(ip.len) + ETHERNET > frame_len {
        return None;
    }
    // SAFETY: the slot is this CPU's, used by this program run alone: XDP programs run with soft interrupts off.
    let path = unsafe { &mut *A::path(slot(&packet.key))? };
    // SAFETY: a context field, read at its declared width.
    let here = unsafe { (*ctx.ctx).ingress_ifindex };
    // SAFETY: the helper has no arguments and no preconditions.
    let moment = clock::moment(unsafe { bpf_jiffies64() });
    let frame: *const u8 = linear(ctx, 0, ETHERNET)?;
    // SAFETY: an Ethernet header is there.
    let to: Mac = unsafe { [field(frame, 0), field(frame, 2), field(frame, 4)] };
    let is_known = path.moment == moment
        && packet.tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST) == 0
        && path.key == packet.key
        && path.here == here
        && path.class == ip.class
        && path.mtu >= ip.len
        && is_mac(&path.own, &to);
    if !is_known && !find(ctx.ctx, &packet, &ip, &Arrival { here, to, moment }, path) {
        return None;
    }

    let frame = linear::<u8>(ctx, 0, ETHERNET + A::HEADER + L4_HEADER)?.cast_mut();
    let l4 = ETHERNET + A::HEADER;
    let delta = path.addrs + path.ports;
    if is_tcp {
        let sum = linear::<u16>(ctx, l4 + TCP_CHECKSUM as usize, 2)?.cast_mut();
        // SAFETY: two bytes are there.
        unsafe { *sum = update(*sum, delta) };
    } else if protocol == Protocol::Udp.number() {
        // SAFETY: `frame` has room for the first eight bytes of L4.
        unsafe {
            let sum = frame.add(l4 + UDP_CHECKSUM as usize).cast::<u16>();
            // Zero means "none" and stays (RFC 768); a computed zero becomes 0xffff.
            if *sum != 0 {
                let new = update(*sum, delta);
                *sum = if new == 0 { u16::MAX } else { new };
            }
        }
    }
    // SAFETY: `frame` has room for Ethernet, the IP header and eight bytes of L4; there is a hop left (`Forward::ip`).
    unsafe {
        A::pass_hop(frame.add(ETHERNET), path.addrs);
        let tuple = frame.add(l4 - 2 * A::LEN);
        copy::<u32>(core::ptr::from_ref(path).cast(), tuple, A::LEN / 2 + 1);
        copy::<u16>(path.dmac.as_ptr().cast(), frame, 3);
        copy::<u16>(path.smac.as_ptr().cast(), frame.add(6), 3);
    }
    let [arrived, left] = path.services;
    // At the ingress hook the length is the frame's; behind it the stack has cut off what pads it.
    maps::count_packet(arrived, path.kinds[0], (frame_len - ETHERNET) as u32);
    maps::count_packet(left, path.kinds[1], u32::from(ip.len));
    maps::count_slot(XDP_FORWARDED);
    if path.out == here {
        return Some(XDP_TX);
    }
    // SAFETY: without flags it only notes the interface.
    unsafe { bpf_redirect(path.out, 0) };
    Some(XDP_REDIRECT)
}

/// By which interface, to which hardware address and when a packet came.
struct Arrival {
    here: u32,
    to: Mac,
    moment: u32,
}

/// Finds out how the packet leaves, notes in both entries that it went through them, and leaves it in `path`; false is for tc. Out of the
/// way of the others.
#[inline(never)]
fn find<A: Forward>(ctx: *mut xdp_md, packet: &Packet<A>, ip: &Ip, arrival: &Arrival, path: &mut Path<A>) -> bool {
    look_up(&XdpContext::new(ctx), packet, ip, arrival, path).is_some()
}

#[inline(always)]
fn look_up<A: Forward>(
    ctx: &XdpContext,
    packet: &Packet<A>,
    ip: &Ip,
    arrival: &Arrival,
    path: &mut Path<A>,
) -> Option<()> {
    let ends = packet.tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST);
    if ends != 0 && path.key == packet.key {
        // The tuple may be another connection's at once.
        path.moment = 0;
    }
    if ends & TCP_SYN != 0 {
        return None;
    }
    let arrived = A::rewrite(&packet.key)?;
    // SAFETY: the slot stays allocated while the program runs, and what is read does not change after it was written.
    let inward = unsafe { &*arrived };
    // As the packet is routed, and seen by the egress hook.
    let routed = RewriteKey::new(
        inward.src,
        inward.src_port,
        inward.dst,
        inward.dst_port,
        packet.key.protocol,
        HOOK_EGRESS,
    );
    let leaving = A::rewrite(&routed)?;
    // SAFETY: as above.
    let outward = unsafe { &*leaving };
    // One of the two has this flag, the other none: every other flag is for the stack.
    if inward.flags | outward.flags != REWRITE_MASQUERADED {
        return None;
    }
    let ports = u32::from(inward.port_delta) + u32::from(outward.port_delta);
    // SCTP's CRC32c is over the whole packet; addresses are not in it (S195).
    if packet.key.protocol == Protocol::Sctp.number() && ports != 0 {
        return None;
    }
    let mut words = MaybeUninit::uninit();
    let hop = next_hop(ctx, &routed, ip, arrival, &mut words)?;
    // SAFETY: sources and destinations are values of these sizes, and plain old data.
    unsafe {
        let tuple = core::ptr::from_mut(path).cast();
        copy::<u32>(core::ptr::from_ref(outward).cast(), tuple, A::LEN / 2 + 1);
        let key = core::ptr::addr_of_mut!(path.key).cast();
        copy::<u32>(
            core::ptr::from_ref(&packet.key).cast(),
            key,
            size_of::<RewriteKey<A>>() / 4,
        );
        copy::<u16>(hop.smac.as_ptr(), path.smac.as_mut_ptr().cast(), 3);
        copy::<u16>(hop.dmac.as_ptr(), path.dmac.as_mut_ptr().cast(), 3);
        copy::<u16>(arrival.to.as_ptr().cast(), path.own.as_mut_ptr().cast(), 3);
        // What fits the route, once the look-up succeeded.
        path.mtu = hop.__bindgen_anon_1.mtu_result;
    }
    path.here = arrival.here;
    path.class = ip.class;
    path.out = hop.ifindex;
    path.addrs = u32::from(inward.addr_delta) + u32::from(outward.addr_delta);
    path.ports = ports;
    path.services = [inward.service, outward.service];
    path.kinds = [inward.kind, outward.kind];
    // Ends are noted one by one.
    path.moment = if ends == 0 { arrival.moment } else { 0 };
    let now = rewrite::now();
    rewrite::touch(arrived, packet.tcp_flags, now);
    rewrite::touch(leaving, packet.tcp_flags, now);
    Some(())
}

/// The slot of a flow. Two that share one are looked up for every packet.
#[inline(always)]
fn slot<A: Forward>(key: &RewriteKey<A>) -> u32 {
    const BITS: u32 = (names::PATHS_CAPACITY as u32).trailing_zeros();
    let ports: u32 = bytemuck::cast([key.src_port, key.dst_port]);
    // The golden ratio of 2^32: high bits depend on all of the others.
    let mixed = (A::mix(&key.src) ^ A::mix(&key.dst).rotate_left(16) ^ ports).wrapping_mul(0x9e37_79b1);
    mixed >> (u32::BITS - BITS)
}

/// Asks for the next hop of a packet. `None` if that is not out of an interface to a known neighbour: to this node itself or a pod on it, a packet that is too large, a tunnel.
#[inline(always)]
fn next_hop<'a, A: Route>(
    ctx: &XdpContext,
    routed: &RewriteKey<A>,
    ip: &Ip,
    arrival: &Arrival,
    words: &'a mut Words,
) -> Option<&'a bpf_fib_lookup> {
    route::zero(words);
    // SAFETY: plain old data of the same size and smaller alignment, for which all zero is "unset".
    let params = unsafe { &mut *words.as_mut_ptr().cast::<bpf_fib_lookup>() };
    A::fib(params, &routed.src, &routed.dst);
    params.l4_protocol = routed.protocol;
    params.sport = bytemuck::cast::<Port, u16>(routed.src_port);
    params.dport = bytemuck::cast::<Port, u16>(routed.dst_port);
    params.__bindgen_anon_1.tot_len = ip.len;
    params.__bindgen_anon_2.flowinfo = ip.class;
    params.ifindex = arrival.here;
    // SAFETY: `params` is initialised and its size is given.
    let result = unsafe {
        fib_lookup(
            ctx.ctx.cast(),
            core::ptr::from_mut(params),
            size_of::<bpf_fib_lookup>() as i32,
            0,
        )
    };
    if result != i64::from(BPF_FIB_LKUP_RET_SUCCESS) {
        return None;
    }
    // What is addressed to another machine is not for us, though a promiscuous interface shows it.
    let own = if params.ifindex == arrival.here {
        mac(&params.smac)
    } else {
        // SAFETY: the agent replaces values as a whole; of each, words are read at once.
        let (out, here) = unsafe { (LINKS.get(params.ifindex)?, LINKS.get(arrival.here)?) };
        if out.flags & LINK_XDP == 0 {
            return None;
        }
        mac(&here.mac)
    };
    is_mac(&own, &arrival.to).then_some(params)
}

#[inline(always)]
fn mac(bytes: &[u8; 6]) -> Mac {
    // SAFETY: six bytes are there; `field` asks for no more.
    unsafe { [0, 2, 4].map(|at| field(bytes.as_ptr(), at)) }
}

/// Are two hardware addresses the same? By parts: comparing the whole would become a call to `bcmp`, which does not exist here.
#[inline(always)]
fn is_mac(a: &Mac, b: &Mac) -> bool {
    (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) == 0
}

/// Copies values one by one: a copy of the whole may become a call to `memcpy`, which the verifier rejects.
///
/// # Safety
/// There is room for `count` values at both, and they do not overlap.
#[inline(always)]
unsafe fn copy<T: Copy>(from: *const u8, to: *mut u8, count: usize) {
    let (from, to) = (from.cast::<T>(), to.cast::<T>());
    let mut i = 0;
    while i < count {
        // SAFETY: promised by the caller.
        unsafe { to.add(i).write_volatile(from.add(i).read_volatile()) };
        i += 1;
    }
}
