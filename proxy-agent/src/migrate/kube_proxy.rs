//! What kube-proxy's rules do, read from netfilter: which addresses they serve, and with which endpoints. Both of its modes.
//!
//! What counts is where a client from outside of the node and the cluster gets to: rules for pods and for the node itself are
//! shortcuts around that.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use proxy_common::addr::Protocol;

use crate::netfilter::nftables::{self as nft, Element};
use crate::netfilter::{Action, Rule, Table, legacy};

/// The table of nftables mode.
pub(crate) const TABLE: &str = "kube-proxy";
/// Deeper than its chains are nested.
const DEPTH: usize = 8;

/// What clients dial: an address, unspecified for a node port.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct Frontend {
    pub(crate) address: IpAddr,
    pub(crate) port: u16,
    pub(crate) protocol: Protocol,
}

impl fmt::Display for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.address.is_ipv4() { "IPv4" } else { "IPv6" };
        match self.address {
            address if address.is_unspecified() => write!(f, "node port {}/{}, {family}", self.port, self.protocol),
            address => write!(f, "{}/{}", SocketAddr::new(address, self.port), self.protocol),
        }
    }
}

/// What becomes of a new connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Serves {
    /// It goes to one of these.
    Endpoints(BTreeSet<SocketAddr>),
    Refused,
    Dropped,
}

impl fmt::Display for Serves {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused => f.write_str("refused"),
            Self::Dropped => f.write_str("dropped"),
            Self::Endpoints(endpoints) => {
                let list: Vec<String> = endpoints.iter().map(ToString::to_string).collect();
                f.write_str(&list.join(","))
            }
        }
    }
}

/// How the rules are written.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Mode {
    Nftables,
    Iptables,
    LegacyIptables,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
            Self::LegacyIptables => "iptables (legacy)",
        })
    }
}

/// The rules of one mode, both families.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Rules {
    pub(crate) mode: Mode,
    /// With kube-proxy's word for the Service, if it says one.
    pub(crate) frontends: BTreeMap<Frontend, (Serves, String)>,
    /// Where its rules are not as it writes them.
    pub(crate) problems: Vec<String>,
}

/// The rules of every mode of which there are some. One is the rule; of a mode it ran in before, others may be left.
pub(crate) fn read() -> io::Result<Vec<Rules>> {
    let mut found = Vec::new();
    for mode in [Mode::Nftables, Mode::Iptables, Mode::LegacyIptables] {
        let mut rules = Rules {
            mode,
            frontends: BTreeMap::new(),
            problems: Vec::new(),
        };
        let mut is_there = false;
        for is_v4 in [true, false] {
            is_there |= match mode {
                Mode::Nftables => rules.read_nftables(is_v4)?,
                Mode::Iptables => rules.read_iptables(is_v4, &|name| nft::table(is_v4, name))?,
                Mode::LegacyIptables => {
                    let names = legacy::names(is_v4);
                    rules.read_iptables(is_v4, &|name| legacy::table(is_v4, name, &names))?
                }
            };
        }
        if is_there {
            found.push(rules);
        }
    }
    Ok(found)
}

/// What stands for every address of the node.
pub(super) fn any(is_v4: bool) -> IpAddr {
    if is_v4 {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    }
}

impl Rules {
    fn add(&mut self, frontend: Frontend, serves: Serves, service: &str) {
        self.frontends.insert(frontend, (serves, service.to_owned()));
    }

    /// Is there anything of nftables mode?
    fn read_nftables(&mut self, is_v4: bool) -> io::Result<bool> {
        let Some(table) = nft::table(is_v4, TABLE)? else {
            return Ok(false);
        };
        if !table.chains.contains_key("services") {
            // What `remove-rules` leaves for connections that need it.
            return Ok(false);
        }
        for (base, chain) in [
            ("nat-prerouting", "services"),
            ("nat-output", "services"),
            ("filter-input", "service-endpoints-check"),
            ("filter-forward", "service-endpoints-check"),
            ("filter-output", "service-endpoints-check"),
        ] {
            self.must_lead(&table, base, chain);
        }
        let leads_to = |chain: &str, map: &str| {
            let rules = table.chains.get(chain).map_or(&[][..], |chain| &chain.rules);
            rules.iter().any(|rule| rule.action == Action::Map(map.to_owned()))
        };
        for (chain, map, nothing) in [
            ("services", "service-ips", "service-endpoints-check"),
            ("services", "service-nodeports", "nodeport-endpoints-check"),
        ] {
            if !leads_to(chain, map) {
                self.problem(&table, &format!("chain {chain} has no rule with map {map}"));
            }
            let unserved = map.replace("service-ips", "no-endpoint-services");
            let unserved = unserved.replace("service-nodeports", "no-endpoint-nodeports");
            if !leads_to(nothing, &unserved) {
                self.problem(&table, &format!("chain {nothing} has no rule with map {unserved}"));
            }
            for (key, action) in nft::elements(is_v4, TABLE, map)? {
                let Action::Chains(chains) = &action else { continue };
                let endpoints: BTreeSet<_> = chains
                    .iter()
                    .flat_map(|chain| endpoints(&table, chain, DEPTH))
                    .collect();
                if let Some(frontend) = key_of(is_v4, &key) {
                    let service = chains.first().and_then(|chain| chain.split_once('-'));
                    self.add(
                        frontend,
                        Serves::Endpoints(endpoints),
                        service.map_or("", |(_, name)| name.split_once('-').map_or(name, |(_, name)| name)),
                    );
                }
            }
            let verdicts = nft::elements(is_v4, TABLE, &unserved)?;
            self.add_unserved(is_v4, &table, &verdicts);
        }
        Ok(true)
    }

