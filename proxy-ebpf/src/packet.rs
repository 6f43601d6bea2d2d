//! What the packet programs need to know of a packet: its 5-tuple, where its L4 header starts, and its TCP flags.
//!
//! Headers are read through direct packet access, bounds-checked here and nowhere else. tc programs never write through it:
//! one with direct packet writes begins with a call for every cloned packet, foreign ones included, which copies the headers if somebody
//! else looks at them, and every TCP segment with data that a local pod sends is a clone (numbers in `docs/architecture.md`, "Cost").
//! Writes go through `bpf_skb_store_bytes` (see [`crate::rewrite`]).

use aya_ebpf::programs::{TcContext, XdpContext};
use proxy_common::addr::{Addr4, Addr6, Port, Protocol};
use proxy_common::rewrite::RewriteKey;

use crate::maps::Family;

/// Bytes of an Ethernet header; devices without one use 0.
pub(crate) const ETHERNET: usize = 14;

/// TCP flag bits.
pub(crate) const TCP_FIN: u8 = 0x01;
/// See [`TCP_FIN`].
pub(crate) const TCP_SYN: u8 = 0x02;
/// See [`TCP_FIN`].
pub(crate) const TCP_RST: u8 = 0x04;
/// See [`TCP_FIN`].
pub(crate) const TCP_ACK: u8 = 0x10;

pub(crate) const IPV4_HEADER: usize = 20;
pub(crate) const IPV6_HEADER: usize = 40;
/// Bytes of an L4 header that must be there: UDP's 8; TCP is asked for its flags on top.
pub(crate) const L4_HEADER: usize = 8;
pub(crate) const TCP_HEADER: usize = 20;
/// More-fragments flag and offset of the IPv4 fragment field, in network order.
const IPV4_FRAGMENT: u16 = 0x3fff_u16.to_be();

/// A TCP, UDP or SCTP packet.
pub(crate) struct Packet<A> {
    /// Its 5-tuple at this hook: the key of the rewrite table.
    pub(crate) key: RewriteKey<A>,
    /// Offset of the L4 header from the start of the packet.
    pub(crate) l4: u32,
    /// Header checksum of IPv4 as it stands in the packet; unused for IPv6.
    pub(crate) ip_checksum: u16,
    /// TCP flags; 0 for other protocols.
    pub(crate) tcp_flags: u8,
    /// A fragment other than the first: it has no L4 header, its ports are those that the first one had.
    pub(crate) is_later_fragment: bool,
    /// Not zero if fragments follow this packet. A number that nothing was compared with on the way here, and that SCTP alone looks
    /// at: the verifier need not follow first fragments apart from whole packets.
    pub(crate) more_fragments: u8,
}

impl<A> Packet<A> {
    /// May this packet open a connection: a TCP SYN without ACK, or anything of a protocol without handshake (S59)?
    #[inline(always)]
    pub(crate) fn opens(&self) -> bool {
        !self.is_later_fragment && (self.key.protocol != Protocol::Tcp.number() || self.is_syn())
    }

    /// Is it the first packet of a TCP handshake?
    #[inline(always)]
    pub(crate) fn is_syn(&self) -> bool {
        self.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN
    }
}

/// A context that gives direct access to the bytes of its packet: in tc to the linear part, at XDP to all of them.
pub(crate) trait Bytes {
    /// Address of the first byte.
    fn start(&self) -> usize;
    /// Address behind the last one.
    fn end(&self) -> usize;
}

impl Bytes for TcContext {
    #[inline(always)]
    fn start(&self) -> usize {
        self.data()
    }

    #[inline(always)]
    fn end(&self) -> usize {
        self.data_end()
    }
}

impl Bytes for XdpContext {
    #[inline(always)]
    fn start(&self) -> usize {
        self.data()
    }

    #[inline(always)]
    fn end(&self) -> usize {
        self.data_end()
    }
}

/// The address of `len` readable bytes at `offset`, or `None` if the packet is shorter or they are not in the linear part.
#[inline(always)]
pub(crate) fn linear<T>(ctx: &impl Bytes, offset: usize, len: usize) -> Option<*const T> {
    let start = ctx.start() + offset;
    if start + len > ctx.end() {
        None
    } else {
        Some(start as *const T)
    }
}

/// Reads a value of a header.
///
/// # Safety
/// `base + offset ..` must be inside the range that [`linear`] checked. IP headers start at a multiple of 4 (NET_IP_ALIGN), and
/// the verifier rejects the program on machines where a misaligned access would fault.
#[inline(always)]
pub(crate) unsafe fn field<T: Copy>(base: *const u8, offset: usize) -> T {
    // SAFETY: promised by the caller.
    unsafe { *base.add(offset).cast::<T>() }
}

