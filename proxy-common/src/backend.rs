//! One real endpoint of a service: a slot of the `BACKENDS4/6` arrays. Written by the agent, read by `resolve`.

use crate::addr::{Address, Port};

/// The endpoint terminates; it is only in a selectable range because nothing better is left (S52, S53). For people and tools.
pub const BACKEND_TERMINATING: u16 = 1 << 0;
/// The endpoint runs on this node (S44). For people and tools.
pub const BACKEND_LOCAL: u16 = 1 << 1;

/// An endpoint's address and port, as the packet will carry them. All zero: an unused slot.
///
/// Slots within a range are sorted by (address, port); see [`crate::frontend::Range`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Backend<A> {
    /// Endpoint address.
    pub addr: A,
    /// Endpoint port.
    pub port: Port,
    /// `BACKEND_*` bits.
    pub flags: u16,
}

crate::pod_for_both_families!(Backend, v4: 8, v6: 20);

impl<A: Address> Backend<A> {
    /// Is this the same endpoint, whatever the flags (S40)?
    #[inline(always)]
    pub fn is(&self, addr: A, port: Port) -> bool {
        self.addr == addr && self.port == port
    }
}
