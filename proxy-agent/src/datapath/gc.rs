//! Removes connections that have gone quiet from the rewrite table: a few thousand entries per tick, within a time budget, so that
//! the caller is never held up. The table is an LRU map and survives without this; what it saves is room and stale source ports.
//!
//! Both directions of a connection are judged together and removed together. After each walk the session affinity records are
//! counted, for the metrics: the kernel does not say how many entries a map has.

use std::time::{Duration, Instant};

use proxy_common::addr::{Address, Protocol};
use proxy_common::clock;
use proxy_common::rewrite::{KIND_REPLY, KIND_REQUEST, KIND_UNMASQUERADE, Rewrite, STATE_FIN, STATE_RST, STATE_SEEN};

use super::error::TableError;
use super::flows;
use super::ledger::Ledger;
use super::options::Timeouts;
use super::sys::Cursor;
use super::tables::{FamilyTables, RewriteEntry};

/// How long one call may take.
pub(super) const BUDGET: Duration = Duration::from_millis(5);
/// Time between two walks through the table.
const PAUSE: Duration = Duration::from_secs(10);

/// Both sides have sent FIN, or one RST. Between nf_conntrack's `tcp_timeout_close` (10 s) and `tcp_timeout_time_wait` (120 s).
const TCP_CLOSED: u32 = clock::ticks_of_seconds(60);
/// For the last acknowledgements of a connection that both sides have ended, and what has to be sent again.
const TCP_LINGERS: u32 = clock::ticks_of_seconds(2);
/// A SYN nobody answered: nf_conntrack's `tcp_timeout_syn_sent`.
const TCP_UNANSWERED: u32 = clock::ticks_of_seconds(120);
/// Longer than the heartbeats of an idle association (30 s by default) can be apart.
const SCTP_ESTABLISHED: u32 = clock::ticks_of_seconds(3_600);
/// An INIT nobody answered.
const SCTP_UNANSWERED: u32 = clock::ticks_of_seconds(120);

/// As long as anything can be asked to be remembered: ticks are counted in 32 bits.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 3_600);

/// [`Timeouts`] in ticks.
#[derive(Clone, Copy)]
struct Limits {
    tcp_established: u32,
    tcp_half_closed: u32,
    udp_unanswered: u32,
    udp_answered: u32,
    tcp_closed: u32,
}

/// What of one family's table has been looked at.
pub(super) struct Collector {
    limits: Limits,
    rewrites: Walk,
    ledger: Ledger,
    affinity: Walk,
    /// When both walks ended; none while one is under way.
    rests_since: Option<Instant>,
}

/// A walk through a map, over several calls.
#[derive(Default)]
struct Walk {
    cursor: Cursor,
    /// Entries seen by the walk under way, and by the last one that ended.
    counting: u64,
    counted: u64,
    has_ended: bool,
}

impl Walk {
    fn saw(&mut self, entries: usize, at_end: bool) {
        self.counting += entries as u64;
        if at_end {
            self.counted = std::mem::take(&mut self.counting);
            self.has_ended = true;
        }
    }
}

/// A connection, as far as its age is concerned.
struct Pair {
    protocol: u8,
    /// `STATE_*` of the client's packets and of the replies.
    request: u32,
    reply: u32,
    /// Ticks since the last packet in either direction.
    idle: u32,
}

impl Collector {
    /// At the beginning of a walk.
    pub(super) fn new(timeouts: &Timeouts) -> Self {
        Self {
            limits: Limits::from(timeouts),
            rewrites: Walk::default(),
            ledger: Ledger::default(),
            affinity: Walk::default(),
            rests_since: None,
        }
    }

