//! XDP programs that are not the proxy's. One swaps the hardware addresses and the IP addresses of a packet and returns it by the
//! interface it came from, asking nobody: no forwarding can be cheaper, so ours is measured beside it. One does nothing, as
//! somebody else's program on an interface. The bench has two more: a source of packets, and a sink.
//!
//! Written in instructions, so that the object with the proxy's programs has nothing else in it. What leaves a veth from XDP arrives only if
//! its peer is ready for it: [`Ready`].

use std::ffi::{CString, c_long};
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use anyhow::{Context as _, Result};
use bytemuck::{Pod, Zeroable};

use crate::netns::Netns;
use crate::process;

const BPF_MAP_CREATE: c_long = 0;
const BPF_MAP_LOOKUP_ELEM: c_long = 1;
const BPF_PROG_LOAD: c_long = 5;
const BPF_PROG_TEST_RUN: c_long = 10;
const BPF_LINK_CREATE: c_long = 28;
/// The kernel's number for XDP programs.
pub const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_XDP: u32 = 37;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
const BPF_F_TEST_XDP_LIVE_FRAMES: u32 = 1 << 1;
/// Verdict: gone.
pub const XDP_DROP: i32 = 1;
/// Verdict: the stack has it.
pub const XDP_PASS: i32 = 2;
const XDP_TX: i32 = 3;

/// A loaded program.
pub struct Foreign(OwnedFd);

impl Foreign {
    /// Swaps addresses and returns the packet (`XDP_TX`); what is not IP passes.
    pub fn swap() -> io::Result<Self> {
        Self::load(BPF_PROG_TYPE_XDP, &swap_instructions())
    }

    /// Lets every packet pass.
    pub fn pass() -> io::Result<Self> {
        Self::load(BPF_PROG_TYPE_XDP, &end(XDP_PASS))
    }

    /// Has the kernel verify a program of a kernel's `BPF_PROG_TYPE_*`.
    pub fn load(kind: u32, program: &[Insn]) -> io::Result<Self> {
        let licence = c"GPL";
        let mut attr = Load {
            kind,
            count: program.len() as u32,
            instructions: program.as_ptr().addr() as u64,
            licence: licence.as_ptr().addr() as u64,
            ..Load::zeroed()
        };
        attr.name[..7].copy_from_slice(b"foreign");
        bpf(BPF_PROG_LOAD, &mut attr).map(owned).map(Self)
    }

    /// Puts it into the driver of an interface of this thread's network namespace; it is there for as long as what is given back.
    pub fn attach(&self, ifindex: u32) -> io::Result<OwnedFd> {
        let mut attr = Link {
            program: self.0.as_raw_fd() as u32,
            target: ifindex,
            attach_type: BPF_XDP,
            flags: XDP_FLAGS_DRV_MODE,
        };
        bpf(BPF_LINK_CREATE, &mut attr).map(owned)
    }

    /// Runs it over a packet: verdict, the packet afterwards, and nanoseconds of one run.
    pub fn run(&self, packet: &[u8], repeat: u32) -> io::Result<(u32, Vec<u8>, u32)> {
        let mut out = vec![0; packet.len()];
        let mut attr = Run {
            program: self.0.as_raw_fd() as u32,
            size_in: packet.len() as u32,
            size_out: out.len() as u32,
            data_in: packet.as_ptr().addr() as u64,
            data_out: out.as_mut_ptr().addr() as u64,
            repeat,
            ..Run::zeroed()
        };
        bpf(BPF_PROG_TEST_RUN, &mut attr)?;
        Ok((attr.verdict, out, attr.duration))
    }

    /// Runs it on so many frames that begin as `packet`, and sends them where it says: in the calling thread's network namespace and on its
    /// processor (Linux 5.18). A frame that has been somewhere comes back as it was left there.
    pub fn send(&self, packet: &[u8], count: u32) -> io::Result<()> {
        let mut attr = Run {
            program: self.0.as_raw_fd() as u32,
            size_in: packet.len() as u32,
            data_in: packet.as_ptr().addr() as u64,
            repeat: count,
            flags: BPF_F_TEST_XDP_LIVE_FRAMES,
            batch: 64,
            ..Run::zeroed()
        };
        bpf(BPF_PROG_TEST_RUN, &mut attr).map(drop)
    }
}

/// Prepares the path of packets that interfaces send from XDP, until it is dropped. Their peers, veths, take such packets only if they
/// have a program themselves: without, XDP_TX puts a packet into the peer's ring and wakes nobody (Linux 6.18). And the stacks at both
/// ends must not leave checksums to a device: XDP sees them unfinished.
pub struct Ready {
    ends: Vec<(Netns, String)>,
    _programs: Vec<OwnedFd>,
}

impl Ready {
    /// Of these peers, and these interfaces at both ends.
    pub fn make(peers: &[(&Netns, &str)], ends: &[(&Netns, &str)]) -> Result<Self> {
        let pass = Foreign::pass()?;
        let attach = |(netns, device): &(&Netns, &str)| {
            let attached = netns.run(|| pass.attach(index(device)?));
            attached.with_context(|| format!("attaching a program to {device}"))
        };
        let ready = Self {
            ends: ends
                .iter()
                .map(|(netns, device)| ((*netns).clone(), (*device).to_owned()))
                .collect(),
            _programs: peers.iter().map(attach).collect::<Result<_>>()?,
        };
        ready.let_device_finish("off")?;
        Ok(ready)
    }

