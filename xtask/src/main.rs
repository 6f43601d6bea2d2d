//! The project's tasks, as `cargo xtask VERB`: one file per verb. Every verb runs what it needs first, says what it installs, and
//! can be run again.

mod bench;
mod build;
mod cluster;
mod demo;
mod image;
mod setup;
mod shell;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Tasks of the ebpf-proxy project.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Install what is missing: Debian packages (as root), bpf-linker, the Kubernetes binaries, helm and Prometheus for the
    /// tests, zig for the image.
    Setup,
    /// Compile the eBPF programs, with BTF, into one object.
    BuildEbpf,
    /// Compile the programs and the agent that carries them.
    Build {
        /// Optimised, as it is shipped.
        #[arg(long)]
        release: bool,
    },
    /// Make a container image of the agent, as a file. Needs no registry and no daemon.
    Image(image::Args),
    /// Run every test: lints, unit tests, packets through the programs, namespaces, a real API server. Needs root.
    Test(test::Args),
    /// Two nodes, four pods, real traffic through the real datapath, a table of who answered. Needs root.
    Demo(demo::Args),
    /// Three nodes with real kubelets and containerds, this proxy as a DaemonSet, no kube-proxy. Stays up until Ctrl-C. Needs root.
    Cluster(cluster::Args),
    /// Measure. Needs root.
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().verb {
        Verb::Setup => setup::for_tests(),
        Verb::BuildEbpf => build::ebpf().map(drop),
        Verb::Build { release } => build::agent(release).map(|agent| println!("{}", agent.display())),
        Verb::Image(args) => image::run(&args),
        Verb::Test(args) => test::run(&args),
        Verb::Demo(args) => demo::run(&args),
        Verb::Cluster(args) => cluster::run(&args),
        Verb::Bench(args) => bench::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
