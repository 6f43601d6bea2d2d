//! `run --dry-run`: reads the source until everything has been listed once, plans, and says what would be programmed. Neither the
//! kernel nor the node's network is touched, so it needs no rights but to read.

use anyhow::Context;
use tokio::sync::mpsc;

use crate::config::RunConfig;
use crate::inspect::{self, Output};
use crate::model::ClusterState;
use crate::run::{block_on, start_source};
use crate::source::Event;

const EVENT_QUEUE: usize = 64;

/// What would be programmed, as text.
pub(crate) fn dry_run(config: &RunConfig, output: Output) -> anyhow::Result<String> {
    let state = block_on(first_lists(config));
    let plans = state?.take_changes();
    let plans: Vec<_> = plans
        .into_iter()
        .filter_map(|(name, plan)| Some((name, plan?)))
        .collect();
    inspect::planned(&plans, output).context("showing the plans")
}

async fn first_lists(config: &RunConfig) -> anyhow::Result<ClusterState> {
    let (events_tx, mut events) = mpsc::channel(EVENT_QUEUE);
    // Events about Services are published by what is not run here.
    let _publisher = start_source(config, events_tx).await?;
    let mut state = ClusterState::default();
    while !state.is_complete() {
        match events.recv().await.context("the source of objects ended")? {
            Event::Change(change) => state.apply(change),
            Event::Warning(warning) => tracing::warn!("{warning}"),
        }
    }
    // What is listed in between is what the first plans are made of.
    state.settle();
    Ok(state)
}
