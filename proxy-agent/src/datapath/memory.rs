//! Tables in memory, for tests: they fail on demand at any write, and they refuse to overwrite a slot that a frontend points to.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::io;
use std::rc::Rc;

use proxy_common::addr::{Addr4, Addr6, Address};
use proxy_common::affinity::AffinityKey;
use proxy_common::backend::Backend;
use proxy_common::frontend::{FRONTEND_SOURCE_RANGES, Frontend, FrontendKey, Range};
use proxy_common::link::{Link, NodeAddr};
use proxy_common::names;
use proxy_common::rewrite::{Rewrite, RewriteKey};
use proxy_common::service::ServiceInfo;
use proxy_common::settings::Settings;
use proxy_common::source_range::SourceRangeKey;

use super::error::TableError;
use super::ledger::RewriteCounts;
use super::sync::name_of;
use super::sys::Cursor;
use super::tables::{FamilyTables, HasFamily, RewriteEntry, Tables};

/// Counts writes, and lets one of them, or all, fail.
#[derive(Clone, Default)]
pub(super) struct Writes {
    done: Rc<Cell<usize>>,
    fail_at: Rc<Cell<Option<usize>>>,
}

impl Writes {
    pub(super) fn done(&self) -> usize {
        self.done.get()
    }

    /// The write with this number fails, counted from the first one ever.
    pub(super) fn fail_at(&self, number: Option<usize>) {
        self.fail_at.set(number);
    }

    fn next(&self, map: &'static str) -> Result<(), TableError> {
        let number = self.done.get();
        self.done.set(number + 1);
        if self.fail_at.get() == Some(number) {
            return Err(TableError::Call {
                map,
                source: io::Error::from_raw_os_error(libc::ENOMEM),
            });
        }
        Ok(())
    }
}

pub(super) struct MemoryFamily<A> {
    pub(super) frontends: BTreeMap<FrontendKey<A>, Frontend>,
    pub(super) backends: Vec<Backend<A>>,
    pub(super) rewrites: BTreeMap<RewriteKey<A>, Rewrite<A>>,
    pub(super) counts: RewriteCounts,
    pub(super) source_ranges: BTreeSet<(u32, A, u32)>,
    pub(super) affinity: BTreeSet<AffinityKey<A>>,
    pub(super) node_addrs: BTreeMap<A, NodeAddr>,
    pub(super) settings: Settings<A>,
    pub(super) cluster_ips: BTreeMap<u32, FrontendKey<A>>,
    writes: Writes,
}

impl<A: Address> MemoryFamily<A> {
    fn new(slots: usize, writes: Writes) -> Self {
        Self {
            frontends: BTreeMap::new(),
            backends: vec![bytemuck::Zeroable::zeroed(); slots],
            rewrites: BTreeMap::new(),
            counts: RewriteCounts::default(),
            source_ranges: BTreeSet::new(),
            affinity: BTreeSet::new(),
            node_addrs: BTreeMap::new(),
            settings: bytemuck::Zeroable::zeroed(),
            cluster_ips: BTreeMap::new(),
            writes,
        }
    }

    pub(super) fn slots(&self, range: Range) -> (Vec<Backend<A>>, Vec<Backend<A>>) {
        let first = range.first as usize;
        let middle = first + range.count as usize;
        (
            self.backends[first..middle].to_vec(),
            self.backends[middle..middle + range.keep as usize].to_vec(),
        )
    }
}

pub(super) struct MemoryTables {
    pub(super) v4: MemoryFamily<Addr4>,
    pub(super) v6: MemoryFamily<Addr6>,
    pub(super) services: BTreeMap<u32, ServiceInfo>,
    pub(super) links: BTreeMap<u32, Link>,
    /// Slots for counters, and those that were cleared.
    pub(super) counter_slots: u32,
    pub(super) cleared: Vec<u32>,
    pub(super) writes: Writes,
}

impl MemoryTables {
    pub(super) fn new(slots: usize) -> Self {
        let writes = Writes::default();
        Self {
            v4: MemoryFamily::new(slots, writes.clone()),
            v6: MemoryFamily::new(slots, writes.clone()),
            services: BTreeMap::new(),
            links: BTreeMap::new(),
            counter_slots: u32::MAX,
            cleared: Vec::new(),
            writes,
        }
    }

    /// The state as text: services by name, so that it does not depend on ids or slots.
    pub(super) fn dump(&self) -> String {
        let mut text = String::new();
        self.dump_family(&self.v4, &mut text);
        self.dump_family(&self.v6, &mut text);
        text
    }

