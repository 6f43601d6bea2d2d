//! `cargo xtask bench packet`: nanoseconds and instructions per packet for each program and case, by program test-run.
//!
//! The figures are those of one run on one machine; ratios between the rows are what can be compared. So the first rows are what a tc
//! program costs at least: one that does nothing, and one that looks a key up in the rewrite table and does nothing else
//! ([`reference::look_up`]). An established packet's row says how many times that program, with this packet's key, it costs; both are
//! measured in turn. Instructions are counted with the processor's counter around the whole run where the machine has one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result, bail, ensure};
use perf_event::Builder;
use perf_event::events::Hardware;
use proxy_common::addr::{Addr4, Addr6, Address, Port, Protocol};
use proxy_common::names::{TC_EGRESS, TC_INGRESS, XDP_FORWARD};
use proxy_common::rewrite::{
    HOOK_EGRESS, HOOK_INGRESS, KIND_MASQUERADE, KIND_REPLY, KIND_REQUEST, KIND_UNMASQUERADE, Meta, REWRITE_MASQUERADED,
    RewriteKey,
};
use proxy_common::settings::{Prefix, Settings};
use proxy_tests::cards::Cards;
use proxy_tests::programs::{Constants, Programs, XDP_PASS, XDP_TX};
use proxy_tests::reference;
use proxy_tests::wire::{End, L4, Tcp, packet, with_hops};
use proxy_tests::xdp::Foreign;

/// Packets of one measurement, and measurements of which the fastest counts: everything slower was disturbed.
const PACKETS: u32 = 1_000_000;
const ROUNDS: usize = 5;
/// New connections of one measurement: each needs a packet of its own.
const CONNECTIONS: u16 = 20_000;
/// Packets of one run at XDP, those at its beginning that do not count, and runs: each makes the kernel patch its code twice, which takes
/// longer than the run and leaves caches cold.
const XDP_PACKETS: u32 = 250;
const XDP_COLD: u32 = 50;
const XDP_RUNS: usize = 100;
/// The interface, and one that a packet arrived by.
const LO: u32 = 1;
const FORWARDED: u32 = 7;

fn main() -> Result<()> {
    println!(
        "{:<44} {:>10} {:>9} {:>14}",
        "program and case", "ns/packet", "look-ups", "instructions"
    );
    let mut programs = Programs::load(Constants::default())?;
    let empty = reference::empty()?;
    let bytes = packet(
        L4::Udp,
        end(Addr4([10, 244, 1, 5]), 1),
        end(Addr4([10, 244, 2, 7]), 9),
        &[0; 32],
    );
    row("an empty program", best_of(|| referred(&empty, &bytes))?, None);
    measure::<Addr4>(&mut programs, "IPv4", ["10.244.1.5", "10.96.0.10", "10.244.2.7"])?;
    measure::<Addr6>(
        &mut programs,
        "IPv6",
        ["fd00:10:244:1::5", "fd00:96::a", "fd00:10:244:2::7"],
    )?;
    measure_xdp::<Addr4>(
        "IPv4",
        ["192.0.2.9", "192.0.2.10", "10.96.0.10", "10.244.2.7", "192.168.56.1"],
    )?;
    measure_xdp::<Addr6>(
        "IPv6",
        [
            "2001:db8::9",
            "2001:db8::a",
            "fd00:96::a",
            "fd00:10:244:2::7",
            "fd00:56::1",
        ],
    )?;
    if counter().is_none() {
        println!("(instructions: this machine has no hardware counter for them)");
    }
    Ok(())
}