    /// Goes on with the walk; gives the number of removed entries.
    pub(super) fn step<A: Address>(
        &mut self,
        tables: &mut impl FamilyTables<A>,
        now: u32,
    ) -> Result<usize, TableError> {
        if self.rests_since.is_some_and(|since| since.elapsed() < PAUSE) {
            return Ok(0);
        }
        self.rests_since = None;
        let started = Instant::now();
        let mut removed = 0;
        while started.elapsed() < BUDGET {
            if !self.rewrites.has_ended {
                if self.ledger.is_idle() {
                    self.ledger.begin(tables.rewrite_counts()?);
                }
                let mut entries = Vec::new();
                let at_end = tables.scan_rewrites(&mut self.rewrites.cursor, &mut entries)?;
                for entry in &entries {
                    removed += collect(tables, entry, now, &self.limits)?;
                }
                self.rewrites.saw(entries.len(), at_end);
                if at_end {
                    self.ledger.end(tables.rewrite_counts()?, self.rewrites.counted);
                }
                continue;
            }
            let mut keys = Vec::new();
            let at_end = tables.scan_affinity(&mut self.affinity.cursor, &mut keys)?;
            self.affinity.saw(keys.len(), at_end);
            if at_end {
                (self.rewrites.has_ended, self.affinity.has_ended) = (false, false);
                self.rests_since = Some(Instant::now());
                break;
            }
        }
        Ok(removed)
    }

    /// Entries of the rewrite table when it was last walked through.
    pub(super) fn entries(&self) -> u64 {
        self.rewrites.counted
    }

    /// Entries that the kernel has evicted from it since the first walk, at least.
    pub(super) fn evicted(&self) -> u64 {
        self.ledger.evicted()
    }

    /// Session affinity records when they were last walked through.
    pub(super) fn affinity_records(&self) -> u64 {
        self.affinity.counted
    }

    /// Is a walk under way?
    pub(super) fn is_busy(&self) -> bool {
        self.rests_since.is_none()
    }
}

/// Connections that have not ended. Nothing is kept for what may come late: a closed one counts for a moment only, and a UDP flow
/// for as long as one without an answer. Then it is removed, lest its entries take what another proxy makes of the same ports.
pub(super) fn running<A: Address>(
    tables: &mut impl FamilyTables<A>,
    timeouts: &Timeouts,
    now: u32,
) -> Result<usize, TableError> {
    let limits = Limits::from(timeouts);
    let limits = Limits {
        tcp_closed: TCP_LINGERS,
        udp_answered: limits.udp_unanswered,
        ..limits
    };
    let (mut running, mut cursor) = (0, Cursor::default());
    loop {
        let mut entries = Vec::new();
        let at_end = tables.scan_rewrites(&mut cursor, &mut entries)?;
        for entry in &entries {
            let (key, rewrite) = entry;
            let is_gone = collect(tables, entry, now, &limits)? > 0;
            // One entry stands for the connection, masqueraded or not.
            if is_gone || rewrite.kind != KIND_REQUEST {
                continue;
            }
            let partner = flows::partner(tables, key, rewrite)?;
            let pair = pair(key.protocol, rewrite, partner.as_ref(), now);
            running += usize::from(pair.idle < limits.of(&pair));
        }
        if at_end {
            return Ok(running);
        }
    }
}

fn collect<A: Address>(
    tables: &mut impl FamilyTables<A>,
    (key, rewrite): &RewriteEntry<A>,
    now: u32,
    limits: &Limits,
) -> Result<usize, TableError> {
    let idle = clock::elapsed(rewrite.last_seen, now);
    if idle < limits.shortest(key.protocol) {
        return Ok(0);
    }
    let partner = flows::partner(tables, key, rewrite)?;
    let pair = pair(key.protocol, rewrite, partner.as_ref(), now);
    if pair.idle < limits.of(&pair) {
        return Ok(0);
    }
    // What was read with the whole chunk may have been used, or removed together with its partner, since.
    if tables
        .rewrite(key)?
        .is_none_or(|fresh| fresh.last_seen != rewrite.last_seen)
    {
        return Ok(0);
    }
    flows::remove_partner(tables, key, rewrite)?;
    tables.remove_rewrite(key)?;
    Ok(1 + usize::from(partner.is_some()))
}

