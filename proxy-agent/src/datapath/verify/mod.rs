//! Does the kernel hold what it should? The agent's own code is run as at a start, on tables that write nothing ([`dry`]); what it
//! would have written is what differs. Then the attachments are looked at. Nothing is changed, and an agent may run meanwhile.

mod attachments;
mod compare;
mod dry;

use std::time::Duration;

use ipnet::IpNet;
use serde::Serialize;

use self::dry::DryTables;
use super::error::{DatapathError, TableError};
use super::links::Links;
use super::loader::Pins;
use super::options::{Options, PodDetection};
use super::settings::NodeSettings;
use super::sync::{Sync, SyncReport};
use super::tables::BpfTables;
use crate::model::Node;
use crate::netlink::Network;
use crate::plan::{ServicePortName, ServicePortPlan};

/// What the kernel should hold.
pub struct Wanted<'w> {
    /// The plans of all service ports.
    pub plans: Vec<(ServicePortName, Option<ServicePortPlan>)>,
    /// This node's Node object.
    pub node: Option<&'w Node>,
    /// Networks that cluster IPs are taken from.
    pub service_networks: &'w [IpNet],
    /// Interfaces and addresses.
    pub network: &'w Network,
}

/// Something that is not as it should be.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Difference {
    /// `frontend`, `backend`, `sourceRange`, `service`, `settings`, `nodeAddress`, `interface`, `program`, or `write` for what could
    /// not be compared because there is no room for it.
    pub kind: &'static str,
    /// Which one.
    pub object: String,
    /// `missing`, `extra` or `different`.
    pub problem: &'static str,
    /// What the kernel holds.
    pub held: String,
    /// What it should hold.
    pub wanted: String,
}

/// Everything that differs, sorted.
pub fn verify(options: &Options, wanted: Wanted<'_>) -> Result<Vec<Difference>, DatapathError> {
    let pins = Pins::new(&options.bpf_dir);
    let failed = |error: TableError| DatapathError::call("reading", pins.maps.display())(std::io::Error::other(error));
    let mut tables = DryTables::new(BpfTables::open(&pins.maps, false).map_err(failed)?);
    let mut found = attachments::look(options, &pins, wanted.network)?;
    for failure in dry_run(options, &pins, wanted, &mut tables)? {
        found.push(Difference {
            kind: "write",
            object: failure.object,
            problem: "missing",
            held: failure.error,
            wanted: String::new(),
        });
    }
    compare::differences(&tables, &mut found).map_err(failed)?;
    found.sort();
    found.dedup();
    Ok(found)
}

/// What an agent does at its start, without programs.
fn dry_run(
    options: &Options,
    pins: &Pins,
    wanted: Wanted<'_>,
    tables: &mut DryTables,
) -> Result<Vec<super::SyncFailure>, DatapathError> {
    let failed = |error: TableError| DatapathError::call("reading", pins.maps.display())(std::io::Error::other(error));
    let mut report = SyncReport::default();
    let mut links = Links::open(
        options.interfaces.clone(),
        options.pods.clone(),
        options.node_port_addresses.clone(),
        options.attach,
        options.xdp.clone(),
        &pins.links,
        tables,
    )?;
    links.set_node_ips(wanted.node.map_or(&[], |node| &node.ips), tables, &mut report);
    links.write_maps(wanted.network, tables, &mut report);

    let mut sync = Sync::adopt(tables).map_err(failed)?;
    let mut settings = NodeSettings::adopt(tables, sync.v4.keys(), sync.v6.keys()).map_err(failed)?;
    match (&options.pods, wanted.node) {
        (PodDetection::ClusterCidr(cidrs), _) => settings.set_pods(cidrs),
        (PodDetection::NodeCidr, Some(node)) => settings.set_pods(&node.pod_cidrs),
        (PodDetection::NodeCidr, None) => {}
        (PodDetection::Bridge(_) | PodDetection::InterfacePrefix(_), _) => settings.set_pods(&[]),
    }
    settings.set_networks(wanted.service_networks);
    for plan in wanted.plans.iter().filter_map(|(_, plan)| plan.as_ref()) {
        settings.reckon_with(plan);
    }
    settings.flush(tables, &mut report);
    for mut step in [
        sync.apply(tables, wanted.plans, Duration::ZERO),
        sync.complete(tables, Duration::ZERO),
    ] {
        report.failed.append(&mut step.failed);
    }
    Ok(report.failed)
}
