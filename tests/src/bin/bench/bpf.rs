//! Programs that belong to the bench and to nobody's datapath: a source of packets, a sink that counts them, and a program that sends
//! back what it gets. Written in instructions, since they are a dozen each; loaded and attached by the system call.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};

/// Ports that the source's packets come from, so that many: a power of two.
pub(crate) const FLOWS: u16 = 256;
const FIRST_PORT: u16 = 0x8000;
/// Length of the source's packets: the smallest Ethernet has, without its checksum.
pub(crate) const FRAME: usize = 60;
/// Offsets in an Ethernet frame with IPv4 without options and UDP.
const ETHERTYPE: i16 = 12;
const PROTOCOL: i16 = 23;
const SRC_PORT: i16 = 34;
const PAYLOAD: i16 = 42;

const BPF_MAP_CREATE: i64 = 0;
const BPF_MAP_LOOKUP_ELEM: i64 = 1;
const BPF_PROG_LOAD: i64 = 5;
const BPF_PROG_TEST_RUN: i64 = 10;
const BPF_LINK_CREATE: i64 = 28;
const MAP_TYPE_ARRAY: u32 = 2;
const PROG_TYPE_XDP: u32 = 6;
const ATTACH_XDP: u32 = 37;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
const TEST_XDP_LIVE_FRAMES: u32 = 1 << 1;
const XDP_DROP: i32 = 1;
const XDP_PASS: i32 = 2;
const XDP_TX: i32 = 3;

#[repr(C)]
#[derive(Clone, Copy)]
struct Insn {
    code: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    value: i32,
}

fn insn(code: u8, dst: u8, src: u8, offset: i16, value: i32) -> Insn {
    Insn {
        code,
        registers: dst | src << 4,
        offset,
        value,
    }
}

const MOV: u8 = 0xb7;
const MOV_REG: u8 = 0xbf;
const ADD: u8 = 0x07;
const AND: u8 = 0x57;
const XOR: u8 = 0xa7;
const TO_BE: u8 = 0xdc;
const LOAD1: u8 = 0x71;
const LOAD2: u8 = 0x69;
const LOAD4: u8 = 0x61;
const LOAD8: u8 = 0x79;
const STORE2: u8 = 0x6b;
const STORE4: u8 = 0x63;
const STORE8: u8 = 0x7b;
const STORE4_VALUE: u8 = 0x62;
const JUMP_NOT_LESS_REG: u8 = 0x3d;
const JUMP_NOT: u8 = 0x55;
const LOAD_ADDRESS: u8 = 0x18;
const ADDRESS_OF_MAP_VALUE: u8 = 2;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const GET_PRANDOM_U32: i32 = 7;
const REDIRECT: i32 = 23;

/// r2 and r7 are the packet, which has at least `length` bytes, or else the program ends with `otherwise`.
fn packet_of(length: i32, otherwise: i32) -> Vec<Insn> {
    vec![
        insn(LOAD4, 2, 1, 0, 0),
        insn(LOAD4, 3, 1, 4, 0),
        insn(MOV_REG, 7, 2, 0, 0),
        insn(MOV_REG, 4, 2, 0, 0),
        insn(ADD, 4, 0, 0, length),
        insn(MOV, 0, 0, 0, otherwise),
        insn(JUMP_NOT_LESS_REG, 3, 4, 1, 0),
        insn(EXIT, 0, 0, 0, 0),
    ]
}

/// What is not IPv4 with UDP is passed on: above all the neighbours' requests.
fn only_udp() -> Vec<Insn> {
    let ipv4 = i32::from(0x0800u16.to_be());
    vec![
        insn(MOV, 0, 0, 0, XDP_PASS),
        insn(LOAD2, 5, 2, ETHERTYPE, 0),
        insn(JUMP_NOT, 5, 0, 2, ipv4),
        insn(LOAD1, 5, 2, PROTOCOL, 0),
        // The next but one; from above it is the next, which ends the program.
        insn(0x15, 5, 0, 1, libc::IPPROTO_UDP),
        insn(EXIT, 0, 0, 0, 0),
    ]
}

