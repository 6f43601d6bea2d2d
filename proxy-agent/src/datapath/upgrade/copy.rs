//! Copies a map's entries from one layout to another, while the programs go on using the old map. Called by the parent, which holds new
//! connections back meanwhile.

use std::io;

use aya_obj::generated::bpf_map_type;

use super::layout::Moves;
use crate::datapath::sys::raw::{RawEntries, RawMap};

/// Entries copied with two system calls.
const CHUNK: usize = 4_096;

/// How the entries of a map become those of another.
#[derive(Debug)]
pub(super) struct Copying {
    pub(super) key: Moves,
    pub(super) value: Moves,
    /// Entries that the old map has room for.
    pub(super) capacity: u32,
}

/// How a kind of map is walked through.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Walk {
    /// Hash maps and arrays: in batches. A key stands for the same in both kinds of hash map.
    Hash,
    Array,
    PerCpuArray,
    Trie,
}

impl Walk {
    /// `None` for kinds that cannot be listed.
    pub(super) fn of(kind: u32) -> Option<Self> {
        [
            (bpf_map_type::BPF_MAP_TYPE_HASH, Self::Hash),
            (bpf_map_type::BPF_MAP_TYPE_LRU_HASH, Self::Hash),
            (bpf_map_type::BPF_MAP_TYPE_ARRAY, Self::Array),
            (bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY, Self::PerCpuArray),
            (bpf_map_type::BPF_MAP_TYPE_LPM_TRIE, Self::Trie),
        ]
        .into_iter()
        .find_map(|(of, walk)| (of as u32 == kind).then_some(walk))
    }
}

impl Copying {
    /// Copies everything; gives the number of entries.
    pub(super) fn run(&self, old: &RawMap, new: &RawMap) -> io::Result<usize> {
        match Walk::of(old.kind()) {
            Some(Walk::Hash) => self.in_batches(old, new, old.max_entries()),
            Some(Walk::Array) => self.in_batches(old, new, old.max_entries().min(new.max_entries())),
            Some(Walk::PerCpuArray | Walk::Trie) => self.one_by_one(old, new),
            None => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn in_batches(&self, old: &RawMap, new: &RawMap, capacity: u32) -> io::Result<usize> {
        let is_array = Walk::of(old.kind()) == Some(Walk::Array);
        let (mut position, mut copied) = (None, 0);
        loop {
            let left = if is_array {
                capacity as usize - copied
            } else {
                capacity as usize
            };
            let mut read = old.lookup_batch(&mut position, CHUNK.min(left).max(1))?;
            if is_array {
                read.keys.truncate(left * old.key_size());
                read.values.truncate(left * old.room());
            }
            let entries = self.convert(old, new, &read)?;
            // Slots of an array start at zero already, and most are: a table of backends is hardly ever full.
            if !is_array || entries.values.iter().any(|byte| *byte != 0) {
                new.update_batch(&entries)?;
            }
            copied += entries.keys.len() / new.key_size();
            if position.is_none() || (is_array && copied >= capacity as usize) {
                return Ok(copied);
            }
        }
    }

    fn one_by_one(&self, old: &RawMap, new: &RawMap) -> io::Result<usize> {
        let is_array = Walk::of(new.kind()) == Some(Walk::PerCpuArray);
        let (mut last, mut copied) = (None, 0);
        while let Some(key) = old.next_key(last.as_deref())? {
            if is_array && copied >= new.max_entries() as usize {
                break;
            }
            if let Some(value) = old.lookup(&key)?
                && (!is_array || value.iter().any(|byte| *byte != 0))
            {
                let read = RawEntries {
                    keys: key.clone(),
                    values: value,
                };
                let entries = self.convert(old, new, &read)?;
                new.update(&entries.keys, &entries.values)?;
            }
            copied += 1;
            last = Some(key);
        }
        Ok(copied)
    }

    fn convert(&self, old: &RawMap, new: &RawMap, read: &RawEntries) -> io::Result<RawEntries> {
        let count = read.keys.len() / old.key_size();
        let mut entries = RawEntries {
            keys: vec![0; count * new.key_size()],
            values: vec![0; count * new.room()],
        };
        let mut fits = true;
        let keys = read.keys.chunks_exact(old.key_size());
        for (from, to) in keys.zip(entries.keys.chunks_exact_mut(new.key_size())) {
            fits &= self.key.apply(from, to);
        }
        let values = read.values.chunks_exact(old.stride());
        for (from, to) in values.zip(entries.values.chunks_exact_mut(new.stride())) {
            fits &= self.value.apply(from, to);
        }
        if fits {
            Ok(entries)
        } else {
            Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "an entry has something in a field that is shorter in this version",
            ))
        }
    }
}
