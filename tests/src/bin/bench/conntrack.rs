//! Forgetting what the kernel tracks, in the calling thread's namespace.

use std::os::fd::AsRawFd;

use anyhow::{Context, Result, bail};
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket};

const DELETE: u16 = (libc::NFNL_SUBSYS_CTNETLINK as u16) << 8 | 2;
const HEADER: usize = 16;
/// Family, version and resource, as every message of netfilter has them.
const NETFILTER: usize = 4;

/// Removes every connection.
pub(crate) fn flush() -> Result<()> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )
    .context("a netlink socket")?;
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
    let mut message = Vec::with_capacity(HEADER + NETFILTER);
    message.extend(((HEADER + NETFILTER) as u32).to_ne_bytes());
    message.extend(DELETE.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.resize(HEADER + NETFILTER, 0);
    sendto(socket.as_raw_fd(), &message, &NetlinkAddr::new(0, 0), MsgFlags::empty()).context("flushing connections")?;
    let mut answer = [0; 256];
    let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    // The acknowledgement is an error message with the number 0.
    match answer[..length].get(HEADER..HEADER + 4) {
        Some([0, 0, 0, 0]) => Ok(()),
        other => bail!("flushing connections: the kernel answers {other:?}"),
    }
}
