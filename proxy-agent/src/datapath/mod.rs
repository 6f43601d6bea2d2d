//! Stand-in with the interface of the datapath, until that is merged.

mod options;

use std::path::Path;
use std::time::Duration;

pub use options::{AttachMode, BpfLogLevel, Capacities, InterfaceFilter, Options, SocketLb};

use crate::netlink::Network;
use crate::plan::{ServicePortName, ServicePortPlan};

/// Stand-in.
#[derive(Debug, thiserror::Error)]
#[error("stand-in")]
pub struct DatapathError;

/// Stand-in.
#[derive(Debug)]
pub struct Datapath;

/// Stand-in.
#[derive(Clone, Debug, Default)]
pub struct SyncReport {
    /// Entries written.
    pub written: usize,
    /// Entries removed.
    pub deleted: usize,
    /// UDP flows.
    pub flows_removed: usize,
    /// What could not be done.
    pub failed: Vec<SyncFailure>,
}

/// Stand-in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SyncFailure {
    /// What it is.
    pub object: String,
    /// Why.
    pub error: String,
}

/// Stand-in.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Entries and capacity per map that the agent fills.
    pub maps: Vec<MapStats>,
    /// How often each reason was met.
    pub reasons: Vec<(&'static str, u64)>,
    /// Programs on interfaces.
    pub programs_on_interfaces: usize,
    /// Programs on the cgroup.
    pub programs_on_cgroup: usize,
    /// `tcx` or `classic`.
    pub attach_mode: &'static str,
    /// Idle entries removed from the rewrite tables so far.
    pub entries_collected: u64,
    /// UDP flows that lost their backend so far (S141).
    pub flows_removed: u64,
}

/// Occupancy of a map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MapStats {
    /// Name of the map.
    pub name: &'static str,
    /// Entries, or slots taken.
    pub entries: u64,
    /// Entries it can hold.
    pub capacity: u64,
}

impl Datapath {
    /// Stand-in.
    pub fn open(_: Options) -> Result<Self, DatapathError> {
        Ok(Self)
    }

    /// Stand-in.
    pub fn apply(&mut self, changes: Vec<(ServicePortName, Option<ServicePortPlan>)>) -> SyncReport {
        for (name, plan) in &changes {
            let plan = plan.as_ref().map(|plan| {
                (
                    &plan.v4.frontends,
                    plan.v4.cluster.selectable.len(),
                    plan.v6.cluster.selectable.len(),
                )
            });
            tracing::debug!(%name, ?plan, "stand-in");
        }
        SyncReport {
            written: changes.len(),
            ..SyncReport::default()
        }
    }

    /// Stand-in.
    pub fn complete(&mut self) -> SyncReport {
        SyncReport::default()
    }

    /// Stand-in.
    pub fn set_network(&mut self, _: &Network) -> SyncReport {
        SyncReport::default()
    }

    /// Stand-in.
    pub fn tick(&mut self) -> Duration {
        Duration::from_secs(5)
    }

    /// Stand-in.
    pub fn stats(&self) -> Stats {
        Stats::default()
    }
}

/// Stand-in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CleanupReport {
    /// Pinned links.
    pub links: usize,
    /// Classic filters.
    pub filters: usize,
    /// Pinned maps.
    pub maps: usize,
}

/// Stand-in.
pub fn cleanup(_: &Path) -> Result<CleanupReport, DatapathError> {
    Ok(CleanupReport::default())
}
