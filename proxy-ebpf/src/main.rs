//! The programs that run in the kernel: entry points only, each a line or two.
//!
//! * `tc_ingress`, `tc_egress`: both hooks of an interface with an Ethernet header; `…_l3` of one without (WireGuard, tun).
//! * `xdp_forward`: the network cards that the configuration names.
//! * `connect4` … `getpeername6`: the socket hooks of a cgroup.
//!
//! A packet is followed through four files: `tc` (what happens at a hook), `packet` (what is read), then `rewrite` (a known
//! connection) or `connection` (a new one).
#![no_std]
#![no_main]

mod connection;
mod icmp_error;
mod log;
mod maps;
mod packet;
mod refuse;
mod rewrite;
mod route;
mod service;
mod socket;
mod stray;
mod tc;
mod trace;
mod unusual;
mod xdp;

use aya_ebpf::macros::{cgroup_sock_addr, classifier, xdp};
use aya_ebpf::programs::{SockAddrContext, TcContext, XdpContext};
use proxy_common::rewrite::{HOOK_EGRESS, HOOK_INGRESS};

use packet::ETHERNET;

#[classifier]
fn tc_ingress(ctx: TcContext) -> i32 {
    tc::run::<ETHERNET, HOOK_INGRESS>(&ctx)
}

#[classifier]
fn tc_egress(ctx: TcContext) -> i32 {
    tc::run::<ETHERNET, HOOK_EGRESS>(&ctx)
}

#[classifier]
fn tc_ingress_l3(ctx: TcContext) -> i32 {
    tc::run::<0, HOOK_INGRESS>(&ctx)
}

#[classifier]
fn tc_egress_l3(ctx: TcContext) -> i32 {
    tc::run::<0, HOOK_EGRESS>(&ctx)
}

#[xdp]
fn xdp_forward(ctx: XdpContext) -> u32 {
    xdp::run(&ctx)
}

#[cgroup_sock_addr(connect4)]
fn connect4(ctx: SockAddrContext) -> i32 {
    socket::connect(&socket::Ipv4(ctx))
}

#[cgroup_sock_addr(connect6)]
fn connect6(ctx: SockAddrContext) -> i32 {
    socket::connect6(ctx)
}

#[cgroup_sock_addr(sendmsg4)]
fn sendmsg4(ctx: SockAddrContext) -> i32 {
    socket::sendmsg(&socket::Ipv4(ctx))
}

#[cgroup_sock_addr(sendmsg6)]
fn sendmsg6(ctx: SockAddrContext) -> i32 {
    socket::sendmsg6(ctx)
}

#[cgroup_sock_addr(recvmsg4)]
fn recvmsg4(ctx: SockAddrContext) -> i32 {
    socket::show_frontend(&socket::Ipv4(ctx))
}

#[cgroup_sock_addr(recvmsg6)]
fn recvmsg6(ctx: SockAddrContext) -> i32 {
    socket::show_frontend6(ctx)
}

#[cgroup_sock_addr(getpeername4)]
fn getpeername4(ctx: SockAddrContext) -> i32 {
    socket::show_frontend(&socket::Ipv4(ctx))
}

#[cgroup_sock_addr(getpeername6)]
fn getpeername6(ctx: SockAddrContext) -> i32 {
    socket::show_frontend6(ctx)
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: the verifier rejects a program from which it could be.
    loop {}
}

/// Some helpers are only allowed to programs under a GPL-compatible licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
