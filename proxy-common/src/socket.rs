//! What a translated socket remembers: the value of the socket storage maps `SOCKETS4/6`. Written and read by the cgroup hooks
//! only; it dies with the socket.

use crate::addr::{Address, Port};

/// Flows a socket remembers at once: an unconnected UDP socket may talk to several services, such as two name servers.
pub const SOCKET_FLOWS: usize = 4;

/// One translated destination of a socket. All zero: unused.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SocketFlow<A> {
    /// Address the application dialled.
    pub frontend: A,
    /// Address its packets go to.
    pub backend: A,
    /// Port the application dialled.
    pub frontend_port: Port,
    /// Port its packets go to; 0 marks an unused slot.
    pub backend_port: Port,
    /// [`crate::frontend::Frontend::generation`] when the backend was last known to be valid.
    pub generation: u32,
}

crate::pod_for_both_families!(SocketFlow, v4: 16, v6: 40);

/// The flows of one socket; a connected socket has one, in the first slot.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SocketFlows<A> {
    /// Slots, newest at `next - 1`.
    pub flows: [SocketFlow<A>; SOCKET_FLOWS],
    /// Slot to overwrite next.
    pub next: u32,
}

crate::pod_for_both_families!(SocketFlows, v4: 68, v6: 164);

impl<A: Address> SocketFlow<A> {
    /// Does the slot translate (`addr`, `port`) for requests?
    #[inline(always)]
    pub fn has_frontend(&self, addr: A, port: Port) -> bool {
        self.backend_port != Port([0; 2]) && self.frontend == addr && self.frontend_port == port
    }

    /// Do replies from (`addr`, `port`) belong to the slot?
    #[inline(always)]
    pub fn has_backend(&self, addr: A, port: Port) -> bool {
        port != Port([0; 2]) && self.backend == addr && self.backend_port == port
    }
}