/// A family's IP header.
pub(crate) trait Headers: Family {
    /// Ethernet protocol number, in host order.
    const ETHERTYPE: u16;
    /// Bytes of the IP header without options.
    const HEADER: usize;
    /// Offset of the destination address in it.
    const DESTINATION: usize;
    /// Offset of the protocol number in it.
    const PROTOCOL: usize;
    /// Does the L4 checksum's update need a flag of its own?
    const IS_V6: bool;

    /// ICMP's protocol number.
    const ICMP: u8;

    /// The packet at a hook, if its headers are the usual ones. Fragments, IPv6 extension headers and ICMP are for
    /// [`crate::unusual`] and [`crate::icmp_error`].
    fn parse<const L2: usize>(ctx: &impl Bytes, hook: u8) -> Option<Packet<Self>>;
}

/// Addresses and the like, read before the L4 header is looked at.
struct Network<A> {
    src: A,
    dst: A,
    protocol: u8,
    checksum: u16,
    l4: usize,
}

#[inline(always)]
fn parse_l4<A: Family>(ctx: &impl Bytes, network: Network<A>, hook: u8) -> Option<Packet<A>> {
    Protocol::from_number(network.protocol)?;
    let ports: *const u8 = linear(ctx, network.l4, L4_HEADER)?;
    // SAFETY: eight bytes are there.
    let (src_port, dst_port): (Port, Port) = unsafe { (field(ports, 0), field(ports, 2)) };
    let mut tcp_flags = 0;
    if network.protocol == Protocol::Tcp.number() {
        let tcp: *const u8 = linear(ctx, network.l4, TCP_HEADER)?;
        // SAFETY: twenty bytes are there.
        tcp_flags = unsafe { field(tcp, 13) };
    }
    Some(Packet {
        key: RewriteKey::new(network.src, src_port, network.dst, dst_port, network.protocol, hook),
        l4: network.l4 as u32,
        ip_checksum: network.checksum,
        tcp_flags,
        is_later_fragment: false,
        more_fragments: 0,
    })
}

impl Headers for Addr4 {
    const ETHERTYPE: u16 = 0x0800;
    const HEADER: usize = IPV4_HEADER;
    const DESTINATION: usize = 16;
    const PROTOCOL: usize = 9;
    const IS_V6: bool = false;
    const ICMP: u8 = 1;

    #[inline(always)]
    fn parse<const L2: usize>(ctx: &impl Bytes, hook: u8) -> Option<Packet<Self>> {
        let ip: *const u8 = linear(ctx, L2, IPV4_HEADER)?;
        // SAFETY: the twenty bytes of an IPv4 header are there.
        let network = unsafe {
            let header_len = usize::from(field::<u8>(ip, 0) & 0x0f) * 4;
            if header_len < IPV4_HEADER || field::<u16>(ip, 6) & IPV4_FRAGMENT != 0 {
                return None;
            }
            Network {
                src: field(ip, 12),
                dst: field(ip, Self::DESTINATION),
                protocol: field(ip, Self::PROTOCOL),
                checksum: field(ip, 10),
                l4: L2 + header_len,
            }
        };
        parse_l4(ctx, network, hook)
    }
}

impl Headers for Addr6 {
    const ETHERTYPE: u16 = 0x86dd;
    const HEADER: usize = IPV6_HEADER;
    const DESTINATION: usize = 24;
    const PROTOCOL: usize = 6;
    const IS_V6: bool = true;
    const ICMP: u8 = 58;

    #[inline(always)]
    fn parse<const L2: usize>(ctx: &impl Bytes, hook: u8) -> Option<Packet<Self>> {
        let ip: *const u8 = linear(ctx, L2, IPV6_HEADER)?;
        // SAFETY: the forty bytes of an IPv6 header are there.
        let network = unsafe {
            Network {
                src: field(ip, 8),
                dst: field(ip, Self::DESTINATION),
                protocol: field(ip, Self::PROTOCOL),
                checksum: 0,
                l4: L2 + IPV6_HEADER,
            }
        };
        parse_l4(ctx, network, hook)
    }
}

/// Makes sure that the headers can be read directly. Most drivers put them into the linear part, and so does a local sender: for those
/// nothing is called, because a pull also copies the whole linear part of a packet that is a clone, as every TCP segment of a local
/// pod is, which costs more than all the rest. For the others, one call: the largest IPv4 header and a TCP header are asked for, or
/// the whole of a shorter packet. Options that are not in the linear part are for [`crate::unusual`].
#[inline(always)]
pub(crate) fn make_linear<A: Headers, const L2: usize>(ctx: &TcContext) {
    const WANTED: u32 = (ETHERNET + 60 + TCP_HEADER) as u32;
    let len = ctx.len();
    let wanted = if len < WANTED { len } else { WANTED };
    if ctx.data() + L2 + A::HEADER + TCP_HEADER > ctx.data_end() && ctx.data() + wanted as usize > ctx.data_end() {
        // A failure (out of memory) leaves the packet as it is; parsing then says "not ours".
        let _unchanged = ctx.pull_data(wanted);
    }
}
