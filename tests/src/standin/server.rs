//! The HTTP side of a stand-in: lists, watches, Events. Answers are what a real API server says in JSON, to requests that an agent and
//! kube-proxy make; anything else is a 404, which both report.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get};
use axum::serve::ListenerExt as _;
use futures::stream::{self, StreamExt as _};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::time::Instant;

use super::Options;
use super::store::{Kind, Store};

/// Text that is handed out at once.
const CHUNK: usize = 64 * 1024;
/// How often a watcher that wants bookmarks gets one.
const BOOKMARKS: Duration = Duration::from_secs(60);
/// How long a watch lasts if its client does not say.
const WATCH: u64 = 1800;

#[derive(Clone)]
struct Shared {
    store: Arc<Mutex<Store>>,
    options: Options,
}

type Parameters = HashMap<String, String>;

/// Serves for ever.
pub(super) async fn serve(listener: TcpListener, store: Arc<Mutex<Store>>, options: Options) {
    let kind = |kind: Kind| {
        get(
            move |State(shared): State<Shared>, Query(parameters): Query<Parameters>, headers: HeaderMap| async move {
                shared.answer(kind, &parameters, &headers)
            },
        )
    };
    let router = Router::new()
        .route("/api/v1/services", kind(Kind::Service))
        .route("/api/v1/nodes", kind(Kind::Node))
        .route("/api/v1/nodes/{name}", get(node))
        .route("/apis/discovery.k8s.io/v1/endpointslices", kind(Kind::EndpointSlice))
        .route("/apis/networking.k8s.io/v1/servicecidrs", kind(Kind::ServiceCidr))
        .route("/api/v1/namespaces/{namespace}/events", any(event))
        .route("/apis/events.k8s.io/v1/namespaces/{namespace}/events", any(event))
        .route(
            "/version",
            get(|| async {
                axum_json(
                    StatusCode::OK,
                    &json!({"major": "1", "minor": "36", "gitVersion": "v1.36.0"}),
                )
            }),
        )
        .fallback(|| async { failure(StatusCode::NOT_FOUND, "NotFound", "the stand-in does not serve this") })
        .with_state(Shared { store, options });
    // An event of a watch is small and must not wait for the next one.
    let listener = listener.tap_io(|stream| {
        let _ = stream.set_nodelay(true);
    });
    if let Err(error) = axum::serve(listener, router).await {
        eprintln!("the stand-in for an API server ends: {error}");
    }
}

fn axum_json(status: StatusCode, value: &Value) -> Response {
    with_type(status, value.to_string())
}

fn with_type(status: StatusCode, body: impl Into<Body>) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], body.into()).into_response()
}

fn failure(code: StatusCode, reason: &str, message: &str) -> Response {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code.as_u16(),
    });
    axum_json(code, &status)
}

async fn node(State(shared): State<Shared>, Path(name): Path<String>) -> Response {
    let parameters = Parameters::from([("fieldSelector".to_owned(), format!("metadata.name={name}"))]);
    let Some(text) = shared.objects(Kind::Node, &parameters).pop() else {
        return failure(
            StatusCode::NOT_FOUND,
            "NotFound",
            &format!("nodes \"{name}\" not found"),
        );
    };
    let text = String::from_utf8_lossy(&text).replacen('{', &Kind::Node.head(), 1);
    with_type(StatusCode::OK, text)
}

/// Events are taken as they are.
async fn event(State(shared): State<Shared>, body: String) -> Response {
    shared.store().events.push(body.clone());
    with_type(StatusCode::CREATED, body)
}

