//! The clients: loops of system calls and clock readings.

use std::io::{self, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{ASK, REQUEST, STREAM, Start, own_descriptors, pin, sockaddr};

/// An answer that takes longer never comes.
const PATIENCE: Duration = Duration::from_secs(3);
/// Left out at the beginning of a stream, while its window grows.
const WARM_UP: Duration = Duration::from_millis(100);

/// What came of dialling.
#[derive(Default)]
pub(crate) struct Dialled {
    /// Nanoseconds of each `connect`: the first packet there and the first one back.
    pub(crate) connects: Vec<u32>,
    /// Nanoseconds of each connection from beginning to end.
    pub(crate) wholes: Vec<u32>,
    /// Those without an answer.
    pub(crate) failed: u64,
    /// Connections per second.
    pub(crate) rate: f64,
}

impl Dialled {
    /// Adds what another thread did.
    pub(crate) fn add(&mut self, other: Self) {
        self.connects.extend(other.connects);
        self.wholes.extend(other.wholes);
        self.failed += other.failed;
        self.rate += other.rate;
    }
}

/// Opens connections one after the other until the time is over: connect, ask, read the answer and the end, close.
pub(crate) fn dial(targets: &[SocketAddrV4], core: usize, start: &Start, time: Duration) -> Result<Dialled> {
    let prepared = prepare(core);
    start.wait();
    prepared?;
    let targets: Vec<_> = targets.iter().map(|target| sockaddr(*target)).collect();
    let mut dialled = Dialled::default();
    // Cores begin with different targets.
    let mut turn = core * targets.len() / 2;
    let first = Instant::now();
    loop {
        let began = Instant::now();
        if began - first >= time {
            dialled.rate = dialled.wholes.len() as f64 / (began - first).as_secs_f64();
            return Ok(dialled);
        }
        let target = &targets[turn % targets.len()];
        turn += 1;
        match connection(target) {
            Ok(connected) => {
                dialled.connects.push((connected - began).as_nanos() as u32);
                dialled.wholes.push(began.elapsed().as_nanos() as u32);
            }
            Err(_) => dialled.failed += 1,
        }
    }
}

/// One connection, with this much patience for its first packet.
pub(crate) fn once(target: SocketAddrV4, patience: Duration) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&target.into(), patience)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&[ASK; REQUEST])?;
    let mut answer = Vec::new();
    io::Read::read_to_end(&mut stream, &mut answer)?;
    anyhow::ensure!(!answer.is_empty(), "closed without an answer");
    Ok(())
}

/// A connection from beginning to end; gives the moment when it was established.
fn connection(target: &libc::sockaddr_in) -> io::Result<Instant> {
    // SAFETY: no memory is passed.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor, owned by nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let fd = socket.as_raw_fd();
    let patience = libc::timeval {
        tv_sec: PATIENCE.as_secs() as libc::time_t,
        tv_usec: 0,
    };
    // SAFETY: the option's value is a time, whose address and size are passed.
    unsafe {
        libc::setsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw const patience).cast(),
            size_of_val(&patience) as libc::socklen_t,
        );
    }
    // SAFETY: an address of this family, and its size.
    let result = unsafe {
        libc::connect(
            fd,
            std::ptr::from_ref(target).cast(),
            size_of_val(target) as libc::socklen_t,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let connected = Instant::now();
    let mut stream = TcpStream::from(socket);
    stream.write_all(&[ASK; REQUEST])?;
    let mut answer = [0; 2 * super::ANSWER];
    let mut length = 0;
    loop {
        match io::Read::read(&mut stream, &mut answer)? {
            0 if length == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            0 => return Ok(connected),
            more => length += more,
        }
    }
}

/// Sends as much as it can over one connection for so long, after a beginning that does not count; gives bytes per second.
pub(crate) fn stream(target: SocketAddrV4, core: usize, start: &Start, time: Duration) -> Result<f64> {
    let opened = prepare(core).and_then(|()| open_stream(target));
    start.wait();
    let mut stream = opened?;
    let block = vec![0; 128 << 10];
    let first = Instant::now();
    while first.elapsed() < WARM_UP {
        stream.write_all(&block)?;
    }
    let (began, mut bytes) = (Instant::now(), 0);
    loop {
        let elapsed = began.elapsed();
        if elapsed >= time {
            return Ok(bytes as f64 / elapsed.as_secs_f64());
        }
        stream.write_all(&block)?;
        bytes += block.len();
    }
}

fn open_stream(target: SocketAddrV4) -> Result<TcpStream> {
    let mut stream =
        TcpStream::connect_timeout(&target.into(), PATIENCE).with_context(|| format!("dialling {target}"))?;
    // A proxy that forgets the connection must not make this wait for ever.
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut opening = [0; REQUEST];
    opening[0] = STREAM;
    stream.write_all(&opening)?;
    Ok(stream)
}

fn prepare(core: usize) -> Result<()> {
    own_descriptors()?;
    pin(core)
}
