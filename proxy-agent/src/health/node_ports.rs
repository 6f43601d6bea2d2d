//! `healthCheckNodePort` (S156–S159): tells a load balancer whether this node has endpoints of a Service with the Local policy. One
//! [`listener`](super::listener) per Service and address; `run` says what is wanted, and which addresses the node has.
//!
//! What must stay true: each family is answered with its own count; a port or an address that is not wanted any more is closed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::Health;
use super::events::Events;
use super::listener::{Answerer, serve};
use crate::datapath::NodePortAddresses;
use crate::model::ObjectName;
use crate::netlink::Network;
use crate::plan::HealthCheck;

/// The listeners. Dropping it closes them.
#[derive(Debug)]
pub struct Checks {
    health: Arc<Health>,
    events: Events,
    addresses: Addresses,
    running: HashMap<ObjectName, Running>,
}

/// Where health checks are answered: at the addresses that serve node ports.
#[derive(Debug)]
struct Addresses {
    chosen: NodePortAddresses,
    local: BTreeSet<IpAddr>,
    /// As the Node object has them.
    node_ips: Vec<IpAddr>,
}

#[derive(Debug)]
struct Running {
    latest: watch::Sender<HealthCheck>,
    listeners: BTreeMap<SocketAddr, Listener>,
}

#[derive(Debug)]
struct Listener(AbortHandle);

impl Drop for Listener {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Addresses {
    /// Where the ports of one family are bound: at the wildcard address unless there is a choice (S156).
    fn of_family(&self, is_v4: bool) -> Vec<IpAddr> {
        if !self.chosen.is_restricted(is_v4, &self.node_ips) {
            let all: IpAddr = if is_v4 {
                Ipv4Addr::UNSPECIFIED.into()
            } else {
                Ipv6Addr::UNSPECIFIED.into()
            };
            return vec![all];
        }
        let local = self.local.iter().filter(|ip| ip.is_ipv4() == is_v4);
        local
            .filter(|ip| self.chosen.accepts(**ip, &self.node_ips))
            .copied()
            .collect()
    }

    fn sockets(&self, check: &HealthCheck) -> BTreeSet<SocketAddr> {
        let families = [true, false].into_iter().zip(check.local_ready);
        families
            .filter(|(_, count)| count.is_some())
            .flat_map(|(is_v4, _)| self.of_family(is_v4))
            .map(|ip| SocketAddr::new(ip, check.port.get()))
            .collect()
    }
}

impl Checks {
    /// No listeners yet.
    pub fn new(health: Arc<Health>, chosen: NodePortAddresses, events: Events) -> Self {
        Self {
            health,
            events,
            addresses: Addresses {
                chosen,
                local: BTreeSet::new(),
                node_ips: Vec::new(),
            },
            running: HashMap::new(),
        }
    }

    /// What is to be served for a Service from now on. To be called from within the runtime.
    pub fn set(&mut self, service: ObjectName, wanted: Option<HealthCheck>) {
        let Some(wanted) = wanted else {
            self.running.remove(&service);
            return;
        };
        let running = self.running.entry(service.clone()).or_insert_with(|| Running {
            latest: watch::Sender::new(wanted),
            listeners: BTreeMap::new(),
        });
        running.latest.send_replace(wanted);
        running.listen(&service, &self.addresses, &self.health, &self.events);
    }

    /// The node's addresses as netlink sees them now.
    pub fn set_network(&mut self, network: &Network) {
        let ips = network.links.values().flat_map(|link| &link.addresses).map(|a| a.ip);
        // A link-local address means nothing without its interface, and no load balancer asks there.
        let local = ips.filter(|ip| !is_link_local6(ip)).collect();
        if self.addresses.local != local {
            self.addresses.local = local;
            self.listen_again();
        }
    }

    /// The node's own addresses as its Node object has them (S84).
    pub fn set_node_ips(&mut self, ips: &[IpAddr]) {
        if self.addresses.node_ips != ips {
            self.addresses.node_ips = ips.to_vec();
            self.listen_again();
        }
    }

    fn listen_again(&mut self) {
        for (service, running) in &mut self.running {
            running.listen(service, &self.addresses, &self.health, &self.events);
        }
    }
}

impl Running {
    /// Closes what is not wanted any more, then opens what is missing.
    fn listen(&mut self, service: &ObjectName, addresses: &Addresses, health: &Arc<Health>, events: &Events) {
        let wanted = addresses.sockets(&self.latest.borrow());
        self.listeners.retain(|address, _| wanted.contains(address));
        for address in wanted {
            self.listeners.entry(address).or_insert_with(|| {
                let answerer = Answerer {
                    health: health.clone(),
                    service: service.clone(),
                    latest: self.latest.subscribe(),
                    events: events.clone(),
                };
                Listener(tokio::spawn(serve(answerer, address)).abort_handle())
            });
        }
    }
}

fn is_link_local6(ip: &IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read, Write};
    use std::net::TcpStream;
    use std::time::Duration;

    use proxy_common::addr::Port;
    use tokio::time::sleep;

    use super::*;
    use crate::netlink::{LinkAddress, LinkInfo};

