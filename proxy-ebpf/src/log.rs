//! What the programs can say about themselves: `debug` for every connection that is opened, `info` for every one that is not.
//!
//! Off by default, and then the verifier removes it: the level is a load-time constant (`--bpf-log-level`, `AYA_LOG_LEVEL`).
//! Never about packets of an established connection.

use aya_ebpf::programs::TcContext;
use aya_log_ebpf::{debug, info};
use proxy_common::addr::{Addr4, Addr6};
use proxy_common::rewrite::{Rewrite, RewriteKey};

/// A family's addresses, as the log's formatter takes them.
pub(crate) trait Log: Sized {
    /// A connection was opened.
    fn opened(ctx: &TcContext, key: &RewriteKey<Self>, rewrite: &Rewrite<Self>);
    /// A packet for a service was refused or dropped.
    fn unserved(ctx: &TcContext, key: &RewriteKey<Self>, what: &'static str);
}

macro_rules! log_family {
    ($addr:ty) => {
        impl Log for $addr {
            #[inline(never)]
            fn opened(ctx: &TcContext, key: &RewriteKey<Self>, rewrite: &Rewrite<Self>) {
                debug!(
                    ctx,
                    "opened: protocol {} from {:i} port {} to {:i} port {} goes to {:i} port {}, service {}",
                    key.protocol,
                    key.src.0,
                    key.src_port.get(),
                    key.dst.0,
                    key.dst_port.get(),
                    rewrite.dst.0,
                    rewrite.dst_port.get(),
                    rewrite.service
                );
            }

            #[inline(never)]
            fn unserved(ctx: &TcContext, key: &RewriteKey<Self>, what: &'static str) {
                info!(
                    ctx,
                    "{}: protocol {} from {:i} port {} to {:i} port {}",
                    what,
                    key.protocol,
                    key.src.0,
                    key.src_port.get(),
                    key.dst.0,
                    key.dst_port.get()
                );
            }
        }
    };
}

log_family!(Addr4);
log_family!(Addr6);
