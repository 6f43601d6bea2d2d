//! Tiny TCP and UDP servers that say who they are and whom they see, and clients that say who answered.
//!
//! Every wait is bounded. A client call is meant to run inside a namespace (`pod.run(|| echo::tcp(addr))`); a server runs on
//! threads of its own until its guard is dropped.

use std::fmt;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use socket2::{Domain, Socket, Type};

use crate::netns::Netns;

/// How long a client waits for an answer.
pub const PATIENCE: Duration = Duration::from_secs(2);
/// How often a server looks whether it should stop.
const TICK: Duration = Duration::from_millis(50);
/// Larger than any datagram the tests send.
const DATAGRAM: usize = 65_536;

/// What a server says about a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Name of the server that answered.
    pub server: String,
    /// The client's address as the server sees it.
    pub client: SocketAddr,
    /// The server's own address of the connection.
    pub local: SocketAddr,
    /// Where the answer came from, as the client sees it: the connection's peer, or the datagram's source.
    pub peer: SocketAddr,
}

/// Why there was no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Refused by the other side, or by the proxy (ECONNREFUSED).
    Refused,
    /// The connection was aborted by the other side.
    Reset,
    /// Nothing came back in time.
    Timeout,
    /// No way to the address.
    Unreachable,
    /// Something else.
    Other(ErrorKind),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::ConnectionRefused => Self::Refused,
            ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe => Self::Reset,
            ErrorKind::TimedOut | ErrorKind::WouldBlock => Self::Timeout,
            ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => Self::Unreachable,
            other => Self::Other(other),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused => f.write_str("refused"),
            Self::Reset => f.write_str("reset"),
            Self::Timeout => f.write_str("timeout"),
            Self::Unreachable => f.write_str("unreachable"),
            Self::Other(kind) => write!(f, "{kind}"),
        }
    }
}

/// What a client gets.
pub type Outcome = Result<Answer, Failure>;

/// A server on TCP and UDP; it stops when dropped.
pub struct EchoServer {
    name: String,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl EchoServer {
    /// Serves TCP and UDP on each of these addresses inside a namespace. A wildcard address serves TCP only, since a UDP answer
    /// would leave from whatever address the route prefers.
    pub fn start(netns: &Netns, name: &str, addresses: &[SocketAddr]) -> Result<Self> {
        let mut server = Self {
            name: name.to_owned(),
            stop: Arc::default(),
            threads: Vec::new(),
        };
        for address in addresses {
            let listener = netns
                .run(|| TcpListener::bind(address))
                .with_context(|| format!("{name}: TCP on {address}"))?;
            listener.set_nonblocking(false)?;
            server.serve_tcp(netns, listener);
            if !address.ip().is_unspecified() {
                let socket = netns
                    .run(|| UdpSocket::bind(address))
                    .with_context(|| format!("{name}: UDP on {address}"))?;
                server.serve_udp(netns, socket)?;
            }
        }
        Ok(server)
    }

    /// The same in the namespace of the caller.
    pub fn start_here(name: &str, addresses: &[SocketAddr]) -> Result<Self> {
        Self::start(&Netns::current()?, name, addresses)
    }

    /// Its name, which is in every answer.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn serve_tcp(&mut self, netns: &Netns, listener: TcpListener) {
        let (name, stop) = (self.name.clone(), self.stop.clone());
        self.threads.push(netns.spawn(move || {
            // Accept with a receive timeout: SO_RCVTIMEO holds for accept as well.
            let timeout = nix::sys::time::TimeVal::new(0, TICK.as_micros() as libc::suseconds_t);
            nix::sys::socket::setsockopt(&listener, nix::sys::socket::sockopt::ReceiveTimeout, &timeout)
                .expect("a listener has a receive timeout");
            while !stop.load(Ordering::Relaxed) {
                if let Ok((stream, _)) = listener.accept() {
                    let (name, stop) = (name.clone(), stop.clone());
                    std::thread::spawn(move || {
                        // A client that goes away is no fault of the server.
                        let _ = serve_stream(&name, &stop, stream);
                    });
                }
            }
        }));
    }

