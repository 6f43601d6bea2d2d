//! Array maps in our memory (`BPF_F_MMAPABLE`): reading and writing slots costs no system call.
//!
//! An array is mapped window by window, when slots in it are first asked for: every mapped page counts as resident, whether it is used
//! or not, and the arrays are made for clusters that few nodes see.

use std::cell::OnceCell;
use std::io;
use std::marker::PhantomData;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use bytemuck::Pod;

/// Slots of a window. A window begins at a page of whatever size (up to 64 KiB) with slots of whatever size, all being multiples of
/// eight bytes.
const WINDOW: u32 = 32 * 1024;

/// An array map, as far as it is mapped.
pub(crate) struct MappedArray<T> {
    map: OwnedFd,
    slots: u32,
    is_writable: bool,
    windows: Box<[OnceCell<Mapping>]>,
    slot: PhantomData<T>,
}

/// A part of an array in our memory.
struct Mapping {
    memory: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the memory belongs to this value alone within the process; writing needs `&mut` of the array. The kernel's programs only
// read it.
unsafe impl Send for Mapping {}

impl<T: Pod> MappedArray<T> {
    /// The kernel gives every slot a multiple of eight bytes.
    const STRIDE: usize = size_of::<T>().next_multiple_of(8);

    /// The array of `slots` slots; `is_writable` needs a map that is not frozen. One that cannot be mapped is an error right here.
    pub(crate) fn new(map: BorrowedFd<'_>, slots: u32, is_writable: bool) -> io::Result<Self> {
        let array = Self {
            map: map.try_clone_to_owned()?,
            slots,
            is_writable,
            windows: (0..slots.div_ceil(WINDOW)).map(|_| OnceCell::new()).collect(),
            slot: PhantomData,
        };
        if slots > 0 {
            array.window(0)?;
        }
        Ok(array)
    }

    /// Slots of the array.
    pub(crate) fn len(&self) -> u32 {
        self.slots
    }

    /// The value of a slot, `None` beyond the end.
    pub(crate) fn get(&self, index: u32) -> Option<T> {
        self.read(index, 1).ok()?.pop()
    }

    /// The values of a block of slots.
    pub(crate) fn read(&self, first: u32, count: u32) -> io::Result<Vec<T>> {
        let mut values = Vec::with_capacity(self.end(first, count as usize)? as usize - first as usize);
        for index in first..first + count {
            let place = self.place(index)?;
            // SAFETY: the slot lies within the mapping, which lives as long as `self`, and every bit pattern is a `T`.
            values.push(unsafe { place.cast::<T>().read_unaligned() });
        }
        Ok(values)
    }

    /// Writes a block of slots that no program reads: they are not published yet. The array must have been opened writable.
    pub(crate) fn write(&mut self, first: u32, values: &[T]) -> io::Result<()> {
        let end = self.end(first, values.len())?;
        if !self.is_writable {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        for (index, value) in (first..end).zip(values) {
            let place = self.place(index)?;
            // SAFETY: the slot lies within the mapping, which is writable and lives as long as `self`.
            unsafe { place.cast::<T>().write_unaligned(*value) };
        }
        Ok(())
    }

    /// The slot behind a block, all of which must be there.
    fn end(&self, first: u32, count: usize) -> io::Result<u32> {
        let end = u32::try_from(count).ok().and_then(|count| first.checked_add(count));
        end.filter(|end| *end <= self.slots)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "beyond the end of the array"))
    }

    /// Where a slot begins that is there.
    fn place(&self, index: u32) -> io::Result<*mut u8> {
        let mapping = self.window(index / WINDOW)?;
        let offset = (index % WINDOW) as usize * Self::STRIDE;
        debug_assert!(offset + size_of::<T>() <= mapping.bytes, "callers stay below `slots`");
        // SAFETY: callers stay below `slots`, and a window is mapped as far as its slots go.
        Ok(unsafe { mapping.memory.as_ptr().add(offset) })
    }

    fn window(&self, number: u32) -> io::Result<&Mapping> {
        let cell = self.windows.get(number as usize).ok_or(io::ErrorKind::InvalidInput)?;
        if let Some(mapping) = cell.get() {
            return Ok(mapping);
        }
        let first = number * WINDOW;
        let slots = (self.slots - first).min(WINDOW) as usize;
        let access = if self.is_writable {
            libc::PROT_READ | libc::PROT_WRITE
        } else {
            libc::PROT_READ
        };
        let bytes = Self::STRIDE * slots;
        // SAFETY: a fresh mapping at an address the kernel chooses; it is unmapped in `drop` only.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                access,
                libc::MAP_SHARED,
                self.map.as_raw_fd(),
                (first as usize * Self::STRIDE) as libc::off_t,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = NonNull::new(memory.cast()).ok_or_else(|| io::Error::other("mapped at address zero"))?;
        Ok(cell.get_or_init(|| Mapping { memory, bytes }))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly what was mapped; no reference into it is ever given out.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use aya_obj::generated::{BPF_F_MMAPABLE, bpf_map_type};

    use super::super::raw::RawMap;
    use super::*;

    /// Slots as large as an IPv6 backend, which no page holds a whole number of.
    type Slot = [u64; 3];

    #[test]
    fn blocks_may_cross_windows_and_unused_ones_are_not_mapped() {
        let slots = 3 * WINDOW + 5;
        let kind = bpf_map_type::BPF_MAP_TYPE_ARRAY;
        let map = RawMap::create(kind, "mapped", [4, size_of::<Slot>()], slots, BPF_F_MMAPABLE).unwrap();
        let mut array = MappedArray::<Slot>::new(map.fd(), slots, true).unwrap();
        let mapped = |array: &MappedArray<Slot>| array.windows.iter().filter(|window| window.get().is_some()).count();
        assert_eq!(mapped(&array), 1);
        let values: Vec<Slot> = (0..10).map(|n| [n, n + 1, n + 2]).collect();
        array.write(2 * WINDOW - 4, &values).unwrap();
        assert_eq!(mapped(&array), 3, "the last one has not been asked for");
        assert_eq!(array.read(2 * WINDOW - 4, 10).unwrap(), values);
        array.write(slots - 1, &values[9..]).unwrap();

        // What the kernel holds, and what another mapping sees.
        let seen = map.lookup(&(2 * WINDOW).to_ne_bytes()).unwrap().unwrap();
        assert_eq!(seen, bytemuck::bytes_of(&values[4]));
        let mut reader = MappedArray::<Slot>::new(map.fd(), slots, false).unwrap();
        assert_eq!((reader.get(slots - 1), reader.get(slots)), (Some(values[9]), None));
        assert!(array.write(slots - 1, &values[..2]).is_err() && array.read(u32::MAX, 2).is_err());
        assert!(reader.write(0, &values).is_err(), "opened for reading");
    }
}
