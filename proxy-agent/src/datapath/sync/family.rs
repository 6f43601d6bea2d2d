//! One family's frontends and ranges: what is wanted, what the kernel holds, and the writes in between.
//!
//! Plans are staged first, then the caller runs the phases in order. What cannot be written stays pending and is tried again.
//! `frontends` mirrors the kernel's map exactly: it changes only after a write succeeded.

mod audit;

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use proxy_common::addr::Address;
use proxy_common::backend::Backend;
use proxy_common::frontend::{
    FRONTEND_HAS_ENDPOINTS, FRONTEND_SOURCE_RANGES, FRONTEND_UNDEFINED, Frontend, FrontendKey, Range,
};
use proxy_common::names;

use super::claims::Claims;
use super::cluster_ips::ClusterIps;
use super::ids::Ids;
use super::sources::Sources;
use super::{Name, SyncReport};
use crate::datapath::error::TableError;
use crate::datapath::ranges::Ranges;
use crate::datapath::tables::FamilyTables;
use crate::plan::{Endpoints, FamilyPlan, FrontendPlan};

/// State of one family.
pub(crate) struct FamilySync<A> {
    ranges: Ranges,
    sources: Sources<A>,
    cluster_ips: ClusterIps<A>,
    /// What the kernel holds.
    frontends: HashMap<FrontendKey<A>, Frontend>,
    /// Who wants which frontend, with its flags.
    claims: Claims<A>,
    services: HashMap<Name, Service<A>>,
    /// Services whose ranges may differ from their plan.
    pending_services: BTreeSet<Name>,
    /// Frontends that may differ from what is wanted.
    pending_keys: BTreeSet<FrontendKey<A>>,
    /// The last generation given out; every replaced range gets a new one, across all services, so that a service which is
    /// deleted and made again never shows an old one.
    generation: u32,
}

struct Service<A> {
    plan: FamilyPlan<A>,
    created: i64,
    affinity_seconds: u32,
    cluster: Option<Published<A>>,
    local: Option<Published<A>>,
    generation: u32,
    /// Both ranges hold what the plan says.
    ready: bool,
}

/// A written range and its content.
struct Published<A> {
    range: Range,
    endpoints: Endpoints<A>,
}

impl<A: Address> FamilySync<A> {
    /// Takes over what the kernel holds.
    pub(super) fn adopt(tables: &impl FamilyTables<A>) -> Result<Self, TableError> {
        let frontends: HashMap<_, _> = tables.frontends()?.into_iter().collect();
        let mut ranges = Ranges::new(
            tables.backend_slots(),
            frontends
                .values()
                .flat_map(|frontend| [frontend.cluster, frontend.local])
                .filter_map(|range| Some((range.first, length(range)?))),
        );
        for frontend in frontends.values() {
            retain(&mut ranges, frontend);
        }
        Ok(Self {
            generation: frontends
                .values()
                .map(|frontend| frontend.generation)
                .max()
                .unwrap_or_default(),
            ranges,
            sources: Sources::adopt(tables)?,
            cluster_ips: ClusterIps::adopt(tables)?,
            frontends,
            claims: Claims::new(),
            services: HashMap::new(),
            pending_services: BTreeSet::new(),
            pending_keys: BTreeSet::new(),
        })
    }

