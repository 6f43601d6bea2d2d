//! The two HTTP servers of an agent: health and metrics. `run` starts them; they live until it ends.
//!
//! What must stay true: an address that cannot be bound is tried again and holds up nobody, unless the user wants it to be fatal
//! (S179).

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use tokio::net::TcpListener;
use tokio::time::sleep;

/// An address that cannot be bound is tried again after this (S179).
const REBIND_INTERVAL: Duration = Duration::from_secs(5);

/// A server: what it is called, and the option that says where it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Server {
    pub(crate) name: &'static str,
    pub(crate) flag: &'static str,
    pub(crate) address: SocketAddr,
}

impl Server {
    /// Serves from now on; with `hard_fail` an address that cannot be bound now is an error. To be called from within the runtime.
    pub(crate) async fn start(self, router: Router, hard_fail: bool) -> anyhow::Result<()> {
        let bound = TcpListener::bind(self.address).await;
        let bound = if hard_fail {
            let Self { flag, address, .. } = self;
            let problem = || {
                format!(
                    "{flag} {address} cannot be bound; free it, give another one, or leave out --bind-address-hard-fail"
                )
            };
            Ok(bound.with_context(problem)?)
        } else {
            bound
        };
        tokio::spawn(self.serve(bound, router));
        Ok(())
    }

    async fn serve(self, mut bound: io::Result<TcpListener>, router: Router) {
        let Self { name, flag, address } = self;
        loop {
            match bound {
                Ok(listener) => {
                    tracing::info!(name, %address, "serving");
                    if let Err(error) = axum::serve(listener, router.clone()).await {
                        tracing::warn!(name, %address, %error, "server ended, starting it again");
                    }
                }
                Err(error) => {
                    let remedy = format!("free it (`ss -ltnp` names who has it), or give another {flag}");
                    tracing::warn!(name, %address, %error, remedy, "cannot be bound, trying again");
                }
            }
            sleep(REBIND_INTERVAL).await;
            bound = TcpListener::bind(address).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::get;

    use super::*;

    fn router() -> Router {
        Router::new().route("/", get(|| async { "here" }))
    }

    #[tokio::test]
    async fn an_address_that_is_taken_is_fatal_if_asked_for() {
        let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Server {
            name: "metrics",
            flag: "--metrics-bind-address",
            address: other.local_addr().unwrap(),
        };
        let error = server.start(router(), true).await.unwrap_err();
        let text = format!("{error:#}");
        let address = server.address.to_string();
        for part in ["--metrics-bind-address", &address, "in use", "--bind-address-hard-fail"] {
            assert!(text.contains(part), "S179: {part}: {text}");
        }
        server.start(router(), false).await.expect("tried again later");
    }

    #[tokio::test]
    async fn a_free_address_is_served_either_way() {
        for hard_fail in [true, false] {
            let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let address = free.local_addr().unwrap();
            drop(free);
            let server = Server {
                name: "healthz",
                flag: "--healthz-bind-address",
                address,
            };
            server.start(router(), hard_fail).await.unwrap();
            tokio::net::TcpStream::connect(address).await.unwrap();
        }
    }
}
