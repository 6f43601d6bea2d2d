//! The server of a pod: a thread per core, which takes the connections whose first packet arrived on its core.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, listen, setsockopt, socket, sockopt};
use proxy_tests::netns::Netns;

use super::{ANSWER, ASK, REQUEST, STREAM, own_descriptors, pin};
use crate::machine::cores;

/// How often a thread without work looks whether it shall end.
const LOOK: Duration = Duration::from_millis(500);
const BACKLOG: i32 = 4096;

/// A running server; it ends when dropped.
pub(crate) struct Server {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Starts it at a port of every address of the namespace.
    pub(crate) fn start(netns: &Netns, port: u16) -> Result<Self> {
        let mut server = Self {
            stop: Arc::default(),
            threads: Vec::new(),
        };
        for core in 0..cores() {
            let (ready, is_ready) = mpsc::channel();
            let stop = server.stop.clone();
            server.threads.push(netns.spawn(move || {
                let listener = own_descriptors()
                    .and_then(|()| pin(core))
                    .and_then(|()| open(port, core));
                match listener {
                    Ok(listener) => {
                        let _ = ready.send(Ok(()));
                        serve(&listener, core, &stop);
                    }
                    Err(error) => {
                        let _ = ready.send(Err(error));
                    }
                }
            }));
            // One after the other: the kernel numbers them in this order, and the filter chooses by number.
            is_ready.recv().context("a server's thread ended")??;
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn open(port: u16, core: usize) -> Result<TcpListener> {
    let listener = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&listener, sockopt::ReuseAddr, &true)?;
    setsockopt(&listener, sockopt::ReusePort, &true)?;
    setsockopt(
        &listener,
        sockopt::ReceiveTimeout,
        &nix::sys::time::TimeVal::new(0, LOOK.as_micros() as i64),
    )?;
    bind(listener.as_raw_fd(), &SockaddrIn::new(0, 0, 0, 0, port)).with_context(|| format!("binding port {port}"))?;
    if core == 0 {
        choose_by_core(&listener).context("choosing listeners by core")?;
    }
    listen(&listener, nix::sys::socket::Backlog::new(BACKLOG)?)?;
    Ok(TcpListener::from(listener))
}

/// The listener of the core on which a connection's first packet arrives takes it.
fn choose_by_core(listener: &OwnedFd) -> io::Result<()> {
    let instruction = |code: u32, k: i32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k: k as u32,
    };
    let mut filter = [
        instruction(
            libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
            libc::SKF_AD_OFF + libc::SKF_AD_CPU,
        ),
        instruction(libc::BPF_RET | libc::BPF_A, 0),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the option's value is a program of this length, which the kernel copies.
    let result = unsafe {
        libc::setsockopt(
            listener.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            (&raw const program).cast(),
            size_of_val(&program) as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn serve(listener: &TcpListener, core: usize, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        // An error is the time-out, or a connection that was reset while it waited.
        let Ok((mut connection, _)) = listener.accept() else {
            continue;
        };
        let mut request = [0; REQUEST];
        match connection.read(&mut request) {
            Ok(1..) if request[0] == ASK => {
                let _ = connection.write_all(&[ASK; ANSWER]);
            }
            Ok(1..) if request[0] == STREAM => {
                std::thread::spawn(move || drain(connection, core));
            }
            _ => {}
        }
    }
}

/// Reads until the client closes, on another core than the client's.
fn drain(mut connection: TcpStream, core: usize) {
    let _ = pin((core + 1) % cores());
    let mut buffer = vec![0; 256 << 10];
    while matches!(connection.read(&mut buffer), Ok(1..)) {}
}