/// Fills every frame with `frame`, from a source port of [`FLOWS`], and sends it to an interface.
///
/// The whole header is written each time, because frames come back as the last one left them. `frame` comes from [`FIRST_PORT`], and the
/// first two bytes of its payload are the port's complement; so a change of both leaves the checksum right.
pub(crate) fn source(frame: &[u8; FRAME], interface: u32) -> Result<Program> {
    let mut insns = packet_of(FRAME as i32, XDP_DROP);
    let words = frame.chunks_exact(4).enumerate();
    insns.extend(words.map(|(index, word)| {
        let value = i32::from_le_bytes([word[0], word[1], word[2], word[3]]);
        insn(STORE4_VALUE, 7, 0, 4 * index as i16, value)
    }));
    insns.extend([
        insn(CALL, 0, 0, 0, GET_PRANDOM_U32),
        insn(AND, 0, 0, 0, i32::from(FLOWS - 1)),
        insn(ADD, 0, 0, 0, i32::from(FIRST_PORT)),
        insn(TO_BE, 0, 0, 0, 16),
        insn(STORE2, 7, 0, SRC_PORT, 0),
        insn(XOR, 0, 0, 0, 0xffff),
        insn(STORE2, 7, 0, PAYLOAD, 0),
        insn(MOV, 1, 0, 0, interface as i32),
        insn(MOV, 2, 0, 0, 0),
        insn(CALL, 0, 0, 0, REDIRECT),
        insn(EXIT, 0, 0, 0, 0),
    ]);
    Program::load(&insns, "source")
}

/// The port that a frame for [`source`] comes from, and how its payload begins.
pub(crate) fn source_port() -> (u16, [u8; 2]) {
    (FIRST_PORT, (!FIRST_PORT).to_be_bytes())
}

/// Counts UDP and drops it.
pub(crate) fn sink(counter: &Counter) -> Result<Program> {
    let mut insns = packet_of(PAYLOAD.into(), XDP_PASS);
    insns.extend(only_udp());
    insns.extend([
        insn(LOAD_ADDRESS, 1, ADDRESS_OF_MAP_VALUE, 0, counter.0.as_raw_fd()),
        insn(0, 0, 0, 0, 0),
        // One queue, so one processor at a time: no atomic addition.
        insn(LOAD8, 2, 1, 0, 0),
        insn(ADD, 2, 0, 0, 1),
        insn(STORE8, 1, 2, 0, 0),
        insn(MOV, 0, 0, 0, XDP_DROP),
        insn(EXIT, 0, 0, 0, 0),
    ]);
    Program::load(&insns, "sink")
}

/// Swaps hardware addresses, addresses and ports of UDP and sends it back.
pub(crate) fn swap() -> Result<Program> {
    let mut insns = packet_of(PAYLOAD.into(), XDP_PASS);
    insns.extend(only_udp());
    for (load, store, one, other) in [
        (LOAD4, STORE4, 0, 6),
        (LOAD2, STORE2, 4, 10),
        (LOAD4, STORE4, 26, 30),
        (LOAD2, STORE2, SRC_PORT, SRC_PORT + 2),
    ] {
        insns.extend([
            insn(load, 3, 7, one, 0),
            insn(load, 4, 7, other, 0),
            insn(store, 7, 4, one, 0),
            insn(store, 7, 3, other, 0),
        ]);
    }
    insns.extend([insn(MOV, 0, 0, 0, XDP_TX), insn(EXIT, 0, 0, 0, 0)]);
    Program::load(&insns, "swap")
}

/// A loaded program; attached to nothing.
pub(crate) struct Program(OwnedFd);