fn pair<A: Address>(protocol: u8, rewrite: &Rewrite<A>, partner: Option<&Rewrite<A>>, now: u32) -> Pair {
    let is_reply = matches!(rewrite.kind, KIND_REPLY | KIND_UNMASQUERADE);
    // An entry without its partner does nothing useful any more: its own state has to do for both.
    let other = partner.unwrap_or(rewrite);
    let (request, reply) = if is_reply { (other, rewrite) } else { (rewrite, other) };
    Pair {
        protocol,
        request: request.state,
        reply: reply.state,
        idle: clock::elapsed(request.last_seen.max(reply.last_seen), now),
    }
}

impl From<&Timeouts> for Limits {
    fn from(timeouts: &Timeouts) -> Self {
        // Rounded up: never sooner than asked for.
        let ticks = |time: Duration| clock::ticks_of_seconds(time.min(LONGEST).as_secs_f64().ceil() as u64);
        Self {
            tcp_established: ticks(timeouts.tcp_established),
            tcp_half_closed: ticks(timeouts.tcp_half_closed),
            udp_unanswered: ticks(timeouts.udp_unanswered),
            udp_answered: ticks(timeouts.udp_answered),
            tcp_closed: TCP_CLOSED,
        }
    }
}

impl Limits {
    /// No connection of the protocol goes sooner.
    fn shortest(&self, protocol: u8) -> u32 {
        match Protocol::from_number(protocol) {
            Some(Protocol::Udp) | None => self.udp_unanswered.min(self.udp_answered),
            Some(Protocol::Tcp) => self.tcp_closed.min(self.tcp_half_closed).min(self.tcp_established),
            Some(Protocol::Sctp) => SCTP_UNANSWERED,
        }
    }

