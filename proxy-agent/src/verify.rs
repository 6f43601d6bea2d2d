//! `verify`: reads what the cluster says once, plans for this node as the agent does, and has the datapath say what the kernel holds
//! that is different. Called by `cli`; changes nothing.
//!
//! Source, model and plan are the agent's own, and so are its options: an answer is as good as the options are those of the agent.

use std::time::Duration;

use anyhow::{Context, bail};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout_at};

use crate::config::{RunConfig, SourceConfig};
use crate::datapath::{self, Difference, Wanted};
use crate::doctor::api;
use crate::model::ClusterState;
use crate::netlink::{self, Network};
use crate::source::convert::Converter;
use crate::source::{self, Event};

/// How long objects and interfaces may take to be listed.
const PATIENCE: Duration = Duration::from_secs(30);
/// What differs must still differ after this: the agent and the cluster go on meanwhile.
const SECOND_LOOK: Duration = Duration::from_secs(1);
/// Events that may wait.
const QUEUE: usize = 1024;

/// What differs, and goes on to.
pub fn differences(config: &RunConfig) -> anyhow::Result<Vec<Difference>> {
    if let Some(obstacle) = api::obstacle(config) {
        bail!(obstacle);
    }
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("starting the runtime")?
        .block_on(async {
            let first = look(config).await?;
            if first.is_empty() {
                return Ok(first);
            }
            sleep(SECOND_LOOK).await;
            let second = look(config).await?;
            Ok(first.into_iter().filter(|one| second.contains(one)).collect())
        })
}

async fn look(config: &RunConfig) -> anyhow::Result<Vec<Difference>> {
    let mut state = cluster(config).await?;
    let network = network().await?;
    // Before the networks are asked for.
    let _first_time = state.take_service_networks_changed();
    let plans = state.take_changes();
    let wanted = Wanted {
        plans,
        node: state.node(),
        service_networks: state.service_networks(),
        network: &network,
    };
    datapath::verify(&config.datapath, wanted).context("the pinned maps cannot be compared")
}

/// Everything the cluster has to say. What was being changed while it was listed is settled.
pub(crate) async fn cluster(config: &RunConfig) -> anyhow::Result<ClusterState> {
    let converter = Converter::new(config.node_name.clone())
        .with_external_ips(config.gates.service_external_ips)
        .with_proxy_name(config.service_proxy_name.clone());
    let (sender, mut events) = mpsc::channel(QUEUE);
    let watching = match &config.source {
        SourceConfig::Manifests(dir) => {
            source::manifests::watch(dir.clone(), converter, sender)?;
            None
        }
        SourceConfig::ApiServer(server) => {
            let client = source::client::open(server).await?;
            Some(tokio::spawn(source::kube::watch(client, converter, sender)))
        }
    };
    let deadline = Instant::now() + PATIENCE;
    let mut state = ClusterState::default();
    let complete = async {
        while !state.is_complete() {
            match timeout_at(deadline, events.recv()).await {
                Ok(Some(Event::Change(change))) => state.apply(change),
                Ok(Some(Event::Warning(warning))) => tracing::warn!("{warning}"),
                Ok(None) => bail!("the source of objects ended"),
                Err(_) => {
                    bail!("not every kind of object was listed within {PATIENCE:?}: is the API server reachable?")
                }
            }
        }
        Ok(state)
    }
    .await;
    if let Some(watching) = watching {
        watching.abort();
    }
    complete
}

/// The node's interfaces and addresses.
pub(crate) async fn network() -> anyhow::Result<Network> {
    let (sender, mut network) = watch::channel(None);
    let watching = tokio::spawn(netlink::watch(sender));
    let seen = tokio::time::timeout(PATIENCE, network.wait_for(Option::is_some)).await;
    let seen = seen
        .context("interfaces were not listed in time")?
        .map(|seen| seen.clone());
    watching.abort();
    match seen {
        Ok(Some(network)) => Ok(network),
        _ => match watching.await {
            Ok(Err(error)) => Err(error).context("interfaces cannot be listed"),
            _ => bail!("interfaces cannot be listed"),
        },
    }
}
