//! What `proxy-agent trace` asks for and gets: the one value of `TRACE`, written by the tracer, and the records of the ring buffer
//! `EVENTS`, written by the programs for as long as somebody asks.
//!
//! Addresses of both families have one form here: 16 bytes, IPv4 as `::ffff:a.b.c.d` ([`Address::mapped`]). Both sides judge an event by
//! [`Trace::wants`]: the programs so that nothing is written in vain, the tracer because a program may have read half of a new question.

use bytemuck::{Pod, Zeroable};

use crate::addr::{Addr6, Port};
use crate::reason::{REASON_SLOTS, Reason};

/// A connection was written into the rewrite table.
pub const EVENT_OPENED: u8 = 1;
/// A connection or UDP flow was translated at the socket; with a reason: was left to the packet programs.
pub const EVENT_SOCKET: u8 = 2;
/// A packet or a system call was answered with an error.
pub const EVENT_REFUSED: u8 = 3;
/// A packet was dropped.
pub const EVENT_DROPPED: u8 = 4;

/// [`Event::hook`] of what happened at the socket; otherwise it is [`crate::rewrite::HOOK_INGRESS`] or `HOOK_EGRESS`.
pub const AT_SOCKET: u8 = 2;

/// [`Event::flags`]: the connection is masqueraded ([`Event::seen_as`]).
pub const EVENT_MASQUERADED: u8 = 1 << 0;

/// Service ports that can be asked for at once.
pub const TRACE_SERVICES: usize = 8;

/// What a tracer asks for. All zero: nobody does.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
pub struct Trace {
    /// CLOCK_MONOTONIC in ns until when events are wanted, 0 for not at all. The tracer puts it off again and again; so one that was
    /// killed costs nothing after a few seconds.
    pub until: u64,
    /// Bits by the number of the reason; 0: whatever the reason, and without one.
    pub reasons: u64,
    /// Clients: a network, host bits zero, and its mask; all zero for every client.
    pub client: Addr6,
    /// See `client`.
    pub mask: Addr6,
    /// Service ids, unused slots 0; all 0 for every service.
    pub services: [u32; TRACE_SERVICES],
    /// One of so many events; 0 and 1 for all.
    pub sample: u32,
    /// Process id of the tracer, for people.
    pub tracer: u32,
    /// Bits by the number of the event's kind; 0 for all.
    pub kinds: u8,
    /// IANA number; 0 for all.
    pub protocol: u8,
    /// Port that was dialled; 0 for all.
    pub port: Port,
    /// Always zero.
    pub pad: [u8; 4],
}

/// Something that happened. What an event does not have is zero.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
pub struct Event {
    /// CLOCK_MONOTONIC in ns.
    pub time: u64,
    /// Source of the packet; unknown at the socket.
    pub client: Addr6,
    /// What was dialled.
    pub frontend: Addr6,
    /// Where it goes.
    pub backend: Addr6,
    /// What the backend sees as its client.
    pub seen_as: Addr6,
    /// Port of `client`.
    pub client_port: Port,
    /// Port of `frontend`.
    pub frontend_port: Port,
    /// Port of `backend`.
    pub backend_port: Port,
    /// Port of `seen_as`.
    pub seen_as_port: Port,
    /// Service id.
    pub service: u32,
    /// Interface of the packet.
    pub ifindex: u32,
    /// Process at the socket.
    pub pid: u32,
    /// [`reason_of`] has it.
    pub reason: u32,
    /// Name of the process at the socket.
    pub comm: [u8; 16],
    /// `EVENT_*` kind.
    pub kind: u8,
    /// IANA number.
    pub protocol: u8,
    /// A hook, or [`AT_SOCKET`].
    pub hook: u8,
    /// `EVENT_*` flags.
    pub flags: u8,
    /// Always zero.
    pub pad: [u8; 4],
}

const _: () = {
    assert!(size_of::<Trace>() == 96);
    assert!(size_of::<Event>() == 120);
    assert!(REASON_SLOTS <= 64, "`Trace::reasons` has a bit for each");
};

/// [`Event::reason`] of a reason.
#[inline(always)]
pub const fn reason_code(reason: Reason) -> u32 {
    reason as u32 + 1
}

/// The reason of an event, if it has one.
pub fn reason_of(code: u32) -> Option<Reason> {
    let slot = code.checked_sub(1)?;
    Reason::ALL.get(slot as usize).copied()
}

/// What an event is chosen by.
#[derive(Clone, Copy, Debug)]
pub struct Subject {
    /// `EVENT_*` kind.
    pub kind: u8,
    /// IANA number.
    pub protocol: u8,
    /// Port that was dialled.
    pub port: Port,
    /// As in [`Event::reason`].
    pub reason: u32,
    /// Service id.
    pub service: u32,
    /// The client, zero if it is not known.
    pub client: Addr6,
}

impl Event {
    /// What the event is chosen by.
    pub fn subject(&self) -> Subject {
        Subject {
            kind: self.kind,
            protocol: self.protocol,
            port: self.frontend_port,
            reason: self.reason,
            service: self.service,
            client: self.client,
        }
    }
}

