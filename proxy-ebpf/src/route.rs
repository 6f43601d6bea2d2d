//! Questions to the node's routing and sockets, asked only for new connections, and the two ways a packet leaves its path: out by
//! another route, or in at another interface.

use aya_ebpf::bindings::{
    __sk_buff, BPF_F_CURRENT_NETNS, BPF_F_INGRESS, BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH,
    BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup, bpf_sock_tuple,
};
use aya_ebpf::helpers::{
    bpf_fib_lookup as fib_lookup, bpf_redirect, bpf_redirect_neigh, bpf_sk_lookup_tcp, bpf_sk_lookup_udp,
    bpf_sk_release, bpf_skb_store_bytes,
};
use proxy_common::addr::{Addr4, Addr6, Protocol};
use proxy_common::link::{LINK_NO_ETHERNET, Link};
use proxy_common::rewrite::RewriteKey;

use crate::maps::LINKS;
use crate::packet::ETHERNET;
use crate::rewrite::Store;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Where a packet goes from here.
pub(crate) enum Routed {
    /// Out by this interface.
    Forward(u32),
    /// To this node itself, or nowhere: the stack decides.
    Stack,
}

/// Scratch room for the parameters of a route look-up, or the smaller tuple of a socket look-up.
pub(crate) type Words = core::mem::MaybeUninit<[u64; size_of::<bpf_fib_lookup>() / 8]>;
const _: () = assert!(size_of::<bpf_sock_tuple>() <= size_of::<Words>());

/// The family's part of routing and socket look-ups.
pub(crate) trait Route: Store {
    /// Fills in the addresses of a route look-up.
    fn fib(params: &mut bpf_fib_lookup, src: &Self, dst: &Self);
    /// Fills in the tuple of a packet; returns how many bytes of it count.
    fn socket_tuple(tuple: &mut bpf_sock_tuple, key: &RewriteKey<Self>) -> u32;

    /// The route of a packet that arrived here, or leaves from here, with these addresses.
    #[inline(always)]
    fn route(skb: *mut __sk_buff, src: &Self, dst: &Self, words: &mut Words) -> Routed {
        zero(words);
        // SAFETY: plain old data of the same size and smaller alignment, for which all zero is "unset".
        let params = unsafe { &mut *words.as_mut_ptr().cast::<bpf_fib_lookup>() };
        Self::fib(params, src, dst);
        // SAFETY: a context field, read at its declared width.
        params.ifindex = unsafe { (*skb).ifindex };
        // SAFETY: `params` is initialised and its size is given.
        let result = unsafe {
            fib_lookup(
                skb.cast(),
                core::ptr::from_mut(params),
                size_of::<bpf_fib_lookup>() as i32,
                0,
            )
        };
        // Without a neighbour entry the stack (or bpf_redirect_neigh) resolves it. A packet that is too large for the interface
        // tells nothing about the route: the stack fragments it, or complains to its sender (S152, S153).
        if result == i64::from(BPF_FIB_LKUP_RET_SUCCESS)
            || result == i64::from(BPF_FIB_LKUP_RET_NO_NEIGH)
            || result == i64::from(BPF_FIB_LKUP_RET_FRAG_NEEDED)
        {
            Routed::Forward(params.ifindex)
        } else {
            Routed::Stack
        }
    }

    /// Does a socket of this node receive packets with this tuple (S121)?
    #[inline(always)]
    fn has_socket(skb: *mut __sk_buff, key: &RewriteKey<Self>, words: &mut Words) -> bool {
        zero(words);
        let tuple: *mut bpf_sock_tuple = words.as_mut_ptr().cast();
        // SAFETY: zeroed plain old data.
        let size = Self::socket_tuple(unsafe { &mut *tuple }, key);
        // SAFETY: the tuple is initialised and its size is given; a socket that is found is released below.
        let socket = unsafe {
            if key.protocol == Protocol::Tcp.number() {
                bpf_sk_lookup_tcp(skb.cast(), tuple, size, BPF_F_CURRENT_NETNS as u64, 0)
            } else if key.protocol == Protocol::Udp.number() {
                bpf_sk_lookup_udp(skb.cast(), tuple, size, BPF_F_CURRENT_NETNS as u64, 0)
            } else {
                return false;
            }
        };
        if socket.is_null() {
            return false;
        }
        // SAFETY: the reference was taken just above and is given back once.
        unsafe { bpf_sk_release(socket.cast()) };
        true
    }
}

