//! From a dialled address to a frontend, and who may go on from there: the decisions that the programs take for a new connection
//! and that `proxy-agent explain` takes again for people. The rows come from maps in the kernel, or from whatever has been read.
//!
//! What must stay true: both go by these functions, so that what is explained is what happens.

use core::ops::Deref;

use crate::addr::{Address, Port};
use crate::affinity::AffinityKey;
use crate::frontend::{
    FRONTEND_CLUSTER_IP, FRONTEND_HAS_ENDPOINTS, FRONTEND_SOURCE_RANGES, FRONTEND_UNDEFINED, Frontend, FrontendKey,
    Origin,
};
use crate::reason::Reason;
use crate::rewrite::HOOK_EGRESS;
use crate::settings::Settings;

/// What is looked up.
pub trait Rows<A: Address> {
    /// A frontend, or a pointer to one.
    type Frontend: Deref<Target = Frontend>;
    /// The settings, or a pointer to them.
    type Settings: Deref<Target = Settings<A>>;
    /// The row of `FRONTENDS4/6`.
    fn frontend(&self, key: &FrontendKey<A>) -> Option<Self::Frontend>;
    /// The one row of `SETTINGS4/6`.
    fn settings(&self) -> Option<Self::Settings>;
    /// Is the address one of the node's that serve node ports to this client?
    fn has_node_ports(&self, addr: &A) -> bool;
}

/// On what account a frontend was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Match {
    /// Its very address, port and protocol.
    Exact,
    /// Its port, at an address of the node.
    NodePort,
    /// Its address alone: it stands for the ports that a cluster IP does not define (S77).
    Undefined,
}

/// The frontend that is dialled, if it is one of ours: the very address and port first (S38), then a node port if the address is one
/// of the node's that serve them, and last the stand-in for ports that a cluster IP does not define (S77).
///
/// Every foreign UDP packet comes here, so what it cannot be is found out without a look-up.
#[inline(always)]
pub fn frontend<A: Address, R: Rows<A>>(rows: &R, addr: A, port: Port, protocol: u8) -> Option<(R::Frontend, Match)> {
    if let Some(frontend) = rows.frontend(&FrontendKey::new(addr, port, protocol)) {
        return Some((frontend, Match::Exact));
    }
    let settings = rows.settings()?;
    if settings.may_be_node_port(port) && rows.has_node_ports(&addr) {
        let found = rows.frontend(&FrontendKey::new(A::zeroed(), port, protocol));
        return found.map(|frontend| (frontend, Match::NodePort));
    }
    if !settings.may_be_service(&addr) {
        return None;
    }
    rows.frontend(&FrontendKey::new(addr, Port([0; 2]), 0))
        .filter(|marker| marker.flags & FRONTEND_CLUSTER_IP != 0)
        .map(|marker| (marker, Match::Undefined))
}

impl Frontend {
    /// May the client go on to choose an endpoint?
    #[inline(always)]
    pub fn admits(&self, is_source_allowed: impl FnOnce() -> bool) -> Result<(), Reason> {
        if self.flags & FRONTEND_UNDEFINED != 0 {
            return Err(Reason::UndefinedPort);
        }
        if self.flags & FRONTEND_SOURCE_RANGES != 0 && !is_source_allowed() {
            return Err(Reason::SourceNotAllowed);
        }
        Ok(())
    }

    /// Why nobody is served whose range has no endpoint: dropped if there are some elsewhere (S58), refused if not (S122).
    #[inline(always)]
    pub fn without_endpoint(&self) -> Reason {
        if self.flags & FRONTEND_HAS_ENDPOINTS != 0 {
            Reason::NoLocalEndpoints
        } else {
            Reason::NoEndpoints
        }
    }
}

impl Origin {
    /// Who sent a packet that is seen at this hook.
    #[inline(always)]
    pub fn of(hook: u8, is_pod: bool) -> Self {
        if hook == HOOK_EGRESS {
            Self::Host
        } else if is_pod {
            Self::Pod
        } else {
            Self::External
        }
    }
}

impl<A: Address> AffinityKey<A> {
    /// Under which a client is remembered. The node is one client, whichever of its addresses a packet carries, and before a socket
    /// has any (S134).
    #[inline(always)]
    pub fn of(service: u32, origin: Origin, source: &A) -> Self {
        if origin == Origin::Host {
            Self {
                service,
                client: A::zeroed(),
            }
        } else {
            Self {
                service,
                client: *source,
            }
        }
    }
}
