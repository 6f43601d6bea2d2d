//! One family's map from service id to cluster IP, which the socket programs ask for connected UDP that dials the node itself. An
//! entry is written before the frontend of the cluster IP and removed after it. Part of `FamilySync`.

use std::collections::HashMap;

use proxy_common::addr::Address;
use proxy_common::frontend::{FRONTEND_CLUSTER_IP, FRONTEND_UNDEFINED, Frontend, FrontendKey};

use super::SyncReport;
use crate::datapath::error::TableError;
use crate::datapath::tables::FamilyTables;

/// What the kernel holds.
pub(super) struct ClusterIps<A> {
    held: HashMap<u32, FrontendKey<A>>,
}

impl<A: Address> ClusterIps<A> {
    /// Takes over what the kernel holds.
    pub(super) fn adopt(tables: &impl FamilyTables<A>) -> Result<Self, TableError> {
        Ok(Self {
            held: tables.cluster_ips()?.into_iter().collect(),
        })
    }

    /// The frontend is about to be written, or is there already.
    pub(super) fn add(
        &mut self,
        tables: &mut impl FamilyTables<A>,
        key: &FrontendKey<A>,
        frontend: &Frontend,
    ) -> Result<(), TableError> {
        if !is_cluster_ip(frontend) || self.held.get(&frontend.service) == Some(key) {
            return Ok(());
        }
        tables.set_cluster_ip(frontend.service, key)?;
        self.held.insert(frontend.service, *key);
        Ok(())
    }

    /// The frontend was removed, or belongs to another service now. What cannot be removed misleads nobody: it is asked for by the
    /// id of a service that has no frontend any more.
    pub(super) fn remove(&mut self, tables: &mut impl FamilyTables<A>, key: &FrontendKey<A>, frontend: &Frontend) {
        if is_cluster_ip(frontend)
            && self.held.get(&frontend.service) == Some(key)
            && tables.remove_cluster_ip(frontend.service).is_ok()
        {
            self.held.remove(&frontend.service);
        }
    }

    /// Writes again what others changed or removed.
    pub(super) fn audit(&self, tables: &mut impl FamilyTables<A>, report: &mut SyncReport) -> Result<(), TableError> {
        let found: HashMap<_, _> = tables.cluster_ips()?.into_iter().collect();
        for (id, key) in &self.held {
            if found.get(id) != Some(key) {
                tables.set_cluster_ip(*id, key)?;
                report.restored(format!("cluster IP {} of service id {id}", key.addr));
            }
        }
        Ok(())
    }
}

fn is_cluster_ip(frontend: &Frontend) -> bool {
    frontend.flags & (FRONTEND_CLUSTER_IP | FRONTEND_UNDEFINED) == FRONTEND_CLUSTER_IP
}
