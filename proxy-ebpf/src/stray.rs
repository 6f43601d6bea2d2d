//! The last look at what leaves the node untranslated. A packet for an address of the service network that is still addressed to it
//! here belongs to nobody: an address that no Service has (S78), a ping (S79), the middle of a connection that nobody knows. Sent
//! on, it would come back from the router that sends such addresses here, and so until its hop limit ends it.
//!
//! At the egress hook, not at ingress, because another proxy on the node may translate in between. Nothing is said to the sender.

use aya_ebpf::programs::TcContext;
use proxy_common::addr::Port;
use proxy_common::frontend::FrontendKey;
use proxy_common::reason::Reason;

use crate::maps;
use crate::packet::{Headers, Packet, TCP_RST, field, linear};
use crate::tc::{DROP, PASS};
use crate::trace;

/// The verdict for a packet that no entry translates, whose headers were not understood; `is_answer` as for [`reason`].
#[inline(always)]
pub(crate) fn unread<A: Headers, const L2: usize>(ctx: &TcContext, is_answer: bool) -> i32 {
    let Some(ip) = linear::<u8>(ctx, L2, A::HEADER) else {
        return PASS;
    };
    // SAFETY: the header is there, the destination is its last address.
    let dst: A = unsafe { field(ip, A::DESTINATION) };
    let Some(reason) = reason(ctx, &dst, is_answer) else {
        return PASS;
    };
    maps::count(reason);
    trace::unread::<A, L2>(ctx, reason);
    DROP
}

/// The verdict for a packet that no entry translates.
#[inline(always)]
pub(crate) fn verdict<A: Headers>(ctx: &TcContext, packet: &Packet<A>) -> i32 {
    let Some(reason) = reason(ctx, &packet.key.dst, packet.tcp_flags & TCP_RST != 0) else {
        return PASS;
    };
    maps::count(reason);
    trace::unserved(ctx.skb.skb, &packet.key, 0, reason);
    DROP
}

/// Why a packet to `dst` may not leave. Nobody answers an answer (a TCP RST, an ICMP error), so it may go back to where the packet
/// came from that it is about: the address may be a node's own, and we have just refused that node something.
#[inline(always)]
fn reason<A: Headers>(ctx: &TcContext, dst: &A, is_answer: bool) -> Option<Reason> {
    if A::settings().is_some_and(|settings| settings.is_service(dst)) {
        return Some(Reason::Unallocated);
    }
    let skb = ctx.skb.skb;
    // SAFETY: context fields, read at their declared width.
    let returns = unsafe { (*skb).ingress_ifindex == (*skb).ifindex };
    if returns && !is_answer && A::frontend(&FrontendKey::new(*dst, Port([0; 2]), 0)).is_some() {
        return Some(Reason::Loop);
    }
    None
}
