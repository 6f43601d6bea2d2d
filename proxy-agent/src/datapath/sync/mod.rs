//! From plans to map writes: the difference between what is wanted and what the kernel holds, written in an order in which every
//! packet sees either the old or the new state of a service (S165). Called by `Datapath` only.
//!
//! The order: frontends nobody wants are removed → fresh ranges are written → new service ids are named → source ranges are written →
//! frontends are written → source ranges nobody wants are removed → after a grace period ranges and ids that nothing refers to are freed. The cost is that of what changed (S166); a failed write
//! stays pending for its object and the others go on (S167).

mod claims;
mod cluster_ips;
mod family;
mod ids;
#[cfg(test)]
mod source_tests;
mod sources;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashSet};
use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use proxy_common::addr::{Addr4, Addr6, Protocol};

pub(crate) use self::family::FamilySync;
use self::ids::Ids;
use super::error::TableError;
use super::tables::Tables;
use crate::plan::{ServicePortName, ServicePortPlan};

pub(crate) use self::ids::name_of;

/// Names are shared between the indices.
type Name = Arc<ServicePortName>;

/// How long a range or id rests after the last frontend left it. Programs run with preemption or migration off for microseconds;
/// whatever read the old frontend has long finished. `Datapath::tick` additionally asks the kernel to wait for its readers.
pub(super) const GRACE: Duration = Duration::from_secs(2);

/// What a change of the maps did. Failed objects stay pending and are tried again.
#[derive(Clone, Debug, Default)]
pub struct SyncReport {
    /// Entries written.
    pub written: usize,
    /// Entries removed.
    pub deleted: usize,
    /// UDP flows that lost their backend and will choose again (S141).
    pub flows_removed: usize,
    /// Backend slots that can be used again.
    pub slots_freed: usize,
    /// What could not be done.
    pub failed: Vec<SyncFailure>,
    /// Ids of UDP services whose frontends changed: their flows have to be looked at.
    moved_udp: BTreeSet<u32>,
    /// Some frontend's clients are not remembered any more.
    affinity_ended: bool,
}

/// An object that could not be programmed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SyncFailure {
    /// What it is.
    pub object: String,
    /// Why, with the remedy where there is one.
    pub error: String,
}

impl SyncReport {
    pub(super) fn fail(&mut self, object: impl Display, error: impl Display) {
        self.failed.push(SyncFailure {
            object: object.to_string(),
            error: error.to_string(),
        });
    }

    /// Something that others had changed or removed was written again.
    fn restored(&mut self, object: impl Display) {
        tracing::warn!(%object, "changed by somebody else, written again");
        self.written += 1;
    }

    /// A frontend of the service changed. TCP and SCTP connections stay where they are (S147).
    fn moved(&mut self, protocol: u8, service: u32) {
        if protocol == Protocol::Udp.number() {
            self.moved_udp.insert(service);
        }
    }

    pub(super) fn take_affinity_ended(&mut self) -> bool {
        std::mem::take(&mut self.affinity_ended)
    }

    pub(super) fn take_moved_udp(&mut self) -> BTreeSet<u32> {
        std::mem::take(&mut self.moved_udp)
    }
}

/// Both families and the ids they share.
pub(super) struct Sync {
    pub(super) v4: FamilySync<Addr4>,
    pub(super) v6: FamilySync<Addr6>,
    ids: Ids,
    /// Wanted service ports whose id is not in the kernel yet.
    unnamed: BTreeSet<Name>,
    completed: bool,
}

/// Entries in use, for metrics.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Occupancy {
    pub(super) backends: [u32; 2],
    pub(super) frontends: [usize; 2],
    pub(super) source_ranges: [usize; 2],
    pub(super) services: usize,
}

impl Sync {
    /// Takes over what the maps hold.
    pub(super) fn adopt(tables: &impl Tables) -> Result<Self, TableError> {
        Ok(Self {
            v4: FamilySync::adopt(tables)?,
            v6: FamilySync::adopt(tables)?,
            ids: Ids::adopt(tables.services()?),
            unnamed: BTreeSet::new(),
            completed: false,
        })
    }

    /// Stages the plans of changed service ports and writes everything that is pending.
    pub(super) fn apply(
        &mut self,
        tables: &mut impl Tables,
        changes: Vec<(ServicePortName, Option<ServicePortPlan>)>,
        now: Duration,
    ) -> SyncReport {
        for (name, plan) in changes {
            let name = Name::new(name);
            let parts = plan.unwrap_or_default();
            let (created, affinity) = (parts.created, parts.affinity_seconds);
            if !self.v4.has_plan(&name, &parts.v4, created, affinity) {
                self.v4.stage(&name, Some((parts.v4, created, affinity)), now);
            }
            if !self.v6.has_plan(&name, &parts.v6, created, affinity) {
                self.v6.stage(&name, Some((parts.v6, created, affinity)), now);
            }
            if self.v4.wants(&name) || self.v6.wants(&name) {
                self.unnamed.insert(name);
            } else {
                self.unnamed.remove(&name);
                self.ids.retire(&name, now);
            }
        }
        self.flush(tables, now)
    }

