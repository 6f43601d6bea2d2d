//! Numbers of service ports: stable by name, adopted from `SERVICES` at start, handed out again only after a grace period.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use proxy_common::addr::Protocol;
use proxy_common::service::{ServiceInfo, decode_name, encode_name};

use super::{Name, SyncReport};
use crate::datapath::error::TableError;
use crate::datapath::tables::Tables;
use crate::plan::ServicePortName;

/// Who has which number.
#[derive(Default)]
pub(super) struct Ids {
    by_name: HashMap<Name, u32>,
    /// Numbers in the kernel.
    written: HashMap<u32, ServiceInfo>,
    /// Numbers whose service is gone, and since when.
    retired: HashMap<u32, Duration>,
    last: u32,
}

impl Ids {
    /// Takes over what a former agent wrote. A name that holds several numbers, or a number that means nothing, is not adopted:
    /// which of them the programs' entries mean cannot be told.
    pub(super) fn adopt(found: Vec<(u32, ServiceInfo)>) -> Self {
        let mut holders: HashMap<ServicePortName, Vec<u32>> = HashMap::new();
        for (id, info) in &found {
            if let (Some(name), true) = (name_of(info), *id != 0) {
                holders.entry(name).or_default().push(*id);
            }
        }
        let by_name = holders
            .into_iter()
            .filter_map(|(name, ids)| match ids.as_slice() {
                [id] => Some((Name::new(name), *id)),
                _ => {
                    tracing::warn!(service = %name, ?ids, "several ids for one service port: none is adopted");
                    None
                }
            })
            .collect();
        Self {
            by_name,
            last: found.iter().map(|(id, _)| *id).max().unwrap_or_default(),
            written: found.into_iter().collect(),
            retired: HashMap::new(),
        }
    }

    /// The number of a service port, if it has one in the kernel.
    pub(super) fn get(&self, name: &Name) -> Option<u32> {
        self.by_name.get(name).copied()
    }

    /// Numbers in the kernel.
    pub(super) fn len(&self) -> usize {
        self.written.len()
    }

    /// The service port is wanted: gives it a number and writes its name; true if something was written.
    pub(super) fn ensure(&mut self, name: &Name, tables: &mut impl Tables) -> Result<bool, String> {
        if let Some(id) = self.by_name.get(name) {
            self.retired.remove(id);
            return Ok(false);
        }
        let info = info_of(name).ok_or("the name is longer than 64 bytes")?;
        let id = self.next_free();
        tables.set_service(id, &info).map_err(|error| error.to_string())?;
        self.last = id;
        self.written.insert(id, info);
        self.by_name.insert(name.clone(), id);
        Ok(true)
    }

    /// Writes again the names that others changed or removed. What others added is left: a number means nothing by itself.
    pub(super) fn audit(&self, tables: &mut impl Tables, report: &mut SyncReport) -> Result<(), TableError> {
        let found: HashMap<u32, ServiceInfo> = tables.services()?.into_iter().collect();
        for (id, info) in &self.written {
            if found.get(id) != Some(info) {
                tables.set_service(*id, info)?;
                report.restored(format!("name of service id {id}"));
            }
        }
        Ok(())
    }

    /// The service port is gone.
    pub(super) fn retire(&mut self, name: &Name, now: Duration) {
        if let Some(id) = self.by_name.get(name) {
            self.retired.entry(*id).or_insert(now);
        }
    }

    /// Everything that no service port in `wanted` holds is gone.
    pub(super) fn retire_others(&mut self, wanted: impl Fn(&Name) -> bool, now: Duration) {
        let kept: HashSet<u32> = self
            .by_name
            .iter()
            .filter(|(name, _)| wanted(name))
            .map(|(_, id)| *id)
            .collect();
        for id in self.written.keys().filter(|id| !kept.contains(id)) {
            self.retired.entry(*id).or_insert(now);
        }
    }

    /// Is some number waiting to be freed?
    pub(super) fn has_retired(&self) -> bool {
        !self.retired.is_empty()
    }

    /// Frees the numbers that have been unused since `before` and that no frontend carries any more.
    pub(super) fn free(
        &mut self,
        before: Duration,
        in_use: impl Fn(u32) -> bool,
        tables: &mut impl Tables,
    ) -> Vec<Result<(), (u32, String)>> {
        let due: Vec<u32> = self
            .retired
            .iter()
            .filter(|(id, since)| **since <= before && !in_use(**id))
            .map(|(id, _)| *id)
            .collect();
        due.into_iter()
            .map(|id| {
                tables.remove_service(id).map_err(|error| (id, error.to_string()))?;
                self.retired.remove(&id);
                if let Some(name) = self.written.remove(&id).as_ref().and_then(name_of)
                    && self.by_name.get(&name) == Some(&id)
                {
                    self.by_name.remove(&name);
                }
                Ok(())
            })
            .collect()
    }

    /// The next number after the last one given out, so that a freed number rests as long as possible.
    fn next_free(&self) -> u32 {
        let mut id = self.last;
        loop {
            id = id.wrapping_add(1).max(1);
            if !self.written.contains_key(&id) {
                return id;
            }
        }
    }
}

fn info_of(name: &ServicePortName) -> Option<ServiceInfo> {
    Some(ServiceInfo {
        namespace: encode_name(&name.namespace)?,
        name: encode_name(&name.name)?,
        port_name: encode_name(&name.port)?,
        protocol: name.protocol.number(),
        pad: [0; 3],
    })
}

/// The service port that a value of `SERVICES` names.
pub(crate) fn name_of(info: &ServiceInfo) -> Option<ServicePortName> {
    Some(ServicePortName {
        namespace: decode_name(&info.namespace).to_owned(),
        name: decode_name(&info.name).to_owned(),
        port: decode_name(&info.port_name).to_owned(),
        protocol: Protocol::from_number(info.protocol)?,
    })
}
