//! Session affinity (S132–S140): which endpoint a client was last sent to. Key and value of `AFFINITY4/6`; written and read by the
//! programs, bounded by its LRU.

use crate::addr::{Address, Port};

/// One client of one service port, whichever address of the service it dials (S134).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct AffinityKey<A> {
    /// Service id.
    pub service: u32,
    /// The client's address as it arrives, before masquerading.
    pub client: A,
}

crate::pod_for_both_families!(AffinityKey, v4: 8, v6: 20);

/// The endpoint, and when the client last opened a connection: traffic on an open one does not count (S133).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Affinity<A> {
    /// Endpoint address.
    pub addr: A,
    /// Endpoint port.
    pub port: Port,
    /// Always zero.
    pub pad: [u8; 2],
    /// [`crate::clock`] tick of the last new connection.
    pub last_used: u32,
}

crate::pod_for_both_families!(Affinity, v4: 12, v6: 24);

impl<A: Address> Affinity<A> {
    /// Is the record still to be followed `now`, with this timeout of the service?
    #[inline(always)]
    pub fn is_fresh(&self, timeout_seconds: u32, now: u32) -> bool {
        crate::clock::elapsed(self.last_used, now) <= crate::clock::ticks_of_seconds(timeout_seconds as u64)
    }
}
