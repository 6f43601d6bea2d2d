//! What a translated socket remembers: the value of the socket storage maps `SOCKETS4/6`. Written and read by the cgroup hooks
//! only; it dies with the socket. And whose sockets are not translated: the keys of `SOCKET_OPT_OUT`, which the agent writes.

use crate::addr::{Address, Port};

/// In [`crate::names::SOCKET_OPT_OUT`] if any cgroup is: so that nothing else is looked up where none is. No cgroup has this id.
pub const ANY_OPTED_OUT: u64 = 0;
/// A pod's cgroup is looked for so far below the root of the hierarchy. The kubelet's are at 2 or 3, and a few below where the node is
/// itself a container or the kubelet has a root of its own.
pub const CGROUP_LEVELS: i32 = 12;

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
