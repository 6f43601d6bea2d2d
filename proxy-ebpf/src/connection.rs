//! Opening a connection: everything that is decided once, when its first packet is seen, and written into the rewrite table
//! before that packet is changed. Called by the hooks for packets that may open a connection and missed the table.
//!
//! Which entries there are and what they look like is in proxy-common's `rewrite`; this module owns their creation. What must
//! stay true: the entries for replies exist before the one for requests, so that no reply finds the table without its entry; a
//! tuple is claimed with BPF_NOEXIST, so that two connections never share one.

use aya_ebpf::bindings::__sk_buff;
use proxy_common::addr::{Port, Protocol};
use proxy_common::counters::BY_PACKET;
use proxy_common::frontend::Origin;
use proxy_common::link::{LINK_PODS, NODE_ADDR_NODE_PORTS};
use proxy_common::reason::Reason;
use proxy_common::rewrite::{
    HOOK_EGRESS, KIND_MASQUERADE, KIND_REPLY, KIND_REQUEST, KIND_UNMASQUERADE, Meta, REWRITE_GAVE_WAY,
    REWRITE_MASQUERADED, REWRITE_REROUTE, REWRITE_SAME_HOOK, REWRITE_TO_INGRESS, Rewrite, RewriteKey, STATE_FIN,
    STATE_RST,
};
use proxy_common::settings::{MODE_DRAIN, MODE_HOLD};
use proxy_common::trace::reason_code;
use proxy_common::{clock, pick};

use crate::maps::{self, Family, LINKS, MASQUERADE_ALL, PODS_BY_LINK, PORT_COUNT, PORT_FIRST, Scratch};
use crate::rewrite::now;
use crate::route::{Route, Routed};
use crate::{service, trace};

/// Source ports that are tried when two connections want the same one. The verifier follows every turn, so they are few; a turn
/// fails with the probability that a random port is taken.
const CLAIM_TURNS: u32 = 8;
const MASQUERADE_TURNS: u32 = 16;
/// A SYN on a tuple that was silent for longer than a peer waits between two retransmissions (64 s) opens a new connection.
const SYN_REUSE: u32 = clock::ticks_of_seconds(130);

/// What became of a packet that may open a connection.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Opened {
    /// It dials no service.
    NotOurs = 0,
    /// The connection is in the rewrite table.
    Yes = 1,
    /// To be answered with an error.
    Refused = 2,
    /// To be dropped; counted.
    Dropped = 3,
}

/// Is the connection of this entry over, so that its tuple may be used again (S154)? `partner` is scratch room.
///
/// It is not while its other direction is used: the first packet after a pause is seen again, translated, where it leaves, and finds
/// there the entry for its replies, which is still as old as the pause.
#[inline(always)]
fn is_over<A: Family>(key: &RewriteKey<A>, entry: &Rewrite<A>, partner: &mut RewriteKey<A>) -> bool {
    if entry.state & STATE_RST != 0 {
        return true;
    }
    *partner = key.partner(entry);
    let Some(partner) = A::rewrite(partner) else {
        return true;
    };
    // SAFETY: the slot stays allocated while the program runs; aligned words are read.
    let (state, seen) = unsafe {
        (
            core::ptr::addr_of!((*partner).state).read_volatile(),
            core::ptr::addr_of!((*partner).last_seen).read_volatile(),
        )
    };
    let seen = if seen > entry.last_seen { seen } else { entry.last_seen };
    clock::elapsed(seen, now()) > SYN_REUSE || state & STATE_RST != 0 || state & entry.state & STATE_FIN != 0
}

/// Does a SYN that found `entry` open a new connection? If the old one is over, its entries are removed.
#[inline(never)]
pub(crate) fn reopens<A: Family>(key: &RewriteKey<A>, entry: *mut Rewrite<A>) -> bool {
    let Some(scratch) = scratch::<A>() else { return false };
    // SAFETY: the slot stays allocated while the program runs; what changes in it are words that are judged one by one.
    let entry = unsafe { &*entry };
    if entry.kind != KIND_REQUEST || !is_over(key, entry, &mut scratch.partner) {
        return false;
    }
    forget(key, entry, &mut scratch.partner);
    true
}

