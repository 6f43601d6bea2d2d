//! `cluster`: builds everything and runs the cluster program of the `tests` crate.

use anyhow::Result;

use crate::shell::{self, step};
use crate::{build, image, setup};

/// Arguments of `cluster`, handed to the program.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Take it down again once everything was shown to work.
    #[arg(long)]
    once: bool,
    /// End the clusters that run on this machine, and remove what killed ones left.
    #[arg(long, conflicts_with = "once")]
    remove: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut command = build::tests_program("cluster", false)?;
    if args.remove {
        // Nothing is started, so nothing has to be built anew.
        return shell::run(command.arg("--remove"));
    }
    setup::for_cluster()?;
    build::ebpf()?;
    let image = image::for_tests()?;
    step("starting the cluster");
    if args.once {
        command.arg("--once");
    }
    shell::run(command.env("PROXY_AGENT_IMAGE", image))
}
