//! The pinned maps as the agent reads and writes them. `Tables` is what `sync`, `gc` and `links` work with; its two versions are
//! the kernel's maps ([`BpfTables`]) and memory (`memory`, for tests). `inspect` opens the kernel's maps read-only.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use aya::maps::{MapData, MapInfo};
use bytemuck::Pod;
use proxy_common::addr::{Addr4, Addr6, Address};
use proxy_common::affinity::{Affinity, AffinityKey};
use proxy_common::backend::Backend;
use proxy_common::frontend::{Frontend, FrontendKey};
use proxy_common::link::{Link, NodeAddr};
use proxy_common::names;
use proxy_common::reason::{REWRITES_INSERTED, REWRITES_REMOVED};
use proxy_common::rewrite::{Rewrite, RewriteKey};
use proxy_common::service::ServiceInfo;
use proxy_common::settings::Settings;
use proxy_common::source_range::SourceRangeKey;

use super::counters::CounterTable;
use super::error::TableError;
use super::ledger::RewriteCounts;
use super::sys::{self, Cursor, MappedArray};

/// Entries read with one system call.
const CHUNK: u32 = 4_096;

/// One family's maps.
pub(crate) trait FamilyTables<A: Address> {
    /// Every frontend.
    fn frontends(&self) -> Result<Vec<(FrontendKey<A>, Frontend)>, TableError>;
    /// Writes a frontend as a whole.
    fn set_frontend(&mut self, key: &FrontendKey<A>, value: &Frontend) -> Result<(), TableError>;
    /// Removes a frontend; what is gone already is success.
    fn remove_frontend(&mut self, key: &FrontendKey<A>) -> Result<(), TableError>;
    /// Slots for backends.
    fn backend_slots(&self) -> u32;
    /// Backends of a block of slots.
    fn backends(&self, first: u32, count: u32) -> Result<Vec<Backend<A>>, TableError>;
    /// Writes a block of slots that no frontend points to.
    fn set_backends(&mut self, first: u32, backends: &[Backend<A>]) -> Result<(), TableError>;
    /// Appends the next entries of the rewrite table; true at its end.
    fn scan_rewrites(&self, cursor: &mut Cursor, entries: &mut Vec<RewriteEntry<A>>) -> Result<bool, TableError>;
    /// One entry of the rewrite table.
    fn rewrite(&self, key: &RewriteKey<A>) -> Result<Option<Rewrite<A>>, TableError>;
    /// Removes an entry of the rewrite table; false if it was gone.
    fn remove_rewrite(&mut self, key: &RewriteKey<A>) -> Result<bool, TableError>;
    /// What came into the rewrite table and was removed.
    fn rewrite_counts(&self) -> Result<RewriteCounts, TableError>;
    /// Every source range.
    fn source_ranges(&self) -> Result<Vec<SourceRangeKey<A>>, TableError>;
    /// Writes a source range.
    fn set_source_range(&mut self, key: &SourceRangeKey<A>) -> Result<(), TableError>;
    /// Removes a source range; what is gone already is success.
    fn remove_source_range(&mut self, key: &SourceRangeKey<A>) -> Result<(), TableError>;
    /// Appends the keys of the next affinity records; true at the end.
    fn scan_affinity(&self, cursor: &mut Cursor, keys: &mut Vec<AffinityKey<A>>) -> Result<bool, TableError>;
    /// Removes an affinity record; what is gone already is success.
    fn remove_affinity(&mut self, key: &AffinityKey<A>) -> Result<(), TableError>;
    /// Every local address.
    fn node_addrs(&self) -> Result<Vec<(A, NodeAddr)>, TableError>;
    /// Writes a local address.
    fn set_node_addr(&mut self, addr: &A, value: &NodeAddr) -> Result<(), TableError>;
    /// Removes a local address.
    fn remove_node_addr(&mut self, addr: &A) -> Result<(), TableError>;
    /// Every cluster IP by service id.
    fn cluster_ips(&self) -> Result<Vec<(u32, FrontendKey<A>)>, TableError>;
    /// Writes the cluster IP of a service id.
    fn set_cluster_ip(&mut self, service: u32, key: &FrontendKey<A>) -> Result<(), TableError>;
    /// Removes the cluster IP of a service id; what is gone already is success.
    fn remove_cluster_ip(&mut self, service: u32) -> Result<(), TableError>;
    /// The settings.
    fn settings(&self) -> Result<Settings<A>, TableError>;
    /// Writes the settings; programs may read them meanwhile.
    fn set_settings(&mut self, value: &Settings<A>) -> Result<(), TableError>;
}

