//! The steps of `migrate` as they are typed. Each gives a text and an exit code.

use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};

use super::tools::COULD_NOT_LOOK;
use super::{Pins, RunArgs};
use crate::config::RunConfig;
use crate::duration;
use crate::inspect::{self, Columns, Output};
use crate::migrate::{self, OldConnection, Readiness, Removal, RemovalOptions, Takeover};

/// How many old connections a table shows.
const SHOWN: usize = 20;

#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct MigrateCommand {
    #[command(subcommand)]
    step: Option<Step>,
    #[command(flatten)]
    look: Look,
}

#[derive(Args, Debug)]
struct Look {
    #[command(flatten)]
    run: Box<RunArgs>,
    /// How to print it.
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
enum Format {
    Table,
    Json,
}

#[derive(Subcommand, Debug)]
enum Step {
    /// Before: look whether the node is fit for the agent, and compare kube-proxy's rules with what the agent would do.
    ///
    /// Give it the options that the agent will have. Nothing is changed. Exit code: 0 if nothing is in the way and nothing differs
    /// that is not meant to, 1 otherwise, 2 if it could not look.
    #[command(
        after_help = "Example:\n  proxy-agent migrate check --config /var/lib/kube-proxy/config.conf --kubeconfig /etc/kubernetes/proxy.conf"
    )]
    Check(Look),
    /// After the agent has started: compare as `verify` does, and list the connections that netfilter still translates.
    ///
    /// Give it the options of the agent. Nothing is changed. Exit code: 0 if nothing differs, 1 otherwise, 2 if it could not look.
    #[command(after_help = "Example:\n  proxy-agent migrate verify --kubeconfig /etc/kubernetes/proxy.conf")]
    Verify(Look),
    /// At the end, when kube-proxy is gone: remove its rules from netfilter.
    ///
    /// Its nftables tables and its chains of iptables over nftables go in one step. Connections that it has translated go on: the
    /// empty chains they need stay, until this is run again or the time of --wait has seen their end.
    #[command(after_help = "Example:\n  proxy-agent migrate remove-rules --wait 1h")]
    RemoveRules {
        #[command(flatten)]
        pins: Pins,
        /// How long to wait for the end of connections that netfilter still translates, to remove what they need as well.
        #[arg(long, value_name = "DURATION")]
        wait: Option<String>,
        /// Remove everything at once, also what nobody would serve then. Connections that netfilter still translates break.
        #[arg(long)]
        force: bool,
    },
}

impl MigrateCommand {
    /// Does what it says.
    pub(super) fn execute(self) -> anyhow::Result<(String, ExitCode)> {
        match self.step.unwrap_or(Step::Check(self.look)) {
            Step::Check(look) => {
                super::init_log(look.run.v.is_some(), 0);
                let found = migrate::check(&look.run);
                looked(found, look.output, Readiness::is_ready, readiness)
            }
            Step::Verify(look) => {
                super::init_log(look.run.v.is_some(), 0);
                let found = RunConfig::from_args(&look.run).map_err(Into::into);
                let found = found.and_then(|(config, _)| migrate::verify_takeover(&config));
                looked(found, look.output, |found| found.differences.is_empty(), takeover)
            }
            Step::RemoveRules { pins, wait, force } => {
                let parse = |text: &String| {
                    duration::parse(text).with_context(|| format!("--wait {text:?}: write a time, such as 10m or 1h"))
                };
                let removed = migrate::remove_rules(&RemovalOptions {
                    bpf_dir: pins.bpf_dir,
                    wait: wait.as_ref().map(parse).transpose()?,
                    force,
                })?;
                Ok((removal(&removed, force), ExitCode::SUCCESS))
            }
        }
    }
}

/// Says so if new connections are left to nobody.
pub(super) fn warn_without_kube_proxy() {
    if !migrate::has_kube_proxy_rules() {
        eprintln!("proxy-agent: warning: no rules of kube-proxy are seen here: nobody serves new connections");
    }
}

fn looked<T: serde::Serialize>(
    found: anyhow::Result<T>,
    format: Format,
    is_good: impl FnOnce(&T) -> bool,
    table: impl FnOnce(&T) -> anyhow::Result<String>,
) -> anyhow::Result<(String, ExitCode)> {
    let found = match found {
        Ok(found) => found,
        Err(error) => {
            eprintln!("proxy-agent: {error:#}");
            return Ok((String::new(), ExitCode::from(COULD_NOT_LOOK)));
        }
    };
    let text = match format {
        Format::Json => inspect::serialize(&found, Output::Json)?,
        Format::Table => table(&found)?,
    };
    Ok((text, ExitCode::from(u8::from(!is_good(&found)))))
}

/// A table under a heading, nothing if it has no rows.
fn section<R: Columns>(heading: &str, rows: &[R]) -> anyhow::Result<String> {
    if rows.is_empty() {
        return Ok(String::new());
    }
    Ok(format!("\n{heading}\n{}", inspect::render(rows, Output::Table)?))
}

fn readiness(found: &Readiness) -> anyhow::Result<String> {
    let compared = match &found.modes[..] {
        [] => "kube-proxy has no rules here".to_owned(),
        modes => format!(
            "{} addresses of kube-proxy ({}) compared, {} differences",
            found.compared,
            modes.join(", "),
            found.differences.len()
        ),
    };
    Ok([
        inspect::checks(&found.checks, Output::Table)?,
        format!("\n{compared}\n"),
        section("Differences:", &found.differences)?,
        section("Different by design:", &found.by_design)?,
        format!("\nNext: {}\n", found.next),
    ]
    .concat())
}

fn takeover(found: &Takeover) -> anyhow::Result<String> {
    Ok([
        inspect::differences(&found.differences, Output::Table)?,
        connections(&found.old_connections)?,
        format!("\nNext: {}\n", found.next),
    ]
    .concat())
}

fn connections(old: &[OldConnection]) -> anyhow::Result<String> {
    let heading = format!("{} connections are still translated by netfilter:", old.len());
    let mut text = section(&heading, &old[..old.len().min(SHOWN)])?;
    if old.len() > SHOWN {
        text += "…\n";
    }
    Ok(text)
}

fn removal(removed: &Removal, force: bool) -> String {
    let (chains, tables, old) = (removed.chains, removed.tables, removed.old_connections.len());
    let mut text = format!("removed {chains} chains, {tables} tables\n");
    if removed.kept {
        text += &format!(
            "{old} connections are still translated by netfilter; empty chains in the table kube-proxy stay for them. When they are \
             over, run this again\n"
        );
    } else if old > 0 && force {
        text += &format!("{old} connections were still translated by netfilter: those of nftables mode are broken\n");
    } else if old > 0 {
        text +=
            &format!("{old} connections are still translated by netfilter, by chains of iptables itself: they go on\n");
    }
    text
}
