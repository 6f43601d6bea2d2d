//! `demo`: builds everything and runs the demo program of the `tests` crate.

use anyhow::Result;

use crate::shell::{self, step};
use crate::{build, setup};

/// Arguments of `demo`, handed to the program.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Leave the two nodes standing, and say how to look around.
    #[arg(long)]
    keep: bool,
    /// Take the objects from this API server instead of a folder of manifests.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<std::path::PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    setup::for_namespaces()?;
    let agent = build::agent(false)?;
    step("starting the demo");
    let mut command = build::tests_program("demo", false)?;
    if args.keep {
        command.arg("--keep");
    }
    if let Some(kubeconfig) = &args.kubeconfig {
        command.arg("--kubeconfig").arg(std::path::absolute(kubeconfig)?);
    }
    shell::run(command.env("PROXY_AGENT_BIN", agent))
}
