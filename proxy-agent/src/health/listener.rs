//! One socket of a `healthCheckNodePort`: bound, answered, and bound again for as long as its task lives. `node_ports` starts and
//! ends them.
//!
//! What must stay true: a port that cannot be bound is tried again and holds up nobody.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;
use tokio::time::sleep;

use super::events::Events;
use super::{Health, status};
use crate::model::ObjectName;
use crate::plan::HealthCheck;

/// A port that cannot be bound is tried again after this: whoever had it before (an address or a Service of ours that is being
/// closed) needs a moment.
const FIRST_RETRY: Duration = Duration::from_millis(100);
/// Longest time between two tries.
const LONGEST_RETRY: Duration = Duration::from_secs(5);
/// A port that stays taken is reported again after this: events are forgotten, and may get lost.
const REPORT_INTERVAL: Duration = Duration::from_secs(5 * 60);
/// Connections that may wait to be accepted.
const BACKLOG: u32 = 128;

/// What answers on a socket.
#[derive(Clone)]
pub(super) struct Answerer {
    pub(super) health: Arc<Health>,
    pub(super) service: ObjectName,
    pub(super) latest: watch::Receiver<HealthCheck>,
    pub(super) events: Events,
}

impl Answerer {
    fn report(&self, address: SocketAddr, error: &io::Error) {
        let service = &self.service;
        tracing::warn!(%service, %address, %error, "healthCheckNodePort cannot be served, trying again");
        // An address that is still tentative, or is about to go, is nothing the Service's owner could do anything about.
        if error.kind() != io::ErrorKind::AddrNotAvailable {
            self.events.health_check_failed(service, address, error);
        }
    }
}

/// Never ends by itself.
pub(super) async fn serve(answerer: Answerer, address: SocketAddr) {
    let family = usize::from(address.is_ipv6());
    let router = Router::new().fallback(answer).with_state((answerer.clone(), family));
    let mut retry = FIRST_RETRY;
    let mut reported: Option<Instant> = None;
    loop {
        let served = match listen(address) {
            Ok(listener) => {
                (retry, reported) = (FIRST_RETRY, None);
                axum::serve(listener, router.clone()).await
            }
            Err(error) => Err(error),
        };
        // The first failure is none: see above.
        if let Err(error) = served
            && retry > FIRST_RETRY
            && reported.is_none_or(|reported| reported.elapsed() >= REPORT_INTERVAL)
        {
            reported = Some(Instant::now());
            answerer.report(address, &error);
        }
        sleep(retry).await;
        retry = (retry * 2).min(LONGEST_RETRY);
    }
}

/// The IPv6 socket takes no IPv4 connections: each family has its own count (S159).
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        let socket = TcpSocket::new_v6()?;
        socket2::SockRef::from(&socket).set_only_v6(true)?;
        socket
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

async fn answer(State((answerer, family)): State<(Answerer, usize)>) -> Response {
    let endpoints = answerer.latest.borrow().local_ready[family].unwrap_or_default();
    let (code, body) = verdict(&answerer.service, endpoints, answerer.health.is_healthy(Instant::now()));
    let headers = [
        (header::CONTENT_TYPE.as_str(), "application/json".to_owned()),
        (header::X_CONTENT_TYPE_OPTIONS.as_str(), "nosniff".to_owned()),
        ("x-load-balancing-endpoint-weight", endpoints.to_string()),
        // A connection must not outlive its listener.
        (header::CONNECTION.as_str(), "close".to_owned()),
    ];
    (code, headers, body).into_response()
}

/// Status and body (S157, S158).
fn verdict(service: &ObjectName, endpoints: usize, is_healthy: bool) -> (StatusCode, String) {
    let body = json!({
        "service": {"namespace": &*service.namespace, "name": &*service.name},
        "localEndpoints": endpoints,
        "serviceProxyHealthy": is_healthy,
    });
    (status(endpoints > 0 && is_healthy), body.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unhealthy_proxy_drains_the_node() {
        let service = ObjectName::new("a", "b");
        assert_eq!(
            verdict(&service, 3, false).0,
            StatusCode::SERVICE_UNAVAILABLE,
            "S157, S180"
        );
        assert_eq!(verdict(&service, 0, true).0, StatusCode::SERVICE_UNAVAILABLE, "S157");
    }
}
