//! Flags of kube-proxy that are about netfilter, IPVS or a Go program. They are taken, so that a command line of kube-proxy's works as
//! it is, and named in a warning. Part of [`super::RunArgs`].

use clap::{Arg, ArgMatches, Command};

/// With a value of its own: `--name=value` or `--name value`.
const WITH_VALUE: &[&str] = &[
    "config-sync-period",
    "conntrack-max-per-core",
    "conntrack-min",
    "healthz-port",
    "iptables-masquerade-bit",
    "ipvs-exclude-cidrs",
    "ipvs-scheduler",
    "ipvs-tcp-timeout",
    "ipvs-tcpfin-timeout",
    "ipvs-udp-timeout",
    "kube-api-content-type",
    "log-flush-frequency",
    "log-json-info-buffer-size",
    "log-text-info-buffer-size",
    "logging-format",
    "metrics-port",
    "oom-score-adj",
    "show-hidden-metrics-for-version",
    "vmodule",
];
/// Switches: `--name` or `--name=false`.
const SWITCHES: &[&str] = &[
    "conntrack-tcp-be-liberal",
    "ipvs-strict-arp",
    "log-json-split-stream",
    "log-text-split-stream",
    "profiling",
];

/// Those that were given.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Meaningless(pub(super) Vec<&'static str>);

impl clap::FromArgMatches for Meaningless {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let all = WITH_VALUE.iter().chain(SWITCHES).copied();
        Ok(Self(all.filter(|name| matches.contains_id(name)).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl clap::Args for Meaningless {
    fn augment_args(command: Command) -> Command {
        let hidden = |name: &'static str| Arg::new(name).long(name).hide(true).allow_hyphen_values(true);
        let with_value = WITH_VALUE.iter().map(|name| hidden(name).num_args(1));
        let switches = SWITCHES.iter().map(|name| {
            hidden(name)
                .num_args(0..=1)
                .require_equals(true)
                .default_missing_value("true")
        });
        command.args(with_value.chain(switches))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}
