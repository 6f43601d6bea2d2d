//! One family's source ranges (S101): rows are written before the frontends that refer to them and removed after, so that no client
//! that may connect is ever turned away. Part of `FamilySync`.

use std::collections::{BTreeMap, BTreeSet};

use proxy_common::addr::Address;
use proxy_common::source_range::SourceRangeKey;

use super::{Name, SyncReport};
use crate::datapath::error::TableError;
use crate::datapath::tables::FamilyTables;

/// A prefix: network address and length.
type Prefix<A> = (A, u8);

/// What the kernel holds, and what may differ from what is wanted.
pub(super) struct Sources<A> {
    /// Rows in the kernel by service id.
    held: BTreeMap<u32, BTreeSet<Prefix<A>>>,
    /// Services whose rows may have to be written or removed.
    pub(super) pending: BTreeSet<Name>,
    /// Ids of a former agent whose rows have not been looked at.
    pub(super) leftovers: BTreeSet<u32>,
}

impl<A: Address> Sources<A> {
    /// Takes over what the kernel holds.
    pub(super) fn adopt(tables: &impl FamilyTables<A>) -> Result<Self, TableError> {
        let mut held: BTreeMap<u32, BTreeSet<Prefix<A>>> = BTreeMap::new();
        for key in tables.source_ranges()? {
            let len = key.prefix_len.saturating_sub(32) as u8;
            held.entry(u32::from_ne_bytes(key.service))
                .or_default()
                .insert((key.addr, len));
        }
        Ok(Self {
            held,
            pending: BTreeSet::new(),
            leftovers: BTreeSet::new(),
        })
    }

    /// Ids that rows in the kernel carry.
    pub(super) fn ids(&self) -> impl Iterator<Item = u32> {
        self.held.keys().copied()
    }

    /// Rows in the kernel.
    pub(super) fn rows(&self) -> usize {
        self.held.values().map(BTreeSet::len).sum()
    }

    /// Everything a former agent left is looked at.
    pub(super) fn stage_leftovers(&mut self) {
        self.leftovers = self.held.keys().copied().collect();
    }

    /// Are all of these in the kernel?
    pub(super) fn holds(&self, id: u32, wanted: &[Prefix<A>]) -> bool {
        wanted.is_empty()
            || self
                .held
                .get(&id)
                .is_some_and(|held| wanted.iter().all(|range| held.contains(range)))
    }

    /// Writes what is missing; stops at the first failure.
    pub(super) fn write(
        &mut self,
        tables: &mut impl FamilyTables<A>,
        id: u32,
        wanted: &[Prefix<A>],
        report: &mut SyncReport,
    ) -> Result<(), TableError> {
        for (addr, len) in wanted {
            if self.held.get(&id).is_some_and(|held| held.contains(&(*addr, *len))) {
                continue;
            }
            tables.set_source_range(&SourceRangeKey::new(id, *addr, *len))?;
            self.held.entry(id).or_default().insert((*addr, *len));
            report.written += 1;
        }
        Ok(())
    }

    /// Writes again what others removed, removes what others added.
    pub(super) fn audit(
        &mut self,
        tables: &mut impl FamilyTables<A>,
        report: &mut SyncReport,
    ) -> Result<(), TableError> {
        let found = Self::adopt(tables)?.held;
        for (id, ranges) in &self.held {
            for (addr, len) in ranges {
                if !found.get(id).is_some_and(|found| found.contains(&(*addr, *len))) {
                    tables.set_source_range(&SourceRangeKey::new(*id, *addr, *len))?;
                    report.restored(format!("source range {addr}/{len} of service id {id}"));
                }
            }
        }
        for (id, ranges) in &found {
            for (addr, len) in ranges {
                if !self.holds(*id, &[(*addr, *len)]) {
                    tables.remove_source_range(&SourceRangeKey::new(*id, *addr, *len))?;
                    report.restored(format!(
                        "source range {addr}/{len} of service id {id}, which nobody asked for"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Is there anything that is not wanted?
    pub(super) fn has_stale(&self, id: u32, wanted: &[Prefix<A>]) -> bool {
        self.held.get(&id).is_some_and(|held| held.len() > wanted.len())
    }

    /// Removes what is not wanted; stops at the first failure.
    pub(super) fn remove_others(
        &mut self,
        tables: &mut impl FamilyTables<A>,
        id: u32,
        wanted: &[Prefix<A>],
        report: &mut SyncReport,
    ) -> Result<(), TableError> {
        let Some(held) = self.held.get_mut(&id) else {
            return Ok(());
        };
        let stale: Vec<_> = held.iter().filter(|range| !wanted.contains(range)).copied().collect();
        for (addr, len) in stale {
            tables.remove_source_range(&SourceRangeKey::new(id, addr, len))?;
            held.remove(&(addr, len));
            report.deleted += 1;
        }
        if held.is_empty() {
            self.held.remove(&id);
        }
        Ok(())
    }
}
