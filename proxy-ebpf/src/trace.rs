//! What `proxy-agent trace` is told: connections that are opened, sockets that are translated, and whatever is refused or dropped.
//! Called where those things are decided, never for a packet of an established connection that goes its way.
//!
//! While nobody asks it costs one look-up in an array, which the kernel inlines, per new connection. What is asked for is judged
//! before room is taken in the ring buffer; an event is written field by field, because a struct on the stack would not fit there.

use core::mem::MaybeUninit;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::bpf_get_current_comm;
use aya_ebpf::helpers::{bpf_get_current_pid_tgid, bpf_ktime_get_coarse_ns, bpf_ktime_get_ns};
use aya_ebpf::programs::TcContext;
use proxy_common::addr::{Address, Port};
use proxy_common::reason::{EVENTS_LOST, Reason};
use proxy_common::rewrite::{HOOK_EGRESS, RewriteKey};
use proxy_common::socket::SocketFlow;
use proxy_common::trace::{
    AT_SOCKET, EVENT_DROPPED, EVENT_MASQUERADED, EVENT_OPENED, EVENT_REFUSED, EVENT_SOCKET, Event, Subject, reason_code,
};

use crate::maps::{EVENTS, Family, TRACE, count_slot};
use crate::packet::{Headers, field, linear};
use crate::service::random;

/// [`crate::maps::Scratch::outcome`] of a connection that was opened.
pub(crate) const OPENED: u32 = u32::MAX;

/// Does anybody ask, as far as one word tells?
#[inline(always)]
pub(crate) fn is_on() -> bool {
    TRACE.get(0).is_some_and(|trace| trace.until != 0)
}

/// What became of a packet that may open a connection, as the scratch room has it.
#[inline(always)]
pub(crate) fn outcome<A: Family>(skb: *mut __sk_buff, key: &RewriteKey<A>) {
    if is_on() {
        write_outcome(skb, key);
    }
}

/// A packet for this service was refused or dropped; 0 if it is none's.
#[inline(always)]
pub(crate) fn unserved<A: Family>(skb: *mut __sk_buff, key: &RewriteKey<A>, service: u32, reason: Reason) {
    if is_on() {
        write_unserved(skb, key, service, reason);
    }
}

/// A packet that is about to leave was dropped, and its ports are not known.
#[inline(always)]
pub(crate) fn unread<A: Headers, const L2: usize>(ctx: &TcContext, reason: Reason) {
    if is_on() {
        write_unread::<A, L2>(ctx, reason);
    }
}

/// A socket was translated, or not if there is a reason. Its flow has no backend then.
#[inline(always)]
pub(crate) fn socket<A: Family>(flow: &SocketFlow<A>, service: u32, protocol: u8, reason: Option<Reason>) {
    if is_on() {
        write_socket(flow, service, protocol, reason.map_or(0, reason_code));
    }
}

#[inline(never)]
fn write_outcome<A: Family>(skb: *mut __sk_buff, key: &RewriteKey<A>) {
    // SAFETY: this CPU's slot, used by this program run alone (see `Scratch`).
    let Some(scratch) = A::scratch().map(|scratch| unsafe { &*scratch }) else {
        return;
    };
    // What gives way to another connection dials no service.
    if scratch.outcome == 0 || scratch.service == 0 {
        return;
    }
    let is_opened = scratch.outcome == OPENED;
    let (kind, reason) = if is_opened {
        (EVENT_OPENED, 0)
    } else {
        (kind_of(scratch.outcome), scratch.outcome)
    };
    let Some(event) = packet_event(skb, key, scratch.service, kind, reason) else {
        return;
    };
    if is_opened {
        let request = &scratch.request;
        put(&mut event.backend, &request.dst);
        event.backend_port = request.dst_port;
        if scratch.leaves_by == 0 {
            put(&mut event.seen_as, &request.src);
            event.seen_as_port = request.src_port;
        } else {
            // The way back is addressed to it.
            put(&mut event.seen_as, &scratch.back_key.dst);
            event.seen_as_port = scratch.back_key.dst_port;
            event.flags = EVENT_MASQUERADED;
        }
    }
    submit(event);
}

/// The kind of event that a packet's reason makes.
#[inline(always)]
fn kind_of(reason: u32) -> u8 {
    if reason == reason_code(Reason::NoEndpoints) || reason == reason_code(Reason::UndefinedPort) {
        EVENT_REFUSED
    } else {
        EVENT_DROPPED
    }
}

#[inline(never)]
fn write_unserved<A: Family>(skb: *mut __sk_buff, key: &RewriteKey<A>, service: u32, reason: Reason) {
    if let Some(event) = packet_event(skb, key, service, kind_of(reason_code(reason)), reason_code(reason)) {
        submit(event);
    }
}