    /// Notes what is wanted for a service port from now on; `None` if it is gone.
    pub(super) fn stage(&mut self, name: &Name, wanted: Option<(FamilyPlan<A>, i64, u32)>, now: Duration) {
        // A service port without frontends does not exist in this family.
        let wanted = wanted.filter(|(plan, ..)| !plan.frontends.is_empty());
        let old = self.services.remove(name);
        let old_ranges = old.iter().flat_map(|old| &old.plan.source_ranges);
        let new_ranges = wanted.iter().flat_map(|(plan, ..)| &plan.source_ranges);
        if old_ranges.chain(new_ranges).next().is_some() {
            self.sources.pending.insert(name.clone());
        }
        if let Some(old) = &old {
            for frontend in &old.plan.frontends {
                let key = key_of(name, frontend);
                self.claims.remove(&key, &(old.created, name.clone()));
                self.pending_keys.insert(key);
            }
        }
        let Some((plan, created, affinity_seconds)) = wanted else {
            self.pending_services.remove(name);
            for published in old.iter().flat_map(|old| [&old.cluster, &old.local]).flatten() {
                release(&mut self.ranges, published.range, now);
            }
            return;
        };
        for frontend in &plan.frontends {
            let key = key_of(name, frontend);
            let winner = self.claims.add(key, (created, name.clone()), frontend.flags);
            if let Some(winner) = winner.filter(|_| key.protocol != 0) {
                tracing::warn!(address = %frontend.addr, port = %frontend.port, protocol = %name.protocol, %winner,
                    claimed_by = %name, "several services claim one frontend");
            }
            self.pending_keys.insert(key);
        }
        let (cluster, local, generation) = old.map_or((None, None, 0), |old| (old.cluster, old.local, old.generation));
        self.services.insert(
            name.clone(),
            Service {
                plan,
                created,
                affinity_seconds,
                cluster,
                local,
                generation,
                ready: false,
            },
        );
        self.pending_services.insert(name.clone());
    }

    /// Is this exactly the plan that was staged last?
    pub(super) fn has_plan(&self, name: &Name, plan: &FamilyPlan<A>, created: i64, affinity_seconds: u32) -> bool {
        match self.services.get(name) {
            Some(service) => {
                service.plan == *plan && service.created == created && service.affinity_seconds == affinity_seconds
            }
            None => plan.frontends.is_empty(),
        }
    }

    /// Everything in the kernel that nobody claims is to be removed.
    pub(super) fn stage_leftovers(&mut self, now: Duration) {
        let unclaimed = self.frontends.keys().filter(|key| !self.claims.contains(key));
        self.pending_keys.extend(unclaimed);
        self.ranges.retire_unclaimed(now);
        self.sources.stage_leftovers();
    }

    /// Phase 1: frontends that nobody wants. One that goes to another service is not removed but overwritten later (S35).
    pub(super) fn remove_unwanted(
        &mut self,
        tables: &mut impl FamilyTables<A>,
        now: Duration,
        report: &mut SyncReport,
    ) {
        let unwanted: Vec<_> = self
            .pending_keys
            .iter()
            .filter(|key| !self.claims.contains(key))
            .copied()
            .collect();
        for key in unwanted {
            let Some(old) = self.frontends.get(&key).copied() else {
                self.pending_keys.remove(&key);
                continue;
            };
            match tables.remove_frontend(&key) {
                Ok(()) => {
                    self.pending_keys.remove(&key);
                    self.frontends.remove(&key);
                    self.cluster_ips.remove(tables, &key, &old);
                    release_both(&mut self.ranges, &old, now);
                    report.deleted += 1;
                    report.moved(key.protocol, old.service);
                    report.affinity_ended |= old.affinity_seconds != 0;
                }
                Err(error) => report.fail(show(&key), error),
            }
        }
    }

    /// Phase 2: fresh ranges for services whose endpoints changed.
    pub(super) fn write_ranges(
        &mut self,
        tables: &mut impl FamilyTables<A>,
        ids: &Ids,
        now: Duration,
        report: &mut SyncReport,
    ) {
        for name in self.pending_services.clone() {
            let Some(mut service) = self.services.remove(&name) else {
                self.pending_services.remove(&name);
                continue;
            };
            if service.cluster.is_none()
                && service.local.is_none()
                && let Some(id) = ids.get(&name)
            {
                self.adopt_ranges(tables, &name, &mut service, id);
            }
            let written = self.bring_up(tables, &mut service, now, report);
            match written {
                Ok(()) => {
                    service.ready = true;
                    self.pending_services.remove(&name);
                    let keys = service.plan.frontends.iter();
                    self.pending_keys.extend(keys.map(|frontend| key_of(&name, frontend)));
                }
                Err(error) => report.fail(format!("{name} (IPv{})", A::FAMILY), error),
            }
            self.services.insert(name, service);
        }
    }