    async fn get(address: SocketAddr) -> io::Result<String> {
        let ask = move || {
            let mut stream = TcpStream::connect(address)?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(b"GET /any/path HTTP/1.1\r\nhost: x\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        };
        tokio::task::spawn_blocking(ask).await.map_err(io::Error::other)?
    }

    /// Asks until the answer is what is expected, for some seconds.
    async fn eventually(address: SocketAddr, expected: impl Fn(&io::Result<String>) -> bool) -> io::Result<String> {
        for _ in 0..500 {
            let answer = get(address).await;
            if expected(&answer) {
                return answer;
            }
            sleep(Duration::from_millis(10)).await;
        }
        get(address).await
    }

    fn healthy() -> Arc<Health> {
        Arc::new(Health::new(Duration::from_secs(30)))
    }

    /// A port that nobody has in either family.
    fn free_port() -> u16 {
        let free = std::net::TcpListener::bind("[::]:0").unwrap();
        free.local_addr().unwrap().port()
    }

    fn check(port: u16, local_ready: [Option<usize>; 2]) -> HealthCheck {
        HealthCheck {
            port: Port::new(port),
            local_ready,
        }
    }

    fn network(ips: &[&str]) -> Network {
        let addresses = ips.iter().map(|ip| LinkAddress {
            ip: ip.parse().unwrap(),
            global: true,
            preferred: true,
        });
        let info = LinkInfo {
            addresses: addresses.collect(),
            ..LinkInfo::default()
        };
        Network {
            links: [(1, info)].into(),
            ..Network::default()
        }
    }

    #[tokio::test]
    async fn each_family_answers_with_its_own_count() {
        let port = free_port();
        let service = ObjectName::new("default", "web");
        let v4 = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        let v6 = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port);
        let mut checks = Checks::new(healthy(), NodePortAddresses::default(), Events::default());
        checks.set(service.clone(), Some(check(port, [Some(2), None])));
        let text = eventually(v4, Result::is_ok).await.unwrap();
        assert!(text.starts_with("HTTP/1.1 200 "), "S157: {text}");
        for header in [
            "\r\ncontent-type: application/json\r\n",
            "\r\nx-load-balancing-endpoint-weight: 2\r\n",
            "\r\nx-content-type-options: nosniff\r\n",
        ] {
            assert!(text.contains(header), "S158: {text}");
        }
        assert!(text.contains(r#""localEndpoints":2"#) && text.contains(r#""serviceProxyHealthy":true"#));
        assert!(
            get(v6).await.is_err(),
            "S159: not in a family the Service does not have"
        );

        checks.set(service.clone(), Some(check(port, [Some(0), Some(1)])));
        let text = eventually(v6, Result::is_ok).await.unwrap();
        assert!(text.starts_with("HTTP/1.1 200 "), "S159: {text}");
        let text = get(v4).await.unwrap();
        assert!(text.starts_with("HTTP/1.1 503 "), "S159: {text}");

        checks.set(service, None);
        for address in [v4, v6] {
            assert!(eventually(address, Result::is_err).await.is_err(), "the port is closed");
        }
    }

    #[tokio::test]
    async fn only_the_chosen_addresses_answer() {
        let port = free_port();
        let prefixes = ["127.0.1.0/24", "::1/128"].map(|text| text.parse().unwrap());
        let chosen = NodePortAddresses {
            prefixes: prefixes.into(),
            ..NodePortAddresses::default()
        };
        let mut checks = Checks::new(healthy(), chosen, Events::default());
        let service = ObjectName::new("default", "web");
        checks.set(service.clone(), Some(check(port, [Some(1), Some(1)])));
        let at = |ip: &str| SocketAddr::new(ip.parse().unwrap(), port);
        // Addresses appear: those that are chosen answer.
        checks.set_network(&network(&["127.0.0.1", "127.0.1.1", "::1", "fe80::1"]));
        for chosen in ["127.0.1.1", "::1"] {
            eventually(at(chosen), Result::is_ok).await.unwrap();
        }
        assert!(get(at("127.0.0.1")).await.is_err(), "S156");
        // They vanish, others come.
        checks.set_network(&network(&["127.0.0.1", "127.0.1.2"]));
        eventually(at("127.0.1.2"), Result::is_ok).await.unwrap();
        for gone in ["127.0.1.1", "::1"] {
            assert!(eventually(at(gone), Result::is_err).await.is_err(), "{gone}");
        }
    }

    #[tokio::test]
    async fn the_node_s_own_addresses_answer() {
        let port = free_port();
        let primary = NodePortAddresses {
            primary: true,
            ..NodePortAddresses::default()
        };
        let mut checks = Checks::new(healthy(), primary, Events::default());
        let at = |ip: &str| SocketAddr::new(ip.parse().unwrap(), port);
        checks.set(ObjectName::new("default", "web"), Some(check(port, [Some(1), None])));
        checks.set_network(&network(&["127.0.0.1", "127.0.1.1"]));
        eventually(at("127.0.0.1"), Result::is_ok)
            .await
            .expect("S84: no address in the Node: all");
        // Loopback addresses are no node addresses (S84), so what is bound shows without asking.
        checks.set_node_ips(&["192.0.2.1".parse().unwrap()]);
        assert!(eventually(at("127.0.0.1"), Result::is_err).await.is_err(), "S156");
        checks.set_network(&network(&["127.0.0.1", "192.0.2.1"]));
        let listeners = &checks.running.values().next().unwrap().listeners;
        assert_eq!(listeners.keys().collect::<Vec<_>>(), [&at("192.0.2.1")]);
    }
}