/// A program on an interface; taken off when dropped.
pub(crate) struct Attached(#[expect(dead_code, reason = "the descriptor is what keeps it attached")] OwnedFd);

/// A number that a program counts up.
pub(crate) struct Counter(OwnedFd);

#[repr(C)]
#[derive(Default)]
struct Load {
    kind: u32,
    count: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

#[repr(C)]
#[derive(Default)]
struct TestRun {
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

impl Program {
    fn load(insns: &[Insn], name: &str) -> Result<Self> {
        let mut log = vec![0u8; 64 << 10];
        let mut attributes = Load {
            kind: PROG_TYPE_XDP,
            count: insns.len() as u32,
            insns: insns.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
            log_level: 1,
            log_size: log.len() as u32,
            log: log.as_mut_ptr() as u64,
            attach_type: ATTACH_XDP,
            ..Load::default()
        };
        attributes.name[..name.len()].copy_from_slice(name.as_bytes());
        // SAFETY: the attributes point to instructions, a string and a buffer of the sizes they tell, which outlive the call.
        let loaded = unsafe { bpf(BPF_PROG_LOAD, &mut attributes) };
        let fd = loaded.with_context(|| {
            let said = String::from_utf8_lossy(&log);
            format!("loading the bench's program {name}: {}", said.trim_end_matches('\0'))
        })?;
        Ok(Self(owned(fd)))
    }

    /// Attaches it to an interface of the calling thread's namespace, within the driver.
    pub(crate) fn attach(&self, interface: u32) -> Result<Attached> {
        let mut attributes = [self.0.as_raw_fd() as u32, interface, ATTACH_XDP, XDP_FLAGS_DRV_MODE];
        // SAFETY: these four fields are what the kernel reads of a smaller attribute; the rest is zero.
        let fd = unsafe { bpf(BPF_LINK_CREATE, &mut attributes) };
        Ok(Attached(owned(fd.context("attaching a program of the bench")?)))
    }

    /// Runs it on so many frames that are sent where it says, in the calling thread's namespace and on its processor.
    pub(crate) fn send(&self, frame: &[u8; FRAME], count: u32) -> Result<()> {
        let mut attributes = TestRun {
            program: self.0.as_raw_fd() as u32,
            size_in: frame.len() as u32,
            data_in: frame.as_ptr() as u64,
            repeat: count,
            flags: TEST_XDP_LIVE_FRAMES,
            batch: 64,
            ..TestRun::default()
        };
        // SAFETY: the attributes point to a frame of the size they tell; nothing is written.
        unsafe { bpf(BPF_PROG_TEST_RUN, &mut attributes) }.context("sending frames by a test run (Linux 5.18)")?;
        Ok(())
    }
}

impl Counter {
    pub(crate) fn new() -> Result<Self> {
        // Kind, sizes of key and value, entries.
        let mut attributes = [MAP_TYPE_ARRAY, 4, 8, 1];
        // SAFETY: these four fields are what the kernel reads of a smaller attribute; the rest is zero.
        let fd = unsafe { bpf(BPF_MAP_CREATE, &mut attributes) };
        Ok(Self(owned(fd.context("making a counter")?)))
    }

    /// What was counted so far.
    pub(crate) fn read(&self) -> Result<u64> {
        let (key, mut value) = (0u32, 0u64);
        let mut attributes = [
            self.0.as_raw_fd() as u64,
            (&raw const key) as u64,
            (&raw mut value) as u64,
            0,
        ];
        // SAFETY: key and value have the sizes that the map was made with. The descriptor is four bytes, padding follows it.
        unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &mut attributes) }.context("reading a counter")?;
        Ok(value)
    }
}

/// # Safety
/// `attributes` must begin as the kernel's `union bpf_attr` does for this command, and its pointers must be valid.
unsafe fn bpf<T>(command: i64, attributes: &mut T) -> io::Result<i32> {
    // SAFETY: as the caller promises.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result as i32)
    }
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: a new descriptor that the kernel has just given, owned by nobody else.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