    fn serve_udp(&mut self, netns: &Netns, socket: UdpSocket) -> io::Result<()> {
        let (name, stop) = (self.name.clone(), self.stop.clone());
        let local = socket.local_addr()?;
        socket.set_read_timeout(Some(TICK))?;
        self.threads.push(netns.spawn(move || {
            let mut buffer = vec![0; DATAGRAM];
            while !stop.load(Ordering::Relaxed) {
                if let Ok((length, client)) = socket.recv_from(&mut buffer) {
                    // The datagram comes back behind the answer, so that a client can tell its requests apart.
                    let mut answer = line(&name, client, local).into_bytes();
                    answer.extend(&buffer[..length]);
                    let _ = socket.send_to(&answer, client);
                }
            }
        }));
        Ok(())
    }
}

impl Drop for EchoServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Requests are lines: `?` asks for an answer; `<length>` announces that many bytes, which are read to the end and sent back.
fn serve_stream(name: &str, stop: &AtomicBool, stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(TICK))?;
    let (client, local) = (stream.peer_addr()?, stream.local_addr()?);
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    let mut request = String::new();
    while !stop.load(Ordering::Relaxed) {
        match reader.read_line(&mut request) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            // What was read before the timeout stays in `request`.
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => continue,
            Err(error) => return Err(error),
        }
        if let Ok(length) = request.trim().parse() {
            let mut data = vec![0; length];
            reader.get_ref().set_read_timeout(Some(PATIENCE))?;
            reader.read_exact(&mut data)?;
            reader.get_ref().set_read_timeout(Some(TICK))?;
            writer.write_all(&data)?;
        } else {
            writer.write_all(line(name, client, local).as_bytes())?;
        }
        request.clear();
    }
    Ok(())
}

fn line(name: &str, client: SocketAddr, local: SocketAddr) -> String {
    format!("{name} {} {}\n", canonical(client), canonical(local))
}

/// Reads an answer.
pub(crate) fn parse(line: &str, peer: SocketAddr) -> Result<Answer> {
    let mut words = line.split_whitespace();
    let mut next = || {
        words
            .next()
            .ok_or_else(|| anyhow!("{line:?} is not an answer of an echo server"))
    };
    Ok(Answer {
        server: next()?.to_owned(),
        client: next()?.parse()?,
        local: next()?.parse()?,
        peer,
    })
}

/// The IPv4 address of an IPv4-mapped one; others unchanged.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// An IPv4 address as an IPv6 socket dials it; others unchanged.
pub fn mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    }
}

/// What a client sends for an answer over TCP.
pub(crate) const QUESTION: &[u8] = b"?\n";

/// One request over a connection of its own.
pub fn tcp(server: SocketAddr) -> Outcome {
    Held::open(server)?.ask()
}

/// Only connects, with a patience of its own; the connection is closed at once.
pub fn dial(server: SocketAddr, patience: Duration) -> Result<(), Failure> {
    TcpStream::connect_timeout(&server, patience)?;
    Ok(())
}

/// A TCP connection that stays open between requests.
pub struct Held {
    reader: BufReader<TcpStream>,
}

impl Held {
    /// Connects.
    pub fn open(server: SocketAddr) -> Result<Self, Failure> {
        Self::over(TcpStream::connect_timeout(&server, PATIENCE)?)
    }

    /// Connects from a source port of choice.
    pub fn open_from(port: u16, server: SocketAddr) -> Result<Self, Failure> {
        let socket = Socket::new(Domain::for_address(server), Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(unspecified(server), port).into())?;
        socket.connect_timeout(&server.into(), PATIENCE)?;
        Self::over(socket.into())
    }

    /// Uses a connection that is there already.
    pub fn over(stream: TcpStream) -> Result<Self, Failure> {
        Self::from_stream(stream, PATIENCE)
    }

