//! Translation at the socket: no cost per packet, and the way the node's own processes reach services.
//!
//! Only what can be done exactly is done here; everything else is left untouched for the packet programs:
//! * TCP: the destination of `connect` becomes a backend, once. With `SOCKET_PODS` for pods as well, but for those whose cgroup is in
//!   `SOCKET_OPT_OUT`: something inside the pod wants to see the address that is dialled.
//! * UDP without `connect`: every `sendmsg` is translated, a flow stays with its backend while that serves (S141, S145).
//! * UDP with `connect`: left alone. Nothing is called when such a socket sends, so it would stay with a backend that is gone. (But
//!   for an IPv4 destination in an AF_INET6 socket: the kernel hands its sends on as if they named their destination.) From the
//!   node to an address of the node itself there is no such way: those packets use the loopback interface, which no packet program
//!   sees. So the socket is connected to the service's cluster IP instead, or to a backend where that is not the same.
//! * UDP of pods: left alone, for the same reason and because their sockets may be unconnected one moment and connected the next.
//! * Node ports at the loopback address (S90): of the node alone, and not if the socket is bound to an address, since nobody else
//!   takes packets from 127.0.0.1.
//!
//! An IPv4 destination in an AF_INET6 socket (`::ffff:a.b.c.d`) is IPv4 throughout, its storage included: the kernel calls the
//! IPv4 hook for its sendmsg and the IPv6 hook for everything else.

use core::mem::MaybeUninit;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_sock;
use aya_ebpf::helpers::{bpf_get_current_ancestor_cgroup_id, bpf_get_netns_cookie, bpf_set_retval};
use aya_ebpf::programs::SockAddrContext;
use proxy_common::addr::{Addr4, Addr6, MAPPED_PREFIX, Port, Protocol};
use proxy_common::backend::Backend;
use proxy_common::counters::BY_SOCKET;
use proxy_common::frontend::{FRONTEND_LOCAL, FRONTEND_SOURCE_RANGES, Frontend, FrontendKey, Origin};
use proxy_common::link::{NODE_ADDR_NODE_PORTS, NODE_ADDR_SOCKETS};
use proxy_common::reason::Reason;
use proxy_common::socket::{ANY_OPTED_OUT, CGROUP_LEVELS, SOCKET_FLOWS, SocketFlow, SocketFlows};

use crate::maps::{self, Family, HAVE_SET_RETVAL, HOST_NETNS, MASQUERADE_ALL, SOCKET_OPT_OUT, SOCKET_PODS};
use crate::service::{self, Lookup};
use crate::trace;

/// The system call goes on, with the address as it now stands in the context.
const PROCEED: i32 = 1;
/// The system call fails.
const FAIL: i32 = 0;
const ECONNREFUSED: i32 = 111;

/// A hook's context, seen as one family. Context fields are read and written one word at a time, at their declared width: the
/// verifier rejects anything else.
pub(crate) trait Context {
    /// Family of the destination.
    type Addr: Family;
    /// The kernel's context.
    fn ctx(&self) -> &SockAddrContext;
    /// Destination of connect and sendmsg, source of recvmsg, peer of getpeername.
    fn addr(&self) -> Self::Addr;
    /// Replaces it.
    fn set_addr(&self, addr: Self::Addr);
    /// Has the socket a source address already?
    fn is_bound(&self) -> bool;

    /// Its port.
    #[inline(always)]
    fn port(&self) -> Port {
        // SAFETY: a context field, read at its declared width; its low half holds the port in network order.
        let port = unsafe { core::ptr::addr_of!((*self.ctx().sock_addr).user_port).read_volatile() };
        bytemuck::cast(port as u16)
    }

    /// Replaces the port.
    #[inline(always)]
    fn set_port(&self, port: Port) {
        let port: u16 = bytemuck::cast(port);
        // SAFETY: as in `port`.
        unsafe { core::ptr::addr_of_mut!((*self.ctx().sock_addr).user_port).write_volatile(u32::from(port)) };
    }
}

/// The context of an IPv4 hook.
pub(crate) struct Ipv4(pub(crate) SockAddrContext);
/// The context of an IPv6 hook with an IPv6 address.
struct Ipv6(SockAddrContext);
/// The context of an IPv6 hook with an IPv4-mapped address.
struct Mapped(SockAddrContext);

impl Context for Ipv4 {
    type Addr = Addr4;