    fn let_device_finish(&self, word: &str) -> Result<()> {
        for (netns, device) in &self.ends {
            process::run(netns.command("ethtool").args(["-K", device, "tx", word]))?;
        }
        Ok(())
    }
}

impl Drop for Ready {
    fn drop(&mut self) {
        // An interface that is gone needs nothing.
        let _gone = self.let_device_finish("on");
    }
}

/// Index of an interface of this thread's network namespace.
pub fn index(device: &str) -> io::Result<u32> {
    let name = CString::new(device)?;
    // SAFETY: the name ends with a zero byte and lives through the call.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => Ok(index),
    }
}

/// A number that programs count up, by its address ([`Counter::address_in`]).
pub struct Counter(OwnedFd);

impl Counter {
    /// Zero.
    pub fn new() -> io::Result<Self> {
        const ARRAY: u32 = 2;
        // Kind, size of the key, size of the value, number of values.
        let mut attr = [ARRAY, 4, 8, 1];
        bpf(BPF_MAP_CREATE, &mut attr).map(owned).map(Self)
    }

    /// What it is now.
    pub fn read(&self) -> io::Result<u64> {
        let (key, mut value) = (0u32, 0u64);
        // The descriptor has four bytes, and four that count for nothing follow it.
        let map = self.0.as_raw_fd() as u64;
        let mut attr = [map, (&raw const key).addr() as u64, (&raw mut value).addr() as u64, 0];
        bpf(BPF_MAP_LOOKUP_ELEM, &mut attr)?;
        Ok(value)
    }

    /// Puts its address into a register of a program.
    pub fn address_in(&self, register: u8) -> [Insn; 2] {
        const LOAD_WIDE: u8 = 0x18;
        const VALUE_OF_MAP: u8 = 2;
        [
            insn(LOAD_WIDE, register, VALUE_OF_MAP, 0, self.0.as_raw_fd()),
            insn(0, 0, 0, 0, 0),
        ]
    }
}

/// The kernel's `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Insn {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// An instruction, its fields as the kernel names them.
pub const fn insn(code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> Insn {
    Insn {
        code,
        registers: dst | src << 4,
        offset,
        immediate,
    }
}

/// Sizes of loads and stores.
const U16: u8 = 0x08;
const U32: u8 = 0x00;
const U64: u8 = 0x18;

const fn load(size: u8, dst: u8, src: u8, offset: i16) -> Insn {
    insn(0x61 | size, dst, src, offset, 0)
}

const fn store(size: u8, dst: u8, offset: i16, src: u8) -> Insn {
    insn(0x63 | size, dst, src, offset, 0)
}

/// Swaps what is at two offsets of the packet, whose start is in r2.
const fn swap(size: u8, a: i16, b: i16) -> [Insn; 4] {
    [
        load(size, 5, 2, a),
        load(size, 6, 2, b),
        store(size, 2, a, 6),
        store(size, 2, b, 5),
    ]
}

pub(crate) const fn end(verdict: i32) -> [Insn; 2] {
    [insn(0xb7, 0, 0, 0, verdict), insn(0x95, 0, 0, 0, 0)]
}

fn swap_instructions() -> Vec<Insn> {
    const MOVE: u8 = 0xbf;
    const ADD: u8 = 0x07;
    const IF_GREATER: u8 = 0x2d;
    const IF_OTHER: u8 = 0x55;
    const IPV4: i32 = 0x0800_u16.to_be() as i32;
    const IPV6: i32 = 0x86dd_u16.to_be() as i32;
    let returned = |addresses: &[Insn]| [addresses, &swap(U32, 0, 6), &swap(U16, 4, 10), &end(XDP_TX)].concat();
    let ipv4 = returned(&swap(U32, 26, 30));
    let ipv6 = returned(&[swap(U64, 22, 38), swap(U64, 30, 46)].concat());
    let (len4, len6) = (ipv4.len() as i16, ipv6.len() as i16);
    [
        vec![
            load(U32, 2, 1, 0),
            load(U32, 3, 1, 4),
            insn(MOVE, 4, 2, 0, 0),
            insn(ADD, 4, 0, 0, 34),
            insn(IF_GREATER, 4, 3, 5 + len4 + len6, 0),
            load(U16, 7, 2, 12),
            insn(IF_OTHER, 7, 0, len4, IPV4),
        ],
        ipv4,
        vec![
            insn(IF_OTHER, 7, 0, 2 + len6, IPV6),
            insn(ADD, 4, 0, 0, 20),
            insn(IF_GREATER, 4, 3, len6, 0),
        ],
        ipv6,
        end(XDP_PASS).to_vec(),
    ]
    .concat()
}

/// The start of `union bpf_attr` for each command; what follows counts as zero.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    licence: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Link {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Run {
    program: u32,
    verdict: u32,
    size_in: u32,
    size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_size_in: u32,
    context_size_out: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch: u32,
    pad: u32,
}

fn bpf<T: Pod>(command: c_long, attr: &mut T) -> io::Result<c_long> {
    // SAFETY: `attr` is plain old data that lives through the call, with its size; what its addresses point to lives as long.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn owned(result: c_long) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows its number.
    unsafe { OwnedFd::from_raw_fd(result as i32) }
}
