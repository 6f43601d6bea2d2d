//! The way back to another proxy, such as kube-proxy: new connections are left to it, and what is translated here goes on until it
//! ends. Called by `cleanup`, which holds the directory's lock.
//!
//! Both proxies choose source ports for the same addresses of the node, and neither looks into the other's table. So netfilter's gets
//! the ports that connections have here: otherwise kube-proxy's masquerade would take one of them sooner or later (it chooses from
//! 64,512), and the answers would be translated here, to another client.
//!
//! What must stay true: whoever is interrupted here leaves something that the next clean-up, or the next agent's start, puts right.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use proxy_common::addr::{Addr4, Addr6, Address, Protocol};
use proxy_common::clock;
use proxy_common::rewrite::{HOOK_INGRESS, KIND_REPLY, KIND_UNMASQUERADE};
use proxy_common::settings::MODE_DRAIN;

use super::error::{DatapathError, TableError};
use super::gc;
use super::loader::Pins;
use super::options::Timeouts;
use super::sys::{self, Cursor};
use super::tables::{BpfTables, FamilyTables};
use crate::netfilter::claims::{Claims, Seen};

/// How often connections are counted.
const INTERVAL: Duration = Duration::from_millis(500);

/// Claims of netfilter's ports outlive what they are for, should nobody be left to take them back.
const SPARE: Duration = Duration::from_secs(30);

/// What became of the connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Drained {
    /// Still running at the end.
    pub(super) running: usize,
    /// Whose ports netfilter could not be kept from.
    pub(super) unclaimed: usize,
}

/// Leaves new connections to others and waits for the end of those that run, at most this long.
pub(super) fn drain(pins: &Pins, timeout: Duration) -> Result<Drained, DatapathError> {
    let failed = |error: TableError| DatapathError::call("draining", pins.maps.display())(io::Error::other(error));
    let mut tables = BpfTables::open(&pins.maps, true).map_err(failed)?;
    let refused = |error| DatapathError::call("claiming source ports", "netfilter's connections")(error);
    let mut claims = Claims::new(timeout + SPARE).map_err(refused)?;
    // Before, because the other proxy begins at once; and after, because connections were opened meanwhile.
    claims.add(seen(&tables).map_err(failed)?).map_err(refused)?;
    leave::<Addr4>(&mut tables).map_err(failed)?;
    leave::<Addr6>(&mut tables).map_err(failed)?;
    let unclaimed = claims.add(seen(&tables).map_err(failed)?).map_err(refused)?;
    let deadline = Instant::now() + timeout;
    loop {
        let running = running::<Addr4>(&mut tables).and_then(|v4| Ok(v4 + running::<Addr6>(&mut tables)?));
        let running = running.map_err(failed)?;
        if running == 0 || Instant::now() >= deadline {
            return Ok(Drained { running, unclaimed });
        }
        std::thread::sleep(INTERVAL);
    }
}

/// Connections that come from an address of this node, as their endpoints see them, both families'.
fn seen(tables: &BpfTables) -> Result<Vec<Seen>, TableError> {
    let mut found = Vec::new();
    seen_by::<Addr4>(tables, &mut found)?;
    seen_by::<Addr6>(tables, &mut found)?;
    Ok(found)
}

/// What is translated where answers of endpoints come in, goes to an address of this node until then.
fn seen_by<A: Address>(tables: &BpfTables, found: &mut Vec<Seen>) -> Result<(), TableError>
where
    BpfTables: FamilyTables<A>,
{
    let (mut cursor, mut at_end) = (Cursor::default(), false);
    while !at_end {
        let mut entries = Vec::new();
        at_end = FamilyTables::<A>::scan_rewrites(tables, &mut cursor, &mut entries)?;
        let answers = entries.iter().filter(|(key, rewrite)| {
            key.hook == HOOK_INGRESS && matches!(rewrite.kind, KIND_REPLY | KIND_UNMASQUERADE)
        });
        found.extend(answers.filter_map(|(key, _)| {
            Some(Seen {
                protocol: Protocol::from_number(key.protocol)?,
                client: SocketAddr::new(key.dst.into(), key.dst_port.get()),
                server: SocketAddr::new(key.src.into(), key.src_port.get()),
            })
        }));
    }
    Ok(())
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