    #[inline(always)]
    fn ctx(&self) -> &SockAddrContext {
        &self.0
    }

    #[inline(always)]
    fn addr(&self) -> Addr4 {
        // SAFETY: a context field, read at its declared width.
        bytemuck::cast(unsafe { core::ptr::addr_of!((*self.0.sock_addr).user_ip4).read_volatile() })
    }

    #[inline(always)]
    fn set_addr(&self, addr: Addr4) {
        // SAFETY: a context field, written at its declared width.
        unsafe { core::ptr::addr_of_mut!((*self.0.sock_addr).user_ip4).write_volatile(bytemuck::cast(addr)) };
    }

    #[inline(always)]
    fn is_bound(&self) -> bool {
        is_bound4(&self.0)
    }
}

/// Word `i` of an IPv6 hook's address.
#[inline(always)]
fn word(ctx: &SockAddrContext, i: usize) -> u32 {
    // SAFETY: a context field, read at its declared width; callers use 0..4.
    unsafe {
        core::ptr::addr_of!((*ctx.sock_addr).user_ip6)
            .cast::<u32>()
            .add(i)
            .read_volatile()
    }
}

#[inline(always)]
fn set_word(ctx: &SockAddrContext, i: usize, word: u32) {
    // SAFETY: a context field, written at its declared width; callers use 0..4.
    unsafe {
        core::ptr::addr_of_mut!((*ctx.sock_addr).user_ip6)
            .cast::<u32>()
            .add(i)
            .write_volatile(word)
    };
}

impl Context for Ipv6 {
    type Addr = Addr6;

    #[inline(always)]
    fn ctx(&self) -> &SockAddrContext {
        &self.0
    }

    #[inline(always)]
    fn addr(&self) -> Addr6 {
        bytemuck::cast([word(&self.0, 0), word(&self.0, 1), word(&self.0, 2), word(&self.0, 3)])
    }

    #[inline(always)]
    fn set_addr(&self, addr: Addr6) {
        let [a, b, c, d]: [u32; 4] = bytemuck::cast(addr);
        set_word(&self.0, 0, a);
        set_word(&self.0, 1, b);
        set_word(&self.0, 2, c);
        set_word(&self.0, 3, d);
    }

    #[inline(always)]
    fn is_bound(&self) -> bool {
        // SAFETY: the context's socket is never null in these hooks, and the fields are read at their declared width.
        unsafe {
            let source = core::ptr::addr_of!((*socket(&self.0)).src_ip6).cast::<u32>();
            source.read_volatile() != 0
                || source.add(1).read_volatile() != 0
                || source.add(2).read_volatile() != 0
                || source.add(3).read_volatile() != 0
        }
    }
}

impl Context for Mapped {
    type Addr = Addr4;

    #[inline(always)]
    fn ctx(&self) -> &SockAddrContext {
        &self.0
    }

    #[inline(always)]
    fn addr(&self) -> Addr4 {
        bytemuck::cast(word(&self.0, 3))
    }

    #[inline(always)]
    fn set_addr(&self, addr: Addr4) {
        set_word(&self.0, 3, bytemuck::cast(addr));
    }

    #[inline(always)]
    fn is_bound(&self) -> bool {
        is_bound4(&self.0)
    }
}

/// The context's socket.
#[inline(always)]
fn socket(ctx: &SockAddrContext) -> *const bpf_sock {
    // SAFETY: a context field, read at its declared width.
    unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk }
}

/// Has a socket that dials an IPv4 address a source address already?
#[inline(always)]
fn is_bound4(ctx: &SockAddrContext) -> bool {
    // SAFETY: the context's socket is never null in these hooks, and the field is read at its declared width.
    unsafe { core::ptr::addr_of!((*socket(ctx)).src_ip4).read_volatile() != 0 }
}

/// Does the context of an IPv6 hook hold an IPv4-mapped address?
#[inline(always)]
fn is_mapped(ctx: &SockAddrContext) -> bool {
    let [a, b, c]: [u32; 3] = bytemuck::cast(MAPPED_PREFIX);
    word(ctx, 0) == a && word(ctx, 1) == b && word(ctx, 2) == c
}

