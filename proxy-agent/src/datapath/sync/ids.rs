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

    /// Every service port that has a number.
    pub(super) fn all(&self) -> impl Iterator<Item = (u32, &ServicePortName)> {
        self.by_name.iter().map(|(name, id)| (*id, &**name))
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
        let id = self.next_free(tables.counter_slots());
        // Before a program can count for it.
        tables.clear_counters(id).map_err(|error| error.to_string())?;
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
    /// As long as there are any, numbers that have a slot for counters.
    fn next_free(&self, counter_slots: u32) -> u32 {
        // Slot 0 is nobody's. If fewer numbers than that are taken, one of them is free, for others are beyond at best.
        if self.written.len() < counter_slots.saturating_sub(1) as usize {
            let behind = self.last.saturating_add(1)..counter_slots;
            if let Some(id) = behind.chain(1..counter_slots).find(|id| !self.written.contains_key(id)) {
                return id;
            }
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::memory::MemoryTables;

    #[test]
    fn numbers_stay_where_counters_are() {
        let mut tables = MemoryTables::new(0);
        tables.counter_slots = 4;
        let mut ids = Ids::default();
        let name = |text: &str| {
            Name::new(ServicePortName {
                namespace: "ns".to_owned(),
                name: text.to_owned(),
                port: String::new(),
                protocol: Protocol::Tcp,
            })
        };
        let mut ensure = |ids: &mut Ids, text: &str| {
            ids.ensure(&name(text), &mut tables).unwrap();
            ids.get(&name(text)).unwrap()
        };
        assert_eq!(["a", "b", "c", "d"].map(|text| ensure(&mut ids, text)), [1, 2, 3, 4]);
        for gone in ["b", "d"] {
            ids.written.remove(&ids.by_name.remove(&name(gone)).unwrap());
        }
        assert_eq!(ensure(&mut ids, "e"), 2, "the one below that is free");
        assert_eq!(ensure(&mut ids, "f"), 4, "none is: it is served, but not counted");
        assert_eq!(
            tables.cleared,
            [1, 2, 3, 4, 2, 4],
            "before a program counts for the new one"
        );
    }
}
