//! What netfilter holds in this network namespace, as rules of one form whatever wrote them: nftables, iptables over nftables, or
//! legacy iptables. And what its connection tracking translates. Used by `doctor`, `migrate` and the
//! datapath's way to another proxy.
//!
//! What must stay true: only [`nftables::change`] and [`claims`] write; reading changes nothing, not even by loading a table's module.

/// The value of the first attribute of a kind.
macro_rules! find {
    ($attributes:expr, $variant:path) => {
        $attributes.iter().find_map(|attribute| match attribute {
            $variant(value) => Some(value),
            _ => None,
        })
    };
}

pub(crate) mod claims;
pub(crate) mod conntrack;
mod expression;
pub(crate) mod legacy;
pub(crate) mod nftables;
mod socket;
mod xtables;

use std::collections::BTreeMap;
use std::net::SocketAddr;

use ipnet::IpNet;

/// A table with its chains.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Table {
    pub(crate) is_v4: bool,
    pub(crate) name: String,
    pub(crate) chains: BTreeMap<String, Chain>,
}

/// A chain.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Chain {
    /// Packets come to it from a hook, not from another chain.
    pub(crate) is_base: bool,
    pub(crate) rules: Vec<Rule>,
}

/// A rule, as far as it matters for what a proxy does.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Rule {
    /// Its number in its table; legacy rules have none.
    pub(crate) handle: Option<u64>,
    pub(crate) destination: Option<IpNet>,
    pub(crate) protocol: Option<u8>,
    pub(crate) port: Option<u16>,
    /// Not for every source.
    pub(crate) by_source: bool,
    /// Something else has to be true as well; not that it is this rule's turn by chance.
    pub(crate) conditional: bool,
    pub(crate) comment: String,
    pub(crate) action: Action,
}

/// What a rule does.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) enum Action {
    /// Nothing, or nothing that matters here: counters, marks.
    #[default]
    None,
    /// Goes on in one of these chains.
    Chains(Vec<String>),
    /// Goes on where this map says.
    Map(String),
    /// Gives the packet one of these destinations.
    Destinations(Vec<SocketAddr>),
    /// Lets the packet pass, or leaves the chain.
    Accept,
    Drop,
    Reject,
}

impl Rule {
    /// The chains it goes on in.
    pub(crate) fn targets(&self) -> &[String] {
        match &self.action {
            Action::Chains(chains) => chains,
            _ => &[],
        }
    }
}

/// Bytes of a structure of the kernel at an offset.
fn number16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn number32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// An address in network order; what follows it is not looked at.
fn address(bytes: &[u8], is_v4: bool) -> Option<std::net::IpAddr> {
    if is_v4 {
        let octets: [u8; 4] = bytes.get(..4)?.try_into().ok()?;
        Some(octets.into())
    } else {
        let octets: [u8; 16] = bytes.get(..16)?.try_into().ok()?;
        Some(octets.into())
    }
}

fn port(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// A text that ends with zero.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
