//! The options that are durations.

use std::time::Duration;

use super::{ConfigError, error};
use crate::cli::RunArgs;
use crate::datapath::Timeouts;

/// When changes are applied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Intervals {
    /// Least time between two updates (S162).
    pub min_sync: Duration,
    /// Longest time between two tries of a failed one (S163); half of what makes the agent unhealthy (S173).
    pub sync: Duration,
}

fn duration(flag: &'static str, text: &str) -> Result<Duration, ConfigError> {
    let problem = || "is not a duration".to_owned();
    let remedy = "write a number with a unit, such as 30s, 500ms or 1h30m, or 0";
    crate::duration::parse(text.trim()).ok_or_else(|| error(flag, text, problem(), remedy))
}

/// 0 keeps the default, as kube-proxy keeps the kernel's (S151).
pub(super) fn timeouts(args: &RunArgs) -> Result<Timeouts, ConfigError> {
    let chosen =
        |flag, text: &str, default| Ok(Some(duration(flag, text)?).filter(|d| !d.is_zero()).unwrap_or(default));
    let default = Timeouts::default();
    Ok(Timeouts {
        tcp_established: chosen(
            "--conntrack-tcp-timeout-established",
            &args.conntrack_tcp_timeout_established,
            default.tcp_established,
        )?,
        tcp_half_closed: chosen(
            "--conntrack-tcp-timeout-close-wait",
            &args.conntrack_tcp_timeout_close_wait,
            default.tcp_half_closed,
        )?,
        udp_unanswered: chosen(
            "--conntrack-udp-timeout",
            &args.conntrack_udp_timeout,
            default.udp_unanswered,
        )?,
        udp_answered: chosen(
            "--conntrack-udp-timeout-stream",
            &args.conntrack_udp_timeout_stream,
            default.udp_answered,
        )?,
    })
}

/// As kube-proxy checks them.
pub(super) fn intervals(min_sync: &str, sync: &str) -> Result<Intervals, ConfigError> {
    let intervals = Intervals {
        min_sync: duration("--min-sync-period", min_sync)?,
        sync: duration("--sync-period", sync)?,
    };
    if intervals.sync.is_zero() {
        let problem = "what fails has to be tried again at some time".to_owned();
        return Err(error(
            "--sync-period",
            sync,
            problem,
            "write a duration above 0, such as 30s",
        ));
    }
    if intervals.min_sync > intervals.sync {
        let problem = format!("is longer than --sync-period {sync}");
        let remedy = "write a shorter one, or a longer --sync-period";
        return Err(error("--min-sync-period", min_sync, problem, remedy));
    }
    Ok(intervals)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_checked_as_kube_proxy_does() {
        let given = intervals("1s", "1m").unwrap();
        assert_eq!((given.min_sync.as_secs(), given.sync.as_secs()), (1, 60));
        assert_eq!(intervals("0", "30s").unwrap().min_sync, Duration::ZERO, "S162: at once");
        for (min, sync, flag) in [
            ("x", "30s", "--min-sync-period \"x\": "),
            ("-1s", "30s", "--min-sync-period \"-1s\": "),
            ("0", "0", "--sync-period \"0\": "),
            ("1m", "30s", "--min-sync-period \"1m\": "),
        ] {
            let text = intervals(min, sync).unwrap_err().to_string();
            assert!(text.starts_with(flag), "{text}");
        }
    }

    #[test]
    fn timeouts_by_flag() {
        #[derive(clap::Parser)]
        struct Run {
            #[command(flatten)]
            args: RunArgs,
        }
        let parse = |flags: &[&str]| {
            let args = [&["run"], flags].concat();
            timeouts(&<Run as clap::Parser>::parse_from(args).args)
        };
        assert_eq!(parse(&[]), Ok(Timeouts::default()));
        let seconds = Duration::from_secs;
        assert_eq!(
            parse(&[
                "--conntrack-tcp-timeout-established=2h",
                "--conntrack-tcp-timeout-close-wait=0",
                "--conntrack-udp-timeout=45s",
                "--conntrack-udp-timeout-stream=90s",
            ]),
            Ok(Timeouts {
                tcp_established: seconds(7_200),
                tcp_half_closed: seconds(3_600),
                udp_unanswered: seconds(45),
                udp_answered: seconds(90),
            }),
            "S151"
        );
        let text = parse(&["--conntrack-udp-timeout=soon"]).unwrap_err().to_string();
        assert!(text.starts_with("--conntrack-udp-timeout \"soon\": "), "{text}");
    }
}
