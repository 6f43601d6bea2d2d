//! Why a packet was not served, or served in an unusual way: the index into the per-CPU array `REASONS` and the label of the
//! agent's metric. The name of a variant is the name a person sees.

/// Declares the reasons once: number, name and meaning cannot drift apart.
macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $number:literal $name:literal,)+) => {
        /// A reason; the number is its slot in `REASONS` and never reused.
        #[repr(u32)]
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum Reason {
            $($(#[$doc])* $variant = $number,)+
        }

        impl Reason {
            /// Every reason, in the order of the numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The label under which the reason is shown.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }
        }
    };
}

reasons! {
    /// Answered with an error: the service has no usable endpoint anywhere (S122).
    NoEndpoints = 0 "no_endpoints",
    /// Dropped: endpoints exist, but none that this policy may use here (S58).
    NoLocalEndpoints = 1 "no_local_endpoints",
    /// Dropped: the entry could not be written because the rewrite table was full or locked.
    RewriteTableFull = 2 "rewrite_table_full",
    /// Dropped: no free source port was found for a masqueraded or colliding connection.
    NoSourcePort = 3 "no_source_port",
    /// Dropped: no route, neighbour or node address towards the chosen backend.
    NoRoute = 4 "no_route",
    /// Dropped: the frontend points outside the backend table; the agent repairs it at the next sync.
    BadRange = 5 "bad_range",
    /// Dropped: the packet could not be changed (out of memory, headers that ended early, or the first fragment of an SCTP packet
    /// whose ports have to change).
    RewriteFailed = 6 "rewrite_failed",
    /// Dropped: the error message for a refused packet could not be built.
    RefuseFailed = 7 "refuse_failed",
    /// Passed on: a socket was left to the packet programs because its storage could not be had.
    SocketStorageFull = 8 "socket_storage_full",
    /// Served with another source port, because the client's own was taken by another connection to the same backend.
    SourcePortChanged = 9 "source_port_changed",
    /// Dropped: the client is in none of the service's source ranges (S103).
    SourceNotAllowed = 10 "source_not_allowed",
    /// Answered with an error: the service address does not define this port (S77).
    UndefinedPort = 11 "undefined_port",
    /// Dropped: it was about to leave the node for an address of the service network that belongs to nobody (S78), or is not
    /// translated, such as a ping (S79).
    Unallocated = 12 "unallocated",
    /// Dropped: it was about to leave by the interface it came from, for a port that a service's external address does not define;
    /// whoever sent it would send it back.
    Loop = 13 "loop",
    /// Dropped: new connections wait until the maps have moved ([`crate::settings::MODE_HOLD`]).
    Held = 14 "held",
}

impl Reason {
    /// Is the packet answered with an error? The other reasons for not serving one drop it.
    #[inline(always)]
    pub const fn is_refused(self) -> bool {
        matches!(self, Self::NoEndpoints | Self::UndefinedPort)
    }
}

/// Slots of `REASONS`; more than there are reasons, so that a new one does not change the map. The last ones are no reasons'.
pub const REASON_SLOTS: usize = 64;

/// Slot of `REASONS`: events that found no room in the ring buffer of `proxy-agent trace`.
pub const EVENTS_LOST: u32 = 63;
/// Slot of `REASONS`: packets that XDP has forwarded.
pub const XDP_FORWARDED: u32 = 58;
/// Slots of `REASONS` by family: entries that the programs have put into the rewrite table.
pub const REWRITES_INSERTED: [u32; 2] = [59, 60];
/// Slots of `REASONS` by family: entries that the programs have removed from it themselves.
pub const REWRITES_REMOVED: [u32; 2] = [61, 62];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_slots() {
        for (slot, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, slot);
        }
        let others = [REWRITES_INSERTED, REWRITES_REMOVED, [EVENTS_LOST, XDP_FORWARDED]];
        for slot in others.into_iter().flatten() {
            assert!(Reason::ALL.len() <= slot as usize && (slot as usize) < REASON_SLOTS);
        }
    }
}
