//! `cluster`: builds everything and runs the cluster program of the `tests` crate.

use anyhow::Result;

use crate::shell::{self, step};
use crate::{build, setup};

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
    setup::for_cluster()?;
    let agent = build::agent(false)?;
    step("starting the cluster");
    let mut command = build::cargo()?;
    command.args([
        "run",
        "--quiet",
        "--locked",
        "--package",
        "proxy-tests",
        "--bin",
        "cluster",
        "--",
    ]);
    if args.once {
        command.arg("--once");
    }
    if args.remove {
        command.arg("--remove");
    }
    shell::run(command.env("PROXY_AGENT_BIN", agent))
}
