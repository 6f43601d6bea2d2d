//! Follows a packet through plans, without a kernel: who may answer what a client dials. The second opinion of the tests that
//! send real packets: it reads the rules, not the maps.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use proxy_common::addr::{Addr4, Addr6, Address, Port, Protocol};
use proxy_common::frontend::FRONTEND_LOCAL;

use super::{FamilyPlan, FrontendPlan, ServicePortName, ServicePortPlan};

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// A pod.
    Pod,
    /// A process on the node itself.
    Host,
    /// Anything else.
    External,
}

/// What becomes of the first packet of a connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// One of these answers, each with the same probability.
    Backends(BTreeSet<SocketAddr>),
    /// Answered with an error: no endpoint anywhere (S122).
    Refused,
    /// Silence: endpoints exist, but none that may be used here (S58).
    Dropped,
    /// Nobody's frontend: the packet is not touched.
    NotAService,
}

/// What becomes of a connection from `source` to `addr`:`port`. If several service ports claim that frontend, the oldest has it,
/// then the first by name (S37).
pub fn trace<'p>(
    plans: impl IntoIterator<Item = (&'p ServicePortName, &'p ServicePortPlan)>,
    source: Source,
    addr: IpAddr,
    port: u16,
    protocol: Protocol,
) -> Outcome {
    plans
        .into_iter()
        .filter(|(name, _)| name.protocol == protocol)
        .filter_map(|(name, plan)| {
            let outcome = match addr {
                IpAddr::V4(ip) => trace_family(&plan.v4, source, Addr4::from(ip), Port::new(port)),
                IpAddr::V6(ip) => trace_family(&plan.v6, source, Addr6::from(ip), Port::new(port)),
            };
            Some((plan.created, name, outcome?))
        })
        .min_by(|a, b| (a.0, a.1).cmp(&(b.0, b.1)))
        .map_or(Outcome::NotAService, |(_, _, outcome)| outcome)
}

fn trace_family<A: Address>(plan: &FamilyPlan<A>, source: Source, addr: A, port: Port) -> Option<Outcome> {
    let frontend = plan.frontends.iter().find(|f| f.addr == addr && f.port == port)?;
    let set = match uses_local_set(frontend, source) {
        true => &plan.local,
        false => &plan.cluster,
    };
    let backends: BTreeSet<SocketAddr> = set
        .selectable
        .iter()
        .map(|backend| SocketAddr::new(backend.addr.into(), backend.port.get()))
        .collect();
    Some(match (backends.is_empty(), plan.has_endpoints) {
        (false, _) => Outcome::Backends(backends),
        (true, true) => Outcome::Dropped,
        (true, false) => Outcome::Refused,
    })
}

/// The internal policy holds for every source alike (S57).
fn uses_local_set<A>(frontend: &FrontendPlan<A>, _source: Source) -> bool {
    frontend.flags & FRONTEND_LOCAL != 0
}
