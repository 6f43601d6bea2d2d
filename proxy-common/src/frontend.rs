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

/// The frontend is a Service's cluster IP, as opposed to one of its external addresses: nodePort, load-balancer address or
/// externalIP (S56).
pub const FRONTEND_CLUSTER_IP: u32 = 1 << 0;
/// The traffic policy for this kind of address is Local: `internalTrafficPolicy` for a cluster IP (S57), `externalTrafficPolicy`
/// for the others (S87).
pub const FRONTEND_LOCAL: u32 = 1 << 1;
/// Some endpoint of the service port is usable somewhere (S55): an empty range then means DROP, otherwise REFUSED.
pub const FRONTEND_HAS_ENDPOINTS: u32 = 1 << 2;
/// Only sources in `SRC_RANGES4/6` of the service may connect (S101). On load-balancer addresses only.
pub const FRONTEND_SOURCE_RANGES: u32 = 1 << 3;
/// Stands for every port and protocol that the service address does not define. On a cluster IP they are refused (S77). Others may
/// be a node's addresses as well, so there they are only kept from being sent back to where they came from. Its key has port and
/// protocol 0.
pub const FRONTEND_UNDEFINED: u32 = 1 << 4;

/// Who asks; decides which range applies and whether the source is masqueraded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// A pod, as the local-traffic detector sees it (S114).
    Pod,
    /// This node itself.
    Host,
    /// Anybody else.
    External,
}

/// What is behind a frontend. All zero: a service without endpoints, which refuses.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Pod, Zeroable)]
pub struct Frontend {
    /// Service id: key of `SERVICES`, never 0 for a real service.
    #[cfg(not(feature = "next-layout"))]
    pub service: u32,
    /// `FRONTEND_*` bits.
    pub flags: u32,
    /// Its place in the layout of the feature: the size stays, the meaning does not.
    #[cfg(feature = "next-layout")]
    pub service: u32,
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
    /// The range that a new connection chooses from. A Local policy binds every client of a cluster IP (S57), but only external
    /// clients of the other addresses: pods and the node itself reach the whole cluster set (S87, S88).
    #[inline(always)]
    pub fn range(&self, origin: Origin) -> Range {
        let is_cluster_ip = self.flags & FRONTEND_CLUSTER_IP != 0;
        if self.flags & FRONTEND_LOCAL != 0 && (is_cluster_ip || origin == Origin::External) {
            self.local
        } else {
            self.cluster
        }
    }

    /// Must the client's address become one of this node, on account of who asks for what (the matrix of S108–S113)? A client that
    /// is its own backend is masqueraded whatever the answer (S110).
    ///
    /// `has_pods` says whether pods can be told from others; without, nobody is masqueraded to a cluster IP (S112). The node's own
    /// connections carry an address of the node already.
    #[inline(always)]
    pub fn masquerades(&self, origin: Origin, has_pods: bool, masquerade_all: bool) -> bool {
        if origin == Origin::Host {
            return false;
        }
        if self.flags & FRONTEND_CLUSTER_IP != 0 {
            masquerade_all || (has_pods && origin != Origin::Pod)
        } else {
            self.flags & FRONTEND_LOCAL == 0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Addr4;

    const CLUSTER: Range = Range {
        first: 10,
        count: 3,
        keep: 0,
    };
    const LOCAL: Range = Range {
        first: 20,
        count: 1,
        keep: 0,
    };

    /// S57, S86, S87: address kind and policy against who asks.
    #[test]
    fn ranges_by_kind_and_origin() {
        let range = |flags, origin| {
            Frontend {
                flags,
                cluster: CLUSTER,
                local: LOCAL,
                ..Frontend::default()
            }
            .range(origin)
        };
        for origin in [Origin::Pod, Origin::Host, Origin::External] {
            assert_eq!(range(FRONTEND_CLUSTER_IP, origin), CLUSTER);
            assert_eq!(range(FRONTEND_CLUSTER_IP | FRONTEND_LOCAL, origin), LOCAL);
            assert_eq!(range(0, origin), CLUSTER);
            let expected = if origin == Origin::External { LOCAL } else { CLUSTER };
            assert_eq!(range(FRONTEND_LOCAL, origin), expected);
        }
    }

    /// The matrix of S108–S113, row by row.
    #[test]
    fn the_masquerading_matrix() {
        use Origin::{External, Pod};
        let masquerades = |flags, origin, has_pods, all| {
            Frontend {
                flags,
                ..Frontend::default()
            }
            .masquerades(origin, has_pods, all)
        };
        for local in [0, FRONTEND_LOCAL] {
            let cluster_ip = FRONTEND_CLUSTER_IP | local;
            assert!(!masquerades(cluster_ip, Pod, true, false));
            assert!(masquerades(cluster_ip, External, true, false));
            assert!(masquerades(cluster_ip, Pod, true, true), "S111");
            assert!(!masquerades(cluster_ip, External, false, false), "S112");
        }
        for origin in [Pod, External] {
            assert!(masquerades(0, origin, true, false), "S109");
            assert!(!masquerades(FRONTEND_LOCAL, origin, true, true), "S87, S111");
        }
    }

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