/// A row of the rewrite table.
pub(crate) type RewriteEntry<A> = (RewriteKey<A>, Rewrite<A>);

/// Both families' maps and those without an address.
pub(crate) trait Tables: FamilyTables<Addr4> + FamilyTables<Addr6> {
    /// Every service id.
    fn services(&self) -> Result<Vec<(u32, ServiceInfo)>, TableError>;
    /// Names a service id.
    fn set_service(&mut self, id: u32, value: &ServiceInfo) -> Result<(), TableError>;
    /// Slots for counters: a service id below has one.
    fn counter_slots(&self) -> u32;
    /// Clears the counters of a service id.
    fn clear_counters(&mut self, id: u32) -> Result<(), TableError>;
    /// Frees a service id.
    fn remove_service(&mut self, id: u32) -> Result<(), TableError>;
    /// Every interface.
    fn links(&self) -> Result<Vec<(u32, Link)>, TableError>;
    /// Writes an interface.
    fn set_link(&mut self, ifindex: u32, value: &Link) -> Result<(), TableError>;
    /// Removes an interface.
    fn remove_link(&mut self, ifindex: u32) -> Result<(), TableError>;
}

/// A hash map of the kernel with known layout, or an array by index.
pub(crate) struct Hash<K, V> {
    map: MapData,
    name: &'static str,
    setting: &'static str,
    capacity: u32,
    layout: PhantomData<fn(K) -> V>,
}

/// Opens a pinned map and checks the sizes that we are going to rely on.
pub(super) fn open(dir: &Path, name: &'static str, key: usize, value: usize) -> Result<(MapData, u32), TableError> {
    let fail = |error: aya::maps::MapError| TableError::Call {
        map: name,
        source: io::Error::other(error),
    };
    let path = dir.join(name);
    let info = MapInfo::from_pin(&path).map_err(fail)?;
    if (info.key_size() as usize, info.value_size() as usize) != (key, value) {
        return Err(TableError::Call {
            map: name,
            source: io::Error::new(io::ErrorKind::InvalidData, "the pinned map has another layout"),
        });
    }
    Ok((MapData::from_pin(&path).map_err(fail)?, info.max_entries()))
}

impl<K: Pod, V: Pod> Hash<K, V> {
    pub(super) fn open(dir: &Path, name: &'static str, setting: &'static str) -> Result<Self, TableError> {
        let (map, capacity) = open(dir, name, size_of::<K>(), size_of::<V>())?;
        Ok(Self {
            map,
            name,
            setting,
            capacity,
            layout: PhantomData,
        })
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.map.fd().as_fd()
    }

    fn fail(&self, source: io::Error) -> TableError {
        match source.raw_os_error() {
            Some(libc::E2BIG | libc::ENOSPC) => TableError::Full {
                map: self.name,
                capacity: self.capacity,
                setting: self.setting,
            },
            _ => TableError::Call { map: self.name, source },
        }
    }

    pub(crate) fn capacity(&self) -> u32 {
        self.capacity
    }

    pub(crate) fn get(&self, key: &K) -> Result<Option<V>, TableError> {
        sys::lookup(self.fd(), key).map_err(|error| self.fail(error))
    }

    pub(super) fn set(&mut self, key: &K, value: &V) -> Result<(), TableError> {
        sys::update(self.fd(), key, value).map_err(|error| self.fail(error))
    }