#[inline(never)]
fn write_unread<A: Headers, const L2: usize>(ctx: &TcContext, reason: Reason) {
    let Some(ip) = linear::<u8>(ctx, L2, A::HEADER) else {
        return;
    };
    // SAFETY: the header is there; its last fields are the addresses.
    let key = unsafe {
        RewriteKey::<A>::new(
            field(ip, A::DESTINATION - A::LEN),
            Port([0; 2]),
            field(ip, A::DESTINATION),
            Port([0; 2]),
            field(ip, A::PROTOCOL),
            HOOK_EGRESS,
        )
    };
    if let Some(event) = packet_event(ctx.skb.skb, &key, 0, EVENT_DROPPED, reason_code(reason)) {
        submit(event);
    }
}

#[inline(never)]
fn write_socket<A: Family>(flow: &SocketFlow<A>, service: u32, protocol: u8, reason: u32) {
    let kind = match kind_of(reason) {
        EVENT_REFUSED => EVENT_REFUSED,
        _ => EVENT_SOCKET,
    };
    let subject = Subject {
        kind,
        protocol,
        port: flow.frontend_port,
        reason,
        service,
        client: bytemuck::Zeroable::zeroed(),
    };
    let Some(event) = begin(&subject) else {
        return;
    };
    put(&mut event.frontend, &flow.frontend);
    event.frontend_port = flow.frontend_port;
    if flow.backend_port != Port([0; 2]) {
        put(&mut event.backend, &flow.backend);
        event.backend_port = flow.backend_port;
    }
    event.hook = AT_SOCKET;
    event.pid = (bpf_get_current_pid_tgid() >> 32) as u32;
    // SAFETY: the buffer has the length that is given.
    unsafe { bpf_get_current_comm(event.comm.as_mut_ptr().cast(), event.comm.len() as u32) };
    submit(event);
}

/// An event about a packet, with all that is known of any.
#[inline(always)]
fn packet_event<A: Family>(
    skb: *mut __sk_buff,
    key: &RewriteKey<A>,
    service: u32,
    kind: u8,
    reason: u32,
) -> Option<&'static mut Event> {
    let subject = Subject {
        kind,
        protocol: key.protocol,
        port: key.dst_port,
        reason,
        service,
        client: key.src.mapped(),
    };
    let event = begin(&subject)?;
    put(&mut event.client, &key.src);
    event.client_port = key.src_port;
    put(&mut event.frontend, &key.dst);
    event.frontend_port = key.dst_port;
    // SAFETY: a context field, read at its declared width.
    event.ifindex = unsafe { (*skb).ifindex };
    event.hook = key.hook;
    Some(event)
}

/// Room for an event that is asked for, with everything unset but what it was chosen by. It has to be submitted.
#[inline(always)]
fn begin(subject: &Subject) -> Option<&'static mut Event> {
    let trace = TRACE.get(0)?;
    // SAFETY: the helper has no arguments and no preconditions.
    if unsafe { bpf_ktime_get_coarse_ns() } > trace.until || !trace.wants(subject) {
        return None;
    }
    if trace.sample > 1 && !random().is_multiple_of(trace.sample) {
        return None;
    }
    let Some(mut room) = EVENTS.reserve(0) else {
        // A socket hook may be interrupted by a packet on its CPU: then one of the two may be missing from the count.
        count_slot(EVENTS_LOST);
        return None;
    };
    let event: *mut Event = MaybeUninit::as_mut_ptr(&mut room);
    // `submit` goes by the pointer, since a subprogram cannot hand on more; dropping the owner does nothing.
    clear(event);
    // SAFETY: the room is an event's, aligned to 8, and every byte was written; it is ours until it is submitted.
    let event = unsafe { &mut *event };
    // SAFETY: as above.
    event.time = unsafe { bpf_ktime_get_ns() };
    event.kind = subject.kind;
    event.protocol = subject.protocol;
    event.reason = subject.reason;
    event.service = subject.service;
    Some(event)
}

/// Ends an event: the tracer sees it.
#[inline(always)]
fn submit(event: &'static mut Event) {
    // SAFETY: `begin` has reserved it, and nobody uses it any more.
    unsafe { aya_ebpf::helpers::bpf_ringbuf_submit(core::ptr::from_mut(event).cast(), 0) };
}

/// Zeros an event by words: a whole one would become a call to memset, which does not exist.
#[inline(always)]
fn clear(event: *mut Event) {
    let words = event.cast::<u64>();
    let mut i = 0;
    while i < size_of::<Event>() / 8 {
        // SAFETY: `i` is below the number of words; volatile, so that the stores stay what they are.
        unsafe { words.add(i).write_volatile(0) };
        i += 1;
    }
}

/// Writes an address by words, in the form that both families share.
#[inline(always)]
fn put<A: Address>(to: &mut proxy_common::addr::Addr6, addr: &A) {
    let words: [u32; 4] = bytemuck::cast(addr.mapped());
    let to = core::ptr::from_mut(to).cast::<u32>();
    let mut i = 0;
    while i < 4 {
        // SAFETY: an address has four words, and is aligned like them.
        unsafe { to.add(i).write_volatile(words[i]) };
        i += 1;
    }
}
