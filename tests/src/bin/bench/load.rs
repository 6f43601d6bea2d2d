//! Load from inside the pods: connections that are opened and closed, streams, and the servers for both.
//!
//! Everything here costs the same for every contender, and is kept cheap: blocking system calls, no event loop, one thread per core,
//! which stays there. Threads have a table of descriptors of their own, as a process with one thread has it.

mod client;
mod server;

pub(crate) use client::{Dialled, dial, once, stream};

pub(crate) use server::Server;

use std::io;
use std::net::SocketAddrV4;
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

/// Length of a request and of its answer, in bytes.
const REQUEST: usize = 32;
const ANSWER: usize = 64;
/// First byte of a request: answer and close.
const ASK: u8 = b'?';
/// First byte of a stream that goes one way.
const STREAM: u8 = b'>';

/// When a client's thread may begin: once all of them are where they belong, which takes some of them longer.
pub(crate) struct Start(Arc<Barrier>);

/// For a proxy that was stopped while others were measured to do what is due.
const SETTLE: Duration = Duration::from_millis(40);

impl Start {
    /// Waits for the other threads. To be called once by each, whatever happened to it before.
    fn wait(&self) {
        self.0.wait();
        std::thread::sleep(SETTLE);
    }
}

/// Starts so many threads, each with its number, and gives what they return.
pub(crate) fn all_at_once<T: Send + 'static>(
    count: usize,
    spawn: impl Fn(Box<dyn FnOnce() -> Result<T> + Send>) -> JoinHandle<Result<T>>,
    body: impl Fn(usize, Start) -> Result<T> + Clone + Send + 'static,
) -> Result<Vec<T>> {
    let barrier = Arc::new(Barrier::new(count));
    let threads: Vec<_> = (0..count)
        .map(|number| {
            let (body, start) = (body.clone(), Start(barrier.clone()));
            spawn(Box::new(move || body(number, start)))
        })
        .collect();
    let joined = threads
        .into_iter()
        .map(|thread| thread.join().ok().context("a client's thread ended")?);
    // Every thread is waited for, also if one has failed.
    let results: Vec<Result<T>> = joined.collect();
    results.into_iter().collect()
}

/// Keeps the calling thread on a core.
pub(crate) fn pin(core: usize) -> Result<()> {
    pin_thread(0, core)
}

/// Keeps a thread on a core; 0 is the calling one.
pub(crate) fn pin_thread(thread: i32, core: usize) -> Result<()> {
    let mut set = nix::sched::CpuSet::new();
    set.set(core)?;
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(thread), &set)
        .with_context(|| format!("keeping thread {thread} on core {core}"))
}

/// Gives the calling thread a table of descriptors of its own, without those of the process: a shared one costs a lock for every
/// socket, and a copy would keep open what others close. For threads that have not opened anything yet.
fn own_descriptors() -> Result<()> {
    // SAFETY: the flag makes the kernel close descriptors of this thread's new table only, and the thread owns none.
    let result = unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_UNSHARE as libc::c_int) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error()).context("leaving the shared table of descriptors")
    }
}

fn sockaddr(address: SocketAddrV4) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: address.port().to_be(),
        sin_addr: libc::in_addr {
            s_addr: u32::from(*address.ip()).to_be(),
        },
        sin_zero: [0; 8],
    }
}