    fn from_stream(stream: TcpStream, patience: Duration) -> Result<Self, Failure> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        Ok(Self {
            reader: BufReader::new(stream),
        })
    }

    /// The connection itself.
    pub fn stream(&self) -> &TcpStream {
        self.reader.get_ref()
    }

    /// One request and its answer.
    pub fn ask(&mut self) -> Outcome {
        let peer = self.peer()?;
        self.reader.get_mut().write_all(QUESTION)?;
        let mut answer = String::new();
        if self.reader.read_line(&mut answer)? == 0 {
            return Err(Failure::Reset);
        }
        parse(&answer, peer).map_err(|_| Failure::Other(ErrorKind::InvalidData))
    }

    /// The peer as `getpeername` tells it.
    pub fn peer(&self) -> Result<SocketAddr, Failure> {
        Ok(self.reader.get_ref().peer_addr()?)
    }

    /// Sends `data` and gives back what the server returns of it.
    pub fn exchange(&mut self, data: &[u8]) -> Result<Vec<u8>, Failure> {
        let stream = self.reader.get_mut();
        writeln!(stream, "{}", data.len())?;
        stream.write_all(data)?;
        let mut back = vec![0; data.len()];
        self.reader.read_exact(&mut back)?;
        Ok(back)
    }
}

/// The unspecified address of the server's family.
fn unspecified(server: SocketAddr) -> IpAddr {
    if server.is_ipv4() {
        [0; 4].into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    }
}

/// A UDP socket of a client.
pub struct Udp {
    socket: UdpSocket,
    sent: u32,
}

impl Udp {
    /// A socket of the family of `server`, on a random port.
    pub fn open(server: SocketAddr) -> Result<Self, Failure> {
        let socket = UdpSocket::bind(SocketAddr::new(unspecified(server), 0))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { socket, sent: 0 })
    }

    /// A socket whose requests all go to `server`.
    pub fn connect(server: SocketAddr) -> Result<Self, Failure> {
        let udp = Self::open(server)?;
        udp.socket.connect(server)?;
        Ok(udp)
    }

    /// The peer of a connected socket as `getpeername` tells it.
    pub fn peer(&self) -> Result<SocketAddr, Failure> {
        Ok(self.socket.peer_addr()?)
    }

    /// One request over a connected socket.
    pub fn ask(&mut self) -> Outcome {
        self.request(None)
    }

    /// One request with `sendto`, over a socket that is not connected.
    pub fn ask_at(&mut self, server: SocketAddr) -> Outcome {
        self.request(Some(server))
    }

    fn request(&mut self, server: Option<SocketAddr>) -> Outcome {
        self.sent += 1;
        let request = format!("#{}", self.sent);
        match server {
            Some(server) => self.socket.send_to(request.as_bytes(), server)?,
            None => self.socket.send(request.as_bytes())?,
        };
        let mut buffer = vec![0; DATAGRAM];
        loop {
            let (length, peer) = self.socket.recv_from(&mut buffer)?;
            let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
            // A late answer to an earlier request is not this one's.
            if text.ends_with(&format!("\n{request}")) {
                return parse(&text, peer).map_err(|_| Failure::Other(ErrorKind::InvalidData));
            }
        }
    }
}

/// One request from a connected UDP socket of its own.
pub fn udp(server: SocketAddr) -> Outcome {
    Udp::connect(server)?.ask()
}

/// A client that chooses its own port, so that a test decides which connections share a tuple.
#[derive(Clone, Copy, Debug)]
pub struct Client {
    /// Its port; it may have been used a moment ago.
    pub port: u16,
    /// How long it waits.
    pub patience: Duration,
}

impl Client {
    /// One TCP request.
    pub fn tcp(&self, server: SocketAddr) -> Outcome {
        let socket = self.socket(Type::STREAM, server)?;
        socket.connect_timeout(&server.into(), self.patience)?;
        Held::from_stream(socket.into(), self.patience)?.ask()
    }

    /// One request from a connected UDP socket.
    pub fn udp(&self, server: SocketAddr) -> Outcome {
        let socket: UdpSocket = self.socket(Type::DGRAM, server)?.into();
        socket.connect(server)?;
        Udp { socket, sent: 0 }.ask()
    }

    /// One request from a UDP socket that is not connected.
    pub fn udp_unconnected(&self, server: SocketAddr) -> Outcome {
        let socket: UdpSocket = self.socket(Type::DGRAM, server)?.into();
        Udp { socket, sent: 0 }.ask_at(server)
    }

