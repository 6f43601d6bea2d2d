//! Packets in words, for assertions that a person can read: one line per layer, each checksum judged.

use std::fmt::Write as _;
use std::net::IpAddr;

use etherparse::{LaxNetSlice, LaxSlicedPacket, LinkSlice};

use super::{flags, l4_checksum};

/// Panics with both packets described, and the first different byte, unless they are equal byte for byte.
#[track_caller]
pub fn assert_packet_eq(got: &[u8], want: &[u8]) {
    if got == want {
        return;
    }
    let at = got
        .iter()
        .zip(want)
        .position(|(a, b)| a != b)
        .unwrap_or(got.len().min(want.len()));
    panic!(
        "packets differ, first at byte {at}\n--- got ({} bytes)\n{}\n{}--- want ({} bytes)\n{}\n{}",
        got.len(),
        describe(got),
        hex(got),
        want.len(),
        describe(want),
        hex(want),
    );
}

/// A frame with an Ethernet header, in words.
pub fn describe(frame: &[u8]) -> String {
    match LaxSlicedPacket::from_ethernet(frame) {
        Ok(packet) => describe_sliced(&packet),
        Err(error) => format!("not an Ethernet frame: {error}"),
    }
}

/// A packet that starts with its IP header, in words.
pub fn describe_ip(packet: &[u8]) -> String {
    match LaxSlicedPacket::from_ip(packet) {
        Ok(packet) => describe_sliced(&packet),
        Err(error) => format!("not an IP packet: {error}"),
    }
}

fn describe_sliced(packet: &LaxSlicedPacket<'_>) -> String {
    let mut out = String::new();
    if let Some(LinkSlice::Ethernet2(ethernet)) = &packet.link {
        let (src, dst) = (mac(ethernet.source()), mac(ethernet.destination()));
        let _ = writeln!(out, "eth {src} > {dst} type {:#06x}", ethernet.ether_type().0);
    }
    let (src, dst, payload): (IpAddr, IpAddr, _) = match &packet.net {
        Some(LaxNetSlice::Ipv4(ip)) => {
            let h = ip.header();
            let (src, dst) = (h.source_addr().into(), h.destination_addr().into());
            let sum = verdict(h.to_header().calc_header_checksum(), h.header_checksum());
            let _ = write!(
                out,
                "ipv4 {src} > {dst} proto {} ttl {} id {}",
                h.protocol().0,
                h.ttl(),
                h.identification()
            );
            let _ = write!(
                out,
                " tos {:#04x} len {} checksum {sum}",
                (h.dcp().value() << 2) | h.ecn().value(),
                h.total_len()
            );
            if h.dont_fragment() {
                out.push_str(" DF");
            }
            if h.is_fragmenting_payload() {
                let more = if h.more_fragments() { "+" } else { "" };
                let _ = write!(out, " fragment {}{more}", h.fragments_offset().byte_offset());
            }
            if !h.options().is_empty() {
                let _ = write!(out, " options {:02x?}", h.options());
            }
            out.push('\n');
            (src, dst, ip.payload())
        }
        Some(LaxNetSlice::Ipv6(ip)) => {
            let h = ip.header();
            let (src, dst) = (h.source_addr().into(), h.destination_addr().into());
            let _ = write!(
                out,
                "ipv6 {src} > {dst} next {} hops {}",
                h.next_header().0,
                h.hop_limit()
            );
            let _ = write!(
                out,
                " class {:#04x} flow {:#x}",
                h.traffic_class(),
                h.flow_label().value()
            );
            let _ = writeln!(out, " len {}", h.payload_length());
            for extension in ip.extensions().clone() {
                let _ = writeln!(out, "  extension {extension:?}");
            }
            (src, dst, ip.payload())
        }
        Some(LaxNetSlice::Arp(arp)) => return format!("{out}arp {arp:?}"),
        None => return format!("{out}(no IP)"),
    };
    if payload.incomplete {
        out.push_str("(cut short)\n");
    }
    if payload.fragmented && packet.transport.is_none() {
        let _ = write!(out, "fragment of {} bytes", payload.payload.len());
        return out;
    }
    let whole = !payload.incomplete && !payload.fragmented;
    describe_l4(&mut out, src, dst, payload.ip_number.0, payload.payload, whole);
    out
}

