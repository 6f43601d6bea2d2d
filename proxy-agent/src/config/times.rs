//! The options that are durations, and the section of a mode that some of them are in.

use std::time::Duration;

use super::document::{Conntrack, Document, Ebpf};
use super::words::ModeArg;
use super::{ConfigError, Origin};
use crate::datapath::Timeouts;

/// Quick enough for tests of readiness, slow enough to take in together what belongs together.
const MIN_SYNC: Duration = Duration::from_millis(10);
const SYNC: Duration = Duration::from_secs(30);

/// When changes are applied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Intervals {
    /// Least time between two updates (S162).
    pub min_sync: Duration,
    /// Longest time between two tries of a failed one (S163); half of what makes the agent unhealthy (S173).
    pub sync: Duration,
}

/// What kube-proxy has once for each of its modes, from the section of the one that is named; iptables is its default.
#[derive(Default)]
pub(super) struct Section<'a> {
    pub(super) name: &'static str,
    pub(super) masquerade_all: Option<bool>,
    pub(super) localhost_node_ports: Option<bool>,
    pub(super) min_sync: Option<&'a str>,
    pub(super) sync: Option<&'a str>,
}

impl<'a> Section<'a> {
    pub(super) fn of(document: &'a Document, mode: ModeArg) -> Self {
        let iptables = &document.iptables;
        let all = Self {
            name: "iptables",
            masquerade_all: iptables.masquerade_all,
            localhost_node_ports: iptables.localhost_node_ports,
            min_sync: iptables.min_sync_period.as_deref(),
            sync: iptables.sync_period.as_deref(),
        };
        match mode {
            ModeArg::Ebpf | ModeArg::Iptables => all,
            // The other settings of iptables are those of ipvs as well.
            ModeArg::Ipvs => Self {
                name: "ipvs",
                min_sync: document.ipvs.min_sync_period.as_deref(),
                sync: document.ipvs.sync_period.as_deref(),
                ..all
            },
            ModeArg::Nftables => Self {
                name: "nftables",
                masquerade_all: document.nftables.masquerade_all,
                localhost_node_ports: None,
                min_sync: document.nftables.min_sync_period.as_deref(),
                sync: document.nftables.sync_period.as_deref(),
            },
        }
    }
}

fn duration(origin: &Origin, field: &str, text: &str) -> Result<Duration, ConfigError> {
    let remedy = "write a number with a unit, such as 30s, 500ms or 1h30m, or 0";
    let fail = || origin.error(field, text, "is not a duration", remedy);
    crate::duration::parse(text.trim()).ok_or_else(fail)
}

/// Nothing and 0 are the default, as kube-proxy fills them in (S151).
fn or_default(origin: &Origin, field: &str, text: Option<&str>, default: Duration) -> Result<Duration, ConfigError> {
    let given = match text.filter(|text| !text.trim().is_empty()) {
        Some(text) => duration(origin, field, text)?,
        None => Duration::ZERO,
    };
    Ok(if given.is_zero() { default } else { given })
}

/// How long silent connections are remembered.
pub(super) fn timeouts(given: &Conntrack, origin: &Origin) -> Result<Timeouts, ConfigError> {
    let default = Timeouts::default();
    let chosen = |field, text: &Option<String>, default| or_default(origin, field, text.as_deref(), default);
    Ok(Timeouts {
        tcp_established: chosen(
            "conntrack.tcpEstablishedTimeout",
            &given.tcp_established_timeout,
            default.tcp_established,
        )?,
        tcp_half_closed: chosen(
            "conntrack.tcpCloseWaitTimeout",
            &given.tcp_close_wait_timeout,
            default.tcp_half_closed,
        )?,
        udp_unanswered: chosen("conntrack.udpTimeout", &given.udp_timeout, default.udp_unanswered)?,
        udp_answered: chosen(
            "conntrack.udpStreamTimeout",
            &given.udp_stream_timeout,
            default.udp_answered,
        )?,
    })
}

/// As kube-proxy checks them. What our own section and the flags say is taken by the word: 0 is at once.
pub(super) fn intervals(ebpf: &Ebpf, section: &Section<'_>, origin: &Origin) -> Result<Intervals, ConfigError> {
    let read = |name: &str, own: &Option<String>, theirs: Option<&str>, default| match own {
        Some(text) => {
            let field = format!("ebpf.{name}");
            let given = duration(origin, &field, text)?;
            Ok((given, field, text.clone()))
        }
        None => {
            let field = format!("{}.{name}", section.name);
            let given = or_default(origin, &field, theirs, default)?;
            Ok((given, field, crate::duration::text(given)))
        }
    };
    let (sync, sync_field, sync_text) = read("syncPeriod", &ebpf.sync_period, section.sync, SYNC)?;
    if sync.is_zero() {
        let problem = "what fails has to be tried again at some time";
        return Err(origin.error(
            &sync_field,
            &sync_text,
            problem,
            "write a duration above 0, such as 30s",
        ));
    }
    // A default gives way to what is said.
    let min_default = MIN_SYNC.min(sync);
    let (min_sync, field, text) = read("minSyncPeriod", &ebpf.min_sync_period, section.min_sync, min_default)?;
    if min_sync > sync {
        let sync_place = origin.place(&sync_field);
        let problem = format!("is longer than {sync_place} {sync_text}");
        let remedy = format!("write a shorter one, or a longer {sync_place}");
        return Err(origin.error(&field, &text, &problem, remedy));
    }
    Ok(Intervals { min_sync, sync })
}