/// Runs `$hook` with the context of an IPv6 hook as the family of its address.
macro_rules! by_family {
    ($name:ident, $hook:ident) => {
        #[doc = concat!("[`", stringify!($hook), "`] for an IPv6 hook.")]
        #[inline(always)]
        pub(crate) fn $name(ctx: SockAddrContext) -> i32 {
            if is_mapped(&ctx) {
                $hook(&Mapped(ctx))
            } else {
                $hook(&Ipv6(ctx))
            }
        }
    };
}

by_family!(connect6, connect);
by_family!(sendmsg6, sendmsg);
by_family!(show_frontend6, show_frontend);

/// Is the socket in the node's network namespace?
#[inline(always)]
fn is_node(ctx: &SockAddrContext) -> bool {
    // SAFETY: the context is the one the program was called with.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) == HOST_NETNS.load() }
}

/// Has the socket been connected?
#[inline(always)]
fn is_connected(ctx: &SockAddrContext) -> bool {
    /// `TCP_ESTABLISHED`, which is the state of connected UDP sockets too.
    const ESTABLISHED: u32 = 1;
    // SAFETY: the context's socket is never null in these hooks, and the field is read at its declared width.
    unsafe { core::ptr::addr_of!((*socket(ctx)).state).read_volatile() == ESTABLISHED }
}

#[inline(always)]
fn is_protocol(ctx: &SockAddrContext, protocol: Protocol) -> bool {
    // SAFETY: a context field, read at its declared width.
    unsafe { core::ptr::addr_of!((*ctx.sock_addr).protocol).read_volatile() == u32::from(protocol.number()) }
}

/// Can the choice be made at the socket just as it is made for a packet? A socket has no source address yet, so no source range
/// and no pod's affinity can be judged; and what is to be masqueraded has to be a packet (S109, S111). But who dials an address
/// of the node itself on the node has that same address as source, unless bound to another one (S106).
#[inline(always)]
fn is_exact<A: Family>(frontend: &Frontend, origin: Origin, addr: &A) -> bool {
    if frontend.flags & FRONTEND_SOURCE_RANGES != 0 && !(origin == Origin::Host && A::is_node(addr)) {
        return false;
    }
    origin == Origin::Host
        || (SOCKET_PODS.load() != 0
            && frontend.affinity_seconds == 0
            && !frontend.masquerades(origin, true, MASQUERADE_ALL.load() != 0))
}

/// Is the calling process in a pod that keeps its sockets to itself? Its cgroup is a descendant of the pod's.
#[inline(never)]
fn is_opted_out() -> bool {
    if !is_in_opt_out(ANY_OPTED_OUT) {
        return false;
    }
    let mut level = 1;
    while level <= CGROUP_LEVELS {
        // SAFETY: the helper takes a number and has no preconditions.
        let id = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if id == 0 {
            return false;
        }
        if is_in_opt_out(id) {
            return true;
        }
        level += 1;
    }
    false
}

#[inline(always)]
fn is_in_opt_out(id: u64) -> bool {
    // SAFETY: only whether it is there is asked.
    unsafe { SOCKET_OPT_OUT.get(id) }.is_some()
}

/// A backend for a socket that dials `addr`, which is its source as well where one is asked for (see [`is_exact`]).
#[inline(always)]
fn resolve<A: Family>(frontend: &Frontend, origin: Origin, addr: &A) -> Result<&'static Backend<A>, Reason> {
    let mut lookup = MaybeUninit::<Lookup<A>>::uninit();
    // SAFETY: plain old data; every key is written before it is used.
    let slot = service::resolve(frontend, origin, addr, unsafe { &mut *lookup.as_mut_ptr() })?;
    service::backend(slot)
}

/// Which of the node's addresses serve node ports for the socket, as `NODE_ADDR_*` bits. To a pod the loopback address is its own.
#[inline(always)]
fn node_ports_for<C: Context>(c: &C, origin: Origin) -> u32 {
    if origin == Origin::Host && !c.is_bound() {
        NODE_ADDR_NODE_PORTS | NODE_ADDR_SOCKETS
    } else {
        NODE_ADDR_NODE_PORTS
    }
}

