//! The two hooks of an interface. Both look the packet up in the rewrite table once; what is found is applied, and a packet that
//! is not found may open a connection. A packet that is not ours leaves as it came, for the programs and the stack behind us.

use core::mem::MaybeUninit;

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::programs::TcContext;
use proxy_common::addr::{Addr4, Addr6};
use proxy_common::counters::BY_PACKET;
use proxy_common::reason::Reason;
use proxy_common::rewrite::{
    HOOK_EGRESS, HOOK_INGRESS, REWRITE_GAVE_WAY, REWRITE_REROUTE, REWRITE_TO_INGRESS, Rewrite,
};

use crate::connection::{self, Opened};
use crate::icmp_error::{self, Quoted};
use crate::log::Log;
use crate::maps;
use crate::packet::{self, Headers, Packet};
use crate::refuse::{self, Refuse};
use crate::rewrite;
use crate::route::{self, Route, Routed};
use crate::stray;
use crate::trace;
use crate::unusual::{self, Unusual, Walk};

/// "No opinion": the next program of the interface and then the stack decide (`TCX_NEXT` is the same number).
pub(crate) const PASS: i32 = TC_ACT_UNSPEC;
pub(crate) const DROP: i32 = TC_ACT_SHOT;

/// The entry point of all tc programs: `L2` is the length of the interface's link-layer header.
#[inline(always)]
pub(crate) fn run<const L2: usize, const HOOK: u8>(ctx: &TcContext) -> i32 {
    // SAFETY: a context field, read at its declared width.
    let ethertype = u16::from_be(unsafe { (*ctx.skb.skb).protocol } as u16);
    if ethertype == Addr4::ETHERTYPE {
        at_hook::<Addr4, L2, HOOK>(ctx)
    } else if ethertype == Addr6::ETHERTYPE {
        at_hook::<Addr6, L2, HOOK>(ctx)
    } else {
        PASS
    }
}

#[inline(always)]
fn at_hook<A: Route + Refuse + Log + Walk + Quoted, const L2: usize, const HOOK: u8>(ctx: &TcContext) -> i32 {
    packet::make_linear::<A, L2>(ctx);
    let mut packet = MaybeUninit::uninit();
    let packet = match A::parse::<L2>(ctx, HOOK) {
        Some(parsed) => &*packet.write(parsed),
        None => match unusual::parse::<A, L2, HOOK>(ctx, packet.as_mut_ptr()) {
            // SAFETY: the answer says that the packet was written.
            Unusual::Packet => unsafe { packet.assume_init_ref() },
            Unusual::Icmp => match icmp_error::translate::<A, L2, HOOK>(ctx) {
                PASS if HOOK == HOOK_EGRESS => {
                    let is_answer = icmp_error::is_error::<A, L2>(ctx);
                    return stray::unread::<A, L2>(ctx, is_answer);
                }
                verdict => return verdict,
            },
            Unusual::NotOurs if HOOK == HOOK_EGRESS => return stray::unread::<A, L2>(ctx, false),
            Unusual::NotOurs => return PASS,
        },
    };
    let skb = ctx.skb.skb;
    let mut entry = A::rewrite(&packet.key);
    let is_new = match entry {
        None => packet.opens(),
        Some(entry) => packet.is_syn() && connection::reopens(&packet.key, entry),
    };
    if is_new {
        // SAFETY: a context field, read at its declared width. It is 0 for packets of this node itself: forwarded ones were looked
        // up when they came in.
        let was_seen = HOOK == HOOK_EGRESS && unsafe { (*skb).ingress_ifindex } != 0;
        let opened = if was_seen {
            Opened::NotOurs
        } else {
            connection::open(skb, &packet.key)
        };
        if opened != Opened::NotOurs {
            trace::outcome(skb, &packet.key);
        }
        entry = match opened {
            Opened::NotOurs => None,
            Opened::Yes => A::rewrite(&packet.key),
            Opened::Refused => {
                A::unserved(ctx, &packet.key, "refused");
                let verdict = refuse::refuse::<A, L2, HOOK>(ctx, packet);
                if verdict == DROP {
                    trace::unserved(skb, &packet.key, 0, Reason::RefuseFailed);
                }
                return verdict;
            }
            Opened::Dropped => {
                A::unserved(ctx, &packet.key, "dropped");
                return DROP;
            }
        };
        if let Some(entry) = entry {
            // SAFETY: the slot stays allocated while the program runs, and its tuple does not change.
            A::opened(ctx, &packet.key, unsafe { &*entry });
        }
    }
    let Some(entry) = entry else {
        return if HOOK == HOOK_EGRESS {
            stray::verdict(ctx, packet)
        } else {
            PASS
        };
    };
    // SAFETY: the slot stays allocated while the program runs, and what is read does not change after it was written.
    if let Some(elsewhere) = belongs_elsewhere::<A, L2, HOOK>(skb, unsafe { &*entry }) {
        return elsewhere;
    }
    rewrite::touch(entry, packet.tcp_flags, rewrite::now());
    // SAFETY: the slot stays allocated while the program runs. Only its clock and state change after it was written, and those
    // are not read here.
    let entry = unsafe { &*entry };
    maps::count_packet(entry.service, entry.kind, ctx.len().wrapping_sub(L2 as u32));
    rewritten::<A, L2, HOOK>(ctx, packet, entry)
}

