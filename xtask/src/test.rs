//! `test`: lints, then every test there is. Tests that need root, the BPF file system or namespaces run for real.

use anyhow::Result;

use crate::shell::{self, step};
use crate::{build, image, setup};

/// Arguments of `test`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only tests whose name contains this.
    filter: Option<String>,
    /// Leave out formatting and clippy.
    #[arg(long)]
    no_lint: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    setup::for_tests()?;
    let next_agent = build::next_agent()?;
    let agent = build::agent(false)?;
    let image = image::for_tests()?;
    if !args.no_lint {
        lint()?;
    }
    step("running the tests");
    let mut command = build::cargo()?;
    command.args([
        "test",
        "--quiet",
        "--locked",
        "--workspace",
        "--exclude",
        "proxy-ebpf",
        "--no-fail-fast",
    ]);
    command.env("PROXY_AGENT_BIN", agent).env("PROXY_AGENT_IMAGE", image);
    command.env("PROXY_AGENT_NEXT_BIN", next_agent);
    command.arg("--").args(args.filter.as_deref());
    shell::run(&mut command)
}

fn lint() -> Result<()> {
    step("checking format and lints");
    shell::run(build::cargo()?.args(["fmt", "--all", "--check"]))?;
    let clippy = ["clippy", "--quiet", "--locked"];
    let deny = ["--", "-D", "warnings"];
    shell::run(
        build::cargo()?
            .args(clippy)
            .args(["--workspace", "--exclude", "proxy-ebpf", "--all-targets"])
            .args(deny),
    )?;
    // Its profile aborts on panic, without which a program without the standard library cannot even be checked on the host.
    shell::run(
        build::cargo()?
            .args(clippy)
            .args(["--package", "proxy-ebpf", "--profile", "ebpf"])
            .args(deny),
    )
}