    pub(super) fn remove(&mut self, key: &K) -> Result<bool, TableError> {
        sys::delete(self.fd(), key).map_err(|error| self.fail(error))
    }

    fn scan(&self, cursor: &mut Cursor, entries: &mut Vec<(K, V)>) -> Result<bool, TableError> {
        sys::lookup_batch(self.fd(), cursor, CHUNK.min(self.capacity), entries).map_err(|error| self.fail(error))
    }

    /// Every key, one system call each: for maps without batches.
    fn keys(&self) -> Result<Vec<K>, TableError> {
        let mut keys: Vec<K> = Vec::new();
        while let Some(key) = sys::next_key(self.fd(), keys.last()).map_err(|error| self.fail(error))? {
            keys.push(key);
        }
        Ok(keys)
    }

    pub(crate) fn all(&self) -> Result<Vec<(K, V)>, TableError> {
        let mut entries = Vec::new();
        let mut cursor = Cursor::default();
        while !self.scan(&mut cursor, &mut entries)? {}
        Ok(entries)
    }
}

/// One family's maps in the kernel.
pub(crate) struct BpfFamily<A> {
    pub(crate) frontends: Hash<FrontendKey<A>, Frontend>,
    pub(crate) backends: MappedArray<Backend<A>>,
    pub(crate) rewrites: Hash<RewriteKey<A>, Rewrite<A>>,
    /// Entries removed from it.
    rewrites_removed: u64,
    pub(crate) node_addrs: Hash<A, NodeAddr>,
    pub(crate) source_ranges: Hash<SourceRangeKey<A>, u32>,
    pub(crate) affinity: Hash<AffinityKey<A>, Affinity<A>>,
    cluster_ips: Hash<u32, FrontendKey<A>>,
    settings: Hash<u32, Settings<A>>,
}

impl<A: Address> BpfFamily<A> {
    fn open(dir: &Path, writable: bool) -> Result<Self, TableError> {
        let name = names::for_family::<A>(names::BACKENDS);
        let (map, slots) = open(dir, name, size_of::<u32>(), size_of::<Backend<A>>())?;
        let backends = MappedArray::new(map.fd().as_fd(), slots, writable)
            .map_err(|source| TableError::Call { map: name, source })?;
        Ok(Self {
            frontends: Hash::open(dir, names::for_family::<A>(names::FRONTENDS), super::FRONTENDS_SETTING)?,
            backends,
            rewrites: Hash::open(dir, names::for_family::<A>(names::REWRITES), super::REWRITES_SETTING)?,
            rewrites_removed: 0,
            node_addrs: Hash::open(dir, names::for_family::<A>(names::NODE_ADDRS), "fewer local addresses")?,
            source_ranges: Hash::open(
                dir,
                names::for_family::<A>(names::SRC_RANGES),
                "nothing, but use fewer loadBalancerSourceRanges",
            )?,
            affinity: Hash::open(dir, names::for_family::<A>(names::AFFINITY), "nothing: old records go")?,
            cluster_ips: Hash::open(dir, names::for_family::<A>(names::CLUSTER_IPS), super::SERVICES_SETTING)?,
            settings: Hash::open(dir, names::for_family::<A>(names::SETTINGS), "nothing: it has one slot")?,
        })
    }
}

/// The kernel's maps, opened from their pins.
pub(crate) struct BpfTables {
    pub(crate) v4: BpfFamily<Addr4>,
    pub(crate) v6: BpfFamily<Addr6>,
    pub(crate) services: Hash<u32, ServiceInfo>,
    pub(crate) links: Hash<u32, Link>,
    pub(crate) reasons: MapData,
    pub(crate) counters: CounterTable,
}