    /// Service ports that have something to show in this family.
    pub(super) fn wanted(&self) -> impl Iterator<Item = &Name> {
        self.services.keys()
    }

    /// Does the service port exist in this family?
    pub(super) fn wants(&self, name: &Name) -> bool {
        self.services.contains_key(name)
    }

    /// Service ids that frontends in the kernel carry.
    pub(super) fn ids_in_use(&self) -> impl Iterator<Item = u32> {
        let frontends = self.frontends.values().map(|frontend| frontend.service);
        frontends.chain(self.sources.ids())
    }

    /// Service ids whose clients are remembered.
    pub(crate) fn services_with_affinity(&self) -> impl Iterator<Item = u32> {
        let with_affinity = self
            .frontends
            .values()
            .filter(|frontend| frontend.affinity_seconds != 0);
        with_affinity.map(|frontend| frontend.service)
    }

    /// Phase 3: source ranges, which have to be there before a frontend asks for them.
    pub(super) fn write_sources(&mut self, tables: &mut impl FamilyTables<A>, ids: &Ids, report: &mut SyncReport) {
        for name in &self.sources.pending.clone() {
            let (Some(service), Some(id)) = (self.services.get(name), ids.get(name)) else {
                continue;
            };
            if let Err(error) = self.sources.write(tables, id, &service.plan.source_ranges, report) {
                report.fail(format!("source ranges of {name} (IPv{})", A::FAMILY), error);
            }
        }
    }

    /// Phase 5: source ranges that are not wanted any more.
    pub(super) fn remove_sources(&mut self, tables: &mut impl FamilyTables<A>, ids: &Ids, report: &mut SyncReport) {
        for name in std::mem::take(&mut self.sources.pending) {
            let Some(id) = ids.get(&name) else {
                // Without a number nothing was written; one that is wanted still waits for it.
                if self.services.contains_key(&name) {
                    self.sources.pending.insert(name);
                }
                continue;
            };
            let wanted = self
                .services
                .get(&name)
                .map(|service| service.plan.source_ranges.clone());
            let wanted = wanted.unwrap_or_default();
            self.sources.leftovers.remove(&id);
            let is_done = self.remove_stale_sources(tables, id, &wanted, report) && self.sources.holds(id, &wanted);
            if !is_done {
                self.sources.pending.insert(name);
            }
        }
        // What no wanted service has looked at belongs to nobody.
        for id in std::mem::take(&mut self.sources.leftovers) {
            let owner = self.services.iter().find(|(name, _)| ids.get(name) == Some(id));
            let wanted = owner.map(|(_, service)| service.plan.source_ranges.clone());
            if !self.remove_stale_sources(tables, id, &wanted.unwrap_or_default(), report) {
                self.sources.leftovers.insert(id);
            }
        }
    }

    /// True if nothing is left to remove. The last range has to stay while a frontend asks for ranges: it would let nobody in.
    fn remove_stale_sources(
        &mut self,
        tables: &mut impl FamilyTables<A>,
        id: u32,
        wanted: &[(A, u8)],
        report: &mut SyncReport,
    ) -> bool {
        if !self.sources.has_stale(id, wanted) {
            return true;
        }
        let mut frontends = self.frontends.values();
        if wanted.is_empty()
            && frontends.any(|frontend| frontend.service == id && frontend.flags & FRONTEND_SOURCE_RANGES != 0)
        {
            return false;
        }
        match self.sources.remove_others(tables, id, wanted, report) {
            Ok(()) => true,
            Err(error) => {
                report.fail(format!("source ranges of service id {id}"), error);
                false
            }
        }
    }