/// Removes an entry and its partner. `partner` is scratch room.
///
/// If the connection was masqueraded, so is whatever comes with the same tuple until the masquerade goes too: the next connection of
/// that client port, whose address is to stay (S87, S119), or one that dials the endpoint itself. Without it the entry for the way
/// back counts as over.
#[inline(always)]
fn forget<A: Family>(key: &RewriteKey<A>, entry: &Rewrite<A>, partner: &mut RewriteKey<A>) {
    if entry.flags & REWRITE_MASQUERADED != 0 {
        *partner = if entry.kind == KIND_REQUEST {
            RewriteKey::new(
                entry.src,
                entry.src_port,
                entry.dst,
                entry.dst_port,
                key.protocol,
                HOOK_EGRESS,
            )
        } else {
            RewriteKey::new(key.dst, key.dst_port, key.src, key.src_port, key.protocol, HOOK_EGRESS)
        };
        A::remove_rewrite(partner);
    }
    *partner = key.partner(entry);
    A::remove_rewrite(partner);
    A::remove_rewrite(key);
}

/// Room for what does not fit on the stack.
#[inline(always)]
fn scratch<A: Family>() -> Option<&'static mut Scratch<A>> {
    // SAFETY: this CPU's slot, used by this program run alone (see `Scratch`); every function takes it at most once.
    A::scratch().map(|scratch| unsafe { &mut *scratch })
}

/// Opens the connection of the packet with `key`, if it dials a service.
///
/// The steps are subprograms called one after the other and not from each other: the stack of a call chain has 512 bytes in all.
#[inline(always)]
pub(crate) fn open<A: Route>(skb: *mut __sk_buff, key: &RewriteKey<A>) -> Opened {
    let begun = match select(skb, key) {
        Opened::Yes => begin(skb, key),
        Opened::NotOurs if may_be_in_the_way(key) && make_way(skb, key) == Opened::Yes => Ok(()),
        other => return other,
    };
    let written = begun
        .and_then(|()| claim(key))
        .and_then(|()| masquerade::<A>(skb, key))
        .and_then(|()| publish(key));
    match written {
        Ok(()) => Opened::Yes,
        Err(reason) => {
            if let Some(scratch) = scratch::<A>() {
                scratch.outcome = reason_code(reason);
                maps::count_unserved(scratch.service, reason, BY_PACKET);
            }
            Opened::Dropped
        }
    }
}

/// Is it worth to look for an entry that takes the replies for its own? Forwarded packets without handshake are the bulk of foreign
/// traffic; a flow of theirs that is over is collected soon.
#[inline(always)]
fn may_be_in_the_way<A: Family>(key: &RewriteKey<A>) -> bool {
    key.hook == HOOK_EGRESS || key.protocol == Protocol::Tcp.number()
}

/// A connection that dials no service, but whose replies an entry would take for its own: one that is over is removed.
///
/// One that is alive can only be told from this very connection, already translated at another interface, if it is the reversal of
/// a masquerade. Then the node wants a port for itself that a masqueraded connection has, and gets another one on the way (S121).
#[inline(never)]
fn make_way<A: Family>(skb: *mut __sk_buff, key: &RewriteKey<A>) -> Opened {
    let Some(scratch) = scratch::<A>() else {
        return Opened::NotOurs;
    };
    let Scratch {
        key: reply,
        partner,
        request,
        leaves_by,
        service,
        ..
    } = scratch;
    *reply = RewriteKey::new(key.dst, key.dst_port, key.src, key.src_port, key.protocol, key.hook ^ 1);
    let Some(entry) = A::rewrite(reply) else {
        return Opened::NotOurs;
    };
    // SAFETY: the slot stays allocated while the program runs; what changes in it are words that are judged one by one.
    let entry = unsafe { &*entry };
    if is_over(reply, entry, partner) {
        forget(reply, entry, partner);
        return Opened::NotOurs;
    }
    if entry.kind != KIND_UNMASQUERADE {
        return Opened::NotOurs;
    }
    let meta = Meta {
        service: 0,
        // SAFETY: a context field, read at its declared width.
        ifindex: unsafe { (*skb).ifindex },
        last_seen: now(),
        kind: KIND_REQUEST,
        flags: REWRITE_GAVE_WAY,
    };
    *request = key.rewrite_to(key.src, key.src_port, key.dst, key.dst_port, meta);
    (*leaves_by, *service) = (0, 0);
    Opened::Yes
}

