//! The API server: is it there, and may we read what an agent reads? Only where one is given, or this is a pod.

use std::time::Duration;

use kube::Client;
use kube::api::{Api, ListParams};

use super::Check;
use crate::config::{ApiServer, SourceConfig};
use crate::source::{client, objects};

const CHECK: &str = "API server";
/// How long it may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
const REMEDY: &str =
    "see that the address in the kubeconfig, or KUBERNETES_SERVICE_HOST and _PORT, is reachable without this proxy";

pub(super) fn checks(source: &SourceConfig) -> Vec<Check> {
    let server = match source {
        SourceConfig::Manifests(_) => return vec![Check::ok(CHECK, "not needed: manifests are read")],
        SourceConfig::ApiServer(server) => server,
    };
    let is_given = server.kubeconfig.is_some() || server.master.is_some();
    if !is_given && std::env::var_os("KUBERNETES_SERVICE_HOST").is_none() {
        return vec![Check::ok(
            CHECK,
            "not looked for: no --kubeconfig is given, and this is no pod",
        )];
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime {
        Ok(runtime) => runtime.block_on(async {
            match tokio::time::timeout(PATIENCE, ask(server)).await {
                Ok(checks) => checks,
                Err(_) => vec![Check::fail(CHECK, format!("no answer within {PATIENCE:?}"), REMEDY)],
            }
        }),
        Err(error) => vec![Check::fail(CHECK, format!("cannot be asked: {error}"), REMEDY)],
    }
}

async fn ask(server: &ApiServer) -> Vec<Check> {
    let client = match client::open(server).await {
        Ok(client) => client,
        Err(error) => {
            return vec![Check::fail(
                CHECK,
                error.to_string(),
                "give a --kubeconfig that can be read",
            )];
        }
    };
    let version = match client.apiserver_version().await {
        Ok(version) => Check::ok(CHECK, format!("Kubernetes {}", version.git_version)),
        Err(error) => return vec![Check::fail(CHECK, format!("no answer: {error}"), REMEDY)],
    };
    vec![
        version,
        may_list::<objects::Service>("access to Services", &client).await,
        may_list::<objects::EndpointSlice>("access to EndpointSlices", &client).await,
        may_list::<objects::Node>("access to Nodes", &client).await,
    ]
}

async fn may_list<K>(check: &'static str, client: &Client) -> Check
where
    K: kube::Resource<DynamicType = ()> + Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    match Api::<K>::all(client.clone())
        .list(&ListParams::default().limit(1))
        .await
    {
        Ok(_) => Check::ok(check, "can be listed"),
        Err(error) => {
            let remedy = "allow list and watch in the ClusterRole of the agent, as deploy/proxy-agent.yaml does";
            Check::fail(check, format!("cannot be listed: {error}"), remedy)
        }
    }
}