impl Route for Addr4 {
    #[inline(always)]
    fn fib(params: &mut bpf_fib_lookup, src: &Self, dst: &Self) {
        params.family = AF_INET;
        params.__bindgen_anon_3.ipv4_src = bytemuck::cast(*src);
        params.__bindgen_anon_4.ipv4_dst = bytemuck::cast(*dst);
    }

    #[inline(always)]
    fn socket_tuple(tuple: &mut bpf_sock_tuple, key: &RewriteKey<Self>) -> u32 {
        tuple.__bindgen_anon_1.ipv4.saddr = bytemuck::cast(key.src);
        tuple.__bindgen_anon_1.ipv4.daddr = bytemuck::cast(key.dst);
        tuple.__bindgen_anon_1.ipv4.sport = bytemuck::cast(key.src_port);
        tuple.__bindgen_anon_1.ipv4.dport = bytemuck::cast(key.dst_port);
        12
    }
}

impl Route for Addr6 {
    #[inline(always)]
    fn fib(params: &mut bpf_fib_lookup, src: &Self, dst: &Self) {
        params.family = AF_INET6;
        copy_words(src, core::ptr::addr_of_mut!(params.__bindgen_anon_3).cast());
        copy_words(dst, core::ptr::addr_of_mut!(params.__bindgen_anon_4).cast());
    }

    #[inline(always)]
    fn socket_tuple(tuple: &mut bpf_sock_tuple, key: &RewriteKey<Self>) -> u32 {
        copy_words(&key.src, core::ptr::addr_of_mut!(tuple.__bindgen_anon_1).cast());
        copy_words(
            &key.dst,
            core::ptr::addr_of_mut!(tuple.__bindgen_anon_1)
                .cast::<u32>()
                .wrapping_add(4),
        );
        tuple.__bindgen_anon_1.ipv6.sport = bytemuck::cast(key.src_port);
        tuple.__bindgen_anon_1.ipv6.dport = bytemuck::cast(key.dst_port);
        36
    }
}

/// Zeroes words one by one: an ordinary assignment of this size becomes a call to memset, which the verifier rejects.
#[inline(always)]
pub(crate) fn zero<const N: usize>(words: &mut core::mem::MaybeUninit<[u64; N]>) {
    let first = words.as_mut_ptr().cast::<u64>();
    let mut i = 0;
    while i < N {
        // SAFETY: `i` is below the number of words.
        unsafe { first.add(i).write_volatile(0) };
        i += 1;
    }
}

/// Copies an address word by word: a copy of the whole becomes a call to memmove, which the verifier rejects, and one through
/// locals is spilled to the stack. `to` has room for it and is aligned to 4.
#[inline(always)]
fn copy_words(from: &Addr6, to: *mut u32) {
    let from = core::ptr::from_ref(from).cast::<u32>();
    let mut i = 0;
    while i < 4 {
        // SAFETY: `i` is below the number of words of both; an address is aligned to 4.
        unsafe { to.add(i).write_volatile(from.add(i).read_volatile()) };
        i += 1;
    }
}

/// Sends a packet out by `ifindex`; the kernel fills in the next hop's hardware address. Returns the program's verdict.
#[inline(always)]
pub(crate) fn send(ifindex: u32) -> i32 {
    // SAFETY: no parameters are passed, which asks for a look-up of the next hop.
    unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) as i32 }
}

/// Hands a packet to the ingress of `ifindex`, as if it had arrived there. `None` if that cannot be done and the packet had
/// better stay on its path: the interface is unknown, or needs an Ethernet header that the packet has not.
#[inline(always)]
pub(crate) fn arrive<const L2: usize>(skb: *mut __sk_buff, ifindex: u32) -> Option<i32> {
    // SAFETY: the agent replaces values as a whole, and it is copied out at once.
    let link: Link = unsafe { LINKS.get(ifindex).copied() }?;
    if link.flags & LINK_NO_ETHERNET == 0 {
        if L2 != ETHERNET {
            return None;
        }
        // Addressed to anybody else, the stack would take it for a neighbour's packet and drop it.
        // SAFETY: six initialised bytes.
        let stored = unsafe { bpf_skb_store_bytes(skb, 0, link.mac.as_ptr().cast(), 6, 0) };
        if stored != 0 {
            return None;
        }
    }
    // SAFETY: no memory is passed.
    Some(unsafe { bpf_redirect(ifindex, u64::from(BPF_F_INGRESS)) as i32 })
}
