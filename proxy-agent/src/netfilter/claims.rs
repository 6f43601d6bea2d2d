//! Source ports that netfilter is kept from choosing when it masquerades, by connections in its table that no packet belongs to:
//! who claims a port here translates its packets before netfilter sees them. Used by the datapath on the way to another proxy.
//!
//! What must stay true: only what was made here is removed here.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use netlink_packet_netfilter::NetfilterProtoFamily;
use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Protocol as Number, Tuple,
};
use proxy_common::addr::Protocol;

use super::socket::{Change, Netlink};

/// Of what is free in the table, the part that may be claimed is one of so many: new connections need room as well.
const SHARE: usize = 2;

/// A connection as its server sees it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Seen {
    pub(crate) protocol: Protocol,
    pub(crate) client: SocketAddr,
    pub(crate) server: SocketAddr,
}

/// What is claimed, until this is dropped. If the process ends otherwise, the table forgets it after the lifetime.
pub(crate) struct Claims {
    netlink: Netlink,
    lifetime: Duration,
    claimed: HashSet<Seen>,
    room: usize,
}

impl Claims {
    /// Nothing yet.
    pub(crate) fn new(lifetime: Duration) -> io::Result<Self> {
        Ok(Self {
            netlink: Netlink::open()?,
            lifetime,
            claimed: HashSet::new(),
            room: room(),
        })
    }

    /// Claims the source ports of these connections as well. What is in the table already stays as it is. Gives the number of those
    /// there is no room for; a kernel that follows no connections has nothing to be kept from.
    pub(crate) fn add(&mut self, connections: impl IntoIterator<Item = Seen>) -> io::Result<usize> {
        let mut new: Vec<Seen> = connections
            .into_iter()
            .filter(|one| !self.claimed.contains(one))
            .collect();
        let mut left_out = new.split_off(new.len().min(self.room - self.claimed.len())).len();
        let seconds = u32::try_from(self.lifetime.as_secs()).unwrap_or(u32::MAX);
        let changes = new.iter().map(|one| Change {
            family: family(one),
            message: ConntrackMessage::New(vec![
                ConntrackAttribute::CtaTupleOrig(tuple(one.protocol, one.client, one.server)),
                ConntrackAttribute::CtaTupleReply(tuple(one.protocol, one.server, one.client)),
                ConntrackAttribute::CtaTimeout(seconds),
            ])
            .into(),
            creates: true,
        });
        for (one, answer) in new.iter().zip(self.netlink.each(changes.collect())?) {
            match answer {
                Ok(()) => _ = self.claimed.insert(*one),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EEXIST | libc::EINVAL | libc::EOPNOTSUPP) => {}
                    Some(libc::ENOMEM) => left_out += 1,
                    _ => return Err(error),
                },
            }
        }
        Ok(left_out)
    }
}

impl Drop for Claims {
    fn drop(&mut self) {
        let changes = self.claimed.iter().map(|one| Change {
            family: family(one),
            message: ConntrackMessage::Delete(vec![ConntrackAttribute::CtaTupleOrig(tuple(
                one.protocol,
                one.client,
                one.server,
            ))])
            .into(),
            creates: false,
        });
        // What is gone already is gone, and the rest has an end.
        let _ = self.netlink.each(changes.collect());
    }
}

fn family(seen: &Seen) -> NetfilterProtoFamily {
    if seen.client.is_ipv4() {
        NetfilterProtoFamily::IPv4
    } else {
        NetfilterProtoFamily::IPv6
    }
}

fn tuple(protocol: Protocol, source: SocketAddr, destination: SocketAddr) -> Vec<Tuple> {
    vec![
        Tuple::Ip(vec![
            IPTuple::SourceAddress(source.ip()),
            IPTuple::DestinationAddress(destination.ip()),
        ]),
        Tuple::Proto(vec![
            ProtoTuple::Protocol(Number::from(protocol.number())),
            ProtoTuple::SourcePort(source.port()),
            ProtoTuple::DestinationPort(destination.port()),
        ]),
    ]
}

/// How many connections may be added to the table. Where it cannot be read, the kernel says so when it is full.
fn room() -> usize {
    let read = |name: &str| {
        let text = fs::read_to_string(format!("/proc/sys/net/netfilter/nf_conntrack_{name}")).ok()?;
        text.trim().parse::<usize>().ok()
    };
    match (read("max"), read("count")) {
        (Some(max), Some(count)) => max.saturating_sub(count) / SHARE,
        _ => usize::MAX,
    }
}
