//! `bench`: measurements, which are never part of the tests. Ratios within one run on one machine are what counts.

use anyhow::Result;

use crate::shell::{self, step};
use crate::{build, setup};

/// Arguments of `bench`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Nanoseconds and instructions per packet for each program and case, by program test-run.
    Packet,
    /// From a Service written with kubectl to the first packet that reaches a backend.
    Latency,
    /// Starts, changes and memory in clusters of up to 50,000 Services, beside the real kube-proxy.
    Plane,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    setup::for_namespaces()?;
    let bin = match args.what {
        What::Packet => "bench-packet",
        What::Latency => {
            setup::kubernetes()?;
            "bench-latency"
        }
        What::Plane => {
            setup::kubernetes()?;
            "bench-plane"
        }
    };
    let agent = build::agent(true)?;
    step(&format!("measuring ({bin})"));
    let mut command = build::tests_program(bin, true)?;
    shell::run(command.env("PROXY_AGENT_BIN", agent))
}