impl BpfTables {
    /// Opens every map below `dir`; with `writable == false` nothing can be changed through the backend arrays' memory.
    pub(crate) fn open(dir: &Path, writable: bool) -> Result<Self, TableError> {
        Ok(Self {
            v4: BpfFamily::open(dir, writable)?,
            v6: BpfFamily::open(dir, writable)?,
            services: Hash::open(dir, names::SERVICES, super::SERVICES_SETTING)?,
            links: Hash::open(dir, names::LINKS, "--exclude-interfaces")?,
            reasons: open(dir, names::REASONS, size_of::<u32>(), size_of::<u64>())?.0,
            counters: CounterTable::open(dir)?,
        })
    }
}

/// Which part of some tables belongs to a family; lets family code be written once over both kinds of tables.
pub(crate) trait HasFamily<A: Address> {
    /// The family's maps.
    type Family;
    /// The family's maps.
    fn family(&self) -> &Self::Family;
    /// The family's maps.
    fn family_mut(&mut self) -> &mut Self::Family;
}

impl HasFamily<Addr4> for BpfTables {
    type Family = BpfFamily<Addr4>;
    fn family(&self) -> &Self::Family {
        &self.v4
    }
    fn family_mut(&mut self) -> &mut Self::Family {
        &mut self.v4
    }
}

impl HasFamily<Addr6> for BpfTables {
    type Family = BpfFamily<Addr6>;
    fn family(&self) -> &Self::Family {
        &self.v6
    }
    fn family_mut(&mut self) -> &mut Self::Family {
        &mut self.v6
    }
}

fn backends_error<A: Address>(source: io::Error, first: u32, count: u32) -> TableError {
    let map = names::for_family::<A>(names::BACKENDS);
    match source.kind() {
        io::ErrorKind::InvalidInput => TableError::OutOfBounds { map, first, count },
        _ => TableError::Call { map, source },
    }
}

