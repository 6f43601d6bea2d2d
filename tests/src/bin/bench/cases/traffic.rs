//! The cases that send traffic, on one site: it grows from one Service to the largest size, and everything that does not depend on the
//! number of Services is measured on the way.

use std::time::Duration;

use anyhow::Result;
use proxy_tests::results::Case;

use super::{connections, packets, streams};
use crate::Run;
use crate::contenders::Kind;
use crate::site::Site;

/// Their names.
pub(crate) const CASES: &[&str] = &[
    connections::RATE_CLUSTER_IP,
    connections::RATE_NODE_PORT,
    connections::MEDIAN_CLUSTER_IP,
    connections::TAIL_CLUSTER_IP,
    connections::MEDIAN_NODE_PORT,
    connections::TAIL_NODE_PORT,
    connections::FIRST_PACKET,
    streams::CLUSTER_IP,
    streams::NODE_PORT,
    packets::CLUSTER_IP,
    packets::NODE_PORT,
    packets::CPU,
];

/// Numbers of Services, by scale.
const SIZES: [&[u32]; 3] = [&[1, 1_000, 10_000, 50_000], &[1, 1_000], &[1, 100]];
/// Seconds that a proxy may take for a size that is new to it.
const PROGRAMMING: [u64; 3] = [180, 20, 20];

/// Measures them.
pub(crate) fn run(run: &Run) -> Result<Vec<Case>> {
    let mut connections = connections::Connections::new(run);
    let mut streams = streams::Streams::new();
    let mut packets = packets::Packets::new(run);
    let mut kinds = Kind::all()?;
    // It serves nobody but the flood.
    kinds.retain(|kind| *kind != Kind::XdpSwap || packets.is_wanted());
    kinds.retain(|kind| run.wants_contender(kind.name()));
    let mut site = Site::new(run, &kinds)?;
    let (sizes, limit): (&[u32], _) = if run.sizes.is_empty() {
        (run.pick(SIZES), run.pick(PROGRAMMING))
    } else {
        (&run.sizes, PROGRAMMING[0])
    };
    let limit = Duration::from_secs(limit);
    let largest = if connections.is_wanted() { sizes.len() } else { 1 };
    for size in &sizes[..largest] {
        site.grow(run, *size, limit)?;
        connections.measure(run, &site, *size)?;
        if *size == sizes[0] {
            streams.measure(run, &site)?;
            packets.measure(run, &site)?;
        }
    }
    let cases = [connections.finish(), streams.finish(), packets.finish()];
    let wanted = cases.into_iter().flatten().filter(|case| run.wants(&case.name));
    Ok(wanted.collect())
}

/// Everybody takes a turn, and again, each time with another one first.
pub(crate) fn in_turn(run: &Run, site: &Site, rounds: usize, mut turn: impl FnMut(usize)) -> Result<()> {
    let count = site.contenders.len();
    for round in 0..rounds {
        for step in 0..count {
            run.check()?;
            turn((round + step) % count);
        }
    }
    Ok(())
}