impl Shared {
    fn store(&self) -> std::sync::MutexGuard<'_, Store> {
        self.store.lock().expect("nothing panics while holding it")
    }

    fn answer(&self, kind: Kind, parameters: &Parameters, headers: &HeaderMap) -> Response {
        let accepted = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
        if accepted.is_some_and(|accepted| !accepted.contains("json") && !accepted.contains("*/*")) {
            return failure(
                StatusCode::NOT_ACCEPTABLE,
                "NotAcceptable",
                "the stand-in speaks JSON only",
            );
        }
        let is_true = |name: &str| {
            parameters
                .get(name)
                .is_some_and(|value| value == "true" || value == "1")
        };
        match (is_true("watch"), is_true("sendInitialEvents")) {
            (true, true) if self.options.without_streaming_lists => failure(
                StatusCode::UNPROCESSABLE_ENTITY,
                "Invalid",
                "ListOptions.meta.k8s.io \"\" is invalid: sendInitialEvents: Forbidden: sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled",
            ),
            (true, initial) => self.watch(kind, parameters, initial),
            (false, _) => self.list(kind, parameters),
        }
    }

    /// Leaves what a field selector names; only Nodes are asked for by name.
    fn select(kind: Kind, parameters: &Parameters, objects: &mut Vec<Bytes>) {
        let selector = parameters.get("fieldSelector");
        let wanted = selector.and_then(|selector| selector.strip_prefix("metadata.name="));
        if let (Kind::Node, Some(wanted)) = (kind, wanted) {
            objects.retain(|object| {
                let value: Value = serde_json::from_slice(object).unwrap_or_default();
                value["metadata"]["name"] == wanted
            });
        }
    }

    fn objects(&self, kind: Kind, parameters: &Parameters) -> Vec<Bytes> {
        let mut objects = self.store().of(kind).objects.clone();
        Self::select(kind, parameters, &mut objects);
        objects
    }

    /// A page of a list, or all of it. The token of a page is where it begins.
    fn list(&self, kind: Kind, parameters: &Parameters) -> Response {
        let number = |name: &str| parameters.get(name).and_then(|value| value.parse::<usize>().ok());
        let objects = self.objects(kind, parameters);
        let first = number("continue").unwrap_or_default().min(objects.len());
        let limit = number("limit").filter(|limit| *limit > 0).unwrap_or(objects.len());
        let page: Vec<Bytes> = objects[first..].iter().take(limit).cloned().collect();
        let remaining = objects.len() - first - page.len();
        let mut metadata = json!({"resourceVersion": self.store().version.to_string()});
        if remaining > 0 {
            metadata["continue"] = json!((first + page.len()).to_string());
            metadata["remainingItemCount"] = json!(remaining);
        }
        let (name, version) = (kind.name(), kind.api_version());
        let head = format!(r#"{{"kind":"{name}List","apiVersion":"{version}","metadata":{metadata},"items":["#);
        let count = page.len();
        let items = page.into_iter().enumerate().map(move |(index, object)| {
            let separator = if index + 1 < count { "," } else { "" };
            [object, Bytes::from_static(separator.as_bytes())].concat()
        });
        let mut pieces = std::iter::once(head.into_bytes())
            .chain(items)
            .chain(std::iter::once(b"]}\n".to_vec()));
        let shared = self.clone();
        let chunks = std::iter::from_fn(move || chunk(&mut pieces)).peekable();
        let body = stream::unfold(chunks, move |mut chunks| {
            let next = chunks.next();
            if next.is_some() && chunks.peek().is_none() && remaining == 0 {
                shared.store().listed(kind);
            }
            async move { Some((Ok::<_, std::convert::Infallible>(next?), chunks)) }
        });
        with_type(StatusCode::OK, Body::from_stream(body))
    }

    fn watch(&self, kind: Kind, parameters: &Parameters, initial: bool) -> Response {
        let since = parameters
            .get("resourceVersion")
            .and_then(|version| version.parse::<u64>().ok());
        // Version 0, or none, asks for the present state first.
        let all = initial || since.unwrap_or_default() == 0;
        let (mut objects, version, receiver) = {
            let mut store = self.store();
            let version = store.version;
            let receiver = store.follow(kind, if all { version } else { since.unwrap_or_default() });
            let objects = if all {
                store.of(kind).objects.clone()
            } else {
                Vec::new()
            };
            (objects, version, receiver)
        };
        Self::select(kind, parameters, &mut objects);
        let mark = initial.then(|| bookmark(kind, version, true).into_bytes());
        let mut pieces = objects
            .into_iter()
            .map(move |object| kind.event("ADDED", &String::from_utf8_lossy(&object)).into_bytes())
            .chain(mark);
        let shared = self.clone();
        let mut chunks = std::iter::from_fn(move || chunk(&mut pieces)).peekable();
        let first = stream::iter(std::iter::from_fn(move || {
            let next = chunks.next();
            if initial && next.is_some() && chunks.peek().is_none() {
                shared.store().listed(kind);
            }
            next
        }));
        let seconds = parameters
            .get("timeoutSeconds")
            .and_then(|text| text.parse().ok())
            .unwrap_or(WATCH);
        let end = Instant::now() + Duration::from_secs(seconds);
        let shared = self.clone();
        let changes = stream::unfold(receiver, move |mut receiver| {
            let shared = shared.clone();
            async move {
                let due = end.min(Instant::now() + BOOKMARKS);
                let event = tokio::select! {
                    event = receiver.recv() => event?,
                    () = tokio::time::sleep_until(due) => {
                        if due == end {
                            return None;
                        }
                        let version = shared.store().version;
                        bookmark(kind, version, false).into()
                    }
                };
                Some((event, receiver))
            }
        });
        let body = first.chain(changes).map(Ok::<_, std::convert::Infallible>);
        with_type(StatusCode::OK, Body::from_stream(body))
    }
}

/// The next pieces, together about a [`CHUNK`]; `None` at the end.
fn chunk(pieces: &mut impl Iterator<Item = Vec<u8>>) -> Option<Bytes> {
    let mut text = pieces.next()?;
    while text.len() < CHUNK
        && let Some(piece) = pieces.next()
    {
        text.extend(piece);
    }
    Some(text.into())
}

fn bookmark(kind: Kind, version: u64, ends_list: bool) -> String {
    let mut metadata = json!({"resourceVersion": version.to_string(), "creationTimestamp": null});
    if ends_list {
        metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
    }
    kind.event("BOOKMARK", &json!({"metadata": metadata}).to_string())
}
