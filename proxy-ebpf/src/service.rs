//! From a dialled address to a backend: the one function that tc programs and socket hooks share. One hash look-up and one
//! array look-up per new connection.

use aya_ebpf::helpers::bpf_get_prandom_u32;
use proxy_common::addr::Port;
use proxy_common::backend::Backend;
use proxy_common::frontend::{FRONTEND_HAS_ENDPOINTS, Frontend, FrontendKey, Range};
use proxy_common::pick;
use proxy_common::reason::Reason;

use crate::maps::Family;

/// The frontend a packet or socket dials, if it is one of ours.
#[inline(always)]
pub(crate) fn frontend<A: Family>(addr: A, port: Port, protocol: u8) -> Option<&'static Frontend> {
    A::frontend(&FrontendKey::new(addr, port, protocol))
}

/// A backend for a new connection to `frontend`, every one with the same probability (S60). The reason says what to do otherwise:
/// [`Reason::NoEndpoints`] is to be refused (S122), the others are dropped.
#[inline(always)]
pub(crate) fn resolve<A: Family>(frontend: &Frontend) -> Result<&'static Backend<A>, Reason> {
    let range = frontend.range();
    if range.count == 0 {
        return Err(if frontend.flags & FRONTEND_HAS_ENDPOINTS != 0 {
            Reason::NoLocalEndpoints
        } else {
            Reason::NoEndpoints
        });
    }
    A::backend(range.first.wrapping_add(pick::uniform(range.count, random))).ok_or(Reason::BadRange)
}

/// Is (`addr`, `port`) still an endpoint that a running flow may use (S141, S145)?
#[inline(always)]
pub(crate) fn still_serves<A: Family>(range: Range, addr: A, port: Port) -> bool {
    let order = |index: u32| {
        let slot = A::backend(index)?;
        Some(slot.addr.compare(&addr).then_with(|| slot.port.get().cmp(&port.get())))
    };
    pick::contains(range.first, range.count, order)
        || (range.keep != 0 && pick::contains(range.first.wrapping_add(range.count), range.keep, order))
}

/// A uniform 32-bit number.
#[inline(always)]
pub(crate) fn random() -> u32 {
    // SAFETY: the helper has no arguments and no preconditions.
    unsafe { bpf_get_prandom_u32() }
}
