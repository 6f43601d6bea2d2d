//! The command line: what can be said, and the one place that reads arguments and environment. What the words mean is decided in
//! [`crate::config`].

mod migrate;
mod tools;
mod trace;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::config::{BPF_DIR_VARIABLE, DEFAULT_BPF_DIR, Remarks, RunArgs, RunConfig};
use crate::dry_run::dry_run;
use crate::inspect::{self, Filter, Output, Sort, Top, TopOptions};
use crate::{datapath, duration, run};

/// The client reports what the watches report again, and better.
const QUIET: &str = "kube_client::client=off";

/// An eBPF service proxy for Kubernetes: does on every node what kube-proxy does, under any CNI plugin.
#[derive(Parser, Debug)]
#[command(
    name = "proxy-agent",
    version,
    after_help = "With options alone, as kube-proxy is called, it runs: proxy-agent --config=/var/lib/kube-proxy/config.conf"
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run the agent of this node.
    ///
    /// It keeps the maps and programs in step with the cluster until it is stopped. What is pinned goes on forwarding after
    /// that; `cleanup` removes it.
    #[command(
        after_help = "Example:\n  proxy-agent run --node-name node-a --manifests ./manifests --cluster-cidr 10.244.0.0/16,fd00:10::/56"
    )]
    Run(Box<RunCommand>),
    /// Print the configuration that `run` would have with the same options, as YAML for `--config`.
    #[command(after_help = "Example:\n  proxy-agent config --config /var/lib/kube-proxy/config.conf")]
    Config(Box<RunArgs>),
    /// Show services as the kernel has them.
    #[command(subcommand)]
    Service(ServiceCommand),
    /// Show backends as the kernel has them.
    #[command(subcommand)]
    Backend(BackendCommand),
    /// Show translated connections.
    #[command(subcommand)]
    Connection(ConnectionCommand),
    /// Show which services and backends are busy, again and again until interrupted.
    #[command(after_help = "Example:\n  proxy-agent top --sort packets -n 10\n  proxy-agent top --once -o json")]
    Top(TopArgs),
    /// Remove every program, map and pin of an agent that does not run any more.
    ///
    /// With --drain, the way back to kube-proxy, which has to run again: new connections are left to it, and those that this proxy
    /// translates go on until they end or the time is over. What an interrupted one leaves, the next one finishes.
    #[command(
        after_help = "Examples:\n  proxy-agent cleanup --bpf-dir /sys/fs/bpf/ebpf-proxy\n  proxy-agent cleanup --drain --timeout 1h"
    )]
    Cleanup {
        #[command(flatten)]
        pins: Pins,
        /// Wait for the end of running connections.
        #[arg(long)]
        drain: bool,
        /// How long.
        #[arg(long, value_name = "DURATION", default_value = "10m", requires = "drain")]
        timeout: String,
    },
    /// Go from kube-proxy to this proxy on this node, step by step. Without a step: `check`.
    #[command(
        after_help = "Examples:\n  proxy-agent migrate --kubeconfig /etc/kubernetes/proxy.conf\n  proxy-agent migrate remove-rules --wait 1h"
    )]
    Migrate(Box<migrate::MigrateCommand>),
    #[command(flatten)]
    Tool(tools::Tool),
}

#[derive(Subcommand, Debug)]
enum ServiceCommand {
    /// List service ports with their frontends and backends.
    #[command(after_help = "Example:\n  proxy-agent service list --namespace kube-system -o wide")]
    List {
        #[command(flatten)]
        view: View,
        #[command(flatten)]
        filter: FilterArgs,
    },
    /// Show the ports of one Service.
    #[command(after_help = "Example:\n  proxy-agent service get kube-system/kube-dns -o yaml")]
    Get {
        /// The Service, as namespace/name; without a slash in the namespace `default`.
        service: String,
        #[command(flatten)]
        view: View,
    },
}

#[derive(Subcommand, Debug)]
enum BackendCommand {
    /// List the backends of service ports.
    #[command(after_help = "Example:\n  proxy-agent backend list --service default/web")]
    List {
        #[command(flatten)]
        view: View,
        #[command(flatten)]
        filter: FilterArgs,
    },
}

