//! The ports of a fragmented packet (S153): only its first fragment has them, so they are remembered for the others. Key and
//! value of `FRAGMENTS4/6`; written and read by the tc programs only, an entry lives as long as the LRU keeps it.

use bytemuck::{Pod, Zeroable};

use crate::addr::Port;

/// What the fragments of one packet have in common at one hook (RFC 791, RFC 8200).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FragmentKey<A> {
    /// Source address.
    pub src: A,
    /// Destination address.
    pub dst: A,
    /// Identification as it stands in the packet; 16 bits for IPv4.
    pub id: u32,
    /// IANA protocol number.
    pub protocol: u8,
    /// Hook where the fragment is seen; see [`crate::rewrite::HOOK_INGRESS`].
    pub hook: u8,
    /// Always zero.
    pub pad: [u8; 2],
}

crate::pod_for_both_families!(FragmentKey, v4: 16, v6: 40);

/// The ports of the first fragment.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Pod, Zeroable)]
pub struct Ports {
    /// Source port.
    pub src: Port,
    /// Destination port.
    pub dst: Port,
}
