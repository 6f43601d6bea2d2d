//! The way back to another proxy, such as kube-proxy: new connections are left to it, and what is translated here goes on until it
//! ends. Called by `cleanup`, which holds the directory's lock.
//!
//! What must stay true: whoever is interrupted here leaves something that the next clean-up, or the next agent's start, puts right.

use std::time::{Duration, Instant};

use proxy_common::addr::{Addr4, Addr6, Address};
use proxy_common::clock;
use proxy_common::settings::MODE_DRAIN;

use super::error::TableError;
use super::gc;
use super::loader::Pins;
use super::options::Timeouts;
use super::sys;
use super::tables::{BpfTables, FamilyTables};

/// How often connections are counted.
const INTERVAL: Duration = Duration::from_millis(500);

/// Leaves new connections to others and waits for the end of those that run, at most this long. Gives how many still run.
pub(super) fn drain(pins: &Pins, timeout: Duration) -> Result<usize, TableError> {
    let mut tables = BpfTables::open(&pins.maps, true)?;
    leave::<Addr4>(&mut tables)?;
    leave::<Addr6>(&mut tables)?;
    let deadline = Instant::now() + timeout;
    loop {
        let running = running::<Addr4>(&mut tables)? + running::<Addr6>(&mut tables)?;
        if running == 0 || Instant::now() >= deadline {
            return Ok(running);
        }
        std::thread::sleep(INTERVAL);
    }
}

/// Can it be done at all? Nothing is pinned, or not in this layout.
pub(super) fn is_possible(pins: &Pins) -> bool {
    pins.maps.exists()
}

fn leave<A: Address>(tables: &mut BpfTables) -> Result<(), TableError>
where
    BpfTables: FamilyTables<A>,
{
    let mut settings = FamilyTables::<A>::settings(tables)?;
    settings.mode = MODE_DRAIN;
    FamilyTables::<A>::set_settings(tables, &settings)
}

fn running<A: Address>(tables: &mut BpfTables) -> Result<usize, TableError>
where
    BpfTables: FamilyTables<A>,
{
    gc::running::<A>(tables, &Timeouts::default(), clock::ticks(sys::coarse_clock()))
}
