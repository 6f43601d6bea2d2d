//! Follows a packet through plans, without a kernel: who may answer what a client dials, and as whom the client is seen. The second
//! opinion of the tests that send real packets: it reads the plans, not the maps.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use proxy_common::addr::{Addr4, Addr6, Address, Port, Protocol};
use proxy_common::frontend::{
    FRONTEND_CLUSTER_IP, FRONTEND_SOURCE_RANGES, FRONTEND_UNDEFINED, Frontend, Origin, Range,
};

use super::{FamilyPlan, FrontendPlan, ServicePortName, ServicePortPlan};

/// The node at which the packet arrives.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct View {
    /// Its addresses that serve node ports (S81).
    pub node_port_addresses: Vec<IpAddr>,
    /// Pods can be told from others in IPv4 and IPv6 (S112, S115).
    pub has_pods: [bool; 2],
    /// `--masquerade-all` (S111).
    pub masquerade_all: bool,
}

/// The first packet of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet {
    /// Who asks.
    pub origin: Origin,
    /// Its address, before masquerading.
    pub client: IpAddr,
    /// What is dialled.
    pub addr: IpAddr,
    /// The port that is dialled.
    pub port: u16,
    /// The protocol.
    pub protocol: Protocol,
}

/// What becomes of the first packet of a connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// One of these answers, each with the same probability; and is the client's address one of the node's then (S108–S113)?
    Backends(BTreeMap<SocketAddr, bool>),
    /// Answered with an error: no endpoint anywhere (S122), or an undefined port (S77).
    Refused,
    /// Silence: endpoints exist, but none that may be used here (S58), or the client may not ask (S103).
    Dropped,
    /// Nobody's frontend: the packet is not touched (S93).
    NotAService,
}

/// What becomes of a connection. If several service ports claim a frontend, the oldest has it, then the first by name (S37).
pub fn trace<'p>(
    plans: impl IntoIterator<Item = (&'p ServicePortName, &'p ServicePortPlan)>,
    view: &View,
    packet: &Packet,
) -> Outcome {
    plans
        .into_iter()
        .filter_map(|(name, plan)| {
            let (rank, outcome) = match packet.addr {
                IpAddr::V4(ip) => trace_family(&plan.v4, name.protocol, Addr4::from(ip), view, packet),
                IpAddr::V6(ip) => trace_family(&plan.v6, name.protocol, Addr6::from(ip), view, packet),
            }?;
            Some(((rank, plan.created, name), outcome))
        })
        .min_by(|(a, _), (b, _)| a.cmp(b))
        .map_or(Outcome::NotAService, |(_, outcome)| outcome)
}

/// The outcome at the plan's best frontend for the packet, and how good it is.
fn trace_family<A: Address>(
    plan: &FamilyPlan<A>,
    protocol: Protocol,
    addr: A,
    view: &View,
    packet: &Packet,
) -> Option<(u8, Outcome)> {
    plan.frontends
        .iter()
        .filter_map(|frontend| Some((rank(frontend, protocol, addr, view, packet)?, frontend)))
        .min_by_key(|(rank, _)| *rank)
        .map(|(rank, frontend)| (rank, ask(plan, frontend, view, packet)))
}

/// Smaller comes first: the exact address before the node port (S38), and both before what stands for all other ports.
fn rank<A: Address>(
    frontend: &FrontendPlan<A>,
    protocol: Protocol,
    addr: A,
    view: &View,
    packet: &Packet,
) -> Option<u8> {
    if frontend.flags & FRONTEND_UNDEFINED != 0 {
        // Other ports of an external address are the host's, or whosever it is.
        let refuses = frontend.addr == addr && frontend.flags & FRONTEND_CLUSTER_IP != 0;
        return refuses.then_some(2);
    }
    if protocol != packet.protocol || frontend.port.get() != packet.port {
        return None;
    }
    if frontend.addr == addr {
        return Some(0);
    }
    let is_node_port = frontend.addr == A::zeroed() && view.node_port_addresses.contains(&packet.addr);
    is_node_port.then_some(1)
}

fn ask<A: Address>(plan: &FamilyPlan<A>, planned: &FrontendPlan<A>, view: &View, packet: &Packet) -> Outcome {
    if planned.flags & FRONTEND_UNDEFINED != 0 {
        return Outcome::Refused;
    }
    // Who may not ask is not told whether there is anybody to answer (S103, S107).
    if planned.flags & FRONTEND_SOURCE_RANGES != 0 && !allows(&plan.source_ranges, packet.client) {
        return Outcome::Dropped;
    }
    // The ranges only have to be told apart.
    let local = Range {
        first: 1,
        ..Range::default()
    };
    let frontend = Frontend {
        flags: planned.flags,
        local,
        ..Frontend::default()
    };
    let set = if frontend.range(packet.origin) == local {
        &plan.local
    } else {
        &plan.cluster
    };
    let has_pods = view.has_pods[usize::from(A::FAMILY == 6)];
    let masquerades = frontend.masquerades(packet.origin, has_pods, view.masquerade_all);
    let backends: BTreeMap<SocketAddr, bool> = set
        .selectable
        .iter()
        .map(|backend| {
            let backend = SocketAddr::new(backend.addr.into(), Port::get(backend.port));
            // S110: a client that is its own backend would not see the reply.
            (backend, masquerades || backend.ip() == packet.client)
        })
        .collect();
    match (backends.is_empty(), plan.has_endpoints) {
        (false, _) => Outcome::Backends(backends),
        (true, true) => Outcome::Dropped,
        (true, false) => Outcome::Refused,
    }
}

fn allows<A: Address>(ranges: &[(A, u8)], client: IpAddr) -> bool {
    ranges
        .iter()
        .any(|(addr, len)| IpNet::new((*addr).into(), *len).is_ok_and(|range| range.contains(&client)))
}