/// `connect`: the destination becomes a backend, and the socket remembers what was dialled.
#[inline(always)]
pub(crate) fn connect<C: Context>(c: &C) -> i32 {
    let ctx = c.ctx();
    let origin = if is_node(ctx) { Origin::Host } else { Origin::Pod };
    let (addr, port) = (c.addr(), c.port());
    let protocol = if is_protocol(ctx, Protocol::Tcp) {
        Protocol::Tcp
    } else if is_protocol(ctx, Protocol::Udp) && origin == Origin::Host && C::Addr::is_node(&addr) {
        Protocol::Udp
    } else {
        return PROCEED;
    };
    let frontend = service::frontend(addr, port, protocol.number(), node_ports_for(c, origin));
    let is_ours = |frontend: &&Frontend| {
        is_exact(frontend, origin, &addr)
            && !service::is_draining::<C::Addr>()
            && !(origin == Origin::Pod && is_opted_out())
    };
    let Some(frontend) = frontend.filter(is_ours) else {
        forget(c);
        return PROCEED;
    };
    let past_loopback = way_past_loopback::<C::Addr>(protocol, frontend);
    let (to, to_port) = match past_loopback {
        Some(cluster_ip) => (cluster_ip.addr, cluster_ip.port),
        None => match resolve::<C::Addr>(frontend, origin, &addr) {
            Ok(backend) => (backend.addr, backend.port),
            Err(reason) => return unserved(addr, port, protocol, frontend, reason),
        },
    };
    let Some(flows) = storage::<C>(ctx) else {
        return left_alone(addr, port, protocol, frontend);
    };
    // SAFETY: socket storage stays allocated while the program runs, and connect holds the socket's lock.
    let chosen = unsafe { &mut (*flows).flows[0] };
    *chosen = flow(addr, port, frontend, to, to_port);
    if past_loopback.is_none() {
        // Otherwise its first packet is counted.
        maps::count_connection(frontend.service, BY_SOCKET);
        trace::socket(chosen, frontend.service, protocol.number(), None);
    }
    c.set_addr(to);
    c.set_port(to_port);
    PROCEED
}

/// Where a UDP socket connects to that dials an address of the node: the cluster IP of the same service. Its packets then leave by an
/// interface that has packet programs, which move the flow when its endpoint goes (S141, S142). That is the same service if neither
/// policy nor source ranges tell the two addresses apart; otherwise the socket stays with the endpoint that is chosen for it.
#[inline(always)]
fn way_past_loopback<A: Family>(protocol: Protocol, frontend: &Frontend) -> Option<&'static FrontendKey<A>> {
    if protocol != Protocol::Udp || frontend.flags & FRONTEND_SOURCE_RANGES != 0 {
        return None;
    }
    let key = A::cluster_ip(frontend.service)?;
    let is_same = A::frontend(key).is_some_and(|by_cluster_ip| {
        by_cluster_ip.service == frontend.service && by_cluster_ip.flags & FRONTEND_LOCAL == 0
    });
    if is_same { Some(key) } else { None }
}

/// `sendmsg` of an unconnected UDP socket: as `connect`, for every message, remembering a few destinations.
#[inline(always)]
pub(crate) fn sendmsg<C: Context>(c: &C) -> i32 {
    let ctx = c.ctx();
    if !is_protocol(ctx, Protocol::Udp) || !is_node(ctx) || is_connected(ctx) {
        return PROCEED;
    }
    let (addr, port) = (c.addr(), c.port());
    let Some(frontend) = service::frontend(addr, port, Protocol::Udp.number(), node_ports_for(c, Origin::Host)) else {
        return PROCEED;
    };
    if !is_exact(frontend, Origin::Host, &addr) {
        return PROCEED;
    }
    let Some(flows) = storage::<C>(ctx) else {
        return left_alone(addr, port, Protocol::Udp, frontend);
    };
    // SAFETY: socket storage stays allocated while the program runs. Two threads may send through one socket at once; each slot is
    // written as a whole, and a mixed-up one is seen as "not this destination" or re-balanced with the next message.
    let flows = unsafe { &mut *flows };
    let mut slot = SOCKET_FLOWS;
    let mut i = 0;
    while i < SOCKET_FLOWS {
        if flows.flows[i].has_frontend(addr, port) {
            slot = i;
        }
        i += 1;
    }
    if slot < SOCKET_FLOWS {
        let known = &mut flows.flows[slot];
        if known.generation == frontend.generation
            || service::still_serves(frontend.range(Origin::Host), &known.backend, known.backend_port)
        {
            known.generation = frontend.generation;
            c.set_addr(known.backend);
            c.set_port(known.backend_port);
            return PROCEED;
        }
    } else if service::is_draining::<C::Addr>() {
        return PROCEED;
    } else {
        slot = (flows.next as usize) % SOCKET_FLOWS;
        flows.next = flows.next.wrapping_add(1);
    }
    let backend: &Backend<C::Addr> = match resolve(frontend, Origin::Host, &addr) {
        Ok(backend) => backend,
        Err(reason) => return unserved(addr, port, Protocol::Udp, frontend, reason),
    };
    maps::count_connection(frontend.service, BY_SOCKET);
    if let Some(new) = flows.flows.get_mut(slot) {
        *new = flow(addr, port, frontend, backend.addr, backend.port);
        trace::socket(new, frontend.service, Protocol::Udp.number(), None);
    }
    c.set_addr(backend.addr);
    c.set_port(backend.port);
    PROCEED
}

