//! `healthCheckNodePort` (S156–S159): tells a load balancer whether this node has endpoints of a Service with the Local policy. One
//! listener per Service and family; `run` says what is wanted.
//!
//! What must stay true: a port that cannot be bound is tried again and holds up nobody; a port that is not wanted is closed.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::sleep;

use super::{Health, status};
use crate::model::ObjectName;
use crate::plan::HealthCheck;

/// A port that cannot be bound is tried again after this.
const REBIND_INTERVAL: Duration = Duration::from_secs(5);
/// Connections that may wait to be accepted.
const BACKLOG: u32 = 128;

/// The listeners. Dropping it closes them.
#[derive(Debug)]
pub struct Checks {
    health: Arc<Health>,
    running: HashMap<ObjectName, Running>,
}

#[derive(Debug)]
struct Running {
    latest: watch::Sender<HealthCheck>,
    listeners: Vec<AbortHandle>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.listeners.iter().for_each(AbortHandle::abort);
    }
}

/// What answers on one family's socket.
#[derive(Clone)]
struct Answerer {
    health: Arc<Health>,
    service: ObjectName,
    /// 0 for IPv4, 1 for IPv6.
    family: usize,
    latest: watch::Receiver<HealthCheck>,
}

impl Checks {
    /// No listeners yet.
    pub fn new(health: Arc<Health>) -> Self {
        Self {
            health,
            running: HashMap::new(),
        }
    }

    /// What is to be served for a Service from now on. To be called from within the runtime.
    pub fn set(&mut self, service: ObjectName, wanted: Option<HealthCheck>) {
        let Some(wanted) = wanted else {
            self.running.remove(&service);
            return;
        };
        if let Some(running) = self.running.get(&service)
            && running.latest.borrow().has_same_sockets(&wanted)
        {
            running.latest.send_replace(wanted);
            return;
        }
        // The old ports are closed before the new ones are opened.
        self.running.remove(&service);
        let (latest, receiver) = watch::channel(wanted);
        let families = (0..2).filter(|family| wanted.local_ready[*family].is_some());
        let listeners = families
            .map(|family| {
                let answerer = Answerer {
                    health: self.health.clone(),
                    service: service.clone(),
                    family,
                    latest: receiver.clone(),
                };
                tokio::spawn(serve(answerer, wanted.port.get())).abort_handle()
            })
            .collect();
        self.running.insert(service, Running { latest, listeners });
    }
}

async fn serve(answerer: Answerer, port: u16) {
    let ip: IpAddr = match answerer.family {
        0 => Ipv4Addr::UNSPECIFIED.into(),
        _ => Ipv6Addr::UNSPECIFIED.into(),
    };
    let address = SocketAddr::new(ip, port);
    let router = Router::new().fallback(answer).with_state(answerer.clone());
    loop {
        let served = match listen(address) {
            Ok(listener) => axum::serve(listener, router.clone()).await,
            Err(error) => Err(error),
        };
        if let Err(error) = served {
            let service = &answerer.service;
            tracing::warn!(%service, %address, %error, "healthCheckNodePort cannot be served, trying again");
        }
        sleep(REBIND_INTERVAL).await;
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

async fn answer(State(answerer): State<Answerer>) -> Response {
    let endpoints = answerer.latest.borrow().local_ready[answerer.family].unwrap_or_default();
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
    use std::io::{Read, Write};
    use std::net::TcpStream;

    use proxy_common::addr::Port;

    use super::*;

    async fn get(address: SocketAddr) -> io::Result<String> {
        let ask = move || {
            let mut stream = TcpStream::connect(address)?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(b"GET /any/path HTTP/1.1\r\nhost: x\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        };
        tokio::task::spawn_blocking(ask).await.map_err(io::Error::other)?
    }

    /// Asks until the answer is what is expected, for up to a second.
    async fn eventually(address: SocketAddr, expected: impl Fn(&io::Result<String>) -> bool) -> io::Result<String> {
        for _ in 0..100 {
            let answer = get(address).await;
            if expected(&answer) {
                return answer;
            }
            sleep(Duration::from_millis(10)).await;
        }
        get(address).await
    }

    #[tokio::test]
    async fn each_family_answers_with_its_own_count() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let service = ObjectName::new("default", "web");
        let check = |v4, v6| HealthCheck {
            port: Port::new(port),
            local_ready: [v4, v6],
        };
        let v4 = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        let mut checks = Checks::new(Arc::new(Health::default()));
        checks.set(service.clone(), Some(check(Some(2), None)));
        let text = eventually(v4, Result::is_ok).await.unwrap();
        assert!(text.starts_with("HTTP/1.1 200 "), "S157: {text}");
        assert!(
            text.contains("\r\nx-load-balancing-endpoint-weight: 2\r\n"),
            "S158: {text}"
        );
        assert!(text.contains("\r\nx-content-type-options: nosniff\r\n"), "S158: {text}");
        assert!(text.contains(r#""localEndpoints":2"#) && text.contains(r#""serviceProxyHealthy":true"#));
        checks.set(service.clone(), Some(check(Some(0), None)));
        let text = get(v4).await.unwrap();
        assert!(text.starts_with("HTTP/1.1 503 "), "S159: {text}");
        checks.set(service, None);
        assert!(eventually(v4, Result::is_err).await.is_err(), "the port is closed");
    }

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
