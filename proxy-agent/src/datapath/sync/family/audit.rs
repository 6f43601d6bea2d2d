//! Compares what the kernel holds with what was written, and writes again what others changed or removed (S163, S164). Part of
//! `FamilySync`, called now and then.
//!
//! The mirror is right: only this agent writes these maps. So nothing is planned or counted anew, the same values are written.

use std::collections::HashMap;

use proxy_common::addr::Address;
use proxy_common::backend::Backend;

use super::{FamilySync, Published, length, show};
use crate::datapath::error::TableError;
use crate::datapath::sync::SyncReport;
use crate::datapath::tables::FamilyTables;

impl<A: Address> FamilySync<A> {
    /// Backends first: a frontend that is written again must find them.
    pub(in crate::datapath::sync) fn audit(
        &mut self,
        tables: &mut impl FamilyTables<A>,
        report: &mut SyncReport,
    ) -> Result<(), TableError> {
        for (name, service) in &self.services {
            for published in [&service.cluster, &service.local].into_iter().flatten() {
                if restore(published, tables)? {
                    report.restored(format!("backends of {name} (IPv{})", A::FAMILY));
                }
            }
        }
        self.sources.audit(tables, report)?;
        self.cluster_ips.audit(tables, report)?;
        let mut found: HashMap<_, _> = tables.frontends()?.into_iter().collect();
        for (key, written) in &self.frontends {
            if found.remove(key) != Some(*written) {
                tables.set_frontend(key, written)?;
                report.restored(show(key));
            }
        }
        for key in found.keys() {
            tables.remove_frontend(key)?;
            report.restored(format!("{}, which nobody asked for", show(key)));
        }
        Ok(())
    }
}

/// Writes a range again if its slots hold something else; true if so.
fn restore<A: Address>(published: &Published<A>, tables: &mut impl FamilyTables<A>) -> Result<bool, TableError> {
    let Some(length) = length(published.range) else {
        return Ok(false);
    };
    let endpoints = &published.endpoints;
    let wanted: Vec<Backend<A>> = endpoints.selectable.iter().chain(&endpoints.keep).copied().collect();
    let first = published.range.first;
    if tables.backends(first, length)? == wanted {
        return Ok(false);
    }
    tables.set_backends(first, &wanted)?;
    Ok(true)
}
