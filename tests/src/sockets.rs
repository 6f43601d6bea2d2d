//! Sockets with options that the standard library does not set: for tests about single packets, ports and path MTUs.
//!
//! All calls are meant to run inside a namespace, on a thread of [`crate::netns::Netns::run`].

use std::io;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::echo::{Failure, PATIENCE};

/// Sets an integer option.
pub fn set_option(socket: &impl AsRawFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    // SAFETY: the option's value is an integer, whose address and size are passed.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn option(socket: &impl AsRawFd, level: i32, name: i32) -> io::Result<i32> {
    let mut value = 0i32;
    let mut size = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the option's value is an integer, whose address and size are passed.
    let result = unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut size) };
    if result == 0 {
        Ok(value)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// What the kernel believes to be the path MTU of a connected socket to `peer`.
pub fn path_mtu(socket: &impl AsRawFd, peer: SocketAddr) -> io::Result<i32> {
    if peer.is_ipv4() {
        option(socket, libc::IPPROTO_IP, libc::IP_MTU)
    } else {
        option(socket, libc::IPPROTO_IPV6, libc::IPV6_MTU)
    }
}

/// A UDP socket connected to `server`, on a random port, that waits [`PATIENCE`] for answers.
pub fn udp_to(server: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind(any(server))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(server)?;
    Ok(socket)
}

/// The same, forbidden to fragment.
pub fn udp_unfragmented(server: SocketAddr) -> io::Result<UdpSocket> {
    let socket = udp_to(server)?;
    if server.is_ipv4() {
        set_option(&socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO)?;
    } else {
        set_option(
            &socket,
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU_DISCOVER,
            libc::IPV6_PMTUDISC_DO,
        )?;
    }
    Ok(socket)
}

/// Sends without the don't-fragment flag; in IPv6, where there is none, fragments at the sender when it has to.
pub fn let_routers_fragment(socket: &UdpSocket, peer: SocketAddr) -> io::Result<()> {
    if peer.is_ipv4() {
        set_option(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT)?;
    }
    Ok(())
}

/// Connects from a chosen port, which may have been used a moment ago; port 0 for any.
pub fn tcp_from(port: u16, server: SocketAddr) -> Result<TcpStream, Failure> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket, sockopt};
    let fail = |errno: nix::Error| Failure::from(io::Error::from(errno));
    let family = if server.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).map_err(fail)?;
    nix::sys::socket::setsockopt(&socket, sockopt::ReuseAddr, &true).map_err(fail)?;
    // connect(2) obeys the send timeout.
    let patience = nix::sys::time::TimeVal::new(PATIENCE.as_secs() as libc::time_t, 0);
    nix::sys::socket::setsockopt(&socket, sockopt::SendTimeout, &patience).map_err(fail)?;
    let mut local = any(server);
    local.set_port(port);
    bind(socket.as_raw_fd(), &SockaddrStorage::from(local)).map_err(fail)?;
    match connect(socket.as_raw_fd(), &SockaddrStorage::from(server)) {
        Ok(()) => Ok(TcpStream::from(socket)),
        Err(nix::Error::EINPROGRESS) => Err(Failure::Timeout),
        Err(errno) => Err(fail(errno)),
    }
}

/// Closing this connection will reset it.
pub fn reset_at_close(stream: &TcpStream) -> io::Result<()> {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    nix::sys::socket::setsockopt(stream, nix::sys::socket::sockopt::Linger, &linger).map_err(io::Error::from)
}

/// Sends a TCP segment as it is, header and all, from an address of this namespace.
pub fn send_segment(from: SocketAddr, to: SocketAddr, segment: &[u8]) -> io::Result<()> {
    let family = if from.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_TCP) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor, owned by nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // A raw socket has no port.
    let [from, to] =
        [from, to].map(|address| nix::sys::socket::SockaddrStorage::from(SocketAddr::new(address.ip(), 0)));
    nix::sys::socket::bind(socket.as_raw_fd(), &from)?;
    nix::sys::socket::sendto(socket.as_raw_fd(), segment, &to, nix::sys::socket::MsgFlags::empty())?;
    Ok(())
}

fn any(like: SocketAddr) -> SocketAddr {
    if like.is_ipv4() {
        ([0u8; 4], 0).into()
    } else {
        ([0u16; 8], 0).into()
    }
}