/// All rows of a family; the addresses are client, frontend and backend.
fn measure<A: Address>(programs: &mut Programs, family: &str, addrs: [&str; 3]) -> Result<()> {
    let [client, vip, backend] = addrs.map(|text| text.parse::<IpAddr>().ok().and_then(A::from_ip));
    let (client, vip, backend) = (
        client.context("client")?,
        vip.context("frontend")?,
        backend.context("backend")?,
    );
    // As in a cluster, the service network is known; here it is one address.
    let mask = A::from_ip(if A::FAMILY == 4 {
        IpAddr::V4(Ipv4Addr::BROADCAST)
    } else {
        IpAddr::V6(Ipv6Addr::from(u128::MAX))
    });
    let mask = mask.context("mask")?;
    programs.change_settings(|settings: &mut Settings<A>| {
        settings.networks[0] = Prefix {
            addr: vip,
            mask,
            set: 1,
        };
    });
    let key = RewriteKey::new(client, Port::new(40_000), vip, Port::new(80), 6, HOOK_INGRESS);
    ping_pong(programs, key, backend, 8080);
    let look_up = reference::look_up(programs.rewrite_table::<A>(), bytemuck::bytes_of(&key))?;
    let bytes = packet(L4::Tcp(Tcp::Ack), end(client, 40_000), end(vip, 80), &[0; 32]);
    let name = format!("{family} one look-up in the rewrite table");
    row(&name, best_of(|| referred(&look_up, &bytes))?, None);
    for (service, protocol, known, first) in [
        (1, Protocol::Tcp, L4::Tcp(Tcp::Ack), L4::Tcp(Tcp::Syn)),
        (2, Protocol::Udp, L4::Udp, L4::Udp),
    ] {
        programs.add_service(service, vip, 80, protocol, &[(backend, 8080)]);
        for (program, hook) in [(TC_INGRESS, HOOK_INGRESS), (TC_EGRESS, HOOK_EGRESS)] {
            for (case, backend_port) in [("established, same port", 80), ("established", 8080)] {
                let name = format!("{family} {protocol} {program}, {case}");
                let key = RewriteKey::new(client, Port::new(40_000), vip, Port::new(80), protocol.number(), hook);
                ping_pong(programs, key, backend, backend_port);
                let bytes = packet(known, end(client, 40_000), end(vip, 80), &[0; 32]);
                let look_up = reference::look_up(programs.rewrite_table::<A>(), bytemuck::bytes_of(&key))?;
                let mut least = f64::MAX;
                let cost = best_of(|| {
                    least = least.min(referred(&look_up, &bytes)?.0);
                    Ok(repeated(programs, program, &bytes))
                })?;
                row(&name, cost, Some(cost.0 / least));
            }
            let foreign = packet(known, end(client, 40_001), end(backend, 9), &[0; 32]);
            let cost = best_of(|| Ok(repeated(programs, program, &foreign)))?;
            row(&format!("{family} {protocol} {program}, not ours"), cost, None);
        }
        let mut times: Vec<u128> = (0..CONNECTIONS)
            .map(|port| {
                let bytes = packet(first, end(client, 10_000 + port), end(vip, 80), b"");
                programs.repeat(TC_INGRESS, &bytes, LO, FORWARDED, 1).2
            })
            .collect();
        // One in two: a mean would be that of the interrupts among them.
        times.sort_unstable();
        let median = times.get(times.len() / 2).copied().unwrap_or_default() as f64;
        row(&format!("{family} {protocol} {TC_INGRESS}, new"), (median, None), None);
    }
    Ok(())
}

/// The rows of XDP, beside a program that swaps addresses and returns the packet. The addresses are two clients, frontend, backend, node.
fn measure_xdp<A: Address>(family: &str, addrs: [&str; 5]) -> Result<()> {
    let addrs = addrs.map(|text| text.parse::<IpAddr>().ok().and_then(A::from_ip));
    let [Some(client), Some(other), Some(vip), Some(backend), Some(node)] = addrs else {
        bail!("an address is not of the family");
    };
    let cards = Cards::new()?;
    // What is forwarded has the next hop's hardware address. It is our own here, or the next run would not take the packet.
    for neighbour in ["192.168.56.20", "fd00:56::20"] {
        cards
            .netns
            .ip(&format!("neigh replace {neighbour} lladdr 02:00:00:00:00:02 dev eth0"))?;
    }
    cards.netns.run(|| {
        let mut programs = Programs::load(Constants::default())?;
        cards.make_known(&mut programs, true);
        for (protocol, known) in [(Protocol::Tcp, L4::Tcp(Tcp::Ack)), (Protocol::Udp, L4::Udp)] {
            let key = |src: (A, u16), dst: (A, u16), hook| {
                let (src_port, dst_port) = (Port::new(src.1), Port::new(dst.1));
                RewriteKey::new(src.0, src_port, dst.0, dst_port, protocol.number(), hook)
            };
            // A packet that goes through the first pair of entries goes through the second pair in the next run, and is as it was.
            let (asked, given) = (((client, 40_000), (vip, 80)), ((node, 40_000), (backend, 8080)));
            for (first, between, last, kinds) in [
                (asked, (client, 40_000), given, [KIND_REQUEST, KIND_MASQUERADE]),
                (given, (other, 40_000), asked, [KIND_UNMASQUERADE, KIND_REPLY]),
            ] {
                let routed = (between, (backend, 8080));
                for ((from, to), hook, kind) in [
                    ((first, routed), HOOK_INGRESS, kinds[0]),
                    ((routed, last), HOOK_EGRESS, kinds[1]),
                ] {
                    let key = key(from.0, from.1, hook);
                    let is_service = kind == KIND_REQUEST || kind == KIND_REPLY;
                    let meta = Meta {
                        service: 1,
                        kind,
                        flags: if is_service { REWRITE_MASQUERADED } else { 0 },
                        ..Meta::default()
                    };
                    let (src, dst) = to;
                    let rewrite = key.rewrite_to(src.0, Port::new(src.1), dst.0, Port::new(dst.1), meta);
                    programs.set_rewrite(key, rewrite);
                }
            }
            let bytes = packet(known, end(client, 40_000), end(vip, 80), &[0; 32]);
            let foreign = packet(known, end(client, 40_001), end(backend, 9), &[0; 32]);
            for (case, bytes, verdict) in [("established", &bytes, XDP_TX), ("not ours", &foreign, XDP_PASS)] {
                let run = |bytes: &[u8], packets| {
                    let (got, _, nanoseconds) = programs.repeat_xdp(bytes, cards.first, packets);
                    ensure!(got == verdict, "{case}: verdict {got} in the last run");
                    Ok(nanoseconds as f64)
                };
                row(
                    &format!("{family} {protocol} {XDP_FORWARD}, {case}"),
                    (median_of_runs(bytes, run)?, None),
                    None,
                );
            }
        }
        let swap = Foreign::swap()?;
        let bytes = packet(L4::Udp, end(client, 40_000), end(node, 80), &[0; 32]);
        let run = |bytes: &[u8], packets| Ok(f64::from(swap.run(bytes, packets)?.2));
        row(
            &format!("{family} UDP addresses swapped at XDP, for reference"),
            (median_of_runs(&bytes, run)?, None),
            None,
        );
        Ok(())
    })
}

