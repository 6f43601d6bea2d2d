//! Connections whose destination netfilter translates.

use std::io;
use std::net::SocketAddr;

use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, IPTuple, ProtoInfo, ProtoInfoTCP, ProtoTuple, Status, Tuple,
};
use netlink_packet_netfilter::{NetfilterMessageInner, NetfilterProtoFamily};
use proxy_common::addr::Protocol;

use super::socket::Netlink;

/// `TCP_CONNTRACK_TIME_WAIT`; those above are over too.
const OVER: u8 = 7;

/// A connection that goes elsewhere than its client says.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Translated {
    pub(crate) protocol: Protocol,
    pub(crate) client: SocketAddr,
    /// What the client dials.
    pub(crate) dialled: SocketAddr,
    /// Who answers.
    pub(crate) server: SocketAddr,
}

/// Every connection with a translated destination that is not over. None where nothing is tracked.
pub(crate) fn translated() -> io::Result<Vec<Translated>> {
    let mut netlink = Netlink::open()?;
    let mut found = Vec::new();
    for family in [NetfilterProtoFamily::IPv4, NetfilterProtoFamily::IPv6] {
        let question = NetfilterMessageInner::Conntrack(ConntrackMessage::Get(Vec::new()));
        let messages = match netlink.dump(family, question) {
            // A kernel without connection tracking knows no such question.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => continue,
            messages => messages?,
        };
        found.extend(messages.iter().filter_map(|message| match &message.inner {
            NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)) => connection(attributes),
            _ => None,
        }));
    }
    found.sort_unstable();
    Ok(found)
}

fn connection(attributes: &[ConntrackAttribute]) -> Option<Translated> {
    let status = attributes.iter().find_map(|attribute| match attribute {
        ConntrackAttribute::CtaStatus(status) => Some(*status),
        _ => None,
    })?;
    let is_over = attributes.iter().any(|attribute| match attribute {
        ConntrackAttribute::CtaProtoInfo(info) => info.iter().any(|info| match info {
            ProtoInfo::TCP(tcp) => tcp
                .iter()
                .any(|part| matches!(part, ProtoInfoTCP::State(state) if *state >= OVER)),
            _ => false,
        }),
        _ => false,
    });
    if is_over || !status.contains(Status::DstNat) {
        return None;
    }
    let (mut original, mut reply) = (None, None);
    for attribute in attributes {
        match attribute {
            ConntrackAttribute::CtaTupleOrig(tuple) => original = ends(tuple),
            ConntrackAttribute::CtaTupleReply(tuple) => reply = ends(tuple),
            _ => {}
        }
    }
    let ((protocol, client, dialled), (_, server, _)) = original.zip(reply)?;
    Some(Translated {
        protocol,
        client,
        dialled,
        server,
    })
}

/// Protocol, source and destination of a tuple.
fn ends(tuple: &[Tuple]) -> Option<(Protocol, SocketAddr, SocketAddr)> {
    let (mut addresses, mut ports, mut protocol) = ([None; 2], [None; 2], None);
    for part in tuple {
        match part {
            Tuple::Ip(parts) => {
                for part in parts {
                    match part {
                        IPTuple::SourceAddress(address) => addresses[0] = Some(*address),
                        IPTuple::DestinationAddress(address) => addresses[1] = Some(*address),
                        _ => {}
                    }
                }
            }
            Tuple::Proto(parts) => {
                for part in parts {
                    match part {
                        ProtoTuple::SourcePort(port) => ports[0] = Some(*port),
                        ProtoTuple::DestinationPort(port) => ports[1] = Some(*port),
                        ProtoTuple::Protocol(number) => protocol = Protocol::from_number((*number).into()),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    let socket = |index: usize| Some(SocketAddr::new(addresses[index]?, ports[index]?));
    Some((protocol?, socket(0)?, socket(1)?))
}
