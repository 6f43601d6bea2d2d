//! The rewrite table: for one packet shape at one hook, the exact tuple the packet carries afterwards.
//!
//! A connection has two entries, four when its source is rewritten too (`docs/architecture.md`). Programs write them when the
//! first packet is seen; the agent only reads and removes them. Both directions of a pair find each other without a pointer:
//! the partner of an entry is keyed by its rewritten tuple reversed, at the other hook ([`RewriteKey::partner`]).

use crate::addr::{Address, Port};
use crate::checksum;

/// Where a packet is looked up.
pub const HOOK_INGRESS: u8 = 0;
/// See [`HOOK_INGRESS`].
pub const HOOK_EGRESS: u8 = 1;

/// A packet's 5-tuple and the hook where it is seen.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RewriteKey<A> {
    /// Source address before the rewrite.
    pub src: A,
    /// Destination address before the rewrite.
    pub dst: A,
    /// Source port before the rewrite.
    pub src_port: Port,
    /// Destination port before the rewrite.
    pub dst_port: Port,
    /// IANA protocol number.
    pub protocol: u8,
    /// [`HOOK_INGRESS`] or [`HOOK_EGRESS`].
    pub hook: u8,
    /// Always zero.
    pub pad: [u8; 2],
}

crate::pod_for_both_families!(RewriteKey, v4: 16, v6: 40);

/// client → frontend: the destination becomes a backend. Seen where the client's packets enter (or, for the node itself, leave).
pub const KIND_REQUEST: u8 = 1;
/// backend → client: the source becomes the frontend again.
pub const KIND_REPLY: u8 = 2;
/// client → backend, leaving towards the backend: the source becomes an address of this node (S108).
pub const KIND_MASQUERADE: u8 = 3;
/// backend → node, arriving from the backend: the destination becomes the client again.
pub const KIND_UNMASQUERADE: u8 = 4;

/// After the rewrite the packet's route is stale: look the new one up and send it there. For requests of the node itself, which
/// were routed towards the frontend before the egress hook saw them.
pub const REWRITE_REROUTE: u8 = 1 << 0;
/// After the rewrite hand the packet to the ingress of interface `ifindex`. For replies to the node itself, so that reverse-path
/// filters see them arrive where the frontend's address is routed.
pub const REWRITE_TO_INGRESS: u8 = 1 << 1;
/// Both entries of this pair are at the egress hook: the node talks to an endpoint on its own host network.
pub const REWRITE_SAME_HOOK: u8 = 1 << 2;
/// The connection also has a masquerade pair.
pub const REWRITE_MASQUERADED: u8 = 1 << 3;
/// The node's own connection gave way to a masqueraded one, whose translated packets have the very tuple of this one. So requests
/// are only those of the node itself, and replies are translated no earlier than at interface `ifindex`, by which the node sent the
/// request: a hook behind it would take them for the masqueraded connection's. A bridge and its ports are such hooks.
pub const REWRITE_GAVE_WAY: u8 = 1 << 4;

/// At least one packet went through the entry. The one that created it counts for requests and masquerades, so what this tells is
/// whether the other direction has answered.
pub const STATE_SEEN: u32 = 1 << 0;
/// A TCP FIN went through the entry.
pub const STATE_FIN: u32 = 1 << 1;
/// A TCP RST went through the entry.
pub const STATE_RST: u32 = 1 << 2;

/// The tuple a packet carries after the rewrite, and what is needed to apply it cheaply.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Rewrite<A> {
    /// Source address after the rewrite.
    pub src: A,
    /// Destination address after the rewrite.
    pub dst: A,
    /// Source port after the rewrite.
    pub src_port: Port,
    /// Destination port after the rewrite.
    pub dst_port: Port,
    /// Ones'-complement difference of the addresses, as [`checksum::difference`] gives it.
    pub addr_delta: u16,
    /// Ones'-complement difference of the ports; zero exactly if no port changes: then none is written.
    pub port_delta: u16,
    /// Service id.
    pub service: u32,
    /// Target of [`REWRITE_TO_INGRESS`], place of [`REWRITE_GAVE_WAY`].
    pub ifindex: u32,
    /// [`crate::clock`] tick of the last packet, updated at most once per tick.
    pub last_seen: u32,
    /// Nothing; see the feature.
    #[cfg(feature = "next-layout")]
    pub next: u32,
    /// `STATE_*` bits of this direction.
    pub state: u32,
    /// `KIND_*`.
    pub kind: u8,
    /// `REWRITE_*` bits.
    pub flags: u8,
    /// Always zero.
    pub pad: [u8; 2],
}

#[cfg(not(feature = "next-layout"))]
crate::pod_for_both_families!(Rewrite, v4: 36, v6: 60);
#[cfg(feature = "next-layout")]
crate::pod_for_both_families!(Rewrite, v4: 40, v6: 64);

