//! Which of the node's addresses serve node ports (S81–S84). The one place that decides it; `links` asks for every local address
//! whenever addresses or the Node object change.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// What `--nodeport-addresses` and `--localhost-nodeports` say. In a family in which it names no address all of them serve (S82),
/// so nothing at all means all (S83).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodePortAddresses {
    /// `all`: every address, whenever it appears (S85).
    pub all: bool,
    /// `primary`: the Node object's address of each family (S84).
    pub primary: bool,
    /// Prefixes; those of [`Self::LOCALHOST`] for `localhost`.
    pub prefixes: Vec<IpNet>,
    /// Loopback addresses serve them as well, where they are among the others.
    pub loopback_allowed: bool,
}

impl Default for NodePortAddresses {
    fn default() -> Self {
        Self {
            all: false,
            primary: false,
            prefixes: Vec::new(),
            loopback_allowed: true,
        }
    }
}

impl NodePortAddresses {
    /// What `localhost` stands for.
    pub const LOCALHOST: [IpNet; 2] = [
        IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)), 8),
        IpNet::new_assert(IpAddr::V6(Ipv6Addr::LOCALHOST), 128),
    ];

    /// Does a local address serve node ports, on a node with these addresses in its Node object?
    pub fn accepts(&self, ip: IpAddr, node_ips: &[IpAddr]) -> bool {
        if ip.is_loopback() && !self.loopback_allowed {
            return false;
        }
        !self.is_restricted(ip.is_ipv4(), node_ips)
            || self.named(ip.is_ipv4(), node_ips).any(|prefix| prefix.contains(&ip))
    }

    /// Do only some of a family's addresses serve them?
    pub fn is_restricted(&self, is_ipv4: bool, node_ips: &[IpAddr]) -> bool {
        !self.all && self.named(is_ipv4, node_ips).next().is_some()
    }

    /// The addresses of a family that are named. S84: loopback ones of the node are skipped.
    fn named(&self, is_ipv4: bool, node_ips: &[IpAddr]) -> impl Iterator<Item = IpNet> {
        let primary = node_ips.iter().filter(|ip| self.primary && !ip.is_loopback());
        let all = self.prefixes.iter().copied().chain(primary.map(|ip| IpNet::from(*ip)));
        all.filter(move |prefix| prefix.addr().is_ipv4() == is_ipv4)
    }

    /// As the option is written, without defaults.
    pub fn words(&self) -> Vec<String> {
        let words = [(self.all, "all"), (self.primary, "primary")];
        let words = words.iter().filter(|(set, _)| *set).map(|(_, word)| (*word).to_owned());
        words.chain(self.prefixes.iter().map(ToString::to_string)).collect()
    }

    /// Does 127.0.0.1, or ::1, serve node ports?
    pub fn loopback(&self, is_ipv4: bool, node_ips: &[IpAddr]) -> bool {
        let localhost = if is_ipv4 {
            IpAddr::from(Ipv4Addr::LOCALHOST)
        } else {
            IpAddr::from(Ipv6Addr::LOCALHOST)
        };
        self.accepts(localhost, node_ips)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn choice(words: &str) -> NodePortAddresses {
        let mut choice = NodePortAddresses::default();
        for word in words.split_whitespace() {
            match word {
                "all" => choice.all = true,
                "primary" => choice.primary = true,
                "localhost" => choice.prefixes.extend(NodePortAddresses::LOCALHOST),
                "forbidden" => choice.loopback_allowed = false,
                prefix => choice.prefixes.push(prefix.parse().unwrap()),
            }
        }
        choice
    }

    #[test]
    fn node_ports_are_served_on_chosen_addresses() {
        let node = [ip("192.0.2.1"), ip("fd00::1")];
        for (words, yes, no) in [
            ("", "198.51.100.1 fd00::9 127.0.0.1 ::1", ""),
            ("all", "198.51.100.1 fd00::9 127.0.0.1 ::1", ""),
            ("all 192.0.2.0/25", "198.51.100.1 fd00::9 127.0.0.1", ""),
            ("all forbidden", "198.51.100.1 fd00::9", "127.0.0.1 127.9.9.9 ::1"),
            ("primary", "192.0.2.1 fd00::1", "192.0.2.2 fd00::2 127.0.0.1 ::1"),
            ("192.0.2.0/25", "192.0.2.127 fd00::2 ::1", "192.0.2.128 127.0.0.1"),
            ("127.0.0.0/30", "127.0.0.1 fd00::2", "192.0.2.1 127.0.0.5"),
            ("0.0.0.0/0", "127.0.0.1 192.0.2.1", ""),
            ("localhost", "127.0.0.1 ::1", "192.0.2.1 fd00::1"),
            ("localhost forbidden", "", "127.0.0.1 ::1 192.0.2.1 fd00::1"),
            (
                "primary localhost 198.51.100.0/24",
                "192.0.2.1 fd00::1 127.0.0.1 ::1 198.51.100.9",
                "192.0.2.2 fd00::2",
            ),
        ] {
            let choice = choice(words);
            for (texts, expected) in [(yes, true), (no, false)] {
                for text in texts.split_whitespace() {
                    assert_eq!(
                        choice.accepts(ip(text), &node),
                        expected,
                        "S81, S82, S84: {words:?} {text}"
                    );
                }
            }
        }
    }

    #[test]
    fn words_as_they_were_written() {
        assert_eq!(choice("192.0.2.0/24 primary").words(), ["primary", "192.0.2.0/24"]);
        assert_eq!(choice("localhost").words(), ["127.0.0.0/8", "::1/128"]);
        assert!(choice("").words().is_empty());
    }

    #[test]
    fn the_primary_address_follows_the_node() {
        let primary = choice("primary");
        for (node, texts, expected) in [
            (&[][..], "192.0.2.9 127.0.0.1 fd00::9", true),
            (&[ip("127.0.0.1"), ip("fd00::1")][..], "192.0.2.9 fd00::1", true),
            (&[ip("192.0.2.1")][..], "192.0.2.9 127.0.0.1", false),
            (&[ip("192.0.2.9")][..], "192.0.2.9 fd00::9", true),
        ] {
            for text in texts.split_whitespace() {
                assert_eq!(primary.accepts(ip(text), node), expected, "S84: {node:?} {text}");
            }
        }
        assert!(!primary.is_restricted(true, &[ip("fd00::1")]) && primary.is_restricted(false, &[ip("fd00::1")]));
        assert!(primary.loopback(true, &[ip("fd00::1")]) && !primary.loopback(false, &[ip("fd00::1")]));
    }
}