/// The median of many short runs: a packet has 255 hops at most, and each forwarding takes one. Gives a packet's time behind the cold
/// beginning, by a second, shorter run.
fn median_of_runs(bytes: &[u8], run: impl Fn(&[u8], u32) -> Result<f64>) -> Result<f64> {
    let bytes = with_hops(bytes, u8::MAX);
    let total = |packets: u32| Ok::<_, anyhow::Error>(run(&bytes, packets)? * f64::from(packets));
    let warm = || Ok((total(XDP_PACKETS)? - total(XDP_COLD)?) / f64::from(XDP_PACKETS - XDP_COLD));
    let mut times = (0..XDP_RUNS).map(|_| warm()).collect::<Result<Vec<_>>>()?;
    times.sort_unstable_by(f64::total_cmp);
    Ok(times.get(times.len() / 2).copied().unwrap_or_default())
}

fn end<A: Address>(addr: A, port: u16) -> End {
    (addr.into(), port)
}

/// Test-run feeds the same buffer again and again, and a rewrite changes it. So one entry rewrites the packet and a second one
/// turns it back: every run is a hit.
fn ping_pong<A: Address>(programs: &mut Programs, key: RewriteKey<A>, backend: A, port: u16) {
    let meta = |kind| Meta {
        service: 1,
        kind,
        ..Meta::default()
    };
    let there = key.rewrite_to(key.src, key.src_port, backend, Port::new(port), meta(KIND_REQUEST));
    let changed = RewriteKey::new(
        there.src,
        there.src_port,
        there.dst,
        there.dst_port,
        key.protocol,
        key.hook,
    );
    let back = changed.rewrite_to(key.src, key.src_port, key.dst, key.dst_port, meta(KIND_REPLY));
    programs.set_rewrite(key, there);
    programs.set_rewrite(changed, back);
}

/// Nanoseconds of a packet, and instructions where they can be counted.
type Cost = (f64, Option<f64>);

/// The fastest of all rounds.
fn best_of(mut round: impl FnMut() -> Result<Cost>) -> Result<Cost> {
    let mut best = (f64::MAX, None);
    for _ in 0..ROUNDS {
        let cost = round()?;
        if cost.0 < best.0 {
            best = cost;
        }
    }
    Ok(best)
}

/// One round of a reference program over one packet.
fn referred(program: &Foreign, bytes: &[u8]) -> Result<Cost> {
    Ok((f64::from(program.run(bytes, PACKETS)?.2), None))
}

/// One round of a program over one packet.
fn repeated(programs: &Programs, program: &str, bytes: &[u8]) -> Cost {
    let mut counter = counter();
    if let Some(counter) = &mut counter {
        let _still_none = counter.enable();
    }
    let nanoseconds = programs.repeat(program, bytes, LO, FORWARDED, PACKETS).2 as f64;
    let instructions = counter.and_then(|mut counter| counter.read().ok()).filter(|n| *n > 0);
    (nanoseconds, instructions.map(|n| n as f64 / f64::from(PACKETS)))
}

/// The processor's instruction counter for this thread, kernel included, where there is one.
fn counter() -> Option<perf_event::Counter> {
    Builder::new(Hardware::INSTRUCTIONS)
        .exclude_kernel(false)
        .exclude_hv(false)
        .build()
        .ok()
}

fn row(name: &str, (nanoseconds, instructions): Cost, look_ups: Option<f64>) {
    let instructions = instructions.map_or_else(|| "-".to_owned(), |n| format!("{n:.0}"));
    let look_ups = look_ups.map_or_else(String::new, |n| format!("{n:.2}"));
    println!("{name:<44} {nanoseconds:>10.1} {look_ups:>9} {instructions:>14}");
}
