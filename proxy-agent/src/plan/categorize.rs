//! Which endpoints a service port may use (sections C to F of the rules): collects those of its port from all slices, counts each
//! (address, port) once, and sorts them into the cluster set and the local set.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use proxy_common::addr::{Address, Port};
use proxy_common::backend::{BACKEND_LOCAL, BACKEND_TERMINATING, Backend};

use super::{Endpoints, NodeContext, topology};
use crate::model::slice::{
    ENDPOINT_FOR_THIS_NODE, ENDPOINT_LOCAL, ENDPOINT_NODE_HINTED, ENDPOINT_READY, ENDPOINT_SERVING,
    ENDPOINT_TERMINATING,
};
use crate::model::{Endpoint, EndpointSlice, Family, ServicePort};

/// An endpoint with the port that its slice gives it (S30).
#[derive(Debug)]
pub struct Candidate<'e, A> {
    /// What the slice says of the endpoint.
    pub endpoint: &'e Endpoint<A>,
    /// The real destination port.
    pub port: Port,
}

/// The two sets of section F.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sets<A> {
    /// The cluster set (S52).
    pub cluster: Endpoints<A>,
    /// The local set (S53).
    pub local: Endpoints<A>,
    /// Some endpoint is usable anywhere (S55).
    pub has_endpoints: bool,
}

/// The endpoints of one service port in one family, sorted by (address, port), each once.
pub fn candidates<'e, A: Family>(
    port: &ServicePort,
    slices: impl Iterator<Item = &'e EndpointSlice>,
) -> Vec<Candidate<'e, A>> {
    let mut candidates = Vec::new();
    for slice in slices {
        // S27: by name and protocol; the number is the slice's own.
        for slice_port in slice
            .ports
            .iter()
            .filter(|p| p.name == port.name && p.protocol == port.protocol)
        {
            let port = slice_port.port;
            candidates.extend(
                A::endpoints(&slice.endpoints)
                    .iter()
                    .map(|endpoint| Candidate { endpoint, port }),
            );
        }
    }
    candidates.sort_unstable_by(|a, b| a.order().cmp(&b.order()));
    candidates.dedup_by_key(|c| (c.endpoint.addr, c.port));
    candidates
}

impl<A: Address> Candidate<'_, A> {
    /// Sorts copies of one endpoint so that the one to believe comes first (S41): not terminating, then ready, then serving. What
    /// follows only makes the choice independent of the order of the slices.
    fn order(&self) -> impl Ord + '_ {
        let e = self.endpoint;
        let preference = (
            !e.has(ENDPOINT_TERMINATING),
            e.has(ENDPOINT_READY),
            e.has(ENDPOINT_SERVING),
            e.has(ENDPOINT_LOCAL),
            e.has(ENDPOINT_FOR_THIS_NODE),
            e.has(ENDPOINT_NODE_HINTED),
        );
        (e.addr, self.port, Reverse(preference), Reverse(e.zones.as_deref()))
    }

    fn is_local(&self) -> bool {
        self.endpoint.has(ENDPOINT_LOCAL)
    }

    fn backend(&self) -> Backend<A> {
        let mut flags = 0;
        if self.is_local() {
            flags |= BACKEND_LOCAL;
        }
        // An endpoint that is ready is in use like any other, even while it terminates (S47).
        if self.endpoint.has(ENDPOINT_TERMINATING) && !self.endpoint.is_ready() {
            flags |= BACKEND_TERMINATING;
        }
        Backend {
            addr: self.endpoint.addr,
            port: self.port,
            flags,
        }
    }
}

/// The sets that a service port chooses from. The local set is only made if some frontend uses it.
pub fn categorize<A: Address>(candidates: &[Candidate<'_, A>], node: &NodeContext, uses_local: bool) -> Sets<A> {
    let ready: Vec<_> = candidates.iter().filter(|c| c.endpoint.is_ready()).collect();
    let fallback: Vec<_> = candidates.iter().filter(|c| c.endpoint.is_fallback()).collect();
    let has_endpoints = !ready.is_empty() || !fallback.is_empty();

    // S53, S54: the local set falls back on its own and knows no hints.
    let mut local = Endpoints::default();
    if uses_local {
        let on_this_node = |set: &[&Candidate<'_, A>]| -> Vec<Backend<A>> {
            set.iter().filter(|c| c.is_local()).map(|c| c.backend()).collect()
        };
        let mut selectable = on_this_node(&ready);
        if selectable.is_empty() {
            selectable = on_this_node(&fallback);
        }
        local = with_kept(selectable, candidates);
    }

    // S52: hints reduce the ready endpoints; the fallback ignores them (S72).
    let chosen = if ready.is_empty() {
        fallback
    } else {
        topology::apply_hints(ready, node)
    };
    let cluster = with_kept(chosen.iter().map(|c| c.backend()).collect(), candidates);
    Sets {
        cluster,
        local,
        has_endpoints,
    }
}

/// Adds what running flows may stay with: every other endpoint that is ready or serving, wherever it is (S145, S148).
fn with_kept<A: Address>(selectable: Vec<Backend<A>>, candidates: &[Candidate<'_, A>]) -> Endpoints<A> {
    let selected: BTreeSet<_> = selectable.iter().map(|b| (b.addr, b.port)).collect();
    let keep = candidates
        .iter()
        .filter(|c| c.endpoint.has(ENDPOINT_READY | ENDPOINT_SERVING))
        .filter(|c| !selected.contains(&(c.endpoint.addr, c.port)))
        .map(|c| c.backend())
        .collect();
    Endpoints { selectable, keep }
}