impl<A: Address> FamilyTables<A> for BpfTables
where
    Self: HasFamily<A, Family = BpfFamily<A>>,
{
    fn frontends(&self) -> Result<Vec<(FrontendKey<A>, Frontend)>, TableError> {
        self.family().frontends.all()
    }

    fn set_frontend(&mut self, key: &FrontendKey<A>, value: &Frontend) -> Result<(), TableError> {
        self.family_mut().frontends.set(key, value)
    }

    fn remove_frontend(&mut self, key: &FrontendKey<A>) -> Result<(), TableError> {
        self.family_mut().frontends.remove(key).map(drop)
    }

    fn backend_slots(&self) -> u32 {
        self.family().backends.len()
    }

    fn backends(&self, first: u32, count: u32) -> Result<Vec<Backend<A>>, TableError> {
        let read = self.family().backends.read(first, count);
        read.map_err(|error| backends_error::<A>(error, first, count))
    }

    fn set_backends(&mut self, first: u32, values: &[Backend<A>]) -> Result<(), TableError> {
        let written = self.family_mut().backends.write(first, values);
        written.map_err(|error| backends_error::<A>(error, first, values.len() as u32))?;
        // The frontend write that publishes the slots is a system call that takes a bucket's lock and releases it again, so no
        // CPU sees the frontend before the slots. The fence keeps the compiler from moving the stores behind that call.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        Ok(())
    }

    fn scan_rewrites(&self, cursor: &mut Cursor, entries: &mut Vec<RewriteEntry<A>>) -> Result<bool, TableError> {
        self.family().rewrites.scan(cursor, entries)
    }

    fn rewrite(&self, key: &RewriteKey<A>) -> Result<Option<Rewrite<A>>, TableError> {
        self.family().rewrites.get(key)
    }

    fn remove_rewrite(&mut self, key: &RewriteKey<A>) -> Result<bool, TableError> {
        let family = self.family_mut();
        let is_removed = family.rewrites.remove(key)?;
        family.rewrites_removed += u64::from(is_removed);
        Ok(is_removed)
    }

    fn rewrite_counts(&self) -> Result<RewriteCounts, TableError> {
        let of_programs = |slots: [u32; 2]| {
            let cpus = aya::util::nr_cpus().map_err(|(file, error)| io::Error::other(format!("{file}: {error}")));
            cpus.and_then(|cpus| {
                sys::lookup_many::<u64>(self.reasons.fd().as_fd(), &names::of_family::<A, _>(slots), cpus)
            })
            .map(|counts| counts.iter().sum())
            .map_err(|source| TableError::Call {
                map: names::REASONS,
                source,
            })
        };
        Ok(RewriteCounts {
            inserted: of_programs(REWRITES_INSERTED)?,
            removed_by_programs: of_programs(REWRITES_REMOVED)?,
            removed_by_agent: self.family().rewrites_removed,
        })
    }

    fn source_ranges(&self) -> Result<Vec<SourceRangeKey<A>>, TableError> {
        self.family().source_ranges.keys()
    }

    fn set_source_range(&mut self, key: &SourceRangeKey<A>) -> Result<(), TableError> {
        self.family_mut().source_ranges.set(key, &1)
    }

    fn remove_source_range(&mut self, key: &SourceRangeKey<A>) -> Result<(), TableError> {
        self.family_mut().source_ranges.remove(key).map(drop)
    }

    fn scan_affinity(&self, cursor: &mut Cursor, keys: &mut Vec<AffinityKey<A>>) -> Result<bool, TableError> {
        let mut entries = Vec::new();
        let at_end = self.family().affinity.scan(cursor, &mut entries)?;
        keys.extend(entries.into_iter().map(|(key, _)| key));
        Ok(at_end)
    }

    fn remove_affinity(&mut self, key: &AffinityKey<A>) -> Result<(), TableError> {
        self.family_mut().affinity.remove(key).map(drop)
    }

    fn node_addrs(&self) -> Result<Vec<(A, NodeAddr)>, TableError> {
        self.family().node_addrs.all()
    }

    fn set_node_addr(&mut self, addr: &A, value: &NodeAddr) -> Result<(), TableError> {
        self.family_mut().node_addrs.set(addr, value)
    }

    fn remove_node_addr(&mut self, addr: &A) -> Result<(), TableError> {
        self.family_mut().node_addrs.remove(addr).map(drop)
    }

    fn cluster_ips(&self) -> Result<Vec<(u32, FrontendKey<A>)>, TableError> {
        self.family().cluster_ips.all()
    }

    fn set_cluster_ip(&mut self, service: u32, key: &FrontendKey<A>) -> Result<(), TableError> {
        self.family_mut().cluster_ips.set(&service, key)
    }

    fn remove_cluster_ip(&mut self, service: u32) -> Result<(), TableError> {
        self.family_mut().cluster_ips.remove(&service).map(drop)
    }

    fn settings(&self) -> Result<Settings<A>, TableError> {
        let found = self.family().settings.get(&0)?;
        Ok(found.unwrap_or_else(bytemuck::Zeroable::zeroed))
    }

    fn set_settings(&mut self, value: &Settings<A>) -> Result<(), TableError> {
        self.family_mut().settings.set(&0, value)
    }
}

impl Tables for BpfTables {
    fn services(&self) -> Result<Vec<(u32, ServiceInfo)>, TableError> {
        self.services.all()
    }

    fn set_service(&mut self, id: u32, value: &ServiceInfo) -> Result<(), TableError> {
        self.services.set(&id, value)
    }

    fn counter_slots(&self) -> u32 {
        self.counters.slots()
    }

    fn clear_counters(&mut self, id: u32) -> Result<(), TableError> {
        self.counters.clear(id)
    }

    fn remove_service(&mut self, id: u32) -> Result<(), TableError> {
        self.services.remove(&id).map(drop)
    }

    fn links(&self) -> Result<Vec<(u32, Link)>, TableError> {
        self.links.all()
    }

    fn set_link(&mut self, ifindex: u32, value: &Link) -> Result<(), TableError> {
        self.links.set(&ifindex, value)
    }

    fn remove_link(&mut self, ifindex: u32) -> Result<(), TableError> {
        self.links.remove(&ifindex).map(drop)
    }
}