    /// Phase 4: every pending frontend is written as a whole, which switches readers over in one step.
    pub(super) fn write_frontends(
        &mut self,
        tables: &mut impl FamilyTables<A>,
        ids: &Ids,
        now: Duration,
        report: &mut SyncReport,
    ) {
        // What refuses undefined ports comes last, so that it never refuses one that is about to be defined.
        let (markers, mut keys): (Vec<_>, Vec<_>) = self.pending_keys.iter().partition(|key| key.protocol == 0);
        keys.extend(markers);
        for key in keys {
            // Without a winner the frontend is to be removed, which phase 1 does once that is allowed. A winner that is not ready
            // has been reported; what is there stays until it is.
            let Some(wanted) = self.wanted_frontend(&key, ids) else {
                continue;
            };
            let old = self.frontends.get(&key).copied();
            if let Err(error) = self.cluster_ips.add(tables, &key, &wanted) {
                report.fail(show(&key), error);
                continue;
            }
            if old == Some(wanted) {
                self.pending_keys.remove(&key);
                continue;
            }
            if let Err(error) = tables.set_frontend(&key, &wanted) {
                report.fail(show(&key), error);
                continue;
            }
            self.pending_keys.remove(&key);
            self.frontends.insert(key, wanted);
            retain(&mut self.ranges, &wanted);
            report.written += 1;
            report.moved(key.protocol, wanted.service);
            if let Some(old) = old {
                if old.service != wanted.service {
                    self.cluster_ips.remove(tables, &key, &old);
                }
                release_both(&mut self.ranges, &old, now);
                report.moved(key.protocol, old.service);
                report.affinity_ended |= old.affinity_seconds != 0 && wanted.affinity_seconds == 0;
                report.affinity_ended |= old.affinity_seconds != 0 && wanted.service != old.service;
            }
        }
    }

    /// Is something waiting to be written or removed?
    pub(super) fn is_pending(&self) -> bool {
        !self.pending_services.is_empty()
            || !self.pending_keys.is_empty()
            || !self.sources.pending.is_empty()
            || !self.sources.leftovers.is_empty()
    }

    /// Ranges that wait for the grace period.
    pub(super) fn ranges_mut(&mut self) -> &mut Ranges {
        &mut self.ranges
    }

    /// Slots in use, frontends in the kernel.
    pub(super) fn occupancy(&self) -> (u32, usize) {
        (self.ranges.taken(), self.frontends.len())
    }