/// Parsed by hand: it must also show what is broken, and SCTP, which the library does not know.
fn describe_l4(out: &mut String, src: IpAddr, dst: IpAddr, protocol: u8, bytes: &[u8], whole: bool) {
    let word = |at: usize| bytes.get(at..at + 2).map_or(0, |b| u16::from_be_bytes([b[0], b[1]]));
    let long = |at: usize| u32::from(word(at)) << 16 | u32::from(word(at + 2));
    let checksum = |at: usize| {
        let mut zeroed = bytes.to_vec();
        if !whole || zeroed.len() < at + 2 {
            return format!("{:#06x} (not judged)", word(at));
        }
        zeroed[at..at + 2].fill(0);
        verdict(l4_checksum(src, dst, protocol, &zeroed), word(at))
    };
    let header = match protocol {
        6 => {
            let _ = write!(
                out,
                "tcp {} > {} [{}]",
                word(0),
                word(2),
                flag_names(bytes.get(13).copied().unwrap_or(0))
            );
            let _ = write!(out, " seq {} ack {} window {}", long(4), long(8), word(14));
            let _ = write!(out, " checksum {}", checksum(16));
            usize::from(bytes.get(12).copied().unwrap_or(0) >> 4) * 4
        }
        17 => {
            let sum = if word(6) == 0 { "none".into() } else { checksum(6) };
            let _ = write!(out, "udp {} > {} len {} checksum {sum}", word(0), word(2), word(4));
            8
        }
        132 => {
            let mut zeroed = bytes.to_vec();
            let sum = match zeroed.get_mut(8..12) {
                Some(field) => {
                    let got = u32::from_le_bytes([field[0], field[1], field[2], field[3]]);
                    field.fill(0);
                    let want = crc32c::crc32c(&zeroed);
                    if got == want {
                        "ok".into()
                    } else {
                        format!("BAD ({got:#010x}, correct {want:#010x})")
                    }
                }
                None => "missing".into(),
            };
            let _ = write!(
                out,
                "sctp {} > {} tag {:#010x} checksum {sum}",
                word(0),
                word(2),
                long(4)
            );
            12
        }
        1 | 58 => {
            let (kind, code) = (word(0) >> 8, word(0) & 0xff);
            let name = if protocol == 1 { "icmp" } else { "icmpv6" };
            let _ = write!(
                out,
                "{name} type {kind} code {code} rest {:#010x} checksum {}",
                long(4),
                checksum(2)
            );
            let is_error = if protocol == 1 {
                matches!(kind, 3 | 4 | 5 | 11 | 12)
            } else {
                kind < 128
            };
            if is_error && bytes.len() > 8 {
                for line in describe_ip(&bytes[8..]).lines() {
                    let _ = write!(out, "\n  | {line}");
                }
                return;
            }
            8
        }
        other => {
            let _ = write!(out, "protocol {other}");
            0
        }
    };
    let payload = bytes.get(header..).unwrap_or_default();
    let _ = write!(
        out,
        " payload {} bytes {:?}",
        payload.len(),
        String::from_utf8_lossy(&payload[..payload.len().min(32)])
    );
}

fn verdict(correct: u16, found: u16) -> String {
    if correct == found {
        "ok".into()
    } else {
        format!("BAD ({found:#06x}, correct {correct:#06x})")
    }
}

fn flag_names(bits: u8) -> String {
    let names = [
        (flags::SYN, "SYN"),
        (flags::FIN, "FIN"),
        (flags::RST, "RST"),
        (flags::PSH, "PSH"),
        (flags::ACK, "ACK"),
    ];
    let set: Vec<&str> = names
        .iter()
        .filter(|(bit, _)| bits & bit != 0)
        .map(|(_, name)| *name)
        .collect();
    set.join(" ")
}

fn mac(bytes: [u8; 6]) -> String {
    bytes.map(|b| format!("{b:02x}")).join(":")
}

fn hex(bytes: &[u8]) -> String {
    let mut out = String::new();
    for (i, line) in bytes.chunks(16).enumerate() {
        let _ = writeln!(
            out,
            "  {:04x}  {}",
            i * 16,
            line.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ")
        );
    }
    out
}