/// Finds the frontend that the packet dials and chooses a backend, which is left in the scratch room.
#[inline(never)]
fn select<A: Family>(skb: *mut __sk_buff, key: &RewriteKey<A>) -> Opened {
    let Some(frontend) = service::frontend(key.dst, key.dst_port, key.protocol, NODE_ADDR_NODE_PORTS) else {
        return Opened::NotOurs;
    };
    let (Some(scratch), Some(settings)) = (scratch::<A>(), A::settings()) else {
        maps::count(Reason::RewriteFailed);
        return Opened::Dropped;
    };
    match settings.mode {
        MODE_HOLD => {
            maps::count_unserved(frontend.service, Reason::Held, BY_PACKET);
            return Opened::Dropped;
        }
        MODE_DRAIN => return Opened::NotOurs,
        _ => {}
    }
    let by_link = PODS_BY_LINK.load() != 0;
    let has_pods = by_link || settings.pods.set != 0;
    let is_pod = if by_link {
        is_pod_link(skb)
    } else {
        settings.pods.contains(&key.src)
    };
    let origin = Origin::of(key.hook, is_pod);
    scratch.service = frontend.service;
    scratch.outcome = 0;
    scratch.masquerades = u32::from(frontend.masquerades(origin, has_pods, MASQUERADE_ALL.load() != 0));
    match service::resolve(frontend, origin, &key.src, &mut scratch.lookup) {
        Ok(slot) => {
            scratch.slot = slot;
            Opened::Yes
        }
        Err(reason) => {
            scratch.outcome = reason_code(reason);
            maps::count_unserved(frontend.service, reason, BY_PACKET);
            if reason.is_refused() {
                Opened::Refused
            } else {
                Opened::Dropped
            }
        }
    }
}

/// Does what arrives over the packet's interface come from a pod (S114)?
#[inline(always)]
fn is_pod_link(skb: *mut __sk_buff) -> bool {
    // SAFETY: a context field, read at its declared width; and one word of the value, at once.
    unsafe { LINKS.get((*skb).ifindex) }.is_some_and(|link| link.flags & LINK_PODS != 0)
}

/// Leaves the entry for requests to the chosen backend in the scratch room.
///
/// At the ingress hook the client is behind the interface, at the egress hook it is this node.
#[inline(never)]
fn begin<A: Route>(skb: *mut __sk_buff, key: &RewriteKey<A>) -> Result<(), Reason> {
    let Some(scratch) = scratch::<A>() else {
        return Err(Reason::RewriteFailed);
    };
    let backend = service::backend::<A>(scratch.slot)?;
    let mut meta = Meta {
        service: scratch.service,
        ifindex: 0,
        last_seen: now(),
        kind: KIND_REQUEST,
        flags: 0,
    };
    let mut src = &key.src;
    scratch.leaves_by = 0;
    if key.hook == HOOK_EGRESS {
        // SAFETY: a context field, read at its declared width.
        meta.ifindex = unsafe { (*skb).ifindex };
        // A packet of the node itself was routed towards the frontend, so it is routed again; the reply is handed to the interface
        // the request left by, which is where reverse-path filters expect the frontend's address.
        meta.flags = REWRITE_REROUTE;
        if A::is_node(&backend.addr) {
            // From the node to the node there is no interface that a packet with a local source may arrive by. So the endpoint
            // sees the frontend's address as its client, and its replies leave by this interface, where they are turned back.
            meta.flags = REWRITE_SAME_HOOK | REWRITE_TO_INGRESS;
            src = &key.dst;
        }
    } else if scratch.masquerades != 0 || key.src == backend.addr {
        // Towards an endpoint on this node's own network nothing is masqueraded: the packet goes to the stack (S118).
        if let Routed::Forward(ifindex) = A::route(skb, &key.src, &backend.addr, &mut scratch.words) {
            meta.flags = REWRITE_MASQUERADED;
            scratch.leaves_by = ifindex;
        }
    }
    scratch.request = key.rewrite_to(*src, key.src_port, backend.addr, backend.port, meta);
    Ok(())
}

