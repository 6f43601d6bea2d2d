//! What a client dials: the key and value of `FRONTENDS4/6`. Written by the agent, one hash look-up per new connection.
//!
//! A range of backends is written once and never changed while a frontend points to it: a service whose endpoints change gets a
//! fresh range and one frontend write switches over. So a packet sees the old set or the new one, never a mixture (S165).

use bytemuck::{Pod, Zeroable};

use crate::addr::{Address, Port};

/// The address, port and protocol a client dials (S26).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FrontendKey<A> {
    /// Dialled address.
    pub addr: A,
    /// Dialled port.
    pub port: Port,
    /// IANA protocol number.
    pub protocol: u8,
    /// Always zero.
    pub pad: u8,
}

crate::pod_for_both_families!(FrontendKey, v4: 8, v6: 20);

impl<A: Address> FrontendKey<A> {
    /// The key for an address, port and IANA protocol number.
    #[inline(always)]
    pub const fn new(addr: A, port: Port, protocol: u8) -> Self {
        Self {
            addr,
            port,
            protocol,
            pad: 0,
        }
    }
}

/// A block of slots in `BACKENDS4/6`.
///
/// `first .. first+count` may be chosen for a new connection and is sorted by (address, port). `first+count .. +keep` follows,
/// sorted as well: endpoints that are not chosen any more but still serve, so that a UDP flow may stay with them (S145).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Pod, Zeroable)]
pub struct Range {
    /// Index of the first slot.
    pub first: u32,
    /// Selectable slots.
    pub count: u32,
    /// Slots after the selectable ones that running flows may keep.
    pub keep: u32,
}

/// The frontend is a Service's cluster IP (as opposed to one of its external addresses).
pub const FRONTEND_CLUSTER_IP: u32 = 1 << 0;
/// Requests to this frontend use the local range (S57).
pub const FRONTEND_INTERNAL_LOCAL: u32 = 1 << 1;
/// Some endpoint of the service port is usable somewhere (S55): an empty range then means DROP, otherwise REFUSED.
pub const FRONTEND_HAS_ENDPOINTS: u32 = 1 << 2;

/// What is behind a frontend. All zero: a service without endpoints, which refuses.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Pod, Zeroable)]
pub struct Frontend {
    /// Service id: key of `SERVICES`, never 0 for a real service.
    pub service: u32,
    /// `FRONTEND_*` bits.
    pub flags: u32,
    /// The cluster set (S52).
    pub cluster: Range,
    /// The local set (S53).
    pub local: Range,
    /// Session affinity timeout in seconds, 0 for none (S132).
    pub affinity_seconds: u32,
    /// Changes whenever a range of the service port is replaced; lets a socket see that its remembered choice may be stale.
    pub generation: u32,
}

const _: () = assert!(size_of::<Frontend>() == 40);

impl Frontend {
    /// The range that requests to this frontend choose from.
    #[inline(always)]
    pub const fn range(&self) -> Range {
        if self.flags & FRONTEND_INTERNAL_LOCAL != 0 {
            self.local
        } else {
            self.cluster
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Addr4;

    #[test]
    fn layout_is_spelled_out() {
        let key = FrontendKey::new(Addr4([10, 96, 0, 10]), Port::new(53), 17);
        assert_eq!(bytemuck::bytes_of(&key), [10, 96, 0, 10, 0, 53, 17, 0]);
        let words: [u32; 10] = bytemuck::cast(Frontend {
            service: 1,
            flags: 2,
            cluster: Range {
                first: 3,
                count: 4,
                keep: 5,
            },
            local: Range {
                first: 6,
                count: 7,
                keep: 8,
            },
            affinity_seconds: 9,
            generation: 10,
        });
        assert_eq!(words, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    }
}
