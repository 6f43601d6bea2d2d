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

/// A proxy that has not been round for so long hangs, however short the sync period is: it is on its way every few seconds.
const LEAST_PATIENCE: Duration = Duration::from_secs(60);
/// What Go prints for a time that was never set.
const NEVER: &str = "0001-01-01T00:00:00Z";

/// What is known about the health of this proxy. Shared between the owner task and the servers.
#[derive(Debug)]
pub struct Health {
    /// A change that waits for so long makes its family unhealthy (S173).
    patience: Duration,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// IPv4, IPv6.
    families: [Family; 2],
    /// When the owner was seen last.
    alive: Option<Instant>,
    ready: bool,
    node_seen: bool,
    node_ineligible: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Family {
    /// Since when the oldest change has been waiting.
    pending_since: Option<Instant>,
    last_sync: Option<SystemTime>,
}

impl Family {
    /// S173; healthy by definition until the first sync.
    fn is_healthy(&self, now: Instant, patience: Duration) -> bool {
        let waits = self.pending_since.map(|since| now.saturating_duration_since(since));
        self.last_sync.is_none() || waits.is_none_or(|waits| waits < patience)
    }
}

impl Health {
    /// Changes may wait for twice the sync period.
    pub fn new(sync_period: Duration) -> Self {
        Self {
            patience: sync_period.saturating_mul(2),
            inner: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The owner is on its way and will be again within seconds.
    pub fn alive(&self, now: Instant) {
        self.lock().alive = Some(now);
    }

    /// A change of these families waits to be applied since `now`, unless an older one does.
    pub fn queued(&self, now: Instant, families: [bool; 2]) {
        for (family, _) in self.lock().families.iter_mut().zip(families).filter(|(_, is)| *is) {
            family.pending_since.get_or_insert(now);
        }
    }

    /// Everything that waited in these families has been applied.
    pub fn synced(&self, now: SystemTime, families: [bool; 2]) {
        for (family, _) in self.lock().families.iter_mut().zip(families).filter(|(_, is)| *is) {
            family.pending_since = None;
            family.last_sync = Some(now);
        }
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

    /// Each family (S173), and the owner.
    fn verdicts(&self, now: Instant) -> [bool; 2] {
        let inner = self.lock();
        let absent = inner.alive.map(|seen| now.saturating_duration_since(seen));
        let hangs = absent.is_some_and(|absent| absent >= self.patience.max(LEAST_PATIENCE));
        inner
            .families
            .map(|family| !hangs && family.is_healthy(now, self.patience))
    }

    fn is_healthy(&self, now: Instant) -> bool {
        self.verdicts(now) == [true; 2]
    }

    /// Status and body (S177). `eligibility`: does the node count?
    fn answer(&self, now: Instant, eligibility: bool) -> (StatusCode, Value) {
        let verdicts = self.verdicts(now);
        let healthy = verdicts == [true; 2];
        let (last_syncs, eligible) = {
            let inner = self.lock();
            (inner.families.map(|family| family.last_sync), !inner.node_ineligible)
        };
        let ok = healthy && (eligible || !eligibility);
        let current = rfc3339(SystemTime::now());
        let time = |sync: Option<SystemTime>| sync.map_or_else(|| NEVER.to_owned(), rfc3339);
        let [v4, v6] = [0, 1].map(|i| json!({"lastUpdated": time(last_syncs[i]), "healthy": verdicts[i]}));
        let mut body = json!({
            "lastUpdated": if ok { current.clone() } else { time(last_syncs[0].max(last_syncs[1])) },
            "currentTime": current,
            "healthy": healthy,
            "status": {"IPv4": v4, "IPv6": v6},
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

    const PERIOD: Duration = Duration::from_secs(30);
    const LONG: Duration = Duration::from_secs(61);
    const BOTH: [bool; 2] = [true; 2];

    #[test]
    fn a_change_that_waits_too_long() {
        let health = Health::new(PERIOD);
        let now = Instant::now();
        health.queued(now, BOTH);
        assert!(health.is_healthy(now + LONG), "S173: until the first sync");
        health.synced(SystemTime::now(), BOTH);
        assert!(health.is_healthy(now + LONG));
        health.queued(now, BOTH);
        health.queued(now + LONG, BOTH);
        assert!(health.is_healthy(now + Duration::from_secs(59)));
        assert!(!health.is_healthy(now + PERIOD * 2), "counted from the oldest");
        let (code, body) = health.answer(now + LONG, true);
        assert_eq!(
            (code.as_u16(), &body["healthy"], &body["nodeEligible"]),
            (503, &json!(false), &json!(true))
        );
        assert_ne!(body["lastUpdated"], body["currentTime"], "S177");
        health.synced(SystemTime::now(), BOTH);
        assert!(health.is_healthy(now + LONG));
    }

    #[test]
    fn families_are_judged_apart() {
        let health = Health::new(PERIOD);
        let (now, early) = (Instant::now(), SystemTime::UNIX_EPOCH + LONG);
        health.synced(early, BOTH);
        health.queued(now, [false, true]);
        health.synced(early + LONG, [true, false]);
        let (code, body) = health.answer(now + LONG, false);
        assert_eq!(code.as_u16(), 503, "S173: all must be healthy");
        assert_eq!(
            body["status"],
            json!({
                "IPv4": {"lastUpdated": "1970-01-01T00:02:02Z", "healthy": true},
                "IPv6": {"lastUpdated": "1970-01-01T00:01:01Z", "healthy": false},
            })
        );
        assert_eq!(
            body["lastUpdated"], body["status"]["IPv4"]["lastUpdated"],
            "S177: the last"
        );
        health.synced(early, [false, true]);
        assert!(health.is_healthy(now + LONG));
        // A family that has never been in step is healthy by definition, whatever the other one is.
        let health = Health::new(PERIOD);
        health.synced(early, [true, false]);
        health.queued(now, BOTH);
        assert_eq!(health.verdicts(now + LONG), [false, true]);
        assert_eq!(health.answer(now, false).1["status"]["IPv6"]["lastUpdated"], NEVER);
    }

    #[test]
    fn the_patience_follows_the_sync_period() {
        let health = Health::new(Duration::from_secs(1));
        let now = Instant::now();
        health.synced(SystemTime::now(), BOTH);
        health.alive(now);
        health.queued(now, BOTH);
        assert!(health.is_healthy(now + Duration::from_millis(1999)));
        assert!(!health.is_healthy(now + Duration::from_secs(2)), "S173");
        // An owner that hangs cannot say that something waits; a short period is no reason to suspect it.
        health.synced(SystemTime::now(), BOTH);
        assert!(health.is_healthy(now + Duration::from_secs(3)));
        assert!(!health.is_healthy(now + LONG));
    }

    #[test]
    fn a_node_that_leaves() {
        let health = Health::new(PERIOD);
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
