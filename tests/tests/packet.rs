//! Packets through the real programs by program test-run: every byte that comes out is compared with a packet that was built, and
//! the output of one hook feeds the next, as it does on a node.
//!
//! This file is the bed: who is who, how programs are loaded, and what runs a test for both families.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, with its context")]

use proxy_common::addr::{Addr4, Addr6, Address};
use proxy_common::link::Link;
use proxy_tests::programs::{Constants, Programs};
use proxy_tests::wire::{End, L4, Tcp};

/// Runs a test for both families. It stands before the modules, which use it.
macro_rules! both_families {
    ($($(#[$doc:meta])* $name:ident => $generic:ident;)+) => {
        $(mod $name {
            $(#[$doc])*
            #[test]
            fn ipv4() {
                super::$generic(crate::v4());
            }

            $(#[$doc])*
            #[test]
            fn ipv6() {
                super::$generic(crate::v6());
            }
        })+
    };
}

#[path = "packet/counters.rs"]
mod counters;
#[path = "packet/errors.rs"]
mod errors;
#[path = "packet/masquerade.rs"]
mod masquerade;
#[path = "packet/modes.rs"]
mod modes;
#[path = "packet/sctp.rs"]
mod sctp;
#[path = "packet/services.rs"]
mod services;
#[path = "packet/strays.rs"]
mod strays;
#[path = "packet/trace.rs"]
mod trace;
#[path = "packet/unusual.rs"]
mod unusual;
#[path = "packet/verifier.rs"]
mod verifier;
#[path = "packet/xdp.rs"]
mod xdp;

const SYN: L4 = L4::Tcp(Tcp::Syn);
const ACK: L4 = L4::Tcp(Tcp::Ack);

/// The interface of a test: `lo`, the only one that every network namespace has.
const LO: u32 = 1;
/// "Arrived by some interface": the packet is not the node's own.
const FORWARDED: u32 = 7;

/// Who is who in one family.
#[derive(Clone, Copy, Debug)]
struct Cast<A> {
    client: A,
    vip: A,
    other_vip: A,
    backend: A,
    other_backend: A,
    node: A,
}

fn v4() -> Cast<Addr4> {
    let a = |text: &str| Addr4::from_ip(text.parse().unwrap()).unwrap();
    Cast {
        client: a("10.244.1.5"),
        vip: a("10.96.0.10"),
        other_vip: a("10.96.0.11"),
        backend: a("10.244.2.7"),
        other_backend: a("10.244.2.8"),
        node: a("192.168.56.1"),
    }
}

fn v6() -> Cast<Addr6> {
    let a = |text: &str| Addr6::from_ip(text.parse().unwrap()).unwrap();
    Cast {
        client: a("fd00:10:244:1::5"),
        vip: a("fd00:96::a"),
        other_vip: a("fd00:96::b"),
        backend: a("fd00:10:244:2::7"),
        other_backend: a("fd00:10:244:2::8"),
        node: a("fd00:56::1"),
    }
}

fn at<A: Address>(addr: A, port: u16) -> End {
    (addr.into(), port)
}

fn load() -> Programs {
    Programs::load(Constants::default()).unwrap()
}

/// Runs on a thread of its own, in a new network namespace in which `lo` forwards and leads to the pods.
fn in_namespace(test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                // SAFETY: affects this thread alone, which ends with the closure; the namespace goes with it.
                assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "a network namespace needs root");
                let commands = "ip link set lo up && ip route add 10.244.0.0/16 dev lo && ip route add 192.168.57.0/24 dev lo && \
                    ip -6 route add fd00:10:244::/48 dev lo && sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1";
                assert!(std::process::Command::new("sh").args(["-c", commands]).status().unwrap().success());
                test();
            })
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

/// Programs that masquerade what does not come from the pods' networks, with `lo` as the way to them.
fn load_masquerading(ports: (u32, u32)) -> Programs {
    let mut programs = Programs::load(Constants {
        pods4: Some(([10, 244, 0, 0], [255, 255, 0, 0])),
        pods6: Some((v6_prefix("fd00:10:244::"), v6_prefix("ffff:ffff:ffff::"))),
        ports,
        ..Constants::default()
    })
    .unwrap();
    programs.set_link(
        LO,
        Link {
            flags: 1,
            addr4: v4().node,
            addr6: v6().node,
            ..Link::default()
        },
    );
    programs
}

fn v6_prefix(text: &str) -> [u8; 16] {
    text.parse::<std::net::Ipv6Addr>().unwrap().octets()
}

fn outsider<A: Address>() -> A {
    ["192.0.2.9", "2001:db8::9"]
        .iter()
        .find_map(|ip| A::from_ip(ip.parse().unwrap()))
        .unwrap()
}