    /// Addresses without an endpoint for clients from outside.
    fn add_unserved(&mut self, is_v4: bool, table: &Table, verdicts: &[Element]) {
        for (key, action) in verdicts {
            let Some(frontend) = key_of(is_v4, key) else { continue };
            let is_reject = |rule: &Rule| rule.action == Action::Reject;
            let serves = match action {
                Action::Drop => Serves::Dropped,
                Action::Chains(chains) if chains.iter().any(|chain| rules(table, chain).iter().any(is_reject)) => {
                    Serves::Refused
                }
                _ => continue,
            };
            let service = self.frontends.get(&frontend).map(|(_, service)| service.clone());
            self.add(frontend, serves, &service.unwrap_or_default());
        }
    }

    /// Is there anything of iptables mode?
    fn read_iptables(&mut self, is_v4: bool, table: &dyn Fn(&str) -> io::Result<Option<Table>>) -> io::Result<bool> {
        let services = "KUBE-SERVICES";
        let Some(nat) = table("nat")?.filter(|nat| nat.chains.contains_key(services)) else {
            return Ok(false);
        };
        for base in ["PREROUTING", "OUTPUT"] {
            self.must_lead(&nat, base, services);
        }
        self.must_lead(&nat, services, "KUBE-NODEPORTS");
        for (chain, is_node_port) in [(services, false), ("KUBE-NODEPORTS", true)] {
            for rule in rules(&nat, chain) {
                let Some(frontend) = frontend_of(is_v4, rule, is_node_port) else {
                    continue;
                };
                let targets = rule.targets().iter();
                let endpoints: BTreeSet<_> = targets.flat_map(|chain| endpoints(&nat, chain, DEPTH)).collect();
                self.add(frontend, Serves::Endpoints(endpoints), service_of(&rule.comment));
            }
        }
        let Some(filter) = table("filter")? else {
            return Ok(true);
        };
        for (chain, bases) in [
            (services, &["FORWARD", "OUTPUT"][..]),
            ("KUBE-EXTERNAL-SERVICES", &["INPUT", "FORWARD"]),
        ] {
            for base in bases {
                self.must_lead(&filter, base, chain);
            }
            for rule in rules(&filter, chain) {
                let serves = match rule.action {
                    Action::Drop => Serves::Dropped,
                    Action::Reject => Serves::Refused,
                    _ => continue,
                };
                // A node port is one of whatever address the node has.
                if let Some(frontend) = frontend_of(is_v4, rule, rule.destination.is_none()) {
                    self.add(frontend, serves, service_of(&rule.comment));
                }
            }
        }
        Ok(true)
    }

    /// Notes if a chain does not lead to another.
    fn must_lead(&mut self, table: &Table, from: &str, to: &str) {
        if !rules(table, from)
            .iter()
            .any(|rule| rule.targets().iter().any(|target| target == to))
        {
            self.problem(table, &format!("chain {from} does not lead to {to}"));
        }
    }

    fn problem(&mut self, table: &Table, what: &str) {
        let family = if table.is_v4 { "ip" } else { "ip6" };
        self.problems.push(format!("table {family} {}: {what}", table.name));
    }
}

fn rules<'a>(table: &'a Table, chain: &str) -> &'a [Rule] {
    table.chains.get(chain).map_or(&[], |chain| &chain.rules)
}

/// Where a chain sends clients from outside.
fn endpoints(table: &Table, chain: &str, depth: usize) -> BTreeSet<SocketAddr> {
    let mut found = BTreeSet::new();
    if depth == 0 {
        return found;
    }
    // Source ranges of a load balancer: every one of them leads to the same.
    let any_source = chain.starts_with("KUBE-FW-");
    for rule in rules(table, chain) {
        if rule.conditional || (rule.by_source && !any_source) {
            continue;
        }
        match &rule.action {
            Action::Destinations(to) => found.extend(to),
            Action::Chains(chains) => found.extend(chains.iter().flat_map(|next| endpoints(table, next, depth - 1))),
            _ => {}
        }
    }
    found
}

/// The key of a map: address unless it is a node port's, protocol, port, each on 4 bytes or a multiple.
fn key_of(is_v4: bool, key: &[u8]) -> Option<Frontend> {
    let split = key.len().checked_sub(8)?;
    let (address, rest) = key.split_at(split);
    let address = match <[u8; 4]>::try_from(address) {
        Ok(octets) => octets.into(),
        Err(_) => match <[u8; 16]>::try_from(address) {
            Ok(octets) => octets.into(),
            Err(_) if address.is_empty() => any(is_v4),
            Err(_) => return None,
        },
    };
    Some(Frontend {
        address,
        port: u16::from_be_bytes(rest.get(4..6)?.try_into().ok()?),
        protocol: Protocol::from_number(*rest.first()?)?,
    })
}

/// The address and port that a rule is for. A node port's may have the loopback addresses as its destination, for counting.
fn frontend_of(is_v4: bool, rule: &Rule, is_node_port: bool) -> Option<Frontend> {
    let address = match rule.destination {
        Some(prefix) if prefix.prefix_len() == prefix.max_prefix_len() => prefix.addr(),
        None if is_node_port => any(is_v4),
        _ => return None,
    };
    Some(Frontend {
        address,
        port: rule.port?,
        protocol: Protocol::from_number(rule.protocol?)?,
    })
}

/// The first word of kube-proxy's comment, such as `default/web:http cluster IP`.
fn service_of(comment: &str) -> &str {
    comment.split(' ').next().unwrap_or_default()
}
