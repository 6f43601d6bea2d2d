//! Programs that belong to the bench: a source of packets, and a sink that counts them. Written in instructions, since they are a dozen
//! each; loaded and attached as [`proxy_tests::xdp`] does it.

use std::io;

use proxy_tests::xdp::{BPF_PROG_TYPE_XDP, Counter, Foreign, Insn, XDP_DROP, XDP_PASS, insn};

/// Ports that the source's packets come from, so that many: a power of two.
const FLOWS: u16 = 256;
const FIRST_PORT: u16 = 0x8000;
/// Length of the source's packets: the smallest Ethernet has, without its checksum.
pub(crate) const FRAME: usize = 60;
/// Offsets in an Ethernet frame with IPv4 without options and UDP.
const ETHERTYPE: i16 = 12;
const PROTOCOL: i16 = 23;
const SRC_PORT: i16 = 34;
const PAYLOAD: i16 = 42;

const MOVE: u8 = 0xb7;
const MOVE_REGISTER: u8 = 0xbf;
const ADD: u8 = 0x07;
const AND: u8 = 0x57;
const XOR: u8 = 0xa7;
const TO_BE: u8 = 0xdc;
const LOAD1: u8 = 0x71;
const LOAD2: u8 = 0x69;
const LOAD4: u8 = 0x61;
const LOAD8: u8 = 0x79;
const STORE2: u8 = 0x6b;
const STORE8: u8 = 0x7b;
const STORE4_VALUE: u8 = 0x62;
const IF_NOT_LESS: u8 = 0x3d;
const IF_EQUAL: u8 = 0x15;
const IF_OTHER: u8 = 0x55;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const GET_PRANDOM_U32: i32 = 7;
const REDIRECT: i32 = 23;

/// r2 and r7 are the packet, which has at least `length` bytes, or else the program ends with `otherwise`.
fn packet_of(length: i32, otherwise: i32) -> Vec<Insn> {
    vec![
        insn(LOAD4, 2, 1, 0, 0),
        insn(LOAD4, 3, 1, 4, 0),
        insn(MOVE_REGISTER, 7, 2, 0, 0),
        insn(MOVE_REGISTER, 4, 2, 0, 0),
        insn(ADD, 4, 0, 0, length),
        insn(MOVE, 0, 0, 0, otherwise),
        insn(IF_NOT_LESS, 3, 4, 1, 0),
        insn(EXIT, 0, 0, 0, 0),
    ]
}

/// What is not IPv4 with UDP is passed on: above all the neighbours' requests.
fn only_udp() -> [Insn; 6] {
    let ipv4 = i32::from(0x0800_u16.to_be());
    [
        insn(MOVE, 0, 0, 0, XDP_PASS),
        insn(LOAD2, 5, 2, ETHERTYPE, 0),
        insn(IF_OTHER, 5, 0, 2, ipv4),
        insn(LOAD1, 5, 2, PROTOCOL, 0),
        insn(IF_EQUAL, 5, 0, 1, libc::IPPROTO_UDP),
        insn(EXIT, 0, 0, 0, 0),
    ]
}

/// Fills every frame with `frame`, from a source port of [`FLOWS`], and sends it to an interface.
///
/// The whole frame is written each time, because frames come back as they were left. `frame` comes from [`FIRST_PORT`], and the first
/// two bytes of its payload are the port's complement; so a change of both leaves the checksum right.
pub(crate) fn source(frame: &[u8; FRAME], interface: u32) -> io::Result<Foreign> {
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
        insn(MOVE, 1, 0, 0, interface as i32),
        insn(MOVE, 2, 0, 0, 0),
        insn(CALL, 0, 0, 0, REDIRECT),
        insn(EXIT, 0, 0, 0, 0),
    ]);
    Foreign::load(BPF_PROG_TYPE_XDP, &insns)
}

/// The port that a frame for [`source`] comes from, and how its payload begins.
pub(crate) fn source_port() -> (u16, [u8; 2]) {
    (FIRST_PORT, (!FIRST_PORT).to_be_bytes())
}

/// Counts UDP and drops it.
pub(crate) fn sink(counter: &Counter) -> io::Result<Foreign> {
    let mut insns = packet_of(PAYLOAD.into(), XDP_PASS);
    insns.extend(only_udp());
    insns.extend(counter.address_in(1));
    insns.extend([
        // One queue, so one processor at a time: no atomic addition.
        insn(LOAD8, 2, 1, 0, 0),
        insn(ADD, 2, 0, 0, 1),
        insn(STORE8, 1, 2, 0, 0),
        insn(MOVE, 0, 0, 0, XDP_DROP),
        insn(EXIT, 0, 0, 0, 0),
    ]);
    Foreign::load(BPF_PROG_TYPE_XDP, &insns)
}
