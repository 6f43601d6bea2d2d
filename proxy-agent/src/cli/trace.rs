//! `trace` as it is typed.

use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, ValueEnum};
use proxy_common::addr::Protocol;

use super::{Pins, one_service, print};
use crate::duration;
use crate::inspect::Output;
use crate::inspect::trace::{self, EventKind, TraceFilter, TraceOptions};

#[derive(Args, Debug)]
pub(super) struct TraceArgs {
    #[command(flatten)]
    pins: Pins,
    /// Only this Service, as namespace/name.
    #[arg(long, value_name = "NAMESPACE/NAME")]
    service: Option<String>,
    /// Only clients with this address or in this prefix. What is translated at the socket has no client yet.
    #[arg(long, value_name = "ADDRESS|PREFIX")]
    client: Option<String>,
    /// Only this port, of those that are dialled.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// Only this protocol.
    #[arg(long, value_enum)]
    protocol: Option<ProtocolArg>,
    /// Only these events.
    #[arg(long, value_enum, value_delimiter = ',')]
    event: Vec<EventArg>,
    /// Only what was refused or dropped for these reasons, named as `ebpf_proxy_refusals_total` names them.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    reason: Vec<String>,
    /// One event of N, chosen at random.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    sample: u32,
    /// End after so many events.
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// End after this time, such as 30s or 5m.
    #[arg(long = "for", value_name = "DURATION")]
    time: Option<String>,
    /// How to print it: aligned columns, or one JSON object per line.
    #[arg(short, long, value_enum, default_value = "table")]
    output: FormatArg,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
enum FormatArg {
    Table,
    Json,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
enum ProtocolArg {
    Tcp,
    Udp,
    Sctp,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
enum EventArg {
    /// A connection or UDP flow was opened by its first packet.
    Opened,
    /// A connection or UDP flow of a process was translated at its socket.
    Socket,
    /// Something was answered with an error.
    Refused,
    /// Something was dropped.
    Dropped,
}

impl TraceArgs {
    pub(super) fn execute(&self) -> anyhow::Result<ExitCode> {
        let options = self.options()?;
        let traced = trace::trace(&self.pins.bpf_dir, &options, &mut print)?;
        eprintln!("proxy-agent: {} events shown, {} lost", traced.shown, traced.lost);
        Ok(ExitCode::SUCCESS)
    }

    fn options(&self) -> anyhow::Result<TraceOptions> {
        let service = self.service.as_deref().map(one_service).transpose()?;
        let time = match &self.time {
            Some(text) => Some(
                duration::parse(text)
                    .filter(|time| !time.is_zero())
                    .with_context(|| format!("--for {text:?}: write a time above 0, such as 30s or 5m"))?,
            ),
            None => None,
        };
        let kind = |event: &EventArg| match event {
            EventArg::Opened => EventKind::Opened,
            EventArg::Socket => EventKind::Socket,
            EventArg::Refused => EventKind::Refused,
            EventArg::Dropped => EventKind::Dropped,
        };
        let reasons: anyhow::Result<_> = self.reason.iter().map(|name| TraceFilter::parse_reason(name)).collect();
        Ok(TraceOptions {
            filter: TraceFilter {
                service: service.map(|(namespace, name)| (namespace.to_owned(), name.to_owned())),
                client: self.client.as_deref().map(TraceFilter::parse_client).transpose()?,
                port: self.port,
                protocol: self.protocol.map(|protocol| match protocol {
                    ProtocolArg::Tcp => Protocol::Tcp,
                    ProtocolArg::Udp => Protocol::Udp,
                    ProtocolArg::Sctp => Protocol::Sctp,
                }),
                kinds: self.event.iter().map(kind).collect(),
                reasons: reasons?,
            },
            sample: self.sample,
            count: self.count,
            time,
            output: match self.output {
                FormatArg::Table => Output::Table,
                FormatArg::Json => Output::Json,
            },
        })
    }
}
