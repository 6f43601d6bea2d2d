//! `trace`: what the programs decide about new connections, while they do it. The question goes into `TRACE`, which has to be renewed,
//! and the answers come through a ring buffer; `row` makes lines of them.
//!
//! What must stay true: tracing ends with the tracer, however that ends; packets of established connections never pay for it.

mod question;
mod row;

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use proxy_common::trace::Trace;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, MissedTickBehavior};

use super::rows::Names;
use super::{InspectError, Output};
use crate::datapath::events::Events;
use crate::datapath::sys;

pub use question::{EventKind, TraceFilter};
pub use row::TraceRow;
use row::{Clocks, Interfaces};

/// How long programs go on when nobody renews the question.
const LEASE: Duration = Duration::from_secs(5);
/// How often it is renewed.
const RENEWAL: Duration = Duration::from_secs(1);
/// Events that are read at once, before anything else has its turn.
const BATCH: usize = 256;

/// What is shown and for how long.
#[derive(Clone, Debug, Default)]
pub struct TraceOptions {
    /// Which events.
    pub filter: TraceFilter,
    /// One event of so many.
    pub sample: u32,
    /// End after so many events.
    pub count: Option<u64>,
    /// End after this time.
    pub time: Option<Duration>,
    /// Lines for people, or one JSON object per line.
    pub output: Output,
}

/// What a trace has seen.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Traced {
    /// Events shown.
    pub shown: u64,
    /// Events that found no room in the buffer.
    pub lost: u64,
}

/// Where lines go; false if nobody reads them any more.
pub type Print<'a> = dyn FnMut(&str) -> anyhow::Result<bool> + 'a;

/// Shows events until a signal, the count or the time ends it.
pub fn trace(bpf_dir: &Path, options: &TraceOptions, print: &mut Print<'_>) -> anyhow::Result<Traced> {
    let tables = super::open(bpf_dir)?;
    let events = Events::open(bpf_dir).map_err(InspectError::from)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        // SAFETY: the ring buffer owns its descriptor, always gives the same one, and keeps it open until it is dropped.
        let events = unsafe { AsyncFd::register_with_interest(events, Interest::READABLE) }
            .map_err(|error| std::io::Error::other(error.to_string()))?;
        let session = Session {
            tables,
            options,
            asked: Trace::default(),
            ids: Vec::new(),
            names: None,
            interfaces: Interfaces::default(),
            started: sys::monotonic_clock(),
            shown: 0,
        };
        session.run(events, print).await
    })
}

/// One trace, while it runs.
struct Session<'o> {
    tables: crate::datapath::tables::BpfTables,
    options: &'o TraceOptions,
    asked: Trace,
    /// Service ids that are shown, if not all are.
    ids: Vec<u32>,
    names: Option<Names>,
    interfaces: Interfaces,
    started: u64,
    shown: u64,
}

impl Session<'_> {
    async fn run(mut self, mut events: AsyncFd<Events>, print: &mut Print<'_>) -> anyhow::Result<Traced> {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hang_up = signal(SignalKind::hangup())?;
        self.ask(events.get_ref())?;
        if self.options.filter.service.is_some() && self.ids.is_empty() {
            let (namespace, name) = self.options.filter.service.clone().unwrap_or_default();
            return Err(InspectError::NotFound { namespace, name }.into());
        }
        let heading = row::heading(self.options.output);
        let mut goes_on = print(&heading)?;
        let mut renewal = tokio::time::interval(RENEWAL);
        renewal.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let end = self.options.time.map(|time| Instant::now() + time);
        let never = Instant::now() + Duration::from_secs(365 * 24 * 3_600);
        while goes_on {
            tokio::select! {
                biased;
                _ = interrupt.recv() => break,
                _ = terminate.recv() => break,
                _ = hang_up.recv() => break,
                () = tokio::time::sleep_until(end.unwrap_or(never)), if end.is_some() => break,
                _ = renewal.tick() => self.ask(events.get_ref())?,
                ready = events.readable_mut() => {
                    let mut ready = ready?;
                    let (is_empty, more) = self.read(ready.get_inner_mut(), print)?;
                    goes_on = more;
                    if is_empty {
                        ready.clear_ready();
                    }
                }
            }
        }
        // What was told before the end belongs to it.
        while goes_on {
            let (is_empty, more) = self.read(events.get_mut(), print)?;
            goes_on = more && !is_empty;
        }
        Ok(Traced {
            shown: self.shown,
            lost: events.get_ref().lost(),
        })
    }

    /// Asks the programs for the next seconds. Services may have come and gone meanwhile, and interfaces too.
    fn ask(&mut self, events: &Events) -> anyhow::Result<()> {
        let names = Names::read(&self.tables).map_err(InspectError::from)?;
        self.ids = self.options.filter.ids(&names);
        self.names = Some(names);
        self.interfaces = Interfaces::default();
        self.asked = self.options.filter.question(&self.ids, self.options.sample);
        self.asked.until = sys::monotonic_clock() + LEASE.as_nanos() as u64;
        Ok(events.ask(&self.asked).map_err(InspectError::from)?)
    }

    /// Shows some events. Gives whether there are no more now, and whether it goes on.
    fn read(&mut self, events: &mut Events, print: &mut Print<'_>) -> anyhow::Result<(bool, bool)> {
        let clocks = Clocks::now();
        let mut text = String::new();
        let mut is_empty = false;
        for _ in 0..BATCH {
            if self.is_complete() {
                break;
            }
            let Some(event) = events.next() else {
                is_empty = true;
                break;
            };
            let is_of_service = self.options.filter.service.is_none() || self.ids.contains(&event.service);
            // One from before may still have come in, or one that was judged by half a question.
            if event.time < self.started || !is_of_service || !self.asked.wants(&event.subject()) {
                continue;
            }
            let is_unknown = |names: &Names| event.service != 0 && !names.0.contains_key(&event.service);
            if self.names.as_ref().is_none_or(is_unknown) {
                self.names = Some(Names::read(&self.tables).map_err(InspectError::from)?);
            }
            let row = TraceRow::new(&event, self.names.as_ref(), &mut self.interfaces, &clocks);
            text += &row.line(self.options.output)?;
            self.shown += 1;
        }
        let goes_on = text.is_empty() || print(&text)?;
        Ok((is_empty, goes_on && !self.is_complete()))
    }

    fn is_complete(&self) -> bool {
        self.options.count.is_some_and(|count| self.shown >= count)
    }
}

/// Nanoseconds since 1970.
fn wall_clock() -> i128 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_nanos() as i128
}
