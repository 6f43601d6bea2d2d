//! What would be programmed, as rows: the output of `run --dry-run`.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use proxy_common::addr::Address;
use proxy_common::backend::Backend;
use proxy_common::frontend::{FRONTEND_CLUSTER_IP, FRONTEND_LOCAL, FRONTEND_SOURCE_RANGES, FRONTEND_UNDEFINED};
use serde::Serialize;

use super::InspectError;
use super::output::{Columns, Output, or_none, render};
use crate::plan::{Endpoints, FamilyPlan, ServicePortName, ServicePortPlan};

/// A service port as it is planned.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PlannedPort {
    /// Namespace of the Service.
    pub namespace: String,
    /// Name of the Service.
    pub name: String,
    /// Name of the port.
    pub port_name: String,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// Session affinity timeout, 0 for none.
    pub affinity_seconds: u32,
    /// What clients dial. If several Services claim one, the oldest gets it (S37), which is not decided here.
    pub frontends: Vec<PlannedFrontend>,
    /// The cluster set (S52), of both families.
    pub cluster: PlannedSet,
    /// The local set (S53); empty unless some traffic policy is Local.
    pub local: PlannedSet,
    /// Who may dial the frontends with source ranges (S101).
    pub source_ranges: Vec<String>,
}

/// An address and port that clients dial.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PlannedFrontend {
    /// Address; unspecified for a node port.
    pub address: IpAddr,
    /// Port.
    pub port: u16,
    /// As `service list` says it: `ClusterIP`, `NodePort`, `External` or `Undefined`.
    pub kind: String,
    /// The traffic policy for this kind of address is Local.
    pub local: bool,
    /// Only clients in the source ranges may connect.
    pub source_ranges: bool,
}

/// Endpoints.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PlannedSet {
    /// New connections may go to them.
    pub selectable: Vec<SocketAddr>,
    /// Only running UDP flows stay with them (S145).
    pub kept: Vec<SocketAddr>,
}

/// Plans as text.
pub fn planned(plans: &[(ServicePortName, ServicePortPlan)], output: Output) -> Result<String, InspectError> {
    let mut rows: Vec<PlannedPort> = plans.iter().map(|(name, plan)| row(name, plan)).collect();
    rows.sort();
    render(&rows, output)
}

fn row(name: &ServicePortName, plan: &ServicePortPlan) -> PlannedPort {
    let mut row = PlannedPort {
        namespace: name.namespace.clone(),
        name: name.name.clone(),
        port_name: name.port.clone(),
        protocol: name.protocol.to_string(),
        affinity_seconds: plan.affinity_seconds,
        frontends: Vec::new(),
        cluster: PlannedSet::default(),
        local: PlannedSet::default(),
        source_ranges: Vec::new(),
    };
    row.add(&plan.v4);
    row.add(&plan.v6);
    row
}

impl PlannedPort {
    fn add<A: Address>(&mut self, family: &FamilyPlan<A>) {
        for frontend in &family.frontends {
            let has = |flag| frontend.flags & flag != 0;
            let address: IpAddr = frontend.addr.into();
            let kind = match () {
                () if has(FRONTEND_UNDEFINED) => "Undefined",
                () if has(FRONTEND_CLUSTER_IP) => "ClusterIP",
                () if address.is_unspecified() => "NodePort",
                () => "External",
            };
            self.frontends.push(PlannedFrontend {
                address,
                port: frontend.port.get(),
                kind: kind.to_owned(),
                local: has(FRONTEND_LOCAL),
                source_ranges: has(FRONTEND_SOURCE_RANGES),
            });
        }
        self.cluster.add(&family.cluster);
        self.local.add(&family.local);
        let prefixes = family
            .source_ranges
            .iter()
            .filter_map(|(addr, len)| IpNet::new((*addr).into(), *len).ok());
        self.source_ranges.extend(prefixes.map(|prefix| prefix.to_string()));
    }
}

impl PlannedSet {
    fn add<A: Address>(&mut self, endpoints: &Endpoints<A>) {
        let socket = |backend: &Backend<A>| SocketAddr::new(backend.addr.into(), backend.port.get());
        self.selectable.extend(endpoints.selectable.iter().map(socket));
        self.kept.extend(endpoints.keep.iter().map(socket));
    }
}

impl Columns for PlannedPort {
    const HEADINGS: &'static [&'static str] = &[
        "NAMESPACE",
        "NAME",
        "PORT",
        "PROTOCOL",
        "FRONTENDS",
        "CLUSTER",
        "LOCAL",
        "KEPT",
        "AFFINITY",
        "SOURCES",
    ];
    const NARROW: usize = 7;

    fn cells(&self) -> Vec<String> {
        let list =
            |sockets: &[SocketAddr]| or_none(&sockets.iter().map(ToString::to_string).collect::<Vec<_>>().join(","));
        // What stands for undefined ports is nothing to dial; it is in the other formats.
        let dialled = self.frontends.iter().filter(|frontend| frontend.kind != "Undefined");
        let dialled = dialled.map(|frontend| match frontend.address {
            address if address.is_unspecified() => format!("*:{}", frontend.port),
            address => SocketAddr::new(address, frontend.port).to_string(),
        });
        let mut dialled: Vec<String> = dialled.collect();
        dialled.dedup();
        vec![
            or_none(&self.namespace),
            self.name.clone(),
            or_none(&self.port_name),
            self.protocol.clone(),
            or_none(&dialled.join(",")),
            list(&self.cluster.selectable),
            list(&self.local.selectable),
            list(&[&self.cluster.kept[..], &self.local.kept].concat()),
            self.affinity_seconds.to_string(),
            or_none(&self.source_ranges.join(",")),
        ]
    }
}