/// What becomes of a packet that has the tuple of an entry that gave way, but is not of its connection, or not here.
#[inline(always)]
fn belongs_elsewhere<A: Route, const L2: usize, const HOOK: u8>(
    skb: *mut __sk_buff,
    rewrite: &Rewrite<A>,
) -> Option<i32> {
    if rewrite.flags & REWRITE_GAVE_WAY == 0 {
        return None;
    }
    // SAFETY: context fields, read at their declared width.
    let (here, came_in) = unsafe { ((*skb).ifindex, (*skb).ingress_ifindex) };
    if HOOK == HOOK_EGRESS {
        return (came_in != 0).then_some(PASS);
    }
    if here == rewrite.ifindex {
        return None;
    }
    route::arrive::<L2>(skb, rewrite.ifindex)
}

/// Applies an entry and sends the packet where it belongs afterwards.
#[inline(always)]
fn rewritten<A: Route, const L2: usize, const HOOK: u8>(
    ctx: &TcContext,
    packet: &Packet<A>,
    rewrite: &Rewrite<A>,
) -> i32 {
    if rewrite::apply::<A, L2>(ctx, packet, rewrite).is_err() {
        return failed(ctx, packet, rewrite, Reason::RewriteFailed);
    }
    let skb = ctx.skb.skb;
    if rewrite.flags == 0 {
        return PASS;
    }
    if HOOK == HOOK_EGRESS && rewrite.flags & REWRITE_REROUTE != 0 {
        // SAFETY: this CPU's slot, used by this program run alone (see `Scratch`).
        let Some(words) = A::scratch().map(|scratch| unsafe { &mut (*scratch).words }) else {
            return failed(ctx, packet, rewrite, Reason::RewriteFailed);
        };
        return match A::route(skb, &rewrite.src, &rewrite.dst, words) {
            Routed::Forward(ifindex) => route::send(ifindex),
            Routed::Stack => failed(ctx, packet, rewrite, Reason::NoRoute),
        };
    }
    if rewrite.flags & REWRITE_TO_INGRESS != 0 {
        // SAFETY: a context field, read at its declared width.
        let here = HOOK == HOOK_INGRESS && unsafe { (*skb).ifindex } == rewrite.ifindex;
        if !here {
            return route::arrive::<L2>(skb, rewrite.ifindex).unwrap_or(PASS);
        }
    }
    PASS
}

/// A packet of a connection could not be served.
#[inline(always)]
fn failed<A: Route>(ctx: &TcContext, packet: &Packet<A>, rewrite: &Rewrite<A>, reason: Reason) -> i32 {
    maps::count_unserved(rewrite.service, reason, BY_PACKET);
    trace::unserved(ctx.skb.skb, &packet.key, rewrite.service, reason);
    DROP
}