    /// Everything wanted has been applied: what nobody asked for goes.
    pub(super) fn complete(&mut self, tables: &mut impl Tables, now: Duration) -> SyncReport {
        self.completed = true;
        self.v4.stage_leftovers(now);
        self.v6.stage_leftovers(now);
        let wanted: BTreeSet<Name> = self.v4.wanted().chain(self.v6.wanted()).cloned().collect();
        self.ids.retire_others(|name| wanted.contains(name), now);
        self.flush(tables, now)
    }

    /// Writes what is pending.
    pub(super) fn flush<T: Tables>(&mut self, tables: &mut T, now: Duration) -> SyncReport {
        let mut report = SyncReport::default();
        if self.completed {
            self.v4.remove_unwanted(tables, now, &mut report);
            self.v6.remove_unwanted(tables, now, &mut report);
        }
        self.v4.write_ranges(tables, &self.ids, now, &mut report);
        self.v6.write_ranges(tables, &self.ids, now, &mut report);
        for name in std::mem::take(&mut self.unnamed) {
            match self.ids.ensure(&name, tables) {
                Ok(written) => report.written += usize::from(written),
                Err(error) => {
                    report.fail(&name, error);
                    self.unnamed.insert(name);
                }
            }
        }
        self.v4.write_sources(tables, &self.ids, &mut report);
        self.v6.write_sources(tables, &self.ids, &mut report);
        self.v4.write_frontends(tables, &self.ids, now, &mut report);
        self.v6.write_frontends(tables, &self.ids, now, &mut report);
        if self.completed {
            self.v4.remove_sources(tables, &self.ids, &mut report);
            self.v6.remove_sources(tables, &self.ids, &mut report);
        }
        report
    }

    /// Compares the maps with what was written, and writes again what differs.
    pub(super) fn audit(&mut self, tables: &mut impl Tables, report: &mut SyncReport) {
        let audited = self
            .ids
            .audit(tables, report)
            .and_then(|()| self.v4.audit(tables, report))
            .and_then(|()| self.v6.audit(tables, report));
        if let Err(error) = audited {
            report.fail("comparison with the maps", error);
        }
    }

    /// Has everything been listed and applied once?
    pub(super) fn is_complete(&self) -> bool {
        self.completed
    }

    /// Is something left to write, or, before `complete`, to remove later?
    pub(super) fn is_pending(&self) -> bool {
        self.v4.is_pending() || self.v6.is_pending() || !self.unnamed.is_empty()
    }

    /// The same by family (S173).
    pub(super) fn is_behind(&self) -> [bool; 2] {
        [
            self.v4.is_pending() || self.unnamed.iter().any(|name| self.v4.wants(name)),
            self.v6.is_pending() || self.unnamed.iter().any(|name| self.v6.wants(name)),
        ]
    }

    /// Is something waiting for the grace period?
    pub(super) fn has_idle(&mut self) -> bool {
        self.v4.ranges_mut().has_idle() || self.v6.ranges_mut().has_idle() || self.ids.has_retired()
    }

    /// Frees ranges and ids that have rested for [`GRACE`]. Ids only once deletions are allowed at all.
    pub(super) fn free_idle(&mut self, tables: &mut impl Tables, now: Duration, report: &mut SyncReport) {
        let Some(before) = now.checked_sub(GRACE) else { return };
        report.slots_freed += self.v4.ranges_mut().free_idle(before) as usize;
        report.slots_freed += self.v6.ranges_mut().free_idle(before) as usize;
        if !self.completed {
            return;
        }
        if !self.ids.has_retired() {
            return;
        }
        let in_use: HashSet<u32> = self.v4.ids_in_use().chain(self.v6.ids_in_use()).collect();
        for freed in self.ids.free(before, |id| in_use.contains(&id), tables) {
            match freed {
                Ok(()) => report.deleted += 1,
                Err((id, error)) => report.fail(format!("service id {id}"), error),
            }
        }
    }

    /// Service ports by number.
    pub(super) fn service_ids(&self) -> impl Iterator<Item = (u32, &ServicePortName)> {
        self.ids.all()
    }

    pub(super) fn occupancy(&self) -> Occupancy {
        let (v4, v6) = (self.v4.occupancy(), self.v6.occupancy());
        Occupancy {
            backends: [v4.0, v6.0],
            frontends: [v4.1, v6.1],
            source_ranges: [self.v4.source_ranges(), self.v6.source_ranges()],
            services: self.ids.len(),
        }
    }
}
