//! The two maps of `proxy-agent trace`: `TRACE`, the question, and `EVENTS`, the ring buffer of what is told. Opened from their pins by the
//! tracer; the agent only makes them. A ring buffer has one reader, so the tracer holds a lock on the maps' directory.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::Path;

use aya::maps::{Map, MapData, RingBuf};
use proxy_common::names;
use proxy_common::reason::EVENTS_LOST;
use proxy_common::trace::{Event, Trace};

use super::error::{DatapathError, TableError};
use super::loader::{self, Pins};
use super::{sys, tables};

/// Why there is nothing to read events from.
#[derive(Debug, thiserror::Error)]
pub enum EventsError {
    /// Somebody reads them already.
    #[error("process {0} traces already with this --bpf-dir, and one can at a time: end it or wait for it")]
    Busy(u32),
    /// The maps were made by an agent that knows nothing of events.
    #[error("the agent that made the maps there tells no events: start the agent of this version once")]
    Unknown,
    /// The directory could not be locked.
    #[error(transparent)]
    Lock(#[from] DatapathError),
    /// A map could not be used.
    #[error("the pinned maps cannot be read: {0}")]
    Read(String),
}

impl From<TableError> for EventsError {
    fn from(error: TableError) -> Self {
        Self::Read(error.to_string())
    }
}

/// The maps, ours alone until it is dropped; then nobody asks any more.
pub(crate) struct Events {
    ring: RingBuf<MapData>,
    question: MapData,
    reasons: MapData,
    lost_before: u64,
    _lock: File,
}

impl Events {
    /// Opens the maps and forgets what is left in the buffer of a tracer that was killed.
    pub(crate) fn open(bpf_dir: &Path) -> Result<Self, EventsError> {
        let dir = Pins::new(bpf_dir).maps;
        if [names::TRACE, names::EVENTS]
            .iter()
            .any(|name| !dir.join(name).exists())
        {
            return Err(EventsError::Unknown);
        }
        let question = tables::open(&dir, names::TRACE, size_of::<u32>(), size_of::<Trace>())?.0;
        let lock = match loader::lock(&dir) {
            Err(DatapathError::Busy(_)) => {
                let asked: Option<Trace> = sys::lookup(question.fd().as_fd(), &0u32).unwrap_or_default();
                return Err(EventsError::Busy(asked.map_or(0, |asked| asked.tracer)));
            }
            lock => lock?,
        };
        let ring = tables::open(&dir, names::EVENTS, 0, 0)?.0;
        let ring = Map::RingBuf(ring);
        let ring = RingBuf::try_from(ring).map_err(|error| fail(names::EVENTS, std::io::Error::other(error)))?;
        let mut events = Self {
            ring,
            question,
            reasons: tables::open(&dir, names::REASONS, size_of::<u32>(), size_of::<u64>())?.0,
            lost_before: 0,
            _lock: lock,
        };
        while events.next().is_some() {}
        events.lost_before = events.count_lost();
        Ok(events)
    }

    /// Asks, or asks again.
    pub(crate) fn ask(&self, question: &Trace) -> Result<(), TableError> {
        sys::update(self.question.fd().as_fd(), &0u32, question).map_err(|error| fail(names::TRACE, error))
    }

    /// The next event; none if there is none now.
    pub(crate) fn next(&mut self) -> Option<Event> {
        loop {
            let item = self.ring.next()?;
            if item.len() >= size_of::<Event>() {
                return Some(bytemuck::pod_read_unaligned(&item[..size_of::<Event>()]));
            }
        }
    }

    /// Events that found no room since the maps were opened.
    pub(crate) fn lost(&self) -> u64 {
        self.count_lost().saturating_sub(self.lost_before)
    }

    fn count_lost(&self) -> u64 {
        let cpus = aya::util::nr_cpus().unwrap_or_default();
        let counts = sys::lookup_many::<u64>(self.reasons.fd().as_fd(), &EVENTS_LOST, cpus);
        counts.unwrap_or_default().iter().sum()
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        // It would end by itself, in a few seconds.
        let _ends_by_itself = self.ask(&Trace::default());
    }
}

fn fail(map: &'static str, source: std::io::Error) -> TableError {
    TableError::Call { map, source }
}
