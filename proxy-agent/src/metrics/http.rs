//! What the metrics server answers (S178).

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::Value;

use super::{Metrics, text};
use crate::config::MODE;

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The metrics server's routes (S178). `configz`: the configuration in effect.
pub fn router(metrics: Arc<Metrics>, configz: Value) -> Router {
    Router::new()
        .route("/metrics", get(serve))
        // kube-proxy has the path, and nothing to say there: none of its checks is a service level indicator.
        .route(
            "/metrics/slis",
            get(|headers: HeaderMap| async move { in_format(&headers, "# EOF\n".to_owned()) }),
        )
        .route("/healthz", get(|| async { "ok" }))
        .route("/proxyMode", get(|| async { MODE }))
        .route("/configz", get(|| async move { json_text(&configz) }))
        .with_state(metrics)
}

fn json_text(value: &Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}

async fn serve(State(metrics): State<Arc<Metrics>>, headers: HeaderMap) -> Response {
    match metrics.render().await {
        Ok(open_metrics) => in_format(&headers, open_metrics),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// As kube-proxy does: OpenMetrics for those who ask for it, as Prometheus does, and the older text format for all others.
fn in_format(headers: &HeaderMap, open_metrics: String) -> Response {
    let accepted = headers.get_all(header::ACCEPT).iter();
    let asked = accepted
        .filter_map(|value| value.to_str().ok())
        .any(|value| value.contains("application/openmetrics-text"));
    let (content_type, text) = if asked {
        (OPEN_METRICS, open_metrics)
    } else {
        (TEXT, text::from_open_metrics(&open_metrics))
    };
    ([(header::CONTENT_TYPE, content_type)], text).into_response()
}
