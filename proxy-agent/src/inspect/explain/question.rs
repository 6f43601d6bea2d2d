//! What is asked: a client and what it dials.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, bail};
use proxy_common::addr::Protocol;

/// Who dials.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// A process of this node.
    Host,
    /// Whoever has the address.
    Address(IpAddr),
}

/// See the module.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Question {
    /// Who dials.
    pub source: Source,
    /// What is dialled.
    pub destination: SocketAddr,
    /// With which protocol.
    pub protocol: Protocol,
    /// Index of the interface that the client is behind.
    pub interface: Option<u32>,
}

impl Question {
    /// From the words of the command line: `host` or an address, and ADDRESS:PORT with an optional /tcp, /udp or /sctp.
    pub fn parse(source: &str, destination: &str, interface: Option<&str>) -> anyhow::Result<Self> {
        let (address, protocol) = destination.split_once('/').unwrap_or((destination, "tcp"));
        let protocol = match protocol.to_ascii_lowercase().as_str() {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            "sctp" => Protocol::Sctp,
            _ => bail!("DST {destination:?}: {protocol:?} is no protocol of Services: write tcp, udp or sctp"),
        };
        let destination: SocketAddr = address.parse().with_context(|| {
            format!("DST {destination:?} is not an address with a port: write 10.96.0.10:80/tcp or [fd00::a]:80/tcp")
        })?;
        let source = match source {
            "host" => Source::Host,
            address => Source::Address(address.parse().with_context(|| {
                format!("SRC {address:?} is not an address: write one of the client, or `host` for this node")
            })?),
        };
        let is_other_family = matches!(source, Source::Address(ip) if ip.is_ipv4() != destination.is_ipv4());
        if is_other_family {
            bail!("SRC and DST are of different families: give both as IPv4 or both as IPv6 addresses");
        }
        Ok(Self {
            source,
            destination,
            protocol,
            interface: interface.map(index_of).transpose()?,
        })
    }
}

fn index_of(interface: &str) -> anyhow::Result<u32> {
    let name = std::ffi::CString::new(interface).context("--interface")?;
    // SAFETY: the name ends with a zero and lives through the call.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => bail!("--interface {interface:?}: there is no such interface here; `ip link` lists them"),
        index => Ok(index),
    }
}