#[derive(Subcommand, Debug)]
enum ConnectionCommand {
    /// List the rewrite entries of connections.
    #[command(after_help = "Example:\n  proxy-agent connection list --service default/web -o json")]
    List {
        #[command(flatten)]
        view: View,
        #[command(flatten)]
        filter: FilterArgs,
    },
}

#[derive(Args, Debug)]
struct RunCommand {
    #[command(flatten)]
    args: RunArgs,
    /// Read the objects once, print what would be programmed, and exit. Changes nothing and needs no rights but to read.
    #[arg(long)]
    dry_run: bool,
    /// How to print it.
    #[arg(short, long, value_enum, default_value = "table", requires = "dry_run")]
    output: OutputArg,
}

#[derive(Args, Debug)]
struct Pins {
    /// Directory on a BPF file system where this agent's maps, programs and links are pinned.
    #[arg(long, value_name = "DIR", env = BPF_DIR_VARIABLE, default_value = DEFAULT_BPF_DIR)]
    bpf_dir: PathBuf,
}

#[derive(Args, Debug)]
struct View {
    #[command(flatten)]
    pins: Pins,
    /// How to print it.
    #[arg(short, long, value_enum, default_value = "table")]
    output: OutputArg,
}

#[derive(Args, Debug)]
struct TopArgs {
    #[command(flatten)]
    view: View,
    /// Time between two looks.
    #[arg(long, value_name = "DURATION", default_value = "1s")]
    interval: String,
    /// Print one table, after one interval.
    #[arg(long)]
    once: bool,
    /// What services are ordered by, the highest first.
    #[arg(long, value_enum, default_value = "bytes")]
    sort: SortArg,
    /// Rows of each table.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 20)]
    rows: usize,
    /// Only this Service, as namespace/name.
    #[arg(long, value_name = "NAMESPACE/NAME")]
    service: Option<String>,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
enum SortArg {
    Bytes,
    Packets,
    Connections,
    Refused,
    Dropped,
    Name,
}

#[derive(Args, Debug)]
struct FilterArgs {
    /// Only this namespace.
    #[arg(short, long, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// Only this Service, as namespace/name.
    #[arg(long, value_name = "NAMESPACE/NAME", conflicts_with = "namespace")]
    service: Option<String>,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
enum OutputArg {
    Table,
    Wide,
    Json,
    Yaml,
}

impl From<OutputArg> for Output {
    fn from(arg: OutputArg) -> Self {
        match arg {
            OutputArg::Table => Self::Table,
            OutputArg::Wide => Self::Wide,
            OutputArg::Json => Self::Json,
            OutputArg::Yaml => Self::Yaml,
        }
    }
}

/// Does what the command line says.
pub fn main() -> ExitCode {
    match execute(Cli::parse_from(with_command(std::env::args_os())).command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("proxy-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// kube-proxy has no subcommands: options without one are those of `run`.
fn with_command(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut args: Vec<OsString> = args.collect();
    let first = args.get(1).and_then(|arg| arg.to_str());
    if first.is_some_and(|arg| arg.starts_with('-') && !matches!(arg, "-h" | "--help" | "-V" | "--version")) {
        args.insert(1, "run".into());
    }
    args
}

fn execute(command: Command) -> anyhow::Result<ExitCode> {
    let text = match command {
        Command::Run(command) => run(&command)?,
        Command::Tool(tool) => {
            let (text, code) = tool.execute()?;
            return print(&text).map(|_| code);
        }
        Command::Migrate(command) => {
            let (text, code) = command.execute()?;
            return print(&text).map(|_| code);
        }
        Command::Config(args) => {
            let (config, remarks) = RunConfig::from_args(&args)?;
            warn(&remarks);
            config.to_yaml()
        }
        Command::Cleanup { pins, drain, timeout } => {
            let parsed = duration::parse(&timeout);
            let parsed = parsed.with_context(|| format!("--timeout {timeout:?}: write a time, such as 10m or 1h"))?;
            if drain {
                migrate::warn_without_kube_proxy();
            }
            cleanup(&pins.bpf_dir, Some(parsed).filter(|_| drain))?
        }
        Command::Service(ServiceCommand::List { view, filter }) => {
            inspect::services(&view.pins.bpf_dir, &filter.filter()?, view.output.into())?
        }
        Command::Service(ServiceCommand::Get { service, view }) => {
            let (namespace, name) = one_service(&service)?;
            inspect::service(&view.pins.bpf_dir, namespace, name, view.output.into())?
        }
        Command::Backend(BackendCommand::List { view, filter }) => {
            inspect::backends(&view.pins.bpf_dir, &filter.filter()?, view.output.into())?
        }
        Command::Connection(ConnectionCommand::List { view, filter }) => {
            inspect::connections(&view.pins.bpf_dir, &filter.filter()?, view.output.into())?
        }
        Command::Top(args) => return top(&args).map(|()| ExitCode::SUCCESS),
    };
    print(&text).map(|_| ExitCode::SUCCESS)
}

/// Does what `run` says, of which running is the last. Gives what is to be printed.
fn run(command: &RunCommand) -> anyhow::Result<String> {
    let args = &command.args;
    let (config, remarks) = RunConfig::from_args(args)?;
    if let Some(path) = &args.write_config_to {
        warn(&remarks);
        std::fs::write(path, config.to_yaml())
            .with_context(|| format!("--write-config-to {}: cannot be written", path.display()))?;
        return Ok(String::new());
    }
    if args.cleanup {
        warn(&remarks);
        return cleanup(&config.datapath.bpf_dir, None);
    }
    init_log(args.v.is_some(), config.verbosity);
    for detail in &remarks.details {
        tracing::debug!("{detail}");
    }
    for warning in &remarks.warnings {
        tracing::warn!("{warning}");
    }
    if command.dry_run {
        return dry_run(&config, command.output.into());
    }
    if args.init_only {
        run::prepare(config)?;
    } else {
        run::run(config, args)?;
    }
    Ok(String::new())
}

fn cleanup(bpf_dir: &Path, drain: Option<Duration>) -> anyhow::Result<String> {
    let report = datapath::cleanup(bpf_dir, drain)?;
    let (links, filters, maps, interrupted) = (report.links, report.filters, report.maps, report.interrupted);
    let mut text = format!("removed {links} links, {filters} filters, {maps} maps\n");
    if interrupted > 0 {
        text += &format!("{interrupted} connections had not ended: they are cut off\n");
    }
    if report.unclaimed > 0 {
        text += &format!(
            "{} connections may have lost answers to new ones with the same source port: netfilter's table had no room to keep it \
             from them (see net.netfilter.nf_conntrack_max)\n",
            report.unclaimed
        );
    }
    Ok(text)
}

/// Where nothing is logged.
fn warn(remarks: &Remarks) {
    for warning in &remarks.warnings {
        eprintln!("proxy-agent: warning: {warning}");
    }
}

/// Prints tables until it is interrupted, or has nobody to print for.
fn top(args: &TopArgs) -> anyhow::Result<()> {
    use std::io::IsTerminal;
    /// Cursor to the top left corner, and everything below it erased.
    const CLEAR: &str = "\x1b[H\x1b[J";
    let filter = FilterArgs {
        namespace: None,
        service: args.service.clone(),
    };
    let interval = duration::parse(&args.interval)
        .filter(|interval| !interval.is_zero())
        .with_context(|| {
            format!(
                "--interval {:?}: write a time above 0, such as 1s or 500ms",
                args.interval
            )
        })?;
    let options = TopOptions {
        filter: filter.filter()?,
        sort: match args.sort {
            SortArg::Bytes => Sort::Bytes,
            SortArg::Packets => Sort::Packets,
            SortArg::Connections => Sort::Connections,
            SortArg::Refused => Sort::Refused,
            SortArg::Dropped => Sort::Dropped,
            SortArg::Name => Sort::Name,
        },
        rows: args.rows,
        output: args.view.output.into(),
    };
    let is_screen =
        std::io::stdout().is_terminal() && !args.once && matches!(args.view.output, OutputArg::Table | OutputArg::Wide);
    let mut top = Top::open(&args.view.pins.bpf_dir, options)?;
    loop {
        std::thread::sleep(interval);
        let text = top.look()?;
        let text = if is_screen { format!("{CLEAR}{text}") } else { text };
        if !print(&text)? || args.once {
            return Ok(());
        }
    }
}

/// A reader that has seen enough (`| head`) is no error; gives whether there still is one.
fn print(text: &str) -> anyhow::Result<bool> {
    use std::io::{ErrorKind, Write};
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error).context("writing to standard output"),
        result => Ok(result.is_ok()),
    }
}

impl FilterArgs {
    fn filter(&self) -> anyhow::Result<Filter> {
        match &self.service {
            Some(service) => {
                let (namespace, name) = one_service(service)?;
                Ok(Filter {
                    namespace: Some(namespace.to_owned()),
                    service: Some(name.to_owned()),
                    protocol: None,
                })
            }
            None => Ok(Filter {
                namespace: self.namespace.clone(),
                ..Filter::default()
            }),
        }
    }
}

fn one_service(text: &str) -> anyhow::Result<(&str, &str)> {
    let (namespace, name) = text.split_once('/').unwrap_or(("default", text));
    if namespace.is_empty() || name.is_empty() || name.contains('/') {
        bail!("{text:?} is not a Service: write namespace/name, such as kube-system/kube-dns");
    }
    Ok((namespace, name))
}

/// What is logged at a verbosity in Kubernetes' numbers: other people's code is a step behind ours.
fn log_filter(verbosity: u32) -> String {
    let levels = match verbosity {
        0..=3 => "info",
        4..=5 => "info,proxy_agent=debug",
        _ => "debug,proxy_agent=trace",
    };
    format!("{levels},{QUIET}")
}

/// `-v` counts before `RUST_LOG`, and that before the file.
fn init_log(is_flag: bool, verbosity: u32) {
    use tracing_subscriber::EnvFilter;
    let of_environment = Some(())
        .filter(|()| !is_flag)
        .and_then(|()| EnvFilter::try_from_default_env().ok());
    let filter = of_environment.unwrap_or_else(|| EnvFilter::new(log_filter(verbosity)));
    // A log that is already there (tests) stays.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .try_init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn options_alone_are_those_of_run() {
        let command = |line: &str| {
            let args = ["proxy-agent"].into_iter().chain(line.split(' ')).map(OsString::from);
            Cli::try_parse_from(with_command(args)).map(|cli| cli.command)
        };
        for line in [
            "--config=/f --hostname-override=a",
            "-v=2 --kubeconfig /k --master=https://192.0.2.1 --cluster-cidr=10.0.0.0/8 --proxy-mode=iptables",
            "--v=2 --nodeport-addresses=primary --masquerade-all --detect-local-mode=BridgeInterface --pod-bridge-interface=b",
            "--pod-interface-name-prefix=v --healthz-bind-address=0.0.0.0 --metrics-bind-address= --write-config-to=/f",
            "--cleanup --init-only=false",
            "run --dry-run -o yaml",
        ] {
            assert!(matches!(command(line), Ok(Command::Run(_))), "S191: {line}");
        }
        assert!(matches!(command("config -v4"), Ok(Command::Config(_))));
        for line in ["--help", "-V", "run -o yaml", "config --dry-run", "--unknown"] {
            assert!(command(line).is_err(), "{line}");
        }
    }

    #[test]
    fn verbosity_in_kubernetes_numbers() {
        for (verbosity, level) in [
            (0, "info,kube"),
            (3, "info,kube"),
            (4, "info,proxy_agent=debug,"),
            (9, "debug,proxy_agent=trace,"),
        ] {
            assert!(log_filter(verbosity).starts_with(level), "{verbosity}");
        }
    }

    #[test]
    fn services_by_name() {
        assert_eq!(
            one_service("kube-system/kube-dns").unwrap(),
            ("kube-system", "kube-dns")
        );
        assert_eq!(one_service("web").unwrap(), ("default", "web"));
        for text in ["", "/", "a/", "/b", "a/b/c"] {
            assert!(one_service(text).is_err(), "{text}");
        }
    }
}
