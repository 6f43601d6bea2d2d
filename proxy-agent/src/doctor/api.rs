//! The API server: is it there, and may we read what an agent reads? Only where one is given, or this is a pod.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::api::{Api, ListParams};

use super::{Check, Status};
use crate::config::{ApiServer, RunConfig, SourceConfig};
use crate::datapath::SocketLb;
use crate::source::client::{self, NODE_NAME, UNREACHABLE, causes};
use crate::source::{objects, pods};

const CHECK: &str = "API server";
/// How long it may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// What keeps objects from being read, in one sentence, for commands that have no time to try again.
pub(crate) fn obstacle(config: &RunConfig) -> Option<String> {
    let failed = checks(config).into_iter().find(|check| check.status == Status::Fail)?;
    let Check {
        check, found, remedy, ..
    } = failed;
    Some(format!("{check}: {found}: {remedy}"))
}

pub(super) fn checks(config: &RunConfig) -> Vec<Check> {
    let server = match &config.source {
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
            match tokio::time::timeout(PATIENCE, ask(server, config)).await {
                Ok(checks) => checks,
                Err(_) => vec![Check::fail(
                    CHECK,
                    format!("no answer within {PATIENCE:?}"),
                    UNREACHABLE,
                )],
            }
        }),
        Err(error) => vec![Check::fail(CHECK, format!("cannot be asked: {error}"), UNREACHABLE)],
    }
}

async fn ask(server: &ApiServer, config: &RunConfig) -> Vec<Check> {
    let node = &config.node_name;
    let client = match client::open(server).await {
        Ok(client) => client,
        Err(error) => {
            return vec![Check::fail(
                CHECK,
                causes(&error),
                "give a --kubeconfig that can be read",
            )];
        }
    };
    let version = match client.apiserver_version().await {
        Ok(version) => Check::ok(CHECK, format!("Kubernetes {}", version.git_version)),
        Err(error) => {
            return vec![Check::fail(
                CHECK,
                format!("no answer: {}", causes(&error)),
                client::remedy(&error),
            )];
        }
    };
    let mut checks = vec![
        version,
        may_list::<objects::Service>("access to Services", &client).await,
        may_list::<objects::EndpointSlice>("access to EndpointSlices", &client).await,
        may_list::<objects::Node>("access to Nodes", &client).await,
        service_cidrs(&client).await,
        own_node(&client, node).await,
    ];
    if config.datapath.socket_lb == SocketLb::All {
        checks.push(labelled_pods(&client, node).await);
    }
    checks
}

/// Those that keep their sockets to themselves.
async fn labelled_pods(client: &Client, node: &str) -> Check {
    let check = "access to Pods";
    let watched = pods::selection(node);
    let params = ListParams {
        label_selector: watched.label_selector,
        field_selector: watched.field_selector,
        ..ListParams::default()
    };
    match Api::<Pod>::all(client.clone()).list_metadata(&params).await {
        Ok(list) => Check::ok(
            check,
            format!(
                "{} of this node have the label {}={}",
                list.items.len(),
                pods::LABEL,
                pods::OFF
            ),
        ),
        Err(kube::Error::Api(status)) if status.code == 403 => Check::warn(check, "not allowed", pods::RIGHTS),
        Err(error) => Check::warn(
            check,
            format!("cannot be listed: {}", causes(&error)),
            client::remedy(&error),
        ),
    }
}

/// Older servers have none, and an agent goes on without.
async fn service_cidrs(client: &Client) -> Check {
    let check = may_list::<objects::ServiceCIDR>("access to ServiceCIDRs", client).await;
    match check.status {
        Status::Fail => Check {
            status: Status::Warn,
            ..check
        },
        _ => check,
    }
}

async fn own_node(client: &Client, node: &str) -> Check {
    let check = "Node object";
    match Api::<objects::Node>::all(client.clone()).get_opt(node).await {
        Ok(Some(_)) => Check::ok(check, format!("{node} is there")),
        Ok(None) => Check::warn(check, format!("there is no Node {node}"), NODE_NAME),
        Err(error) => Check::warn(
            check,
            format!("{node} cannot be read: {}", causes(&error)),
            client::remedy(&error),
        ),
    }
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
        Err(kube::Error::Api(status)) if status.code == 404 => Check::ok(check, "not known to this API server"),
        Err(error) => Check::fail(
            check,
            format!("cannot be listed: {}", causes(&error)),
            client::remedy(&error),
        ),
    }
}
