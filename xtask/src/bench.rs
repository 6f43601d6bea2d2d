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
    /// Every contender in the same namespaces, in turn: no proxy, this one in its modes, the real kube-proxy. Prints tables, and writes
    /// docs/performance.md.
    All(All),
    /// Nanoseconds and instructions per packet for each program and case, by program test-run.
    Packet,
    /// From a Service written with kubectl to the first packet that reaches a backend.
    Latency,
    /// Starts, changes and memory in clusters of up to 50,000 Services, beside the real kube-proxy.
    Plane,
}

/// Arguments of `bench all`, handed to the program.
#[derive(clap::Args)]
struct All {
    /// A first impression in a few minutes: fewer repetitions and sizes; the document stays as it is.
    #[arg(long)]
    quick: bool,
    /// Only these cases; the document stays as it is.
    #[arg(long, value_name = "CASE", value_delimiter = ',')]
    cases: Vec<String>,
    /// Only contenders whose names contain one of these, beside the one without a proxy; the document stays as it is.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    contenders: Vec<String>,
    /// Numbers of Services instead of the usual ones, in rising order; the document stays as it is.
    #[arg(long, value_name = "NUMBER", value_delimiter = ',')]
    sizes: Vec<String>,
    /// Name the cases and end.
    #[arg(long)]
    list: bool,
    /// Write the document of all results that are there, whatever was measured now.
    #[arg(long)]
    document: bool,
    /// Measure nothing: only say again what the results are.
    #[arg(long)]
    only_render: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    setup::for_namespaces()?;
    let bin = match &args.what {
        What::All(all) => return run_all(all),
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

/// The programs that `bench` calls for its cases stand beside it.
fn run_all(args: &All) -> Result<()> {
    setup::kubernetes()?;
    let agent = build::agent(true)?;
    let mut programs = build::cargo()?;
    programs.args(["build", "--quiet", "--locked", "--release", "--package", "proxy-tests"]);
    programs.args(["--bin", "bench-packet", "--bin", "bench-plane"]);
    shell::run(&mut programs)?;
    step("measuring");
    let mut command = build::tests_program("bench", true)?;
    for (flag, is_given) in [
        ("--quick", args.quick),
        ("--list", args.list),
        ("--document", args.document),
        ("--only-render", args.only_render),
    ] {
        command.args(Some(flag).filter(|_| is_given));
    }
    for (option, values) in [
        ("--cases", &args.cases),
        ("--contenders", &args.contenders),
        ("--sizes", &args.sizes),
    ] {
        if !values.is_empty() {
            command.arg(option).arg(values.join(","));
        }
    }
    // What a quick run finds must not get among what is written down.
    let results = shell::cache()?.join(if args.quick { "bench-quick" } else { "bench" });
    command.arg("--results").arg(results);
    command.arg("--docs").arg(shell::repository().join("docs"));
    shell::run(command.env("PROXY_AGENT_BIN", agent))
}