    /// Sends an echo request (a ping), without waiting for an answer. The namespace has to allow everybody to do so.
    pub fn ping(address: IpAddr) -> Result<()> {
        let (domain, protocol, kind) = match address {
            IpAddr::V4(_) => (Domain::IPV4, socket2::Protocol::ICMPV4, 8),
            IpAddr::V6(_) => (Domain::IPV6, socket2::Protocol::ICMPV6, 128),
        };
        let socket = Socket::new(domain, Type::DGRAM, Some(protocol)).context("opening a socket for pings")?;
        match socket.send_to(&[kind, 0, 0, 0, 0, 0, 0, 1], &SocketAddr::new(address, 0).into()) {
            // The sender's own kernel says so if the packet is dropped where it leaves.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(()),
            sent => Ok(sent.map(drop)?),
        }
    }

    fn socket(&self, kind: Type, server: SocketAddr) -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(server), kind, None)?;
        socket.set_reuse_address(kind == Type::STREAM)?;
        socket.set_read_timeout(Some(self.patience))?;
        socket.bind(&SocketAddr::new(unspecified(server), self.port).into())?;
        Ok(socket)
    }
}

/// One request from an unconnected UDP socket of its own.
pub fn udp_unconnected(server: SocketAddr) -> Outcome {
    Udp::open(server)?.ask_at(server)
}

/// What a request is called, and how it is made.
pub type Request = (&'static str, fn(SocketAddr) -> Outcome);
/// One request of each kind.
pub const REQUESTS: [Request; 3] = [("TCP", tcp), ("UDP", udp), ("UDP sendto", udp_unconnected)];
/// Those that can be refused: the kernel tells an unconnected UDP socket of no refusal.
pub const CONNECTED: [Request; 2] = [REQUESTS[0], REQUESTS[1]];

/// `count` answers' server names; the first failure ends it.
pub fn names(count: usize, mut request: impl FnMut() -> Outcome) -> Result<Vec<String>> {
    (0..count)
        .map(|i| {
            request()
                .map(|answer| answer.server)
                .map_err(|failure| anyhow!("request {i}: {failure}"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn who_answered_whom_over_what() {
        let netns = Netns::new("echo").unwrap();
        for local in ["127.0.0.1:7", "[::1]:7"] {
            let address: SocketAddr = local.parse().unwrap();
            let server = EchoServer::start(&netns, "alpha", &[address]).unwrap();
            for request in [tcp, udp, udp_unconnected] {
                let answer = netns.run(|| request(address)).unwrap();
                assert_eq!(
                    (answer.server.as_str(), answer.local, answer.peer),
                    ("alpha", address, address)
                );
            }
            drop(server);
            assert_eq!(netns.run(|| tcp(address)), Err(Failure::Refused));
            assert_eq!(netns.run(|| udp(address)), Err(Failure::Refused));
        }
    }

    #[test]
    fn an_ipv6_socket_dials_ipv4() {
        let netns = Netns::new("mapped").unwrap();
        let address: SocketAddr = "127.0.0.1:7".parse().unwrap();
        let _server = EchoServer::start(&netns, "alpha", &[address]).unwrap();
        for request in [tcp, udp, udp_unconnected] {
            let answer = netns.run(|| request(mapped(address))).unwrap();
            assert_eq!((answer.local, answer.peer), (address, mapped(address)));
        }
    }

    #[test]
    fn streams_are_held_and_carry_megabytes() {
        let netns = Netns::new("bulk").unwrap();
        let address: SocketAddr = "127.0.0.1:7".parse().unwrap();
        let _server = EchoServer::start(&netns, "alpha", &[address]).unwrap();
        netns.run(|| {
            let mut held = Held::open(address).unwrap();
            assert_eq!(held.ask().unwrap().server, "alpha");
            let data: Vec<u8> = (0..4_000_000u32).map(|i| (i % 251) as u8).collect();
            assert!(held.exchange(&data).unwrap() == data);
            assert_eq!(held.ask().unwrap().server, "alpha");
        });
    }

    /// The tests count on requests being cheap; a slow helper would make the whole suite slow.
    #[test]
    fn a_thousand_requests_take_less_than_two_seconds() {
        let netns = Netns::new("fast").unwrap();
        let address: SocketAddr = "127.0.0.1:7".parse().unwrap();
        let _server = EchoServer::start(&netns, "alpha", &[address]).unwrap();
        for request in [tcp, udp] {
            let start = Instant::now();
            netns.run(|| names(1000, || request(address))).unwrap();
            assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
        }
    }
}
