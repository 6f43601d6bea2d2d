//! The least that a tc program can do, to compare the real ones with: nothing, and one look-up in the rewrite table.
//!
//! Written in instructions, so that a compiler adds nothing to what is measured. The look-up is in the table of the programs it is compared
//! with, so map, key and occupancy are the same.

use std::io::{self, Error, ErrorKind};
use std::os::fd::{AsFd as _, AsRawFd as _};

use aya::maps::Map;

use crate::programs::PASS;
use crate::xdp::{Foreign, end, insn};

const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;

/// Lets every packet pass: what the call of any program costs.
pub fn empty() -> io::Result<Foreign> {
    Foreign::load(BPF_PROG_TYPE_SCHED_CLS, &end(PASS))
}

/// Looks `key` up in a hash map and lets the packet pass. Nothing is read of the packet; the key stands in the program, which puts it on
/// its stack in words of four bytes. Its length is a multiple of that.
pub fn look_up(map: &Map, key: &[u8]) -> io::Result<Foreign> {
    let (Map::LruHashMap(data) | Map::HashMap(data)) = map else {
        return Err(Error::new(ErrorKind::InvalidInput, "not a hash map"));
    };
    let start = -(key.len() as i16);
    let words = key.chunks_exact(4).map(bytemuck::pod_read_unaligned);
    // *(u32 *)(r10 + offset) = word
    let mut program: Vec<_> = (start..0)
        .step_by(4)
        .zip(words)
        .map(|(offset, word)| insn(0x62, 10, 0, offset, word))
        .collect();
    program.extend([
        // r2 = r10 + start
        insn(0xbf, 2, 10, 0, 0),
        insn(0x07, 2, 0, 0, start.into()),
        // r1 = the map of this descriptor (BPF_PSEUDO_MAP_FD); an instruction of two words
        insn(0x18, 1, 1, 0, data.fd().as_fd().as_raw_fd()),
        insn(0, 0, 0, 0, 0),
        // bpf_map_lookup_elem
        insn(0x85, 0, 0, 0, 1),
    ]);
    program.extend(end(PASS));
    Foreign::load(BPF_PROG_TYPE_SCHED_CLS, &program)
}
