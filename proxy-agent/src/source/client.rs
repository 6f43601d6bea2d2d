//! The client of the API server: where it is, who we are, and connections that end when nobody is there any more.
//!
//! What must stay true: a watch says nothing for as long as nothing changes, so only the connection itself can tell that a server
//! has gone without a word (S161).

use std::path::Path;
use std::time::Duration;

use axum::http::Uri;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ConfigExt};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tower::ServiceBuilder;
use tower::limit::RateLimitLayer;

use crate::config::{ApiServer, Rate};

/// A server that takes longer to accept a connection is tried again.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection is probed after so long a silence, again after so long without an answer, and given up after so many probes: a
/// server that has vanished is noticed within half a minute.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(15);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 3;

/// Why the API server cannot be watched at all.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The kubeconfig file is unusable.
    #[error("kubeconfig {path}: {problem}; give a kubeconfig file with a current context")]
    Kubeconfig {
        /// The file.
        path: String,
        /// What is wrong with it, and why: all in one, or the remedy would not come last.
        problem: String,
    },
    /// We are not in a pod.
    #[error(
        "neither --kubeconfig (or clientConnection.kubeconfig), --master nor --manifests is given, and this is not a pod: {0}"
    )]
    InCluster(#[from] kube::config::InClusterError),
    /// The address given with `--master` is unusable.
    #[error("--master {0}: is not the address of a server; write a URL such as https://192.0.2.10:6443")]
    Master(String),
    /// The client cannot be made.
    #[error("no client for the API server could be made: {0}")]
    Client(#[from] kube::Error),
}

/// What to do where nobody answers.
pub(crate) const UNREACHABLE: &str = "see that the address in the kubeconfig, --master, or KUBERNETES_SERVICE_HOST and _PORT, is reachable without this proxy";
/// What to do where rights are missing.
const RIGHTS: &str = "allow list and watch in the ClusterRole of the agent, as deploy/proxy-agent.yaml does";
/// What to do where nobody knows us.
const CREDENTIALS: &str = "see that token or certificate in the kubeconfig, or the pod's service account, are valid";
/// What to do where there is no Node object.
pub(crate) const NODE_NAME: &str = "give with --node-name what `kubectl get nodes` shows for this node";

/// What to do about a request that failed.
pub(crate) fn remedy(error: &kube::Error) -> &'static str {
    match error {
        kube::Error::Api(status) => match status.code {
            401 => CREDENTIALS,
            403 => RIGHTS,
            _ => "see what the API server says in its log",
        },
        _ => UNREACHABLE,
    }
}

/// An error with its causes, each said once.
pub(crate) fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        next = cause.source();
    }
    text
}

/// A client for the file, or for the service account of this pod. In a pod the address is taken from `KUBERNETES_SERVICE_HOST` and
/// `KUBERNETES_SERVICE_PORT`; set them in the pod's manifest to an address that does not need this proxy, or give it with
/// `--master` (S192).
pub async fn open(server: &ApiServer) -> Result<Client, ClientError> {
    let master = match &server.master {
        Some(url) => Some(url.parse::<Uri>().map_err(|_| ClientError::Master(url.clone()))?),
        None => None,
    };
    let mut config = match (&server.kubeconfig, &master) {
        (Some(path), _) => read_kubeconfig(path).await.map_err(|error| ClientError::Kubeconfig {
            path: path.display().to_string(),
            problem: causes(&error),
        })?,
        (None, None) => Config::incluster()?,
        // Outside of a pod, a server that asks nobody who they are.
        (None, Some(url)) => Config::incluster().unwrap_or_else(|_| Config::new(url.clone())),
    };
    if let Some(url) = master {
        config.cluster_url = url;
    }
    tracing::info!(server = %config.cluster_url, "API server");
    Ok(connect(config, server.rate)?)
}

async fn read_kubeconfig(path: &Path) -> Result<Config, kube::config::KubeconfigError> {
    Config::from_custom_kubeconfig(Kubeconfig::read_from(path)?, &KubeConfigOptions::default()).await
}

/// As [`Client::try_from`], whose connections do not probe: without an answer from the other side it would wait for five minutes.
fn connect(config: Config, rate: Option<Rate>) -> Result<Client, kube::Error> {
    if config.proxy_url.is_some() {
        return Client::try_from(config);
    }
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
    tcp.set_keepalive(Some(KEEPALIVE_AFTER));
    tcp.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
    tcp.set_keepalive_retries(Some(KEEPALIVE_PROBES));
    let http = legacy::Client::builder(TokioExecutor::new())
        .build::<_, Body>(config.rustls_https_connector_with_connector(tcp)?);
    // As many as are allowed at once, in the time in which so many are allowed on average.
    let limit = rate.map(|rate| {
        RateLimitLayer::new(
            rate.burst.into(),
            Duration::from_secs_f64(f64::from(rate.burst) / rate.qps),
        )
    });
    let service = ServiceBuilder::new()
        .option_layer(limit)
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(tower::BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace))
}