/// `recvmsg` and `getpeername`: the application sees the address it dialled (Z9).
#[inline(always)]
pub(crate) fn show_frontend<C: Context>(c: &C) -> i32 {
    // SAFETY: the context's socket; nothing is created.
    let flows = unsafe { C::Addr::sockets().get_ptr_mut(c.ctx()) };
    if flows.is_null() {
        return PROCEED;
    }
    // SAFETY: socket storage stays allocated while the program runs; concurrent senders are harmless, see `sendmsg`.
    let flows = unsafe { &*flows };
    let (addr, port) = (c.addr(), c.port());
    let mut i = 0;
    while i < SOCKET_FLOWS {
        let flow = &flows.flows[i];
        if flow.has_backend(addr, port) {
            c.set_addr(flow.frontend);
            c.set_port(flow.frontend_port);
            break;
        }
        i += 1;
    }
    PROCEED
}

/// The socket dials something that is not translated: what it dialled before is not its peer any more.
#[inline(always)]
fn forget<C: Context>(c: &C) {
    // SAFETY: the context's socket; nothing is created.
    let flows = unsafe { C::Addr::sockets().get_ptr_mut(c.ctx()) };
    if !flows.is_null() {
        // SAFETY: socket storage stays allocated while the program runs, and connect holds the socket's lock. A slot without a
        // backend port is unused.
        unsafe { (*flows).flows[0].backend_port = Port([0; 2]) };
    }
}

/// What the socket remembers of a choice.
#[inline(always)]
fn flow<A: Family>(addr: A, port: Port, frontend: &Frontend, backend: A, backend_port: Port) -> SocketFlow<A> {
    SocketFlow {
        frontend: addr,
        backend,
        frontend_port: port,
        backend_port,
        generation: frontend.generation,
    }
}

/// The socket's storage, made if there is none.
#[inline(always)]
fn storage<C: Context>(ctx: &SockAddrContext) -> Option<*mut SocketFlows<C::Addr>> {
    // SAFETY: the context's socket; a fresh value is all zero, which means "unused".
    let flows = unsafe { C::Addr::sockets().get_or_insert_ptr_mut(ctx, None) };
    if flows.is_null() {
        return None;
    }
    Some(flows)
}

/// The socket has no storage, so it is left to the packet programs.
#[inline(always)]
fn left_alone<A: Family>(addr: A, port: Port, protocol: Protocol, frontend: &Frontend) -> i32 {
    maps::count(Reason::SocketStorageFull);
    tell(addr, port, protocol, frontend, Reason::SocketStorageFull);
    PROCEED
}

/// No backend: a refusal is said at once where the kernel lets us choose the error; otherwise, and for drops, the packet programs
/// deal with what the socket sends.
#[inline(always)]
fn unserved<A: Family>(addr: A, port: Port, protocol: Protocol, frontend: &Frontend, reason: Reason) -> i32 {
    if reason.is_refused() && HAVE_SET_RETVAL.load() != 0 {
        maps::count_unserved(frontend.service, reason, BY_SOCKET);
        tell(addr, port, protocol, frontend, reason);
        // SAFETY: no memory is passed.
        unsafe { bpf_set_retval(-ECONNREFUSED) };
        return FAIL;
    }
    PROCEED
}

/// Tells a tracer of a socket that gets no backend.
#[inline(always)]
fn tell<A: Family>(addr: A, port: Port, protocol: Protocol, frontend: &Frontend, reason: Reason) {
    if trace::is_on() {
        let flow = flow(addr, port, frontend, A::zeroed(), Port([0; 2]));
        trace::socket(&flow, frontend.service, protocol.number(), Some(reason));
    }
}
