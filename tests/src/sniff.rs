//! Counts packets that leave a namespace: how often a router forwards what somebody sent.

use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use etherparse::{NetSlice, SlicedPacket};
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket};
use nix::sys::time::TimeVal;

use crate::netns::Netns;

/// `PACKET_OUTGOING` of `linux/if_packet.h`.
const OUTGOING: u8 = 4;
/// How often the counter looks whether it should stop.
const TICK_MICROSECONDS: libc::suseconds_t = 20_000;

/// Counts until it is dropped.
pub struct Counter {
    count: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Counter {
    /// Counts packets with this destination that leave `netns` by any of its interfaces.
    pub fn start(netns: &Netns, destination: IpAddr) -> Result<Self> {
        let socket = netns.run(|| {
            socket(
                AddressFamily::Packet,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::EthAll,
            )
        });
        let socket = socket.context("opening a packet socket (this needs root)")?;
        setsockopt(&socket, ReceiveTimeout, &TimeVal::new(0, TICK_MICROSECONDS))?;
        let (count, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (counted, stopped) = (count.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let mut buffer = vec![0; 65_536];
            while !stopped.load(Ordering::Relaxed) {
                let Ok((length, Some(from))) = recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer) else {
                    continue;
                };
                if from.pkttype() == OUTGOING && goes_to(&buffer[..length], destination) {
                    counted.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Ok(Self {
            count,
            stop,
            thread: Some(thread),
        })
    }

    /// The number so far.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn goes_to(packet: &[u8], destination: IpAddr) -> bool {
    let Ok(sliced) = SlicedPacket::from_ethernet(packet) else {
        return false;
    };
    match sliced.net {
        Some(NetSlice::Ipv4(ip)) => destination == IpAddr::from(ip.header().destination_addr()),
        Some(NetSlice::Ipv6(ip)) => destination == IpAddr::from(ip.header().destination_addr()),
        _ => false,
    }
}
