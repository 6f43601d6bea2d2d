//! Where the demo's Service and EndpointSlices live: in a folder of manifests, or in somebody's API server.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use proxy_tests::manifests::{self, Manifests, Port, port};
use serde_json::Value;

/// Name of the Service.
pub(crate) const NAME: &str = "ebpf-proxy-demo";
const NAMESPACE: &str = "default";
const PORT: u16 = 80;
const SERVICE_PORTS: [Port; 2] = [port("tcp", "TCP", PORT), port("udp", "UDP", PORT)];
const ENDPOINT_PORTS: [Port; 2] = [
    port("tcp", "TCP", super::cluster::ECHO),
    port("udp", "UDP", super::cluster::ECHO),
];
/// Addresses of the Service in the folder; an API server gives its own.
const CLUSTER_IPS: [&str; 2] = ["10.96.0.10", "fd00:96::a"];

pub(crate) enum Objects {
    Folder(Manifests),
    Api {
        runtime: tokio::runtime::Runtime,
        client: Client,
    },
}

impl Objects {
    pub(crate) fn in_folder(base: &Path) -> Result<Self> {
        Ok(Self::Folder(Manifests::new(base)?))
    }

    pub(crate) fn in_api_server(kubeconfig: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let read = Kubeconfig::read_from(kubeconfig).with_context(|| format!("reading {}", kubeconfig.display()))?;
        let client = runtime.block_on(async {
            let config = Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await?;
            anyhow::Ok(Client::try_from(config)?)
        })?;
        Ok(Self::Api { runtime, client })
    }

    /// Creates the Service with these endpoints and gives the addresses to dial.
    pub(crate) fn publish(&self, endpoints: &[(IpAddr, &str)]) -> Result<Vec<SocketAddr>> {
        let addresses: Vec<String> = match self {
            Self::Folder(_) => CLUSTER_IPS.map(String::from).into(),
            Self::Api { runtime, client } => {
                let mut service = manifests::service(NAME, &[], &SERVICE_PORTS);
                service["spec"] = serde_json::json!({
                    "ports": service["spec"]["ports"],
                    "ipFamilyPolicy": "PreferDualStack",
                });
                let services: Api<Service> = Api::namespaced(client.clone(), NAMESPACE);
                let (how, what) = (PatchParams::apply(NAME).force(), Patch::Apply(&service));
                let apply = services.patch(NAME, &how, &what);
                let made = runtime.block_on(apply).context("creating the Service")?;
                made.spec
                    .and_then(|spec| spec.cluster_ips)
                    .context("the API server gave the Service no address")?
            }
        };
        self.set_endpoints(endpoints)?;
        let parse = |ip: &String| Ok(SocketAddr::new(ip.parse()?, PORT));
        addresses.iter().map(parse).collect()
    }

    /// Makes these the endpoints of the Service.
    pub(crate) fn set_endpoints(&self, endpoints: &[(IpAddr, &str)]) -> Result<()> {
        let slices: Vec<Value> = manifests::slices(NAME, &ENDPOINT_PORTS, endpoints);
        match self {
            Self::Folder(folder) => {
                let mut objects = vec![manifests::service(NAME, &CLUSTER_IPS, &SERVICE_PORTS)];
                objects.extend(slices);
                folder.write(NAME, &objects)
            }
            Self::Api { runtime, client } => {
                let api: Api<EndpointSlice> = Api::namespaced(client.clone(), NAMESPACE);
                for slice in &slices {
                    let name = slice["metadata"]["name"].as_str().unwrap_or(NAME);
                    let (how, what) = (PatchParams::apply(NAME).force(), Patch::Apply(slice));
                    let apply = api.patch(name, &how, &what);
                    runtime
                        .block_on(apply)
                        .with_context(|| format!("writing EndpointSlice {name}"))?;
                }
                Ok(())
            }
        }
    }

    /// Deletes the objects from an API server; a folder goes with everything else.
    pub(crate) fn remove(&self) {
        if let Self::Api { runtime, client } = self {
            let services: Api<Service> = Api::namespaced(client.clone(), NAMESPACE);
            let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), NAMESPACE);
            runtime.block_on(async {
                // Already gone is as good.
                let _ = services.delete(NAME, &DeleteParams::default()).await;
                for family in ["ipv4", "ipv6"] {
                    let _ = slices
                        .delete(&format!("{NAME}-{family}"), &DeleteParams::default())
                        .await;
                }
            });
        }
    }
}

/// A copy of a kubeconfig that reaches the same API server over `relay`; also gives the server's own host and port.
pub(crate) fn through_relay(kubeconfig: &Path, relay: SocketAddr, copy: &Path) -> Result<String> {
    let mut config = Kubeconfig::read_from(kubeconfig).with_context(|| format!("reading {}", kubeconfig.display()))?;
    let current = config
        .current_context
        .clone()
        .context("the kubeconfig has no current context")?;
    let context = config
        .contexts
        .iter()
        .find(|c| c.name == current)
        .and_then(|c| c.context.as_ref());
    let cluster = context
        .map(|c| c.cluster.clone())
        .context("the current context names no cluster")?;
    let cluster = config
        .clusters
        .iter_mut()
        .find(|c| c.name == cluster)
        .and_then(|c| c.cluster.as_mut());
    let cluster = cluster.with_context(|| format!("the cluster of context {current} is not in the kubeconfig"))?;
    let server: http::Uri = cluster
        .server
        .as_deref()
        .unwrap_or_default()
        .parse()
        .context("the cluster's server")?;
    let host = server
        .host()
        .context("the cluster's server has no host")?
        .trim_matches(['[', ']'])
        .to_owned();
    let tls = server.scheme_str() == Some("https");
    let port = server.port_u16().unwrap_or(if tls { 443 } else { 80 });
    cluster.server = Some(format!("{}://{relay}", if tls { "https" } else { "http" }));
    cluster.tls_server_name.get_or_insert(host.clone());
    std::fs::write(copy, serde_json::to_string(&config)?)?;
    Ok(match host.parse() {
        Ok(ip) => SocketAddr::new(ip, port).to_string(),
        Err(_) => format!("{host}:{port}"),
    })
}
