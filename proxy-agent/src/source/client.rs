//! The client of the API server: where it is, who we are, and connections that end when nobody is there any more.
//!
//! What must stay true: a watch says nothing for as long as nothing changes, so only the connection itself can tell that a server
//! has gone without a word (S161).

use std::path::Path;
use std::time::Duration;

use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ConfigExt};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tower::ServiceBuilder;

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
    /// The file given with `--kubeconfig` is unusable.
    #[error("--kubeconfig {path}: {source}; give a kubeconfig file with a current context")]
    Kubeconfig {
        /// The file.
        path: String,
        /// What is wrong with it.
        source: kube::config::KubeconfigError,
    },
    /// We are not in a pod.
    #[error("neither --kubeconfig nor --manifests is given, and this is not a pod: {0}")]
    InCluster(#[from] kube::config::InClusterError),
    /// The client cannot be made.
    #[error("no client for the API server could be made: {0}")]
    Client(#[from] kube::Error),
}

/// A client for the file, or for the service account of this pod. In a pod the address is taken from `KUBERNETES_SERVICE_HOST` and
/// `KUBERNETES_SERVICE_PORT`; set them in the pod's manifest to an address that does not need this proxy (S192).
pub async fn open(kubeconfig: Option<&Path>) -> Result<Client, ClientError> {
    let config = match kubeconfig {
        Some(path) => read_kubeconfig(path).await.map_err(|source| ClientError::Kubeconfig {
            path: path.display().to_string(),
            source,
        })?,
        None => Config::incluster()?,
    };
    Ok(connect(config)?)
}

async fn read_kubeconfig(path: &Path) -> Result<Config, kube::config::KubeconfigError> {
    Config::from_custom_kubeconfig(Kubeconfig::read_from(path)?, &KubeConfigOptions::default()).await
}

/// As [`Client::try_from`], whose connections do not probe: without an answer from the other side it would wait for five minutes.
fn connect(config: Config) -> Result<Client, kube::Error> {
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
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(tower::BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace))
}