impl Trace {
    /// Is the event asked for? Says nothing about time and sample.
    #[inline(always)]
    pub fn wants(&self, subject: &Subject) -> bool {
        (self.kinds == 0 || self.kinds & (1 << (subject.kind & 7)) != 0)
            && (self.protocol == 0 || self.protocol == subject.protocol)
            && (self.port == Port([0; 2]) || self.port == subject.port)
            && self.wants_reason(subject.reason)
            && self.wants_service(subject.service)
            && is_in(&subject.client, &self.client, &self.mask)
    }

    #[inline(always)]
    fn wants_reason(&self, code: u32) -> bool {
        // One bit up, so that no reason is bit 0, which nobody asks for; slot 63 is no reason's.
        self.reasons == 0 || (self.reasons << 1) & (1 << (code & 63)) != 0
    }

    /// Without a branch for each: the verifier would follow them all.
    #[inline(always)]
    fn wants_service(&self, service: u32) -> bool {
        let mut any = 0;
        let mut found = 0;
        let mut i = 0;
        while i < TRACE_SERVICES {
            let differs = self.services[i] ^ service;
            // The highest bit is set exactly if nothing differs.
            found |= differs.wrapping_sub(1) & !differs;
            any |= self.services[i];
            i += 1;
        }
        any == 0 || (found >> 31 != 0 && service != 0)
    }
}

/// By words, without a branch for each.
#[inline(always)]
fn is_in(addr: &Addr6, network: &Addr6, mask: &Addr6) -> bool {
    let (addr, network, mask): ([u32; 4], [u32; 4], [u32; 4]) =
        (bytemuck::cast(*addr), bytemuck::cast(*network), bytemuck::cast(*mask));
    let differs = ((addr[0] & mask[0]) ^ network[0])
        | ((addr[1] & mask[1]) ^ network[1])
        | ((addr[2] & mask[2]) ^ network[2])
        | ((addr[3] & mask[3]) ^ network[3]);
    differs == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{Addr4, Address};

    fn subject() -> Subject {
        Subject {
            kind: EVENT_REFUSED,
            protocol: 6,
            port: Port::new(80),
            reason: reason_code(Reason::UndefinedPort),
            service: 7,
            client: Addr4([10, 244, 1, 5]).mapped(),
        }
    }

    #[test]
    fn every_filter_chooses() {
        let all = Trace::default();
        let cases: [(Trace, bool); 14] = [
            (all, true),
            (
                Trace {
                    kinds: 1 << EVENT_REFUSED,
                    ..all
                },
                true,
            ),
            (
                Trace {
                    kinds: 1 << EVENT_DROPPED,
                    ..all
                },
                false,
            ),
            (Trace { protocol: 6, ..all }, true),
            (Trace { protocol: 17, ..all }, false),
            (
                Trace {
                    port: Port::new(80),
                    ..all
                },
                true,
            ),
            (
                Trace {
                    port: Port::new(81),
                    ..all
                },
                false,
            ),
            (
                Trace {
                    reasons: 1 << Reason::UndefinedPort as u32,
                    ..all
                },
                true,
            ),
            (
                Trace {
                    reasons: 1 << Reason::NoEndpoints as u32,
                    ..all
                },
                false,
            ),
            (
                Trace {
                    services: [3, 7, 0, 0, 0, 0, 0, 0],
                    ..all
                },
                true,
            ),
            (
                Trace {
                    services: [3, 0, 0, 0, 0, 0, 0, 8],
                    ..all
                },
                false,
            ),
            (
                Trace {
                    services: [u32::MAX, 0, 0, 0, 0, 0, 0, 0],
                    ..all
                },
                false,
            ),
            (
                Trace {
                    client: Addr4([10, 244, 0, 0]).mapped(),
                    mask: mask(96 + 16),
                    ..all
                },
                true,
            ),
            (
                Trace {
                    client: Addr4([10, 244, 1, 4]).mapped(),
                    mask: mask(128),
                    ..all
                },
                false,
            ),
        ];
        for (trace, expected) in cases {
            assert_eq!(trace.wants(&subject()), expected, "{trace:?}");
        }
    }

    #[test]
    fn what_an_event_does_not_have_is_not_asked_for() {
        let bare = Subject {
            reason: 0,
            service: 0,
            client: Addr6::default(),
            ..subject()
        };
        assert!(Trace::default().wants(&bare));
        for trace in [
            Trace {
                reasons: u64::MAX,
                ..Trace::default()
            },
            Trace {
                services: [7, 0, 0, 0, 0, 0, 0, 0],
                ..Trace::default()
            },
            Trace {
                client: Addr4([0; 4]).mapped(),
                mask: mask(96),
                ..Trace::default()
            },
        ] {
            assert!(!trace.wants(&bare), "{trace:?}");
        }
    }

    #[test]
    fn reasons_come_back() {
        assert_eq!(reason_of(0), None);
        for reason in Reason::ALL {
            assert_eq!(reason_of(reason_code(*reason)), Some(*reason));
            let only = Trace {
                reasons: 1 << *reason as u32,
                ..Trace::default()
            };
            let wanted = |code| {
                only.wants(&Subject {
                    reason: code,
                    ..subject()
                })
            };
            assert!(wanted(reason_code(*reason)) && !wanted(0) && !wanted(reason_code(*reason) + 1));
        }
    }

    fn mask(bits: u32) -> Addr6 {
        Addr6((u128::MAX << (128 - bits)).to_be_bytes())
    }
}
