//! The operator's tools as they are typed: explain, verify, doctor, trace, completion, man. Each gives a text and an exit code.

use std::process::ExitCode;

use anyhow::Context;
use clap::{CommandFactory, Subcommand};

use super::trace::TraceArgs;
use super::{Cli, OutputArg, RunArgs, View};
use crate::config::RunConfig;
use crate::doctor::{self, Status};
use crate::inspect::explain::{self, Question};
use crate::{inspect, verify};

/// Exit code of a comparison that did not take place.
pub(super) const COULD_NOT_LOOK: u8 = 2;

/// Commands beside those that list.
#[derive(Subcommand, Debug)]
pub(super) enum Tool {
    /// Say what would happen to a new connection on this node, and why.
    ///
    /// It goes by the pinned maps alone, with or without a running agent, and sends nothing.
    #[command(
        after_help = "Examples:\n  proxy-agent explain 10.244.1.5 10.96.0.10:80/tcp\n  proxy-agent explain host 192.0.2.1:30080/udp -o yaml"
    )]
    Explain {
        /// The client: an address, or `host` for this node itself.
        #[arg(value_name = "SRC")]
        source: String,
        /// What it dials; without a protocol TCP.
        #[arg(value_name = "DST:PORT[/PROTO]")]
        destination: String,
        /// Interface that the client is behind, where pods are told by their interface.
        #[arg(long, value_name = "NAME")]
        interface: Option<String>,
        #[command(flatten)]
        view: View,
    },
    /// Compare what this node's kernel holds with what the cluster says it should hold.
    ///
    /// Give it the options of the agent: it plans as the agent does, and compares. Nothing is changed. Exit code: 0 if all is as it
    /// should be, 1 if something differs, 2 if it could not look.
    #[command(
        after_help = "Example:\n  proxy-agent verify --node-name node-a --kubeconfig /etc/kubernetes/proxy.conf --cluster-cidr 10.244.0.0/16"
    )]
    Verify {
        #[command(flatten)]
        run: Box<RunArgs>,
        /// How to print it.
        #[arg(short, long, value_enum, default_value = "table")]
        output: OutputArg,
    },
    /// Look whether this machine is fit for an agent, and what may be in its way.
    ///
    /// Give it the options of the agent. Nothing is changed. Exit code: 1 if something fails, 0 otherwise.
    #[command(after_help = "Example:\n  proxy-agent doctor --kubeconfig /etc/kubernetes/proxy.conf")]
    Doctor {
        #[command(flatten)]
        run: Box<RunArgs>,
        /// How to print it.
        #[arg(short, long, value_enum, default_value = "table")]
        output: OutputArg,
    },
    /// Show what happens to new connections on this node, while it happens: opened, translated at the socket, refused, dropped.
    ///
    /// Until interrupted; one at a time. Packets of established connections are never shown, and pay nothing. At the end it says how
    /// many events were lost because they came too fast.
    #[command(
        after_help = "Examples:\n  proxy-agent trace --service default/web\n  proxy-agent trace --event refused,dropped --for 30s -o json"
    )]
    Trace(Box<TraceArgs>),
    /// Print what a shell needs to complete this command.
    #[command(after_help = "Example:\n  proxy-agent completion bash > /etc/bash_completion.d/proxy-agent")]
    Completion {
        /// The shell.
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Print the manual page.
    #[command(after_help = "Example:\n  proxy-agent man | man -l -")]
    Man,
}

impl Tool {
    /// Does what it says.
    pub(super) fn execute(self) -> anyhow::Result<(String, ExitCode)> {
        let text = match self {
            Self::Explain {
                source,
                destination,
                interface,
                view,
            } => {
                let question = Question::parse(&source, &destination, interface.as_deref())?;
                explain::explain(&view.pins.bpf_dir, &question, view.output.into())?
            }
            Self::Verify { run, output } => {
                super::init_log(run.v.is_some(), 0);
                let found = RunConfig::from_args(&run)
                    .map_err(Into::into)
                    .and_then(|(config, _)| verify::differences(&config));
                let found = match found {
                    Ok(found) => found,
                    Err(error) => {
                        eprintln!("proxy-agent: {error:#}");
                        return Ok((String::new(), ExitCode::from(COULD_NOT_LOOK)));
                    }
                };
                let text = inspect::differences(&found, output.into())?;
                return Ok((text, ExitCode::from(u8::from(!found.is_empty()))));
            }
            Self::Doctor { run, output } => {
                let found = doctor::examine(&run);
                let fails = found.iter().any(|check| check.status == Status::Fail);
                let text = inspect::checks(&found, output.into())?;
                return Ok((text, ExitCode::from(u8::from(fails))));
            }
            Self::Trace(args) => return Ok((String::new(), args.execute()?)),
            Self::Completion { shell } => completion(shell)?,
            Self::Man => manual()?,
        };
        Ok((text, ExitCode::SUCCESS))
    }
}

fn completion(shell: clap_complete::Shell) -> anyhow::Result<String> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "proxy-agent", &mut text);
    String::from_utf8(text).context("the completion is no text")
}

/// The page of the command, followed by those of its subcommands, so that one page has everything.
fn manual() -> anyhow::Result<String> {
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let mut text = Vec::new();
    pages(&command, &mut text).context("the manual page could not be written")?;
    String::from_utf8(text).context("the manual page is no text")
}

fn pages(command: &clap::Command, text: &mut Vec<u8>) -> std::io::Result<()> {
    clap_mangen::Man::new(command.clone()).render(text)?;
    command
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
        .try_for_each(|command| pages(command, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every command with its parents, such as `service list`.
    fn all(command: &clap::Command, before: &str, found: &mut Vec<String>) {
        for command in command.get_subcommands().filter(|command| command.get_name() != "help") {
            let name = format!("{before}{}", command.get_name());
            all(command, &format!("{name} "), found);
            found.push(name);
        }
    }

    fn commands() -> Vec<String> {
        let mut found = Vec::new();
        all(&Cli::command(), "", &mut found);
        assert!(
            found.iter().any(|name| name == "service list") && found.len() > 8,
            "{found:?}"
        );
        found
    }

    #[test]
    fn every_shell_completes_every_command() {
        use clap::ValueEnum;
        for shell in clap_complete::Shell::value_variants() {
            let text = completion(*shell).unwrap();
            for command in commands() {
                let last = command.rsplit(' ').next().unwrap();
                assert!(text.contains(last), "{shell}: {command}");
            }
        }
    }

    #[test]
    fn the_manual_has_every_command() {
        let text = manual().unwrap().replace("\\-", "-");
        for command in commands() {
            let title = format!("proxy-agent-{}", command.replace(' ', "-"));
            assert!(text.contains(&format!(".TH {title} ")), "{title}");
        }
        assert!(
            text.contains("proxy-agent explain host 192.0.2.1:30080/udp"),
            "examples are in it"
        );
    }

    #[test]
    fn every_command_that_does_something_has_an_example() {
        fn look(command: &clap::Command) {
            for command in command.get_subcommands().filter(|command| command.get_name() != "help") {
                let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
                assert!(
                    command.has_subcommands() || help.contains("proxy-agent"),
                    "{}",
                    command.get_name()
                );
                look(command);
            }
        }
        look(&Cli::command());
    }
}
