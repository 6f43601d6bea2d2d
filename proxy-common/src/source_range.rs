//! Who may connect to a load-balancer address (S101): the key of the prefix trie `SRC_RANGES4/6`, whose presence means "allowed".
//! Written by the agent; read for new connections of services with the flag only.

use crate::addr::Address;

/// A prefix of client addresses of one service. The kernel compares the first `prefix_len` bits of what follows it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SourceRangeKey<A> {
    /// 32 for the service id, and the prefix length.
    pub prefix_len: u32,
    /// Service id, as bytes in host order: always compared as a whole.
    pub service: [u8; 4],
    /// Network address, host bits zero; or the client's address for a look-up.
    pub addr: A,
}

crate::pod_for_both_families!(SourceRangeKey, v4: 12, v6: 24);

impl<A: Address> SourceRangeKey<A> {
    /// The key for a prefix of `len` bits of a service's clients.
    #[inline(always)]
    pub const fn new(service: u32, addr: A, len: u8) -> Self {
        Self {
            prefix_len: 32 + len as u32,
            service: service.to_ne_bytes(),
            addr,
        }
    }
}