/// Writes the entry for replies and thereby claims the tuple that `scratch.request` rewrites to. If another connection has it,
/// the client gets another source port on the way to the backend.
#[inline(never)]
fn claim<A: Family>(key: &RewriteKey<A>) -> Result<(), Reason> {
    let Some(scratch) = scratch() else {
        return Err(Reason::RewriteFailed);
    };
    let Scratch {
        request,
        key: reply_key,
        value: reply,
        partner,
        ..
    } = scratch;
    let mut port = key.src_port;
    let mut turn = 0;
    while turn < CLAIM_TURNS {
        if turn != 0 {
            *request = key.rewrite_to(request.src, port, request.dst, request.dst_port, request.meta());
        }
        *reply_key = key.partner(request);
        let flags = if request.flags & REWRITE_REROUTE != 0 {
            REWRITE_TO_INGRESS
        } else {
            request.flags
        };
        let meta = Meta {
            kind: KIND_REPLY,
            flags,
            ..request.meta()
        };
        *reply = reply_key.rewrite_to(key.dst, key.dst_port, key.src, key.src_port, meta);
        if A::insert_rewrite(reply_key, reply) {
            if turn != 0 {
                maps::count(Reason::SourcePortChanged);
            }
            return Ok(());
        }
        let Some(owner) = A::rewrite(reply_key) else {
            return Err(Reason::RewriteTableFull);
        };
        // SAFETY: the slot stays allocated while the program runs; what changes in it are words that are judged one by one.
        let owner = unsafe { &*owner };
        // A leftover of this very tuple, whose request entry is gone.
        if owner.has_tuple_of(reply) {
            return if A::replace_rewrite(reply_key, reply) {
                Ok(())
            } else {
                Err(Reason::RewriteTableFull)
            };
        }
        // Or of a connection that is over; if another CPU takes its place at once, that one keeps it.
        if is_over(reply_key, owner, partner) {
            forget(reply_key, owner, partner);
            if A::insert_rewrite(reply_key, reply) {
                return Ok(());
            }
        }
        port = random_port();
        turn += 1;
    }
    Err(Reason::NoSourcePort)
}

/// If the connection is to be masqueraded: writes the pair of entries that give its client an address of this node, at the
/// interface towards the backend.
#[inline(never)]
fn masquerade<A: Route>(skb: *mut __sk_buff, original: &RewriteKey<A>) -> Result<(), Reason> {
    let Some(scratch) = scratch::<A>() else {
        return Err(Reason::RewriteFailed);
    };
    if scratch.leaves_by == 0 {
        return Ok(());
    }
    let written = claim_node_port(skb, original.protocol, scratch);
    if written.is_err() {
        scratch.partner = original.partner(&scratch.request);
        A::remove_rewrite(&scratch.partner);
    }
    written
}

