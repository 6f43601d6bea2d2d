//! Tables that read from the kernel and keep what is written to themselves: the agent's own code runs on them, and what it would
//! have written is what differs.

use std::collections::BTreeMap;

use proxy_common::addr::{Addr4, Addr6, Address};
use proxy_common::affinity::AffinityKey;
use proxy_common::backend::Backend;
use proxy_common::frontend::{Frontend, FrontendKey, Range};
use proxy_common::link::{Link, NodeAddr};
use proxy_common::rewrite::{Rewrite, RewriteKey};
use proxy_common::service::ServiceInfo;
use proxy_common::settings::Settings;
use proxy_common::source_range::SourceRangeKey;

use super::super::error::TableError;
use super::super::ledger::RewriteCounts;
use super::super::sys::Cursor;
use super::super::tables::{BpfTables, FamilyTables, HasFamily, RewriteEntry, Tables};

/// What would have been written: the last value of each row, `None` for one that would be removed.
pub(super) struct DryFamily<A> {
    pub(super) frontends: BTreeMap<FrontendKey<A>, Option<Frontend>>,
    /// With whether it is wanted.
    pub(super) source_ranges: Vec<(SourceRangeKey<A>, bool)>,
    pub(super) node_addrs: BTreeMap<A, Option<NodeAddr>>,
    pub(super) settings: Option<Settings<A>>,
    slots: BTreeMap<u32, Backend<A>>,
}

impl<A: Address> DryFamily<A> {
    fn new() -> Self {
        Self {
            frontends: BTreeMap::new(),
            source_ranges: Vec::new(),
            node_addrs: BTreeMap::new(),
            settings: None,
            slots: BTreeMap::new(),
        }
    }
}

/// See the module.
pub(super) struct DryTables {
    real: BpfTables,
    v4: DryFamily<Addr4>,
    v6: DryFamily<Addr6>,
    pub(super) services: BTreeMap<u32, ServiceInfo>,
    pub(super) links: BTreeMap<u32, Option<Link>>,
}

impl DryTables {
    pub(super) fn new(real: BpfTables) -> Self {
        Self {
            real,
            v4: DryFamily::new(),
            v6: DryFamily::new(),
            services: BTreeMap::new(),
            links: BTreeMap::new(),
        }
    }

    /// The endpoints of a range: as the kernel has them, or as they would have been written.
    pub(super) fn endpoints<A: Address>(&self, range: Range, written: bool) -> Result<[Vec<Backend<A>>; 2], TableError>
    where
        Self: HasFamily<A, Family = DryFamily<A>>,
        BpfTables: FamilyTables<A>,
    {
        let mut block = FamilyTables::<A>::backends(&self.real, range.first, range.count.saturating_add(range.keep))?;
        if written {
            for (slot, backend) in (range.first..).zip(&mut block) {
                *backend = self.family().slots.get(&slot).copied().unwrap_or(*backend);
            }
        }
        let keep = block.split_off((range.count as usize).min(block.len()));
        Ok([block, keep])
    }
}

impl HasFamily<Addr4> for DryTables {
    type Family = DryFamily<Addr4>;
    fn family(&self) -> &Self::Family {
        &self.v4
    }
    fn family_mut(&mut self) -> &mut Self::Family {
        &mut self.v4
    }
}

impl HasFamily<Addr6> for DryTables {
    type Family = DryFamily<Addr6>;
    fn family(&self) -> &Self::Family {
        &self.v6
    }
    fn family_mut(&mut self) -> &mut Self::Family {
        &mut self.v6
    }
}