    fn of(&self, pair: &Pair) -> u32 {
        let answered = pair.reply & STATE_SEEN != 0;
        match Protocol::from_number(pair.protocol) {
            Some(Protocol::Udp) | None if answered => self.udp_answered,
            Some(Protocol::Udp) | None => self.udp_unanswered,
            Some(Protocol::Sctp) if answered => SCTP_ESTABLISHED,
            Some(Protocol::Sctp) => SCTP_UNANSWERED,
            Some(Protocol::Tcp) => {
                let both = pair.request & pair.reply;
                let either = pair.request | pair.reply;
                if either & STATE_RST != 0 || both & STATE_FIN != 0 {
                    self.tcp_closed
                } else if !answered {
                    TCP_UNANSWERED
                } else if either & STATE_FIN != 0 {
                    self.tcp_half_closed
                } else {
                    self.tcp_established
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proxy_common::addr::{Addr4, Port};
    use proxy_common::affinity::AffinityKey;
    use proxy_common::rewrite::{HOOK_INGRESS, KIND_REQUEST, Meta, RewriteKey};

    use super::*;
    use crate::datapath::memory::MemoryTables;

    const NOW: u32 = 1_000_000;

    /// A connection whose directions were last seen so many seconds ago.
    fn connection(protocol: Protocol, request: (u64, u32), reply: (u64, u32)) -> MemoryTables {
        let mut tables = MemoryTables::new(0);
        let (client, vip, backend) = (Addr4([10, 0, 0, 1]), Addr4([10, 96, 0, 1]), Addr4([10, 0, 0, 2]));
        let (port, http) = (Port::new(4_000), Port::new(80));
        let key = RewriteKey::new(client, port, vip, http, protocol.number(), HOOK_INGRESS);
        let entry = |mut rewrite: Rewrite<Addr4>, kind, (ago, state): (u64, u32)| {
            rewrite.kind = kind;
            rewrite.state = state;
            rewrite.last_seen = NOW - clock::ticks_of_seconds(ago);
            rewrite
        };
        let there = entry(
            key.rewrite_to(client, port, backend, http, Meta::default()),
            KIND_REQUEST,
            request,
        );
        let back_key = key.partner(&there);
        let back = entry(
            back_key.rewrite_to(vip, http, client, port, Meta::default()),
            KIND_REPLY,
            reply,
        );
        tables.v4.rewrites.extend([(key, there), (back_key, back)]);
        tables
    }

    fn is_collected(timeouts: &Timeouts, protocol: Protocol, request: (u64, u32), reply: (u64, u32)) -> bool {
        let mut tables = connection(protocol, request, reply);
        let removed = Collector::new(timeouts).step::<Addr4>(&mut tables, NOW).unwrap();
        assert!(matches!(removed, 0 | 2), "both directions or none");
        assert_eq!(tables.v4.rewrites.len() + removed, 2);
        removed == 2
    }

    const FIN: u32 = STATE_SEEN | STATE_FIN;
    const RST: u32 = STATE_SEEN | STATE_RST;

    #[test]
    fn idle_connections_go_when_their_time_has_come() {
        let is_collected = |protocol, request, reply| is_collected(&Timeouts::default(), protocol, request, reply);
        for (protocol, request, reply, seconds) in [
            (Protocol::Tcp, STATE_SEEN, STATE_SEEN, 24 * 3_600),
            (Protocol::Tcp, FIN, STATE_SEEN, 3_600),
            (Protocol::Tcp, FIN, FIN, 60),
            (Protocol::Tcp, STATE_SEEN, RST, 60),
            (Protocol::Tcp, STATE_SEEN, 0, 120),
            (Protocol::Udp, STATE_SEEN, 0, 30),
            (Protocol::Udp, 0, STATE_SEEN, 180),
            (Protocol::Sctp, 0, 0, 120),
            (Protocol::Sctp, STATE_SEEN, STATE_SEEN, 3_600),
        ] {
            let case = format!("{protocol} {request:#b} {reply:#b}");
            assert!(
                is_collected(protocol, (seconds + 3, request), (seconds + 2, reply)),
                "{case}"
            );
            assert!(
                !is_collected(protocol, (seconds - 3, request), (seconds - 3, reply)),
                "{case}"
            );
            // One direction that was used lately keeps both.
            assert!(!is_collected(protocol, (seconds + 3, request), (1, reply)), "{case}");
            assert!(!is_collected(protocol, (1, request), (seconds + 3, reply)), "{case}");
        }
    }

    /// S151: also when the chosen time is shorter than those that cannot be chosen.
    #[test]
    fn timeouts_can_be_chosen() {
        let timeouts = Timeouts {
            tcp_established: Duration::from_secs(20),
            tcp_half_closed: Duration::from_secs(10),
            udp_unanswered: Duration::from_millis(49_500),
            udp_answered: Duration::from_secs(15),
        };
        for (protocol, request, reply, seconds) in [
            (Protocol::Tcp, STATE_SEEN, STATE_SEEN, 20),
            (Protocol::Tcp, STATE_SEEN, FIN, 10),
            (Protocol::Tcp, FIN, FIN, 60),
            (Protocol::Tcp, STATE_SEEN, 0, 120),
            (Protocol::Udp, STATE_SEEN, 0, 50),
            (Protocol::Udp, 0, STATE_SEEN, 15),
            (Protocol::Sctp, STATE_SEEN, STATE_SEEN, 3_600),
        ] {
            for (idle, expected) in [(seconds + 3, true), (seconds - 3, false)] {
                let collected = is_collected(&timeouts, protocol, (idle, request), (idle, reply));
                assert_eq!(collected, expected, "{protocol} {request:#b} {reply:#b} after {idle} s");
            }
        }
        let for_ever = Timeouts {
            tcp_established: Duration::MAX,
            ..Timeouts::default()
        };
        let day = (24 * 3_600, STATE_SEEN);
        assert!(!is_collected(&for_ever, Protocol::Tcp, day, day));
    }

    #[test]
    fn entries_are_counted() {
        let mut tables = connection(Protocol::Tcp, (1, STATE_SEEN), (1, STATE_SEEN));
        for service in 0..3 {
            let client = Addr4([10, 0, 0, 1]);
            tables.v4.affinity.insert(AffinityKey { service, client });
        }
        let mut collector = Collector::new(&Timeouts::default());
        assert!(collector.is_busy());
        while collector.is_busy() {
            collector.step::<Addr4>(&mut tables, NOW).unwrap();
        }
        assert_eq!((collector.entries(), collector.affinity_records()), (2, 3));
    }
}
