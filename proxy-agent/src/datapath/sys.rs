//! The kernel calls that aya has not: single and batched map access by layout, memory-mapped arrays, tcx and XDP links by ifindex,
//! cgroup links whose program is replaced in place, link information, the cookie of a network namespace, RCU synchronisation.
//!
//! Called by the rest of `datapath` and by `inspect`. Every function is one system call with checked arguments; errors are the
//! kernel's, callers add the object.

mod mapped;
pub(crate) mod raw;

use std::ffi::{CString, c_long, c_void};
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use aya_obj::generated::{XDP_FLAGS_DRV_MODE, XDP_FLAGS_SKB_MODE, bpf_attach_type, bpf_cmd, bpf_link_type};
use bytemuck::{Pod, Zeroable};

pub(crate) use self::mapped::MappedArray;

/// Attach before every other program of the hook (`BPF_F_BEFORE`, Linux 6.6).
const BPF_F_BEFORE: u32 = 1 << 3;
/// `MEMBARRIER_CMD_GLOBAL`: the kernel waits until every CPU went through a quiescent state (`synchronize_rcu`).
const MEMBARRIER_CMD_GLOBAL: c_long = 1;
/// Linux 5.14; not in every libc.
const SO_NETNS_COOKIE: i32 = 71;

fn bpf<T: Pod>(command: bpf_cmd, attr: &mut T) -> io::Result<c_long> {
    // SAFETY: `attr` is plain old data that lives through the call, its size is passed along, and the kernel takes what is beyond
    // its end for zero. Addresses inside it are made by the callers from references that live as long.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as c_long,
            std::ptr::from_mut(attr).cast::<c_void>(),
            size_of::<T>() as c_long,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn new_fd(result: c_long) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows its number.
    unsafe { OwnedFd::from_raw_fd(result as i32) }
}