#[inline(always)]
fn claim_node_port<A: Route>(skb: *mut __sk_buff, protocol: u8, scratch: &mut Scratch<A>) -> Result<(), Reason> {
    // SAFETY: the agent replaces values as a whole, and the address is copied out at once.
    let Some(node) = (unsafe { LINKS.get(scratch.leaves_by) }).map(A::link_addr) else {
        return Err(Reason::NoRoute);
    };
    if node == A::zeroed() {
        return Err(Reason::NoRoute);
    }
    let Scratch {
        request,
        key,
        value: outward,
        back_key,
        back_value: back,
        partner,
        words,
        ..
    } = scratch;
    *key = RewriteKey::new(
        request.src,
        request.src_port,
        request.dst,
        request.dst_port,
        protocol,
        HOOK_EGRESS,
    );
    if let Some(known) = A::rewrite(key) {
        // Another CPU is opening the same flow, or its request entry was lost. It keeps the port that its endpoint has seen.
        // SAFETY: the slot stays allocated while the program runs, and its tuple does not change.
        *back_key = key.partner(unsafe { &*known });
        if A::rewrite(back_key).is_some() {
            return Ok(());
        }
        A::remove_rewrite(key);
    }
    let mut port = request.src_port;
    let mut turn = 0;
    while turn < MASQUERADE_TURNS {
        let meta = Meta {
            kind: KIND_MASQUERADE,
            flags: 0,
            ..request.meta()
        };
        *outward = key.rewrite_to(node, port, request.dst, request.dst_port, meta);
        *back_key = key.partner(outward);
        let meta = Meta {
            kind: KIND_UNMASQUERADE,
            ..meta
        };
        *back = back_key.rewrite_to(request.dst, request.dst_port, request.src, request.src_port, meta);
        if !A::has_socket(skb, back_key, words) && claim_back(back_key, back, partner) {
            if A::insert_rewrite(key, outward) {
                return Ok(());
            }
            A::remove_rewrite(back_key);
            // Another CPU was faster with this very flow; its port stands.
            return if A::rewrite(key).is_some() {
                Ok(())
            } else {
                Err(Reason::RewriteTableFull)
            };
        }
        port = random_port();
        turn += 1;
    }
    Err(Reason::NoSourcePort)
}

/// Claims a node port for a masqueraded connection; false if a live connection to the same endpoint has it.
#[inline(always)]
fn claim_back<A: Family>(key: &RewriteKey<A>, value: &Rewrite<A>, partner: &mut RewriteKey<A>) -> bool {
    if A::insert_rewrite(key, value) {
        return true;
    }
    let Some(owner) = A::rewrite(key) else { return false };
    // SAFETY: the slot stays allocated while the program runs; what changes in it are words that are judged one by one.
    let owner = unsafe { &*owner };
    if !is_over(key, owner, partner) {
        return false;
    }
    forget(key, owner, partner);
    A::insert_rewrite(key, value)
}

/// Writes the entry for requests, after which the connection is open. If another CPU was faster with a packet of the same flow,
/// its choice stands.
#[inline(never)]
fn publish<A: Family>(key: &RewriteKey<A>) -> Result<(), Reason> {
    let Some(scratch) = scratch() else {
        return Err(Reason::RewriteFailed);
    };
    if A::insert_rewrite(key, &scratch.request) {
        maps::count_opened(scratch.service);
        scratch.outcome = trace::OPENED;
        return Ok(());
    }
    let winner = A::rewrite(key);
    // SAFETY: the slot stays allocated while the program runs, and its tuple does not change.
    let won = winner.is_some_and(|winner| unsafe { &*winner }.has_tuple_of(&scratch.request));
    if !won {
        scratch.partner = key.partner(&scratch.request);
        A::remove_rewrite(&scratch.partner);
        if scratch.leaves_by != 0 {
            A::remove_rewrite(&scratch.key);
            A::remove_rewrite(&scratch.back_key);
        }
    }
    if winner.is_some() {
        Ok(())
    } else {
        Err(Reason::RewriteTableFull)
    }
}

/// A source port for a connection whose own is taken, from the range that neither sockets nor node ports use.
#[inline(always)]
fn random_port() -> Port {
    Port::new((PORT_FIRST.load() + pick::uniform(PORT_COUNT.load(), service::random)) as u16)
}
