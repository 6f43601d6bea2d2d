//! Maps whose layout is not one of our types: facts about them, and their entries as bytes. Called by `upgrade`, which copies from one
//! layout to another.
//!
//! What must stay true: buffers are as large as the kernel says the map's keys and values are, never as a caller says.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use aya_obj::generated::{bpf_cmd, bpf_map_type};
use bytemuck::{Pod, Zeroable};

use super::{Batch, Element, Info, bpf, new_fd, next_batch, open_pin};

/// The start of the kernel's `bpf_map_info`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct RawMapInfo {
    kind: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    name: [u8; 16],
}

/// The start of what `BPF_MAP_CREATE` reads.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    name: [u8; 16],
}

/// A map of any layout.
pub(crate) struct RawMap {
    fd: OwnedFd,
    info: RawMapInfo,
    /// Bytes of a value as system calls have it, and how many values it is: for per-CPU maps those of every CPU.
    room: usize,
    values: usize,
}

/// Entries as bytes, keys and values one behind the other.
#[derive(Default)]
pub(crate) struct RawEntries {
    pub(crate) keys: Vec<u8>,
    pub(crate) values: Vec<u8>,
}

impl RawMap {
    /// Opens a pinned map.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Self::of(open_pin(path)?)
    }

    fn of(fd: OwnedFd) -> io::Result<Self> {
        let mut info = RawMapInfo::zeroed();
        let mut attr = Info {
            fd: fd.as_raw_fd() as u32,
            len: size_of::<RawMapInfo>() as u32,
            info: std::ptr::from_mut(&mut info).addr() as u64,
        };
        bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
        let value = info.value_size as usize;
        let (room, values) = if info.kind == bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY as u32
            || info.kind == bpf_map_type::BPF_MAP_TYPE_PERCPU_HASH as u32
        {
            let cpus = aya::util::nr_cpus().map_err(|(file, error)| io::Error::other(format!("{file}: {error}")))?;
            (value.next_multiple_of(8) * cpus, cpus)
        } else {
            (value, 1)
        };
        Ok(Self { fd, info, room, values })
    }

    /// Makes a map; `sizes` are those of a key and of a value.
    pub(crate) fn create(
        kind: bpf_map_type,
        name: &str,
        sizes: [usize; 2],
        max_entries: u32,
        flags: u32,
    ) -> io::Result<Self> {
        let [key_size, value_size] = sizes.map(|size| size as u32);
        let mut attr = MapCreate {
            kind: kind as u32,
            key_size,
            value_size,
            max_entries,
            flags,
            ..MapCreate::zeroed()
        };
        // The last byte stays zero.
        for (to, from) in attr.name.iter_mut().take(15).zip(name.bytes()) {
            *to = from;
        }
        Self::of(bpf(bpf_cmd::BPF_MAP_CREATE, &mut attr).map(new_fd)?)
    }

    /// Makes an array of one value.
    pub(crate) fn new_value(name: &str, value: &[u8]) -> io::Result<Self> {
        let map = Self::create(bpf_map_type::BPF_MAP_TYPE_ARRAY, name, [4, value.len()], 1, 0)?;
        map.update(&[0; 4], value)?;
        Ok(map)
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// `BPF_MAP_TYPE_*`.
    pub(crate) fn kind(&self) -> u32 {
        self.info.kind
    }

    pub(crate) fn flags(&self) -> u32 {
        self.info.flags
    }

    pub(crate) fn key_size(&self) -> usize {
        self.info.key_size as usize
    }

    pub(crate) fn value_size(&self) -> usize {
        self.info.value_size as usize
    }

    pub(crate) fn max_entries(&self) -> u32 {
        self.info.max_entries
    }

    /// Bytes of a value in [`RawEntries`]; more than [`Self::value_size`] for per-CPU maps.
    pub(crate) fn room(&self) -> usize {
        self.room
    }

    /// Bytes from one CPU's value to the next one's.
    pub(crate) fn stride(&self) -> usize {
        self.room / self.values
    }

    /// The key after `key`, or the first one; `None` at the end.
    pub(crate) fn next_key(&self, key: Option<&[u8]>) -> io::Result<Option<Vec<u8>>> {
        let mut next = vec![0u8; self.key_size()];
        let key = key.map(|key| self.key(key)).transpose()?;
        let mut attr = self.element(
            key.map_or(0, |key| key.as_ptr().addr() as u64),
            next.as_mut_ptr().addr(),
        );
        found(bpf(bpf_cmd::BPF_MAP_GET_NEXT_KEY, &mut attr), next)
    }

    /// The value under `key`, of all CPUs.
    pub(crate) fn lookup(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let mut value = vec![0u8; self.room];
        let mut attr = self.element(self.key(key)?.as_ptr().addr() as u64, value.as_mut_ptr().addr());
        found(bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr), value)
    }

    /// Writes the value under `key`, for all CPUs.
    pub(crate) fn update(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        if value.len() != self.room {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut attr = self.element(self.key(key)?.as_ptr().addr() as u64, value.as_ptr().addr());
        bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
    }

    /// The next entries of a hash map or an array; the position is `None` at first, and again at the end.
    pub(crate) fn lookup_batch(&self, position: &mut Option<u32>, wanted: usize) -> io::Result<RawEntries> {
        let mut room = wanted;
        loop {
            let mut entries = RawEntries {
                keys: vec![0; room * self.key_size()],
                values: vec![0; room * self.room],
            };
            let places = [entries.keys.as_mut_ptr().addr(), entries.values.as_mut_ptr().addr()];
            let Some(count) = next_batch(self.fd(), position, places, room as u32)? else {
                room *= 2;
                continue;
            };
            entries.keys.truncate(count * self.key_size());
            entries.values.truncate(count * self.room);
            return Ok(entries);
        }
    }

    /// Writes entries to a hash map or an array.
    pub(crate) fn update_batch(&self, entries: &RawEntries) -> io::Result<()> {
        let count = entries.keys.len() / self.key_size();
        if entries.keys.len() != count * self.key_size() || entries.values.len() != count * self.room {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if count == 0 {
            return Ok(());
        }
        let mut attr = Batch {
            in_batch: 0,
            out_batch: 0,
            keys: entries.keys.as_ptr().addr() as u64,
            values: entries.values.as_ptr().addr() as u64,
            count: count as u32,
            map_fd: self.fd.as_raw_fd() as u32,
            elem_flags: 0,
            flags: 0,
        };
        bpf(bpf_cmd::BPF_MAP_UPDATE_BATCH, &mut attr).map(drop)
    }

    fn key<'k>(&self, key: &'k [u8]) -> io::Result<&'k [u8]> {
        if key.len() == self.key_size() {
            Ok(key)
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        }
    }

    fn element(&self, key: u64, value: usize) -> Element {
        Element {
            map_fd: self.fd.as_raw_fd() as u32,
            pad: 0,
            key,
            value: value as u64,
            flags: 0,
        }
    }
}

fn found<T, U>(result: io::Result<U>, value: T) -> io::Result<Option<T>> {
    match result {
        Ok(_) => Ok(Some(value)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}
