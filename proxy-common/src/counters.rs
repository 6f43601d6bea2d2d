//! What is counted per service port: the value of the per-CPU array `COUNTERS`, whose index is the service id. Written by the
//! programs; read by the agent, which clears a slot when it gives its number to another service port.
//!
//! Packets are those that went through an entry for requests or for replies, so every one is counted once, masqueraded or not. A
//! connection translated at the socket is counted as a connection, but its packets pass no program.

use bytemuck::{Pod, Zeroable};

use crate::reason::Reason;

/// Index of what clients send in [`Counters::packets`] and [`Counters::bytes`].
pub const TO_BACKEND: usize = 0;
/// Index of what backends send.
pub const TO_CLIENT: usize = 1;
/// The labels of the two.
pub const DIRECTIONS: [&str; 2] = ["request", "reply"];

/// Index of what the packet programs count in [`Counters::connections`] and [`Counters::refused`]. They and the socket hooks have
/// a word each, because a socket hook may be interrupted by packets on its CPU and an addition is not atomic.
pub const BY_PACKET: usize = 0;
/// Index of what the socket hooks count. One hook may be preempted by another (with CONFIG_PREEMPT): then a count may be lost.
pub const BY_SOCKET: usize = 1;

/// Slot of no service: its `connections` are all that the packet programs have opened, services counted or not.
pub const TOTAL: u32 = 0;

/// What is counted of a service port, by one CPU.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
pub struct Counters {
    /// Packets translated, by direction. Segments that the network card or the kernel has merged are one packet.
    pub packets: [u64; 2],
    /// Their bytes from the IP header on, by direction.
    pub bytes: [u64; 2],
    /// Connections opened and UDP flows begun, by who translates them.
    pub connections: [u64; 2],
    /// Packets and system calls answered with an error, by who answered.
    pub refused: [u64; 2],
    /// Packets dropped, by [`DropClass`].
    pub dropped: [u64; DropClass::ALL.len()],
}

const _: () = assert!(size_of::<Counters>() == 88);

impl Counters {
    /// Adds what another CPU has counted.
    pub fn add(&mut self, other: &Self) {
        let mut sum: [u64; size_of::<Self>() / 8] = bytemuck::cast(*self);
        let other: [u64; size_of::<Self>() / 8] = bytemuck::cast(*other);
        for (sum, more) in sum.iter_mut().zip(other) {
            *sum = sum.wrapping_add(more);
        }
        *self = bytemuck::cast(sum);
    }

    /// What was counted since `before`; everything if the slot was cleared meanwhile.
    pub fn since(&self, before: &Self) -> Self {
        let now: [u64; size_of::<Self>() / 8] = bytemuck::cast(*self);
        let then: [u64; size_of::<Self>() / 8] = bytemuck::cast(*before);
        if now.iter().zip(then).any(|(now, then)| *now < then) {
            return *self;
        }
        let mut difference = now;
        for (now, then) in difference.iter_mut().zip(then) {
            *now -= then;
        }
        bytemuck::cast(difference)
    }

    /// Has anything been counted?
    pub fn is_zero(&self) -> bool {
        *self == Self::default()
    }
}

/// Why a service's packets were dropped, roughly; `REASONS` has it in detail, but not by service.
#[repr(usize)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DropClass {
    /// The Service wants it so: no endpoint that its traffic policy may use here, or a client outside of its source ranges.
    Policy = 0,
    /// Something was full: the rewrite table, or the range of source ports.
    Resources = 1,
    /// It could not be done: no route, or a packet that could not be changed.
    Failure = 2,
}

impl DropClass {
    /// Every class, in the order of the numbers.
    pub const ALL: [Self; 3] = [Self::Policy, Self::Resources, Self::Failure];

    /// The label under which the class is shown.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Policy => "policy",
            Self::Resources => "resources",
            Self::Failure => "failure",
        }
    }

    /// The class of a reason that drops.
    #[inline(always)]
    pub const fn of(reason: Reason) -> Self {
        match reason {
            Reason::NoLocalEndpoints | Reason::SourceNotAllowed => Self::Policy,
            Reason::RewriteTableFull | Reason::NoSourcePort => Self::Resources,
            _ => Self::Failure,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_and_differences() {
        let one = Counters {
            packets: [1, 2],
            bytes: [3, 4],
            connections: [5, 6],
            refused: [7, 8],
            dropped: [9, 10, 11],
        };
        let mut two = one;
        two.add(&one);
        assert_eq!((two.packets, two.dropped), ([2, 4], [18, 20, 22]));
        assert_eq!(two.since(&one), one);
        assert_eq!(one.since(&two), one, "the slot was cleared");
        assert!(one.since(&one).is_zero());
    }

    #[test]
    fn classes_are_slots() {
        for (slot, class) in DropClass::ALL.into_iter().enumerate() {
            assert_eq!(class as usize, slot);
        }
    }
}
