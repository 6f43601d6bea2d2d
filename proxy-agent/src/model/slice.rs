//! EndpointSlices. There are far more endpoints than anything else (250,000 in a large cluster), so an endpoint is kept in as few
//! bytes as possible: its address in its family's own size, its conditions as bits, and "is this node" instead of a node's name.

use std::sync::Arc;

use proxy_common::addr::{Addr4, Addr6, Address, Port, Protocol};

use super::ObjectName;

/// One EndpointSlice of one service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EndpointSlice {
    /// Namespace and name of the slice (S11).
    pub name: ObjectName,
    /// Name of the Service it belongs to, in the same namespace (S10).
    pub service: Arc<str>,
    /// Its ports.
    pub ports: Vec<SlicePort>,
    /// Its endpoints, of one family (S21).
    pub endpoints: SliceEndpoints,
}

/// A port of a slice: `name` and `protocol` say for which service port it is, `port` is what the endpoints listen on (S27).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SlicePort {
    /// Name, empty for an unnamed one (S28).
    pub name: Box<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// The real destination port.
    pub port: Port,
}

/// The endpoints of a slice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SliceEndpoints {
    /// `addressType: IPv4`.
    V4(Box<[Endpoint<Addr4>]>),
    /// `addressType: IPv6`.
    V6(Box<[Endpoint<Addr6>]>),
}

impl SliceEndpoints {
    /// `4` or `6`.
    pub fn family(&self) -> u8 {
        match self {
            Self::V4(_) => Addr4::FAMILY,
            Self::V6(_) => Addr6::FAMILY,
        }
    }
}

/// A family that knows which endpoints of a slice are its own.
pub trait Family: Address {
    /// The endpoints if the slice is of this family, else none.
    fn endpoints(slice: &SliceEndpoints) -> &[Endpoint<Self>];
}

impl Family for Addr4 {
    fn endpoints(slice: &SliceEndpoints) -> &[Endpoint<Self>] {
        match slice {
            SliceEndpoints::V4(endpoints) => endpoints,
            SliceEndpoints::V6(_) => &[],
        }
    }
}

impl Family for Addr6 {
    fn endpoints(slice: &SliceEndpoints) -> &[Endpoint<Self>] {
        match slice {
            SliceEndpoints::V4(_) => &[],
            SliceEndpoints::V6(endpoints) => endpoints,
        }
    }
}

/// One endpoint.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint<A> {
    /// Address (S22).
    pub addr: A,
    /// `ENDPOINT_*` bits.
    pub flags: u8,
    /// `hints.forZones`, shared by the endpoints of a slice that have the same; `None` if there are none.
    pub zones: Option<Arc<Vec<Box<str>>>>,
}

/// Condition `ready`, absent means true (S46).
pub const ENDPOINT_READY: u8 = 1 << 0;
/// Condition `serving`, absent means true.
pub const ENDPOINT_SERVING: u8 = 1 << 1;
/// Condition `terminating`, absent means false.
pub const ENDPOINT_TERMINATING: u8 = 1 << 2;
/// `nodeName` is the name of this node (S44).
pub const ENDPOINT_LOCAL: u8 = 1 << 3;
/// `hints.forNodes` has an entry.
pub const ENDPOINT_NODE_HINTED: u8 = 1 << 4;
/// `hints.forNodes` has this node.
pub const ENDPOINT_FOR_THIS_NODE: u8 = 1 << 5;

impl<A> Endpoint<A> {
    /// Is any of these bits set?
    pub fn has(&self, flags: u8) -> bool {
        self.flags & flags != 0
    }

    /// May be chosen for new connections, even when terminating (S47).
    pub fn is_ready(&self) -> bool {
        self.has(ENDPOINT_READY)
    }

    /// Chosen only when nothing is ready (S48).
    pub fn is_fallback(&self) -> bool {
        self.flags & (ENDPOINT_READY | ENDPOINT_SERVING | ENDPOINT_TERMINATING)
            == ENDPOINT_SERVING | ENDPOINT_TERMINATING
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_small() {
        assert_eq!(size_of::<Endpoint<Addr4>>(), 16);
        assert_eq!(size_of::<Endpoint<Addr6>>(), 32);
    }
}