    fn dump_family<A: Address>(&self, family: &MemoryFamily<A>, text: &mut String) {
        let list = |backends: Vec<Backend<A>>| {
            let shown: Vec<String> = backends.iter().map(|b| format!("{}:{}", b.addr, b.port)).collect();
            shown.join(",")
        };
        for (service, addr, prefix_len) in &family.source_ranges {
            let service = self.services.get(service).and_then(name_of);
            let service = service.map_or_else(|| "?".to_owned(), |name| name.to_string());
            let _infallible = writeln!(text, "{service} may be dialled from {addr}/{}", prefix_len - 32);
        }
        for (key, frontend) in &family.frontends {
            let service = self.services.get(&frontend.service).and_then(name_of);
            let service = service.map_or_else(|| "?".to_owned(), |name| name.to_string());
            let (cluster, keep) = family.slots(frontend.cluster);
            let (local, local_keep) = family.slots(frontend.local);
            let (cluster, keep, local, local_keep) = (list(cluster), list(keep), list(local), list(local_keep));
            let _infallible = writeln!(
                text,
                "{} {} {} -> {service} flags={} cluster=[{cluster}] keep=[{keep}] local=[{local}] keep=[{local_keep}]",
                key.addr, key.port, key.protocol, frontend.flags
            );
        }
    }
}

impl HasFamily<Addr4> for MemoryTables {
    type Family = MemoryFamily<Addr4>;
    fn family(&self) -> &Self::Family {
        &self.v4
    }
    fn family_mut(&mut self) -> &mut Self::Family {
        &mut self.v4
    }
}

impl HasFamily<Addr6> for MemoryTables {
    type Family = MemoryFamily<Addr6>;
    fn family(&self) -> &Self::Family {
        &self.v6
    }
    fn family_mut(&mut self) -> &mut Self::Family {
        &mut self.v6
    }
}

