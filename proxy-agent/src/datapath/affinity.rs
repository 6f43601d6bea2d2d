//! Session affinity records of services that have it no more are removed (S136, S137): called by `Datapath` after frontends were
//! written, and once more after the grace period, because a program that read the old frontend may have written one meanwhile.

use std::collections::HashSet;

use proxy_common::addr::Address;

use super::error::TableError;
use super::sync::FamilySync;
use super::sys::Cursor;
use super::tables::FamilyTables;

/// Removes the records of services none of whose frontends has affinity; gives their number.
pub(super) fn sweep<A: Address>(tables: &mut impl FamilyTables<A>, sync: &FamilySync<A>) -> Result<usize, TableError> {
    let pinned: HashSet<u32> = sync.services_with_affinity().collect();
    let mut cursor = Cursor::default();
    let mut removed = 0;
    loop {
        let mut keys = Vec::new();
        let at_end = tables.scan_affinity(&mut cursor, &mut keys)?;
        for key in keys.iter().filter(|key| !pinned.contains(&key.service)) {
            tables.remove_affinity(key)?;
            removed += 1;
        }
        if at_end {
            return Ok(removed);
        }
    }
}