fn address<T>(value: &T) -> u64 {
    std::ptr::from_ref(value).addr() as u64
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Element {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The value under `key`.
pub(crate) fn lookup<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    let mut value = V::zeroed();
    let mut attr = Element {
        map_fd: map.as_raw_fd() as u32,
        pad: 0,
        key: address(key),
        value: std::ptr::from_mut(&mut value).addr() as u64,
        flags: 0,
    };
    match bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr) {
        Ok(_) => Ok(Some(value)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// What is under `key` of a map whose values are `len` times `T`: one for each CPU, or parts that only the caller can name.
pub(crate) fn lookup_many<T: Pod>(map: BorrowedFd<'_>, key: &u32, len: usize) -> io::Result<Vec<T>> {
    let mut values = vec![T::zeroed(); len];
    let mut attr = Element {
        map_fd: map.as_raw_fd() as u32,
        pad: 0,
        key: address(key),
        value: values.as_mut_ptr().addr() as u64,
        flags: 0,
    };
    bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr)?;
    Ok(values)
}

/// Writes the values of all CPUs under `key` of a per-CPU map.
pub(crate) fn update_per_cpu(map: BorrowedFd<'_>, key: u32, values: &[u64]) -> io::Result<()> {
    let mut attr = Element {
        map_fd: map.as_raw_fd() as u32,
        pad: 0,
        key: address(&key),
        value: values.as_ptr().addr() as u64,
        flags: 0,
    };
    bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// Writes `value` under `key`, in one step for readers of a hash map.
pub(crate) fn update<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    let mut attr = Element {
        map_fd: map.as_raw_fd() as u32,
        pad: 0,
        key: address(key),
        value: address(value),
        flags: 0,
    };
    bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// Removes `key`. What is gone already is success: `false`.
pub(crate) fn delete<K: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    let mut attr = Element {
        map_fd: map.as_raw_fd() as u32,
        pad: 0,
        key: address(key),
        value: 0,
        flags: 0,
    };
    match bpf(bpf_cmd::BPF_MAP_DELETE_ELEM, &mut attr) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The key after `key`, or the first one; `None` at the end.
pub(crate) fn next_key<K: Pod>(map: BorrowedFd<'_>, key: Option<&K>) -> io::Result<Option<K>> {
    let mut next = K::zeroed();
    let mut attr = Element {
        map_fd: map.as_raw_fd() as u32,
        pad: 0,
        key: key.map_or(0, address),
        value: std::ptr::from_mut(&mut next).addr() as u64,
        flags: 0,
    };
    match bpf(bpf_cmd::BPF_MAP_GET_NEXT_KEY, &mut attr) {
        Ok(_) => Ok(Some(next)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Where a batched walk through a hash map stands.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cursor {
    /// The kernel's position, opaque to us; unset before the first chunk.
    position: Option<u32>,
}

/// Reads the next entries of a hash map, at least one bucket and about `wanted`, into `entries`; true at the end of the map, where
/// the cursor starts again. An entry that moves meanwhile may be missed or seen twice.
pub(crate) fn lookup_batch<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    cursor: &mut Cursor,
    wanted: u32,
    entries: &mut Vec<(K, V)>,
) -> io::Result<bool> {
    let mut room = wanted.max(1);
    loop {
        let mut keys = vec![K::zeroed(); room as usize];
        let mut values = vec![V::zeroed(); room as usize];
        let places = [keys.as_mut_ptr().addr(), values.as_mut_ptr().addr()];
        let Some(count) = next_batch(map, &mut cursor.position, places, room)? else {
            room *= 2;
            continue;
        };
        entries.extend(keys.into_iter().zip(values).take(count));
        return Ok(cursor.position.is_none());
    }
}

/// Reads up to `room` entries from `position` on, which is unset at first and again at the end, to where keys and values have room for so
/// many; gives how many there were. `None`: one bucket holds more than there is room for.
fn next_batch(
    map: BorrowedFd<'_>,
    position: &mut Option<u32>,
    [keys, values]: [usize; 2],
    room: u32,
) -> io::Result<Option<usize>> {
    /// No bucket is that large.
    const ENOUGH: u32 = 1 << 20;
    let mut next = 0u32;
    let mut attr = Batch {
        in_batch: position.as_ref().map_or(0, address),
        out_batch: std::ptr::from_mut(&mut next).addr() as u64,
        keys: keys as u64,
        values: values as u64,
        count: room,
        map_fd: map.as_raw_fd() as u32,
        elem_flags: 0,
        flags: 0,
    };
    let at_end = match bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attr) {
        Ok(_) => false,
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
        Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && room < ENOUGH => return Ok(None),
        Err(error) => return Err(error),
    };
    *position = (!at_end).then_some(next);
    Ok(Some(attr.count as usize))
}

/// The values of all CPUs in up to `wanted` slots of a per-CPU array, `words` in each, from the slot behind `last` on.
pub(crate) fn lookup_per_cpu_batch(
    map: BorrowedFd<'_>,
    last: Option<u32>,
    wanted: usize,
    words: usize,
) -> io::Result<Vec<u64>> {
    let mut keys = vec![0u32; wanted];
    let mut values = vec![0u64; wanted * words];
    let mut next = 0u32;
    let mut attr = Batch {
        in_batch: last.as_ref().map_or(0, address),
        out_batch: std::ptr::from_mut(&mut next).addr() as u64,
        keys: keys.as_mut_ptr().addr() as u64,
        values: values.as_mut_ptr().addr() as u64,
        count: wanted as u32,
        map_fd: map.as_raw_fd() as u32,
        elem_flags: 0,
        flags: 0,
    };
    match bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attr) {
        Ok(_) => {}
        // The end of the array.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
        Err(error) => return Err(error),
    }
    values.truncate(attr.count as usize * words);
    Ok(values)
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct LinkCreate {
    prog_fd: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    relative: u64,
    expected_revision: u64,
}

/// Attaches a program to an interface before all others of the hook (tcx, Linux 6.6).
pub(crate) fn attach_tcx(program: BorrowedFd<'_>, ifindex: u32, egress: bool) -> io::Result<OwnedFd> {
    let attach_type = if egress {
        bpf_attach_type::BPF_TCX_EGRESS
    } else {
        bpf_attach_type::BPF_TCX_INGRESS
    };
    let mut attr = LinkCreate {
        prog_fd: program.as_raw_fd() as u32,
        target: ifindex,
        attach_type: attach_type as u32,
        flags: BPF_F_BEFORE,
        relative: 0,
        expected_revision: 0,
    };
    bpf(bpf_cmd::BPF_LINK_CREATE, &mut attr).map(new_fd)
}

/// Attaches an XDP program to an interface, in its driver or behind it. An interface has room for one.
pub(crate) fn attach_xdp(program: BorrowedFd<'_>, ifindex: u32, generic: bool) -> io::Result<OwnedFd> {
    let mut attr = LinkCreate {
        prog_fd: program.as_raw_fd() as u32,
        target: ifindex,
        attach_type: bpf_attach_type::BPF_XDP as u32,
        flags: if generic {
            XDP_FLAGS_SKB_MODE
        } else {
            XDP_FLAGS_DRV_MODE
        },
        relative: 0,
        expected_revision: 0,
    };
    bpf(bpf_cmd::BPF_LINK_CREATE, &mut attr).map(new_fd)
}

/// Attaches a socket program to a cgroup, beside others.
pub(crate) fn attach_cgroup(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    attach_type: bpf_attach_type,
) -> io::Result<OwnedFd> {
    let mut attr = LinkCreate {
        prog_fd: program.as_raw_fd() as u32,
        target: cgroup.as_raw_fd() as u32,
        attach_type: attach_type as u32,
        flags: 0,
        relative: 0,
        expected_revision: 0,
    };
    bpf(bpf_cmd::BPF_LINK_CREATE, &mut attr).map(new_fd)
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct LinkUpdate {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// Replaces the program of a link in one step.
pub(crate) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdate {
        link_fd: link.as_raw_fd() as u32,
        new_prog_fd: program.as_raw_fd() as u32,
        flags: 0,
        old_prog_fd: 0,
    };
    bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr).map(drop)
}

/// Takes a link's program off its hook, whoever else holds the link.
pub(crate) fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut link_fd = link.as_raw_fd() as u32;
    bpf(bpf_cmd::BPF_LINK_DETACH, &mut link_fd).map(drop)
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Opens what is pinned at `path`.
pub(crate) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = Object {
        path: path.as_ptr().addr() as u64,
        fd: 0,
        flags: 0,
    };
    bpf(bpf_cmd::BPF_OBJ_GET, &mut attr).map(new_fd)
}

/// Pins a link or map at `path`.
pub(crate) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = Object {
        path: path.as_ptr().addr() as u64,
        fd: object.as_raw_fd() as u32,
        flags: 0,
    };
    bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr).map(drop)
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Info {
    fd: u32,
    len: u32,
    info: u64,
}

/// The start of the kernel's `bpf_link_info`, as far as tcx, XDP and cgroup links use it.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct RawLinkInfo {
    kind: u32,
    id: u32,
    prog_id: u32,
    pad: u32,
    words: [u32; 12],
}

/// What a link is attached to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum LinkTarget {
    /// tcx, XDP: the interface, 0 once it is gone.
    Interface(u32),
    /// A cgroup's id, 0 once it is gone.
    Cgroup(u64),
    /// Something we never make.
    Other,
}

