//! Which events are asked for, in the words of people and in those of the programs.

use std::net::IpAddr;

use anyhow::{Context, bail};
use ipnet::IpNet;
use proxy_common::addr::{Addr4, Addr6, Address, Port, Protocol};
use proxy_common::reason::Reason;
use proxy_common::trace::{EVENT_DROPPED, EVENT_OPENED, EVENT_REFUSED, EVENT_SOCKET, TRACE_SERVICES, Trace};

use crate::inspect::rows::Names;

/// What can happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EventKind {
    /// A connection was written into the rewrite table.
    Opened,
    /// A socket was translated.
    Socket,
    /// Answered with an error.
    Refused,
    /// Dropped.
    Dropped,
}

impl EventKind {
    /// Every kind.
    pub const ALL: [Self; 4] = [Self::Opened, Self::Socket, Self::Refused, Self::Dropped];

    pub(super) fn number(self) -> u8 {
        match self {
            Self::Opened => EVENT_OPENED,
            Self::Socket => EVENT_SOCKET,
            Self::Refused => EVENT_REFUSED,
            Self::Dropped => EVENT_DROPPED,
        }
    }

    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Opened => "opened",
            Self::Socket => "socket",
            Self::Refused => "refused",
            Self::Dropped => "dropped",
        }
    }
}

/// Which events are shown. What is not set does not restrict.
#[derive(Clone, Debug, Default)]
pub struct TraceFilter {
    /// Namespace and name of the Service.
    pub service: Option<(String, String)>,
    /// Addresses of clients.
    pub client: Option<IpNet>,
    /// Port that is dialled.
    pub port: Option<u16>,
    /// Protocol.
    pub protocol: Option<Protocol>,
    /// Kinds of events.
    pub kinds: Vec<EventKind>,
    /// Reasons of refusals and drops.
    pub reasons: Vec<Reason>,
}

impl TraceFilter {
    /// A client's address, or a prefix of several.
    pub fn parse_client(text: &str) -> anyhow::Result<IpNet> {
        let parsed = text.parse::<IpNet>().ok();
        let parsed = parsed.or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
        parsed.map(|net| net.trunc()).with_context(|| {
            format!("--client {text:?}: write an address or a prefix, such as 10.244.1.5 or 10.244.0.0/16")
        })
    }

    /// A reason by its name.
    pub fn parse_reason(text: &str) -> anyhow::Result<Reason> {
        let Some(reason) = Reason::ALL.iter().find(|reason| reason.name() == text) else {
            let known: Vec<&str> = Reason::ALL.iter().map(|reason| reason.name()).collect();
            bail!("--reason {text:?} is none: write one of {}", known.join(", "));
        };
        Ok(*reason)
    }

    /// The service ids that are asked for.
    pub(super) fn ids(&self, names: &Names) -> Vec<u32> {
        let Some((namespace, service)) = &self.service else {
            return Vec::new();
        };
        let of_service = names
            .0
            .iter()
            .filter(|(_, name)| name.namespace == *namespace && name.name == *service);
        let mut ids: Vec<u32> = of_service.map(|(id, _)| *id).collect();
        ids.sort_unstable();
        ids
    }

    /// What the programs are told. Of a Service with more ports than they can be asked for, the tracer chooses.
    pub(super) fn question(&self, ids: &[u32], sample: u32) -> Trace {
        let (client, mask) = self.client.map_or_else(Default::default, network);
        let mut services = [0; TRACE_SERVICES];
        if self.service.is_some() && ids.is_empty() {
            // No service has it.
            services[0] = u32::MAX;
        } else if ids.len() <= TRACE_SERVICES {
            services[..ids.len()].copy_from_slice(ids);
        }
        Trace {
            until: 0,
            reasons: self.reasons.iter().fold(0, |bits, reason| bits | 1 << *reason as u32),
            client,
            mask,
            services,
            sample,
            tracer: std::process::id(),
            kinds: self.kinds.iter().fold(0, |bits, kind| bits | 1 << kind.number()),
            protocol: self.protocol.map_or(0, Protocol::number),
            port: Port::new(self.port.unwrap_or(0)),
            pad: [0; 4],
        }
    }
}

/// A network in the form that both families share.
fn network(net: IpNet) -> (Addr6, Addr6) {
    let (addr, bits) = match net {
        IpNet::V4(net) => (Addr4::from(net.network()).mapped(), 96 + u32::from(net.prefix_len())),
        IpNet::V6(net) => (Addr6::from(net.network()), u32::from(net.prefix_len())),
    };
    let mask = u128::MAX.checked_shl(128 - bits).unwrap_or(0);
    (addr, Addr6(mask.to_be_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_addresses_or_prefixes() {
        for (text, bits) in [("10.244.1.5", 32), ("10.244.1.5/16", 16), ("fd00::5", 128), ("::/0", 0)] {
            assert_eq!(TraceFilter::parse_client(text).unwrap().prefix_len(), bits, "{text}");
        }
        assert!(
            TraceFilter::parse_client("web")
                .unwrap_err()
                .to_string()
                .contains("prefix")
        );
        let error = TraceFilter::parse_reason("because").unwrap_err().to_string();
        assert!(error.contains("no_endpoints"), "{error}");
        assert_eq!(TraceFilter::parse_reason("loop").unwrap(), Reason::Loop);
    }

    #[test]
    fn networks_have_one_form() {
        let (addr, mask) = network("10.244.0.0/16".parse().unwrap());
        assert_eq!(addr, Addr4([10, 244, 0, 0]).mapped());
        assert_eq!(mask.0[..14], [0xff; 14]);
        assert_eq!(mask.0[14..], [0, 0]);
        assert_eq!(network("::/0".parse().unwrap()).1, Addr6([0; 16]));
        assert_eq!(network("fd00::1/128".parse().unwrap()).1, Addr6([0xff; 16]));
    }

    #[test]
    fn a_service_nobody_has_is_none_and_not_every_one() {
        let filter = TraceFilter {
            service: Some(("default".to_owned(), "web".to_owned())),
            ..TraceFilter::default()
        };
        assert_eq!(filter.question(&[], 1).services[0], u32::MAX);
        assert_eq!(filter.question(&[3, 4], 1).services[..3], [3, 4, 0]);
        assert_eq!(
            filter.question(&[1; TRACE_SERVICES + 1], 1).services,
            [0; TRACE_SERVICES]
        );
        assert_eq!(
            TraceFilter::default().question(&[], 7),
            Trace {
                sample: 7,
                tracer: std::process::id(),
                ..Trace::default()
            }
        );
    }
}