/// The part of an entry that is not a tuple; see the fields of [`Rewrite`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Meta {
    /// Service id.
    pub service: u32,
    /// Target of [`REWRITE_TO_INGRESS`], place of [`REWRITE_GAVE_WAY`].
    pub ifindex: u32,
    /// Tick of the packet that creates the entry.
    pub last_seen: u32,
    /// `KIND_*`.
    pub kind: u8,
    /// `REWRITE_*` bits.
    pub flags: u8,
}

impl<A: Address> Rewrite<A> {
    /// What is not a tuple.
    #[inline(always)]
    pub fn meta(&self) -> Meta {
        Meta {
            service: self.service,
            ifindex: self.ifindex,
            last_seen: self.last_seen,
            kind: self.kind,
            flags: self.flags,
        }
    }

    /// Do both entries lead to the same tuple?
    #[inline(always)]
    pub fn has_tuple_of(&self, other: &Self) -> bool {
        self.src == other.src
            && self.dst == other.dst
            && self.src_port == other.src_port
            && self.dst_port == other.dst_port
    }
}

impl<A: Address> RewriteKey<A> {
    /// The key for a tuple at a hook.
    #[inline(always)]
    pub const fn new(src: A, src_port: Port, dst: A, dst_port: Port, protocol: u8, hook: u8) -> Self {
        Self {
            src,
            dst,
            src_port,
            dst_port,
            protocol,
            hook,
            pad: [0; 2],
        }
    }

    /// The entry that turns this packet into (`src:src_port` → `dst:dst_port`).
    #[inline(always)]
    pub fn rewrite_to(&self, src: A, src_port: Port, dst: A, dst_port: Port, meta: Meta) -> Rewrite<A> {
        // Every field is written once, with a value the compiler does not know: it would turn runs of zeros into a call.
        Rewrite {
            src,
            dst,
            src_port,
            dst_port,
            addr_delta: checksum::difference(self.src.sum() + self.dst.sum(), src.sum() + dst.sum()),
            port_delta: if self.src_port == src_port && self.dst_port == dst_port {
                0
            } else {
                checksum::change(
                    self.src_port.sum() + self.dst_port.sum(),
                    src_port.sum() + dst_port.sum(),
                )
            },
            service: meta.service,
            ifindex: meta.ifindex,
            last_seen: meta.last_seen,
            #[cfg(feature = "next-layout")]
            next: 0,
            state: 0,
            kind: meta.kind,
            flags: meta.flags,
            pad: [0; 2],
        }
    }

    /// The key of the entry that undoes `rewrite` (this key's value) for packets in the other direction.
    #[inline(always)]
    pub fn partner(&self, rewrite: &Rewrite<A>) -> Self {
        let hook = if rewrite.flags & REWRITE_SAME_HOOK != 0 {
            self.hook
        } else {
            self.hook ^ 1
        };
        Self::new(
            rewrite.dst,
            rewrite.dst_port,
            rewrite.src,
            rewrite.src_port,
            self.protocol,
            hook,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Addr4;

    const CLIENT: Addr4 = Addr4([10, 0, 0, 2]);
    const VIP: Addr4 = Addr4([10, 96, 0, 10]);
    const BACKEND: Addr4 = Addr4([10, 0, 1, 7]);

    #[test]
    fn partners_find_each_other() {
        let key = RewriteKey::new(CLIENT, Port::new(4000), VIP, Port::new(80), 6, HOOK_INGRESS);
        let request = key.rewrite_to(CLIENT, Port::new(4000), BACKEND, Port::new(8080), Meta::default());
        let reply_key = key.partner(&request);
        assert_eq!(
            reply_key,
            RewriteKey::new(BACKEND, Port::new(8080), CLIENT, Port::new(4000), 6, HOOK_EGRESS)
        );
        let reply = reply_key.rewrite_to(VIP, Port::new(80), CLIENT, Port::new(4000), Meta::default());
        assert_eq!(reply_key.partner(&reply), key);
    }

    #[test]
    fn ports_with_an_equal_sum_are_a_change() {
        let key = RewriteKey::new(CLIENT, Port::new(40_000), VIP, Port::new(80), 6, HOOK_INGRESS);
        let delta = |src, dst| {
            key.rewrite_to(CLIENT, Port::new(src), BACKEND, Port::new(dst), Meta::default())
                .port_delta
        };
        assert_eq!(delta(40_000, 80), 0);
        assert_eq!(delta(32_000, 8_080), 0xffff);
        assert_eq!(checksum::update(0x1234, 0xffff), 0x1234);
    }

    #[test]
    fn layout_is_spelled_out() {
        let key = RewriteKey::new(CLIENT, Port::new(4000), VIP, Port::new(80), 6, HOOK_EGRESS);
        assert_eq!(
            bytemuck::bytes_of(&key),
            [10, 0, 0, 2, 10, 96, 0, 10, 0x0f, 0xa0, 0, 80, 6, 1, 0, 0]
        );
    }
}
