//! From a dialled address to a backend: what tc programs and socket hooks share. One hash look-up and one array look-up per new
//! connection, a few more for services that ask for them.

use aya_ebpf::helpers::bpf_get_prandom_u32;
use proxy_common::addr::Port;
use proxy_common::affinity::{Affinity, AffinityKey};
use proxy_common::backend::Backend;
use proxy_common::frontend::{Frontend, FrontendKey, Origin, Range};
use proxy_common::lookup::{self, Rows};
use proxy_common::pick;
use proxy_common::reason::Reason;
use proxy_common::settings::{MODE_DRAIN, Settings};
use proxy_common::source_range::SourceRangeKey;

use crate::maps::Family;
use crate::rewrite::now;

/// The rows as the kernel has them; node ports are served on the node's addresses with one of these `NODE_ADDR_*` bits.
struct Kernel {
    node_addr: u32,
}

impl<A: Family> Rows<A> for Kernel {
    type Frontend = &'static Frontend;
    type Settings = &'static Settings<A>;

    #[inline(always)]
    fn frontend(&self, key: &FrontendKey<A>) -> Option<&'static Frontend> {
        A::frontend(key)
    }

    #[inline(always)]
    fn settings(&self) -> Option<&'static Settings<A>> {
        A::settings()
    }

    #[inline(always)]
    fn has_node_ports(&self, addr: &A) -> bool {
        A::has_node_ports(addr, self.node_addr)
    }
}

/// The frontend a packet or socket dials, if it is one of ours: see [`lookup::frontend`].
#[inline(always)]
pub(crate) fn frontend<A: Family>(addr: A, port: Port, protocol: u8, node_addr: u32) -> Option<&'static Frontend> {
    match lookup::frontend(&Kernel { node_addr }, addr, port, protocol) {
        Some((frontend, _)) => Some(frontend),
        None => None,
    }
}

/// Is every new connection left to another proxy?
#[inline(always)]
pub(crate) fn is_draining<A: Family>() -> bool {
    A::settings().is_some_and(|settings| settings.mode == MODE_DRAIN)
}

/// Room for the keys of [`resolve`]: a tc program's scratch room, or the stack of a socket hook, which may be interrupted by another
/// program on its CPU.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Lookup<A> {
    affinity_key: AffinityKey<A>,
    affinity: Affinity<A>,
    source_range: SourceRangeKey<A>,
}

/// The slot of a backend for a new connection to `frontend`. `source` is the client's address as it arrives (S102). The reason says what to do
/// otherwise: [`Reason::is_refused`] or dropped.
#[inline(always)]
pub(crate) fn resolve<A: Family>(
    frontend: &Frontend,
    origin: Origin,
    source: &A,
    lookup: &mut Lookup<A>,
) -> Result<u32, Reason> {
    frontend.admits(|| {
        lookup.source_range = SourceRangeKey::new(frontend.service, *source, A::BITS);
        A::is_source_allowed(&lookup.source_range)
    })?;
    let range = frontend.range(origin);
    let sticky = frontend.affinity_seconds;
    if sticky == 0 {
        return choose(frontend, range);
    }
    lookup.affinity_key = AffinityKey::of(frontend.service, origin, source);
    if let Some(record) = A::affinity(&lookup.affinity_key) {
        // SAFETY: the slot stays allocated while the program runs; a mixed-up record names no endpoint of the range.
        let record = unsafe { &mut *record };
        // Only an endpoint of the set that is valid on this path (S135).
        if record.is_fresh(sticky, now())
            && let Some(slot) = find(range.first, range.count, &record.addr, record.port)
        {
            record.last_used = now();
            return Ok(slot);
        }
    }
    let slot = choose(frontend, range)?;
    let backend = backend::<A>(slot)?;
    lookup.affinity = Affinity {
        addr: backend.addr,
        port: backend.port,
        pad: [0; 2],
        last_used: now(),
    };
    A::remember_affinity(&lookup.affinity_key, &lookup.affinity);
    Ok(slot)
}

/// Any endpoint of the range, every one with the same probability (S60).
#[inline(always)]
fn choose(frontend: &Frontend, range: Range) -> Result<u32, Reason> {
    if range.count == 0 {
        return Err(frontend.without_endpoint());
    }
    Ok(range.first.wrapping_add(pick::uniform(range.count, random)))
}

/// The endpoint in a slot that [`resolve`] named.
#[inline(always)]
pub(crate) fn backend<A: Family>(slot: u32) -> Result<&'static Backend<A>, Reason> {
    A::backend(slot).ok_or(Reason::BadRange)
}

/// Is (`addr`, `port`) still an endpoint that a running flow may use (S141, S145)?
#[inline(always)]
pub(crate) fn still_serves<A: Family>(range: Range, addr: &A, port: Port) -> bool {
    find(range.first, range.count, addr, port).is_some()
        || (range.keep != 0 && find(range.first.wrapping_add(range.count), range.keep, addr, port).is_some())
}

#[inline(always)]
fn find<A: Family>(first: u32, count: u32, addr: &A, port: Port) -> Option<u32> {
    pick::find(first, count, |index| {
        let slot = A::backend(index)?;
        Some(slot.addr.compare(addr).then_with(|| slot.port.get().cmp(&port.get())))
    })
}

/// A uniform 32-bit number.
#[inline(always)]
pub(crate) fn random() -> u32 {
    // SAFETY: the helper has no arguments and no preconditions.
    unsafe { bpf_get_prandom_u32() }
}