    /// The keys of all frontends that the kernel holds.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &FrontendKey<A>> {
        self.frontends.keys()
    }

    /// Source ranges in the kernel.
    pub(super) fn source_ranges(&self) -> usize {
        self.sources.rows()
    }

    /// A frontend as the kernel holds it.
    pub(crate) fn frontend(&self, key: &FrontendKey<A>) -> Option<&Frontend> {
        self.frontends.get(key)
    }

    fn wanted_frontend(&self, key: &FrontendKey<A>, ids: &Ids) -> Option<Frontend> {
        let (name, flags) = self.claims.winner(key)?;
        let service = self.services.get(name).filter(|service| service.ready)?;
        let id = ids.get(name)?;
        if flags & FRONTEND_UNDEFINED != 0 {
            // It leads nowhere, so it need not be written again when endpoints change.
            return Some(Frontend {
                service: id,
                flags,
                ..Frontend::default()
            });
        }
        if flags & FRONTEND_SOURCE_RANGES != 0 && !self.sources.holds(id, &service.plan.source_ranges) {
            return None;
        }
        let has_endpoints = if service.plan.has_endpoints {
            FRONTEND_HAS_ENDPOINTS
        } else {
            0
        };
        Some(Frontend {
            service: id,
            flags: flags & !FRONTEND_HAS_ENDPOINTS | has_endpoints,
            cluster: service.cluster.as_ref()?.range,
            local: service.local.as_ref()?.range,
            affinity_seconds: service.affinity_seconds,
            generation: service.generation,
        })
    }

    /// A former agent's frontend of this service whose ranges hold what is planned: they are taken over, and nothing is written.
    fn adopt_ranges(&mut self, tables: &impl FamilyTables<A>, name: &Name, service: &mut Service<A>, id: u32) {
        let mut generation = None;
        let with_ranges = |planned: &&FrontendPlan<A>| planned.flags & FRONTEND_UNDEFINED == 0;
        for planned in service.plan.frontends.iter().filter(with_ranges) {
            let key = key_of(name, planned);
            let Some(found) = self.frontends.get(&key).filter(|frontend| frontend.service == id) else {
                continue;
            };
            let holds = |range: Range, endpoints: &Endpoints<A>| {
                range.count as usize == endpoints.selectable.len()
                    && range.keep as usize == endpoints.keep.len()
                    && length(range).is_none_or(|length| {
                        tables
                            .backends(range.first, length)
                            .is_ok_and(|slots| slots.iter().eq(endpoints.selectable.iter().chain(&endpoints.keep)))
                    })
            };
            if holds(found.cluster, &service.plan.cluster) && holds(found.local, &service.plan.local) {
                generation = Some((found.generation, found.cluster, found.local));
                break;
            }
        }
        let Some((generation, cluster, local)) = generation else {
            return;
        };
        service.generation = generation;
        for (range, endpoints, published) in [
            (cluster, &service.plan.cluster, &mut service.cluster),
            (local, &service.plan.local, &mut service.local),
        ] {
            if length(range).is_some() {
                self.ranges.retain(range.first);
            }
            *published = Some(Published {
                range,
                endpoints: endpoints.clone(),
            });
        }
    }

    /// Writes the ranges that differ from the plan into fresh slots.
    fn bring_up(
        &mut self,
        tables: &mut impl FamilyTables<A>,
        service: &mut Service<A>,
        now: Duration,
        report: &mut SyncReport,
    ) -> Result<(), TableError> {
        for (endpoints, published) in [
            (&service.plan.cluster, &mut service.cluster),
            (&service.plan.local, &mut service.local),
        ] {
            if published
                .as_ref()
                .is_some_and(|published| published.endpoints == *endpoints)
            {
                continue;
            }
            let range = self.write_range(tables, endpoints, now, report)?;
            self.generation = self.generation.wrapping_add(1).max(1);
            service.generation = self.generation;
            let old = published.replace(Published {
                range,
                endpoints: endpoints.clone(),
            });
            if let Some(old) = old {
                release(&mut self.ranges, old.range, now);
            }
        }
        Ok(())
    }

    fn write_range(
        &mut self,
        tables: &mut impl FamilyTables<A>,
        endpoints: &Endpoints<A>,
        now: Duration,
        report: &mut SyncReport,
    ) -> Result<Range, TableError> {
        let backends: Vec<Backend<A>> = endpoints.selectable.iter().chain(&endpoints.keep).copied().collect();
        if backends.is_empty() {
            return Ok(Range::default());
        }
        let first = self.ranges.allocate(backends.len() as u32).ok_or(TableError::Full {
            map: names::for_family::<A>(names::BACKENDS),
            capacity: tables.backend_slots(),
            setting: crate::datapath::BACKENDS_SETTING,
        })?;
        if let Err(error) = tables.set_backends(first, &backends) {
            self.ranges.release(first, now);
            return Err(error);
        }
        report.written += backends.len();
        Ok(Range {
            first,
            count: endpoints.selectable.len() as u32,
            keep: endpoints.keep.len() as u32,
        })
    }
}

/// What stands for undefined ports stands for every protocol (S77).
fn key_of<A: Address>(name: &Name, frontend: &FrontendPlan<A>) -> FrontendKey<A> {
    let protocol = match frontend.flags & FRONTEND_UNDEFINED {
        0 => name.protocol.number(),
        _ => 0,
    };
    FrontendKey::new(frontend.addr, frontend.port, protocol)
}

fn show<A: Address>(key: &FrontendKey<A>) -> String {
    format!("frontend {} port {} protocol {}", key.addr, key.port, key.protocol)
}

/// Slots of a range; `None` if it has none, or more than any array.
fn length(range: Range) -> Option<u32> {
    range.count.checked_add(range.keep).filter(|length| *length > 0)
}

fn retain(ranges: &mut Ranges, frontend: &Frontend) {
    for range in [frontend.cluster, frontend.local] {
        if length(range).is_some() {
            ranges.retain(range.first);
        }
    }
}

fn release(ranges: &mut Ranges, range: Range, now: Duration) {
    if length(range).is_some() {
        ranges.release(range.first, now);
    }
}

fn release_both(ranges: &mut Ranges, frontend: &Frontend, now: Duration) {
    release(ranges, frontend.cluster, now);
    release(ranges, frontend.local, now);
}
