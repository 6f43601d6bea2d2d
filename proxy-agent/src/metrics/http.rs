//! What the metrics server answers (S178).

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::Value;

use super::Metrics;
use crate::config::MODE;

const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The metrics server's routes (S178). `configz`: the configuration in effect.
pub fn router(metrics: Arc<Metrics>, configz: Value) -> Router {
    Router::new()
        .route("/metrics", get(serve))
        // kube-proxy has the path, and nothing to say there: none of its checks is a service level indicator.
        .route(
            "/metrics/slis",
            get(|| async { ([(header::CONTENT_TYPE, CONTENT_TYPE)], "# EOF\n") }),
        )
        .route("/healthz", get(|| async { "ok" }))
        .route("/proxyMode", get(|| async { MODE }))
        .route("/configz", get(|| async move { json_text(&configz) }))
        .with_state(metrics)
}

fn json_text(value: &Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}

async fn serve(State(metrics): State<Arc<Metrics>>) -> Response {
    match metrics.render().await {
        Ok(text) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
