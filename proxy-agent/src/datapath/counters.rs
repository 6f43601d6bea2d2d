//! `COUNTERS`, what the programs count per service port, summed up over all CPUs. Read for metrics and by `proxy-agent top`; cleared,
//! one slot at a time, when a number is given to a new service port.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use aya::maps::MapData;
use proxy_common::counters::Counters;
use proxy_common::names;

use super::error::TableError;
use super::{sys, tables};

/// Words of a slot.
const WORDS: usize = size_of::<Counters>() / 8;
/// Words read with one system call, about: 4 MiB.
const CHUNK_WORDS: usize = 512 * 1024;

/// The pinned map.
pub(crate) struct CounterTable {
    map: MapData,
    slots: u32,
    cpus: usize,
}

impl CounterTable {
    pub(super) fn open(dir: &Path) -> Result<Self, TableError> {
        let (map, slots) = tables::open(dir, names::COUNTERS, size_of::<u32>(), size_of::<Counters>())?;
        let cpus = aya::util::nr_cpus().map_err(|(file, error)| fail(io::Error::other(format!("{file}: {error}"))))?;
        Ok(Self { map, slots, cpus })
    }

    /// Slots; a service port with a higher number is not counted.
    pub(crate) fn slots(&self) -> u32 {
        self.slots
    }

    /// The first `count` slots, or as many as there are; the index is the service id.
    pub(crate) fn read(&self, count: u32) -> Result<Vec<Counters>, TableError> {
        let count = count.min(self.slots) as usize;
        let chunk = (CHUNK_WORDS / (WORDS * self.cpus)).max(1);
        let mut all = Vec::with_capacity(count);
        let mut last = None;
        while all.len() < count {
            let wanted = chunk.min(count - all.len());
            let words =
                sys::lookup_per_cpu_batch(self.map.fd().as_fd(), last, wanted, WORDS * self.cpus).map_err(fail)?;
            if words.is_empty() {
                break;
            }
            all.extend(words.chunks_exact(WORDS * self.cpus).map(sum));
            last = Some(all.len() as u32 - 1);
        }
        Ok(all)
    }

    /// Clears a slot, if there is one of this number.
    pub(super) fn clear(&mut self, service: u32) -> Result<(), TableError> {
        if service >= self.slots {
            return Ok(());
        }
        let zeros = vec![0u64; WORDS * self.cpus];
        sys::update_per_cpu(self.map.fd().as_fd(), service, &zeros).map_err(fail)
    }
}

fn fail(source: io::Error) -> TableError {
    TableError::Call {
        map: names::COUNTERS,
        source,
    }
}

/// One slot's values of all CPUs.
fn sum(words: &[u64]) -> Counters {
    let mut sum = Counters::default();
    for cpu in words.chunks_exact(WORDS) {
        sum.add(bytemuck::from_bytes(bytemuck::cast_slice(cpu)));
    }
    sum
}
