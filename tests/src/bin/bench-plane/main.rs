//! The control plane of large clusters, beside the real kube-proxy: how long a start takes, how long a change, how much memory it is.
//! Called by `cargo xtask bench`; both contenders read the same generated cluster from a stand-in for an API server.
//!
//! One node with two pods; all endpoints are addresses that nobody has, but those that a case gives to a pod.

mod bed;
mod change;
mod contenders;
mod start;

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use proxy_tests::results::{Case, contender};
use proxy_tests::standin::objects::Size;

use self::bed::Bed;
use self::change::Changes;
use self::start::Starts;

#[derive(Parser)]
struct Args {
    /// Services and endpoints of each, as `10000x25`; may be given several times. The first is what targets are about.
    #[arg(long, value_parser = size, default_values = ["10000x25", "50000x5", "100x25"])]
    size: Vec<Size>,
    /// Starts of the agent at each size.
    #[arg(long, default_value_t = 3)]
    starts: u32,
    /// Changes of each kind at each size.
    #[arg(long, default_value_t = 200)]
    changes: u32,
    /// Sizes up to which kube-proxy is measured too, in endpoints of all Services; 0 leaves it out.
    #[arg(long, default_value_t = 250_000)]
    kube_proxy_up_to: u32,
    /// Writes what was found into this folder, one file for each case.
    #[arg(long)]
    out: Option<PathBuf>,
}

fn size(text: &str) -> Result<Size, String> {
    let parsed = text.split_once('x').and_then(|(services, endpoints)| {
        Some(Size {
            services: services.parse().ok()?,
            endpoints: endpoints.parse().ok()?,
        })
    });
    parsed
        .filter(|size| size.services > 0)
        .ok_or_else(|| format!("{text:?} is no size: write 10000x25"))
}

fn main() -> Result<()> {
    let args = Args::parse();
    let mut starts = Starts::default();
    let mut changes = Changes::default();
    for size in &args.size {
        let bed = Bed::new(*size)?;
        for round in 0..args.starts {
            let agent = starts.agent(&bed)?;
            if round + 1 == args.starts {
                changes.agent(&bed, &agent, args.changes)?;
            }
        }
        if size.services * size.endpoints <= args.kube_proxy_up_to {
            let proxy = starts.kube_proxy(&bed)?;
            if let Some(proxy) = proxy {
                changes.kube_proxy(&bed, &proxy, args.changes.min(KUBE_PROXY_CHANGES))?;
            }
        }
    }
    let first = args.size[0];
    let cases: Vec<Case> = starts.cases(first).into_iter().chain(changes.cases(first)).collect();
    for case in &cases {
        print(case);
        if let Some(out) = &args.out {
            case.write(out)?;
        }
    }
    Ok(())
}

fn print(case: &Case) {
    println!("\n{} ({})", case.title, case.unit);
    for row in &case.rows {
        let at = row.at.map(|at| at.to_string()).unwrap_or_default();
        let figures = row.spread().map_or_else(String::new, |spread| {
            format!("{:>10.2} ({:.2} to {:.2})", spread.median, spread.min, spread.max)
        });
        let note = row.note.as_deref().unwrap_or_default();
        println!("  {:<24} {at:>7} {figures} {note}", row.contender);
    }
    for target in &case.targets {
        for (at, verdict) in case.verdicts(target) {
            let Some(verdict) = verdict else { continue };
            let word = if verdict.is_met { "met" } else { "MISSED" };
            println!(
                "  target of {} at {at:?} against {:?}: {:?}, reached {:.4}: {word}",
                target.contender, target.against, target.bound, verdict.reached.median
            );
        }
    }
}

/// A change takes kube-proxy seconds in a large cluster.
const KUBE_PROXY_CHANGES: u32 = 5;
/// The agent as it is by default.
const OURS: &str = "ours";
/// Who it is compared with.
const THEIRS: &str = contender::NFTABLES;