impl<A: Address> FamilyTables<A> for MemoryTables
where
    Self: HasFamily<A, Family = MemoryFamily<A>>,
{
    fn frontends(&self) -> Result<Vec<(FrontendKey<A>, Frontend)>, TableError> {
        Ok(self.family().frontends.iter().map(|(k, v)| (*k, *v)).collect())
    }

    fn set_frontend(&mut self, key: &FrontendKey<A>, value: &Frontend) -> Result<(), TableError> {
        self.writes.next("FRONTENDS")?;
        assert!(
            self.services.contains_key(&value.service),
            "a frontend before its service's name"
        );
        assert!(
            value.flags & FRONTEND_SOURCE_RANGES == 0
                || self
                    .family()
                    .source_ranges
                    .iter()
                    .any(|(service, ..)| *service == value.service),
            "a frontend before its source ranges"
        );
        self.family_mut().frontends.insert(*key, *value);
        Ok(())
    }

    fn remove_frontend(&mut self, key: &FrontendKey<A>) -> Result<(), TableError> {
        self.writes.next("FRONTENDS")?;
        self.family_mut().frontends.remove(key);
        Ok(())
    }

    fn backend_slots(&self) -> u32 {
        self.family().backends.len() as u32
    }

    fn backends(&self, first: u32, count: u32) -> Result<Vec<Backend<A>>, TableError> {
        let slots = self.family().backends.get(first as usize..(first + count) as usize);
        slots.map(<[_]>::to_vec).ok_or(TableError::OutOfBounds {
            map: "BACKENDS",
            first,
            count,
        })
    }

    fn set_backends(&mut self, first: u32, backends: &[Backend<A>]) -> Result<(), TableError> {
        self.family().writes.next(names::for_family::<A>(names::BACKENDS))?;
        let end = first + backends.len() as u32;
        let family = self.family_mut();
        for frontend in family.frontends.values() {
            for range in [frontend.cluster, frontend.local] {
                let range_end = range.first + range.count + range.keep;
                assert!(
                    range.first == range_end || end <= range.first || range_end <= first,
                    "a published range is written again: {first}..{end} over {range:?}"
                );
            }
        }
        family.backends[first as usize..end as usize].copy_from_slice(backends);
        Ok(())
    }

    fn scan_rewrites(&self, _cursor: &mut Cursor, entries: &mut Vec<RewriteEntry<A>>) -> Result<bool, TableError> {
        entries.extend(self.family().rewrites.iter().map(|(k, v)| (*k, *v)));
        Ok(true)
    }

    fn rewrite(&self, key: &RewriteKey<A>) -> Result<Option<Rewrite<A>>, TableError> {
        Ok(self.family().rewrites.get(key).copied())
    }

    fn remove_rewrite(&mut self, key: &RewriteKey<A>) -> Result<bool, TableError> {
        let family = self.family_mut();
        let is_removed = family.rewrites.remove(key).is_some();
        family.counts.removed_by_agent += u64::from(is_removed);
        Ok(is_removed)
    }

    fn rewrite_counts(&self) -> Result<RewriteCounts, TableError> {
        Ok(self.family().counts)
    }

    fn source_ranges(&self) -> Result<Vec<SourceRangeKey<A>>, TableError> {
        let rows = self.family().source_ranges.iter();
        Ok(rows
            .map(|(service, addr, prefix_len)| SourceRangeKey {
                prefix_len: *prefix_len,
                service: service.to_ne_bytes(),
                addr: *addr,
            })
            .collect())
    }

    fn set_source_range(&mut self, key: &SourceRangeKey<A>) -> Result<(), TableError> {
        self.writes.next("SRC_RANGES")?;
        let row = (u32::from_ne_bytes(key.service), key.addr, key.prefix_len);
        self.family_mut().source_ranges.insert(row);
        Ok(())
    }

    fn remove_source_range(&mut self, key: &SourceRangeKey<A>) -> Result<(), TableError> {
        self.writes.next("SRC_RANGES")?;
        let row = (u32::from_ne_bytes(key.service), key.addr, key.prefix_len);
        self.family_mut().source_ranges.remove(&row);
        Ok(())
    }

    fn scan_affinity(&self, _cursor: &mut Cursor, keys: &mut Vec<AffinityKey<A>>) -> Result<bool, TableError> {
        keys.extend(self.family().affinity.iter().copied());
        Ok(true)
    }

    fn remove_affinity(&mut self, key: &AffinityKey<A>) -> Result<(), TableError> {
        self.family_mut().affinity.remove(key);
        Ok(())
    }

    fn node_addrs(&self) -> Result<Vec<(A, NodeAddr)>, TableError> {
        Ok(self.family().node_addrs.iter().map(|(k, v)| (*k, *v)).collect())
    }

    fn set_node_addr(&mut self, addr: &A, value: &NodeAddr) -> Result<(), TableError> {
        self.family_mut().node_addrs.insert(*addr, *value);
        Ok(())
    }

    fn remove_node_addr(&mut self, addr: &A) -> Result<(), TableError> {
        self.family_mut().node_addrs.remove(addr);
        Ok(())
    }

    fn cluster_ips(&self) -> Result<Vec<(u32, FrontendKey<A>)>, TableError> {
        Ok(self.family().cluster_ips.iter().map(|(id, key)| (*id, *key)).collect())
    }

    fn set_cluster_ip(&mut self, service: u32, key: &FrontendKey<A>) -> Result<(), TableError> {
        self.writes.next("CLUSTER_IPS")?;
        self.family_mut().cluster_ips.insert(service, *key);
        Ok(())
    }

    fn remove_cluster_ip(&mut self, service: u32) -> Result<(), TableError> {
        self.writes.next("CLUSTER_IPS")?;
        self.family_mut().cluster_ips.remove(&service);
        Ok(())
    }

    fn settings(&self) -> Result<Settings<A>, TableError> {
        Ok(self.family().settings)
    }

    fn set_settings(&mut self, value: &Settings<A>) -> Result<(), TableError> {
        self.writes.next("SETTINGS")?;
        self.family_mut().settings = *value;
        Ok(())
    }
}

impl Tables for MemoryTables {
    fn services(&self) -> Result<Vec<(u32, ServiceInfo)>, TableError> {
        Ok(self.services.iter().map(|(k, v)| (*k, *v)).collect())
    }

    fn set_service(&mut self, id: u32, value: &ServiceInfo) -> Result<(), TableError> {
        self.writes.next("SERVICES")?;
        self.services.insert(id, *value);
        Ok(())
    }

    fn counter_slots(&self) -> u32 {
        self.counter_slots
    }

    fn clear_counters(&mut self, id: u32) -> Result<(), TableError> {
        self.cleared.push(id);
        Ok(())
    }

    fn remove_service(&mut self, id: u32) -> Result<(), TableError> {
        self.writes.next("SERVICES")?;
        self.services.remove(&id);
        Ok(())
    }

    fn links(&self) -> Result<Vec<(u32, Link)>, TableError> {
        Ok(self.links.iter().map(|(k, v)| (*k, *v)).collect())
    }

    fn set_link(&mut self, ifindex: u32, value: &Link) -> Result<(), TableError> {
        self.links.insert(ifindex, *value);
        Ok(())
    }

    fn remove_link(&mut self, ifindex: u32) -> Result<(), TableError> {
        self.links.remove(&ifindex);
        Ok(())
    }
}
