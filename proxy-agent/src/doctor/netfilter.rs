//! Names of netfilter's chains, asked of the kernel: nftables over netlink, legacy iptables by its socket options. Read-only.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_GETCHAIN: u16 = 4;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
/// `nlmsghdr`, and `nfgenmsg` behind it.
const HEADER: usize = 16;
const FAMILY_HEADER: usize = 4;
/// Room for one answer: the kernel sends at most this much at once.
const ANSWER: usize = 1 << 16;
/// The kernel answers at once.
const PATIENCE: libc::timeval = libc::timeval { tv_sec: 2, tv_usec: 0 };

/// `IPT_SO_GET_INFO` and `IPT_SO_GET_ENTRIES`, which have the same numbers for IPv6.
const GET_INFO: libc::c_int = 64;
const GET_ENTRIES: libc::c_int = 65;
const TABLE_NAME: usize = 32;
/// `ipt_getinfo`: name, valid hooks, five entries, five underflows, number of entries, size.
const INFO: usize = TABLE_NAME + 4 + 5 * 4 + 5 * 4 + 4 + 4;
/// `ipt_get_entries` before the entries: name, size, padding to 8.
const ENTRIES: usize = TABLE_NAME + 8;

/// A chain of nftables.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Chain {
    pub(super) table: String,
    pub(super) name: String,
}

/// Every chain of every family in this network namespace, those of iptables-nft included.
pub(super) fn chains() -> io::Result<Vec<Chain>> {
    let socket = socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_NETFILTER)?;
    let request = request();
    // SAFETY: the buffer lives through the call and has the length that is given.
    let sent = unsafe { libc::send(socket.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut chains = Vec::new();
    let mut answer = vec![0u8; ANSWER];
    loop {
        // SAFETY: as above.
        let length = unsafe { libc::recv(socket.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0) };
        let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
        if parse(answer.get(..length).unwrap_or_default(), &mut chains)? {
            return Ok(chains);
        }
    }
}

fn request() -> Vec<u8> {
    let kind = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETCHAIN;
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
    let mut bytes = Vec::with_capacity(HEADER + FAMILY_HEADER);
    bytes.extend(((HEADER + FAMILY_HEADER) as u32).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    // Sequence and port; then any family, version 0, resource 0.
    bytes.extend([0; 8]);
    bytes.extend([0; FAMILY_HEADER]);
    bytes
}

/// Appends the chains of an answer; true at the end of the list.
fn parse(mut bytes: &[u8], chains: &mut Vec<Chain>) -> io::Result<bool> {
    while let Some((length, kind)) = number32(bytes, 0).zip(number16(bytes, 4)) {
        let length = length as usize;
        let Some(message) = bytes.get(HEADER..length) else {
            return Err(io::Error::from(io::ErrorKind::InvalidData));
        };
        match i32::from(kind) {
            libc::NLMSG_DONE => return Ok(true),
            libc::NLMSG_ERROR => {
                let code = number32(message, 0).unwrap_or_default() as i32;
                return Err(io::Error::from_raw_os_error(-code));
            }
            _ if kind == NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWCHAIN => {
                let attributes = message.get(FAMILY_HEADER..).unwrap_or_default();
                chains.push(Chain {
                    table: attribute(attributes, NFTA_CHAIN_TABLE),
                    name: attribute(attributes, NFTA_CHAIN_NAME),
                });
            }
            _ => {}
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// The text of an attribute, empty if it is not there.
fn attribute(mut bytes: &[u8], wanted: u16) -> String {
    while let Some((length, kind)) = number16(bytes, 0).zip(number16(bytes, 2)) {
        let length = usize::from(length);
        let Some(value) = bytes.get(4..length) else { break };
        if kind == wanted {
            return String::from_utf8_lossy(value).trim_end_matches('\0').to_owned();
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    String::new()
}

fn number16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn number32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// The legacy nat table as the kernel gives it.
pub(super) fn legacy_table(is_v4: bool) -> io::Result<Vec<u8>> {
    let (family, level) = if is_v4 {
        (libc::AF_INET, libc::IPPROTO_IP)
    } else {
        (libc::AF_INET6, libc::IPPROTO_IPV6)
    };
    let socket = socket(family, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
    let mut info = vec![0u8; INFO];
    info[..3].copy_from_slice(b"nat");
    option(&socket, level, GET_INFO, &mut info)?;
    let size = number32(&info, INFO - 4).unwrap_or_default();
    let mut entries = vec![0u8; ENTRIES + size as usize];
    entries[..3].copy_from_slice(b"nat");
    entries[TABLE_NAME..TABLE_NAME + 4].copy_from_slice(&size.to_ne_bytes());
    option(&socket, level, GET_ENTRIES, &mut entries)?;
    Ok(entries)
}

fn option(socket: &OwnedFd, level: libc::c_int, name: libc::c_int, value: &mut [u8]) -> io::Result<()> {
    let mut length = value.len() as libc::socklen_t;
    // SAFETY: the buffer lives through the call and has the length that is given.
    let result = unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &mut length) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn socket(family: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the descriptor is checked and owned at once.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: nobody else owns the new descriptor.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: the value lives through the call and has the size that is given.
    unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            std::ptr::from_ref(&PATIENCE).cast(),
            size_of::<libc::timeval>() as libc::socklen_t,
        );
    }
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn answers_are_read() {
        let attribute = |kind: u16, text: &str| {
            let mut bytes = ((4 + text.len() + 1) as u16).to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(text.bytes());
            bytes.push(0);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        };
        let body = [
            vec![0; 4],
            attribute(NFTA_CHAIN_TABLE, "nat"),
            attribute(NFTA_CHAIN_NAME, "KUBE-SERVICES"),
        ]
        .concat();
        let mut bytes = message(NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWCHAIN, &body);
        let mut chains = Vec::new();
        assert!(!parse(&bytes, &mut chains).unwrap());
        bytes.extend(message(libc::NLMSG_DONE as u16, &[0; 4]));
        assert!(parse(&bytes, &mut chains).unwrap());
        let expected = Chain {
            table: "nat".to_owned(),
            name: "KUBE-SERVICES".to_owned(),
        };
        assert_eq!(chains, [expected.clone(), expected]);
        let refused = message(libc::NLMSG_ERROR as u16, &(-libc::EPERM).to_ne_bytes());
        assert_eq!(
            parse(&refused, &mut chains).unwrap_err().raw_os_error(),
            Some(libc::EPERM)
        );
        assert!(parse(&bytes[..30], &mut chains).is_err(), "cut off");
    }
}