impl<A: Address> FamilyTables<A> for DryTables
where
    Self: HasFamily<A, Family = DryFamily<A>>,
    BpfTables: FamilyTables<A>,
{
    fn frontends(&self) -> Result<Vec<(FrontendKey<A>, Frontend)>, TableError> {
        self.real.frontends()
    }

    fn set_frontend(&mut self, key: &FrontendKey<A>, value: &Frontend) -> Result<(), TableError> {
        self.family_mut().frontends.insert(*key, Some(*value));
        Ok(())
    }

    fn remove_frontend(&mut self, key: &FrontendKey<A>) -> Result<(), TableError> {
        self.family_mut().frontends.insert(*key, None);
        Ok(())
    }

    fn backend_slots(&self) -> u32 {
        FamilyTables::<A>::backend_slots(&self.real)
    }

    fn backends(&self, first: u32, count: u32) -> Result<Vec<Backend<A>>, TableError> {
        self.real.backends(first, count)
    }

    fn set_backends(&mut self, first: u32, backends: &[Backend<A>]) -> Result<(), TableError> {
        self.family_mut().slots.extend((first..).zip(backends.iter().copied()));
        Ok(())
    }

    fn scan_rewrites(&self, cursor: &mut Cursor, entries: &mut Vec<RewriteEntry<A>>) -> Result<bool, TableError> {
        self.real.scan_rewrites(cursor, entries)
    }

    fn rewrite(&self, key: &RewriteKey<A>) -> Result<Option<Rewrite<A>>, TableError> {
        self.real.rewrite(key)
    }

    fn remove_rewrite(&mut self, _: &RewriteKey<A>) -> Result<bool, TableError> {
        Ok(false)
    }

    fn rewrite_counts(&self) -> Result<RewriteCounts, TableError> {
        Ok(RewriteCounts::default())
    }

    fn source_ranges(&self) -> Result<Vec<SourceRangeKey<A>>, TableError> {
        self.real.source_ranges()
    }

    fn cluster_ips(&self) -> Result<Vec<(u32, FrontendKey<A>)>, TableError> {
        self.real.cluster_ips()
    }

    fn set_cluster_ip(&mut self, _: u32, _: &FrontendKey<A>) -> Result<(), TableError> {
        Ok(())
    }

    fn remove_cluster_ip(&mut self, _: u32) -> Result<(), TableError> {
        Ok(())
    }

    fn set_source_range(&mut self, key: &SourceRangeKey<A>) -> Result<(), TableError> {
        self.family_mut().source_ranges.push((*key, true));
        Ok(())
    }

    fn remove_source_range(&mut self, key: &SourceRangeKey<A>) -> Result<(), TableError> {
        self.family_mut().source_ranges.push((*key, false));
        Ok(())
    }

    fn scan_affinity(&self, cursor: &mut Cursor, keys: &mut Vec<AffinityKey<A>>) -> Result<bool, TableError> {
        self.real.scan_affinity(cursor, keys)
    }

    fn remove_affinity(&mut self, _: &AffinityKey<A>) -> Result<(), TableError> {
        Ok(())
    }

    fn node_addrs(&self) -> Result<Vec<(A, NodeAddr)>, TableError> {
        self.real.node_addrs()
    }

    fn set_node_addr(&mut self, addr: &A, value: &NodeAddr) -> Result<(), TableError> {
        self.family_mut().node_addrs.insert(*addr, Some(*value));
        Ok(())
    }

    fn remove_node_addr(&mut self, addr: &A) -> Result<(), TableError> {
        self.family_mut().node_addrs.insert(*addr, None);
        Ok(())
    }

    fn settings(&self) -> Result<Settings<A>, TableError> {
        self.real.settings()
    }

    fn set_settings(&mut self, value: &Settings<A>) -> Result<(), TableError> {
        self.family_mut().settings = Some(*value);
        Ok(())
    }
}

impl Tables for DryTables {
    fn counter_slots(&self) -> u32 {
        self.real.counter_slots()
    }

    fn clear_counters(&mut self, _: u32) -> Result<(), TableError> {
        Ok(())
    }

    fn services(&self) -> Result<Vec<(u32, ServiceInfo)>, TableError> {
        self.real.services()
    }

    fn set_service(&mut self, id: u32, value: &ServiceInfo) -> Result<(), TableError> {
        self.services.insert(id, *value);
        Ok(())
    }

    fn remove_service(&mut self, _: u32) -> Result<(), TableError> {
        Ok(())
    }

    fn links(&self) -> Result<Vec<(u32, Link)>, TableError> {
        self.real.links()
    }

    fn set_link(&mut self, ifindex: u32, value: &Link) -> Result<(), TableError> {
        self.links.insert(ifindex, Some(*value));
        Ok(())
    }

    fn remove_link(&mut self, ifindex: u32) -> Result<(), TableError> {
        self.links.insert(ifindex, None);
        Ok(())
    }
}
