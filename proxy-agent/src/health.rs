//! Is the proxy alive, and should this node get traffic? `run` reports what it does to [`Health`]; load balancers and probes ask over
//! HTTP: `/healthz` (with the node's eligibility), `/livez` (without), `/readyz` (the first sync is done).

pub mod events;
mod listener;
pub mod node_ports;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use crate::metrics::Metrics;
use crate::model::Node;

/// A change that waits longer than this makes the proxy unhealthy (S173: twice kube-proxy's sync period).
const PATIENCE: Duration = Duration::from_secs(60);
/// What Go prints for a time that was never set.
const NEVER: &str = "0001-01-01T00:00:00Z";

/// What is known about the health of this proxy. Shared between the owner task and the servers.
#[derive(Debug, Default)]
pub struct Health {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Since when the oldest change has been waiting.
    pending_since: Option<Instant>,
    last_sync: Option<SystemTime>,
    ready: bool,
    node_seen: bool,
    node_ineligible: bool,
}

impl Health {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A change waits to be applied since `now`, unless an older one does.
    pub fn queued(&self, now: Instant) {
        self.lock().pending_since.get_or_insert(now);
    }

    /// Everything that waited has been applied.
    pub fn synced(&self, now: SystemTime) {
        let mut inner = self.lock();
        inner.pending_since = None;
        inner.last_sync = Some(now);
    }

    /// The first complete sync is done.
    pub fn ready(&self) {
        self.lock().ready = true;
    }

    /// The own Node changed (S175). One that was never there says nothing.
    pub fn node(&self, node: Option<&Node>) {
        let mut inner = self.lock();
        inner.node_seen |= node.is_some();
        inner.node_ineligible = node.map_or(inner.node_seen, |node| node.leaving);
    }

    /// S173; healthy by definition until the first sync.
    fn is_healthy(&self, now: Instant) -> bool {
        let inner = self.lock();
        let waits = inner.pending_since.map(|since| now.saturating_duration_since(since));
        inner.last_sync.is_none() || waits.is_none_or(|waits| waits < PATIENCE)
    }

    /// Status and body (S177). `eligibility`: does the node count?
    fn answer(&self, now: Instant, eligibility: bool) -> (StatusCode, Value) {
        let healthy = self.is_healthy(now);
        let (last_sync, eligible) = {
            let inner = self.lock();
            (inner.last_sync, !inner.node_ineligible)
        };
        let ok = healthy && (eligible || !eligibility);
        let current = rfc3339(SystemTime::now());
        let last_sync = last_sync.map_or_else(|| NEVER.to_owned(), rfc3339);
        let family = json!({"lastUpdated": last_sync, "healthy": healthy});
        let mut body = json!({
            "lastUpdated": if ok { &current } else { &last_sync },
            "currentTime": current,
            "healthy": healthy,
            "status": {"IPv4": family, "IPv6": family},
        });
        if eligibility {
            body["nodeEligible"] = eligible.into();
        }
        (status(ok), body)
    }
}

fn status(ok: bool) -> StatusCode {
    if ok {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    }
}

fn rfc3339(time: SystemTime) -> String {
    Timestamp::try_from(time).map_or_else(|_| NEVER.to_owned(), |time| time.to_string())
}

/// The health server's routes.
pub fn router(health: Arc<Health>, metrics: Arc<Metrics>) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .with_state((health, metrics))
}

type Shared = State<(Arc<Health>, Arc<Metrics>)>;

async fn healthz(State((health, metrics)): Shared) -> Response {
    let (code, body) = health.answer(Instant::now(), true);
    metrics.healthz_answered(code.as_u16());
    respond(code, &body)
}

async fn livez(State((health, metrics)): Shared) -> Response {
    let (code, body) = health.answer(Instant::now(), false);
    metrics.livez_answered(code.as_u16());
    respond(code, &body)
}

async fn readyz(State((health, _)): Shared) -> Response {
    let ready = health.lock().ready;
    respond(status(ready), &json!({"ready": ready}))
}

fn respond(code: StatusCode, body: &Value) -> Response {
    let headers = [
        (header::CONTENT_TYPE, "application/json"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (code, headers, body.to_string()).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(61);

    #[test]
    fn a_change_that_waits_too_long() {
        let health = Health::default();
        let now = Instant::now();
        health.queued(now);
        assert!(health.is_healthy(now + LONG), "S173: until the first sync");
        health.synced(SystemTime::now());
        assert!(health.is_healthy(now + LONG));
        health.queued(now);
        health.queued(now + LONG);
        assert!(health.is_healthy(now + Duration::from_secs(59)));
        assert!(!health.is_healthy(now + LONG), "counted from the oldest");
        let (code, body) = health.answer(now + LONG, true);
        assert_eq!(
            (code.as_u16(), &body["healthy"], &body["nodeEligible"]),
            (503, &json!(false), &json!(true))
        );
        assert_ne!(body["lastUpdated"], body["currentTime"], "S177");
        health.synced(SystemTime::now());
        assert!(health.is_healthy(now + LONG));
    }

    #[test]
    fn a_node_that_leaves() {
        let health = Health::default();
        let now = Instant::now();
        health.node(None);
        assert_eq!(health.answer(now, true).0.as_u16(), 200, "never seen: unknown");
        health.node(Some(&Node {
            zone: None,
            leaving: true,
            ..Node::default()
        }));
        let (code, body) = health.answer(now, true);
        assert_eq!(
            (code.as_u16(), &body["healthy"], &body["nodeEligible"]),
            (503, &json!(true), &json!(false)),
            "S177"
        );
        let (code, body) = health.answer(now, false);
        assert_eq!((code.as_u16(), body.get("nodeEligible")), (200, None), "S176");
        health.node(Some(&Node::default()));
        assert_eq!(health.answer(now, true).0.as_u16(), 200);
        health.node(None);
        assert_eq!(health.answer(now, true).0.as_u16(), 503, "S175: gone");
    }
}