fn link_info(link: BorrowedFd<'_>) -> io::Result<RawLinkInfo> {
    let mut info = RawLinkInfo::zeroed();
    let mut attr = Info {
        fd: link.as_raw_fd() as u32,
        len: size_of::<RawLinkInfo>() as u32,
        info: std::ptr::from_mut(&mut info).addr() as u64,
    };
    bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info)
}

/// Id of the program that a link runs.
pub(crate) fn link_program(link: BorrowedFd<'_>) -> io::Result<u32> {
    Ok(link_info(link)?.prog_id)
}

/// Where a link is attached.
pub(crate) fn link_target(link: BorrowedFd<'_>) -> io::Result<LinkTarget> {
    let info = link_info(link)?;
    let [first, second, ..] = info.words;
    let on_interface = [bpf_link_type::BPF_LINK_TYPE_TCX, bpf_link_type::BPF_LINK_TYPE_XDP];
    Ok(if on_interface.iter().any(|kind| info.kind == *kind as u32) {
        LinkTarget::Interface(first)
    } else if info.kind == bpf_link_type::BPF_LINK_TYPE_CGROUP as u32 {
        LinkTarget::Cgroup(u64::from(first) | u64::from(second) << 32)
    } else {
        LinkTarget::Other
    })
}

/// The cookie by which programs know this thread's network namespace.
pub(crate) fn netns_cookie() -> io::Result<u64> {
    // SAFETY: no pointers; the descriptor is checked and owned at once.
    let socket = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    let socket = new_fd(c_long::from(socket));
    let mut cookie = 0u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: `cookie` and `len` live through the call and `len` is the size of `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &mut len,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(cookie)
    }
}

/// Waits until every program that runs now has finished, where the kernel can do that for us.
pub(crate) fn synchronize() {
    // SAFETY: no pointers. Failure (a kernel with `nohz_full`) is harmless: callers wait a grace period of their own as well.
    unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
}

/// Nanoseconds of the clock that the programs write into `last_seen`.
pub(crate) fn coarse_clock() -> u64 {
    clock(libc::CLOCK_MONOTONIC_COARSE)
}

/// Nanoseconds of the clock that events have their time from.
pub(crate) fn monotonic_clock() -> u64 {
    clock(libc::CLOCK_MONOTONIC)
}

fn clock(id: libc::clockid_t) -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` lives through the call; callers name clocks that always exist.
    unsafe { libc::clock_gettime(id, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
