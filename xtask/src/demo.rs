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
    /// Have Prometheus scrape both nodes, and show instead what every panel of the dashboard and every alert says. It is built once,
    /// with Go.
    #[arg(long, conflicts_with = "kubeconfig")]
    prometheus: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    setup::for_namespaces()?;
    if args.prometheus {
        setup::prometheus()?;
    }
    let agent = build::agent(false)?;
    step("starting the demo");
    let mut command = build::tests_program("demo", false)?;
    if args.keep {
        command.arg("--keep");
    }
    if args.prometheus {
        command.arg("--prometheus");
    }
    if let Some(kubeconfig) = &args.kubeconfig {
        command.arg("--kubeconfig").arg(std::path::absolute(kubeconfig)?);
    }
    shell::run(command.env("PROXY_AGENT_BIN", agent))
}
