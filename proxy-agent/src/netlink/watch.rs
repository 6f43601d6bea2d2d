//! Follows rtnetlink: one connection for announcements, one for dumps, so that neither can be confused by the other.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{RouteAttribute, RouteHeader, RouteMessage, RouteType};
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::sys::AsyncSocket;
use rtnetlink::{Handle, MulticastGroup, RouteMessageBuilder};
use tokio::sync::watch::Sender;

use super::{NetlinkError, Network};

/// Announcements come in bursts (a pod's interface is a dozen); what arrives within this time is published once.
const BURST: Duration = Duration::from_millis(5);
/// A dump that was disturbed by changes is repeated after this long.
const RETRY: Duration = Duration::from_millis(200);
/// Room for announcements the kernel sends while we are busy.
const RECEIVE_BUFFER: usize = 1 << 20;

/// What an announcement asks for.
#[derive(PartialEq, Eq)]
enum Effect {
    None,
    Changed,
    Dump,
}

/// Publishes the network, and every change of it, until the receivers are gone.
pub async fn watch(tx: Sender<Option<Network>>) -> Result<(), NetlinkError> {
    let groups = [
        MulticastGroup::Link,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
    ];
    // Subscribed before the dump, so that nothing falls in between.
    let (mut announcing, _unused, mut announcements) =
        rtnetlink::new_multicast_connection(&groups).map_err(NetlinkError::Open)?;
    let socket = announcing.socket_mut().socket_mut();
    if let Err(error) = socket.set_rx_buf_sz(RECEIVE_BUFFER) {
        tracing::debug!(%error, "the rtnetlink socket keeps its receive buffer");
    }
    let _announcing = Task(tokio::spawn(announcing));
    let (dumping, handle, _) = rtnetlink::new_connection().map_err(NetlinkError::Open)?;
    let _dumping = Task(tokio::spawn(dumping));

    let mut network = dump(&handle).await?;
    loop {
        tx.send_if_modified(|published| {
            let changed = published.as_ref() != Some(&network);
            if changed {
                *published = Some(network.clone());
            }
            changed
        });
        let first = tokio::select! {
            message = announcements.next() => message.ok_or(NetlinkError::Closed)?,
            () = tx.closed() => return Ok(()),
        };
        let mut effect = follow(&mut network, first.0);
        while let Ok(Some((message, _))) = tokio::time::timeout(BURST, announcements.next()).await {
            match follow(&mut network, message) {
                Effect::Dump => effect = Effect::Dump,
                Effect::Changed if effect == Effect::None => effect = Effect::Changed,
                Effect::Changed | Effect::None => {}
            }
        }
        while effect == Effect::Dump {
            match dump(&handle).await {
                Ok(fresh) => {
                    network = fresh;
                    effect = Effect::Changed;
                }
                Err(error) => {
                    tracing::warn!(%error, "interfaces could not be listed, trying again");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }
}

/// A connection's driver, ended with the watch.
struct Task(tokio::task::JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn follow(network: &mut Network, message: NetlinkMessage<RouteNetlinkMessage>) -> Effect {
    let message = match message.payload {
        NetlinkPayload::InnerMessage(message) => message,
        NetlinkPayload::Overrun(_) => {
            tracing::info!("rtnetlink announcements were lost, listing interfaces again");
            return Effect::Dump;
        }
        _ => return Effect::None,
    };
    match message {
        RouteNetlinkMessage::NewLink(link) => network.set_link(&link),
        RouteNetlinkMessage::DelLink(link) => network.remove_link(&link),
        RouteNetlinkMessage::NewAddress(address) => {
            if !network.links.contains_key(&address.header.index) {
                return Effect::Dump;
            }
            network.set_address(&address);
        }
        RouteNetlinkMessage::DelAddress(address) => network.remove_address(&address),
        RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) if is_default(&route) => {
            return Effect::Dump;
        }
        _ => return Effect::None,
    }
    Effect::Changed
}

async fn dump(handle: &Handle) -> Result<Network, NetlinkError> {
    let fail = |what| move |source| NetlinkError::Dump { what, source };
    let mut network = Network::default();
    let mut links = std::pin::pin!(handle.link().get().execute());
    while let Some(link) = links.try_next().await.map_err(fail("interfaces"))? {
        network.set_link(&link);
    }
    let mut addresses = std::pin::pin!(handle.address().get().execute());
    while let Some(address) = addresses.try_next().await.map_err(fail("addresses"))? {
        network.set_address(&address);
    }
    let routes = RouteMessageBuilder::<Ipv4Addr>::new().build();
    network.default_link4 = default_link(handle, routes).await.map_err(fail("IPv4 routes"))?;
    let routes = RouteMessageBuilder::<Ipv6Addr>::new().build();
    // A kernel without IPv6 has no such routes.
    network.default_link6 = default_link(handle, routes).await.unwrap_or_else(|error| {
        tracing::debug!(%error, "no IPv6 routes");
        None
    });
    Ok(network)
}

async fn default_link(handle: &Handle, wanted: RouteMessage) -> Result<Option<u32>, rtnetlink::Error> {
    let mut routes = std::pin::pin!(handle.route().get(wanted).execute());
    let mut best: Option<(u32, u32)> = None;
    while let Some(route) = routes.try_next().await? {
        if !is_default(&route) {
            continue;
        }
        let (mut ifindex, mut metric) = (None, 0);
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Oif(index) => ifindex = Some(*index),
                RouteAttribute::Priority(priority) => metric = *priority,
                RouteAttribute::MultiPath(hops) => {
                    ifindex = ifindex.or(hops.first().map(|hop| hop.interface_index));
                }
                _ => {}
            }
        }
        if let Some(ifindex) = ifindex
            && best.is_none_or(|(lowest, _)| metric < lowest)
        {
            best = Some((metric, ifindex));
        }
    }
    Ok(best.map(|(_, ifindex)| ifindex))
}

fn is_default(route: &RouteMessage) -> bool {
    route.header.destination_prefix_length == 0
        && route.header.kind == RouteType::Unicast
        && route.header.table == RouteHeader::RT_TABLE_MAIN
}
